"""Normalization with statistics that are given: one function for each way, and the choice among them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import tensorflow as tf

from keras_bn.ops.fused import are_near, in_xla_context, is_small, on_cpu, statistics_dtype, with_gradient
from keras_bn.ops.layouts import along, as_image, as_planes, as_rows, has_planes

# From so many examples on, a channel for each pixel costs less than a copy to float32 (measured: 64 yes, 8 no).
_PIXEL_EXAMPLES = 32

# XLA's CPU compiler unrolls rows of half types that are shorter than this instead of vectorizing them, and each
# operation counts: there a branch costs less than the subtraction of the mean (measured: 7 and 14 yes, 28 no).
_XLA_ROW = 16

# It computes rows of so few channels faster where the mean is folded (measured: 16 and 64 yes, 256 no).
_XLA_CHANNELS = 64

# From so many values on, subtracting the mean costs more than to find out whether it is needed (measured, float32:
# 512x256 yes, 256x128 no).
_WORTH_A_BRANCH = 2**16


def normalize_plainly(x, mean, variance, gamma, beta, first_axis, last_axis, epsilon, axes=None) -> tf.Tensor:
    """y = gamma * (x - mean) / sqrt(variance + epsilon) + beta, with TensorFlow's own operations.

    Args:
        axes: Where the channel axes do not stand together, all of them.
    """
    axes = axes or range(first_axis, last_axis + 1)
    dtype = statistics_dtype(x.dtype)

    def factor():
        inverse_std = tf.math.rsqrt(variance + epsilon)
        return inverse_std if gamma is None else inverse_std * gamma

    if _is_worth_a_branch(x, axes):
        return folded_where_near(x, mean, variance, factor(), beta, axes, epsilon)
    planes, compiled, cpu, small = has_planes(x, axes), in_xla_context(), on_cpu(), is_small(x)
    half = dtype != x.dtype
    if cpu and small and half and not (planes or compiled or tf.executing_eagerly()):
        return fused_voxels(x, mean, variance, gamma, beta, axes, epsilon)
    if dtype == tf.float64 or small or compiled:
        return plain(x, mean, factor(), beta, axes)
    if cpu and planes:
        return fused_voxels(x, mean, variance, gamma, beta, axes, epsilon)
    gamma = tf.ones_like(mean) if gamma is None else gamma
    beta = tf.zeros_like(mean) if beta is None else beta
    image, data_format, restore = as_image(x, axes, flat=cpu, channels_last=cpu)
    return restore(fused(image, mean, variance, gamma, beta, epsilon, data_format))


def plain(x: tf.Tensor, mean: tf.Tensor, factor: tf.Tensor, beta: tf.Tensor | None, axes: Sequence[int]) -> tf.Tensor:
    """factor * (x - mean) + beta: keeps its digits wherever the mean is.

    Args:
        factor: gamma / sqrt(variance + epsilon).
    """
    y = (tf.cast(x, mean.dtype) - along(axes, mean, x)) * along(axes, factor, x)
    if beta is not None:
        y += along(axes, beta, x)
    return tf.cast(y, x.dtype)


def folded(x: tf.Tensor, mean: tf.Tensor, factor: tf.Tensor, beta: tf.Tensor, axes: Sequence[int]) -> tf.Tensor:
    """factor * x + (beta - factor * mean): one pass over memory fewer, for means that are near zero."""
    return tf.cast(scale_and_shift(tf.cast(x, mean.dtype), factor, beta - mean * factor, axes=axes), x.dtype)


def folded_where_near(
    x: tf.Tensor,
    mean: tf.Tensor,
    variance: tf.Tensor,
    factor: tf.Tensor,
    beta: tf.Tensor | None,
    axes: Sequence[int],
    epsilon: float,
) -> tf.Tensor:
    """`folded` where no digits are lost by it, else `plain`."""
    beta = tf.zeros_like(mean) if beta is None else beta
    near = are_near(mean, variance + epsilon)
    if isinstance(near, bool):
        return (folded if near else plain)(x, mean, factor, beta, axes)
    if not in_xla_context():
        values = tf.cast(x, mean.dtype)
        values = tf.cond(near, lambda: values, lambda: values - along(axes, mean, x))
        return tf.cast(scale_and_shift(values, factor, tf.where(near, beta - mean * factor, beta), axes=axes), x.dtype)

    @tf.custom_gradient
    def normalize(x, mean, factor, beta):
        def far():
            return plain(x, mean, factor, beta, axes)

        # A branch that is differentiated costs up to 40 % of the gradient of gamma (measured).
        def gradient(dy):
            return tf.gradients(far(), [x, mean, factor, beta], dy)

        return tf.cond(near, lambda: folded(x, mean, factor, beta, axes), far), gradient

    return normalize(x, mean, factor, beta)


def fused(
    image: tf.Tensor,
    mean: tf.Tensor,
    variance: tf.Tensor,
    gamma: tf.Tensor,
    beta: tf.Tensor,
    epsilon: float,
    data_format: str,
) -> tf.Tensor:
    """TensorFlow's fused operation, which subtracts the mean first."""
    return tf.raw_ops.FusedBatchNormV3(
        x=image,
        scale=gamma,
        offset=beta,
        mean=mean,
        variance=variance,
        epsilon=epsilon,
        data_format=data_format,
        is_training=False,
    ).y


def fused_voxels(
    x: tf.Tensor,
    mean: tf.Tensor,
    variance: tf.Tensor,
    gamma: tf.Tensor | None,
    beta: tf.Tensor | None,
    axes: Sequence[int],
    epsilon: float,
) -> tf.Tensor:
    """The fused operation on single voxels: with three spatial axes TensorFlow takes its own kernel.

    That of oneDNN, which it takes for two, needs up to 40 microseconds to start, and for planes of bfloat16 up to 1.3
    times as long (measured). Planes would have to be transposed forth and back: each pixel is a channel instead.
    For half types, where plain operations have to copy the image to float32.
    """
    gamma = tf.ones_like(mean) if gamma is None else gamma
    beta = tf.zeros_like(mean) if beta is None else beta
    planes = None
    if has_planes(x, axes):
        planes, restore = as_planes(x, axes)
        examples, channels, pixels = tf.unstack(tf.shape(planes))
        voxels = tf.reshape(planes, [examples, 1, 1, 1, channels * pixels])
        mean, variance, gamma, beta = (
            tf.reshape(tf.tile(vector[:, None], [1, pixels]), [-1]) for vector in (mean, variance, gamma, beta)
        )
    else:
        voxels, restore = as_rows(x, axes, [-1, 1, 1, 1])

    def normalize(voxels, mean, variance, gamma, beta):
        y = fused(voxels, mean, variance, gamma, beta, epsilon, "NDHWC")

        # TensorFlow knows no second derivative of the fused operation with three spatial axes. Plain operations, which
        # are for small inputs, would copy the planes to float32.
        def gradient(dy):
            inputs = [voxels, mean, variance, gamma, beta]
            with tf.GradientTape() as tape:
                tape.watch(inputs)
                if planes is None:
                    y = plain(voxels, mean, tf.math.rsqrt(variance + epsilon) * gamma, beta, [4])
                else:
                    image = tf.squeeze(voxels, 1)
                    y = tf.expand_dims(fused(image, mean, variance, gamma, beta, epsilon, "NHWC"), 1)
            return tape.gradient(y, inputs, output_gradients=dy)

        return y, gradient

    return restore(with_gradient(normalize, voxels, mean, variance, gamma, beta))


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


def _is_worth_a_branch(x, axes) -> bool:
    """Whether to find out that the means are near zero costs less than to subtract them; as measured."""
    half = statistics_dtype(x.dtype) != x.dtype
    planes, small = has_planes(x, axes), is_small(x)
    if in_xla_context():
        if planes:
            return not small and half and x.shape[-1] is not None and x.shape[-1] < _XLA_ROW
        narrow = math.prod(x.shape[axis] for axis in axes) <= _XLA_CHANNELS
        return not small and x.dtype == tf.float32 and narrow
    if not on_cpu() or x.dtype == tf.float64:
        return False
    if planes:
        examples = x.shape[0] if axes[0] > 0 else 1
        return not small and (not half or (examples is not None and examples < _PIXEL_EXAMPLES))
    size = x.shape.num_elements()
    return small and not half and size is not None and size >= _WORTH_A_BRANCH
