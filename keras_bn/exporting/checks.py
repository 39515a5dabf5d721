"""Checks of a SavedModel that was just written: each says no with the reason, or says nothing."""

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import keras
import numpy as np
import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2

from keras_bn.folding.proof import Errors, Tolerance, largest_errors
from keras_bn.model import layers_below

# Of a batch to check with: 1, 2 and 4 rows together.
ROWS = 7

# TensorFlow has them, a server has no Python to run them in.
_PYTHON_OPS = {"PyFunc", "PyFuncStateless", "EagerPyFunc"}
_WRITES = ("Assign", "ResourceApply", "ResourceScatter", "ResourceSparseApply", "ResourceStridedSliceAssign")

_SCOPE_INSIDE = re.compile(r"[A-Za-z0-9_.>-]*")
_VARIABLE = re.compile(r"[A-Za-z0-9.][A-Za-z0-9_.\\/>-]*")
_SCOPE = re.compile(r"([A-Za-z0-9.][A-Za-z0-9_.>-]*)?")


def check_keeps_no_state(model: keras.Model) -> None:
    """Before anything is written: that no request would be answered by what another one left behind.

    Raises:
        ValueError: where a recurrent layer is stateful.
    """
    for layer in layers_below(model):
        if isinstance(layer, keras.layers.RNN) and layer.stateful:
            raise ValueError(
                "`model` must keep no state from one batch to the next, as a server answers everybody. "
                f"Received: layer {layer.name!r} with stateful=True; make the model with stateful=False and give it "
                "the weights, `new.set_weights(model.get_weights())`."
            )


def check_layer_names(model: keras.Model) -> None:
    """Before anything is traced: that the name of each layer can be one of TensorFlow's scopes.

    Raises:
        ValueError: naming the layer.
    """
    for layer in layers_below(model):
        # An input's name is none of a scope, and becomes one of a signature in any case.
        allowed = _SCOPE_INSIDE if layer is not model else _SCOPE
        if not isinstance(layer, keras.layers.InputLayer) and not allowed.fullmatch(layer.name):
            _refuse_name(f"layer {layer.name!r} of type {type(layer).__name__}")


def check_variable_names(*models: keras.Model | None) -> None:
    """Before anything is written: that TensorFlow can copy all variables under their names, which begin with a layer's.

    Raises:
        ValueError: naming the variable.
    """
    for model in models:
        for variable in [] if model is None else model.variables:
            name = variable.value.name.removesuffix(":0")  # It need not be the path, for what was built by itself.
            if not _VARIABLE.fullmatch(name):
                _refuse_name(f"variable {name!r}")


def _refuse_name(what: str) -> NoReturn:
    raise ValueError(
        "`model` must have layers and variables whose names TensorFlow takes: ASCII letters, digits, `_`, `.`, `-` and "
        "`>`, and outermost a letter, a digit or `.` in front; a class that begins with `_` gives another by itself. "
        "Make the layer with a `name`, and give the new model the weights, "
        "`new.set_weights(model.get_weights())`. "
        f"Received: {what}."
    )


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
                "`model` must not hold compiled functions (`jit_compile=True` inside a layer, or grouped convolutions, "
                "which Keras compiles on a CPU), as a server without `--xla_cpu_compilation_enabled` refuses them; for "
                f"one with it pass `jit_compile=True`. Received: {where} is compiled."
            )


def check_shapes(folder: Path, signature: str) -> None:
    """What is written of the shapes: a server's batching counts the rows of every input and output.

    Raises:
        ValueError: where an input or output has no first axis of free size.
    """
    definition = _meta_graph(folder).signature_def[signature]
    for kind, infos in (("input", definition.inputs), ("output", definition.outputs)):
        for name, info in infos.items():
            shape = tf.TensorShape(info.tensor_shape)
            if not shape.rank or shape[0] is not None:
                raise ValueError(
                    "`model` must have inputs and outputs of a row for each example, and any number of them. "
                    f"Received: {kind} {name!r} of signature {signature!r} with shape {shape}."
                )


def check_outputs(
    signature: str,
    served: Callable[..., Mapping[str, tf.Tensor]],
    expected: Callable[[Mapping[str, Any]], Mapping[str, tf.Tensor]],
    batches: list[dict[str, Any]],
    tolerance: Tolerance,
    model_batches: list[Any],
) -> Errors:
    """The signature loaded afresh against the model itself.

    Args:
        signature: its name.
        served: what was written.
        expected: what the model gives, by name; `served` may give more.
        batches: to ask both.
        tolerance: of relative errors.
        model_batches: the same batches as the model itself takes them.

    Raises:
        ValueError: where the largest relative error is above `tolerance`.
    """
    errors = []
    for batch in batches:
        wanted, got = expected(batch), served(**batch)
        errors.append(largest_errors(_numbers(wanted), _numbers({name: got[name] for name in wanted})))
    worst = Errors(*np.max(errors, axis=0).tolist())
    if not tolerance.allows(worst.relative, model_batches):
        raise ValueError(
            "`model` must compute the same when it is called and when it is served. Received: outputs of signature "
            f"{signature!r} that differ by {worst.relative:.3g} relative, {worst.absolute:.3g} absolute; allowed is "
            f"{tolerance.value:g} relative. Something in it is random, or is settled when Python runs and not by the "
            "data: sizes that an Input leaves open, as of a `TimeDistributed`, may have to be given. Or it rounds so "
            "much, as after a training that did not get far: then `tolerance` is the way out, and for the signature "
            "'batch_norm_drift' `drift=False`."
        )
    return worst


def check_rows(
    signature: str,
    served: Callable[..., Mapping[str, tf.Tensor]],
    batch: dict[str, Any],
    tolerance: Tolerance,
    model_batches: list[Any],
) -> None:
    """Each row gets the answer that it gets alone: a server's batching runs strangers' requests together.

    The 7 rows of `batch` together are compared with the same in requests of 1, 2 and 4 rows.

    Raises:
        ValueError: where the largest relative error is above `tolerance`, or an output has no row for each example.
    """
    together = _rows_of(signature, served, batch)
    first = 0
    for count in (1, 2, 4):
        rows = slice(first, first + count)
        alone = _rows_of(signature, served, {name: value[rows] for name, value in batch.items()})
        for name in _numbers(together):
            # Relative to all rows: one alone may be close to zero.
            whole = np.array(together[name])
            whole[rows] = alone[name]
            error = largest_errors(together[name], whole).relative
            if not tolerance.allows(error, model_batches):
                raise ValueError(
                    "`model` must answer for each example by itself, whatever else is in the batch. Received: output "
                    f"{name!r} of signature {signature!r} for a batch of {ROWS} rows differs by {error:.3g} relative "
                    f"from that for {count} of these rows alone; allowed is {tolerance.value:g}."
                )
        first = rows.stop


def _rows_of(
    signature: str, served: Callable[..., Mapping[str, tf.Tensor]], batch: dict[str, Any]
) -> Mapping[str, tf.Tensor]:
    rows = len(next(iter(batch.values())))
    outputs = served(**batch)
    for name, value in outputs.items():
        if value.shape.rank == 0 or value.shape[0] != rows:
            raise ValueError(
                "`model` must have outputs of a row for each example. "
                f"Received: output {name!r} of signature {signature!r}, shape {tuple(value.shape)} for {rows} examples."
            )
    return outputs


def _numbers(tensors: Mapping[str, tf.Tensor]) -> Mapping[str, tf.Tensor]:
    """Of what is answered the numbers, or where there are none all of it."""
    return {name: value for name, value in tensors.items() if value.dtype != tf.string} or tensors


def _meta_graph(folder: Path) -> Any:
    saved = saved_model_pb2.SavedModel()
    saved.ParseFromString((folder / "saved_model.pb").read_bytes())
    return saved.meta_graphs[0]


def _operations(folder: Path, signature: str) -> Iterator[tuple[Any, Any]]:
    """The nodes behind a signature, through all functions called, each with the function it calls or None."""
    meta_graph = _meta_graph(folder)
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
