"""The distance of one normal distribution from another, and of a batch from the population."""

import keras
import numpy as np
import tensorflow as tf

from keras_bn import drift


def test_distance_agrees_with_numerical_integration():
    mean, variance, mean0, variance0, epsilon = 1.0, 2.0, -0.5, 0.7, 0.3
    one = drift.distance([mean], [variance], [mean0], [variance0], epsilon)
    v, r = variance + epsilon, variance0 + epsilon
    x = np.linspace(-30, 30, 200_001)
    p = np.exp(-((x - mean) ** 2) / (2 * v)) / np.sqrt(2 * np.pi * v)
    log_q = -((x - mean0) ** 2) / (2 * r) - np.log(2 * np.pi * r) / 2
    log_p = -((x - mean) ** 2) / (2 * v) - np.log(2 * np.pi * v) / 2
    np.testing.assert_allclose(one.kl, [np.sum(p * (log_p - log_q)) * (x[1] - x[0])], rtol=1e-9)
    np.testing.assert_allclose(one.mean_shift, [1.5 / np.sqrt(r)])
    np.testing.assert_allclose(one.variance_ratio, [v / r])


def test_a_channel_that_never_varies_is_at_distance_zero_from_itself():
    one = drift.distance([3.0], [0.0], [3.0], [0.0], 1e-3)
    assert (float(one.kl[0]), float(one.variance_ratio[0])) == (0.0, 1.0)


def test_the_summary_takes_the_variance_ratio_farthest_from_one():
    one = drift.distance([0.0, 0, 0], [1.0, 3, 0.1], [0.0, 0, 0], [1.0, 1, 1], 0.0)
    assert float(drift.summary(one)["variance_ratio"]) == 0.1


def shared_twice():
    a, b = keras.Input((3,)), keras.Input((3,))
    norm = keras.layers.BatchNormalization(name="norm")
    return keras.Model([a, b], keras.layers.Add()([norm(a), norm(b)])), norm


def test_a_batch_is_compared_with_the_moving_statistics_over_all_calls():
    model, norm = shared_twice()
    rng = np.random.default_rng(0)
    x, y = rng.normal(1, 2, (7, 3)).astype("float32"), rng.normal(-1, 1, (7, 3)).astype("float32")
    norm.moving_mean.assign([0.5, 0, 0])
    seen = np.concatenate([x, y]).astype("float64")
    one = drift.input_distances(model, [x, y])["norm"]
    np.testing.assert_allclose(one.mean_shift, (seen.mean(0) - [0.5, 0, 0]) / np.sqrt(1.001), rtol=1e-6)
    np.testing.assert_allclose(one.variance_ratio, (seen.var(0) + 1e-3) / 1.001, rtol=1e-6)


def test_distances_are_the_same_inside_a_graph():
    model, _ = shared_twice()
    x = np.random.default_rng(0).normal(1, 2, (7, 3)).astype("float32")
    graph = tf.function(lambda a: drift.input_distances(model, [a, a])["norm"].kl)
    np.testing.assert_allclose(graph(tf.constant(x)), drift.input_distances(model, [x, x])["norm"].kl, rtol=1e-9)
