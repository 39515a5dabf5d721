"""Normalization with TensorFlow's own operations: right everywhere, and what XLA compiles."""

from __future__ import annotations

from collections.abc import Sequence

import tensorflow as tf

from keras_bn.ops.layouts import along, as_planes, as_rows, channel_count, has_planes, value_count
from keras_bn.statistics import Moments, merged_across_replicas, statistics_dtype, weighted_moments


def normalize_batch(
    x: tf.Tensor,
    gamma: tf.Tensor,
    beta: tf.Tensor,
    axes: Sequence[int],
    epsilon: float,
    weights: tf.Tensor | None = None,
    group_size: int | None = None,
    synchronized: bool | int = False,
) -> tuple[tf.Tensor, Moments]:
    """y = gamma * (x - mean) / sqrt(m2 / count + epsilon) + beta: see `keras_bn.ops.normalize_batch`."""
    if weights is None and group_size is None and not synchronized:
        planes = has_planes(x, axes)
        view, restore = as_planes(x, axes) if planes else as_rows(x, axes)
        y, moments = _normalize_in_two_passes(view, gamma, beta, epsilon, [0, 2] if planes else [0])
        return restore(y), moments

    rows, restore = as_rows(x, axes)
    if weights is not None:
        weights, _ = as_rows(tf.broadcast_to(weights, tf.shape(x)), axes)
        weights = tf.ensure_shape(weights, rows.shape)

    def normalize_part(rows, weights):
        if weights is None and not synchronized:
            return _normalize_in_two_passes(rows, gamma, beta, epsilon, [len(rows.shape) - 2])
        return _normalize_weighted(rows, gamma, beta, epsilon, weights, synchronized)

    if group_size is None:
        y, moments = normalize_part(rows, weights)
        return restore(y), moments
    examples = tf.shape(x)[0]
    parts = _split_groups(rows, examples, group_size)
    part_weights = [None, None] if weights is None else _split_groups(weights, examples, group_size)
    normalized = [normalize_part(*part) for part in zip(parts, part_weights, strict=True)]
    y = tf.concat([tf.reshape(y, [-1, channel_count(x, axes)]) for y, _ in normalized], 0)
    fields = zip(*(_per_channel(part) for _, part in normalized), strict=True)
    return restore(tf.ensure_shape(y, rows.shape)), Moments(*(tf.concat(field, 0) for field in fields))


def normalize(
    x: tf.Tensor,
    mean: tf.Tensor,
    variance: tf.Tensor,
    gamma: tf.Tensor | None,
    beta: tf.Tensor | None,
    axes: Sequence[int],
    epsilon: float,
) -> tf.Tensor:
    """y = gamma * (x - mean) / sqrt(variance + epsilon) + beta: see `keras_bn.ops.normalize`."""
    factor = tf.math.rsqrt(variance + epsilon)
    if gamma is not None:
        factor *= gamma
    # The mean is subtracted before anything is multiplied, so that no digits are lost far from zero.
    deviation = tf.cast(x, mean.dtype) - along(axes, mean, x)
    return tf.cast(scale_and_shift(deviation, factor, beta, axes=axes), x.dtype)


def scale_and_shift(
    x: tf.Tensor, gamma: tf.Tensor | None = None, beta: tf.Tensor | None = None, *, axes: Sequence[int]
) -> tf.Tensor:
    """One multiply-add per channel.

    y = gamma * x + beta

    Args:
        x: Floating-point tensor.
        gamma: Shape `(C,)`, C the product of the sizes of `axes`, or None for ones.
        beta: Shape `(C,)`, or None for zeros.
        axes: The channel axes, not negative, ascending.

    Returns:
        y, of the shape and dtype of `x`.
    """
    if gamma is not None:
        x = x * tf.cast(along(axes, gamma, x), x.dtype)
    if beta is not None:
        x = x + tf.cast(along(axes, beta, x), x.dtype)
    return x


def central_value(x: tf.Tensor, reduced: Sequence[int]) -> tf.Tensor:
    """Per channel the median of its first, middle and last value: near the mean, and itself a value of the channel.

    Returns:
        Shape of `x` with 1 along the axes `reduced`, in the dtype of the statistics; zero where `x` is empty.
    """
    sizes = tf.unstack(tf.shape(x), len(x.shape))

    def pick(position):
        begin = [position(size) if axis in reduced else 0 for axis, size in enumerate(sizes)]
        size = [tf.minimum(size, 1) if axis in reduced else size for axis, size in enumerate(sizes)]
        # The sum of the one value, or of none.
        return tf.reduce_sum(tf.cast(tf.slice(x, begin, size), statistics_dtype(x.dtype)), reduced, keepdims=True)

    first, middle, last = pick(lambda n: 0), pick(lambda n: n // 2), pick(lambda n: tf.maximum(n - 1, 0))
    low, high = tf.minimum(first, middle), tf.maximum(first, middle)
    return tf.stop_gradient(tf.maximum(low, tf.minimum(high, last)))


def _normalize_in_two_passes(x, gamma, beta, epsilon, summed):
    """Two sums over the axes `summed` forward and two backward; shapes `(M, C)`, `(G, M, C)` for groups, `(N, C, S)`.

    Every deviation is (x - shift) - delta with a shift taken from the data: the first difference is exact where the
    offset is large, so no digits are lost there, and it is zero for a constant channel.
    """
    count = value_count(x, summed, gamma.dtype)
    # A group, or a batch, may be empty: its sums are zero, and so are their means.
    divisor = max(count, 1.0) if isinstance(count, float) else tf.maximum(count, 1.0)

    def sum_along(values):
        # One axis after the other, the innermost first: what XLA's CPU compiler does best.
        for axis in reversed(summed):
            values = tf.reduce_sum(values, axis, keepdims=True)
        return values

    @tf.custom_gradient
    def normalize(x, gamma, beta):
        if summed[-1] == len(x.shape) - 1:
            gamma, beta = gamma[:, None], beta[:, None]
        shift = central_value(x, summed)
        shifted = tf.cast(x, gamma.dtype) - shift
        delta = sum_along(shifted) / divisor
        deviation = shifted - delta
        m2 = sum_along(tf.square(deviation))
        inverse_std = tf.math.rsqrt(m2 / divisor + epsilon)
        y = deviation * (inverse_std * gamma) + beta

        def gradient(dy, *_):
            dy = tf.cast(dy, gamma.dtype)
            dbeta = sum_along(dy)
            dgamma = sum_along(dy * deviation) * inverse_std
            dx = (dy - dbeta / divisor - deviation * (dgamma * inverse_std / divisor)) * (inverse_std * gamma)
            others = summed if len(summed) > 1 else range(len(x.shape) - 1)
            return tf.cast(dx, x.dtype), *(tf.reduce_sum(d, others) for d in (dgamma, dbeta))

        return (tf.cast(y, x.dtype), tf.squeeze(shift + delta, summed), tf.squeeze(m2, summed)), gradient

    y, mean, m2 = normalize(x, gamma, beta)
    return y, Moments(count, tf.stop_gradient(mean), tf.stop_gradient(m2))


def _normalize_weighted(rows, gamma, beta, epsilon, weights, synchronized):
    """From differentiable pieces, for weights and several replicas; shapes `(M, C)`, or `(G, M, C)` for groups."""
    values = tf.cast(rows, gamma.dtype)
    if weights is None:
        shift = central_value(rows, [len(rows.shape) - 2])
    else:
        # The largest value that counts: a value of the channel, whatever the others hold.
        counts = tf.cast(weights, gamma.dtype) > 0
        largest = tf.reduce_max(tf.where(counts, values, gamma.dtype.min), -2, keepdims=True)
        shift = tf.stop_gradient(tf.where(tf.reduce_any(counts, -2, keepdims=True), largest, 0))
    shifted = values - shift
    moments, center = weighted_moments(shifted, weights), tf.squeeze(shift, -2)
    if synchronized:
        moments, center = merged_across_replicas(moments, center, synchronized)
        shifted = shifted + (shift - center[..., None, :])
    variance = tf.math.divide_no_nan(moments.m2, moments.count)
    inverse_std = tf.math.rsqrt(variance + epsilon)
    y = (shifted - moments.mean[..., None, :]) * (inverse_std * gamma)[..., None, :] + beta
    moments = moments._replace(mean=moments.mean + center)
    # Without weights `unit` is a Python number, which would become float32.
    return tf.cast(y, rows.dtype), Moments(*(tf.stop_gradient(tf.cast(value, gamma.dtype)) for value in moments))


def _split_groups(rows: tf.Tensor, examples: tf.Tensor, group_size: int) -> list[tf.Tensor]:
    """The whole groups, shape `(G, group_size * S, C)`, and the rest, shape `(1, R * S, C)`; each may be empty."""
    channels = rows.shape[-1]
    rows_per_example = tf.math.floordiv(tf.shape(rows)[0], tf.maximum(examples, 1))
    groups = examples // group_size
    whole = groups * group_size * rows_per_example
    return [
        tf.reshape(rows[:whole], tf.stack([groups, group_size * rows_per_example, channels])),
        tf.reshape(rows[whole:], tf.stack([1, tf.shape(rows)[0] - whole, channels])),
    ]


def _per_channel(moments: Moments) -> Moments:
    mean = moments.mean
    return Moments(*(tf.broadcast_to(tf.cast(value, mean.dtype), tf.shape(mean)) for value in moments))
