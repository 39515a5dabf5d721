"""What a batch does to the moving statistics, piece by piece."""

import numpy as np
import pytest
import tensorflow as tf

from keras_bn import ops, statistics, updates
from keras_bn.ops import native
from keras_bn.statistics import Moving


def test_moved_goes_a_share_of_the_way_and_a_rate_of_zero_ignores_what_is_not_a_number():
    moved = updates.moved(np.array([1.0, 1.0, 1.0]), np.array([3.0, np.nan, np.inf]), np.array([0.25, 0.0, 0.0]))
    np.testing.assert_array_equal(moved, [1.5, 1.0, 1.0])


def _moved_natively(moving, batch, rate):
    """By the compiled operation, whose batch holds each value twice."""
    ones, x = tf.ones(moving.shape), tf.stack([batch, batch])
    (mean, _) = native.normalize_batch(x, ones, ones, [1], 1e-3, Moving(moving, ones, rate, False))[2]
    return mean


@pytest.mark.parametrize("way", ["TensorFlow", "compiled"] if ops.compiled() else ["TensorFlow"])
def test_moved_is_exact_at_both_ends_and_monotone_between(way):
    moving, batch = (
        tf.constant(values, tf.float32) for values in ([1e6, 0.0, 1.0, -3.0, 7.5], [1e-4, 1e-4, 1e9, 2.0, 7.5])
    )
    move = updates.moved if way == "TensorFlow" else _moved_natively
    rates = [*np.linspace(0, 1, 101), 0.01, 0.5 - 2**-25, 0.5, 1 - 2**-24]
    steps = np.stack([move(moving, batch, float(np.float32(rate))) for rate in sorted(rates)])
    np.testing.assert_array_equal(steps[0], moving)
    np.testing.assert_array_equal(steps[-1], batch)
    assert np.all(np.diff(steps, axis=0) * np.sign(batch - moving) >= 0)
    np.testing.assert_array_equal(steps[:, 4], np.full(len(steps), 7.5))


def test_renorm_correction_is_the_ratio_and_the_distance_within_the_limits():
    batch = statistics.BatchStatistics(np.array([1.0, 5.0]), np.array([4.0, 0.25]), np.ones(2, bool))
    mean, stddev = np.array([0.0, 1.0]), np.array([1.0, 2.0])
    r, d = updates.renorm_correction(batch, mean, stddev, {}, 0.0)
    np.testing.assert_allclose(r, [2.0, 0.25])
    np.testing.assert_allclose(d, [1.0, 2.0])
    r, d = updates.renorm_correction(batch, mean, stddev, {"rmax": 1.5, "rmin": 0.5, "dmax": 1.25}, 0.0)
    np.testing.assert_allclose(r, [1.5, 0.5])
    np.testing.assert_allclose(d, [1.0, 1.25])
    r, _ = updates.renorm_correction(batch, mean, np.zeros(2), {}, 0.01)
    np.testing.assert_allclose(r, np.sqrt(batch.variance + 0.01) / 0.1)


@pytest.mark.parametrize(("step", "value"), [(0, 2.0), (10, 2.0), (15, 3.0), (20, 4.0), (99, 4.0)])
def test_linear_ramp_is_a_straight_line_between_two_steps(step, value):
    ramp = updates.LinearRamp(2.0, 4.0, 10, 20)
    assert float(ramp(step)) == value
    assert float(updates.LinearRamp.from_config(ramp.get_config())(step)) == value
