"""Normalization as stateless functions of tensors, each the fastest that is right for where it runs."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import keras
import tensorflow as tf
from tensorflow.compiler.tf2xla.ops import gen_xla_ops
from tensorflow.python.eager import record
from tensorflow.python.ops import control_flow_util

from keras_bn.layouts import along, as_image, as_rows
from keras_bn.statistics import Moments, merged_across_replicas, weighted_moments

# The fused kernel sums in float32, so that its mean is off by up to 8e-6 of itself (measured, 64x56x56x64). Up to this
# many standard deviations from zero that stays below 5e-5 of a standard deviation; beyond, the input is shifted first.
_TRUSTED_OFFSET = 4.0

# On a CPU the fused operation is up to twice as fast on single pixels as on whole images (measured): always where the
# statistics are given, from so many channels on where it computes them.
_FLAT_CHANNELS = 64

# Up to this many values a few plain operations are faster than one that starts threads (measured: 256x128 yes, 4096x512
# no). A size that is not known counts as so many.
_SMALL = 2**17
_LIKELY_BATCH = 64

# XLA's CPU compiler vectorizes a sum of what it computes on the way only where it unrolls the loop: up to 16 rows.
_PARTS = 8

SINGLE_VALUE = (
    "keras_bn: a batch with one value per channel was normalized to beta, and its statistics were not averaged. Larger "
    "batches, or `drop_remainder=True` where the last one is of a single example, avoid it."
)

Activation = Callable[[tf.Tensor], tf.Tensor]


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
    gamma = tf.ones([channels], dtype) if gamma is None else gamma
    beta = tf.zeros([channels], dtype) if beta is None else beta
    if weights is None and group_size is None and not synchronized:
        if in_xla_context() or (kernel == "auto" and dtype == tf.float64):
            kernel = "stable"
        elif kernel == "auto":
            kernel = "small" if x.dtype == tf.float32 and _is_small(x) else "fused"
        if kernel == "fused":
            if dtype == tf.float64:
                raise ValueError(
                    "`kernel` must be 'auto', 'xla' or 'stable' for float64 inputs, which TensorFlow's fused "
                    "operation does not take. Received: kernel='fused'."
                )
            image, data_format, restore = as_image(x, axes, flat=channels >= _FLAT_CHANNELS and _on_cpu())
            count = _count(image, 3 if data_format == "NHWC" else 1, dtype)
            if not isinstance(count, float) and all(size in (1, None) for size in image.shape[:3:2]):
                _warn_of_single_value(count)
            y, mean, unbiased = _fused(image, gamma, beta, epsilon, data_format)
            return activation(restore(y)), _constant(Moments(count, mean, unbiased * (count - 1)))
        rows, restore = as_rows(x, axes)
        if kernel == "small":
            count = _count(rows, 1, dtype)
            if not isinstance(count, float):
                _warn_of_single_value(count)
            y, mean, m2 = _small(rows, gamma, beta, epsilon)
            return activation(restore(y)), _constant(Moments(count, mean, m2))
        two_pass = _compiled_two_pass if kernel == "xla" else _two_pass
        y, moments = two_pass(rows, gamma, beta, epsilon, activation)
        return restore(y), moments

    rows, restore = as_rows(x, axes)
    if weights is not None:
        weights, _ = as_rows(tf.broadcast_to(tf.cast(weights, dtype), tf.shape(x)), axes)
        weights = tf.ensure_shape(weights, rows.shape)

    def normalize(rows, weights):
        if weights is None and not synchronized:
            return _two_pass(rows, gamma, beta, epsilon, activation)
        y, moments = _composed(rows, gamma, beta, epsilon, weights, synchronized)
        return activation(y), moments

    if group_size is None:
        y, moments = normalize(rows, weights)
        return restore(y), moments
    examples = tf.shape(x)[0]
    parts = _split_groups(rows, examples, group_size)
    part_weights = [None, None] if weights is None else _split_groups(weights, examples, group_size)
    normalized = [normalize(*part) for part in zip(parts, part_weights, strict=True)]
    y = tf.concat([tf.reshape(y, [-1, channels]) for y, _ in normalized], 0)
    fields = zip(*(_with_count_per_channel(part) for _, part in normalized), strict=True)
    return restore(tf.ensure_shape(y, rows.shape)), Moments(*(tf.concat(field, 0) for field in fields))


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

    The mean is subtracted before anything is multiplied, so no digits are lost far from zero.

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
    dtype = statistics_dtype(x.dtype)
    if dtype == tf.float64 or in_xla_context() or _is_small(x):
        factor = tf.math.rsqrt(variance + epsilon)
        if gamma is not None:
            factor *= gamma
        y = (tf.cast(x, dtype) - along(axes, mean, x)) * along(axes, factor, x)
        if beta is not None:
            y += along(axes, beta, x)
        return tf.cast(y, x.dtype)
    image, data_format, restore = as_image(x, axes, flat=_on_cpu())
    fused = tf.raw_ops.FusedBatchNormV3(
        x=image,
        scale=tf.ones_like(mean) if gamma is None else gamma,
        offset=tf.zeros_like(mean) if beta is None else beta,
        mean=mean,
        variance=variance,
        epsilon=epsilon,
        data_format=data_format,
        is_training=False,
    )
    return restore(fused.y)


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


def statistics_dtype(dtype: tf.DType) -> tf.DType:
    """The dtype in which inputs of `dtype` are summed: float64 for float64, else float32."""
    return tf.float64 if dtype == tf.float64 else tf.float32


def in_xla_context() -> bool:
    """Whether the graph that is being traced will be compiled by XLA."""
    return not tf.executing_eagerly() and control_flow_util.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph())


def _on_cpu() -> bool:
    """Whether there is no GPU: cuDNN takes at most 65,535 examples, so images must stay images for it."""
    return not tf.config.list_physical_devices("GPU")


def _is_small(x: tf.Tensor) -> bool:
    return math.prod(_LIKELY_BATCH if size is None else size for size in x.shape) <= _SMALL


def _small(rows: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor, epsilon: float) -> tuple[tf.Tensor, ...]:
    """As few plain operations as it takes, for inputs whose time goes into starting operations: y, mean, m2."""
    count = _count(rows, 1, gamma.dtype)
    divisor = max(count, 1.0) if isinstance(count, float) else tf.maximum(count, 1.0)

    def mean_of(values):
        # One operation fewer; of nothing it would be NaN.
        return tf.reduce_mean(values, 0) if count is divisor else tf.reduce_sum(values, 0) / divisor

    def normalize(rows, gamma, beta):
        # The mean of the deviations from a rounded mean is what that lacks.
        mean = mean_of(rows)
        deviation = rows - mean
        correction = mean_of(deviation)
        deviation -= correction
        m2 = tf.reduce_sum(tf.square(deviation), 0)
        inverse_std = tf.math.rsqrt(m2 / divisor + epsilon)
        factor = inverse_std * gamma

        def gradient(dy, *_):
            dbeta = tf.reduce_sum(dy, 0)
            dgamma = tf.reduce_sum(dy * deviation, 0) * inverse_std
            dx = (dy - dbeta / divisor - deviation * (dgamma * inverse_std / divisor)) * factor
            return dx, dgamma, dbeta

        return (deviation * factor + beta, mean + correction, m2), gradient

    if tf.executing_eagerly() and not record.could_possibly_record():
        outputs, _ = normalize(rows, gamma, beta)
        return outputs
    return tf.custom_gradient(normalize)(rows, gamma, beta)


def _fused(
    image: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor, epsilon: float, data_format: str
) -> tuple[tf.Tensor, ...]:
    """The fused operation: y, mean, unbiased variance.

    Runs again on shifted input, if the statistics that come out say that it lost digits.
    """

    def forward(image):
        return tf.raw_ops.FusedBatchNormV3(
            x=image,
            scale=gamma,
            offset=beta,
            mean=tf.zeros([0], gamma.dtype),
            variance=tf.zeros([0], gamma.dtype),
            epsilon=epsilon,
            data_format=data_format,
            is_training=True,
        )

    def shifted_forward(image):
        shift = _central_value(image, data_format)
        y, mean, *rest = forward(tf.cast(image, gamma.dtype) - shift)
        return (tf.cast(y, image.dtype), mean + tf.reshape(shift, [-1]), *rest)

    @tf.custom_gradient
    def normalize(image, gamma, beta):
        plain = forward(image)
        # A constant channel fails this too, so that its output is beta to the last digit. So does a NaN.
        trusted = tf.reduce_all(tf.square(plain.batch_mean) <= _TRUSTED_OFFSET**2 * plain.batch_variance)
        y, mean, variance, *reserved = tf.cond(trusted, lambda: tuple(plain), lambda: shifted_forward(image))

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
            shifted = tf.cast(image, gamma.dtype) - _central_value(image, data_format)
            dx, *rest = backward(tf.cast(dy, gamma.dtype), shifted)
            return (tf.cast(dx, image.dtype), *rest)

        def gradient(dy, *_):
            return tf.cond(trusted, lambda: tuple(backward(dy, image)), lambda: shifted_backward(dy))

        return (y, mean, variance), gradient

    return normalize(image, gamma, beta)


def _constant(moments: Moments) -> Moments:
    return moments._replace(mean=tf.stop_gradient(moments.mean), m2=tf.stop_gradient(moments.m2))


def _warn_of_single_value(count: tf.Tensor) -> None:
    """Says so on stderr when a graph sees one value per channel for the first time; Python is not there to warn."""

    def say():
        return tf.group(tf.raw_ops.Print(input=count, data=[], message=SINGLE_VALUE, first_n=1))

    tf.cond(tf.equal(count, 1.0), say, tf.no_op)


def _two_pass(
    rows: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor, epsilon: float, activation: Activation
) -> tuple[tf.Tensor, Moments]:
    """Two reductions over the rows of a matrix, forward and backward: what XLA's CPU compiler does best.

    Every deviation is (x - shift) - delta with a shift taken from the data: the first difference is exact where the
    offset is large, so no digits are lost there, and it is zero for a constant channel. A rectifier is made part of it:
    the backward pass finds its sign from the input again.

    Args:
        rows: Shape `(M, C)`, or `(G, M, C)` for groups.
    """
    channel_axis = len(rows.shape) - 1
    count = _count(rows, channel_axis, gamma.dtype)
    rectified = activation is keras.activations.relu
    # A group, or a batch, may be empty: its sums are zero, and so are their means.
    divisor = max(count, 1.0) if isinstance(count, float) else tf.maximum(count, 1.0)

    @tf.custom_gradient
    def normalize(rows, gamma, beta):
        shift = _central_value(rows)

        def shifted():
            return tf.cast(rows, gamma.dtype) - shift

        delta = _sum_of_rows(shifted()) / divisor
        m2 = _sum_of_rows(tf.square(shifted() - delta))
        inverse_std = tf.math.rsqrt(m2 / divisor + epsilon)
        y = (shifted() - delta) * (inverse_std * gamma) + beta
        if rectified:
            y = tf.nn.relu(y)

        def gradient(dy, *_):
            dy = tf.cast(dy, gamma.dtype)
            deviation = shifted() - delta
            if rectified:
                dy = tf.where(deviation * (inverse_std * gamma) + beta > 0, dy, 0)
            dbeta = _sum_of_rows(dy)
            dgamma = _sum_of_rows(dy * deviation) * inverse_std
            dx = (dy - dbeta / divisor - deviation * (dgamma * inverse_std / divisor)) * (inverse_std * gamma)
            return tf.cast(dx, rows.dtype), *(tf.reduce_sum(d, range(channel_axis)) for d in (dgamma, dbeta))

        return (tf.cast(y, rows.dtype), tf.squeeze(shift + delta, -2), tf.squeeze(m2, -2)), gradient

    y, mean, m2 = normalize(rows, gamma, beta)
    y = y if rectified else activation(y)
    return y, Moments(count, tf.stop_gradient(mean), tf.stop_gradient(m2))


def _sum_of_rows(values: tf.Tensor) -> tf.Tensor:
    """Sum over axis -2, which is kept; for XLA in two steps, the first a sum of few."""
    rows = values.shape[-2] if values.shape[-2] is not None else tf.shape(values)[-2]
    if not in_xla_context() or _is_small(values):
        return tf.reduce_sum(values, -2, keepdims=True)
    part = rows // _PARTS
    sizes = tf.shape(values)
    parts = tf.reshape(values[..., : part * _PARTS, :], tf.concat([sizes[:-2], [_PARTS, part], sizes[-1:]], 0))
    total = tf.reduce_sum(_kept_apart(tf.reduce_sum(parts, -3)), -2, keepdims=True)
    if isinstance(rows, int) and rows % _PARTS == 0:
        return total
    return total + tf.reduce_sum(values[..., part * _PARTS :, :], -2, keepdims=True)


@tf.custom_gradient
def _kept_apart(values: tf.Tensor) -> tuple[tf.Tensor, Callable]:
    """The identity, across which XLA does not merge one sum with the next."""
    return gen_xla_ops.xla_optimization_barrier(input=[values])[0], lambda gradient: gradient


@functools.partial(tf.function, jit_compile=True, reduce_retracing=True)
def _compiled_two_pass(rows, gamma, beta, epsilon, activation):
    return _two_pass(rows, gamma, beta, epsilon, activation)


def _composed(
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
        shift = _central_value(rows)
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


def _central_value(x: tf.Tensor, data_format: str = "NHWC") -> tf.Tensor:
    """Per channel the median of its first, middle and last value: near the mean, and itself a value of the channel.

    Args:
        x: Shape `(M, C)` or `(G, M, C)`, with a value of its own for each of G; or an image of `data_format`.

    Returns:
        Shape of `x` with 1 along what is reduced, in the dtype of the statistics; zero where `x` is empty.
    """
    reduced = [len(x.shape) - 2]
    if len(x.shape) == 4:
        reduced = [0, 1, 2] if data_format == "NHWC" else [0, 2, 3]
    sizes = tf.unstack(tf.shape(x), len(x.shape))

    def pick(position):
        begin = [position(size) if axis in reduced else 0 for axis, size in enumerate(sizes)]
        size = [tf.minimum(size, 1) if axis in reduced else size for axis, size in enumerate(sizes)]
        # The sum of the one value, or of none.
        return tf.reduce_sum(tf.cast(tf.slice(x, begin, size), statistics_dtype(x.dtype)), reduced, keepdims=True)

    first, middle, last = pick(lambda n: 0), pick(lambda n: n // 2), pick(lambda n: tf.maximum(n - 1, 0))
    low, high = tf.minimum(first, middle), tf.maximum(first, middle)
    return tf.stop_gradient(tf.maximum(low, tf.minimum(high, last)))


def _count(x: tf.Tensor, channel_axis: int, dtype: tf.DType) -> tf.Tensor | float:
    """How many values a channel (of a group, in rank 3) has: a Python number where the shape is known."""
    counted = [axis for axis in range(len(x.shape)) if axis != channel_axis and (axis != 0 or len(x.shape) != 3)]
    if all(x.shape[axis] is not None for axis in counted):
        return float(math.prod(x.shape[axis] for axis in counted))
    return tf.cast(tf.reduce_prod(tf.gather(tf.shape(x), counted)), dtype)
