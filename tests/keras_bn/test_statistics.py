"""The equations of the statistics, piece by piece."""

import numpy as np
import pytest

from keras_bn import ops, statistics
from tests.reference import Reference


def _x(shape=(40, 3), seed=0):
    return np.random.default_rng(seed).normal(2, 3, shape)


def _moments(x):
    oracle = Reference(x, -1)
    return statistics.Moments(np.full(3, float(len(x))), oracle.batch_mean, oracle.channels(oracle.m2))


@pytest.mark.parametrize("shape", [(40, 3), (4, 10, 3)], ids=["rows", "groups"])
def test_weighted_moments_are_sums_over_what_counts(shape):
    x, weights = _x(shape), np.random.default_rng(1).uniform(0, 2, (*shape[:-1], 1))
    weights[..., 3, :] = 0
    count, mean, m2 = statistics.weighted_moments(x, weights)
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


@pytest.mark.parametrize("splits", [[20], [1, 2, 39], [0, 7, 7, 40]], ids=str)
def test_merged_parts_equal_the_whole_whatever_the_split(splits):
    x = _x() + 1e6
    empty = statistics.Moments(np.zeros(3), np.full(3, 1e9), np.zeros(3))
    parts = [_moments(part) if len(part) else empty for part in np.split(x, splits)]
    merged = statistics.merged(statistics.Moments(*(np.stack(field) for field in zip(*parts, strict=True))))
    for got, want in zip(merged, _moments(x), strict=True):
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
