"""Batch statistics as (count, mean, m2): how they are measured, merged, corrected and averaged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

# Below so many values that count, as `Moments` has it, a variance is one value's: float32 keeps no digits of the rest.
_MORE_THAN_ONE = 1.001


class Moments(NamedTuple):
    """Count, mean and sum of squared deviations from the mean (m2), per channel, of values of weight w.

    variance = m2 / count (biased) or m2 / (count - unit) (unbiased)

    with unit = 1 where the weights are frequencies, so that a value of weight 2 is two values; and
    unit = sum(w**2) / sum(w) where they are reliabilities, whose scale says nothing. Without weights they are the same.
    There are count / unit values: the sum of frequencies, or Kish's effective number sum(w)**2 / sum(w**2).

    Attributes:
        count: `sum(w)`: a Python number, a scalar, or of a shape that broadcasts to `mean`.
        mean: Shape `(C,)`, or `(G, C)` for G groups that are normalized separately.
        m2: `sum(w (x - mean)**2)`, the shape of `mean`, never negative.
        unit: What one value weighs: 1, or of the shape of `count`.

    Reference: GNU Scientific Library, "Weighted Samples" (`gsl_stats_wvariance`), for reliabilities; Kish 1965, "Survey
        Sampling", for their effective number.
    """

    count: Any
    mean: tf.Tensor
    m2: tf.Tensor
    unit: Any = 1.0

    @property
    def variance(self) -> Any:
        """m2 / count, the biased variance, of the shape of `mean`; 0 where nothing counts."""
        return tf.math.divide_no_nan(self.m2, self.count)


class Moving(NamedTuple):
    """Moving statistics, and how much a batch weighs in them: see `keras_bn.updates.moved`.

    Attributes:
        mean: Shape `(C,)`.
        variance: Likewise.
        rate: 1 - momentum.
        unbiased: Which variance is averaged.
    """

    mean: tf.Tensor
    variance: tf.Tensor
    rate: float
    unbiased: bool


class BatchStatistics(NamedTuple):
    """What one batch contributes to the moving averages.

    Attributes:
        mean: Shape `(C,)`.
        variance: Shape `(C,)`; biased or unbiased, as asked for.
        worth: Which channels have a finite mean and variance of more than one value. Boolean, shape `(C,)`.
    """

    mean: tf.Tensor
    variance: tf.Tensor
    worth: tf.Tensor


def statistics_dtype(dtype: tf.DType) -> tf.DType:
    """The dtype of the statistics of inputs of `dtype`: float64 for float64, else float32."""
    return tf.float64 if dtype == tf.float64 else tf.float32


def batch_statistics(moments: Moments, unbiased: bool) -> BatchStatistics:
    """The mean and variance that a batch contributes to the moving averages.

    variance = m2 / count (biased) or m2 / (count - unit) (unbiased)

    Of several groups, the averages weighted by their counts, without the channels of a group that are not finite or
    have one value only: count / unit <= 1.001.

    Args:
        moments: Of the batch, or of its groups.
        unbiased: Which variance.
    """
    count, mean, m2, unit = moments
    worth = tf.math.is_finite(m2)
    if not isinstance(count, float):
        worth &= has_variance(moments)
        variance = tf.math.divide_no_nan(m2, count - unit if unbiased else count)
    elif count > 1:
        variance = m2 / (count - 1 if unbiased else count)
    else:
        variance, worth = m2, tf.zeros_like(worth)
    if len(mean.shape) == 1:
        return BatchStatistics(mean, variance, worth)
    weight = tf.where(worth, count, 0)
    total = tf.reduce_sum(weight, 0)

    def average(value):
        return tf.math.divide_no_nan(tf.reduce_sum(tf.math.multiply_no_nan(value, weight), 0), total)

    return BatchStatistics(average(mean), average(variance), total > 0)


def has_variance(moments: Moments) -> Any:
    """Which channels have more than one value, of the shape of `count`."""
    return moments.count > moments.unit * _MORE_THAN_ONE


def weighted_moments(x: tf.Tensor, weights: tf.Tensor | None) -> Moments:
    """Moments over the last axis but one of values that have weights.

    count = sum(w), mean = sum(w x) / count, m2 = sum(w (x - mean)**2)
    unit = 1 (frequencies) or sum(w**2) / sum(w) (reliabilities)

    A value of weight 0 has no influence, whatever it is. Where all weights are 0, count, mean and m2 are 0.

    Args:
        x: Shape `(..., M, C)`.
        weights: Shape `(..., M, C)` or `(..., M, 1)`, or None for ones. Booleans and integers are frequencies,
            floats are reliabilities: see `Moments`.

    Returns:
        Moments with a count of shape `(..., C)` or `(..., 1)`, differentiable.
    """
    if weights is None:
        weights = tf.ones(tf.shape(x[..., :1]), tf.int32)
    weights = tf.convert_to_tensor(weights)
    reliabilities = weights.dtype.is_floating
    weights = tf.cast(weights, x.dtype)
    x = tf.where(weights > 0, x, 0)
    count = tf.reduce_sum(weights, -2)
    mean = tf.math.divide_no_nan(tf.reduce_sum(weights * x, -2), count)
    m2 = tf.reduce_sum(weights * tf.square(x - mean[..., None, :]), -2)
    if not reliabilities:
        return Moments(count, mean, m2)
    # The square of a tiny weight would be zero.
    shares = tf.math.divide_no_nan(weights, count[..., None, :])
    return Moments(count, mean, m2, tf.reduce_sum(weights * shares, -2))


def merged(moments: Moments) -> Moments:
    """Merges moments stacked along the first axis: Chan's parallel formula for any number of parts.

    count = sum(count_i), mean = sum(count_i mean_i) / count, m2 = sum(m2_i + count_i (mean_i - mean)**2)
    unit = sum(count_i unit_i) / count

    Empty parts (count 0) change nothing.

    Reference: Chan, Golub & LeVeque 1979, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances".
    """
    count = tf.reduce_sum(moments.count, 0)
    mean = tf.math.divide_no_nan(tf.reduce_sum(moments.count * moments.mean, 0), count)
    m2 = tf.reduce_sum(moments.m2 + moments.count * tf.square(moments.mean - mean), 0)
    unit = tf.math.divide_no_nan(tf.reduce_sum(moments.count * moments.unit, 0), count)
    return Moments(count, mean, m2, unit)


def replica_count() -> int:
    """How many replicas of a distribution strategy run this code side by side; 1 without one."""
    context = tf.distribute.get_replica_context()
    return 1 if context is None else context.num_replicas_in_sync


def merge(parts: Sequence[Moments]) -> Moments:
    """Moments of all values of `parts` together."""
    return merged(Moments(*(tf.stack(values) for values in zip(*parts, strict=True))))


def merged_across_replicas(moments: Moments, shift: tf.Tensor, synchronized: bool | int) -> tuple[Moments, tf.Tensor]:
    """The moments of the values of several replicas together, bit for bit the same on each of them.

    center = sum(count_i (shift_i + mean_i)) / sum(count_i), d_i = mean_i + (shift_i - center)
    mean = center + sum(count_i d_i) / count, m2 = sum(m2_i + count_i d_i**2) - count (mean - center)**2

    Two all-reduces of two values a channel each (under weights three the second time), whatever the number of replicas:
    the first finds a center that all agree on, the second sums about it, where next to nothing cancels. The gradient
    needs the second only.

    Args:
        moments: Of the values of this replica minus `shift`.
        shift: Near the mean of this replica, of the shape of `moments.mean`; may differ between replicas.
        synchronized: Whether all replicas are merged (True), or groups of that many, one after the other.

    Returns:
        The moments of all values minus a center, and that center. Differentiable. Without a distribution strategy, or
        with one replica, `moments` and `shift`.

    Raises:
        ValueError: If the replicas cannot be split into groups of that many.

    Reference: Chan, Golub & LeVeque 1979, as `merged`.
    """
    context = tf.distribute.get_replica_context()
    if replica_count() == 1:
        return moments, shift
    sum_over_replicas = _sum_over_replicas(context, synchronized)
    count, unit = (tf.broadcast_to(value, tf.shape(moments.mean)) for value in (moments.count, moments.unit))
    located = tf.stop_gradient(tf.stack([count, count * (shift + moments.mean)]))
    total, center = tf.unstack(sum_over_replicas(located))
    center = tf.math.divide_no_nan(center, total)
    # A replica without values has no shift either.
    distance = tf.where(count > 0, moments.mean + (shift - center), 0)
    parts = [count * distance, moments.m2 + count * tf.square(distance)]
    if not isinstance(moments.unit, float):
        parts.append(count * unit)
    sums = [tf.math.divide_no_nan(part, total) for part in tf.unstack(sum_over_replicas(tf.stack(parts)))]
    mean, mean_square = sums[:2]
    m2 = total * tf.nn.relu(mean_square - tf.square(mean))
    return Moments(total, mean, m2, *sums[2:]), center


def _sum_over_replicas(context: tf.distribute.ReplicaContext, synchronized: bool | int) -> Callable[..., tf.Tensor]:
    replicas = context.num_replicas_in_sync
    if synchronized is True or synchronized == replicas:
        return lambda values: context.all_reduce(tf.distribute.ReduceOp.SUM, values)
    groups, rest = divmod(replicas, synchronized)
    if rest:
        raise ValueError(
            "`synchronized` must be True, or a number of replicas into which all can be split. "
            f"Received: synchronized={synchronized} for {replicas} replicas."
        )
    group = tf.reshape(tf.cast(context.replica_id_in_sync_group, tf.int32) // synchronized, [1, 1])

    def sum_of_group(values: tf.Tensor) -> tf.Tensor:
        # TensorFlow's strategies sum over all replicas: each group has a place of its own.
        slots = tf.scatter_nd(group, values[None], tf.concat([[groups], tf.shape(values)], 0))
        return tf.gather(context.all_reduce(tf.distribute.ReduceOp.SUM, slots), group[0, 0])

    return sum_of_group
