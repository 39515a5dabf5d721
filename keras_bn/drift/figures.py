"""The distance of normal distributions, of a batch and of each of its examples: equations, of numbers and tensors."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf


class Distance(NamedTuple):
    """How far one normal distribution is from a reference, per channel.

    Attributes:
        mean_shift: (mean - reference mean) / reference standard deviation.
        variance_ratio: variance / reference variance.
        kl: Kullback-Leibler divergence from the reference, in nats, never negative.
    """

    mean_shift: Any
    variance_ratio: Any
    kl: Any


class RowFigures(NamedTuple):
    """What each example of a batch contributes to the distance of the batch, per channel.

    Attributes:
        count: Values behind the two others, shape `(batch, C)`; 0 where all are masked.
        mean_shift: As in `Distance`, of the values of this example alone.
        variance_ratio: Likewise; of a single value a channel it is epsilon / (reference variance + epsilon).
    """

    count: Any
    mean_shift: Any
    variance_ratio: Any


def distance(mean: Any, variance: Any, reference_mean: Any, reference_variance: Any, epsilon: float) -> Distance:
    """Distance of N(mean, variance) from N(reference_mean, reference_variance), channel by channel.

    v = variance + epsilon, r = reference_variance + epsilon
    mean_shift = (mean - reference_mean) / sqrt(r)
    variance_ratio = v / r
    kl = (v / r + mean_shift**2 - 1 - log(v / r)) / 2

    Epsilon is that of the layer: with it a channel that is constant in both has distance 0, as it has for the layer.

    Args:
        mean: shape `(C,)`; computed in float64, as all.
        variance: likewise.
        reference_mean: likewise.
        reference_variance: likewise.
        epsilon: the layer's, of the unit of a variance.

    Returns:
        A `Distance` of float64 tensors of shape `(C,)`.
    """
    m, v, m0, v0 = map(in_float64, (mean, variance, reference_mean, reference_variance))
    return _distance((m - m0) / tf.sqrt(v0 + epsilon), (v + epsilon) / (v0 + epsilon))


def merged(figures: RowFigures, axis: int) -> RowFigures:
    """The figures of all values behind the entries along `axis` together: Chan's formula in units of the reference.

    count = sum(count_i), mean_shift = sum(count_i mean_shift_i) / count
    variance_ratio = sum(count_i (variance_ratio_i + (mean_shift_i - mean_shift)**2)) / count

    Reference: Chan, Golub & LeVeque 1979, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances".
    """
    count = tf.reduce_sum(figures.count, axis, keepdims=True)
    shift = tf.math.divide_no_nan(tf.reduce_sum(figures.count * figures.mean_shift, axis, keepdims=True), count)
    spread = figures.variance_ratio + tf.square(figures.mean_shift - shift)
    ratio = tf.math.divide_no_nan(tf.reduce_sum(figures.count * spread, axis, keepdims=True), count)
    return RowFigures(*(tf.squeeze(value, axis) for value in (count, shift, ratio)))


def stacked(parts: list[RowFigures]) -> RowFigures:
    return RowFigures(*(tf.stack(values) for values in zip(*parts, strict=True)))


def pooled(figures: RowFigures) -> Distance:
    """The distance of a batch from its examples' figures, which are what `batch_norm_drift` serves.

    Args:
        figures: shape `(batch, C)`; computed in float64.

    Returns:
        A `Distance` of float64 tensors of shape `(C,)`; NaN where no value counts.
    """
    count, shift, ratio = merged(RowFigures(*map(in_float64, figures)), axis=0)
    nothing = tf.where(count > 0, tf.zeros_like(count), np.nan)
    return _distance(shift + nothing, ratio + nothing)


def summary(one: Distance) -> Mapping[str, Any]:
    """A layer's distance in three numbers: root mean square shift, the ratio farthest from 1, mean divergence.

    Args:
        one: a `Distance` with tensors of shape `(C,)`.

    Returns:
        Scalars `mean_shift` (standard deviations), `variance_ratio`, `kl` (nats).
    """
    ratio = tf.reshape(one.variance_ratio, [-1])
    return {
        "mean_shift": tf.sqrt(tf.reduce_mean(one.mean_shift**2)),
        "variance_ratio": ratio[tf.argmax(tf.abs(tf.math.log(ratio)))],
        "kl": tf.reduce_mean(one.kl),
    }


def plain(numbers: Mapping[str, Any]) -> dict[str, float]:
    """A `summary` as Python numbers."""
    return {name: float(value) for name, value in numbers.items()}


def _distance(mean_shift: tf.Tensor, variance_ratio: tf.Tensor) -> Distance:
    return Distance(mean_shift, variance_ratio, (variance_ratio + mean_shift**2 - 1 - tf.math.log(variance_ratio)) / 2)


def in_float64(x: Any) -> tf.Tensor:
    """Straight from Python numbers too, which `tf.cast` takes to float32 first."""
    return tf.constant(np.asarray(x, "float64"))
