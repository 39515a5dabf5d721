"""A Keras model from outside: checked, its layers found and named, the graph of its calls, its statistics.

What Keras keeps private of a model and of its layers is asked for here alone, and held by Keras 3.12 to 3.15:
`_flatten_layers`, `_layers`, `_functional`, `_nodes_by_depth`, `_keras_history`, `_keras_mask`, `_compile_config`, and
of an optimizer `_trainable_variables`.
"""

import inspect
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_bn.layer import BatchNormalization
from keras_bn.masks import aligned_weights
from keras_bn.names import shown
from keras_bn.ops.layouts import as_rows
from keras_bn.statistics import Moments, weighted_moments


def check_model(model: Any, built: bool = False) -> None:
    """Refuses what is no Keras model, or with `built` has no weights yet.

    Raises:
        TypeError: when `model` is no `keras.Model`.
        ValueError: when it is not built and has to be.
    """
    if not isinstance(model, keras.Model):
        raise TypeError(
            f"`model` must be a `keras.Model`. Received: model={shown(model)} of type {type(model).__name__}."
        )
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
        ValueError: when one of them is NaN or infinite, or a moving variance is negative.
    """
    for variable in model.variables:
        value = keras.ops.convert_to_numpy(variable)
        if value.dtype.kind not in "biuOSU" and not np.all(np.isfinite(value.astype("float64"))):
            raise ValueError(
                "`model` must have finite weights and statistics; `keras_bn.health` says which do not, and "
                f"`keras_bn.recalibrate` mends statistics. Received: {variable.path!r} with a value that is not finite."
            )
    for layer in batch_norms_below(model):
        if layer.built and np.min(keras.ops.convert_to_numpy(layer.moving_variance), initial=0) < 0:
            raise ValueError(
                "`model` must have variances that are not negative; `keras_bn.recalibrate` mends statistics. "
                f"Received: {layer.moving_variance.path!r} with a negative value."
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


def check_statistics(
    argument: str, name: str, layer: keras.layers.BatchNormalization, mean: Any, variance: Any
) -> None:
    """Refuses finite statistics that are not finite any more in the dtype of the layer's weights.

    Raises:
        ValueError: naming the argument that they are of, the layer and its dtype.
    """
    for what, values, variable in (("mean", mean, layer.moving_mean), ("variance", variance, layer.moving_variance)):
        dtype = tf.as_dtype(variable.dtype)
        largest = float(np.max(np.abs(np.asarray(values, "float64")), initial=0.0))
        if np.isfinite(largest) and largest > float(dtype.max):
            raise ValueError(
                f"`{argument}` must have statistics that the layer can hold: {name!r} keeps them in {dtype.name}, up "
                f"to {float(dtype.max):g}. Received: a {what} of {largest:g}. Scale the data, or give the layer "
                'dtype="float32".'
            )


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
    """What a model takes: symbolic tensors, in its author's structure; of a subclassed one as it was called, any rows.

    Raises:
        ValueError: when `model` is subclassed and was not called with one argument.
    """
    graph = graph_of(model)
    if graph is not None:
        return graph.input
    shapes = list((getattr(model, "_build_shapes_dict", None) or {}).values())
    if len(shapes) != 1:
        raise ValueError(
            "`model` must be functional, sequential, or subclassed with one argument to `call` and called once. "
            f"Received: model={model.name!r} of type {type(model).__name__}, with {len(shapes)} known inputs."
        )
    return keras.tree.map_shape_structure(
        lambda shape: keras.KerasTensor((None, *shape[1:]), dtype=model.input_dtype, name="keras_tensor"), shapes[0]
    )


def mask_of(tensor: Any) -> Any:
    """The mask that a layer attached to its output, None where there is none."""
    return getattr(tensor, "_keras_mask", None)


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
