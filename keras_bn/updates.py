"""What a batch does to the moving statistics of a layer: averages, batch renormalization, schedules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import keras
import tensorflow as tf

from keras_bn import arguments
from keras_bn.statistics import BatchStatistics, Moments, Moving, batch_statistics


def moved(moving: tf.Tensor, batch: tf.Tensor, rate: tf.Tensor | float) -> tf.Tensor:
    """One step of a moving average.

    moved = moving + rate * (batch - moving)

    exactly `moving` for a rate of 0, also when `batch` is NaN or infinite, and exactly `batch` for a rate of 1.

    Args:
        moving: Shape `(C,)`.
        batch: Shape `(C,)`.
        rate: 1 - momentum, shape `(C,)` or a number.
    """
    way = batch - moving
    from_batch = batch - tf.math.multiply_no_nan(way, 1.0 - rate)
    return tf.where(rate < 0.5, moving + tf.math.multiply_no_nan(way, rate), from_batch)


def plain_average(layer, dtype: tf.DType) -> Moving | None:
    """The moving statistics of a layer that averages with one momentum and nothing else; None for others."""
    if not isinstance(layer.momentum, float) or layer.zero_debias or layer.renorm:
        return None
    mean, variance = value_of(layer.moving_mean, dtype), value_of(layer.moving_variance, dtype)
    return Moving(mean, variance, 1.0 - layer.momentum, layer.unbiased_variance)


def assign_moving(layer, moving_statistics: tuple[tf.Tensor, tf.Tensor]) -> None:
    """Keeps the moving mean and variance."""
    _assign(layer.moving_mean, moving_statistics[0])
    _assign(layer.moving_variance, moving_statistics[1])


def move(layer, moments: Moments) -> None:
    """Moves the statistics of a layer one step towards those of a batch."""
    batch = batch_statistics(moments, layer.unbiased_variance)
    if layer.renorm:
        _move_with_renorm(layer, batch)
        return
    rate = _next_rate(layer, batch)
    _move(layer.moving_mean, batch.mean, rate)
    _move(layer.moving_variance, batch.variance, rate)


def renorm_of(layer, moments: Moments) -> tuple[tf.Tensor, tf.Tensor]:
    """r and d of `renorm_correction`, with the statistics and the limits of a layer."""
    batch = batch_statistics(moments, unbiased=False)
    dtype = batch.mean.dtype
    limits = {
        name: limit(_updates(layer, dtype)) if arguments.is_schedule(limit) else limit
        for name, limit in clipping_limits(layer.renorm_clipping).items()
    }
    mean, stddev = value_of(layer.renorm_mean, dtype), value_of(layer.renorm_stddev, dtype)
    return renorm_correction(batch, mean, stddev, limits, layer.epsilon)


def renorm_correction(
    batch: BatchStatistics,
    renorm_mean: tf.Tensor,
    renorm_stddev: tf.Tensor,
    limits: Mapping[str, Any],
    epsilon: float,
) -> tuple[tf.Tensor, tf.Tensor]:
    """The correction of batch renormalization, which makes training see what inference will.

    r = clip(stddev / renorm_stddev, rmin, rmax)
    d = clip((mean - renorm_mean) / renorm_stddev, -dmax, dmax)

    with stddev = sqrt(variance + epsilon), and renorm_stddev not below sqrt(epsilon). Not differentiated.

    Args:
        batch: With the biased variance.
        renorm_mean: Shape `(C,)`.
        renorm_stddev: Shape `(C,)`.
        limits: `rmax`, `rmin`, `dmax`, each a number or a scalar tensor; those missing do not limit.
        epsilon: Added to the variance.

    Returns:
        r and d, each of shape `(C,)`.

    Reference: Ioffe 2017 (arXiv 1702.03275), Algorithm 1.
    """
    scale = tf.maximum(renorm_stddev, tf.cast(epsilon, renorm_stddev.dtype) ** 0.5)
    r = tf.sqrt(batch.variance + epsilon) / scale
    d = (batch.mean - renorm_mean) / scale
    if "rmin" in limits:
        r = tf.maximum(r, tf.cast(limits["rmin"], r.dtype))
    if "rmax" in limits:
        r = tf.minimum(r, tf.cast(limits["rmax"], r.dtype))
    if "dmax" in limits:
        dmax = tf.cast(limits["dmax"], d.dtype)
        d = tf.clip_by_value(d, -dmax, dmax)
    return tf.stop_gradient(r), tf.stop_gradient(d)


def counts_updates(layer) -> bool:
    """Whether a layer has to remember how many updates there were."""
    limits = clipping_limits(layer.renorm_clipping).values() if layer.renorm else ()
    return layer.momentum is None or any(arguments.is_schedule(value) for value in (layer.momentum, *limits))


def clipping_limits(clipping: Any) -> Mapping[str, Any]:
    """The limits of `renorm_correction`: those of the paper for "warmup"."""
    return renorm_warmup() if clipping == "warmup" else clipping


def value_of(variable: keras.Variable, dtype: tf.DType) -> tf.Tensor:
    """A variable of a layer, one value for each channel."""
    # Converted first: a cast of Keras's variable would do so by way of a search for what converts it.
    value = tf.cast(tf.convert_to_tensor(variable.value), dtype)
    return value if len(value.shape) == 1 else tf.reshape(value, [-1])


def when(condition: tf.Tensor | bool | None, action: Callable[[], Any]) -> None:
    """Acts where the condition holds; a branch in the graph where it is not known yet."""
    if not isinstance(condition, bool) and tf.is_symbolic_tensor(condition):
        tf.cond(tf.cast(condition, tf.bool), lambda: (action(), tf.no_op())[1], tf.no_op)
    elif condition:
        action()


def _move_with_renorm(layer, batch):
    stddev = tf.sqrt(batch.variance + layer.epsilon)
    rate = tf.where(batch.worth, tf.cast(1.0 - layer.renorm_momentum, stddev.dtype), 0)
    _move(layer.renorm_mean, batch.mean, rate)
    _move(layer.renorm_stddev, stddev, rate)
    rate = _next_rate(layer, batch)
    _move(layer.moving_mean, batch.mean, rate)
    moving_stddev = _move(layer.moving_stddev, stddev, rate)
    moving_variance = tf.nn.relu(tf.square(moving_stddev) - layer.epsilon)
    _move(layer.moving_variance, moving_variance, tf.cast(rate > 0, rate.dtype))


def _next_rate(layer, batch):
    """How much this batch weighs in the moving averages, per channel; counts it where that is asked for."""
    dtype = batch.mean.dtype
    if layer.momentum is None:
        rate = 1.0 / (value_of(layer.update_count, dtype) + 1.0)
    elif arguments.is_schedule(layer.momentum):
        rate = 1.0 - tf.cast(layer.momentum(_updates(layer, dtype)), dtype)
    else:
        rate = tf.cast(1.0 - layer.momentum, dtype)
    rate = tf.where(batch.worth, rate, 0)
    if layer.update_count is not None:
        _assign(layer.update_count, value_of(layer.update_count, dtype) + tf.cast(batch.worth, dtype))
    if layer.zero_debias:
        initial_weight = value_of(layer.initial_weight, dtype)
        _assign(layer.initial_weight, initial_weight * (1.0 - rate))
        # Divided by the weight of what was seen, so written that the first batch gets exactly 1.
        rate = tf.math.divide_no_nan(rate, (1.0 - initial_weight) + initial_weight * rate)
    return rate


def _updates(layer, dtype):
    return tf.reduce_max(value_of(layer.update_count, dtype))


def _move(variable, batch, rate):
    value = moved(value_of(variable, batch.dtype), batch, rate)
    _assign(variable, value)
    return value


def _assign(variable, value):
    variable.assign(value if len(variable.shape) == 1 else tf.reshape(value, variable.shape))


@keras.saving.register_keras_serializable(package="keras_bn")
class LinearRamp(keras.optimizers.schedules.LearningRateSchedule):
    """Goes from one value to another in a straight line, and stays before and after.

    value(step) = start + (end - start) * clip((step - begin) / (finish - begin), 0, 1)

    Args:
        start: The value up to step `begin`.
        end: The value from step `finish` on.
        begin: Step, an update of the moving statistics.
        finish: Step, after `begin`.
    """

    def __init__(self, start: float, end: float, begin: int, finish: int):
        super().__init__()
        self.start, self.end, self.begin, self.finish = start, end, begin, finish

    def __call__(self, step):
        done = tf.clip_by_value((tf.cast(step, tf.float32) - self.begin) / (self.finish - self.begin), 0.0, 1.0)
        return self.start + (self.end - self.start) * done

    def get_config(self):
        return {"start": self.start, "end": self.end, "begin": self.begin, "finish": self.finish}


def renorm_warmup() -> dict[str, Any]:
    """The clipping limits of the paper: plain batch norm for 5,000 steps, then ever looser up to rmax 3 and dmax 5.

    Reference: Ioffe 2017 (arXiv 1702.03275), section 4.
    """
    return {
        "rmax": LinearRamp(1.0, 3.0, 5_000, 40_000),
        "rmin": _Reciprocal(LinearRamp(1.0, 3.0, 5_000, 40_000)),
        "dmax": LinearRamp(0.0, 5.0, 5_000, 25_000),
    }


@keras.saving.register_keras_serializable(package="keras_bn")
class _Reciprocal(keras.optimizers.schedules.LearningRateSchedule):
    """1 / schedule: the paper clips r to [1 / rmax, rmax]."""

    def __init__(self, schedule):
        super().__init__()
        self.schedule = schedule

    def __call__(self, step):
        return 1.0 / self.schedule(step)

    def get_config(self):
        return {"schedule": keras.saving.serialize_keras_object(self.schedule)}

    @classmethod
    def from_config(cls, config):
        return cls(keras.saving.deserialize_keras_object(config["schedule"]))
