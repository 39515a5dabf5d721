"""A program for test_synchronized.py: trains on two or four logical CPU devices and writes what came out.

A process of its own, since TensorFlow splits a CPU only before it is first used.
"""

import sys

import keras
import numpy as np
import tensorflow as tf

import keras_bn


def _strategy(replicas):
    (cpu,) = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * replicas)
    return tf.distribute.MirroredStrategy([f"CPU:{number}" for number in range(replicas)])


def _step(strategy, layer, parts, masks, jit_compile):
    """One training step with `parts[i]` on replica i: outputs, gradients of sum(y**3) and moving statistics."""

    def local(x, mask):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True, mask=mask)
            loss = tf.reduce_sum(y**3)
        return y, tape.gradient(loss, x)

    @tf.function(jit_compile=jit_compile, autograph=False)
    def step():
        def on_replica(context):
            return context.replica_id_in_sync_group

        values = strategy.experimental_distribute_values_from_function(lambda context: parts[on_replica(context)])
        weights = None
        if masks is not None:
            weights = strategy.experimental_distribute_values_from_function(lambda context: masks[on_replica(context)])
        return strategy.run(local, (values, weights))

    y, gradient = step()
    return [strategy.experimental_local_results(value) for value in (y, gradient)]


def _of_two(strategy, rng):
    """Equal, unequal and empty shares, masked and not, near zero and far from it; and what `fit` makes."""
    results = {}
    offsets = {"near": 0.0, "far": 1e6}
    for name, sizes in {"equal": (6, 6), "uneven": (9, 3), "empty": (12, 0)}.items():
        for where, offset in offsets.items():
            x = (rng.normal(1, 2, (12, 5, 4)) + offset).astype("float32")
            parts = [tf.constant(x[: sizes[0]]), tf.constant(x[sizes[0] :])]
            masks = {
                "plain": None,
                "masked": rng.uniform(size=(12, 5)) < 0.7,
                "weighted": rng.uniform(0, 0.04, (12, 5)).astype("float32"),
            }
            for kind, mask in masks.items():
                with strategy.scope():
                    layer = keras_bn.BatchNormalization(momentum=0.0, synchronized=True, unbiased_variance=True)
                    layer.build((None, 5, 4))
                split = None if mask is None else [tf.constant(mask[: sizes[0]]), tf.constant(mask[sizes[0] :])]
                y, gradient = _step(strategy, layer, parts, split, False)
                key = f"{name}-{where}-{kind}"
                results |= {
                    f"{key}/x": x,
                    f"{key}/mask": np.ones((12, 5), int) if mask is None else mask,
                    f"{key}/y": np.concatenate(y),
                    f"{key}/dx": np.concatenate(gradient),
                    f"{key}/mean": layer.moving_mean.numpy(),
                    f"{key}/variance": layer.moving_variance.numpy(),
                }
    with strategy.scope():
        model = keras.Sequential([keras.Input((4,)), keras_bn.BatchNormalization(momentum=0.0, synchronized=True)])
        model.compile("sgd", "mse")
    x = rng.normal(3, 2, (32, 4)).astype("float32")
    model.fit(x, x, batch_size=32, verbose=0)
    results |= {"fit/x": x, "fit/mean": model.layers[0].moving_mean.numpy()}
    results["fit/variance"] = model.layers[0].moving_variance.numpy()
    return results


def _of_four(strategy, rng):
    """What groups of two, all together and each alone make of unequal shares, far from zero and constant but for three
    channels; and what is said where it is not known whether they train."""
    x = (rng.normal(1, 2, (12, 5, 40)) + 1e6).astype("float32")
    x[..., 3:] = x[0, 0, 3:]
    parts = [tf.constant(part) for part in np.split(x, [1, 5, 10])]
    results = {"four/x": x}
    for name, synchronized in {"groups": 2, "all": True, "none": False}.items():
        with strategy.scope():
            layer = keras_bn.BatchNormalization(momentum=0.0, synchronized=synchronized)
            layer.build(x.shape)
        y, gradient = _step(strategy, layer, parts, None, False)
        results |= {f"four/{name}/y": np.concatenate(y), f"four/{name}/dx": np.concatenate(gradient)}
        for variable in (layer.moving_mean, layer.moving_variance):
            local = strategy.experimental_local_results(variable.value)
            results[f"four/{name}/{variable.name}"] = np.stack([value.numpy() for value in local])
    for name, synchronized, training in (("threes", 3, True), ("unknown", False, None)):
        with strategy.scope():
            layer = keras_bn.BatchNormalization(synchronized=synchronized)
            layer.build((None, 4))

        @tf.function(autograph=False)
        def step(unknown, layer=layer, training=training):
            values = tf.ones([3, 4])
            return strategy.run(lambda: layer(values, training=unknown if training is None else training))

        try:
            step(tf.constant(True))
        except ValueError as error:
            results[f"four/{name}/error"] = np.array(str(error))
    return results


if __name__ == "__main__":
    kind = {"2": _of_two, "4": _of_four}[sys.argv[2]]
    np.savez(sys.argv[1], **kind(_strategy(int(sys.argv[2])), np.random.default_rng(0)))
