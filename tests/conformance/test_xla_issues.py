"""Reports of wrong batch norm under XLA in TensorFlow's tracker: what the stock function does, and what ours does.

Where a TensorFlow release mends the stock function, the stock half of a test is expected to stop failing: it says so by
being skipped with that reason, never by passing quietly.
"""

import numpy as np
import pytest
import tensorflow as tf

import keras_bn
from keras_bn import ops
from tests.reference import Reference


def _compiled(function, *arguments):
    return [np.asarray(value) for value in tf.nest.flatten(tf.function(function, jit_compile=True)(*arguments))]


def _moments(x):
    _, moments, _ = ops.normalize_batch(x, axes=[1], epsilon=1e-3)
    return moments.mean, moments.m2 / moments.count


def _require_stock_failure(fails, issue):
    if not fails:
        pytest.skip(f"TensorFlow {tf.__version__} no longer shows issue {issue}; ours was right")


def test_117318_given_statistics_are_subtracted_before_anything_is_multiplied():
    x, mean = tf.fill([3, 1], 1e15), tf.constant([1e15])
    (ours,) = _compiled(lambda x, mean: ops.normalize(x, mean, tf.zeros(1), axes=[1], epsilon=1e-5), x, mean)
    np.testing.assert_array_equal(ours, np.zeros((3, 1)))
    (stock,) = _compiled(lambda x, mean: tf.nn.batch_normalization(x, mean, tf.zeros(1), None, None, 1e-5), x, mean)
    _require_stock_failure(np.abs(stock).max() > 1e9, 117318)


@pytest.mark.parametrize(("issue", "value"), [(117286, 1e10), (118179, 7.5e10)])
def test_117286_and_118179_equal_values_have_no_variance(issue, value):
    x = tf.fill([3, 1], np.float32(value))
    mean, variance = _compiled(_moments, x)
    np.testing.assert_array_equal(mean, np.full(1, value, "float32"))
    np.testing.assert_array_equal(variance, np.zeros(1))
    _, stock = _compiled(lambda x: tf.nn.moments(x, [0]), x)
    _require_stock_failure(stock[0] > 1e5, issue)


@pytest.mark.parametrize(("axis", "offset"), [(3, 1e5), (1, 1e4), (3, 1e7)])
def test_118701_offset_gives_neither_negative_variance_nor_nan(axis, offset):
    shape = (8, 16, 16, 8) if axis == 3 else (8, 3, 16, 16)
    x = tf.constant(np.random.default_rng(0).normal(size=shape) + offset, "float32")
    layer = keras_bn.BatchNormalization(axis=axis, momentum=0.0)
    layer.build(shape)

    def ours(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True)
            loss = tf.reduce_sum(y**3)
        return y, tape.gradient(loss, x)

    y, gradient = _compiled(ours, x)
    oracle = Reference(x, axis)
    np.testing.assert_allclose(y, oracle.y, atol=1e-4)
    want = oracle.gradients(3 * oracle.y**2)[0]
    np.testing.assert_allclose(gradient, want, atol=1e-3 * np.abs(want).max())
    assert np.all(layer.moving_variance.numpy() >= 0)

    channels = shape[axis]
    y, _, variance = _compiled(
        lambda x: tf.raw_ops.FusedBatchNormV3(
            x=x,
            scale=tf.ones(channels),
            offset=tf.zeros(channels),
            mean=tf.zeros(0),
            variance=tf.zeros(0),
            data_format="NHWC" if axis == 3 else "NCHW",
            is_training=True,
        )[:3],
        x,
    )
    _require_stock_failure(not np.allclose(y, oracle.y, atol=1e-2) or variance.min() < 0, 118701)
