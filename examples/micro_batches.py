"""Gradients accumulated over micro-batches, ghost statistics of the same size, and recalibration behind both.

`python -m examples.micro_batches [--quick]`, in a checkout.
"""

import argparse

import keras
import numpy as np
import tensorflow as tf

import keras_bn
from models import data

BATCH, MICRO = 128, 16


def network(virtual_batch_size: int | None = None) -> keras.Model:
    """A small CNN; with `virtual_batch_size` each group of so many examples has statistics of its own."""
    keras.utils.set_random_seed(0)
    layers = [keras.Input((28, 28, 1), name="image")]
    for width in (16, 32, 64):
        layers.append(keras.layers.Conv2D(width, 3, strides=2, padding="same", use_bias=False))
        layers.append(keras_bn.BatchNormalization(virtual_batch_size=virtual_batch_size, activation="relu"))
    layers += [keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(10)]
    return keras.Sequential(layers)


def loss_of(model: keras.Model, x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
    """The mean cross-entropy of a batch, in training."""
    return tf.reduce_mean(keras.losses.sparse_categorical_crossentropy(y, model(x, training=True), from_logits=True))


def gradients(model: keras.Model, x: np.ndarray, y: np.ndarray, size: int) -> list[np.ndarray]:
    """Those of the whole batch, `size` examples at a time."""
    total = [np.zeros(weight.shape) for weight in model.trainable_weights]
    for first in range(0, len(x), size):
        with tf.GradientTape() as tape:
            loss = loss_of(model, x[first : first + size], y[first : first + size])
        parts = tape.gradient(loss, [weight.value for weight in model.trainable_weights])
        total = [one + part.numpy() * size / len(x) for one, part in zip(total, parts, strict=True)]
    return total


def distance(one: list[np.ndarray], other: list[np.ndarray]) -> float:
    """Relative, of all gradients as one vector."""
    a, b = (np.concatenate([part.ravel() for part in parts]) for parts in (one, other))
    return float(np.linalg.norm(a - b) / np.linalg.norm(a))


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", help="folder or .npz with Fashion-MNIST (default: what is found)")
    parser.add_argument("--quick", action="store_true", help="few pictures, to see that it runs")
    options = parser.parse_args()
    images = data.load(options.data)
    count, epochs = (1024, 1) if options.quick else (12_800, 4)
    x, y = images.x_train[:count], images.y_train[:count]
    x_test, y_test = images.x_test[: count // 2], images.y_test[: count // 2]

    accumulated = gradients(network(), x[:BATCH], y[:BATCH], MICRO)
    ghost = gradients(network(virtual_batch_size=MICRO), x[:BATCH], y[:BATCH], BATCH)
    whole = gradients(network(), x[:BATCH], y[:BATCH], BATCH)
    print(f"Gradient of {BATCH} examples, {BATCH // MICRO} x {MICRO} accumulated; how far from it is that of one batch")
    print(f"  with virtual_batch_size={MICRO:<3}                    {distance(accumulated, ghost):.1e}")
    print(f"  with statistics of all {BATCH}                     {distance(accumulated, whole):.1e}")

    # Keras's optimizers add up gradients of so many steps themselves, and take their mean.
    steps = BATCH // MICRO
    ways = {
        f"{steps} micro-batches of {MICRO}": (network(), MICRO, steps),
        f"one batch of {BATCH}, ghosts of {MICRO}": (network(MICRO), BATCH, None),
        f"one batch of {BATCH}": (network(), BATCH, None),
    }
    rows = []
    for name, (model, size, accumulation) in ways.items():
        print(f"\n{name}", flush=True)
        optimizer = keras.optimizers.SGD(0.2, momentum=0.9, gradient_accumulation_steps=accumulation)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(optimizer, loss, metrics=["accuracy"])
        model.fit(x, y, batch_size=size, epochs=epochs, verbose=2)
        before = model.evaluate(x_test, y_test, batch_size=500, verbose=0)[1]
        # The moving statistics are an average over batches that the weights have left behind; these are exact.
        keras_bn.recalibrate(model, x, batch_size=500, verbose=0)
        after = model.evaluate(x_test, y_test, batch_size=500, verbose=0)[1]
        rows.append((name, before, after))
    print("\nAccuracy on test images           moving statistics   recalibrated")
    for name, before, after in rows:
        print(f"  {name:<35} {before:13.3f} {after:14.3f}")


if __name__ == "__main__":
    main()
