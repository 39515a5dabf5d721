"""A Keras model from outside: checked, its layers found and named, run in inference mode, their inputs measured.

What Keras keeps private of a model and of its layers is asked for here alone, and held by Keras 3.12 to 3.15:
`_flatten_layers`, `_layers`, `_functional`, `_nodes_by_depth`, `_keras_history`, `_keras_mask`, `_compile_config`, and
of an optimizer `_trainable_variables`.
"""

import contextlib
import functools
import inspect
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_bn.layer import BatchNormalization
from keras_bn.ops.layouts import as_rows, ragged_as_padded
from keras_bn.statistics import Moments, aligned_weights, weighted_moments


def check_model(model: Any, built: bool = False) -> None:
    """Refuses what is no Keras model, or with `built` has no weights yet.

    Raises:
        TypeError: when `model` is no `keras.Model`.
        ValueError: when it is not built and has to be.
    """
    if not isinstance(model, keras.Model):
        raise TypeError(f"`model` must be a `keras.Model`. Received: model={model!r} of type {type(model).__name__}.")
    if built and not model.built:
        raise ValueError(
            "`model` must be built: give it an `Input`, or call it once on a batch of data. "
            f"Received: model={model.name!r}, which is not built."
        )


def check_one_argument(model: keras.Model) -> None:
    """Refuses a subclassed model whose `call` needs more than one argument, which no batch of data is.

    Raises:
        TypeError: when it does.
    """
    parameters = list(inspect.signature(type(model).call).parameters.values())[1:]
    needed = [p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    if len(needed) > 1:
        raise TypeError(
            "`model` must take its inputs as one argument, a list or dictionary where there are several. "
            f"Received: model={model.name!r} of type {type(model).__name__}, whose `call` needs {needed}."
        )


def check_finite(model: keras.Model) -> None:
    """Refuses weights and statistics of which nothing can be proved: a NaN in both outputs passes every comparison.

    Raises:
        ValueError: when one of them is NaN or infinite.
    """
    for variable in model.variables:
        value = keras.ops.convert_to_numpy(variable)
        if value.dtype.kind not in "biuOSU" and not np.all(np.isfinite(value.astype("float64"))):
            raise ValueError(
                "`model` must have finite weights and statistics; `keras_bn.health` says which do not, and "
                f"`keras_bn.recalibrate` mends statistics. Received: {variable.path!r} with a value that is not finite."
            )


def broken_weights(model: keras.Layer) -> list[str]:
    """Paths of the weights that are not finite, without the statistics of normalizations, which data mends."""
    statistics = {id(variable) for layer in batch_norms_below(model) for variable in layer.non_trainable_variables}
    broken = []
    for variable in model.variables:
        value = keras.ops.convert_to_numpy(variable)
        numbers = id(variable) not in statistics and value.dtype.kind not in "biuOSU"
        if numbers and not np.all(np.isfinite(value.astype("float64"))):
            broken.append(variable.path)
    return broken


def check_weights_finite(model: keras.Layer) -> None:
    """Refuses weights through which no data comes finite.

    Raises:
        ValueError: when one of them is NaN or infinite.
    """
    broken = broken_weights(model)
    if broken:
        raise ValueError(
            "`model` must have finite weights, as after a training that did not diverge; no data mends them. "
            f"Received: {', '.join(map(repr, broken[:3]))}{' and others' if len(broken) > 3 else ''} with NaN or "
            "infinity."
        )


def default_tolerance(model: keras.Layer) -> float:
    """Of relative errors: 1e-4, or 2e-2 where a layer computes in half precision."""
    halves = any(layer.compute_dtype in ("float16", "bfloat16") for layer in layers_below(model))
    return 2e-2 if halves else 1e-4


def layers_below(model: keras.Layer) -> list[keras.Layer]:
    """Every layer below `model` once: nested models, wrapped and shared layers included, `model` itself first."""
    return list(model._flatten_layers())


def is_plain_batch_norm(layer: Any) -> bool:
    """Whether it is Keras's batch normalization or ours; a subclass of them may compute something else."""
    return type(layer) in (keras.layers.BatchNormalization, BatchNormalization)


def batch_norms_below(model: keras.Layer) -> list[keras.layers.BatchNormalization]:
    """Every batch normalization below `model` once, ours and stock Keras's."""
    return [layer for layer in layers_below(model) if isinstance(layer, keras.layers.BatchNormalization)]


def named_batch_norms(model: keras.Layer) -> dict[str, keras.layers.BatchNormalization]:
    """Every built batch normalization below `model` once, by a unique name: `bn1`, `backbone/bn1` in a nested model."""
    named: dict[str, keras.layers.BatchNormalization] = {}

    def visit(layer: keras.Layer, path: str) -> None:
        if isinstance(layer, keras.layers.BatchNormalization) and layer.built and layer not in named.values():
            name, n = path or layer.name, 1
            while name in named:
                n += 1
                name = f"{path}#{n}"
            named[name] = layer
        for child in layer._layers:
            if child is not layer:
                visit(child, f"{path}/{child.name}" if path else child.name)

    visit(model, "")
    return named


def required_batch_norms(model: keras.Layer) -> dict[str, keras.layers.BatchNormalization]:
    """As `named_batch_norms`, of a model that has some.

    Raises:
        ValueError: when it has none.
    """
    norms = named_batch_norms(model)
    if not norms:
        raise ValueError(f"`model` must have a batch normalization. Received: model={model.name!r}, which has none.")
    return norms


def affine_weights(layer: keras.layers.BatchNormalization) -> tuple[np.ndarray, np.ndarray]:
    """The layer's gamma and beta in float64; 1 and 0 where it has none."""
    shape = layer.moving_mean.shape
    gamma = layer.gamma.numpy().astype("float64") if layer.scale else np.ones(shape)
    beta = layer.beta.numpy().astype("float64") if layer.center else np.zeros(shape)
    return gamma, beta


def statistics_of(layer: keras.layers.BatchNormalization) -> tuple[np.ndarray, np.ndarray]:
    """The layer's moving mean and moving variance in float64."""
    return layer.moving_mean.numpy().astype("float64"), layer.moving_variance.numpy().astype("float64")


def set_statistics(layer: keras.layers.BatchNormalization, mean: Any, variance: Any) -> None:
    """Gives `layer` these moving statistics, and what its options derive from them."""
    layer.moving_mean.assign(np.asarray(mean, layer.moving_mean.dtype))
    layer.moving_variance.assign(np.asarray(variance, layer.moving_variance.dtype))
    if getattr(layer, "initial_weight", None) is not None:  # What is there now has nothing of the initial values.
        layer.initial_weight.assign(np.zeros(layer.initial_weight.shape, "float32"))
    if getattr(layer, "renorm", False):
        stddev = np.sqrt(np.asarray(variance, "float64") + layer.epsilon)
        layer.moving_stddev.assign(stddev.astype("float32"))
        layer.renorm_mean.assign(np.asarray(mean, "float32"))
        layer.renorm_stddev.assign(stddev.astype("float32"))


def _recurrent_states(model: keras.Layer) -> list[keras.Variable]:
    """Those of stateful layers, which Keras does not count among their variables."""
    layers = [layer for layer in layers_below(model) if isinstance(layer, keras.layers.RNN) and layer.stateful]
    return [v for layer in layers for v in keras.tree.flatten(layer.states) if isinstance(v, keras.Variable)]


@contextlib.contextmanager
def variables_restored(model: keras.Layer, only_on_error: bool = False) -> Iterator[None]:
    """Puts every variable that an optimizer does not train back, bit for bit: at the end, or only when the body raises.

    "Raises" is anything at all, Ctrl-C included. States of recurrent layers are put back in any case.
    """
    states = _recurrent_states(model)
    variables = [*states, *(v for v in model.variables if not v.trainable)]
    before = [v.numpy() for v in variables]
    finished = False
    try:
        yield
        finished = True
    finally:
        kept = len(states) if finished and only_on_error else len(variables)
        for variable, value in zip(variables[:kept], before[:kept], strict=True):
            variable.assign(value)


def graph_of(layer: Any) -> Any:
    """The functional model that tells what `layer` computes, or None.

    It is `layer` itself, or what a sequential model keeps; None for what has no such graph, or a `call` of its own.
    """
    if not isinstance(layer, keras.Model) or not type(layer).call.__module__.startswith("keras."):
        return None
    graph = layer._functional if isinstance(layer, keras.Sequential) else layer
    return graph if hasattr(graph, "_nodes_by_depth") else None


def nodes_of(graph: Any) -> list[Any]:
    """The calls in a functional model, in an order in which they can run, those that make its inputs left out."""
    depths = sorted(graph._nodes_by_depth, reverse=True)
    return [node for depth in depths for node in graph._nodes_by_depth[depth] if not node.is_input]


def input_layers(model: Any) -> list[keras.layers.InputLayer]:
    """Those of a functional or sequential model, in the order of `model.inputs`."""
    return [tensor._keras_history.operation for tensor in model.inputs]


def new_input_layers(model: Any) -> list[keras.layers.InputLayer]:
    """Others like `input_layers`; Keras 3.12 leaves out of their configuration whether they are optional."""
    return [type(one).from_config({**one.get_config(), "optional": one.optional}) for one in input_layers(model)]


def input_structure(model: Any) -> Any:
    """What a functional or sequential model takes: symbolic tensors, in its author's structure."""
    return graph_of(model).input


def mask_of(tensor: Any) -> Any:
    """The mask that a layer attached to its output, None where there is none."""
    return getattr(tensor, "_keras_mask", None)


def copy_state(old: keras.Layer, new: keras.Layer) -> list[tuple[keras.Variable, keras.Variable]]:
    """Gives `new`, made from the configuration of `old` or with ours and stock normalizations changed, its state too.

    Returns:
        The variables of one and the other that mean the same.
    """
    norms = zip(batch_norms_below(old), batch_norms_below(new), strict=True)
    changed = [(a, b) for a, b in norms if type(a) is not type(b)]
    pairs = [
        (getattr(a, name), getattr(b, name))
        for a, b in changed
        for name in ("gamma", "beta")
        if getattr(a, name, None) is not None
    ]
    sides = []
    for layer, own in ((old, [a for a, _ in changed]), (new, [b for _, b in changed])):
        of_changed = {id(variable) for norm in own for variable in norm.variables}
        sides.append([variable for variable in layer.variables if id(variable) not in of_changed])
    if sorted(v.name for v in sides[0]) == sorted(v.name for v in sides[1]):
        # What was quantized after it was built has its variables in another order.
        sides = [sorted(side, key=lambda variable: variable.name) for side in sides]
    pairs += zip(*sides, strict=True)
    for source, target in pairs:
        target.assign(source)
    for a, b in changed:
        set_statistics(b, a.moving_mean.numpy(), a.moving_variance.numpy())
    for source, target in zip(_recurrent_states(old), _recurrent_states(new), strict=True):
        target.assign(source)
    for a, b in zip(layers_below(old), layers_below(new), strict=True):
        if hasattr(a, "save_assets"):  # Vocabularies, which are no variables.
            with tempfile.TemporaryDirectory() as folder:
                a.save_assets(folder)
                b.load_assets(folder)
        if hasattr(b, "finalize_state"):  # Normalization computes with numbers it derives from its variables.
            b.finalize_state()
    return pairs


def compile_arguments(model: Any) -> dict[str, Any] | None:
    """What `model.compile` was given; None where it was not called, or takes arguments of its own."""
    if not model.compiled or type(model).compile is not keras.Model.compile:
        return None
    return dict(model._compile_config.config)


def optimized_variables(optimizer: keras.optimizers.Optimizer) -> list[keras.Variable]:
    """Those that it was built for, in its order."""
    return list(optimizer._trainable_variables)


def channel_axes(layer: keras.layers.BatchNormalization) -> list[int]:
    """The layer's `axis` as a list; ours may have several."""
    return [layer.axis] if isinstance(layer.axis, int) else list(layer.axis)


def input_moments(
    layer: keras.layers.BatchNormalization, inputs: tf.Tensor, mask: Any = None, sample_weight: Any = None
) -> Moments:
    """Moments of `inputs` per channel of `layer`, in float64, eagerly and in a graph.

    count = sum(w), mean = sum(w * x) / count, m2 = sum(w * (x - mean)**2)

    Args:
        layer: tells the channel axes.
        inputs: any rank and floating dtype.
        mask: boolean or weights, aligned with `inputs` as the layer does it.
        sample_weight: shape `(batch,)`; of masks and sample weights the product counts, as frequencies where both are
            integers or booleans, else as reliabilities: see `Moments`.

    Returns:
        Moments, each of shape `(C,)` (of the rank of `axis` where that is a list). All zero where nothing counts.
    """
    rank = len(inputs.shape)
    channels = sorted(axis % rank for axis in channel_axes(layer))
    weights = tf.ones([1] * rank, tf.int32)
    if mask is not None:
        weights = aligned_weights(mask, inputs, channels)
    if sample_weight is not None:
        sample_weight = tf.reshape(tf.convert_to_tensor(sample_weight), [-1] + [1] * (rank - 1))
        dtype = tf.float64 if weights.dtype.is_floating or sample_weight.dtype.is_floating else tf.int64
        weights = tf.cast(weights, dtype) * tf.cast(sample_weight, dtype)
    weights = tf.ensure_shape(tf.broadcast_to(weights, tf.shape(inputs)), inputs.shape)
    sizes = [inputs.shape[axis] for axis in channels]
    rows, _ = as_rows(tf.cast(inputs, tf.float64), channels)
    moments = weighted_moments(rows, as_rows(weights, channels)[0])
    unit = tf.broadcast_to(tf.cast(moments.unit, tf.float64), tf.shape(moments.count))
    return Moments(*(tf.reshape(part, sizes) for part in moments._replace(unit=unit)))


def observed_call(layer: keras.Layer, observe: Callable[[tf.Tensor, Any], None]) -> Callable[..., Any]:
    """The layer's `call`, with `observe(inputs, mask)` before it; ragged inputs as padded ones with a mask."""
    call = layer.call
    signature = inspect.signature(call)

    def observe_and_call(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        inputs, mask = next(iter(bound.arguments.values())), bound.arguments.get("mask")
        if isinstance(inputs, tf.RaggedTensor):
            inputs, mask, _ = ragged_as_padded(inputs)
        observe(inputs, mask)
        return call(*args, **kwargs)

    return observe_and_call


@contextlib.contextmanager
def calls_replaced(replacements: dict[keras.Layer, Callable[..., Any]]) -> Iterator[None]:
    """Runs `replacements[layer]` wherever `layer.call` would run, and takes it back at the end, also after an error.

    Args:
        replacements: for a layer, the function with the signature of its `call`.
    """
    # Straight into `__dict__`: neither Keras nor TensorFlow shall track what is there for a while only.
    before = {layer: layer.__dict__.get("call") for layer in replacements}
    try:
        for layer, replacement in replacements.items():
            layer.__dict__["call"] = replacement
        yield
    finally:
        for layer, call in before.items():
            if call is None:
                layer.__dict__.pop("call", None)
            else:
                layer.__dict__["call"] = call


@contextlib.contextmanager
def inference_mode(model: keras.Layer) -> Iterator[None]:
    """Every layer below `model` runs with `training=False`, also where its author passed `training=True` or nothing."""
    layers = layers_below(model)
    ours = [layer for layer in layers if isinstance(layer, BatchNormalization)]
    chosen = [layer.statistics for layer in ours]
    try:
        for layer in ours:
            layer.statistics = "moving"
        calls = {layer: _own_call(layer) for layer in layers}
        with calls_replaced({layer: _without_training(call) for layer, call in calls.items() if _takes_training(call)}):
            yield
    finally:
        for layer, statistics in zip(ours, chosen, strict=True):
            layer.statistics = statistics


def _own_call(layer: keras.Layer) -> Callable[..., Any]:
    """The layer's `call` without what `use_statistics` has put before that of a stock normalization."""
    if hasattr(layer.__dict__.get("call"), "statistics"):
        return type(layer).call.__get__(layer)
    return layer.call


def _takes_training(call: Callable[..., Any]) -> bool:
    return "training" in inspect.signature(call).parameters


def _without_training(call: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(call)

    @functools.wraps(call)
    def call_for_inference(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.arguments["training"] = False
        return call(*bound.args, **bound.kwargs)

    return call_for_inference
