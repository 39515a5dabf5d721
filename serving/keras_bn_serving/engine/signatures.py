"""What goes into a signature and what comes out, and whether a request fits."""

import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import tensorflow as tf
from tensorflow.core.framework import types_pb2
from tensorflow.core.protobuf import meta_graph_pb2

from keras_bn_serving.codec.tensor_spec import TensorSpec
from keras_bn_serving.engine.findings import Findings, find
from keras_bn_serving.errors import InvalidArgumentError

# More than any request could carry. An empty array may claim any sizes, and kernels count the others in 32 bits.
_MOST_ENTRIES = 2**28


@dataclass(frozen=True)
class Signature:
    """One entry point of a model.

    Attributes:
        name: Its key in the SavedModel.
        method_name: What it is for, as the SavedModel says: predict, classify or regress.
        inputs: What goes in, by name.
        outputs: What comes out, by name.
        tensors: TensorFlow's tensor name for every input and output name.
        findings: What its graph tells.
    """

    name: str
    method_name: str
    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]
    tensors: Mapping[str, Mapping[str, str]] = field(repr=False)
    findings: Findings = field(repr=False)

    @property
    def rows_stand_alone(self) -> bool:
        """Whether it is proved that no row of the outputs depends on another row than its own."""
        return not self.findings.alone

    def misfit(self, inputs: Mapping[str, np.ndarray]) -> str:
        """Returns what is wrong with the shapes of inputs, for a person; empty where they are the signature's."""
        for name, spec in self.inputs.items():
            shape = inputs[name].shape
            if spec.shape is None:
                ranks = self.findings.ranks.get(name)
                if ranks is not None and len(shape) not in ranks:
                    axes = " or ".join(map(str, sorted(ranks))) or "no number that is known"
                    return f"Input `{name}` must have a rank of {axes}. Received: shape {_shown(shape)}."
            elif len(shape) != len(spec.shape) or any(
                size not in (-1, got) for size, got in zip(spec.shape, shape, strict=True)
            ):
                return f"Input `{name}` must have the shape {_shown(spec.shape)}. Received: shape {_shown(shape)}."
        return ""


def read_signature(
    key: str, definition: meta_graph_pb2.SignatureDef, meta_graph: meta_graph_pb2.MetaGraphDef
) -> Signature:
    """Returns the signature that a SavedModel has under `key`, with what its graph tells."""

    def specs(infos: Mapping[str, meta_graph_pb2.TensorInfo]) -> dict[str, TensorSpec]:
        return {name: TensorSpec(_type_name(info.dtype), _shape(info)) for name, info in sorted(infos.items())}

    inputs, outputs = specs(definition.inputs), specs(definition.outputs)
    names = {
        "inputs": {name: info.name for name, info in definition.inputs.items()},
        "outputs": {name: info.name for name, info in definition.outputs.items()},
    }
    batches = all(spec.shape and spec.shape[0] == -1 for spec in [*inputs.values(), *outputs.values()])
    findings = find(meta_graph, names["inputs"], list(names["outputs"].values()), inputs, batches)
    return Signature(key, definition.method_name, inputs, outputs, names, findings)


def check_names(signature: Signature, inputs: Mapping[str, np.ndarray]) -> None:
    """Raises an InvalidArgumentError unless the names are those of the signature."""
    if inputs.keys() != signature.inputs.keys():
        extra = inputs.keys() - signature.inputs.keys()
        missing = signature.inputs.keys() - inputs.keys()
        raise InvalidArgumentError(
            f"input size does not match signature: {len(inputs)}!={len(signature.inputs)} len({name_set(inputs)}) != "
            f"len({name_set(signature.inputs)}). Sent extra: {name_set(extra)}. Missing but required: "
            f"{name_set(missing)}."
        )


def check_types(signature: Signature, inputs: Mapping[str, np.ndarray]) -> None:
    """Raises an InvalidArgumentError unless the element types are those of the signature."""
    for position, name in enumerate(sorted(signature.inputs, key=signature.tensors["inputs"].__getitem__)):
        expected = signature.inputs[name].dtype
        if inputs[name].dtype != _numpy_dtype(expected):
            got = _type_name(tf.as_dtype(inputs[name].dtype).as_datatype_enum)
            raise InvalidArgumentError(f"Expects arg[{position}] to be {expected} but {got} is provided")


def check_shapes(signature: Signature, inputs: Mapping[str, np.ndarray]) -> None:
    """Raises an InvalidArgumentError if shapes are not the signature's where that may do harm, or are none of data."""
    if signature.findings.checks_shapes and (problem := signature.misfit(inputs)):
        raise InvalidArgumentError(problem)
    for name, array in inputs.items():
        if not array.size and math.prod(size for size in array.shape if size) > _MOST_ENTRIES:
            raise InvalidArgumentError(
                f"Input `{name}` has no entries, and its sizes but 0 must multiply to {_MOST_ENTRIES} at most. "
                f"Received: shape {_shown(array.shape)}."
            )


def _shape(info: meta_graph_pb2.TensorInfo) -> tuple[int, ...] | None:
    return None if info.tensor_shape.unknown_rank else tuple(dim.size for dim in info.tensor_shape.dim)


def _shown(shape: Iterable[int]) -> str:
    return f"[{','.join('?' if size < 0 else str(size) for size in shape)}]"


def _type_name(data_type: int) -> str:
    return types_pb2.DataType.Name(data_type).removeprefix("DT_").lower()


@functools.cache
def _numpy_dtype(type_name: str) -> np.dtype:
    return np.dtype(tf.as_dtype(types_pb2.DataType.Value(f"DT_{type_name.upper()}")).as_numpy_dtype)


def name_set(names: Iterable[str]) -> str:
    """Returns names as TensorFlow Serving lists them."""
    return "{" + ",".join(sorted(names)) + "}"
