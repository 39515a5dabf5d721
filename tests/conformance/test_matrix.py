"""Every way to run the layer, in every precision, layout and rank, in memory and from a file: all equal the oracle."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_bn
from tests.reference import Reference, assert_close

MODES = ("eager", "graph", "jit_compile")
DTYPES = ("float32", "mixed_float16", "mixed_bfloat16", "float64")
AXES = (-1, 1)
SHAPES = {2: (24, 6), 3: (8, 6, 5), 4: (4, 6, 3, 5), 5: (4, 6, 2, 3, 5)}
MOMENTUM = 0.75


def _input(rank, dtype, seed=0):
    """Values that the dtype represents exactly, so that the oracle sees what the layer sees."""
    policy = keras.DTypePolicy(dtype)
    rng = np.random.default_rng(seed)
    x = rng.normal(1.5, 2.0, SHAPES[rank])
    return tf.cast(x, policy.compute_dtype), tf.cast(rng.normal(size=SHAPES[rank]), policy.compute_dtype)


def _built_layer(dtype, axis, rank):
    layer = keras_bn.BatchNormalization(axis=axis, momentum=MOMENTUM, dtype=dtype, name="normalization")
    layer.build((None, *SHAPES[rank][1:]))
    rng = np.random.default_rng(1)
    channels = layer.gamma.shape
    layer.set_weights(
        [
            rng.normal(1, 0.3, channels),
            rng.normal(size=channels),
            rng.normal(size=channels),
            rng.uniform(1, 3, channels),
        ]
    )
    return layer


def _step(layer, mode):
    """One training step: output and gradients."""

    def step(x, dy):
        variables = [layer.gamma.value, layer.beta.value]
        with tf.GradientTape() as tape:
            tape.watch([x, *variables])
            y = layer(x, training=True)
            loss = tf.reduce_sum(tf.cast(y, tf.float64) * tf.cast(dy, tf.float64))
        return y, tape.gradient(loss, [x, *variables])

    return _compiled(step, mode)


def _compiled(function, mode):
    return function if mode == "eager" else tf.function(function, jit_compile=mode == "jit_compile", autograph=False)


def _check_training(layer, mode, axis, rank, dtype):
    x, dy = _input(rank, dtype)
    gamma, beta, mean, variance = (weight.numpy() for weight in layer.weights)
    oracle = Reference(x, axis, gamma, beta)
    y, gradients = _step(layer, mode)(x, dy)
    assert y.dtype == layer.compute_dtype
    assert_close(y, oracle.y, dtype, scale=4)
    for got, want in zip(gradients, oracle.gradients(dy), strict=True):
        assert_close(got, want, dtype, scale=max(1, np.abs(want).max()))
    assert_close(layer.moving_mean, MOMENTUM * mean + (1 - MOMENTUM) * oracle.batch_mean, _accumulated(dtype))
    assert_close(
        layer.moving_variance, MOMENTUM * variance + (1 - MOMENTUM) * oracle.biased_variance, _accumulated(dtype), 4
    )


def _accumulated(dtype):
    return "float64" if dtype == "float64" else "float32"


def _check_inference(call, weights, mode, axis, rank, dtype):
    x, _ = _input(rank, dtype)
    gamma, beta, mean, variance = weights
    before = Reference(x, axis, gamma, beta).inference(mean, variance)
    assert_close(_compiled(call, mode)(x), before, dtype, scale=4)


def _cells(*dimensions):
    """All combinations; those of rank 3 and 5 beyond float32, whose code is that of rank 2 and 4, are slow."""
    for cell in itertools.product(*dimensions, DTYPES, AXES, SHAPES):
        *_, dtype, _, rank = cell
        yield pytest.param(*cell, marks=[pytest.mark.slow] if rank in (3, 5) and dtype != "float32" else [])


@pytest.mark.parametrize(("mode", "dtype", "axis", "rank"), list(_cells(MODES)), ids=str)
def test_training_and_inference_in_memory_equal_the_oracle(mode, dtype, axis, rank):
    layer = _built_layer(dtype, axis, rank)
    _check_training(layer, mode, axis, rank, dtype)
    weights = [weight.numpy() for weight in layer.weights]
    _check_inference(lambda x: layer(x, training=False), weights, mode, axis, rank, dtype)
    for weight, before in zip(layer.weights, weights, strict=True):
        np.testing.assert_array_equal(weight.numpy(), before)


@pytest.mark.parametrize(("dtype", "axis", "rank"), list(_cells()), ids=str)
def test_layer_from_files_equals_the_oracle(dtype, axis, rank, tmp_path):
    layer = _built_layer(dtype, axis, rank)
    weights = [weight.numpy() for weight in layer.weights]
    inputs = keras.Input(SHAPES[rank][1:], dtype=layer.compute_dtype)
    model = keras.Model(inputs, layer(inputs))

    model.save(tmp_path / "model.keras")
    reloaded = keras.models.load_model(tmp_path / "model.keras").get_layer("normalization")
    assert reloaded.get_config() == layer.get_config()
    for mode in MODES:
        _check_inference(lambda x: reloaded(x, training=False), weights, mode, axis, rank, dtype)
    _check_training(reloaded, "graph", axis, rank, dtype)

    model.export(tmp_path / "saved_model", verbose=False)
    served = tf.saved_model.load(str(tmp_path / "saved_model"))
    for mode in MODES:
        _check_inference(served.serve, weights, mode, axis, rank, dtype)
