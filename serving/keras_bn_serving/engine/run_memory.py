"""How many rows of a request run at once, so that what a model takes while it runs is bounded."""

import itertools
import logging
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import tensorflow as tf
from tensorflow.core.protobuf import meta_graph_pb2

from keras_bn_serving.codec.tensor_spec import TensorSpec
from keras_bn_serving.engine import flat_graph
from keras_bn_serving.engine.signatures import Signature
from keras_bn_serving.errors import ResourceExhaustedError

_log = logging.getLogger(__name__)
# What one row takes is reckoned from a run of this many: beside them, what is there once for all counts little.
_ROWS = 1024
_MOST_KNOWN = 256
# Their outputs are there before the run, or lie where their first input does.
_LOADED = frozenset({"Const", "Placeholder", "ReadVariableOp", "VarHandleOp", "VariableV2"})
_SHARING = frozenset({"EnsureShape", "ExpandDims", "Identity", "Reshape", "Squeeze", "StopGradient"})
_FUNCTIONS = {
    "While": ("body",),
    "StatelessWhile": ("body",),
    "If": ("then_branch", "else_branch"),
    "StatelessIf": ("then_branch", "else_branch"),
}


class Need(NamedTuple):
    """Bytes that each row takes.

    Attributes:
        run: While the model runs.
        outputs: Of these, what is left of it in the outputs.
    """

    run: float
    outputs: float


class RunMemory:
    """Cuts a run into parts that keep within a number of bytes.

    What a run takes is reckoned from the sizes of all that the graph computes, each as long as something still needs
    it. Sizes that depend on values are not known, nor is what a kernel takes for itself.

    Args:
        meta_graph: The model.
        limit: How many bytes a run may take; 0 for any number.
    """

    def __init__(self, meta_graph: meta_graph_pb2.MetaGraphDef, limit: int):
        self._meta_graph = meta_graph
        self._limit = limit
        self._needs: dict[object, Need | None] = {}

    def expect(self, signature: Signature) -> None:
        """Reckons before the first request what can be; a signature that leaves sizes open waits for one."""
        shapes = {name: spec.shape for name, spec in signature.inputs.items()}
        known = {name: shape for name, shape in shapes.items() if shape is not None and -1 not in shape[1:]}
        if self._limit and known and len(known) == len(shapes):
            rows = {name for name, spec in signature.inputs.items() if _is_open(spec)}
            self._need(signature, {name: (_ROWS, *s[1:]) if name in rows else s for name, s in known.items()})

    def parts(self, signature: Signature, inputs: Mapping[str, np.ndarray]) -> list[slice]:
        """Returns which rows run one after the other; nothing where all inputs run as they are.

        Raises:
            ResourceExhaustedError: If the rows may not be parted, or their outputs alone are too many bytes.
        """
        batches = {name: array for name, array in inputs.items() if array.ndim and _is_open(signature.inputs[name])}
        rows = max((len(array) for array in batches.values()), default=0)
        misfits = bool(signature.misfit(inputs))
        # A single row cannot be parted, and is the least that a model is there for.
        if not self._limit or (rows < 2 and not misfits):
            return []
        if misfits:
            self._check_at_once(signature, inputs, max(rows, 1))
            return []
        shapes = {name: (_ROWS, *a.shape[1:]) if name in batches else a.shape for name, a in inputs.items()}
        need = self._need_about(signature, shapes)
        # A row of fewer takes no more than one of many, and the same where each stands alone.
        known = rows <= _ROWS or signature.rows_stand_alone
        if need is None or (known and need.run * rows <= self._limit):
            return []
        if not signature.rows_stand_alone:
            self._check_at_once(signature, inputs, rows)
            return []
        if len(batches) < len(inputs) or any(len(array) != rows for array in batches.values()):
            raise self._refusal(f"{rows} rows, which cannot be run in parts, need", need.run * rows)
        # One half for what has been computed, one for what is being computed.
        if need.outputs * rows > self._limit / 2:
            raise self._refusal(f"{rows} rows have outputs that need, twice,", 2 * need.outputs * rows)
        step = max(1, int(self._limit / 2 / need.run))
        return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]

    def _check_at_once(self, signature: Signature, inputs: Mapping[str, np.ndarray], rows: int) -> None:
        """Refuses what takes too much; of rows that meet each other, twice as many may take four times as much."""
        shapes = {name: array.shape for name, array in inputs.items()}
        need = self._need_about(signature, shapes)
        if need is not None and need.run * rows > self._limit:
            need = self._need(signature, shapes)
        if need is not None and need.run * rows > self._limit:
            raise self._refusal(f"{rows} rows, which cannot be run in parts, need", need.run * rows)

    def _need_about(self, signature: Signature, shapes: Mapping[str, tuple[int, ...]]) -> Need | None:
        """Of open sizes that are rounded up: reading a graph takes long, and is not for every length of a text."""
        near = {name: _rounded(shape, signature.inputs[name]) for name, shape in shapes.items()}
        return self._need(signature, near) or self._need(signature, shapes)

    def _refusal(self, what: str, size: float) -> ResourceExhaustedError:
        return ResourceExhaustedError(
            f"The request's {what} {math.ceil(size / 2**20)} MiB while the model runs; a run may take "
            f"{math.ceil(self._limit / 2**20)} MiB (--run_memory_in_mb, by the number of runs at a time). "
            "Send fewer rows at a time."
        )

    def _need(self, signature: Signature, shapes: Mapping[str, tuple[int, ...]]) -> Need | None:
        key = (signature.name, tuple(sorted(shapes.items())))
        if key not in self._needs:
            if len(self._needs) >= _MOST_KNOWN:
                self._needs.clear()
            self._needs[key] = self._reckoned(signature, shapes)
        return self._needs[key]

    def _reckoned(self, signature: Signature, shapes: Mapping[str, tuple[int, ...]]) -> Need | None:
        inputs, outputs = signature.tensors["inputs"], list(signature.tensors["outputs"].values())
        try:
            flat = flat_graph.of_signature(self._meta_graph, inputs, outputs, shapes)
            lengths = [shape[0] for name, shape in shapes.items() if shape and _is_open(signature.inputs[name])]
            rows = max([1, *lengths])
            return Need(_most_at_once(flat, rows) / rows, sum(_size(tensor, rows) for tensor in flat.outputs) / rows)
        except ValueError as error:
            # TensorFlow says so when it runs, or knows more than the graph tells.
            _log.debug("signature %s: what a run takes is not known: %s", signature.name, error)
            return None


def _is_open(spec: TensorSpec) -> bool:
    return spec.shape is None or spec.shape[:1] == (-1,)


def _rounded(shape: Sequence[int], spec: TensorSpec) -> tuple[int, ...]:
    """Returns a shape whose open sizes are rounded up to three binary digits."""
    known = spec.shape if spec.shape is not None and len(spec.shape) == len(shape) else (-1,) * len(shape)
    steps = [1 if fixed >= 0 else 1 << max(0, size.bit_length() - 3) for size, fixed in zip(shape, known, strict=True)]
    return tuple(-(-size // step) * step for size, step in zip(shape, steps, strict=True))


def _most_at_once(flat: flat_graph.FlatGraph, rows: int) -> int:
    """Returns how many bytes there are at once at most where operations run as soon as they can."""
    place: dict[str, str] = {}
    level: dict[str, int] = {}
    operations = flat.operations()
    for operation in operations:
        before = [*(tensor.op.name for tensor in operation.inputs), *(op.name for op in operation.control_inputs)]
        level[operation.name] = 1 + max((level[name] for name in before), default=0)
        for tensor in operation.outputs:
            shared = operation.type in _SHARING
            place[tensor.name] = place[operation.inputs[0].name] if shared else tensor.name
    operations.sort(key=lambda operation: level[operation.name])
    last = {place[tensor.name]: position for position, op in enumerate(operations) for tensor in op.inputs}
    last |= {place[tensor.name]: len(operations) for tensor in flat.outputs}
    begun, ended = [0] * (len(operations) + 1), [0] * (len(operations) + 1)
    within = [0] * (len(operations) + 1)
    for position, operation in enumerate(operations):
        if operation.type in _LOADED or operation.type in _SHARING:
            continue
        within[position] = _within(operation, flat, rows)
        for tensor in operation.outputs:
            begun[position] += _size(tensor, rows)
            ended[last.get(tensor.name, position)] += _size(tensor, rows)
    held = itertools.accumulate(begin - end for begin, end in zip(begun, [0, *ended], strict=False))
    return max((now + inside for now, inside in zip(held, within, strict=True)), default=0)


def _within(operation: tf.Operation, flat: flat_graph.FlatGraph, rows: int) -> int:
    """Returns what the functions of a loop or condition take while it runs: once, of a loop."""
    arguments = list(operation.inputs)[1 if operation.type.endswith("If") else 0 :]
    names = [operation.get_attr(attribute).name for attribute in _FUNCTIONS.get(operation.type, ())]
    bodies = (flat_graph.of_function(flat.library, name, arguments) for name in names)
    return max((_most_at_once(body, rows) for body in bodies), default=0)


def _size(tensor: tf.Tensor, rows: int) -> int:
    """Returns the bytes of a tensor; a size that is not known is taken to be the number of rows, once."""
    if tensor.shape.rank is None:
        return 0
    sizes = tensor.shape.as_list()
    known = math.prod(size for size in sizes if size is not None)
    return known * (rows if None in sizes else 1) * tensor.dtype.size
