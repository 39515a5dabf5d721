"""One loaded version of a SavedModel: its signatures, and how to run them."""

import functools
import logging
import math
import os
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import tensorflow as tf
from google.protobuf.message import DecodeError
from tensorflow.core.framework import types_pb2
from tensorflow.core.protobuf import config_pb2, meta_graph_pb2

from keras_bn_serving.codec.tensor_spec import TensorSpec
from keras_bn_serving.engine.findings import Findings, find
from keras_bn_serving.engine.xla import needs_xla
from keras_bn_serving.errors import (
    Code,
    FailedPreconditionError,
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    ServingError,
)

_log = logging.getLogger(__name__)
DEFAULT_SIGNATURE = "serving_default"
# More than any request could carry. An empty array may claim any sizes, and kernels count the others in 32 bits.
_MOST_ENTRIES = 2**28
_TAG = "serve"
_FILES = ("saved_model.pb", "saved_model.pbtxt")


@dataclass(frozen=True)
class LoadOptions:
    """How TensorFlow runs the models.

    Attributes:
        intra_op_parallelism: Threads for one operation; 0 lets TensorFlow choose.
        inter_op_parallelism: Threads for operations side by side; 0 lets TensorFlow choose.
        xla: Whether to run functions that were saved to be compiled by XLA.
        timeout_seconds: How long a run may take that is limited at all.
    """

    intra_op_parallelism: int = 0
    inter_op_parallelism: int = 0
    xla: bool = False
    timeout_seconds: float = 0.0


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


class Servable:
    """A SavedModel, loaded into a session of its own.

    Args:
        path: The version's folder.
        options: How to run it.
        name: The model's name, for metrics.

    Raises:
        ServingError: If there is no SavedModel or it cannot be loaded.
    """

    def __init__(self, path: str | os.PathLike[str], options: LoadOptions | None = None, name: str = ""):
        self.name = name
        self.path = os.fspath(path)
        options = options or LoadOptions()
        self.meta_graph, self._session = _load(self.path, options)
        definitions = self.meta_graph.signature_def.items()
        self.signatures = {key: _signature(key, value, self.meta_graph) for key, value in definitions}
        for signature in self.signatures.values():
            if signature.inputs:
                grouped = f"each request alone, as {why}" if (why := signature.findings.alone) else "grouped"
                checked = "are checked" if signature.findings.checks_shapes else "are TensorFlow's to check"
                _log.info("%s, signature %s: %s; shapes %s", name or path, signature.name, grouped, checked)
        self._limit = config_pb2.RunOptions(timeout_in_ms=round(options.timeout_seconds * 1000))
        self._disabled = (
            set()
            if options.xla
            else {
                key
                for key, value in self.signatures.items()
                if needs_xla(self.meta_graph, value.tensors["outputs"].values())
            }
        )
        self._lock = threading.Lock()
        self._callables: dict[tuple[str, tuple[str, ...], bool], object] = {}

    def signature(self, name: str) -> Signature:
        """Returns a signature by name; an empty name stands for `serving_default`.

        Raises:
            FailedPreconditionError: If the model has no such signature.
        """
        key = name or DEFAULT_SIGNATURE
        if key not in self.signatures:
            raise FailedPreconditionError(f'Serving signature key "{key}" not found.')
        return self.signatures[key]

    def run(
        self,
        signature: Signature,
        inputs: Mapping[str, np.ndarray],
        output_names: Iterable[str] = (),
        limited: bool = False,
    ) -> dict[str, np.ndarray]:
        """Runs a signature.

        Args:
            signature: One of this model's.
            inputs: The arrays by input name, no more and no fewer than the signature has.
            output_names: Which outputs to compute; all where empty.
            limited: Whether it may take no longer than the time limit.

        Raises:
            ServingError: If the inputs do not fit, or with TensorFlow's code and message if the model fails.
        """
        check_names(signature, inputs)
        check_types(signature, inputs)
        check_shapes(signature, inputs)
        if signature.name in self._disabled:
            raise InternalError("XLA compilation disabled")
        wanted = tuple(output_names) or tuple(signature.outputs)
        run = self._callable(signature, wanted, limited)
        try:
            values = run(*(inputs[name] for name in sorted(signature.inputs)))  # type: ignore[operator]
        except tf.errors.OpError as error:
            raise ServingError(error.message, Code(error.error_code)) from error
        except UnicodeDecodeError as error:
            # TensorFlow's message quotes bytes of the request, which Python cannot read.
            raise InvalidArgumentError(error.object.decode(errors="surrogateescape")) from error
        # A string scalar comes as bytes, and NumPy would drop the zero bytes at its end.
        arrays = (np.array(value, object) if isinstance(value, bytes) else np.asarray(value) for value in values)
        return dict(zip(wanted, arrays, strict=True))

    def close(self) -> None:
        """Frees the model's memory; a run after this fails."""
        self._callables.clear()
        self._session.close()

    def _callable(self, signature: Signature, output_names: tuple[str, ...], limited: bool) -> object:
        key = (signature.name, output_names, limited)
        with self._lock:
            if key not in self._callables:
                for name in output_names:
                    if name not in signature.outputs:
                        raise InvalidArgumentError(
                            f"output tensor alias not found in signature: {name} Outputs expected to be in the set "
                            f"{_names(signature.outputs)}."
                        )
                # `make_callable` has the same speed only without a feed list; a run through it costs six times this.
                self._callables[key] = self._session._make_callable_from_options(
                    config_pb2.CallableOptions(
                        feed=[signature.tensors["inputs"][name] for name in sorted(signature.inputs)],
                        fetch=[signature.tensors["outputs"][name] for name in output_names],
                        run_options=self._limit if limited else None,
                    )
                )
            return self._callables[key]


def check_names(signature: Signature, inputs: Mapping[str, np.ndarray]) -> None:
    """Raises an InvalidArgumentError unless the names are those of the signature."""
    if inputs.keys() != signature.inputs.keys():
        extra = inputs.keys() - signature.inputs.keys()
        missing = signature.inputs.keys() - inputs.keys()
        raise InvalidArgumentError(
            f"input size does not match signature: {len(inputs)}!={len(signature.inputs)} len({_names(inputs)}) != "
            f"len({_names(signature.inputs)}). Sent extra: {_names(extra)}. Missing but required: {_names(missing)}."
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
    for name, array in inputs.items():
        if not array.size and math.prod(size for size in array.shape if size) > _MOST_ENTRIES:
            raise InvalidArgumentError(
                f"Input `{name}` has no entries, and its sizes but 0 must multiply to {_MOST_ENTRIES} at most. "
                f"Received: shape {_shown(array.shape)}."
            )
    if signature.findings.checks_shapes and (problem := signature.misfit(inputs)):
        raise InvalidArgumentError(problem)


def _load(path: str, options: LoadOptions) -> tuple[meta_graph_pb2.MetaGraphDef, tf.compat.v1.Session]:
    if not any(os.path.exists(os.path.join(path, name)) for name in _FILES):
        raise NotFoundError(f"Could not find SavedModel .pb or .pbtxt at supplied export directory path: {path}")
    config = config_pb2.ConfigProto(
        intra_op_parallelism_threads=options.intra_op_parallelism,
        inter_op_parallelism_threads=options.inter_op_parallelism,
        allow_soft_placement=True,
    )
    graph = tf.Graph()
    session = tf.compat.v1.Session(graph=graph, config=config)
    try:
        with graph.as_default():
            return tf.compat.v1.saved_model.loader.load(session, [_TAG], path), session
    except tf.errors.OpError as error:
        session.close()
        raise ServingError(error.message, Code(error.error_code)) from error
    except (OSError, DecodeError, ValueError, TypeError, KeyError, RuntimeError) as error:
        session.close()
        raise ServingError(f"Cannot load the SavedModel at {path}: {error}", Code.DATA_LOSS) from error


def _signature(key: str, definition: meta_graph_pb2.SignatureDef, meta_graph: meta_graph_pb2.MetaGraphDef) -> Signature:
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


def _shape(info: meta_graph_pb2.TensorInfo) -> tuple[int, ...] | None:
    return None if info.tensor_shape.unknown_rank else tuple(dim.size for dim in info.tensor_shape.dim)


def _shown(shape: Iterable[int]) -> str:
    return f"[{','.join('?' if size < 0 else str(size) for size in shape)}]"


def _type_name(data_type: int) -> str:
    return types_pb2.DataType.Name(data_type).removeprefix("DT_").lower()


@functools.cache
def _numpy_dtype(type_name: str) -> np.dtype:
    return np.dtype(tf.as_dtype(types_pb2.DataType.Value(f"DT_{type_name.upper()}")).as_numpy_dtype)


def _names(names: Iterable[str]) -> str:
    return "{" + ",".join(sorted(names)) + "}"
