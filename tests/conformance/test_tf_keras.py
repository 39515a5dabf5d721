"""Ours against the legacy layer of tf_keras: fused, plain, ghost batch norm and renorm."""

import numpy as np
import pytest
import tensorflow as tf

import keras_bn

legacy = pytest.importorskip("tf_keras", reason="tf_keras, of the `test` extra, is not installed")

_CASES = {
    "fused": ((16, 4, 4, 3), {"fused": True}, {"unbiased_variance": True}),
    "plain": ((16, 4, 4, 3), {"fused": False}, {}),
    "plain, rank 2": ((16, 3), {"fused": False}, {}),
    "channels first": ((16, 3, 4), {"fused": False, "axis": 1}, {"axis": 1}),
    "groups": ((16, 4, 4, 3), {"virtual_batch_size": 4}, {"virtual_batch_size": 4}),
    "renorm": ((16, 3), {"renorm": True, "renorm_momentum": 0.8}, {"renorm": True, "renorm_momentum": 0.8}),
    "renorm, clipped": (
        (16, 4, 4, 3),
        {"renorm": True, "renorm_clipping": {"rmax": 1.2, "rmin": 0.7, "dmax": 0.3}},
        {"renorm": True, "renorm_clipping": {"rmax": 1.2, "rmin": 0.7, "dmax": 0.3}},
    ),
    "two axes": ((16, 4, 3), {"fused": False, "axis": [1, 2]}, {"axis": [1, 2]}),
}


def _step(layer, x, dy):
    variables = [layer.gamma, layer.beta]
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = layer(x, training=True)
        loss = tf.reduce_sum(y * dy)
    return y, *tape.gradient(loss, [x, *map(_variable, variables)])


def _variable(variable):
    """The TensorFlow variable: Keras 3 wraps it, tf_keras does not."""
    return variable if isinstance(variable, tf.Variable) else variable.value


def _value(variable):
    return np.squeeze(_variable(variable).numpy())


@pytest.mark.parametrize("case", _CASES)
def test_training_equals_the_legacy_layer(case):
    shape, theirs_options, ours_options = _CASES[case]
    theirs = legacy.layers.BatchNormalization(momentum=0.9, **theirs_options)
    ours = keras_bn.BatchNormalization(momentum=0.9, **ours_options)
    theirs.build(shape)
    ours.build(shape)
    rng = np.random.default_rng(0)
    for name in ("gamma", "beta"):
        value = rng.normal(1, 0.3, getattr(ours, name).shape).astype("float32")
        getattr(ours, name).assign(value)
        getattr(theirs, name).assign(np.reshape(value, getattr(theirs, name).shape))
    order = np.arange(16)
    if "virtual_batch_size" in theirs_options:
        # The legacy layer deals the examples out to its groups in turn; ours groups neighbours.
        order = order.reshape(theirs_options["virtual_batch_size"], -1).T.ravel()
    for _ in range(4):
        x = tf.constant(rng.normal(1, 2, shape), "float32")
        dy = tf.constant(rng.normal(size=shape), "float32")
        legacy_values = [np.squeeze(value) for value in _step(theirs, x, dy)]
        values = [np.squeeze(value) for value in _step(ours, tf.gather(x, order), tf.gather(dy, order))]
        for got, want in zip(values, [*(value[order] for value in legacy_values[:2]), *legacy_values[2:]], strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    names = ["moving_mean", "moving_variance"]
    if "renorm" in case:
        names += ["moving_stddev", "renorm_mean", "renorm_stddev"]
    for name in names:
        np.testing.assert_allclose(_value(getattr(ours, name)), _value(getattr(theirs, name)), rtol=1e-5, atol=1e-5)
    x = tf.constant(rng.normal(1, 2, shape), "float32")
    np.testing.assert_allclose(ours(x), theirs(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("axis", [-1, 1])
def test_inference_equals_the_fused_legacy_layer(axis):
    shape = (4, 5, 5, 3)
    theirs = legacy.layers.BatchNormalization(axis=axis)
    ours = keras_bn.BatchNormalization(axis=axis)
    theirs.build(shape)
    ours.build(shape)
    rng = np.random.default_rng(0)
    weights = [rng.uniform(0.5, 2, weight.shape) for weight in ours.weights]
    ours.set_weights(weights)
    theirs.set_weights(weights)
    x = tf.constant(rng.normal(size=shape), "float32")
    np.testing.assert_allclose(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
