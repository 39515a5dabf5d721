"""A program for test_shards.py: recalibrates with data in several places and writes what came out.

One process with two logical CPU devices, or, where `TF_CONFIG` is set, one of several workers.
"""

import os
import sys
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

import keras_bn

ROWS, BATCH = 41, 8
OPTIONS = [
    {"method": method, "order": order} for method in ("pooled", "algorithm2") for order in ("sequential", "joint")
]


def data():
    rng = np.random.default_rng(0)
    return rng.normal(3, 2, (ROWS, 6, 6, 3)).astype("float32"), rng.integers(0, 3, ROWS)


def model():
    """Two normalizations, one of them with moving statistics that each replica would have of its own."""
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((6, 6, 3)),
            keras.layers.Conv2D(4, 3, use_bias=False),
            keras_bn.BatchNormalization(synchronized=2, name="first"),
            keras.layers.Conv2D(4, 3, use_bias=False, activation="relu"),
            keras.layers.BatchNormalization(name="second"),
        ]
    )


def statistics(network):
    return {f"{v.path.split('/', 1)[1]}": v.numpy() for v in network.non_trainable_variables}


def whole(method, order, batch_size=BATCH):
    """What one process makes of all data."""
    network = model()
    keras_bn.recalibrate(network, data()[0], method=method, order=order, batch_size=batch_size, verbose=0)
    return statistics(network)


def shares(count):
    """Of very different sizes, whose batches are those of the whole."""
    x, _ = data()
    return np.split(x, [BATCH * 4, *range(BATCH * 5, BATCH * (count + 3), BATCH)])[:count]


def mirrored():
    (cpu,) = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    x, weights = data()
    batches = tf.data.Dataset.from_tensor_slices((x, weights, weights)).batch(BATCH)
    results = {}
    kinds = {
        "dataset": lambda: strategy.experimental_distribute_dataset(batches),
        "iterator": lambda: iter(strategy.experimental_distribute_dataset(batches)),
        "function": lambda: strategy.distribute_datasets_from_function(lambda context: batches),
        "values": lambda: list(strategy.experimental_distribute_dataset(batches)),
        "steps": lambda: strategy.experimental_distribute_dataset(batches.repeat()),
    }
    for kind, make in kinds.items():
        with strategy.scope():
            network = model()
        keras_bn.recalibrate(network, make(), steps=12 if kind == "steps" else None, verbose=0)
        results |= {f"{kind}/{name}": value for name, value in statistics(network).items()}
        for variable in network.non_trainable_variables:
            copies = [copy.numpy() for copy in strategy.experimental_local_results(variable.value)]
            results[f"{kind}/copies of {variable.path}"] = np.stack(copies)
    measured = keras_bn.measure(network, kinds["dataset"](), verbose=0)
    results |= {f"measured/{name}": np.stack(moments) for name, moments in measured.items()}
    return results


def bytes_sent(strategy, synchronized, channels=7):
    """What the graph of a training step hands over to other workers for each channel: forward, backward, averages."""
    with strategy.scope():
        layer = keras_bn.BatchNormalization(synchronized=synchronized)
        layer.build((None, channels))

    def local(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = tf.reduce_sum(layer(x, training=True) ** 3)
        return tape.gradient(loss, x)

    step = tf.function(lambda x: strategy.run(local, (x,)), autograph=False)
    graph = step.get_concrete_function(tf.TensorSpec([None, channels])).graph
    sent = [operation.inputs[0] for operation in graph.get_operations() if operation.type == "CollectiveReduceV2"]
    return sum(tensor.shape.num_elements() * tensor.dtype.size for tensor in sent) / channels


def worker(strategy):
    resolver = strategy.cluster_resolver
    count, index = len(resolver.cluster_spec().as_dict()["worker"]), resolver.task_id
    share = shares(count)[index]
    with strategy.scope():
        network = model()
    results = {}
    for options in OPTIONS:
        keras_bn.recalibrate(network, share, batch_size=BATCH, verbose=0, **options)
        key = "/".join(options.values())
        results |= {f"{key}/{name}": value for name, value in statistics(network).items()}

    def error_of(**options):
        try:
            keras_bn.recalibrate(network, batch_size=BATCH, verbose=0, **options)
        except (ValueError, KeyboardInterrupt) as error:
            return np.array(f"{type(error).__name__}: {error}")

    def interrupted(batches):
        yield batches[:BATCH]
        raise KeyboardInterrupt

    results |= {f"bytes/{synchronized}": bytes_sent(strategy, synchronized) for synchronized in (True, False)}
    before = statistics(network)
    last = index == count - 1
    results["error/non-finite"] = error_of(data=share * np.float32("nan") if last else share)
    results["error/empty"] = error_of(data=share[:0] if last else share)
    results["error/option"] = error_of(data=share, **({"method": "mean"} if last else {}))
    results["error/tolerance"] = error_of(data=share, tolerance=0.1 if last else None)
    results["error/method"] = error_of(data=share, method="algorithm2" if last else "pooled")
    results["error/order"] = error_of(data=share, order="joint" if last else "sequential")
    results["error/interrupted"] = error_of(data=interrupted(share) if last else share)
    results["error/layers"] = error_of(data=share, layers=["first" if last else "second"])
    results["error/nothing changed"] = all(np.array_equal(before[k], v) for k, v in statistics(network).items())
    batches = tf.data.Dataset.from_tensor_slices(data()[0]).batch(BATCH)
    keras_bn.recalibrate(network, strategy.experimental_distribute_dataset(batches), verbose=0)
    results |= {f"dataset/{name}": value for name, value in statistics(network).items()}
    # Who leaves while others work is taken for dead.
    keras_bn.recalibrate(network, share, batch_size=BATCH, verbose=0)
    return results


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    if "TF_CONFIG" in os.environ:
        strategy = tf.distribute.MultiWorkerMirroredStrategy()
        np.savez(folder / f"{strategy.cluster_resolver.task_id}.npz", **worker(strategy))
    else:
        np.savez(folder / "0.npz", **mirrored())
