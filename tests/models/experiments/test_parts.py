"""What the experiments are made of: corruptions, ranks, drift, scaling, drift put back."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_bn
from models import data, networks
from models.experiments import drift, images, learning_rate, test_time, why
from models.experiments.corruptions import CORRUPTIONS, STRENGTHS, corrupt


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_corruption_is_repeatable_stays_in_range_and_grows(name, fashion_mnist):
    x = fashion_mnist.x_test[:20]
    original = x.copy()
    spoilt = [corrupt(x, name, strength, seed=3) for strength in STRENGTHS]
    np.testing.assert_array_equal(x, original)
    for one in spoilt:
        assert one.shape == x.shape
        assert one.dtype == np.float32
        assert 0 <= one.min() <= one.max() <= 1
    np.testing.assert_array_equal(spoilt[2], corrupt(x, name, 3, seed=3))
    distances = [np.abs(one - x).mean() for one in spoilt]
    assert distances == sorted(distances)
    assert distances[0] > 0


def test_a_quarter_turn_is_that_of_numpy(fashion_mnist):
    x = fashion_mnist.x_test[:8]
    turned = corrupt(x, "rotation", 5, seed=0)
    for one, image in zip(turned, x, strict=True):
        assert any(np.allclose(one, np.rot90(image, turns), atol=1e-4) for turns in (1, 3))


def test_the_strongest_inversion_is_the_negative(fashion_mnist):
    x = fashion_mnist.x_test[:3]
    np.testing.assert_allclose(corrupt(x, "inversion", 5, 0), 1 - x, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("fog", 1), "`name` must be one of noise, .* Received: name=fog"), (("blur", 6), "`strength` must be one of")],
)
def test_corruptions_that_there_are_not_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        corrupt(np.zeros((1, 4, 4, 1), np.float32), *arguments, seed=0)


def test_a_rank_correlation_asks_for_the_order_only():
    assert test_time.rank_correlation([1, 2, 3, 10], [0.1, 0.5, 7, 8]) == pytest.approx(1)
    assert test_time.rank_correlation([1, 2, 3, 10], [8, 7, 0.5, 0.1]) == pytest.approx(-1)
    # By hand: ranks 0, 1.5, 1.5, 3 and 0, 1, 2, 3.
    assert test_time.rank_correlation([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(4.5 / np.sqrt(4.5 * 5))


def test_mixed_statistics_are_half_way_and_weights_stay():
    model = networks.sigmoid_mlp(width=4)
    mixed = keras.models.clone_model(model)
    x = np.random.default_rng(0).random((50, 28, 28, 1), np.float32)
    test_time.mix(mixed, model, x)
    first = model.get_layer("hidden_1")(tf.reshape(x, [50, -1]))
    half = mixed.get_layer("hidden_1_bn")
    np.testing.assert_allclose(half.moving_mean, np.mean(first, axis=0) / 2, atol=1e-5)
    np.testing.assert_allclose(half.moving_variance, (np.var(first, axis=0) + 1) / 2, rtol=1e-4)
    np.testing.assert_array_equal(mixed.get_layer("logits").kernel, model.get_layer("logits").kernel)


def test_the_statistics_of_the_test_are_settled_where_it_is_made():
    model = networks.sigmoid_mlp(width=8)
    x = np.random.default_rng(0).random((40, 28, 28, 1), np.float32)
    setting = test_time.Setting(steps=1, test_images=40, images_together=40)
    labels = np.zeros(40, int)
    batch = test_time.AccuracyOn(model, "batch", setting)
    with keras_bn.use_statistics(model, "batch"):
        expected = np.mean(np.argmax(model(x, training=False), axis=1) == labels)
    assert batch(x, labels) == pytest.approx(expected)
    np.testing.assert_array_equal(model.get_layer("hidden_1_bn").moving_mean, np.zeros(8))


def test_movement_of_a_median_is_in_its_own_deviations():
    still = np.array([[0.0], [1.0], [2.0], [4.0]])
    moved = np.array([[0.0], [3.0], [4.0], [0.5]])
    np.testing.assert_allclose(drift.movements(np.stack([still, moved])), [[4.0]])


def test_sigmoids_are_watched_with_the_statistics_of_the_batch_and_nothing_moves():
    model = networks.sigmoid_mlp(width=6, depth=2)
    x = np.random.default_rng(0).random((64, 28, 28, 1), np.float32)
    given = drift.what_sigmoids_are_given(model, "hidden_2", x)
    np.testing.assert_allclose(np.mean(given(), axis=0), 0, atol=1e-4)
    np.testing.assert_array_equal(model.get_layer("hidden_2_bn").moving_mean, np.zeros(6))


def test_without_epsilon_the_scale_of_the_weights_does_not_matter(fashion_mnist):
    found = learning_rate.scaling(fashion_mnist.x_train[:60], 0, 1e-12)
    assert max(found["output"]) < 1e-4
    np.testing.assert_allclose(found["weight_gradient"], 1, rtol=1e-4)
    np.testing.assert_allclose(found["input_gradient"], 1, rtol=1e-4)


def test_relus_become_sigmoids_and_nothing_else_changes():
    model = networks.fashion_cnn(4)
    changed = learning_rate.with_sigmoids(model)
    kinds = [type(layer).__name__ for layer in changed.layers]
    assert "ReLU" not in kinds
    assert kinds.count("Activation") == 6
    assert [layer.name for layer in changed.layers] == [layer.name for layer in model.layers]


def test_drift_put_back_is_another_at_each_step_and_is_not_there_in_inference():
    layer = why.DriftingBatchNormalization(spread=1.0, seed=3)
    x = tf.constant(np.random.default_rng(0).standard_normal((500, 4)).astype("float32"))
    means = [np.mean(layer(x, training=True), axis=0) for _ in range(2)]
    assert np.abs(means[0] - means[1]).max() > 0.1
    plain = keras_bn.BatchNormalization()
    plain.build(x.shape)
    plain.set_weights(layer.get_weights()[:4])
    np.testing.assert_array_equal(layer(x, training=False), plain(x, training=False))
    again = why.DriftingBatchNormalization.from_config(layer.get_config())
    np.testing.assert_array_equal(np.mean(again(x, training=True), axis=0), means[0])


def test_the_landscape_is_looked_at_and_left():
    model = networks.sigmoid_mlp(width=5)
    draws = np.random.default_rng(0)
    x, y = draws.random((40, 28, 28, 1), np.float32), draws.integers(0, 10, 40).astype("int32")
    before = [variable.numpy() for variable in model.trainable_variables]
    found = why.landscape(model, why.QUICK, x, y)()
    assert all(value > 0 for value in found.values())
    for variable, value in zip(model.trainable_variables, before, strict=True):
        np.testing.assert_array_equal(variable, value)


def test_halved_images_are_means_of_four_pixels():
    x = np.arange(32, dtype=np.float32).reshape(2, 4, 4, 1) / 32
    one = data.ImageData(x, np.zeros(2, np.int32), x, np.zeros(2, np.int32), "here")
    small = images.halved(one).x_train
    assert small.shape == (2, 2, 2, 1)
    assert small[0, 0, 0, 0] == pytest.approx(x[0, :2, :2].mean())


def test_an_unknown_data_set_is_refused():
    with pytest.raises(
        ValueError, match=r"`dataset` must be one of fashion_mnist, mnist, cifar10\. Received: dataset=svhn"
    ):
        images.load("svhn")


def test_other_data_sets_come_from_keras(monkeypatch):
    arrays = ((np.full((3, 32, 32, 3), 255, np.uint8), np.ones((3, 1), np.uint8)),) * 2
    monkeypatch.setattr(keras.datasets.cifar10, "load_data", lambda: arrays)
    loaded = images.load("cifar10")
    assert loaded.x_train.shape == (3, 32, 32, 3)
    assert loaded.x_train.max() == 1
    assert loaded.y_test.shape == (3,)


def test_a_data_set_that_cannot_be_downloaded_is_named(monkeypatch):
    def fail():
        raise Exception("URL fetch failure")

    monkeypatch.setattr(keras.datasets.mnist, "load_data", fail)
    with pytest.raises(FileNotFoundError, match=r"could not load mnist.*URL fetch failure"):
        images.load("mnist")
