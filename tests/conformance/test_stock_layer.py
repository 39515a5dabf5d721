"""Ours in the place of Keras's layer: the same training, and each other's files."""

import subprocess
import sys
import textwrap

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_bn
from tests.reference import TOLERANCE, assert_close

DTYPES = ("float32", "float64", "mixed_float16", "mixed_bfloat16")
OURS, STOCK = keras_bn.BatchNormalization, keras.layers.BatchNormalization


def _network(normalization, dtype, axis=-1):
    keras.utils.set_random_seed(7)
    with_policy = {"dtype": dtype}
    return keras.Sequential(
        [
            keras.Input((8, 8, 3), dtype="float64" if dtype == "float64" else "float32"),
            keras.layers.Conv2D(6, 3, use_bias=False, **with_policy),
            normalization(axis=axis, name="first", **with_policy),
            keras.layers.ReLU(**with_policy),
            keras.layers.Flatten(**with_policy),
            keras.layers.Dense(5, **with_policy),
            normalization(name="second", scale=False, momentum=0.9, **with_policy),
            keras.layers.Dense(2, **with_policy),
        ]
    )


def _pair(dtype, axis=-1):
    ours, stock = _network(OURS, dtype, axis), _network(STOCK, dtype, axis)
    ours.set_weights(stock.get_weights())
    return ours, stock


def _data(dtype):
    rng = np.random.default_rng(3)
    kind = "float64" if dtype == "float64" else "float32"
    return rng.normal(0.5, 2.0, (24, 8, 8, 3)).astype(kind), rng.normal(size=(24, 2)).astype(kind)


def _gradients(model, x, y):
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(tf.square(tf.cast(model(x, training=True), y.dtype) - y))
    return tape.gradient(loss, [variable.value for variable in model.trainable_variables])


@pytest.mark.parametrize(
    ("mode", "dtype", "axis"),
    [
        *(("graph", dtype, -1) for dtype in DTYPES),
        ("eager", "float32", -1),
        ("graph", "float32", 1),
        ("jit_compile", "float32", -1),
        *(pytest.param("jit_compile", dtype, -1, marks=pytest.mark.slow) for dtype in DTYPES if dtype != "float32"),
        pytest.param("jit_compile", "float32", 1, marks=pytest.mark.slow),
    ],
)
def test_ten_training_steps_equal_those_of_the_stock_layer(mode, dtype, axis):
    ours, stock = _pair(dtype, axis)
    x, y = _data(dtype)
    for model in (ours, stock):
        model.compile(keras.optimizers.SGD(0.02), "mse", run_eagerly=mode == "eager", jit_compile=mode == "jit_compile")
        for step in range(10):
            rows = slice(step % 3 * 8, step % 3 * 8 + 8)
            model.train_on_batch(x[rows], y[rows])
    # Ten steps of a network amplify what one step rounds.
    for mine, theirs in zip(ours.weights, stock.weights, strict=True):
        assert_close(mine.numpy(), theirs.numpy(), dtype, scale=10)
    assert_close(ours.predict(x, verbose=0), stock.predict(x, verbose=0), dtype, scale=10)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_outputs_and_gradients_equal_those_of_the_stock_layer(dtype):
    ours, stock = _pair(dtype)
    x, y = _data(dtype)
    for mine, theirs in zip(_gradients(ours, x, y), _gradients(stock, x, y), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=50 * TOLERANCE[dtype], atol=5 * TOLERANCE[dtype])


def test_is_a_stock_layer_with_its_configuration_and_weights():
    ours, stock = OURS(name="one"), STOCK(name="one")
    assert isinstance(ours, STOCK)
    assert ours.get_config() == stock.get_config()
    ours.build((None, 4))
    stock.build((None, 4))
    assert [weight.path for weight in ours.weights] == [weight.path for weight in stock.weights]
    assert len(ours.non_trainable_weights) == 2


def test_configuration_makes_the_other_layer():
    config = OURS(axis=1, momentum=0.9, scale=False, name="one").get_config()
    assert STOCK.from_config(config).get_config() == config
    assert OURS.from_config(STOCK.from_config(config).get_config()).get_config() == config


@pytest.mark.parametrize("suffix", [".keras", ".h5", ".weights.h5"])
@pytest.mark.parametrize(("saved", "loaded"), [(OURS, STOCK), (STOCK, OURS)], ids=["ours to stock", "stock to ours"])
def test_each_loads_the_weights_from_the_file_of_the_other(saved, loaded, suffix, tmp_path):
    model, other = _network(saved, "float32"), _network(loaded, "float32")
    x, y = _data("float32")
    model.compile("sgd", keras.losses.MeanSquaredError())
    model.fit(x, y, verbose=0)
    path = tmp_path / f"model{suffix}"
    (model.save_weights if suffix == ".weights.h5" else model.save)(path)
    other.load_weights(path)
    np.testing.assert_allclose(other.predict(x, verbose=0), model.predict(x, verbose=0), rtol=1e-5, atol=1e-5)


def test_file_of_ours_loads_as_a_network_of_stock_layers_where_ours_is_not_installed(tmp_path):
    model = _network(OURS, "float32")
    x, _ = _data("float32")
    np.save(tmp_path / "x.npy", x)
    model.save(tmp_path / "model.keras")
    program = """
        import sys, keras, numpy
        names = {"keras_bn>BatchNormalization": keras.layers.BatchNormalization}
        model = keras.models.load_model("model.keras", custom_objects=names)
        numpy.save("y.npy", model.predict(numpy.load("x.npy"), verbose=0))
        sys.exit("keras_bn" in sys.modules)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], cwd=tmp_path, check=True)
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), model.predict(x, verbose=0), rtol=1e-5, atol=1e-5)


def test_stock_hdf5_file_loads_as_a_network_of_ours(tmp_path):
    model = _network(STOCK, "float32")
    model.save(tmp_path / "model.h5")
    ours = keras.models.load_model(tmp_path / "model.h5", custom_objects={"BatchNormalization": OURS})
    assert type(ours.get_layer("first")) is OURS
    x, _ = _data("float32")
    np.testing.assert_allclose(ours.predict(x, verbose=0), model.predict(x, verbose=0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("saved", "loaded"), [(OURS, STOCK), (STOCK, OURS)], ids=["ours to stock", "stock to ours"])
def test_each_loads_the_checkpoint_of_the_other(saved, loaded, tmp_path):
    model, other = _network(saved, "float32"), _network(loaded, "float32")
    x, y = _data("float32")
    model.compile("sgd", "mse")
    model.fit(x, y, verbose=0)
    path = tf.train.Checkpoint(model=model).save(str(tmp_path / "checkpoint"))
    tf.train.Checkpoint(model=other).restore(path).expect_partial()
    for mine, theirs in zip(other.weights, model.weights, strict=True):
        np.testing.assert_array_equal(mine.numpy(), theirs.numpy())
