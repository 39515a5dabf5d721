"""fold() on models as people have them: nested, branching, masked, of free sizes, with layers of all kinds."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_bn


def unsettled(model, seed=0):
    """Every normalization with random weights, so that a forgotten one shows."""
    rng = np.random.default_rng(seed)
    for layer in norms_in(model):
        layer.set_weights([rng.uniform(0.5, 2, w.shape) for w in layer.get_weights()])
    return model


def norms_in(model):
    return [layer for layer in model._flatten_layers() if isinstance(layer, keras.layers.BatchNormalization)]


def backbone(name="backbone"):
    """A branch that goes around a convolution, as every network since ResNet has it."""
    x = inputs = keras.Input((8, 8, 3))
    x = keras.layers.Conv2D(4, 3, padding="same", name="conv")(x)
    y = keras.layers.BatchNormalization(name="norm")(x)
    y = keras.layers.ReLU(name="relu")(y)
    return keras.Model(inputs, keras.layers.Add(name="add")([x, y]), name=name)


@pytest.fixture
def channels_first():
    keras.config.set_image_data_format("channels_first")
    yield
    keras.config.set_image_data_format("channels_last")


def test_a_sequential_model_around_a_branching_one_is_folded():
    chain = [keras.Input((8, 8, 3)), keras.layers.Rescaling(1 / 255), backbone()]
    head = [keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(5), keras.layers.BatchNormalization(name="last")]
    model = unsettled(keras.Sequential([*chain, *head]))
    folded = keras_bn.fold(model)
    assert {one.name: bool(one.into) for one in folded.report.normalizations} == {"backbone/norm": False, "last": True}
    x = np.random.default_rng(0).uniform(0, 255, (4, 8, 8, 3)).astype("float32")
    np.testing.assert_allclose(folded.model(x), model(x), rtol=1e-4, atol=1e-5)


def test_a_transfer_learning_model_is_folded_whole():
    network = keras.applications.MobileNetV2(weights=None, input_shape=(32, 32, 3), include_top=False, alpha=0.35)
    model = keras.Sequential([keras.Input((32, 32, 3)), network, keras.layers.GlobalAveragePooling2D()])
    folded = keras_bn.fold(unsettled(keras.Sequential([model, keras.layers.Dense(3)])))
    assert (folded.report.absorbed, norms_in(folded.model)) == (52, [])


def test_nested_models_with_equally_named_layers_are_folded():
    inputs = keras.Input((8, 8, 3))
    model = unsettled(keras.Model(inputs, keras.layers.Add()([backbone("one")(inputs), backbone("two")(inputs)])))
    folded = keras_bn.fold(model)
    assert [one.name for one in folded.report.normalizations] == ["one/norm", "two/norm"]
    assert {"relu", "two_relu", "conv", "two_conv"} <= {layer.name for layer in folded.model.layers}


def model_of_two_nested(make_layer):
    """Whose nested models have a layer of one name each."""

    def nested(name):
        inputs = keras.Input((4,))
        return keras.Model(inputs, make_layer()(inputs), name=name)

    inputs = keras.Input((4,))
    return keras.Model(inputs, keras.layers.BatchNormalization()(nested("a")(inputs) + nested("b")(inputs)))


def test_equally_named_layers_that_cannot_be_made_anew_are_refused():
    class Times(keras.layers.Layer):
        def __init__(self, factor, name):
            super().__init__(name=name)
            self.factor = factor

        def call(self, x):
            return self.factor * x

        def get_config(self):
            return super().get_config()

    model = model_of_two_nested(lambda: Times(2.0, name="twice"))
    with pytest.raises(ValueError, match=r"no two layers of one name.*Received: Times 'twice', twice"):
        keras_bn.fold(model)


def test_equally_named_lambda_layers_are_folded_with_their_functions():
    factors = iter((2.0, 3.0))

    def make_lambda():
        factor = next(factors)
        return keras.layers.Lambda(lambda x: factor * tf.sin(x), name="times")

    model = model_of_two_nested(make_lambda)
    x = np.random.default_rng(0).normal(size=(5, 4)).astype("float32")
    folded = keras_bn.fold(model).model
    np.testing.assert_allclose(folded.predict(x, verbose=0), model.predict(x, verbose=0), rtol=1e-5)


@pytest.mark.parametrize("structure", [list, dict])
def test_nested_models_of_two_inputs_are_laid_out(structure):
    a, b = keras.Input((4,), name="a"), keras.Input((4,), name="b")
    dense, norm = keras.layers.Dense(3), keras.layers.BatchNormalization(name="n")
    nested = keras.Model([a, b], norm(keras.layers.Subtract()([dense(a), b[:, :3]])), name="nested")
    x, y = keras.Input((4,)), keras.Input((4,))
    output = nested([x, y]) if structure is list else nested({"b": y, "a": x})
    model = unsettled(keras.Model([x, y], keras.layers.Dense(2, name="head")(output)))
    folded = keras_bn.fold(model)
    assert folded.report.normalizations[0].into == ["head"]


def test_nested_models_behind_a_mask_are_laid_out():
    inputs = keras.Input((4, 8))
    output = keras.layers.BatchNormalization(name="n")(keras.layers.Dense(3)(inputs))
    nested = keras.Model(inputs, output, name="nested")
    tokens = keras.Input((4,), dtype="int32")
    embedded = keras.layers.Embedding(5, 8, mask_zero=True)(tokens)
    model = unsettled(keras.Model(tokens, keras.layers.LSTM(3)(nested(embedded))))
    folded = keras_bn.fold(model)
    assert folded.report.absorbed == 1
    x = np.array([[1, 2, 0, 0], [3, 4, 1, 0]])
    np.testing.assert_allclose(folded.model(x), model(x), atol=1e-6)


@pytest.mark.parametrize("shape", [(5,), (4, 5), (4, 6, 5), (2, 3, 4, 5)], ids=len)
def test_a_standing_multiply_add_keeps_its_axis_where_channels_come_first_by_default(shape, channels_first):
    model = unsettled(keras.Sequential([keras.Input(shape), keras.layers.BatchNormalization(axis=-1)]))
    folded = keras_bn.fold(model)
    x = np.random.default_rng(0).normal(size=(3, *shape)).astype("float32")
    np.testing.assert_allclose(folded.model(x), model(x), atol=1e-5)


def test_optional_inputs_stay_optional():
    @keras.saving.register_keras_serializable("test_folding_models")
    class AddIfThere(keras.layers.Layer):
        def call(self, x, y=None):
            return x if y is None else x + y

        def compute_output_shape(self, x_shape, y_shape=None):
            return x_shape

    x, y = keras.Input((4,)), keras.Input((4,), optional=True)
    added = AddIfThere()(x, y)
    model = unsettled(keras.Model([x, y], keras.layers.BatchNormalization()(keras.layers.Dense(3)(added))))
    folded = keras_bn.fold(model).model
    value = np.ones((2, 4), "float32")
    np.testing.assert_allclose(folded([value, None]), model([value, None]), atol=1e-5)


def test_free_sizes_grow_until_the_model_takes_them():
    model = keras.Sequential([keras.Input((None, None, 3))])
    for _ in range(7):
        model.add(keras.layers.Conv2D(2, 3, strides=2))
    model.add(keras.layers.BatchNormalization())
    assert keras_bn.fold(unsettled(model)).report.absorbed == 1


def test_free_sizes_grow_until_there_is_an_output_to_compare():
    layers = [
        keras.layers.Conv1D(3, 1),
        keras.layers.BatchNormalization(),
        keras.layers.Lambda(lambda x: x[:, 500:-500]),
    ]
    folded = keras_bn.fold(unsettled(keras.Sequential([keras.Input((None, 4)), *layers])))
    assert folded.report.absorbed == 1
    assert folded.report.absolute_error > 0


def test_numbers_that_are_indices_are_found():
    layers = [keras.layers.Embedding(5, 4), keras.layers.Conv1D(3, 2), keras.layers.BatchNormalization()]
    model = unsettled(keras.Sequential([keras.Input((6,), dtype="float32"), *layers]))
    assert keras_bn.fold(model).report.absorbed == 1


def test_a_fixed_batch_size_is_kept():
    layers = [keras.layers.Dense(3), keras.layers.BatchNormalization()]
    model = unsettled(keras.Sequential([keras.Input(batch_shape=(7, 4)), *layers, keras.layers.Reshape((3, 1))]))
    assert keras_bn.fold(model).model.inputs[0].shape == (7, 4)


def test_recurrent_states_are_neither_compared_nor_moved():
    layers = [keras.layers.LSTM(3, stateful=True), keras.layers.BatchNormalization(), keras.layers.Dense(2)]
    model = unsettled(keras.Sequential([keras.Input(batch_shape=(4, 5, 3)), *layers]))
    model(np.ones((4, 5, 3), "float32"))
    states = model.layers[0].states
    before = [variable.numpy() for variable in states]
    assert keras_bn.fold(model).report.absorbed == 1
    keras_bn.recalibrate(model, np.ones((8, 5, 3), "float32"), batch_size=4, verbose=0)
    for variable, value in zip(states, before, strict=True):
        np.testing.assert_array_equal(variable, value)


@pytest.mark.parametrize("mode", ["int8", "float8"])
def test_quantized_layers_keep_their_weights(mode):
    layers = [keras.layers.Dense(16), keras.layers.BatchNormalization(name="n"), keras.layers.ReLU()]
    model = unsettled(keras.Sequential([keras.Input((16,)), *layers]))
    model.layers[0].quantize(mode)
    folded = keras_bn.fold(model)
    assert folded.report.normalizations[0].reason.startswith("Dense")
    assert folded.model.layers[0].quantization_mode == mode


def test_a_nested_model_of_two_outputs_ends_a_sequential_one():
    inputs = keras.Input((4,))
    outputs = [keras.layers.Dense(2)(inputs), keras.layers.BatchNormalization()(keras.layers.Dense(3)(inputs))]
    model = unsettled(keras.Sequential([keras.Input((4,)), keras.Model(inputs, outputs)]))
    folded = keras_bn.fold(model)
    assert [tensor.shape for tensor in folded.model.outputs] == [(None, 2), (None, 3)]


def picky():
    """Takes three distances that sum to 1 and nothing else."""

    def checked(x):
        tf.debugging.assert_near(tf.reduce_sum(x, -1), 1.0)
        return x

    layers = [keras.layers.Lambda(checked), keras.layers.Dense(2), keras.layers.BatchNormalization()]
    return unsettled(keras.Sequential([keras.Input((3,)), *layers]))


def test_a_model_that_takes_no_random_numbers_says_what_to_give():
    with pytest.raises(ValueError, match=r"`check` must be given, a batch of what the model takes.*\(None, 3\)"):
        keras_bn.fold(picky())


def test_given_examples_replace_the_random_ones():
    assert keras_bn.fold(picky(), check=np.full((2, 3), 1 / 3, "float32")).report.absorbed == 1


def test_a_subclass_of_a_normalization_stays_as_it_is():
    class Doubled(keras.layers.BatchNormalization):
        def call(self, inputs, training=None, mask=None):
            return super().call(inputs, training, mask) + tf.nn.relu(inputs - 1e4)

    layers = [keras.layers.Dense(3), Doubled(name="own"), keras.layers.BatchNormalization(name="above")]
    model = unsettled(keras.Sequential([keras.Input((4,)), *layers]))
    folded = keras_bn.fold(model)
    own, above = folded.report.normalizations
    assert own.reason == "it is a Doubled, which may compute something else than a batch normalization"
    assert above.reason.startswith("Doubled 'own' before it is a subclass of BatchNormalization, which may compute")
    x = np.full((2, 4), 1e6, "float32")
    np.testing.assert_allclose(folded.model(x), model(x), rtol=1e-5)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_statistics_that_are_not_finite_are_refused(value):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), keras.layers.BatchNormalization(name="ill")])
    model.get_layer("ill").moving_variance.assign([1, value, 1])
    with pytest.raises(ValueError, match=r"`model` must have finite weights.*'.*ill/moving_variance' with a value"):
        keras_bn.fold(model)


def test_a_model_of_which_nothing_can_be_compared_is_refused():
    layers = [keras.layers.Dense(3), keras.layers.BatchNormalization(), keras.layers.Lambda(lambda x: x * np.nan)]
    with pytest.raises(ValueError, match=r"`check` must be inputs for which the model gives finite numbers"):
        keras_bn.fold(keras.Sequential([keras.Input((4,)), *layers]))
