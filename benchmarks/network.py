"""What does normalization cost a whole network? `python -m benchmarks.network`."""

from __future__ import annotations

import argparse
import functools
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from benchmarks import measuring
from models.console import positive

# The batch that each network is measured with.
NETWORKS = {"fashion_cnn": 128, "resnet": 128, "sigmoid_mlp": 60, "wide_mlp": 256, "depthwise": 128, "branches": 128}
TASKS = ("training", "inference", "evaluate")
MODES = ("graph", "eager", "jit_compile")
POLICIES = ("float32", "mixed_float16")
SERIES = ("without", "biases", "ours", "keras", "folded")
KEYS = ("network", "mode", "policy", "task")
COLUMNS = (*KEYS, "batch", *SERIES, "keras / ours", "share of ours", "share of keras", "folded / biases")
STEPS = 16


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.network",
        description="Median time in milliseconds of a training step (forward, backward, Adam), of inference in a graph "
        "as an export holds it, and of a batch in Keras's `evaluate`; all contestants in turn: the network less its "
        "normalizations, with biases in their place, with ours, with stock Keras's, and ours folded (which leaves "
        "biases). A share is what a normalization adds to the network without. Eager and mixed_float16: training only.",
    )
    choices = {"networks": tuple(NETWORKS), "modes": MODES, "policies": POLICIES, "tasks": TASKS, "series": SERIES}
    for name, values in choices.items():
        parser.add_argument(
            f"--{name}", nargs="+", choices=values, default=values, metavar=name.upper(), help=", ".join(values)
        )
    parser.add_argument("--seconds", type=positive, default=10.0, help="for each question (default: 10)")
    parser.add_argument("--name", default="network", help="of the files below benchmarks/results (default: network)")
    flags = parser.parse_args()
    questions = [
        (network, mode, policy, task)
        for network in flags.networks
        for mode in flags.modes
        for policy in flags.policies
        for task in flags.tasks
        if _is_asked(mode, policy, task)
    ]
    rows = [_measure(*question, flags.series, flags.seconds) for question in measuring.progress(questions, "network")]
    rows = measuring.with_earlier(flags.name, rows, KEYS)
    measuring.save(flags.name, rows, COLUMNS)
    picture = measuring.bars(flags.name, rows, lambda row: " ".join(row[key] for key in KEYS), SERIES)
    print(f"\n{picture}")


def _is_asked(mode: str, policy: str, task: str) -> bool:
    if task != "training":
        return policy == "float32" and (mode == "graph" or (mode == "jit_compile" and task == "inference"))
    return policy == "float32" or mode == "graph"


def _measure(network: str, mode: str, policy: str, task: str, series: tuple[str, ...], seconds: float) -> dict:
    import keras
    import tensorflow as tf

    batch = NETWORKS[network]
    images = tf.random.uniform([batch, 28, 28, 1])
    labels = tf.one_hot(tf.random.uniform([batch], 0, 10, tf.int32), 10)
    contestants = {}
    for name in series:
        if name == "folded" and task == "training":
            continue
        model = build(network, name, policy)
        if task == "evaluate":
            model.compile(loss="categorical_crossentropy", steps_per_execution=STEPS)
            data = tf.data.Dataset.from_tensors((images, labels)).repeat(STEPS)
            contestants[name] = functools.partial(model.evaluate, data, verbose=0)
            continue
        function = training_step(model) if task == "training" else functools.partial(model, training=False)
        if mode != "eager":
            function = tf.function(function, jit_compile=mode == "jit_compile", autograph=False)
        arguments = (images, labels) if task == "training" else (images,)
        contestants[name] = functools.partial(function, *arguments)
    times = measuring.interleaved(contestants, seconds)
    if task == "evaluate":
        times = {name: value / STEPS for name, value in times.items()}
    keras.backend.clear_session()

    def ratio(one: str, other: str) -> float | None:
        return times[one] / times[other] if one in times and other in times else None

    def share(name: str) -> float | None:
        whole = ratio(name, "without")
        return None if whole is None else whole - 1

    return {
        **dict(zip(KEYS, (network, mode, policy, task), strict=True)),
        "batch": batch,
        **times,
        "keras / ours": ratio("keras", "ours"),
        "share of ours": share("ours"),
        "share of keras": share("keras"),
        "folded / biases": ratio("folded", "biases"),
    }


def build(network: str, name: str, policy: str = "float32"):
    """A network of `models.networks`, or one of those below, with one of `SERIES`."""
    import keras

    import keras_bn
    from models import networks

    normalization = {
        "without": keras.layers.Identity,
        "biases": None,
        "keras": keras.layers.BatchNormalization,
    }.get(name, keras_bn.BatchNormalization)
    keras.utils.set_random_seed(0)
    earlier = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        model = (globals().get(f"_{network}") or getattr(networks, network))(normalization=normalization)
    finally:
        keras.config.set_dtype_policy(earlier)
    return keras_bn.fold(model).model if name == "folded" else model


def _wide_mlp(normalization):
    from models import networks

    return networks.sigmoid_mlp(width=512, depth=4, normalization=normalization)


def _depthwise(normalization):
    """Depthwise separable blocks, as MobileNet has them: little arithmetic beside each normalization."""
    import keras
    from keras import layers

    image = x = keras.Input((28, 28, 1), name="image")
    x = _activated(layers.Conv2D(16, 3, padding="same", use_bias=normalization is None)(x), normalization)
    for channels, strides in ((32, 1), (64, 2), (64, 1), (128, 2), (128, 1)):
        x = layers.DepthwiseConv2D(3, strides, padding="same", use_bias=normalization is None)(x)
        x = _activated(x, normalization)
        x = _activated(layers.Conv2D(channels, 1, use_bias=normalization is None)(x), normalization)
    return _classifier(image, x)


def _branches(normalization):
    """Two branches side by side: what if two normalizations run at the same time, on TensorFlow's threads and ours?"""
    import keras
    from keras import layers

    image = keras.Input((28, 28, 1), name="image")
    ends = []
    for size in (1, 3):
        x = image
        for channels in (16, 32, 32):
            x = layers.Conv2D(channels, size, padding="same", use_bias=normalization is None)(x)
            x = _activated(x, normalization)
        ends.append(x)
    return _classifier(image, layers.Add()(ends))


def _activated(x, normalization):
    from keras import layers

    return layers.ReLU()(x if normalization is None else normalization()(x))


def _classifier(image, x):
    import keras
    from keras import layers

    x = layers.Dense(10)(layers.GlobalAveragePooling2D()(x))
    return keras.Model(image, layers.Activation("softmax", dtype="float32")(x))


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
