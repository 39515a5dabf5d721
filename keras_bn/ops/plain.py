"""Two passes over a batch forward and two backward: what XLA compiles, and what keeps its digits anywhere."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import keras
import tensorflow as tf
from tensorflow.compiler.tf2xla.ops import gen_xla_ops

from keras_bn.ops.fused import (
    LIKELY_BATCH,
    Activation,
    central_value,
    either,
    in_xla_context,
    value_count,
)
from keras_bn.ops.layouts import sizes_of
from keras_bn.statistics import Moments

# The squares about a shift give m2 to 1e-5 of itself while the mean is up to so many standard deviations away
# (measured, 200,704 rows; 3e-7 where it is near). Of a normal distribution one channel in 100,000 is further away.
_TRUSTED_SHIFT = 3.0

# XLA's CPU compiler sums faster in parts from so many values on (measured: 128 yes, 96 no). What it computes on the way
# it vectorizes only where it unrolls the loop, up to 16 parts.
_FEWEST = 128
_PARTS = 8

# It merges a sum of parts with the sum before where that is one of at most 32, and is slow then (measured).
_MORE_PARTS = range(33, 129)


def two_pass(
    x: tf.Tensor,
    gamma: tf.Tensor,
    beta: tf.Tensor,
    epsilon: float,
    activation: Activation,
    planes: bool,
    fewest: int,
) -> tuple[tf.Tensor, Moments]:
    """Two sums of each channel's values, forward and backward: what XLA's CPU compiler does best.

    Every deviation is (x - shift) - delta with a shift taken from the data: the first difference is exact where the
    offset is large, so no digits are lost there, and it is zero for a constant channel. A rectifier is made part of it:
    the backward pass finds its sign from the input again.

    Args:
        x: Shape `(M, C)`, or `(G, M, C)` for groups; where it is `planes`, `(N, C, S)`.
        fewest: How many values of a channel there are at least, where that is known although their number is not.
    """
    rank = len(x.shape)
    summed = [0, 2] if planes else [rank - 2]
    count = value_count(x, summed, gamma.dtype)
    rectified = activation is keras.activations.relu
    # A group, or a batch, may be empty: its sums are zero, and so are their means.
    divisor = max(count, 1.0) if isinstance(count, float) else tf.maximum(count, 1.0)

    @tf.custom_gradient
    def normalize(x, gamma, beta):
        if planes:
            gamma, beta = gamma[:, None], beta[:, None]
        shift = central_value(x, summed)

        def shifted():
            return tf.cast(x, gamma.dtype) - shift

        def centred(sum_along):
            delta = sum_along(summed, shifted()) / divisor
            return delta, sum_along(summed, tf.square(shifted() - delta))

        def shortened():
            # To convert bfloat16 once more costs more than to read it again (measured).
            if x.dtype == tf.bfloat16:
                return centred(_sum_of_parts)
            total, squares = _sums_of_parts(summed, shifted(), shifted())
            delta = total / divisor
            m2 = squares - total * delta
            near = tf.reduce_all(total * delta <= _TRUSTED_SHIFT**2 * m2)
            return delta, tf.cond(near, lambda: m2, lambda: _sum_of_parts(summed, tf.square(shifted() - delta)))

        parts = _is_summed_in_parts(summed, x, fewest)
        delta, m2 = either(parts, shortened, lambda: centred(_sum_along))
        inverse_std = tf.math.rsqrt(m2 / divisor + epsilon)
        y = (shifted() - delta) * (inverse_std * gamma) + beta
        if rectified:
            y = tf.nn.relu(y)

        def gradient(dy, *_):
            dy = tf.cast(dy, gamma.dtype)
            deviation = shifted() - delta
            if rectified:
                dy = tf.where(deviation * (inverse_std * gamma) + beta > 0, dy, 0)

            def one_by_one():
                return _sum_along(summed, dy), _sum_along(summed, dy * deviation)

            dbeta, dgamma = either(parts, lambda: _sums_of_parts(summed, dy, deviation), one_by_one)
            dgamma *= inverse_std
            dx = (dy - dbeta / divisor - deviation * (dgamma * inverse_std / divisor)) * (inverse_std * gamma)
            others = summed if planes else range(rank - 1)
            return tf.cast(dx, x.dtype), *(tf.reduce_sum(d, others) for d in (dgamma, dbeta))

        return (tf.cast(y, x.dtype), tf.squeeze(shift + delta, summed), tf.squeeze(m2, summed)), gradient

    y, mean, m2 = normalize(x, gamma, beta)
    y = y if rectified else activation(y)
    return y, Moments(count, tf.stop_gradient(mean), tf.stop_gradient(m2))


def _sum_along(axes: Sequence[int], values: tf.Tensor) -> tf.Tensor:
    """Sum over `axes`, which are kept."""
    for axis in reversed(axes):
        values = tf.reduce_sum(values, axis, keepdims=True)
    return values


def _sums_of_parts(axes: Sequence[int], values: tf.Tensor, factors: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Sums of `values`, and of `values * factors`, over `axes`, which are kept: both in one pass."""
    # Of one short piece of memory after the other both: for the second sum it is in the cache.
    both = tf.where(tf.range(2)[:, None] == 0, tf.ones([], values.dtype), tf.expand_dims(factors, -2))
    last = len(values.shape) - 1
    axes = [axis + 1 if axis == last else axis for axis in axes]
    return tuple(tf.unstack(_sum_of_parts(axes, tf.expand_dims(values, -2) * both), axis=-2))


def _sum_of_parts(axes: Sequence[int], values: tf.Tensor) -> tf.Tensor:
    """`_sum_along` for XLA: of few, which it vectorizes, then of more, then of the rest.

    One sum of many would lose digits.
    """
    # Along the first axis that is long enough for it.
    axis = next((axis for axis in axes if (values.shape[axis] or LIKELY_BATCH) >= 2 * _PARTS), axes[-1])
    few, rest = _summed_in_parts(values, axis, _parts(value_count(values, axes, tf.int32)))
    total = tf.reduce_sum(rest, axes, keepdims=True)
    axis = max(axes, key=lambda axis: few.shape[axis] or LIKELY_BATCH)
    few, rest = _summed_in_parts(few, axis, _even_parts(sizes_of(few)[axis]))
    total += tf.reduce_sum(rest, axes, keepdims=True)
    return total + tf.reduce_sum(few, axes, keepdims=True)


def _summed_in_parts(values: tf.Tensor, axis: int, parts: tf.Tensor | int) -> tuple[tf.Tensor, tf.Tensor]:
    """The sum of so many equal parts along `axis`, and what is left over."""
    sizes = sizes_of(values)
    part = sizes[axis] // parts
    whole, rest = tf.split(values, [part * parts, sizes[axis] - part * parts], axis)
    whole = tf.reshape(whole, [*sizes[:axis], parts, part, *sizes[axis + 1 :]])
    return _kept_apart(tf.reduce_sum(whole, axis)), rest


def _parts(count: tf.Tensor | float) -> tf.Tensor | int:
    """So many parts that more than XLA merges are left to sum."""
    enough = count >= _PARTS * _MORE_PARTS[0]
    return tf.where(enough, _PARTS, _PARTS // 2) if tf.is_tensor(enough) else _PARTS if enough else _PARTS // 2


def _even_parts(size: tf.Tensor | int) -> tf.Tensor | int:
    """So many parts that nothing is left over, if that is possible."""
    if isinstance(size, int):
        return next((parts for parts in _MORE_PARTS if size % parts == 0), _MORE_PARTS[-1])
    parts = tf.constant(list(_MORE_PARTS))
    return tf.reduce_min(tf.where(size % parts == 0, parts, _MORE_PARTS[-1]))


def _is_summed_in_parts(axes: Sequence[int], values: tf.Tensor, fewest: int) -> tf.Tensor | bool:
    """Whether to; XLA knows the sizes that are not known here when it compiles, and drops one of the branches."""
    return in_xla_context() and (fewest >= _FEWEST or value_count(values, axes, tf.int32) >= _FEWEST)


@tf.custom_gradient
def _kept_apart(values: tf.Tensor) -> tuple[tf.Tensor, Callable]:
    """The identity, across which XLA does not merge one sum with the next."""
    return gen_xla_ops.xla_optimization_barrier(input=[values])[0], lambda gradient: gradient


@functools.partial(tf.function, jit_compile=True, reduce_retracing=True)
def compiled_two_pass(x, gamma, beta, epsilon, activation, planes, fewest):
    return two_pass(x, gamma, beta, epsilon, activation, planes, fewest)
