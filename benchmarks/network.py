"""What does normalization cost a whole network? `python -m benchmarks.network`."""

from __future__ import annotations

import argparse
import functools
import itertools
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from benchmarks import measuring

NETWORKS = ("fashion_cnn", "resnet")
TASKS = ("training", "inference")
MODES = ("graph", "jit_compile")
SERIES = ("without", "biases", "ours", "keras", "folded")
COLUMNS = ("network", "mode", "task", "batch", *SERIES, "share of ours", "share of keras", "folded / biases")
BATCH = 128


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.network",
        description="Median time of a training step (forward, backward, Adam) and of inference, in milliseconds, all "
        "contestants in turn: the network less its normalizations, with biases in their place, with ours, with stock "
        "Keras's, and ours folded (which leaves biases). A share is what a normalization adds to the network without.",
    )
    for name, choices in {"networks": NETWORKS, "modes": MODES, "tasks": TASKS}.items():
        parser.add_argument(
            f"--{name}", nargs="+", choices=choices, default=choices, metavar=name.upper(), help=", ".join(choices)
        )
    parser.add_argument("--seconds", type=float, default=10.0, help="for each question (default: 10)")
    parser.add_argument("--name", default="network", help="of the files below benchmarks/results (default: network)")
    flags = parser.parse_args()
    questions = list(itertools.product(flags.networks, flags.modes, flags.tasks))
    rows = [_measure(*question, flags.seconds) for question in measuring.progress(questions, "network")]
    measuring.save(flags.name, rows, COLUMNS)
    picture = measuring.bars(
        flags.name, rows, lambda row: f"{row['network']} {row['mode']} {row['task']} of {row['batch']}", SERIES
    )
    print(f"\n{picture}")


def _measure(network: str, mode: str, task: str, seconds: float) -> dict:
    import tensorflow as tf

    images = tf.random.uniform([BATCH, 28, 28, 1])
    labels = tf.one_hot(tf.random.uniform([BATCH], 0, 10, tf.int32), 10)
    contestants = {}
    for name in SERIES:
        if name == "folded" and task == "training":
            continue
        model = build(network, name)
        run = training_step(model) if task == "training" else functools.partial(model, training=False)
        function = tf.function(run, jit_compile=mode == "jit_compile", autograph=False)
        arguments = (images, labels) if task == "training" else (images,)
        contestants[name] = functools.partial(function, *arguments)
    times = measuring.interleaved(contestants, seconds)
    return {
        "network": network,
        "mode": mode,
        "task": task,
        "batch": BATCH,
        **times,
        "share of ours": times["ours"] / times["without"] - 1,
        "share of keras": times["keras"] / times["without"] - 1,
        "folded / biases": times["folded"] / times["biases"] if "folded" in times else None,
    }


def build(network: str, name: str):
    """A network of `models.networks` with one of `SERIES`."""
    import keras

    import keras_bn
    from models import networks

    normalization = {
        "without": keras.layers.Identity,
        "biases": None,
        "keras": keras.layers.BatchNormalization,
    }.get(name, keras_bn.BatchNormalization)
    keras.utils.set_random_seed(0)
    model = getattr(networks, network)(normalization=normalization)
    return keras_bn.fold(model).model if name == "folded" else model


def training_step(model):
    """Forward, backward and Adam as a function of images and labels."""
    import keras
    import tensorflow as tf

    optimizer = keras.optimizers.Adam(1e-4)
    optimizer.build(model.trainable_variables)
    loss = keras.losses.CategoricalCrossentropy()

    def step(images, labels):
        with tf.GradientTape() as tape:
            value = loss(labels, model(images, training=True))
        weights = model.trainable_variables
        optimizer.apply_gradients(zip(tape.gradient(value, [w.value for w in weights]), weights, strict=True))
        return value

    return step


if __name__ == "__main__":
    main()
