"""Operations of our own that normalize small tensors in one step each, where `_native.cc` was compiled."""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tensorflow as tf
from tensorflow.python.eager import forwardprop_util, record

from keras_bn import statistics
from keras_bn._batch_kernels import (
    centred,
    divisor_of,
    in_xla_context,
    is_small,
    on_cpu,
    small,
    small_gradient,
    value_count,
)
from keras_bn._stand_ins import stand_in
from keras_bn.layouts import as_rows
from keras_bn.statistics import Moments

# Gradients can be registered once only, and several threads may call a layer for the first time.
_LOADING = threading.RLock()

_AXES_AND_EPSILON = ("first_axis", "last_axis", "epsilon")


def is_wanted(*inputs: tf.Tensor) -> bool:
    """Whether to take them here, where they were compiled.

    In a graph not where XLA compiles it, nor where it may run elsewhere, nor where a forward accumulator follows the
    inputs: it would find zeros behind two nested gradients of our own.
    """
    if _operations() is None:
        return False
    if tf.executing_eagerly():
        return True
    if forwardprop_util.pack_tangents(list(inputs)).tangents:
        return False
    devices = tf.config.list_logical_devices("CPU")
    local = all("/job:" not in device.name or "/job:localhost/" in device.name for device in devices)
    return local and tf.compat.v1.executing_eagerly_outside_functions() and not in_xla_context()


def fits(x: tf.Tensor, axes: Sequence[int]) -> bool:
    """Whether they take such an input: small, float32 or shorter, on a CPU, with channel axes that stand together."""
    return x.dtype != tf.float64 and axes[-1] - axes[0] + 1 == len(axes) and is_small(x) and on_cpu()


def normalize_batch(
    x: tf.Tensor,
    gamma: tf.Tensor,
    beta: tf.Tensor,
    moving: tuple[tf.Tensor, tf.Tensor] | None,
    axes: Sequence[int],
    epsilon: float,
    rate: float,
    unbiased: bool,
    warning: str,
) -> tuple[tf.Tensor, Moments, Sequence[tf.Tensor]]:
    """y = gamma * (x - mean) / sqrt(m2 / count + epsilon) + beta, the moments, and `moving` one step on.

    Args:
        moving: Mean and variance, float32: see `statistics.moved` and `statistics.batch_statistics`.
        warning: Said on stderr where there is one value for each channel and that was not known before.
    """
    known = x.shape.is_fully_defined()
    moving = moving or (gamma, beta)
    options = {"rate": rate, "unbiased": unbiased, "warning": "" if known else warning, **_options(axes, epsilon)}
    if tf.executing_eagerly():
        y, mean, m2, count, *moved = _compiled("normalize_batch")(x, gamma, beta, *moving, **options)
    else:
        y, (mean, m2, count, *moved) = _normalize_in_graph(x, gamma, beta, moving, options)
    return y, Moments(float(x.shape.num_elements() // max(gamma.shape[0], 1)) if known else count, mean, m2), moved


def normalize(
    x: tf.Tensor,
    mean: tf.Tensor,
    variance: tf.Tensor,
    gamma: tf.Tensor,
    beta: tf.Tensor,
    axes: Sequence[int],
    epsilon: float,
) -> tf.Tensor:
    """y = gamma * (x - mean) / sqrt(variance + epsilon) + beta, without a gradient. Not for a graph."""
    return _operations().keras_bn_normalize(x, mean, variance, gamma, beta, **_options(axes, epsilon))


def may_be_differentiated() -> bool:
    """Whether a gradient tape may be watching."""
    return record.could_possibly_record()


def _options(axes: Sequence[int], epsilon: float) -> dict[str, int | float]:
    return dict(zip(_AXES_AND_EPSILON, (axes[0], axes[-1], epsilon), strict=True))


def _normalize_in_graph(x, gamma, beta, moving, options):
    """What stands in for the operation: y, differentiable twice, and the others, which are not."""
    others: list[tf.Tensor] = []

    @tf.custom_gradient
    def normalize(x, gamma, beta):
        inputs = (x, gamma, beta, *moving)
        call = stand_in(_normalize_batch, _compiled("normalize_batch"), inputs, **options)
        y, mean, m2, *rest = call(*inputs)
        others.extend((mean, m2, *rest))
        return y, lambda dy: _gradients_in_graph(dy, x, gamma, mean, m2, options)

    y = normalize(x, gamma, beta)
    return y, [tf.stop_gradient(other) for other in others]


def _gradients_in_graph(dy, x, gamma, mean, m2, options):
    options = {name: options[name] for name in _AXES_AND_EPSILON}

    @tf.custom_gradient
    def gradients(dy, x, gamma):
        inputs = (dy, x, gamma, mean, m2)
        call = stand_in(_normalize_batch_grad, _compiled("normalize_batch_grad"), inputs, **options)
        return call(*inputs), lambda *d_outputs: _second_gradients(dy, x, gamma, d_outputs, **options)

    return gradients(dy, x, gamma)


def _compiled(name: str) -> Callable[..., Sequence[tf.Tensor]]:
    return getattr(_operations(), f"keras_bn_{name}")


def _normalize_batch(
    x, gamma, beta, moving_mean, moving_variance, first_axis, last_axis, epsilon, rate, unbiased, warning
):
    del warning  # It needs a branch in the graph, which costs more than it is worth.
    rows, restore = as_rows(x, range(first_axis, last_axis + 1))
    y, mean, m2 = small(tf.cast(rows, gamma.dtype), gamma, beta, epsilon)
    count = tf.convert_to_tensor(value_count(rows, [0], gamma.dtype))
    moved = statistics.moved_by(moving_mean, moving_variance, Moments(count, mean, m2), rate, unbiased)
    return restore(tf.cast(y, x.dtype)), mean, m2, count, *moved


def _normalize_batch_grad(dy, x, gamma, mean, m2, first_axis, last_axis, epsilon):
    axes = range(first_axis, last_axis + 1)
    (dy, _), (rows, restore) = (as_rows(value, axes) for value in (dy, x))
    rows = tf.cast(rows, gamma.dtype)
    deviation, _, _ = centred(rows, mean)
    inverse_std = tf.math.rsqrt(m2 / divisor_of(rows) + epsilon)
    dx, dgamma, dbeta = small_gradient(tf.cast(dy, gamma.dtype), deviation, gamma, inverse_std)
    return restore(tf.cast(dx, x.dtype)), dgamma, dbeta


def _operations() -> Any:
    with _LOADING:
        return _loaded()


@functools.cache
def _loaded() -> Any:
    libraries = sorted(Path(__file__).parent.glob("_native_operations*.so"))
    if not libraries:
        return None
    try:
        operations = tf.load_op_library(str(libraries[-1]))
    except (tf.errors.OpError, OSError) as error:
        warnings.warn(f"keras_bn goes without its compiled operations, which do not load: {error}", stacklevel=2)
        return None
    tf.RegisterGradient("KerasBn>NormalizeBatch")(_gradient)
    tf.RegisterGradient("KerasBn>NormalizeBatchGrad")(_second_gradient)
    return operations


def _gradient(operation, dy, *_):
    """The moments are not differentiable."""
    x, gamma, *_ = operation.inputs
    _, mean, m2, *_ = operation.outputs
    options = {name: operation.get_attr(name) for name in _AXES_AND_EPSILON}
    if tf.executing_eagerly():
        gradients = _compiled("normalize_batch_grad")(dy, x, gamma, mean, m2, **options)
    else:
        # A Jacobian of an eager call is computed in a graph.
        gradients = _gradients_in_graph(dy, x, gamma, mean, m2, options)
    return *gradients, None, None


def _second_gradient(operation, *d_outputs):
    options = {name: operation.get_attr(name) for name in _AXES_AND_EPSILON}
    dy, x, gamma = operation.inputs[:3]
    return *_second_gradients(dy, x, gamma, d_outputs, **options), None, None


def _second_gradients(dy, x, gamma, d_outputs, first_axis, last_axis, epsilon):
    """What `small_gradient` hands back to dy, x and gamma for a gradient of each of its results."""
    axes = range(first_axis, last_axis + 1)
    (dy, restore), (rows, _), (ddx, _) = (as_rows(tf.cast(value, gamma.dtype), axes) for value in (dy, x, d_outputs[0]))
    ddgamma, ddbeta = d_outputs[1:]
    deviation, _, _ = centred(rows)
    count = divisor_of(rows)
    inverse_std = tf.math.rsqrt(tf.reduce_sum(tf.square(deviation), 0) / count + epsilon)
    inverse_variance = tf.square(inverse_std)
    factor = inverse_std * gamma
    projected, d_projected = (tf.reduce_sum(value * deviation, 0) for value in (dy, ddx))
    mean_ddx = tf.reduce_sum(ddx, 0) / count
    inner = tf.reduce_sum(ddx * dy, 0) - mean_ddx * tf.reduce_sum(dy, 0)
    both = projected * d_projected * inverse_variance / count
    d_dy = (ddx - mean_ddx - deviation * (d_projected * inverse_variance / count)) * factor
    d_dy += deviation * (ddgamma * inverse_std) + ddbeta
    d_inverse_std = gamma * (inner - 3.0 * both) + ddgamma * projected
    d_deviation = dy * (ddgamma * inverse_std) - inverse_variance / count * (
        factor * (ddx * projected + dy * d_projected) + inverse_std * deviation * d_inverse_std
    )
    d_x = d_deviation - tf.reduce_sum(d_deviation, 0) / count
    return tf.cast(restore(d_dy), x.dtype), tf.cast(restore(d_x), x.dtype), inverse_std * (inner - both)
