"""The reference networks: their names, where they normalize, and that they learn from real images."""

import keras
import numpy as np
import pytest

import keras_bn
from models import networks

ALL = [networks.fashion_cnn, networks.resnet, networks.sigmoid_mlp]


def normalizations(model):
    return [layer for layer in model.layers if isinstance(layer, keras.layers.BatchNormalization)]


@pytest.mark.parametrize("network", ALL)
def test_input_and_output_have_the_names_that_a_person_asks_for(network):
    model = network(width=4)
    assert [tensor.name for tensor in model.inputs] == ["image"]
    assert model.output_names == ["probabilities"]
    assert model.input_shape == (None, 28, 28, 1)
    assert model.name == network.__name__


@pytest.mark.parametrize("network", ALL)
def test_probabilities_sum_to_one(network):
    images = np.random.default_rng(0).random((3, 28, 28, 1), np.float32)
    probabilities = network(width=4, classes=7).predict(images, verbose=0)
    assert probabilities.shape == (3, 7)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-6)


@pytest.mark.parametrize(("network", "count"), list(zip(ALL, [5, 9, 3], strict=True)))
def test_normalization_is_ours_and_stands_between_affine_map_and_activation(network, count):
    model = network(width=4)
    found = normalizations(model)
    assert len(found) == count
    for layer in found:
        assert isinstance(layer, keras_bn.BatchNormalization)
        affine = layer.input._keras_history.operation
        assert isinstance(affine, keras.layers.Conv2D | keras.layers.Dense)
        assert not affine.use_bias
        following = [node.operation for node in layer._outbound_nodes]
        assert all(
            isinstance(after, keras.layers.ReLU | keras.layers.Activation | keras.layers.Add) for after in following
        )


@pytest.mark.parametrize("network", ALL)
def test_normalization_can_be_keras_own(network):
    found = normalizations(network(width=4, normalization=keras.layers.BatchNormalization))
    assert found
    assert not any(isinstance(layer, keras_bn.BatchNormalization) for layer in found)


@pytest.mark.parametrize("network", ALL)
def test_without_normalization_the_affine_maps_have_biases(network):
    model = network(width=4, normalization=None)
    assert normalizations(model) == []
    assert all(layer.use_bias for layer in model.layers if isinstance(layer, keras.layers.Conv2D | keras.layers.Dense))


def test_fashion_cnn_has_less_than_two_megabytes_of_weights():
    assert networks.fashion_cnn().count_params() * 4 < 2e6


def test_blocks_deepen_the_residual_network():
    assert len(normalizations(networks.resnet(width=4, blocks=2))) == 15


@pytest.mark.parametrize("network", ALL)
def test_a_width_of_zero_is_refused(network):
    with pytest.raises(ValueError, match=r"`width` must be a positive integer\. Received: width=0"):
        network(width=0)


@pytest.mark.parametrize(("network", "width"), [(networks.fashion_cnn, 8), (networks.sigmoid_mlp, 100)])
def test_a_network_learns_real_images(network, width, fashion_mnist):
    keras.utils.set_random_seed(0)
    model = network(width=width, normalization=lambda name: keras_bn.BatchNormalization(name=name, momentum=0.9))
    model.compile(keras.optimizers.Adam(0.01), "sparse_categorical_crossentropy", metrics=["accuracy"])
    model.fit(fashion_mnist.x_train[:2000], fashion_mnist.y_train[:2000], batch_size=50, epochs=2, verbose=0)
    _, accuracy = model.evaluate(fashion_mnist.x_test[:1000], fashion_mnist.y_test[:1000], verbose=0)
    assert accuracy > 0.65


@pytest.mark.parametrize("network", ALL)
def test_a_saved_network_loads_with_the_same_outputs(network, tmp_path, fashion_mnist):
    model = network(width=4)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    images = fashion_mnist.x_test[:8]
    np.testing.assert_array_equal(loaded.predict(images, verbose=0), model.predict(images, verbose=0))


@pytest.mark.parametrize("network", ALL)
def test_images_may_have_another_shape(network):
    model = network(width=4, image_shape=(32, 24, 3))
    assert model.input_shape == (None, 32, 24, 3)
    assert model.predict(np.zeros((2, 32, 24, 3), np.float32), verbose=0).shape == (2, 10)


@pytest.mark.parametrize("network", ALL)
def test_an_image_without_channels_is_refused(network):
    with pytest.raises(ValueError, match=r"`channels` must be a positive integer\. Received: channels=0"):
        network(width=4, image_shape=(28, 28, 0))


def test_dropout_stands_after_every_block_and_only_where_it_is_asked_for():
    def dropouts(model):
        return [layer for layer in model.layers if isinstance(layer, keras.layers.Dropout)]

    assert dropouts(networks.fashion_cnn(4)) == []
    found = dropouts(networks.fashion_cnn(4, dropout=0.3))
    assert [layer.rate for layer in found] == [0.3] * 5
    assert all(isinstance(layer.input._keras_history.operation, keras.layers.ReLU) for layer in found)


def test_dropout_of_everything_is_refused():
    with pytest.raises(ValueError, match=r"`dropout` must be in \[0, 1\)\. Received: dropout=1\.0"):
        networks.fashion_cnn(4, dropout=1.0)
