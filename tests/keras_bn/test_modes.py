"""Switches of mode: in force at once, for every way to run a model, and undone when they should be."""

import subprocess
import sys
import warnings
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_bn

ROOT = Path(keras_bn.__file__).parent.parent

LAYERS = pytest.mark.parametrize(
    "normalization", [keras_bn.BatchNormalization, keras.layers.BatchNormalization], ids=["ours", "stock"]
)


def _data():
    rng = np.random.default_rng(0)
    return rng.normal(3, 2, (32, 4)).astype("float32"), rng.normal(size=(32, 1)).astype("float32")


def _model(normalization, compiled=True):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), normalization(momentum=0.5, name="bn"), keras.layers.Dense(1)])
    if compiled:
        model.compile("adam", "mse")
    return model


def _weights(model):
    return [weight.numpy() for weight in model.get_layer("bn").weights]


def _moved(before, after):
    """Whether gamma, beta, moving mean and moving variance changed."""
    return [not np.array_equal(one, two) for one, two in zip(before, after, strict=True)]


@LAYERS
def test_batch_statistics_hold_at_once_for_predict_evaluate_and_calls(normalization):
    model, (x, y) = _model(normalization), _data()
    moving = model.predict(x, verbose=0), model.evaluate(x, y, verbose=0), np.asarray(model(x))
    before = _weights(model)
    with keras_bn.use_statistics(model, "batch"):
        expected = np.asarray(model(x))
        np.testing.assert_allclose(model.predict(x, verbose=0), expected, rtol=1e-5, atol=1e-5)
        assert model.evaluate(x, y, verbose=0) == pytest.approx(float(np.mean((expected - y) ** 2)), rel=1e-4)
        assert np.abs(expected - moving[2]).max() > 0.1
    assert _moved(before, _weights(model)) == [False] * 4
    np.testing.assert_array_equal(model.predict(x, verbose=0), moving[0])
    assert model.evaluate(x, y, verbose=0) == moving[1]


@LAYERS
def test_moving_statistics_hold_in_fit_and_do_not_move(normalization):
    model, (x, y) = _model(normalization), _data()
    model.fit(x, y, verbose=0)
    before = _weights(model)
    keras_bn.use_statistics(model, "moving")
    model.fit(x, y, verbose=0)
    assert _moved(before, _weights(model)) == [True, True, False, False]
    keras_bn.use_statistics(model, "auto")
    model.fit(x, y, verbose=0)
    assert _moved(before, _weights(model)) == [True] * 4


@LAYERS
def test_batch_statistics_still_average_in_training(normalization):
    model, (x, y) = _model(normalization), _data()
    keras_bn.use_statistics(model, "batch")
    before = _weights(model)
    model.fit(x, y, verbose=0)
    assert _moved(before, _weights(model)) == [True] * 4


@LAYERS
def test_switch_is_undone_when_the_body_raises(normalization):
    model = _model(normalization)
    x, _ = _data()
    before = np.asarray(model(x))
    with pytest.raises(ZeroDivisionError), keras_bn.use_statistics(model, "batch"):
        raise ZeroDivisionError
    np.testing.assert_array_equal(model(x), before)


def test_inner_switch_gives_back_to_the_outer_one():
    model = _model(keras_bn.BatchNormalization)
    with keras_bn.use_statistics(model, "batch"):
        with keras_bn.use_statistics(model, "moving"):
            assert model.get_layer("bn").statistics == "moving"
        assert model.get_layer("bn").statistics == "batch"
    assert model.get_layer("bn").statistics == "auto"


@LAYERS
def test_freezing_after_a_first_fit_holds_in_the_next(normalization):
    model, (x, y) = _model(normalization), _data()
    model.fit(x, y, verbose=0)
    keras_bn.freeze(model)
    before = _weights(model)
    model.fit(x, y, verbose=0)
    model.train_on_batch(x, y)
    assert _moved(before, _weights(model)) == [False] * 4
    keras_bn.unfreeze(model)
    model.fit(x, y, verbose=0)
    assert _moved(before, _weights(model)) == [True] * 4


def test_plain_trainable_waits_for_compile_which_is_why_freeze_exists():
    model, (x, y) = _model(keras.layers.BatchNormalization), _data()
    model.fit(x, y, verbose=0)
    model.get_layer("bn").trainable = False
    before = _weights(model)
    model.fit(x, y, verbose=0)
    assert _moved(before, _weights(model))[2:] == [True, True]


@LAYERS
@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
def test_freezing_and_unfreezing_keeps_what_the_optimizer_remembers(normalization, policy):
    keras.config.set_dtype_policy(policy)
    try:
        model, (x, y) = _model(normalization), _data()
        keras_bn.freeze(model)
        model.fit(x, y, verbose=0)
        optimizer = model.optimizer
        remembered = {variable.name: variable.numpy() for variable in optimizer.variables}
        before = _weights(model)
        keras_bn.unfreeze(model)
        assert model.optimizer is optimizer
        after = {variable.name: variable.numpy() for variable in optimizer.variables}
        assert len(after) == len(remembered)
        for name, value in remembered.items():
            np.testing.assert_array_equal(after[name], value, err_msg=name)
        model.fit(x, y, verbose=0)
        assert _moved(before, _weights(model)) == [True] * 4
    finally:
        keras.config.set_dtype_policy("float32")


class OwnAdam(keras.optimizers.Adam):
    """An optimizer with a memory that is no part of its configuration."""

    note = None


@LAYERS
@pytest.mark.parametrize("optimizer", [OwnAdam, keras.optimizers.Adafactor, keras.optimizers.AdamW])
def test_unfreezing_leaves_the_optimizer_as_it_was(normalization, optimizer):
    x, y = _data()
    keras.utils.set_random_seed(0)
    towers = [
        keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="d"), normalization(name="n")]) for _ in "ab"
    ]
    inputs = keras.Input((4,))
    model = keras.Model(inputs, keras.layers.Dense(1)(keras.layers.Concatenate()([tower(inputs) for tower in towers])))
    made = optimizer(0.01, weight_decay=0.1)
    made.exclude_from_weight_decay(var_names=["gamma", "beta", "bias"])
    made.note = "kept"
    model.compile(made, "mse")
    keras_bn.freeze(model)
    model.fit(x, y, verbose=0)
    before = [variable.numpy() for variable in made.variables]
    keras_bn.unfreeze(model)
    assert made is model.optimizer
    assert made.note == "kept"
    for variable, value in zip(made.variables, before, strict=True):
        np.testing.assert_array_equal(variable, value)
    gamma = towers[0].get_layer("n").gamma
    assert not made._use_weight_decay(gamma)
    model.fit(x, y, verbose=0)
    assert np.abs(gamma - 1).max() > 0


@LAYERS
def test_an_optimizer_made_while_layers_were_frozen_is_named_before_anything_changes(normalization):
    model, (x, y) = _model(normalization, compiled=False), _data()
    keras_bn.freeze(model)
    model.compile("adam", "mse")
    model.fit(x, y, verbose=0)
    with pytest.raises(ValueError, match=r"frozen after `compile`.*compile the model again.* made without .*bn/gamma"):
        keras_bn.unfreeze(model)
    assert not model.get_layer("bn").trainable
    model.compile("adam", "mse")
    keras_bn.unfreeze(model)
    before = _weights(model)
    model.fit(x, y, verbose=0)
    assert _moved(before, _weights(model)) == [True] * 4


def _backbone_and_head(normalization):
    keras.utils.set_random_seed(0)
    backbone = keras.Sequential(
        [keras.Input((4,)), normalization(name="first"), keras.layers.Dense(4), normalization(name="last")],
        name="backbone",
    )
    layers = [backbone, normalization(name="head"), keras.layers.Dense(1)]
    model = keras.Sequential([keras.Input((4,)), *layers])
    return model, backbone


def _learning(model):
    """Names of the batch norms that learn in the next `fit`, gamma and statistics alike."""
    layers = keras_bn.modes.batch_normalizations(model)
    before = [[weight.numpy() for weight in layer.weights] for layer in layers]
    model.fit(*_data(), verbose=0)
    moved = [_moved(old, [w.numpy() for w in layer.weights]) for old, layer in zip(before, layers, strict=True)]
    assert all(len(set(one)) == 1 for one in moved)
    return {layer.name for layer, one in zip(layers, moved, strict=True) if one[0]}


@LAYERS
def test_a_layer_that_was_frozen_by_hand_stays_frozen(normalization):
    model, backbone = _backbone_and_head(normalization)
    model.compile("adam", "mse")
    model.fit(*_data(), verbose=0)
    backbone.get_layer("last").trainable = False
    model.compile(model.optimizer, "mse")
    for _ in range(2):
        keras_bn.freeze(model)
        keras_bn.freeze(model)
        assert _learning(model) == set()
        keras_bn.unfreeze(model)
        assert _learning(model) == {"first", "head"}


@LAYERS
def test_a_backbone_that_was_frozen_before_compile_stays_frozen_and_the_head_learns_again(normalization):
    model, backbone = _backbone_and_head(normalization)
    backbone.trainable = False
    model.compile("adam", "mse")
    model.fit(*_data(), verbose=0)
    remembered = [variable.numpy() for variable in model.optimizer.variables]
    keras_bn.freeze(model)
    keras_bn.unfreeze(model)
    for variable, value in zip(model.optimizer.variables, remembered, strict=True):
        np.testing.assert_array_equal(variable, value)
    assert _learning(model) == {"head"}


@LAYERS
def test_a_backbone_that_was_frozen_since_stays_frozen(normalization):
    model, backbone = _backbone_and_head(normalization)
    model.compile("adam", "mse")
    keras_bn.freeze(model)
    backbone.trainable = False
    model.compile("adam", "mse")
    keras_bn.unfreeze(model)
    assert _learning(model) == {"head"}
    backbone.trainable = True
    model.compile("adam", "mse")
    assert _learning(model) == {"first", "last", "head"}


def test_what_a_person_thaws_in_between_stays_thawed():
    model, backbone = _backbone_and_head(keras_bn.BatchNormalization)
    backbone.get_layer("first").trainable = False
    keras_bn.freeze(model)
    backbone.get_layer("first").trainable = True
    keras_bn.unfreeze(model)
    assert all(layer.trainable for layer in keras_bn.modes.batch_normalizations(model))


def test_a_layer_that_learned_below_a_frozen_backbone_learns_again():
    model, backbone = _backbone_and_head(keras_bn.BatchNormalization)
    backbone.trainable = False
    backbone.get_layer("last").trainable = True
    keras_bn.freeze(model)
    keras_bn.unfreeze(model)
    assert [layer.trainable for layer in keras_bn.modes.batch_normalizations(backbone)] == [False, True]


def test_weights_and_activations_of_a_layer_that_were_frozen_one_by_one_stay_so():
    layer = keras_bn.BatchNormalization(activation=keras.layers.PReLU(), name="n")
    model = keras.Sequential([keras.Input((4,)), layer, keras.layers.Dense(1)])
    layer.gamma.trainable = False
    layer.activation.trainable = False
    keras_bn.freeze(model)
    keras_bn.unfreeze(model)
    assert layer.trainable
    assert not layer.gamma.trainable
    assert layer.beta.trainable
    assert not layer.activation.trainable


def test_a_second_freeze_makes_room_in_an_optimizer_that_came_after_the_first():
    model, (x, y) = _model(keras_bn.BatchNormalization), _data()
    keras_bn.freeze(model)
    model.compile("adam", "mse")
    keras_bn.freeze(model)
    model.fit(x, y, verbose=0)
    keras_bn.unfreeze(model)
    assert _learning(model) == {"bn"}


def test_unfreezing_what_freeze_did_not_freeze_says_that_it_stays():
    model, backbone = _backbone_and_head(keras_bn.BatchNormalization)
    backbone.get_layer("last").trainable = False
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"`freeze`.*\['last'\].*`trainable = True`"):
            keras_bn.unfreeze(model)
        assert not backbone.get_layer("last").trainable


def test_a_model_whose_normalizations_are_all_frozen_learns_again_unless_freeze_has_seen_that(tmp_path):
    model, backbone = _backbone_and_head(keras_bn.BatchNormalization)
    keras_bn.freeze(model)
    model.save(tmp_path / "frozen.keras")
    loaded = keras.models.load_model(tmp_path / "frozen.keras")
    keras_bn.unfreeze(loaded)
    assert all(layer.trainable for layer in keras_bn.modes.batch_normalizations(loaded))
    keras_bn.unfreeze(model)
    backbone.trainable = False
    keras_bn.freeze(model)
    for _ in range(2):
        keras_bn.unfreeze(model)
        assert not any(layer.trainable for layer in keras_bn.modes.batch_normalizations(backbone))


def test_unfreezing_what_learns_anyway_says_nothing():
    model = _model(keras_bn.BatchNormalization)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        keras_bn.unfreeze(model)


REPLICAS = """
import numpy as np, tensorflow as tf
devices = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(devices[0], [tf.config.LogicalDeviceConfiguration()] * 2)
import keras, keras_bn
x = np.random.default_rng(0).normal(3, 2, (40, 4)).astype("float32")
with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
    layers = [keras.layers.Dense(3), keras_bn.BatchNormalization(), keras.layers.Dense(1)]
    model = keras.Sequential([keras.Input((4,)), *layers])
    model.compile("adam", "mse")
keras_bn.freeze(model)
model.fit(x, x[:, :1], batch_size=10, verbose=0)
keras_bn.unfreeze(model)
model.fit(x, x[:, :1], batch_size=10, epochs=2, verbose=0)
for variable in model.trainable_variables:
    first, second = [component.numpy() for component in variable.value.values]
    np.testing.assert_array_equal(first, second)
"""


def test_of_many_weights_that_an_optimizer_has_no_room_for_some_are_named():
    layers = [layer for n in range(20) for layer in (keras.layers.Dense(3), keras_bn.BatchNormalization(name=f"n{n}"))]
    model = keras.Sequential([keras.Input((3,)), *layers])
    keras_bn.freeze(model)
    model.compile("sgd", "mse")
    model.fit(np.ones((4, 3)), np.ones((4, 3)), verbose=0)
    with pytest.raises(ValueError, match=r"made without \['.*/n0/gamma', .*/n2/gamma'\] and 35 more\.$"):
        keras_bn.unfreeze(model)


@pytest.mark.slow
def test_replicas_stay_equal_after_unfreezing_outside_of_the_scope():
    done = subprocess.run([sys.executable, "-c", REPLICAS], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_freezing_in_the_middle_of_fit_holds_from_the_next_step():
    model, (x, y) = _model(keras_bn.BatchNormalization), _data()
    seen = []

    class Freezer(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 1:
                keras_bn.freeze(self.model)

        def on_epoch_end(self, epoch, logs=None):
            seen.append(_weights(model))

    model.fit(x, y, epochs=3, verbose=0, callbacks=[Freezer()])
    assert _moved(seen[0], seen[1]) == _moved(seen[1], seen[2]) == [False] * 4


def test_switching_a_single_layer_reaches_the_models_around_it():
    inner = _model(keras_bn.BatchNormalization, compiled=False)
    inputs = keras.Input((4,))
    outer = keras.Model(inputs, keras.layers.Dense(1)(inner(inputs)))

    class Trainer(keras.Model):
        def __init__(self):
            super().__init__()
            self.trained = outer

        def call(self, x, training=None):
            return self.trained(x, training=training)

    trainer = Trainer()
    trainer.compile("sgd", "mse")
    x, y = _data()
    trainer.fit(x, y, verbose=0)
    keras_bn.freeze(inner.get_layer("bn"))
    before = _weights(inner)
    trainer.fit(x, y, verbose=0)
    assert _moved(before, _weights(inner)) == [False] * 4


@keras.saving.register_keras_serializable("tests")
class _Cell(keras.layers.Layer):
    """A recurrent cell with a batch norm inside."""

    def __init__(self, stock=False, **kwargs):
        super().__init__(**kwargs)
        self.stock = stock
        self.state_size = self.output_size = 4
        self.normalization = (keras.layers if stock else keras_bn).BatchNormalization(name="recurrent")

    def build(self, shape):
        self.normalization.build(shape)

    def call(self, inputs, states, training=None):
        output = self.normalization(inputs, training=training) + states[0]
        return output, [output]

    def get_config(self):
        return {**super().get_config(), "stock": self.stock}


def _wrapped(normalization):
    shared = normalization(name="shared")
    inputs = keras.Input((5, 4))
    x = keras.layers.TimeDistributed(normalization(name="timed"))(inputs)
    cell = keras.Sequential([keras.Input((4,)), normalization(name="nested"), keras.layers.Dense(4)])
    x = keras.layers.TimeDistributed(cell)(shared(shared(x)))
    recurrent = keras.layers.RNN(_Cell(stock=normalization is keras.layers.BatchNormalization))
    return keras.Model(inputs, keras.layers.Bidirectional(recurrent)(x))


@LAYERS
def test_nested_wrapped_and_shared_layers_are_all_reached_and_each_once(normalization):
    model = _wrapped(normalization)
    found = keras_bn.modes.batch_normalizations(model)
    names = sorted(layer.name for layer in found)
    assert names == ["nested", "recurrent", "recurrent", "shared", "timed"]
    keras_bn.freeze(model)
    assert not any(layer.trainable for layer in found)
    x = np.random.default_rng(0).normal(3, 1, (8, 5, 4)).astype("float32")
    moving = np.asarray(model(x, training=True))
    with keras_bn.use_statistics(model, "batch"):
        assert np.abs(np.asarray(model(x)) - moving).max() > 0.1


def test_batch_statistics_hold_under_jit_compile_and_in_a_masked_model():
    model = keras.Sequential(
        [
            keras.Input((6, 3)),
            keras.layers.Masking(),
            keras_bn.BatchNormalization(),
            keras.layers.GlobalAveragePooling1D(),
        ]
    )
    model.compile("sgd", "mse", jit_compile=True)
    x = np.random.default_rng(0).normal(3, 1, (8, 6, 3)).astype("float32")
    x[:, 4:] = 0
    with keras_bn.use_statistics(model, "batch"):
        # The average over what counts, of all examples, is beta.
        np.testing.assert_allclose(model.predict(x, verbose=0).mean(0), np.zeros(3), atol=1e-5)
    assert np.abs(model.predict(x, verbose=0)).min() > 1


def test_function_of_ones_own_takes_the_mode_it_was_traced_in():
    model, (x, _) = _model(keras_bn.BatchNormalization), _data()
    function = tf.function(lambda x: model(x))
    moving = function(x)
    with keras_bn.use_statistics(model, "batch"):
        np.testing.assert_array_equal(function(x), moving)
        assert np.abs(np.asarray(tf.function(lambda x: model(x))(x) - moving)).max() > 0.1
