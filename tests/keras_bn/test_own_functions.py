"""Functions and classes that only a model knows stay what they are in what is made from its configuration."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_bn

STOCK = keras.layers.BatchNormalization


class Scaler:
    def __init__(self, factor):
        self.factor = factor

    def scaled(self, x):
        return self.factor * x


class Ones(keras.initializers.Initializer):
    def __call__(self, shape, dtype=None):
        return keras.ops.ones(shape, dtype)


FUNCTIONS = {
    "of keras.applications": keras.applications.resnet50.preprocess_input,
    "of keras.ops": keras.ops.sin,
    "of TensorFlow": tf.sin,
    "compiled": tf.function(lambda x: 2 * x),
    "lambda with a module in it": lambda x: tf.sin(x),
    "partial": functools.partial(tf.nn.leaky_relu, alpha=0.3),
    "method": Scaler(3.0).scaled,
    "of Python": abs,
}


def pictures(count=5):
    return np.random.default_rng(0).uniform(0, 255, (count, 6, 6, 3)).astype("float32")


def unsettled(model):
    rng = np.random.default_rng(1)
    for layer in model._flatten_layers():
        if isinstance(layer, STOCK):
            layer.moving_mean.assign(rng.normal(size=layer.moving_mean.shape))
            layer.moving_variance.assign(rng.uniform(0.5, 2, layer.moving_variance.shape))
    return model


def picture_model(*layers):
    return unsettled(keras.Sequential([keras.Input((6, 6, 3)), *layers, STOCK(), keras.layers.Flatten()]))


def assert_computes_the_same(new, model, x):
    expected = model.predict(x, verbose=0)
    np.testing.assert_allclose(new.predict(x, verbose=0), expected, rtol=1e-4, atol=1e-4 * np.max(np.abs(expected)))


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_a_lambda_layer_is_converted_with_its_function(kind):
    model = picture_model(keras.layers.Lambda(FUNCTIONS[kind], output_shape=(6, 6, 3)), keras.layers.Conv2D(4, 3))
    assert_computes_the_same(keras_bn.convert(model), model, pictures())


def test_a_lambda_layer_in_a_wrapper_is_converted_with_its_function():
    preprocess = keras.layers.Lambda(keras.applications.mobilenet_v2.preprocess_input, name="preprocess")
    inner = keras.Sequential([keras.Input((6, 6, 3)), preprocess, keras.layers.Conv2D(4, 3), STOCK()])
    model = unsettled(keras.Sequential([keras.Input((2, 6, 6, 3)), keras.layers.TimeDistributed(inner)]))
    assert_computes_the_same(keras_bn.convert(model), model, np.stack([pictures(), pictures()[::-1]], 1))


def test_two_functions_of_one_name_in_one_wrapper_stay_what_they_are():
    layers = [
        keras.layers.Lambda(family.preprocess_input)
        for family in (keras.applications.mobilenet_v2, keras.applications.resnet50)
    ]
    inner = keras.Sequential([keras.Input((6, 6, 3)), *layers, STOCK()])
    model = unsettled(keras.Sequential([keras.Input((2, 6, 6, 3)), keras.layers.TimeDistributed(inner)]))
    assert_computes_the_same(keras_bn.convert(model), model, np.stack([pictures(), pictures()[::-1]], 1))


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_an_activation_that_keras_does_not_know_goes_into_the_layer_that_is_reverted(kind):
    ours = keras_bn.BatchNormalization(activation=FUNCTIONS[kind])
    model = unsettled(keras.Sequential([keras.Input((6, 6, 3)), keras.layers.Conv2D(3, 3), ours]))
    assert_computes_the_same(keras_bn.revert(model), model, pictures())


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_layers_that_absorb_keep_an_activation_that_keras_does_not_know(kind):
    model = picture_model(
        keras.layers.Conv2D(4, 3), STOCK(), keras.layers.Conv2D(3, 1, activation=FUNCTIONS[kind], name="last")
    )
    folded, report = keras_bn.fold(model)
    assert report.normalizations[0].into
    assert folded.get_layer("last").activation is FUNCTIONS[kind]
    assert_computes_the_same(folded, model, pictures())


def test_layers_that_absorb_may_have_initializers_of_the_author():
    model = picture_model(keras.layers.Conv2D(4, 3, kernel_initializer=Ones()))
    folded, report = keras_bn.fold(model)
    assert report.normalizations[0].into
    assert_computes_the_same(folded, model, pictures())


def test_a_layer_that_cannot_be_made_anew_is_named_with_the_way_out_and_keeps_its_functions():
    class Scaling(keras.layers.Layer):
        def __init__(self, factor, **kwargs):
            super().__init__(**kwargs)
            self.factor, self.inner = factor, keras.layers.Activation(tf.sin)

        def call(self, x):
            return self.inner(self.factor * x)

        def get_config(self):
            return super().get_config()

    model = picture_model(Scaling(2.0, name="twice"))
    pattern = (
        r"`get_config` has to return what the constructor takes.*"
        r"Received: layer 'twice' of type Scaling, which cannot: [^\n]*missing 1 required[^\n]*'factor'$"
    )
    with pytest.raises(ValueError, match=pattern):
        keras_bn.convert(model)
    assert model.get_layer("twice").inner.activation is tf.sin
