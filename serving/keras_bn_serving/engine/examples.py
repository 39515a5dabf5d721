"""Classification and regression: examples in, labelled scores or numbers out, on top of a signature over examples."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from tensorflow_serving.apis import input_pb2

from keras_bn_serving.engine.servable import DEFAULT_SIGNATURE, Servable, Signature
from keras_bn_serving.errors import FailedPreconditionError, InvalidArgumentError

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


def check_classify(signature: Signature) -> None:
    """Raises a ServingError unless the signature can classify."""
    _check_inputs(signature, "classification")
    if len(signature.outputs) not in (1, 2):
        raise InvalidArgumentError(f"Expected one or two output Tensors, found {len(signature.outputs)}")
    if not {_CLASSES, _SCORES} & signature.outputs.keys():
        raise FailedPreconditionError(
            f"Expected classification signature outputs to contain at least one of {_CLASSES} or {_SCORES}. "
            f"Signature was: {signature.name}"
        )


def check_regress(signature: Signature) -> None:
    """Raises a ServingError unless the signature can regress."""
    _check_inputs(signature, "regression")
    if len(signature.outputs) != 1:
        raise InvalidArgumentError("Expected one output Tensor.")
    if _REGRESSION not in signature.outputs:
        raise FailedPreconditionError(f"No regression outputs found in SignatureDef: {signature.name}")


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
    for name, array, dtype in (("classes", found.labels, object), ("scores", found.scores, np.float32)):
        if array is None:
            continue
        if array.ndim != 2:
            raise InvalidArgumentError(
                f"Expected Tensor shape: [batch_size num_classes] but {name} has {list(array.shape)}"
            )
        if array.dtype != dtype:
            raise InvalidArgumentError(f"Expected {name} Tensor of {np.dtype(dtype)}. Got: {array.dtype}")
        if len(array) != count:
            raise InvalidArgumentError(f"Expected {name} output batch size of {count}. Got: {len(array)}")
    if found.labels is not None and found.scores is not None and found.labels.shape != found.scores.shape:
        raise InvalidArgumentError("Expected classes and scores Tensors of one shape.")
    return found


def read_numbers(outputs: Mapping[str, np.ndarray], count: int) -> np.ndarray:
    """Reads one number for each of `count` examples.

    Raises:
        InvalidArgumentError: If the model's output is not that.
    """
    array = outputs[_REGRESSION]
    if array.ndim not in (1, 2) or (array.ndim == 2 and array.shape[1] != 1):
        raise InvalidArgumentError(
            f"Expected output Tensor shape to be either [batch_size] or [batch_size, 1] but got {list(array.shape)}"
        )
    if len(array) != count:
        raise InvalidArgumentError(f"Input batch size did not match output batch size: {count} vs. {len(array)}")
    if array.dtype != np.float32:
        raise InvalidArgumentError(f"Expected output Tensor of DT_FLOAT.  Got: {array.dtype}")
    return array.reshape(-1)


def _check_inputs(signature: Signature, kind: str) -> None:
    if len(signature.inputs) != 1:
        raise InvalidArgumentError("Expected one input Tensor.")
    if _INPUTS not in signature.inputs:
        raise FailedPreconditionError(f"No {kind} inputs found in SignatureDef: {signature.name}")
