"""The equations of the statistics, piece by piece."""

import numpy as np
import pytest
import tensorflow as tf

from benchmarks import replicas as benchmark
from keras_bn import ops, statistics
from tests.reference import Reference


def _x(shape=(40, 3), seed=0):
    return np.random.default_rng(seed).normal(2, 3, shape)


def _moments(x):
    oracle = Reference(x, -1)
    return statistics.Moments(np.full(3, float(len(x))), oracle.batch_mean, oracle.channels(oracle.m2), np.ones(3))


@pytest.mark.parametrize("shape", [(40, 3), (4, 10, 3)], ids=["rows", "groups"])
def test_weighted_moments_are_sums_over_what_counts(shape):
    x, weights = _x(shape), np.random.default_rng(1).uniform(0, 2, (*shape[:-1], 1))
    weights[..., 3, :] = 0
    count, mean, m2, _ = statistics.weighted_moments(x, weights)
    for index in np.ndindex(shape[:-2]):
        w, values = weights[index], x[index]
        np.testing.assert_allclose(count[index], w.sum(0), rtol=1e-12)
        expected = (w * values).sum(0) / w.sum(0)
        np.testing.assert_allclose(mean[index], expected, rtol=1e-12)
        np.testing.assert_allclose(m2[index], (w * (values - expected) ** 2).sum(0), rtol=1e-12)


def test_weighted_moments_without_weights_count_each_value_once():
    got, want = statistics.weighted_moments(_x(), None), _moments(_x())
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one + np.zeros(3), other, rtol=1e-12)


def test_weighted_moments_of_nothing_are_zero():
    for value in statistics.weighted_moments(_x(), np.zeros((40, 1))):
        np.testing.assert_array_equal(value, np.zeros_like(value))


@pytest.mark.parametrize("scale", [1e-3, 0.026, 1.0, 1e3])
@pytest.mark.parametrize("kind", ["frequencies", "reliabilities"])
def test_unbiased_variance_of_weights_is_that_of_the_oracle_and_of_numpy(kind, scale):
    x, rng = _x(), np.random.default_rng(1)
    reliable = kind == "reliabilities"
    weights = scale * rng.uniform(0, 1, 40) if reliable else rng.integers(0, max(2, int(scale)), 40)
    batch = statistics.batch_statistics(statistics.weighted_moments(x, weights[:, None]), unbiased=True)
    np.testing.assert_allclose(batch.variance, Reference(x, -1, weights=weights[:, None]).unbiased_variance, rtol=1e-9)
    by_numpy = np.diag(np.cov(x.T, **{"aweights" if reliable else "fweights": weights}))
    np.testing.assert_allclose(batch.variance, by_numpy, rtol=1e-9)
    assert np.all(batch.worth)


def test_frequencies_are_repeated_values_and_the_scale_of_reliabilities_says_nothing():
    x, counts = _x(), np.random.default_rng(1).integers(0, 4, 40)
    repeated = statistics.batch_statistics(_moments(np.repeat(x, counts, 0)), unbiased=True)
    weighted = statistics.batch_statistics(statistics.weighted_moments(x, counts[:, None]), unbiased=True)
    scaled = [
        statistics.batch_statistics(statistics.weighted_moments(x, scale * counts[:, None]), unbiased=True)
        for scale in (1.0, 1e-30)
    ]
    np.testing.assert_allclose(weighted.variance, repeated.variance, rtol=1e-12)
    np.testing.assert_allclose(scaled[1].variance, scaled[0].variance, rtol=1e-12)
    assert np.all(scaled[1].worth)
    assert not np.allclose(scaled[0].variance, weighted.variance, rtol=1e-3)


@pytest.mark.parametrize(
    ("weights", "worth"),
    [
        ([False, True, False], False),
        ([0, 1, 0], False),
        ([0, 2, 0], True),
        ([0.0, 1.0, 0.0], False),
        ([0.0, 0.3, 0.0], False),
        ([0.0, 7.3, 0.0], False),
        ([0.0, 0.3, 1e-9], False),
        ([0.0, 0.3, 0.01], True),
        ([0.0, 1e-3, 1e-3], True),
    ],
    ids=str,
)
def test_one_value_alone_has_no_variance_whatever_it_weighs(weights, worth):
    x = tf.constant([[1.0], [2.0], [3.0]])
    moments = statistics.weighted_moments(x, tf.constant(weights)[:, None])
    assert bool(statistics.batch_statistics(moments, False).worth[0]) == worth


@pytest.mark.parametrize("splits", [[20], [1, 2, 39], [0, 7, 7, 40]], ids=str)
def test_merged_parts_equal_the_whole_whatever_the_split(splits):
    x = _x() + 1e6
    empty = statistics.Moments(np.zeros(3), np.full(3, 1e9), np.zeros(3), np.ones(3))
    parts = [_moments(part) if len(part) else empty for part in np.split(x, splits)]
    merged = statistics.merged(statistics.Moments(*(np.stack(field) for field in zip(*parts, strict=True))))
    for got, want in zip(merged, _moments(x), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-9)


def test_merged_parts_of_weighted_values_equal_the_whole():
    x, weights = _x(), np.random.default_rng(1).uniform(0, 0.05, (40, 1))
    pairs = zip(np.split(x, [3, 15]), np.split(weights, [3, 15]), strict=True)
    parts = [statistics.weighted_moments(*pair) for pair in pairs]
    merged = statistics.merged(statistics.Moments(*(tf.stack(field) for field in zip(*parts, strict=True))))
    for got, want in zip(merged, statistics.weighted_moments(x, weights), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-9)


@pytest.mark.parametrize("unbiased", [False, True])
def test_batch_statistics_divide_by_the_count_or_one_less(unbiased):
    moments = _moments(_x())
    for count in (40.0, moments.count):
        batch = statistics.batch_statistics(moments._replace(count=count), unbiased)
        np.testing.assert_allclose(batch.variance, moments.m2 / (39 if unbiased else 40), rtol=1e-12)
        assert np.all(batch.worth)


def test_batch_statistics_are_worth_nothing_of_one_value_or_of_what_is_not_finite():
    zeros = np.zeros(3)
    for count in (1.0, np.ones(3), np.zeros(3)):
        assert not np.any(statistics.batch_statistics(statistics.Moments(count, zeros, zeros), True).worth)
    m2 = np.array([1.0, np.nan, np.inf])
    np.testing.assert_array_equal(
        statistics.batch_statistics(statistics.Moments(4.0, zeros, m2), False).worth, [True, False, False]
    )


@pytest.mark.parametrize("axes", [[2], [1], [0, 2]], ids=str)
def test_scale_and_shift_is_one_multiply_add_per_channel(axes):
    x = _x((2, 3, 4))
    oracle = Reference(x, axes)
    channels = int(np.prod([x.shape[axis] for axis in axes]))
    gamma, beta = _x((channels,), 1), _x((channels,), 2)
    got = ops.scale_and_shift(x, gamma, beta, axes=axes)
    np.testing.assert_allclose(got, oracle.along(gamma) * x + oracle.along(beta), rtol=1e-12)


@pytest.mark.parametrize("replicas", [2, 256])
def test_statistics_of_simulated_replicas_send_as_much_whatever_their_number_and_lose_no_digits(replicas):
    rows = [row for row in benchmark.rows_of([replicas], [0.0, 1e6]) if row["contestant"] == "ours"]
    assert [row["bytes per channel"] for row in rows] == [16, 16]
    for row in rows:
        assert row["error of variance"] < 2e-6
        # Float32 has steps of 0.06 at the larger offset.
        assert row["error of mean"] < (0.04 if row["offset"] else 1e-6)


@pytest.mark.parametrize(("count", "size"), [(4, 2), (16, 2), (16, 8)])
def test_simulated_groups_send_as_many_times_more_as_there_are_groups(count, size):
    x = np.random.default_rng(0).normal(size=(count, 5, 3)).astype("float32")

    def merge(replica):
        shift = x[replica, 0]
        moments = statistics.weighted_moments(tf.constant(x[replica] - shift), None)
        merged, center = statistics.merged_across_replicas(moments, tf.constant(shift), size)
        return merged.mean + center

    replicas = benchmark.SimulatedReplicas(count)
    means = replicas.run(merge)
    assert replicas.sent == 3 * 16 * count / size
    for replica, mean in enumerate(means):
        first = replica // size * size
        np.testing.assert_allclose(mean, x[first : first + size].reshape(-1, 3).mean(0), atol=1e-6)


def test_a_simulated_replica_without_values_changes_nothing():
    x = np.random.default_rng(0).normal(1e6, 1, (3, 8, 4)).astype("float32")
    weights = np.ones((3, 8, 4), "float32")
    weights[1] = 0
    weights[2, :, 3] = 0.25

    def merge(replica):
        shift = x[replica, 0]
        moments = statistics.weighted_moments(tf.constant(x[replica] - shift), tf.constant(weights[replica]))
        merged, center = statistics.merged_across_replicas(moments, tf.constant(shift), True)
        return [np.asarray(value, "float64") for value in (*merged, center)]

    results = benchmark.SimulatedReplicas(3).run(merge)
    oracle = Reference(x.reshape(-1, 4), -1, weights=weights.reshape(-1, 4))
    for count, mean, m2, unit, center in results:
        np.testing.assert_allclose(count, weights.sum((0, 1)))
        np.testing.assert_allclose(mean + center, oracle.batch_mean, rtol=1e-9)
        np.testing.assert_allclose(m2 / count, oracle.channels(oracle.biased_variance), rtol=1e-6)
        np.testing.assert_allclose(unit, (weights**2).sum((0, 1)) / weights.sum((0, 1)), rtol=1e-6)
        np.testing.assert_array_equal(m2, results[0][2])
