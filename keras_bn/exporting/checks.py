"""Checks of a SavedModel that was just written: each says no with the reason, or says nothing."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2

from keras_bn.folding.proof import Errors, largest_errors

# TensorFlow has them, a server has no Python to run them in.
_PYTHON_OPS = {"PyFunc", "PyFuncStateless", "EagerPyFunc"}
_WRITES = ("Assign", "ResourceApply", "ResourceScatter", "ResourceSparseApply", "ResourceStridedSliceAssign")


def check_graph(folder: Path, signature: str, compiled_is_fine: bool) -> None:
    """What can be read off the operations behind `signature`.

    Raises:
        ValueError: where one writes a variable, computes batch statistics, needs more than stock TensorFlow, or is
            compiled by XLA though `compiled_is_fine` is False.
    """
    for node, function in _operations(folder, signature):
        where = f"operation {node.name!r} ({node.op}) of signature {signature!r}"
        if node.op.startswith(_WRITES):
            raise ValueError(f"`model` must not change in inference. Received: {where} writes a variable.")
        # True is the default, which a SavedModel leaves out.
        if node.op.startswith("FusedBatchNorm") and ("is_training" not in node.attr or node.attr["is_training"].b):
            raise ValueError(f"`model` must normalize with its own statistics. Received: {where} takes the batch's.")
        if node.op in _PYTHON_OPS or not (hasattr(tf.raw_ops, node.op) or function is not None):
            raise ValueError(
                f"`model` must consist of stock TensorFlow operations, as a server has no other. Received: {where}."
            )
        compiled = node.attr["_XlaMustCompile"].b or (function is not None and function.attr["_XlaMustCompile"].b)
        if compiled and not compiled_is_fine:
            raise ValueError(
                "`model` must not hold compiled functions (`jit_compile=True` inside a layer), which a server "
                f"refuses unless it is told otherwise; or pass `jit_compile=True`. Received: {where} is compiled."
            )


def check_outputs(
    served: Callable[..., Mapping[str, tf.Tensor]],
    predict: Callable[[Mapping[str, Any]], Mapping[str, tf.Tensor]],
    batches: list[dict[str, Any]],
    tolerance: float,
) -> Errors:
    """The signature loaded afresh against the model itself.

    Raises:
        ValueError: where the largest relative error is above `tolerance`.
    """
    errors = []
    for batch in batches:
        expected, got = predict(batch), served(**batch)
        errors.append(largest_errors(expected, {name: got[name] for name in expected}))
    worst = Errors(*np.max(errors, axis=0).tolist())
    if not worst.relative <= tolerance:
        raise ValueError(
            "`model` must compute the same when it is called and when it is served. Received: outputs that differ by "
            f"{worst.relative:.3g} relative, {worst.absolute:.3g} absolute; allowed is {tolerance:g} relative."
        )
    return worst


def check_rows(served: Callable[..., Mapping[str, tf.Tensor]], batch: dict[str, Any], tolerance: float) -> None:
    """Row i of a batch gets the answer it gets alone.

    Raises:
        ValueError: where the largest relative error is above `tolerance`, or an output has no row for each example.
    """
    together = served(**batch)
    rows = len(next(iter(batch.values())))
    for name, value in together.items():
        if value.shape.rank == 0 or value.shape[0] != rows:
            raise ValueError(
                "`model` must have outputs of a row for each example. "
                f"Received: output {name!r} of shape {tuple(value.shape)} for {rows} examples."
            )
    numbers = [name for name, value in together.items() if value.dtype != tf.string]
    for i in (0, rows - 1):
        alone = served(**{name: value[i : i + 1] for name, value in batch.items()})
        error = largest_errors({n: together[n][i : i + 1] for n in numbers}, {n: alone[n] for n in numbers}).relative
        if not error <= tolerance:
            raise ValueError(
                "`model` must answer for each example by itself, whatever else is in the batch. Received: row "
                f"{i} of {rows} differs by {error:.3g} relative from the same row alone; allowed is {tolerance:g}."
            )


def _operations(folder: Path, signature: str) -> Iterator[tuple[Any, Any]]:
    """The nodes behind a signature, through all functions called, each with the function it calls or None."""
    saved = saved_model_pb2.SavedModel()
    saved.ParseFromString((folder / "saved_model.pb").read_bytes())
    meta_graph = saved.meta_graphs[0]
    functions = {function.signature.name: function for function in meta_graph.graph_def.library.function}
    nodes = {node.name: node for node in meta_graph.graph_def.node}
    names = {_node_name(info.name) for info in meta_graph.signature_def[signature].outputs.values()}
    pending, behind = list(names), []
    while pending:
        behind.append(nodes[pending.pop()])
        new = {_node_name(name) for name in behind[-1].input} - names
        names |= new
        pending.extend(new)
    seen: set[str] = set()
    while behind:
        node = behind.pop()
        called = [functions[name] for name in _called(node) if name in functions]
        yield node, next(iter(called), None)
        for function in called:
            if function.signature.name not in seen:
                seen.add(function.signature.name)
                behind.extend(function.node_def)


def _node_name(tensor_name: str) -> str:
    return tensor_name.lstrip("^").split(":")[0]


def _called(node: Any) -> Iterator[str]:
    yield node.op
    for value in node.attr.values():
        if value.HasField("func"):
            yield value.func.name
        for function in value.list.func:
            yield function.name
