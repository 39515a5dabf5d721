"""Normalization as stateless functions of tensors, each the fastest that is right for where it runs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import keras
import tensorflow as tf

from keras_bn import statistics
from keras_bn.ops import inference
from keras_bn.ops import native as _native
from keras_bn.ops.fused import SINGLE_VALUE as SINGLE_VALUE
from keras_bn.ops.fused import (
    Activation,
    composed,
    fused,
    in_xla_context,
    is_small,
    likely_size,
    small,
    statistics_dtype,
)
from keras_bn.ops.fused import either as either
from keras_bn.ops.inference import scale_and_shift as scale_and_shift
from keras_bn.ops.layouts import as_planes, as_rows, has_planes
from keras_bn.ops.plain import compiled_two_pass, two_pass
from keras_bn.statistics import Moments
from keras_bn.statistics import Moving as Moving

# TensorFlow's fused operation trains larger batches as fast as one of our own, and up to a fifth faster in bfloat16:
# both wait for memory (measured: 4096x512 no, 128x28x28x32 yes). So it does planes of shorter rows in bfloat16
# (measured: 49 yes, 196 no).
_NATIVE_VALUES = 5 * 2**19
_NATIVE_ROW = 64


def normalize_with_batch(
    x: tf.Tensor,
    gamma: tf.Tensor | None = None,
    beta: tf.Tensor | None = None,
    *,
    axes: Sequence[int],
    epsilon: float,
    weights: tf.Tensor | None = None,
    group_size: int | None = None,
    synchronized: bool = False,
    activation: Activation = keras.activations.linear,
    kernel: str = "auto",
) -> tuple[tf.Tensor, Moments]:
    """Normalizes with the statistics of this batch.

    y = activation(gamma * (x - mean) / sqrt(variance + epsilon) + beta)

    with the biased variance, from a centred second moment. Half types are accumulated in float32.

    Args:
        x: Floating-point tensor of rank 2 or more.
        gamma: Shape `(C,)`, C the product of the sizes of `axes`, or None for ones; float32, or float64 where `x` is.
        beta: Shape `(C,)`, or None for zeros.
        axes: The channel axes, not negative, ascending.
        epsilon: Added to the variance; its unit is that of `x` squared.
        weights: How often each value counts, of a shape that broadcasts to that of `x`. Default: once.
        group_size: Number of examples (along axis 0) that are normalized together; the last group may be smaller.
            Default: all.
        synchronized: Whether the statistics are those of all replicas' batches together.
        activation: Applied last.
        kernel: "auto", "fused", "xla" or "stable". Weights, groups and synchronization have one kernel each, and so
            has a graph that XLA compiles, where there is no fused operation to be had.

    Returns:
        y, of the shape and dtype of `x`, differentiable twice; and the moments of `x` (per group where there is a
        `group_size`), not differentiable.

    Raises:
        ValueError: If `kernel` is "fused" and `x` is float64, which the fused operation does not take.

    Reference: Ioffe & Szegedy 2015 (arXiv 1502.03167), Algorithm 1.
    """
    dtype = statistics_dtype(x.dtype)
    channels = math.prod(x.shape[axis] for axis in axes)
    fewest = math.prod(size or 1 for axis, size in enumerate(x.shape) if axis not in axes)
    gamma = tf.ones([channels], dtype) if gamma is None else gamma
    beta = tf.zeros([channels], dtype) if beta is None else beta
    if _takes_native(x, gamma, beta, axes, kernel, weights, group_size, synchronized):
        y, moments, count = _native.normalize_batch(x, gamma, beta, axes, epsilon)
        return activation(y), Moments(count, *tf.unstack(moments))
    if weights is None and group_size is None and not synchronized:
        if in_xla_context() or (kernel == "auto" and dtype == tf.float64):
            kernel = "stable"
        elif kernel == "auto":
            kernel = "small" if is_small(x) else "fused"
        if kernel == "fused" and dtype == tf.float64:
            raise ValueError(
                "`kernel` must be 'auto', 'xla' or 'stable' for float64 inputs, which TensorFlow's fused operation "
                "does not take. Received: kernel='fused'."
            )
        if kernel in ("fused", "small"):
            y, moments = (fused if kernel == "fused" else small)(x, gamma, beta, axes, epsilon)
            # Only where there may be one value: to find out costs a branch.
            if not isinstance(moments.count, float) and fewest == 1:
                _warn_of_single_value(moments.count)
            return activation(y), _constant(moments)
        planes = has_planes(x, axes)
        view, restore = as_planes(x, axes) if planes else as_rows(x, axes)
        normalize = compiled_two_pass if kernel == "xla" else two_pass
        y, moments = normalize(view, gamma, beta, epsilon, activation, planes, fewest)
        return restore(y), moments

    rows, restore = as_rows(x, axes)
    if weights is not None:
        weights, _ = as_rows(tf.broadcast_to(tf.cast(weights, dtype), tf.shape(x)), axes)
        weights = tf.ensure_shape(weights, rows.shape)

    def normalize_part(rows, weights):
        if weights is None and not synchronized:
            return two_pass(rows, gamma, beta, epsilon, activation, planes=False, fewest=fewest)
        y, moments = composed(rows, gamma, beta, epsilon, weights, synchronized)
        return activation(y), moments

    if group_size is None:
        y, moments = normalize_part(rows, weights)
        return restore(y), moments
    examples = tf.shape(x)[0]
    parts = _split_groups(rows, examples, group_size)
    part_weights = [None, None] if weights is None else _split_groups(weights, examples, group_size)
    normalized = [normalize_part(*part) for part in zip(parts, part_weights, strict=True)]
    y = tf.concat([tf.reshape(y, [-1, channels]) for y, _ in normalized], 0)
    fields = zip(*(_with_count_per_channel(part) for _, part in normalized), strict=True)
    return restore(tf.ensure_shape(y, rows.shape)), Moments(*(tf.concat(field, 0) for field in fields))


def normalize_and_move(
    x: tf.Tensor,
    gamma: tf.Tensor | None,
    beta: tf.Tensor | None,
    moving: Moving,
    *,
    axes: Sequence[int],
    epsilon: float,
    activation: Activation,
    kernel: str,
    **options,
) -> tuple[tf.Tensor, tf.Tensor | float]:
    """`normalize_with_batch`, with whose moments both moving statistics are moved: one operation where that is faster.

    moved = moving + rate * (batch - moving)

    Args:
        moving: In the dtype in which the moments of `x` are.
        **options: And all others, as for `normalize_with_batch`.

    Returns:
        y, and the count of the moments.
    """
    if not _takes_native(x, gamma, beta, axes, kernel, **options):
        y, moments = normalize_with_batch(
            x, gamma, beta, axes=axes, epsilon=epsilon, activation=activation, kernel=kernel, **options
        )
        moving.assign(*statistics.moved_by(moving.mean, moving.variance, moments, moving.rate, moving.unbiased))
        return y, moments.count
    gamma = tf.ones_like(moving.mean) if gamma is None else gamma
    beta = tf.zeros_like(moving.mean) if beta is None else beta
    y, _, count = _native.normalize_batch(x, gamma, beta, axes, epsilon, moving)
    return activation(y), count


def normalize_with(
    x: tf.Tensor,
    mean: tf.Tensor,
    variance: tf.Tensor,
    gamma: tf.Tensor | None = None,
    beta: tf.Tensor | None = None,
    *,
    axes: Sequence[int],
    epsilon: float,
) -> tf.Tensor:
    """Normalizes with statistics that are given.

    y = gamma * (x - mean) / sqrt(variance + epsilon) + beta

    Far from zero the mean is subtracted before anything is multiplied, so that no digits are lost.

    Args:
        x: Floating-point tensor of rank 2 or more.
        mean: Shape `(C,)`, C the product of the sizes of `axes`; float32, or float64 where `x` is.
        variance: Shape `(C,)`, of the dtype of `mean`.
        gamma: Shape `(C,)`, or None for ones.
        beta: Shape `(C,)`, or None for zeros.
        axes: The channel axes, not negative, ascending.
        epsilon: Added to the variance; its unit is that of `x` squared.

    Returns:
        y, of the shape and dtype of `x`.

    Reference: Ioffe & Szegedy 2015 (arXiv 1502.03167), Algorithm 2, step 11.
    """
    known = [tensor for tensor in (x, mean, variance, gamma, beta) if tensor is not None]
    if not _native.infers(*known, axes=axes):
        return inference.normalize_plainly(x, mean, variance, gamma, beta, axes[0], axes[-1], epsilon, axes)
    gamma = tf.ones_like(mean) if gamma is None else gamma
    beta = tf.zeros_like(mean) if beta is None else beta
    return _native.normalize(x, mean, variance, gamma, beta, axes, epsilon)


def _takes_native(x, gamma, beta, axes, kernel, weights=None, group_size=None, synchronized=False) -> bool:
    """Whether an operation of our own normalizes such a batch."""
    if weights is not None or group_size is not None or synchronized:
        return False
    fits = kernel == "auto" and _native.fits(x, axes) and _trains_faster_natively(x, axes)
    return fits and _native.is_wanted(*(tensor for tensor in (x, gamma, beta) if tensor is not None))


def _trains_faster_natively(x, axes) -> bool:
    """Whether an operation of our own, which takes any input, is faster than TensorFlow's fused one; as measured."""
    if tf.executing_eagerly() or x.dtype == tf.float16:
        return True
    if has_planes(x, axes):
        pixels = math.prod(size or _NATIVE_ROW for size in x.shape[axes[-1] + 1 :])
        return is_small(x) or x.dtype == tf.float32 or pixels >= _NATIVE_ROW
    return likely_size(x) <= _NATIVE_VALUES


def _constant(moments: Moments) -> Moments:
    return moments._replace(mean=tf.stop_gradient(moments.mean), m2=tf.stop_gradient(moments.m2))


def _warn_of_single_value(count: tf.Tensor) -> None:
    """Says so on stderr when a graph sees one value per channel for the first time; Python is not there to warn."""

    def say():
        return tf.group(tf.raw_ops.Print(input=count, data=[], message=SINGLE_VALUE, first_n=1))

    tf.cond(tf.equal(count, 1.0), say, tf.no_op)


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


def _with_count_per_channel(moments: Moments) -> Moments:
    count = tf.cast(moments.count, moments.mean.dtype)
    return moments._replace(count=tf.broadcast_to(count, tf.shape(moments.mean)))
