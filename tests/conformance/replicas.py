"""A program for test_replicas.py: `replicas.py FILE DTYPE` trains a step on four replicas in every way, and writes it.

A process of its own, since TensorFlow splits a CPU only before it is first used.
"""

import itertools
import sys
import tempfile
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

import keras_bn

AXES = (-1, 1)
SHAPES = {2: (12, 6), 4: (12, 6, 3, 5)}
# Shares of one, four, five and two examples.
SPLITS = (1, 5, 10)
SYNCHRONIZED = {"all": True, "groups": 2, "none": False}
MOMENTUM = 0.75
CELLS = list(itertools.product(SYNCHRONIZED, AXES, SHAPES, ("memory", "file")))


def inputs(rank, dtype):
    """x and the gradient of y, of values that the dtype represents exactly; gamma, beta, moving mean and variance."""
    rng, compute = np.random.default_rng(0), keras.DTypePolicy(dtype).compute_dtype
    x, dy = (np.asarray(tf.cast(rng.normal(1.5, 2.0, SHAPES[rank]), compute), "float64") for _ in range(2))
    return x, dy


def weights(channels):
    rng = np.random.default_rng(1)
    return [rng.normal(1, 0.3, channels), *rng.normal(size=(2, channels)), rng.uniform(1, 3, channels)]


def _layer(strategy, dtype, axis, rank, synchronized, where):
    layer = keras_bn.BatchNormalization(
        axis=axis, momentum=MOMENTUM, dtype=dtype, synchronized=SYNCHRONIZED[synchronized], name="normalization"
    )
    given = keras.Input(SHAPES[rank][1:], dtype=layer.compute_dtype)
    if where == "memory":
        with strategy.scope():
            layer.build((None, *SHAPES[rank][1:]))
            layer.set_weights(weights(layer.gamma.shape[0]))
        return layer
    model = keras.Model(given, layer(given))
    layer.set_weights(weights(layer.gamma.shape[0]))
    with tempfile.TemporaryDirectory() as folder:
        model.save(Path(folder) / "model.keras")
        with strategy.scope():
            return keras.models.load_model(Path(folder) / "model.keras").get_layer("normalization")


def _step(strategy, layer, x, dy):
    parts = [[tf.constant(part, layer.compute_dtype) for part in np.split(whole, SPLITS)] for whole in (x, dy)]

    def local(x, dy):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True)
            loss = tf.reduce_sum(tf.cast(y, tf.float64) * tf.cast(dy, tf.float64))
        return y, tape.gradient(loss, [x, layer.gamma.value, layer.beta.value])

    @tf.function(autograph=False)
    def step():
        values = [
            strategy.experimental_distribute_values_from_function(lambda context, i=i: parts[i][_number(context)])
            for i in range(2)
        ]
        return strategy.run(local, values)

    y, (dx, dgamma, dbeta) = step()
    of_replicas = [
        [np.asarray(part, "float64") for part in strategy.experimental_local_results(value)]
        for value in (y, dx, dgamma, dbeta)
    ]
    return *map(np.concatenate, of_replicas[:2]), *map(sum, of_replicas[2:])


def _number(context):
    return context.replica_id_in_sync_group


def main(path, dtype):
    (cpu,) = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * (len(SPLITS) + 1))
    strategy = tf.distribute.MirroredStrategy([f"CPU:{number}" for number in range(len(SPLITS) + 1)])
    results = {}
    for synchronized, axis, rank, where in CELLS:
        layer = _layer(strategy, dtype, axis, rank, synchronized, where)
        step = _step(strategy, layer, *inputs(rank, dtype))
        names = ("y", "dx", "dgamma", "dbeta")
        key = f"{synchronized}/{axis}/{rank}/{where}"
        results |= {f"{key}/{name}": value for name, value in zip(names, step, strict=True)}
        for variable in (layer.moving_mean, layer.moving_variance):
            copies = strategy.experimental_local_results(variable.value)
            results[f"{key}/{variable.name}"] = np.stack([copy.numpy() for copy in copies])
    np.savez(path, **results)


if __name__ == "__main__":
    main(*sys.argv[1:])
