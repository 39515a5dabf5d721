"""Classification and regression: examples in, labelled scores or numbers out, on top of a signature over examples."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import tensorflow as tf
from google.protobuf import text_format
from tensorflow.core.framework import types_pb2
from tensorflow.core.protobuf import meta_graph_pb2
from tensorflow_serving.apis import input_pb2

from keras_bn_serving.engine.servable import DEFAULT_SIGNATURE, Servable
from keras_bn_serving.engine.signatures import Signature
from keras_bn_serving.errors import InvalidArgumentError

CLASSIFY = "tensorflow/serving/classify"
REGRESS = "tensorflow/serving/regress"
_INPUTS = "inputs"
_CLASSES = "classes"
_SCORES = "scores"
_REGRESSION = "outputs"


class Classes(NamedTuple):
    """What a classifier says of a batch.

    Attributes:
        labels: `bytes` objects by example and class, or `None` where the model gives none.
        scores: Numbers by example and class, or `None` where the model gives none.
    """

    labels: np.ndarray | None
    scores: np.ndarray | None


def find_signature(servable: Servable, name: str) -> Signature:
    """Returns a signature for classify or regress.

    Raises:
        InvalidArgumentError: If there is none of that name.
    """
    key = name or DEFAULT_SIGNATURE
    if key not in servable.signatures:
        raise InvalidArgumentError(f"No signature was found with the name: {key}")
    return servable.signatures[key]


def check_classify(definition: meta_graph_pb2.SignatureDef) -> None:
    """Raises an InvalidArgumentError unless the signature can classify."""
    if len(definition.inputs) != 1:
        raise InvalidArgumentError("Expected one input Tensor.")
    if len(definition.outputs) not in (1, 2):
        raise InvalidArgumentError(f"Expected one or two output Tensors, found {len(definition.outputs)}")
    if _INPUTS not in definition.inputs:
        raise InvalidArgumentError(f"No classification inputs found in SignatureDef: {_shown(definition)}")
    if not {_CLASSES, _SCORES} & definition.outputs.keys():
        raise InvalidArgumentError(
            f'Expected classification signature outputs to contain at least one of "{_CLASSES}" or "{_SCORES}". '
            f"Signature was: {_shown(definition)}"
        )


def check_regress(definition: meta_graph_pb2.SignatureDef) -> None:
    """Raises an InvalidArgumentError unless the signature can regress."""
    if len(definition.inputs) != 1:
        raise InvalidArgumentError("Expected one input Tensor.")
    if len(definition.outputs) != 1:
        raise InvalidArgumentError("Expected one output Tensor.")
    if _INPUTS not in definition.inputs:
        raise InvalidArgumentError(f"No regression inputs found in SignatureDef: {_shown(definition)}")
    if _REGRESSION not in definition.outputs:
        raise InvalidArgumentError(f"No regression outputs found in SignatureDef: {_shown(definition)}")


def serialize(message: input_pb2.Input) -> dict[str, np.ndarray]:
    """Returns the signature's input: every example serialized, the context before it.

    Raises:
        InvalidArgumentError: If there is no example.
    """
    kind = message.WhichOneof("kind")
    examples = getattr(message, kind).examples if kind else ()
    if not examples:
        raise InvalidArgumentError("Input is empty.")
    context = message.example_list_with_context.context.SerializeToString() if kind != "example_list" else b""
    array = np.empty(len(examples), object)
    # Messages that follow one another merge when parsed; of equal features the later one counts.
    array[:] = [context + example.SerializeToString() for example in examples]
    return {_INPUTS: array}


def read_classes(outputs: Mapping[str, np.ndarray], count: int) -> Classes:
    """Reads what the model said of `count` examples.

    Raises:
        InvalidArgumentError: If its outputs are not a classification of that many.
    """
    found = Classes(outputs.get(_CLASSES), outputs.get(_SCORES))
    for name, array, data_type in (
        ("classes", found.labels, types_pb2.DT_STRING),
        ("scores", found.scores, types_pb2.DT_FLOAT),
    ):
        if array is None:
            continue
        if array.ndim != 2:
            raise InvalidArgumentError(f"Expected Tensor shape: [batch_size num_classes] but got {_shape(array)}")
        if _data_type(array) != data_type:
            raise InvalidArgumentError(
                f"Expected {name} Tensor of {types_pb2.DataType.Name(data_type)}. "
                f"Got: {types_pb2.DataType.Name(_data_type(array))}"
            )
        if len(array) != count:
            raise InvalidArgumentError(f"Expected {name} output batch size of {count}. Got: {len(array)}")
    if found.labels is not None and found.scores is not None and found.labels.shape != found.scores.shape:
        raise InvalidArgumentError(
            f"Tensors class and score should match in dim_size(1). Got {found.labels.shape[1]} vs. "
            f"{found.scores.shape[1]}"
        )
    return found


def read_numbers(outputs: Mapping[str, np.ndarray], count: int) -> np.ndarray:
    """Reads one number for each of `count` examples.

    Raises:
        InvalidArgumentError: If the model's output is not that.
    """
    array = outputs[_REGRESSION]
    if array.ndim not in (1, 2) or (array.ndim == 2 and array.shape[1] != 1):
        raise InvalidArgumentError(
            f"Expected output Tensor shape to be either [batch_size] or [batch_size, 1] but got {_shape(array)}"
        )
    if len(array) != count:
        raise InvalidArgumentError(f"Input batch size did not match output batch size: {count} vs. {len(array)}")
    if array.dtype != np.float32:
        raise InvalidArgumentError(
            f"Expected output Tensor of DT_FLOAT.  Got: {types_pb2.DataType.Name(_data_type(array))}"
        )
    return array.reshape(-1)


def _shown(definition: meta_graph_pb2.SignatureDef) -> str:
    return text_format.MessageToString(definition, as_utf8=False)


def _shape(array: np.ndarray) -> str:
    return "[" + ",".join(map(str, array.shape)) + "]"


def _data_type(array: np.ndarray) -> int:
    return tf.as_dtype(array.dtype).as_datatype_enum
