"""What each example of a batch contributes to the distance at each normalization of a model that is watched."""

import math
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_bn.drift.figures import RowFigures, merged
from keras_bn.inference import calls_replaced, inference_mode, observed_call
from keras_bn.masks import aligned_weights
from keras_bn.model import channel_axes, named_batch_norms


def row_figures(model: keras.Model, inputs: Any) -> dict[str, RowFigures]:
    """What each example of a batch contributes to its distance from the moving statistics, in inference mode.

    With z = (x - moving_mean) / sqrt(moving_variance + epsilon), over the values of one example that count:
    mean_shift = mean(z)
    variance_ratio = variance(z) + epsilon / (moving_variance + epsilon), the variance biased

    In float32, whatever the model computes in: in these units the digits of float32 suffice. `merged` makes the
    figures of several examples of it, exactly those of all their values.

    Where a normalization sees k rows for each example, one after another (`TimeDistributed`), they are merged.

    Args:
        model: any Keras model.
        inputs: one batch, as `model` takes it; also symbolic, inside a `tf.function`.

    Returns:
        By layer name `RowFigures` of float32 tensors of shape `(batch, C)`, C being the product of the sizes where
        `axis` is a list. A layer called several times is measured over all its calls; one that is not called is
        missing.

    Raises:
        ValueError: when a normalization is called inside a loop or function of TensorFlow's.
    """
    layers = named_batch_norms(model)
    seen: dict[str, list[RowFigures]] = {}

    def measuring(name: str, layer: keras.layers.BatchNormalization) -> Callable[..., Any]:
        return observed_call(layer, lambda x, mask: seen.setdefault(name, []).append(_leading_figures(layer, x, mask)))

    with inference_mode(model), calls_replaced({layer: measuring(name, layer) for name, layer in layers.items()}):
        model(inputs, training=False)
    unreachable = [name for name, calls in seen.items() if any(map(_is_elsewhere, calls))]
    if unreachable:
        raise ValueError(
            "`model` must call its normalizations where they can be watched, not inside a loop (an RNN's cell, "
            "`tf.map_fn`) or a `tf.function`; or export it with `drift=False`. "
            f"Received: {unreachable} called there."
        )
    batch = tf.shape(keras.tree.flatten(inputs)[0])[0]

    def by_example(values: tf.Tensor) -> tf.Tensor:
        return tf.reshape(values, [batch, -1, values.shape[-1]])

    return {
        name: merged(RowFigures(*(tf.concat(list(map(by_example, parts)), 1) for parts in zip(*calls, strict=True))), 1)
        for name, calls in seen.items()
    }


def _is_elsewhere(figures: RowFigures) -> bool:
    if not tf.is_symbolic_tensor(figures.count):
        return False
    return tf.executing_eagerly() or figures.count.graph is not tf.compat.v1.get_default_graph()


def _leading_figures(layer: keras.layers.BatchNormalization, x: tf.Tensor, mask: Any) -> RowFigures:
    """The figures of each entry along the first axis of `x`, shape `(len(x), C)`."""
    rank = len(x.shape)
    channels = sorted(axis % rank for axis in channel_axes(layer))
    others = [axis for axis in range(1, rank) if axis not in channels]
    broadcast = [x.shape[axis] if axis in channels else 1 for axis in range(rank)]
    dtype = x.dtype if x.dtype == tf.float64 else tf.float32
    mean, variance = (
        tf.reshape(tf.cast(moving, dtype), broadcast) for moving in (layer.moving_mean, layer.moving_variance)
    )
    reference = variance + layer.epsilon
    z = tf.cast((tf.cast(x, dtype) - mean) * tf.math.rsqrt(reference), tf.float32)
    if mask is None:
        size = math.prod([tf.cast(tf.shape(z)[axis], tf.float32) for axis in others], start=tf.constant(1.0))
        shift = _mean(z, others)
        ratio = _mean(tf.square(z - shift), others)
        count = tf.fill(tf.shape(shift), size)
    else:
        weights = tf.cast(aligned_weights(mask, x, channels), tf.float32)
        weights = tf.broadcast_to(weights, tf.shape(z))
        z = tf.where(weights > 0, z, 0)  # What does not count may be NaN.
        count = tf.reduce_sum(weights, others, keepdims=True)
        shift = tf.math.divide_no_nan(tf.reduce_sum(weights * z, others, keepdims=True), count)
        ratio = tf.math.divide_no_nan(tf.reduce_sum(weights * tf.square(z - shift), others, keepdims=True), count)
    ratio += tf.cast(layer.epsilon / reference, tf.float32)
    width = int(np.prod([x.shape[axis] for axis in channels]))
    return RowFigures(*(tf.reshape(value, [-1, width]) for value in (count, shift, ratio)))


def _mean(z: tf.Tensor, axes: list[int]) -> tf.Tensor:
    """Axis by axis: one sum over a large picture would lose digits that sums of sums keep."""
    for axis in reversed(axes):
        z = tf.reduce_mean(z, axis, keepdims=True)
    return z
