"""One function for each way to normalize with statistics that are given; `kernels` chooses among them."""

from __future__ import annotations

from collections.abc import Sequence

import tensorflow as tf

from keras_bn._batch_kernels import are_near, in_xla_context, with_gradient
from keras_bn.layouts import along, as_planes, as_rows, has_planes


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
