"""Operations of our own that normalize small tensors in one step each, where `_native.cc` was compiled."""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tensorflow as tf
from tensorflow.python.eager import record

from keras_bn._batch_kernels import in_xla_context, is_small, on_cpu, small
from keras_bn.layouts import as_rows
from keras_bn.statistics import Moments

# Gradients can be registered once only, and several threads may call a layer for the first time.
_LOADING = threading.RLock()


def is_wanted(kernel: str) -> bool:
    """Whether to take them here, as far as they can.

    Without being asked for only where nothing is traced: a graph that holds them can neither be compiled by XLA later
    nor be served by a process that does not load this package.
    """
    if kernel == "auto":
        return tf.executing_eagerly() and _operations() is not None
    return kernel == "native" and not in_xla_context() and _operations(required=True) is not None


def fits(x: tf.Tensor, axes: Sequence[int]) -> bool:
    """Whether they take such an input: small, float32 or shorter, on a CPU, with channel axes that stand together."""
    return x.dtype != tf.float64 and axes[-1] - axes[0] + 1 == len(axes) and is_small(x) and on_cpu()


def normalize_batch(
    x: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor, axes: Sequence[int], epsilon: float, warning: str
) -> tuple[tf.Tensor, Moments]:
    """y = gamma * (x - mean) / sqrt(m2 / count + epsilon) + beta, and the moments.

    Args:
        warning: Said on stderr where there is one value for each channel and that was not known before.
    """
    known = x.shape.is_fully_defined()
    y, mean, m2, count = _operations().keras_bn_normalize_batch(
        x, gamma, beta, first_axis=axes[0], last_axis=axes[-1], epsilon=epsilon, warning="" if known else warning
    )
    return y, Moments(float(x.shape.num_elements() // max(gamma.shape[0], 1)) if known else count, mean, m2)


def normalize(
    x: tf.Tensor,
    mean: tf.Tensor,
    variance: tf.Tensor,
    gamma: tf.Tensor,
    beta: tf.Tensor,
    axes: Sequence[int],
    epsilon: float,
) -> tf.Tensor:
    """y = gamma * (x - mean) / sqrt(variance + epsilon) + beta, without a gradient."""
    return _operations().keras_bn_normalize(
        x, mean, variance, gamma, beta, first_axis=axes[0], last_axis=axes[-1], epsilon=epsilon
    )


def measured(moments: Moments, kernel: str) -> bool:
    """Whether `moments` are of a kind that `moved` takes."""
    mean = moments.mean
    single = isinstance(moments.count, float) or len(moments.count.shape) == 0
    return mean.dtype == tf.float32 and len(mean.shape) == 1 and single and on_cpu() and is_wanted(kernel)


def moved(
    mean: tf.Tensor, variance: tf.Tensor, moments: Moments, rate: float, unbiased: bool
) -> tuple[tf.Tensor, tf.Tensor]:
    """Both moving statistics, float32, one step on: see `statistics.moved` and `statistics.batch_statistics`."""
    return _operations().keras_bn_move(
        mean, variance, moments.count, moments.mean, moments.m2, rate=rate, unbiased=unbiased
    )


def may_be_differentiated() -> bool:
    """Whether a gradient tape may be watching."""
    return record.could_possibly_record()


def _operations(required: bool = False) -> Any:
    with _LOADING:
        return _loaded(required)


@functools.cache
def _loaded(required: bool) -> Any:
    if required:
        operations = _loaded(False)
        if operations is None:
            warnings.warn(
                "keras_bn was installed without its compiled operations, since there was no C++ compiler: "
                "`kernel='native'` does what `kernel='auto'` does.",
                stacklevel=2,
            )
        return operations
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
    x, gamma, _ = operation.inputs
    _, mean, m2, _ = operation.outputs
    return _operations().keras_bn_normalize_batch_grad(
        dy,
        x,
        gamma,
        mean,
        m2,
        first_axis=operation.get_attr("first_axis"),
        last_axis=operation.get_attr("last_axis"),
        epsilon=operation.get_attr("epsilon"),
    )


def _second_gradient(operation, *d_outputs):
    """That of the same formula in TensorFlow's own operations."""
    watched = list(operation.inputs[:3])
    axes = range(operation.get_attr("first_axis"), operation.get_attr("last_axis") + 1)
    with tf.GradientTape() as outer:
        outer.watch(watched)
        dy, x, gamma = watched
        with tf.GradientTape() as inner:
            inner.watch([x, gamma])
            beta = tf.zeros_like(gamma)
            inner.watch(beta)
            rows, restore = as_rows(tf.cast(x, gamma.dtype), list(axes))
            y = restore(small(rows, gamma, beta, operation.get_attr("epsilon"))[0])
        first = inner.gradient(y, [x, gamma, beta], output_gradients=tf.cast(dy, gamma.dtype))
    return *outer.gradient(first, watched, output_gradients=list(d_outputs)), None, None
