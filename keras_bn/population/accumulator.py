"""Moments of what one layer is given, pooled over the batches and batch by batch."""

from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from keras_bn.model import merge
from keras_bn.statistics import Moments, has_variance

METHODS = ("pooled", "algorithm2")


class Population(NamedTuple):
    """What was measured of a layer's input over all batches.

    Attributes:
        count: number of values behind each channel, or their sum of weights.
        mean: shape `(C,)`, float64.
        variance: shape `(C,)`, float64; biased over all values for `"pooled"`, for `"algorithm2"` the mean of the
            batches' unbiased variances.
    """

    count: Any
    mean: np.ndarray
    variance: np.ndarray


class Accumulator:
    """Moments of one layer's input over the batches, pooled and batch by batch.

    Args:
        epsilon: the layer's.
    """

    def __init__(self, epsilon: float):
        self._epsilon = epsilon
        self._calls: list[Moments] = []
        self._pooled: Moments | None = None
        self._means: Moments | None = None
        self._sum_unbiased: Any = 0.0
        self._sum_biased: Any = 0.0
        self._sum_log: Any = 0.0

    def add_call(self, moments: Moments) -> None:
        """One call of the layer, of several for the same batch where it is shared."""
        self._calls.append(moments)

    def end_batch(self, counts: bool = True) -> None:
        """What was added since the last batch is a batch, or is dropped."""
        calls, self._calls = self._calls, []
        if not calls or not counts:
            return
        batch = merge(calls)
        count, m2, unit = (np.asarray(part) for part in (batch.count, batch.m2, batch.unit))
        several = np.asarray(has_variance(batch)).astype("float64")  # Of one value there is no unbiased variance.
        self._pooled = batch if self._pooled is None else merge([self._pooled, batch])
        as_value = Moments(tf.constant(several), batch.mean, tf.zeros_like(batch.m2), tf.ones_like(batch.m2))
        self._means = as_value if self._means is None else merge([self._means, as_value])
        self._sum_unbiased = self._sum_unbiased + several * m2 / np.where(several > 0, count - unit, 1)
        biased = m2 / np.where(several > 0, count, 1)
        self._sum_biased = self._sum_biased + several * biased
        self._sum_log = self._sum_log + several * np.log(biased + self._epsilon)

    @property
    def has_values(self) -> bool:
        """Whether each channel has a value that counts."""
        return self._pooled is not None and bool(np.all(self._pooled.count > 0))

    def population(self, method: str) -> Population:
        """By the `method` of `recalibrate`."""
        if self._pooled is None or self._means is None or not self.has_values:
            raise ValueError("`data` must hold values that count. Received: only masked values or weights of zero.")
        count = float(np.max(self._pooled.count))
        if method == "pooled":
            return Population(count, np.asarray(self._pooled.mean), np.asarray(self._pooled.m2 / self._pooled.count))
        if not np.all(self._means.count > 0):
            raise ValueError(
                '`method="algorithm2"` needs batches with more than one value per channel; use `method="pooled"`. '
                "Received: batches with one value only."
            )
        return Population(count, np.asarray(self._means.mean), self._sum_unbiased / np.asarray(self._means.count))

    def batch_divergence(self, mean: np.ndarray, variance: np.ndarray) -> np.ndarray:
        """Average over the batches of their Kullback-Leibler divergence from N(mean, variance), as `drift.distance`.

        mean_b(((v_b + (m_b - mean)**2) / r - 1 - log(v_b / r)) / 2), v_b = variance_b + epsilon, r = variance + epsilon

        Args:
            mean: shape `(C,)`.
            variance: shape `(C,)`.

        Returns:
            Shape `(C,)`, nats; with the biased variances of the batches, those of one value left out (NaN if all are).
        """
        if self._means is None:
            return np.full_like(mean, np.nan)
        count, center, m2, _ = (np.asarray(part) for part in self._means)
        n = np.where(count > 0, count, np.nan)
        r = variance + self._epsilon
        from_mean = m2 / n + (center - mean) ** 2
        return ((self._sum_biased / n + self._epsilon + from_mean) / r - 1 - self._sum_log / n + np.log(r)) / 2
