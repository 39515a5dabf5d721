"""Operations of our own that normalize in one step each, where `_native.cc` was compiled."""

from __future__ import annotations

import ctypes
import functools
import os
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.python.eager import forwardprop_util, record
from tensorflow.python.framework import func_graph

from keras_bn.ops.fused import (
    SINGLE_VALUE,
    centred,
    divisor_of,
    in_xla_context,
    normalize_batch_plainly,
    on_cpu,
    small_gradient,
)
from keras_bn.ops.inference import normalize_plainly
from keras_bn.ops.layouts import as_rows
from keras_bn.ops.stand_ins import PREFIX, kernel_definition, stand_in
from keras_bn.statistics import Moving

# Gradients can be registered once only, and several threads may call a layer for the first time.
_LOADING = threading.RLock()

_AXES_AND_EPSILON = ("first_axis", "last_axis", "epsilon")

_NORMALIZE_BATCH, _NORMALIZE_BATCH_GRAD = "KerasBn>NormalizeBatch", "KerasBn>NormalizeBatchGrad"
_NORMALIZE = "KerasBn>Normalize"


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
    eager = tf.compat.v1.executing_eagerly_outside_functions()
    return local and eager and not in_xla_context() and _calls_are_taken()


def fits(x: tf.Tensor, axes: Sequence[int]) -> bool:
    """Whether they take such an input: float32 or shorter, on a CPU, with channel axes that stand together."""
    return x.dtype != tf.float64 and axes[-1] - axes[0] + 1 == len(axes) and on_cpu()


def normalize_batch(
    x: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor, axes: Sequence[int], epsilon: float, moving: Moving | None = None
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor | float]:
    """y = gamma * (x - mean) / sqrt(m2 / count + epsilon) + beta; `moving` is moved by the way.

    Returns:
        y; the mean and m2 of the batch, shape `(2, C)`, not differentiable; and its count.
    """
    known = x.shape.is_fully_defined()
    options: dict[str, Any] = {"warning": "" if known else SINGLE_VALUE, **_options(axes, epsilon)}
    if moving is None:
        options |= {"rate": 0.0, "unbiased": False}
        y, moments, *_ = _run(_NORMALIZE_BATCH, (x, gamma, beta, gamma, beta), options)
    else:
        inputs = x, gamma, beta, moving.mean, moving.variance
        options |= {"rate": moving.rate, "unbiased": moving.unbiased}
        y, moments, *_ = _run(_NORMALIZE_BATCH, inputs, options, moving.assign)
    channels = max(gamma.shape[0], 1)
    count = x.shape.num_elements() // channels if known else tf.size(x, tf.int64) // channels
    if tf.executing_eagerly():
        return y, moments, float(count)
    return y, tf.stop_gradient(moments), float(count) if known else tf.cast(count, tf.float32)


def infers(*inputs: tf.Tensor, axes: Sequence[int]) -> bool:
    """Whether to normalize such an input, the first, with statistics that are given, here, where it was compiled.

    A graph that is exported had better hold plain operations: elsewhere a call costs more than they do, and not every
    converter knows it. Such graphs leave the batch open, while those of a loop over data take that from an iterator.
    """
    x = inputs[0]
    if not (fits(x, axes) and is_wanted(*inputs)):
        return False
    if tf.executing_eagerly():
        return not record.could_possibly_record()
    return x.shape.is_fully_defined() or _iterates(tf.compat.v1.get_default_graph())


def normalize(
    x: tf.Tensor,
    mean: tf.Tensor,
    variance: tf.Tensor,
    gamma: tf.Tensor,
    beta: tf.Tensor,
    axes: Sequence[int],
    epsilon: float,
) -> tf.Tensor:
    """y = gamma * (x - mean) / sqrt(variance + epsilon) + beta; in a graph it is differentiable."""
    (y,) = _run(_NORMALIZE, (x, mean, variance, gamma, beta), _options(axes, epsilon))
    return y


def _iterates(graph: tf.Graph) -> bool:
    """Whether it is part of a function that takes an iterator over data."""
    while isinstance(graph, func_graph.FuncGraph):
        inputs = tf.nest.flatten(graph.structured_input_signature)
        if any(isinstance(value, tf.data.IteratorSpec) for value in inputs):
            return True
        graph = graph.outer_graph
    return False


def _options(axes: Sequence[int], epsilon: float) -> dict[str, int | float]:
    return dict(zip(_AXES_AND_EPSILON, (axes[0], axes[-1], epsilon), strict=True))


def _run(
    name: str,
    inputs: Sequence[tf.Tensor],
    options: dict[str, Any],
    assign: Callable[[tf.Tensor, tf.Tensor], None] | None = None,
) -> Sequence[tf.Tensor]:
    """One of our operations; in a graph what stands in for it, likewise differentiable.

    Args:
        assign: Called with the last two outputs.
    """
    function, plain, gradient = _OPERATIONS[name]
    if tf.executing_eagerly():
        outputs = tf.nest.flatten(getattr(_operations(), function)(*inputs, **options))
    else:
        outputs = stand_in(plain, name, inputs, **options)(*inputs)
        # Where TensorFlow keeps the gradients of its own calls: it asks for that of the moments in second derivatives.
        outputs[0].op._gradient_function = gradient
    moved = outputs[-2:] if assign else []
    if assign:
        assign(*moved)
    if tf.executing_eagerly():
        return outputs
    differentiable = outputs if name == _NORMALIZE_BATCH_GRAD else outputs[:1]

    @tf.custom_gradient
    def attach(*_):
        return differentiable, functools.partial(gradient, outputs[0].op)

    # TensorFlow hands a long operation to another thread where short ones are ready with it, and that finds nothing in
    # its cache: the next layer had better be ready alone, when these two are done.
    assignments = [user for value in moved for user in value.consumers() if user.type == "AssignVariableOp"]
    with tf.control_dependencies(assignments):
        return [*attach(*inputs), *outputs[len(differentiable) :]]


def _normalize_batch_grad(dy, x, gamma, moments, first_axis, last_axis, epsilon):
    mean, m2 = tf.unstack(moments)
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
    libraries = sorted(Path(__file__).parent.glob("_operations*.so"))
    if not libraries:
        return None
    try:
        operations = tf.load_op_library(str(libraries[-1]))
        library = ctypes.CDLL(str(libraries[-1]))
        library.keras_bn_take_calls(kernel_definition())
        library.keras_bn_limit_threads(_threads())
    except (tf.errors.OpError, OSError) as error:
        warnings.warn(f"keras_bn goes without its compiled operations, which do not load: {error}", stacklevel=2)
        return None
    for name, (_, _, gradient) in _OPERATIONS.items():
        tf.RegisterGradient(name)(gradient)
    return operations


@functools.cache
def _calls_are_taken() -> bool:
    """Whether this TensorFlow leaves calls as they are, so that ours are run: constants go in, results are not used."""

    def call():
        one = tf.ones([1])
        x = tf.constant([[0.0], [2.0]])
        options: dict[str, Any] = {"epsilon": 0.0, "rate": 0.0, "unbiased": False, "warning": ""}
        call = stand_in(_not_taken, _NORMALIZE_BATCH, [x, one, one, one, one], first_axis=1, last_axis=1, **options)
        return call(x, one, 0 * one, one, one)[0]

    with tf.init_scope():
        try:
            taken = np.array_equal(tf.function(call, autograph=False)(), [[-1], [1]])
        except tf.errors.OpError:
            taken = False
    if not taken:
        warnings.warn(
            f"keras_bn goes without its compiled operations in graphs: their calls are changed by TensorFlow "
            f"{tf.__version__}.",
            stacklevel=2,
        )
    return taken


def _not_taken(x, gamma, beta, moving_mean, moving_variance, **_):
    return [value * np.nan for value in (x, tf.stack([gamma, gamma]), moving_mean, moving_variance)]


def _threads() -> int:
    """As many as TensorFlow has for one operation: those asked for, or one for each processor."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return tf.config.threading.get_intra_op_parallelism_threads() or processors


def _normalize_batch_gradient(operation, dy, *_):
    """The moments are not differentiable."""
    x, gamma, *_ = operation.inputs
    # Of an eager call it may be asked in a graph, for a Jacobian.
    inputs = tf.convert_to_tensor(dy), x, gamma, operation.outputs[1]
    return *_run(_NORMALIZE_BATCH_GRAD, inputs, _options_of(operation)), None, None


def _normalize_batch_second_gradient(operation, *d_outputs):
    dy, x, gamma = operation.inputs[:3]
    return *_second_gradients(dy, x, gamma, d_outputs, **_options_of(operation)), None


def _normalize_gradient(operation, dy):
    inputs = list(operation.inputs)
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        y = normalize_plainly(*inputs, **_options_of(operation))
    return tape.gradient(y, inputs, output_gradients=dy)


def _options_of(operation):
    prefix = "" if operation.type in _OPERATIONS else PREFIX
    return {name: operation.get_attr(prefix + name) for name in _AXES_AND_EPSILON}


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


# Of each: what runs it eagerly, what does the same with TensorFlow's own operations, and its gradient.
_OPERATIONS: dict[str, tuple[str, Callable[..., Sequence[tf.Tensor]], Callable[..., Sequence[tf.Tensor]]]] = {
    _NORMALIZE_BATCH: ("keras_bn_normalize_batch", normalize_batch_plainly, _normalize_batch_gradient),
    _NORMALIZE_BATCH_GRAD: (
        "keras_bn_normalize_batch_grad",
        _normalize_batch_grad,
        _normalize_batch_second_gradient,
    ),
    _NORMALIZE: ("keras_bn_normalize", normalize_plainly, _normalize_gradient),
}
