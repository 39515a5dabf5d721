"""Normalization as stateless functions of tensors, each done in the way that suits where it runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import tensorflow as tf

from keras_bn.ops import fused, native, plain, where
from keras_bn.ops.layouts import channel_count
from keras_bn.ops.native import SINGLE_VALUE as SINGLE_VALUE
from keras_bn.ops.native import compiled as compiled
from keras_bn.ops.plain import scale_and_shift as scale_and_shift
from keras_bn.statistics import Moments, Moving, statistics_dtype

KERNELS = ("auto", "native", "fused", "plain")


class Normalized(NamedTuple):
    """A batch that was normalized with its own statistics.

    Attributes:
        y: Of the shape and dtype of the input, differentiable.
        moments: Of the batch (per group where there are groups), not differentiable.
        moved: The moving mean and variance one step on, where that was asked for and the operation does it by the way;
            else None.
    """

    y: tf.Tensor
    moments: Moments
    moved: tuple[tf.Tensor, tf.Tensor] | None


def normalize_batch(
    x: tf.Tensor,
    gamma: tf.Tensor | None = None,
    beta: tf.Tensor | None = None,
    *,
    axes: Sequence[int],
    epsilon: float,
    weights: tf.Tensor | None = None,
    group_size: int | None = None,
    synchronized: bool | int = False,
    kernel: str = "auto",
    moving: Moving | None = None,
) -> Normalized:
    """Normalizes with the statistics of this batch.

    y = gamma * (x - mean) / sqrt(variance + epsilon) + beta

    with the biased variance, from a centred second moment. Half types are accumulated in float32 at least.

    Args:
        x: Floating-point tensor of rank 2 or more.
        gamma: Shape `(C,)`, C the product of the sizes of `axes`, or None for ones; float32, or float64 where `x` is.
        beta: Shape `(C,)`, or None for zeros.
        axes: The channel axes, not negative, ascending.
        epsilon: Added to the variance; its unit is that of `x` squared.
        weights: Of each value, of a shape that broadcasts to that of `x`: booleans and integers are frequencies, floats
            reliabilities, see `keras_bn.statistics.Moments`. Default: 1.
        group_size: Number of examples (along axis 0) that are normalized together; the last group may be smaller.
            Default: all.
        synchronized: Whether the statistics are those of all replicas' batches together, or of groups of so many.
        kernel: "auto", "native", "fused" or "plain": one of `KERNELS`. Weights, groups, synchronization and graphs
            that XLA compiles have the plain one only.
        moving: Moving statistics that an operation may move by the way, in the dtype of gamma.

    Returns:
        y, differentiable twice; and the moments of `x`.

    Raises:
        ValueError: If `kernel` is "native" or "fused" and `x` is float64, or "native" without compiled operations.

    Reference: Ioffe & Szegedy 2015 (arXiv 1502.03167), Algorithm 1.
    """
    dtype, channels = statistics_dtype(x.dtype), channel_count(x, axes)
    gamma = tf.ones([channels], dtype) if gamma is None else gamma
    beta = tf.zeros([channels], dtype) if beta is None else beta
    if weights is not None or group_size is not None or synchronized or where.in_xla_context():
        return Normalized(
            *plain.normalize_batch(x, gamma, beta, axes, epsilon, weights, group_size, synchronized), None
        )
    kernel = _kernel_for(x, kernel)
    if kernel == "native":
        return Normalized(*native.normalize_batch(x, gamma, beta, axes, epsilon, moving))
    normalize = fused.normalize_batch if kernel == "fused" else plain.normalize_batch
    y, moments = normalize(x, gamma, beta, axes, epsilon)
    fewest = math.prod(size or 1 for axis, size in enumerate(x.shape) if axis not in axes)
    if fewest == 1 and not isinstance(moments.count, float):  # To find out costs a branch.
        where.say_once_if(tf.equal(moments.count, 1.0), SINGLE_VALUE)
    return Normalized(y, moments, None)


def normalize(
    x: tf.Tensor,
    mean: tf.Tensor,
    variance: tf.Tensor,
    gamma: tf.Tensor | None = None,
    beta: tf.Tensor | None = None,
    *,
    axes: Sequence[int],
    epsilon: float,
    kernel: str = "auto",
) -> tf.Tensor:
    """Normalizes with statistics that are given.

    y = gamma * (x - mean) / sqrt(variance + epsilon) + beta

    The mean is subtracted before anything is multiplied, so that no digits are lost far from zero. A graph holds
    TensorFlow's own operations, so that it can be exported, unless it loops over data.

    Args:
        x: Floating-point tensor of rank 2 or more.
        mean: Shape `(C,)`, C the product of the sizes of `axes`; float32, or float64 where `x` is.
        variance: Shape `(C,)`, of the dtype of `mean`.
        gamma: Shape `(C,)`, or None for ones.
        beta: Shape `(C,)`, or None for zeros.
        axes: The channel axes, not negative, ascending.
        epsilon: Added to the variance; its unit is that of `x` squared.
        kernel: As for `normalize_batch`; "plain" is TensorFlow's own operations everywhere.

    Returns:
        y, of the shape and dtype of `x`, differentiable.

    Reference: Ioffe & Szegedy 2015 (arXiv 1502.03167), Algorithm 2, step 11.
    """
    exported = not tf.executing_eagerly() and (where.in_xla_context() or not where.in_loop_over_data())
    way = native if kernel in ("auto", "native") and not exported and native.takes(x) else plain
    return way.normalize(x, mean, variance, gamma, beta, axes, epsilon)


def _kernel_for(x: tf.Tensor, kernel: str) -> str:
    """The way in which a batch is normalized that XLA does not compile."""
    if x.dtype == tf.float64 and kernel in ("native", "fused"):
        raise ValueError(
            "`kernel` must be 'auto' or 'plain' for float64 inputs, which neither the compiled nor TensorFlow's fused "
            f"operation takes. Received: kernel={kernel!r}."
        )
    if kernel == "native" and not compiled():
        raise ValueError(
            "`kernel` must be 'auto', 'fused' or 'plain' where the compiled operations are not in use: "
            f"{compiled().reason}. Received: kernel='native'."
        )
    if kernel != "auto":
        return kernel
    return "plain" if x.dtype == tf.float64 else "native" if native.takes(x) else "fused"
