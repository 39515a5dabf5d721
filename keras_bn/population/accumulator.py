"""Moments of what one layer is given, pooled over the batches and batch by batch."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from keras_bn.statistics import Moments, has_variance, merge

METHODS = ("pooled", "algorithm2")
# A standard error that is estimated from fewer batches is itself not known.
FEWEST_BATCHES = 10


class Population(NamedTuple):
    """What was measured of a layer's input over all batches.

    Attributes:
        count: number of values behind each channel, or their sum of weights.
        mean: shape `(C,)`, float64.
        variance: shape `(C,)`, float64; biased over all values for `"pooled"`, for `"algorithm2"` the mean of the
            batches' unbiased variances.
        standard_error: as `Accumulator.standard_error`.
        batches: how many there were.
        has_variance: whether there was more than one value behind each channel.
    """

    count: Any
    mean: np.ndarray
    variance: np.ndarray
    standard_error: float
    batches: int
    has_variance: bool


def is_settled(standard_error: float, batches: int, tolerance: float) -> bool:
    """Whether statistics of so many batches are known well enough."""
    return batches >= FEWEST_BATCHES and standard_error < tolerance


class Accumulator:
    """Moments of one layer's input over the batches, pooled and batch by batch.

    Args:
        epsilon: the layer's.

    Attributes:
        batches: how many were measured in this process.
    """

    def __init__(self, epsilon: float):
        self._epsilon = epsilon
        self.batches = 0
        self._calls: list[Moments] = []
        self._pooled: Moments | None = None
        self._means: Moments | None = None
        self._variances: Moments | None = None
        self._sum_unbiased: Any = 0.0
        self._sum_log: Any = 0.0

    def add_call(self, moments: Moments) -> None:
        """One call of the layer, of several for the same batch where it is shared."""
        self._calls.append(moments)

    def end_batch(self, counts: bool = True) -> None:
        """What was added since the last batch is a batch, or is dropped."""
        calls, self._calls = self._calls, []
        if not calls or not counts:
            return
        self.batches += 1
        batch = merge(calls)
        count, m2, unit = (np.asarray(part) for part in (batch.count, batch.m2, batch.unit))
        several = np.asarray(has_variance(batch)).astype("float64")  # Of one value there is no unbiased variance.
        biased = m2 / np.where(several > 0, count, 1)

        def extended(moments: Moments | None, value: Any) -> Moments:
            part = Moments(tf.constant(several), tf.constant(value), tf.zeros_like(batch.m2), tf.ones_like(batch.m2))
            return part if moments is None else merge([moments, part])

        self._pooled = batch if self._pooled is None else merge([self._pooled, batch])
        self._means = extended(self._means, np.asarray(batch.mean))
        self._variances = extended(self._variances, biased)
        self._sum_unbiased = self._sum_unbiased + several * m2 / np.where(several > 0, count - unit, 1)
        self._sum_log = self._sum_log + several * np.log(biased + self._epsilon)

    @property
    def has_values(self) -> bool:
        """Whether each channel has a value that counts."""
        return self._pooled is not None and bool(np.all(self._pooled.count > 0))

    @property
    def pooled(self) -> Moments:
        """Of all values, float64."""
        if self._pooled is None or not self.has_values:
            raise ValueError("`data` must hold values that count. Received: only masked values or weights of zero.")
        return Moments(*(np.asarray(part) for part in self._pooled))

    @property
    def standard_error(self) -> float:
        """How far mean and variance may be off, by how the batches differ: the largest over the channels.

        max(SE(mean_b) / sqrt(variance + epsilon), SE(variance_b) / (variance + epsilon))
        SE(z_b) = sqrt(sum((z_b - mean(z))**2) / (n (n - 1)))

        over n batches, each one draw of the same population. Infinite for fewer than two of more than one value each.
        """
        if self._means is None or self._variances is None or np.any(np.asarray(self._means.count) < 2):
            return float("inf")

        def error(moments: Moments) -> np.ndarray:
            n = np.asarray(moments.count)
            return np.sqrt(np.asarray(moments.m2) / (n * (n - 1)))

        r = np.asarray(self.pooled.variance) + self._epsilon
        return float(np.max(np.maximum(error(self._means) / np.sqrt(r), error(self._variances) / r)))

    def to_array(self) -> np.ndarray:
        """All that `population` needs, of shape `(9, *channels)`; of several, `merged` takes the rows."""
        if self._pooled is None or self._means is None:
            raise ValueError("`data` must hold at least one batch. Received: no batch.")
        return np.stack([*map(np.asarray, self._pooled), *map(np.asarray, self._means), self._sum_unbiased])

    def merged(self, arrays: Sequence[np.ndarray]) -> "Accumulator":
        """One of all batches behind `arrays`, which others gave by `to_array`."""
        result = Accumulator(self._epsilon)
        result.batches = self.batches
        parts = [[tf.constant(row) for row in array] for array in arrays]
        result._pooled = merge([Moments(*part[:4]) for part in parts])
        result._means = merge([Moments(*part[4:8]) for part in parts])
        result._sum_unbiased = np.sum([array[8] for array in arrays], 0)
        return result

    def population(self, method: str) -> Population:
        """By the `method` of `recalibrate`."""
        pooled = self.pooled
        count = float(np.max(pooled.count))
        certainty = self.standard_error, self.batches, bool(np.all(has_variance(pooled)))
        if method == "pooled":
            return Population(count, pooled.mean, np.asarray(pooled.variance), *certainty)
        if self._means is None or not np.all(self._means.count > 0):
            raise ValueError(
                '`method="algorithm2"` needs batches with more than one value per channel; use `method="pooled"`. '
                "Received: batches with one value only."
            )
        variance = self._sum_unbiased / np.asarray(self._means.count)
        return Population(count, np.asarray(self._means.mean), variance, *certainty)

    def batch_divergence(self, mean: np.ndarray, variance: np.ndarray) -> np.ndarray:
        """Average over the batches of their divergence (Kullback-Leibler) from N(mean, variance), as `drift.figures`.

        mean_b(((v_b + (m_b - mean)**2) / r - 1 - log(v_b / r)) / 2), v_b = variance_b + epsilon, r = variance + epsilon

        Args:
            mean: shape `(C,)`.
            variance: shape `(C,)`.

        Returns:
            Shape `(C,)`, nats; with the biased variances of the batches, those of one value left out (NaN if all are).
        """
        if self._means is None or self._variances is None:
            return np.full_like(mean, np.nan)
        count, center, m2, _ = (np.asarray(part) for part in self._means)
        n = np.where(count > 0, count, np.nan)
        r = variance + self._epsilon
        from_mean = m2 / n + (center - mean) ** 2
        return (
            (np.asarray(self._variances.mean) + self._epsilon + from_mean) / r - 1 - self._sum_log / n + np.log(r)
        ) / 2
