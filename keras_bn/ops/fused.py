"""Normalization of a batch with TensorFlow's fused operation: on a GPU, or where there is no compiled library."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from keras_bn.ops import where
from keras_bn.ops.layouts import Restore, as_planes, as_rows, channel_count, has_planes, value_count
from keras_bn.ops.plain import central_value
from keras_bn.statistics import Moments

# The fused kernel sums in float32, so that its mean is off by up to 8e-6 of itself (measured, 64x56x56x64). Up to this
# many standard deviations from zero that stays below 5e-5 of a standard deviation; beyond, the input is shifted first.
TRUSTED_OFFSET = 4.0

_NOTHING = np.zeros(0, "float32")


def normalize_batch(
    x: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor, axes: Sequence[int], epsilon: float
) -> tuple[tf.Tensor, Moments]:
    """y = gamma * (x - mean) / sqrt(m2 / count + epsilon) + beta: see `keras_bn.ops.normalize_batch`.

    Again, on shifted input, where the statistics that come out say that digits were lost.
    """
    image, data_format, restore = _as_image(x, axes)
    reduced = [0, 1, 2] if data_format == "NHWC" else [0, 2, 3]
    options = {"epsilon": epsilon, "data_format": data_format, "is_training": True}

    def forward(image):
        nothing = {"mean": _NOTHING, "variance": _NOTHING}
        return tf.raw_ops.FusedBatchNormV3(x=image, scale=gamma, offset=beta, **nothing, **options)

    def shifted_forward(image):
        shift = central_value(image, reduced)
        y, mean, *rest = forward(tf.cast(image, gamma.dtype) - shift)
        return (tf.cast(y, image.dtype), mean + tf.reshape(shift, [-1]), *rest)

    @tf.custom_gradient
    def normalize(image, gamma, beta):
        direct = forward(image)
        # A constant channel fails this too, so that its output is beta to the last digit. So does a NaN.
        trusted = tf.reduce_all(tf.abs(direct.batch_mean) <= TRUSTED_OFFSET * tf.sqrt(direct.batch_variance))
        y, mean, variance, *reserved = where.either(trusted, lambda: tuple(direct), lambda: shifted_forward(image))

        def backward(dy, image):
            spaces = {f"reserve_space_{number}": space for number, space in enumerate(reserved[:3], 1)}
            gradients = tf.raw_ops.FusedBatchNormGradV3(y_backprop=dy, x=image, scale=gamma, **spaces, **options)
            return tuple(gradients[:3])

        def shifted_backward(dy):
            shifted = tf.cast(image, gamma.dtype) - central_value(image, reduced)
            dx, *rest = backward(tf.cast(dy, gamma.dtype), shifted)
            return (tf.cast(dx, image.dtype), *rest)

        def gradient(dy, *_):
            return where.either(trusted, lambda: backward(dy, image), lambda: shifted_backward(dy))

        return (y, mean, variance), gradient

    y, mean, unbiased_variance = normalize(image, gamma, beta)
    count = value_count(image, reduced, gamma.dtype)
    # TensorFlow divides by count - 1, or by 1; of nothing it gives NaN.
    m2 = tf.math.multiply_no_nan(unbiased_variance, tf.maximum(count - 1.0, 0.0))
    mean = tf.math.multiply_no_nan(mean, tf.minimum(count, 1.0))
    return restore(y), Moments(count, tf.stop_gradient(mean), tf.stop_gradient(m2))


def _as_image(x: tf.Tensor, axes: Sequence[int]) -> tuple[tf.Tensor, str, Restore]:
    """`x` as a rank-4 tensor that the fused operation takes, its data format, and the way back."""
    cpu, channels = where.on_cpu(), channel_count(x, axes)
    if not cpu and len(x.shape) == 4 and tuple(axes) == (3,):
        return x, "NHWC", lambda y: y
    if not cpu and has_planes(x, axes):
        planes, restore = as_planes(x, axes)
        return planes[..., None], "NCHW", lambda y: restore(tf.squeeze(y, 3))
    rows, restore = as_rows(x, axes)
    # cuDNN takes at most 65,535 examples, and on a CPU they are what threads share.
    shape = [-1, 1, 1, channels] if cpu else [1, -1, 1, channels]
    return tf.reshape(rows, shape), "NHWC", lambda y: restore(tf.reshape(y, [-1, channels]))
