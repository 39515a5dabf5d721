"""The callback Recalibrate: statistics that fit the weights whenever somebody looks, in any order of callbacks."""

import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

import keras_bn

ROOT = Path(keras_bn.__file__).parent.parent


def compiled_on(x, y, **optimizer):
    keras.utils.set_random_seed(3)
    model = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(8), keras.layers.BatchNormalization(), keras.layers.Dense(1)]
    )
    model.compile(keras.optimizers.SGD(0.05, **optimizer), "mse")
    return model


def regression(n=64):
    x = np.random.default_rng(0).normal(2, 3, (n, 4)).astype("float32")
    return x, x.sum(1, keepdims=True)


def inference_statistics(model, x):
    seen = model.layers[0](x).numpy().astype("float64")
    return seen.mean(0), seen.var(0)


def test_the_callback_recalibrates_at_the_end_of_training():
    x, y = regression()
    model = compiled_on(x, y)
    model.fit(x, y, epochs=2, verbose=0, callbacks=[keras_bn.Recalibrate(x)])
    mean, variance = inference_statistics(model, x)
    np.testing.assert_allclose(model.layers[1].moving_mean, mean, rtol=1e-4)
    np.testing.assert_allclose(model.layers[1].moving_variance, variance, rtol=1e-4)


def test_the_callback_measures_the_averaged_weights_that_training_ends_with():
    x, y = regression()
    model = compiled_on(x, y, use_ema=True, ema_momentum=0.9)
    callbacks = [keras.callbacks.SwapEMAWeights(), keras_bn.Recalibrate(x)]
    model.fit(x, y, epochs=2, verbose=0, callbacks=callbacks)
    _, variance = inference_statistics(model, x)
    np.testing.assert_allclose(model.layers[1].moving_variance, variance, rtol=1e-4)


def test_each_validation_sees_statistics_of_the_weights_it_validates():
    x, y = regression()
    model = compiled_on(x, y, use_ema=True, ema_momentum=0.9)
    errors = []

    class Watch(keras.callbacks.Callback):
        def on_test_batch_begin(self, batch, logs=None):
            _, variance = inference_statistics(model, x)
            errors.append(np.abs(model.layers[1].moving_variance - variance).max() / variance.max())

    callbacks = [keras.callbacks.SwapEMAWeights(), keras_bn.Recalibrate(x, when="epoch"), Watch()]
    model.fit(x, y, epochs=3, verbose=0, callbacks=callbacks, validation_data=(x, y))
    assert len(errors) == 6
    assert max(errors) < 1e-4


def test_the_callback_does_not_measure_the_same_weights_twice(monkeypatch):
    x, y = regression()
    model = compiled_on(x, y)
    runs = []
    original = keras_bn.recalibrate
    monkeypatch.setattr(
        keras_bn.population.callback, "recalibrate", lambda *a, **k: runs.append(1) or original(*a, **k)
    )
    model.fit(x, y, epochs=2, verbose=0, callbacks=[keras_bn.Recalibrate(x, when="epoch")], validation_data=(x, y))
    assert len(runs) == 2


def test_the_callback_refuses_an_unknown_moment():
    with pytest.raises(ValueError, match=r"`when` must be one of 'end', 'epoch'. Received: when='batch'"):
        keras_bn.Recalibrate(np.ones((2, 2)), when="batch")


@pytest.mark.parametrize("name", ["method", "order", "verbose", "batch_size", "steps"])
def test_the_callback_checks_its_arguments_before_the_training(name):
    with pytest.raises((ValueError, TypeError), match=rf"`{name}` must be .* Received: {name}='poled'"):
        keras_bn.Recalibrate(np.ones((2, 2)), **{name: "poled"})
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'methd'"):
        keras_bn.Recalibrate(np.ones((2, 2)), methd="pooled")


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_statistics_are_those_of_the_weights_that_early_stopping_restores(first):
    x, y = regression()
    model = compiled_on(x, y)
    stopping = keras.callbacks.EarlyStopping("loss", mode="max", patience=1, restore_best_weights=True)
    recalibrate = keras_bn.Recalibrate(x)
    model.fit(x, y, epochs=4, verbose=0, callbacks=[recalibrate, stopping] if first else [stopping, recalibrate])
    assert stopping.stopped_epoch == 1
    mean, variance = inference_statistics(model, x)
    np.testing.assert_allclose(model.layers[1].moving_mean, mean, rtol=1e-4)
    np.testing.assert_allclose(model.layers[1].moving_variance, variance, rtol=1e-4)


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("frequency", ["epoch", 3])
def test_checkpoints_hold_the_statistics_of_their_weights(first, frequency, tmp_path):
    x, y = regression()
    model = compiled_on(x, y)
    checkpoint = keras.callbacks.ModelCheckpoint(tmp_path / "{batch}.keras", save_freq=frequency)
    if frequency == "epoch":
        checkpoint = keras.callbacks.ModelCheckpoint(tmp_path / "{epoch}.keras")
    recalibrate = keras_bn.Recalibrate(x, when="epoch")
    callbacks = [recalibrate, checkpoint] if first else [checkpoint, recalibrate]
    model.fit(x, y, epochs=2, batch_size=16, verbose=0, callbacks=callbacks)
    files = sorted(tmp_path.glob("*.keras"))
    assert len(files) == 2
    for file in files:
        saved = keras.models.load_model(file)
        _, variance = inference_statistics(saved, x)
        np.testing.assert_allclose(saved.layers[1].moving_variance, variance, rtol=1e-4)


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_validation_of_averaged_weights_sees_their_statistics_in_any_order(first):
    x, y = regression()
    model = compiled_on(x, y, use_ema=True, ema_momentum=0.9)
    errors = []

    class Watch(keras.callbacks.Callback):
        def on_test_batch_begin(self, batch, logs=None):
            _, variance = inference_statistics(model, x)
            errors.append(np.abs(model.layers[1].moving_variance - variance).max() / variance.max())

    swap, recalibrate = keras.callbacks.SwapEMAWeights(), keras_bn.Recalibrate(x, when="epoch")
    callbacks = [Watch(), *([recalibrate, swap] if first else [swap, recalibrate])]
    model.fit(x, y, epochs=2, verbose=0, callbacks=callbacks, validation_data=(x, y))
    assert max(errors) < 1e-4


def test_saving_is_as_before_when_the_training_is_over():
    x, y = regression()
    model = compiled_on(x, y)
    keys = set(vars(model))
    model.fit(x, y, verbose=0, callbacks=[keras_bn.Recalibrate(x, when="epoch")])
    assert not {"save", "save_weights", "export"} & (set(vars(model)) - keys)


REPLICAS = """
import numpy as np, tensorflow as tf
devices = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(devices[0], [tf.config.LogicalDeviceConfiguration()] * 2)
import keras, keras_bn
x = np.random.default_rng(0).normal(3, 2, (40, 4)).astype("float32")
with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
    model = keras.Sequential([keras.Input((4,)), keras_bn.BatchNormalization(synchronized=True), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
model.fit(x, x[:, :1], batch_size=10, epochs=2, verbose=0, callbacks=[keras_bn.Recalibrate(x, when="epoch")])
for variable, expected in ((model.layers[0].moving_mean, x.mean(0)), (model.layers[0].moving_variance, x.var(0))):
    copies = [component.numpy() for component in variable.value.values]
    assert len(copies) == 2, copies
    for copy in copies:
        np.testing.assert_allclose(copy, expected, rtol=1e-5)
"""


@pytest.mark.slow
def test_every_replica_gets_the_population_statistics():
    done = subprocess.run([sys.executable, "-c", REPLICAS], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
