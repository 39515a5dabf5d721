"""Our compiled operations, `csrc/ops.cc`: loading them, calling them, and their gradients."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from keras_bn.ops import plain, where
from keras_bn.ops.layouts import along, are_neighbours, as_rows, value_count
from keras_bn.statistics import Moments, Moving
from keras_bn.warning import warn

SINGLE_VALUE = (
    "keras_bn: a batch with one value per channel has no variance: it was normalized to beta (with `renorm`, by its "
    "mean alone), and its statistics were not averaged. Larger batches, or `drop_remainder=True` where the last one is "
    "of a single example, avoid it."
)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """Whether the compiled operations are in use; true where they are.

    Attributes:
        available: Whether.
        reason: Why not, or the empty string.
    """

    available: bool
    reason: str = ""

    def __bool__(self) -> bool:
        return self.available

    def __str__(self) -> str:
        return "compiled operations in use" if self.available else f"no compiled operations: {self.reason}"


@functools.cache
def compiled() -> Compiled:
    """Whether this installation has its compiled operations, and why not: without them everything works, only slower.

    When it is asked first, which a layer does when it is first called, they normalize one small batch and infer one;
    where the result is not that of TensorFlow's own operations, they are not used, and a warning says so.

    Returns:
        What is true or false, and prints as a sentence.
    """
    if _library is None:
        return Compiled(False, _reason)
    ctypes.CDLL(str(_path)).keras_bn_limit_threads(_threads())
    with tf.init_scope(), tf.device("CPU:0"):
        try:
            same = _equals_plain()
        except (tf.errors.OpError, AttributeError) as error:
            reason = f"with TensorFlow {tf.__version__} they do not run: {error}"
        else:
            reason = "" if same else f"with TensorFlow {tf.__version__} their results are wrong"
    if reason:
        warn(f"keras_bn goes without its compiled operations: {reason}")
    return Compiled(not reason, reason)


def takes(x: tf.Tensor) -> bool:
    """Whether they normalize such an input where the code runs."""
    return x.dtype != tf.float64 and where.on_cpu() and where.in_this_process() and compiled().available


def normalize_batch(
    x: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor, axes: Sequence[int], epsilon: float, moving: Moving | None = None
) -> tuple[tf.Tensor, Moments, tuple[tf.Tensor, tf.Tensor] | None]:
    """y = gamma * (x - mean) / sqrt(m2 / count + epsilon) + beta: see `keras_bn.ops.normalize_batch`."""
    if not are_neighbours(axes):
        rows, restore = as_rows(x, axes)
        y, *rest = normalize_batch(rows, gamma, beta, [1], epsilon, moving)
        return restore(y), *rest
    known = x.shape.is_fully_defined()
    y, mean, m2, _, *moved = _library.keras_bn_normalize_batch(
        x,
        gamma,
        beta,
        gamma if moving is None else moving.mean,
        beta if moving is None else moving.variance,
        first_axis=axes[0],
        last_axis=axes[-1],
        epsilon=epsilon,
        rate=0.0 if moving is None else moving.rate,
        unbiased=moving is not None and moving.unbiased,
        warning="" if known else SINGLE_VALUE,
    )
    count = value_count(x, [axis for axis in range(len(x.shape)) if axis not in axes], gamma.dtype)
    return y, Moments(count, mean, m2), None if moving is None else tuple(moved)


def normalize(
    x: tf.Tensor,
    mean: tf.Tensor,
    variance: tf.Tensor,
    gamma: tf.Tensor | None,
    beta: tf.Tensor | None,
    axes: Sequence[int],
    epsilon: float,
) -> tf.Tensor:
    """y = gamma * (x - mean) / sqrt(variance + epsilon) + beta: see `keras_bn.ops.normalize`."""
    gamma = tf.ones_like(mean) if gamma is None else gamma
    beta = tf.zeros_like(mean) if beta is None else beta
    if not are_neighbours(axes):
        rows, restore = as_rows(x, axes)
        return restore(normalize(rows, mean, variance, gamma, beta, [1], epsilon))
    return _library.keras_bn_normalize(
        x, mean, variance, gamma, beta, first_axis=axes[0], last_axis=axes[-1], epsilon=epsilon
    )


@tf.RegisterGradient("KerasBn>NormalizeBatch")
def _normalize_batch_gradient(operation, dy, *_):
    """The moments and the moving statistics are not differentiable."""
    x, gamma, *_ = operation.inputs
    moments = operation.outputs[1:4]
    # Of an eager call it may be asked in a graph, for a Jacobian.
    dy = tf.convert_to_tensor(dy)
    return *_library.keras_bn_normalize_batch_grad(dy, x, gamma, *moments, **_options(operation)), None, None


@tf.RegisterGradient("KerasBn>NormalizeBatchGrad")
def _normalize_batch_second_gradient(operation, ddx, ddgamma, ddbeta):
    """What `_normalize_batch_gradient` hands back to dy, x (by way of the moments, too) and gamma."""
    dy, x, gamma = operation.inputs[:3]
    options = _options(operation)
    axes, epsilon = range(options["first_axis"], options["last_axis"] + 1), options["epsilon"]
    (dy, restore), (rows, _), (ddx, _) = (as_rows(tf.cast(value, gamma.dtype), axes) for value in (dy, x, ddx))
    count = tf.cast(tf.maximum(tf.shape(rows)[0], 1), gamma.dtype)
    deviation = rows - plain.central_value(rows, [0])
    deviation -= tf.reduce_sum(deviation, 0) / count
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
    return (
        tf.cast(restore(d_dy), x.dtype),
        tf.cast(restore(d_x), x.dtype),
        inverse_std * (inner - both),
        None,
        None,
        None,
    )


@tf.RegisterGradient("KerasBn>Normalize")
def _normalize_gradient(operation, dy):
    x, mean, variance, gamma, beta = operation.inputs
    options = _options(operation)
    dy, zeros = tf.convert_to_tensor(dy), tf.zeros_like(beta)
    dx = _library.keras_bn_normalize(dy, zeros, variance, gamma, zeros, **options)
    axes = range(options["first_axis"], options["last_axis"] + 1)
    others = [axis for axis in range(len(x.shape)) if axis not in axes]
    dy = tf.cast(dy, mean.dtype)
    inverse_std = tf.math.rsqrt(variance + options["epsilon"])
    dbeta = tf.reshape(tf.reduce_sum(dy, others), [-1])
    products = tf.reduce_sum(dy * (tf.cast(x, mean.dtype) - along(axes, mean, x)), others)
    dgamma = tf.reshape(products, [-1]) * inverse_std
    return dx, -gamma * inverse_std * dbeta, -0.5 * gamma * dgamma * tf.square(inverse_std), dgamma, dbeta


def _options(operation) -> dict[str, Any]:
    return {name: operation.get_attr(name) for name in ("first_axis", "last_axis", "epsilon")}


def _load() -> tuple[Any, str]:
    """The generated wrappers of the operations, or None and why there are none."""
    if not _path.exists():
        return None, (
            f"they are not in {_path.parent}: no C++ compiler was there when keras_bn was installed, or this is a "
            "source folder that stands in front of the installed package, for which `pip install -e .` builds them"
        )
    # TensorFlow 2.19 keeps the symbols of its C interface to itself.
    framework = Path(tf.sysconfig.get_lib(), "libtensorflow_framework.so.2")
    try:
        if framework.exists():
            ctypes.CDLL(str(framework), mode=ctypes.RTLD_GLOBAL)
        return tf.load_op_library(str(_path)), ""
    except (tf.errors.OpError, OSError) as error:
        warn(f"keras_bn goes without its compiled operations, which do not load: {error}")
        return None, f"they do not load: {error}"


def _equals_plain() -> bool:
    """Whether one batch is normalized, differentiated and inferred as TensorFlow's own operations do it."""
    rng = np.random.default_rng(0)
    x, dy = (tf.constant(rng.normal(3, 2, (16, 3)), tf.float32) for _ in range(2))
    mean, variance, gamma, beta = (tf.constant(rng.uniform(1, 2, 3), tf.float32) for _ in range(4))

    def results(train, infer):
        y, moments, *_ = train(x, gamma, beta, [1], 1e-3)
        # A tape would record nothing where `compiled` is asked within another one.
        gradients = tf.gradients(y, [x, gamma, beta], dy)
        inferred = infer(x, mean, variance, gamma, beta, [1], 1e-3)
        return tf.concat([tf.reshape(value, [-1]) for value in (y, *moments[1:], *gradients, inferred)], 0)

    def run(*way):
        # A graph also where `tf.config.run_functions_eagerly` is in force.
        return tf.function(lambda: results(*way), autograph=False).get_concrete_function()()

    ours, theirs = run(normalize_batch, normalize), run(plain.normalize_batch, plain.normalize)
    return np.allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def _threads() -> int:
    """As many as TensorFlow has for one operation: those asked for, or one for each processor."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return tf.config.threading.get_intra_op_parallelism_threads() or processors


_path = Path(__file__).with_name("_operations.abi3.so")
# When this module is imported, and not when a layer is first called: a saved training step names the operations.
_library, _reason = _load()
