"""One function for each way to normalize a batch with its own statistics; `kernels` chooses among them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.python.eager import record
from tensorflow.python.ops import control_flow_util

from keras_bn.ops.layouts import as_image, as_rows
from keras_bn.statistics import Moments, merged_across_replicas, moved_by, weighted_moments

# The fused kernel sums in float32, so that its mean is off by up to 8e-6 of itself (measured, 64x56x56x64). Up to this
# many standard deviations from zero that stays below 5e-5 of a standard deviation; beyond, the input is shifted first.
TRUSTED_OFFSET = 4.0

# On a CPU the fused operation is up to twice as fast on single pixels as on whole images (measured): always where the
# statistics are given, from so many channels on where it computes them.
_FLAT_CHANNELS = 64

_NOTHING = np.zeros(0, "float32")

# Up to this many values a few plain operations are faster than one that starts threads (measured: 256x128 yes, 4096x512
# no). A size that is not known counts as so many.
_SMALL = 2**17
LIKELY_BATCH = 64

SINGLE_VALUE = (
    "keras_bn: a batch with one value per channel was normalized to beta, and its statistics were not averaged. Larger "
    "batches, or `drop_remainder=True` where the last one is of a single example, avoid it."
)

Activation = Callable[[tf.Tensor], tf.Tensor]


def statistics_dtype(dtype: tf.DType) -> tf.DType:
    """The dtype in which inputs of `dtype` are summed: float64 for float64, else float32."""
    return tf.float64 if dtype == tf.float64 else tf.float32


def in_xla_context() -> bool:
    """Whether the graph that is being traced will be compiled by XLA."""
    return not tf.executing_eagerly() and control_flow_util.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph())


def is_small(x: tf.Tensor) -> bool:
    """Whether starting operations costs more than computing them."""
    return likely_size(x) <= _SMALL


def likely_size(x: tf.Tensor) -> int:
    """How many values there are: where a size is not known, with a likely one."""
    return math.prod(LIKELY_BATCH if size is None else size for size in x.shape)


def on_cpu() -> bool:
    """Whether there is no GPU: cuDNN takes at most 65,535 examples, so images must stay images for it."""
    return not tf.config.list_physical_devices("GPU")


def are_near(means: tf.Tensor, variances: tf.Tensor) -> tf.Tensor | bool:
    """Whether no channel's mean is so many standard deviations from zero that it must be subtracted first."""
    if not tf.executing_eagerly():
        return tf.reduce_all(tf.square(means) <= TRUSTED_OFFSET**2 * variances)
    # An operation costs more than NumPy takes for a vector; in float64 no square overflows, with a warning.
    means, variances = (vector.numpy().astype("float64") for vector in (means, variances))
    return bool(np.all(means * means <= TRUSTED_OFFSET**2 * variances))


def either(condition: tf.Tensor | bool, if_true: Callable[[], Any], if_false: Callable[[], Any]) -> Any:
    """What one of the two functions returns; a branch in the graph where the condition is not known yet."""
    if not isinstance(condition, bool) and tf.is_symbolic_tensor(condition):
        return tf.cond(tf.cast(condition, tf.bool), if_true, if_false)
    return if_true() if condition else if_false()


def small(
    x: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor, axes: Sequence[int], epsilon: float
) -> tuple[tf.Tensor, Moments]:
    """As few plain operations as it takes, for inputs whose time goes into starting operations."""

    def normalize(rows, gamma, beta):
        deviation, mean, correction = centred(rows)
        m2 = tf.reduce_sum(tf.square(deviation), 0)
        inverse_std = tf.math.rsqrt(m2 / divisor_of(rows) + epsilon)

        def gradient(dy, *_):
            return small_gradient(dy, deviation, gamma, inverse_std)

        return (deviation * (inverse_std * gamma) + beta, mean + correction, m2), gradient

    rows, restore = as_rows(x, axes)
    y, mean, m2 = with_gradient(normalize, tf.cast(rows, gamma.dtype), gamma, beta)
    return restore(tf.cast(y, x.dtype)), Moments(value_count(rows, [0], gamma.dtype), mean, m2)


def with_gradient(function: Callable[..., tuple[Any, Callable]], *inputs: tf.Tensor) -> Any:
    """`tf.custom_gradient`, without the operations that it adds where nothing is differentiated."""
    if tf.executing_eagerly() and not record.could_possibly_record():
        outputs, _ = function(*inputs)
        return outputs
    return tf.custom_gradient(function)(*inputs)


def centred(rows: tf.Tensor, mean: tf.Tensor | None = None) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """The deviations from the mean, a rounded mean, and what that lacks: the mean of the deviations from it."""
    divisor = divisor_of(rows)

    def mean_of(values):
        # One operation fewer; of nothing it would be NaN.
        known = isinstance(divisor, float) and rows.shape[0] > 0
        return tf.reduce_mean(values, 0) if known else tf.reduce_sum(values, 0) / divisor

    mean = mean_of(rows) if mean is None else mean
    deviation = rows - mean
    correction = mean_of(deviation)
    return deviation - correction, mean, correction


def small_gradient(
    dy: tf.Tensor, deviation: tf.Tensor, gamma: tf.Tensor, inverse_std: tf.Tensor
) -> tuple[tf.Tensor, ...]:
    """The gradients of rows, gamma and beta."""
    divisor = divisor_of(deviation)
    dbeta = tf.reduce_sum(dy, 0)
    dgamma = tf.reduce_sum(dy * deviation, 0) * inverse_std
    dx = (dy - dbeta / divisor - deviation * (dgamma * inverse_std / divisor)) * (inverse_std * gamma)
    return dx, dgamma, dbeta


def divisor_of(rows: tf.Tensor) -> tf.Tensor | float:
    """The number of rows, at least one."""
    count = value_count(rows, [0], rows.dtype)
    return max(count, 1.0) if isinstance(count, float) else tf.maximum(count, 1.0)


def fused(
    x: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor, axes: Sequence[int], epsilon: float
) -> tuple[tf.Tensor, Moments]:
    """The fused operation; again, on shifted input, where the statistics that come out say that it lost digits."""
    cpu = on_cpu()
    flat = math.prod(x.shape[axis] for axis in axes) >= _FLAT_CHANNELS and cpu
    image, data_format, restore = as_image(x, axes, flat, channels_last=cpu)
    reduced = [0, 1, 2] if data_format == "NHWC" else [0, 2, 3]

    def forward(image):
        return tf.raw_ops.FusedBatchNormV3(
            x=image,
            scale=gamma,
            offset=beta,
            mean=_NOTHING,
            variance=_NOTHING,
            epsilon=epsilon,
            data_format=data_format,
            is_training=True,
        )

    def shifted_forward(image):
        shift = central_value(image, reduced)
        y, mean, *rest = forward(tf.cast(image, gamma.dtype) - shift)
        return (tf.cast(y, image.dtype), mean + tf.reshape(shift, [-1]), *rest)

    def normalize(image, gamma, beta):
        plain = forward(image)
        # A constant channel fails this too, so that its output is beta to the last digit. So does a NaN.
        trusted = are_near(plain.batch_mean, plain.batch_variance)
        y, mean, variance, *reserved = either(trusted, lambda: tuple(plain), lambda: shifted_forward(image))

        def backward(dy, image):
            return tf.raw_ops.FusedBatchNormGradV3(
                y_backprop=dy,
                x=image,
                scale=gamma,
                reserve_space_1=reserved[0],
                reserve_space_2=reserved[1],
                reserve_space_3=reserved[2],
                epsilon=epsilon,
                data_format=data_format,
                is_training=True,
            )[:3]

        def shifted_backward(dy):
            shifted = tf.cast(image, gamma.dtype) - central_value(image, reduced)
            dx, *rest = backward(tf.cast(dy, gamma.dtype), shifted)
            return (tf.cast(dx, image.dtype), *rest)

        def gradient(dy, *_):
            return either(trusted, lambda: tuple(backward(dy, image)), lambda: shifted_backward(dy))

        return (y, mean, variance), gradient

    y, mean, unbiased = with_gradient(normalize, image, gamma, beta)
    count = value_count(image, reduced, gamma.dtype)
    return restore(y), Moments(count, mean, unbiased * (count - 1))


def normalize_batch_plainly(
    x, gamma, beta, moving_mean, moving_variance, first_axis, last_axis, epsilon, rate, unbiased, warning
) -> list[tf.Tensor]:
    """What stands in for the operation that normalizes a batch and moves both statistics."""
    del warning  # It needs a branch in the graph, which costs more than it is worth.
    axes = range(first_axis, last_axis + 1)
    y, moments = (small if is_small(x) else fused)(x, gamma, beta, axes, epsilon)
    moved = moved_by(moving_mean, moving_variance, moments, rate, unbiased)
    return [y, tf.stack([moments.mean, moments.m2]), *moved]


def composed(
    rows: tf.Tensor,
    gamma: tf.Tensor,
    beta: tf.Tensor,
    epsilon: float,
    weights: tf.Tensor | None,
    synchronized: bool,
) -> tuple[tf.Tensor, Moments]:
    """From differentiable pieces, for what is rarer: weights and several replicas.

    Args:
        rows: Shape `(M, C)`, or `(G, M, C)` for groups.
        weights: The shape of `rows`.
    """
    values = tf.cast(rows, gamma.dtype)
    if weights is None:
        shift = central_value(rows, [len(rows.shape) - 2])
    else:
        # The largest value that counts: a value of the channel, whatever the others hold.
        largest = tf.reduce_max(tf.where(weights > 0, values, gamma.dtype.min), -2, keepdims=True)
        shift = tf.stop_gradient(tf.where(tf.reduce_any(weights > 0, -2, keepdims=True), largest, 0))
    shifted = values - shift
    moments = weighted_moments(shifted, weights)
    if synchronized:
        moments = merged_across_replicas(moments, tf.squeeze(shift, -2))
    variance = tf.math.divide_no_nan(moments.m2, moments.count)
    inverse_std = tf.math.rsqrt(variance + epsilon)
    y = (shifted - moments.mean[..., None, :]) * (inverse_std * gamma)[..., None, :] + beta
    return tf.cast(y, rows.dtype), Moments(
        tf.stop_gradient(moments.count),
        tf.stop_gradient(moments.mean + tf.squeeze(shift, -2)),
        tf.stop_gradient(moments.m2),
    )


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


def value_count(x: tf.Tensor, reduced: Sequence[int], dtype: tf.DType) -> tf.Tensor | float:
    """How many values there are along the axes `reduced`: a Python number where the shape is known."""
    if all(x.shape[axis] is not None for axis in reduced):
        return float(math.prod(x.shape[axis] for axis in reduced))
    return tf.cast(tf.reduce_prod(tf.gather(tf.shape(x), reduced)), dtype)
