"""Training that runs many steps in one call, and what is asked of it: curves, and the steps to a target."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

Augment = Callable[[tf.Tensor, tf.Tensor], tf.Tensor]


class Trainer:
    """A network, an optimizer and an endless order of batches, a pure function of the seed.

    Each pass over the images has an order of its own, and leaves out those that make no whole batch.

    Args:
        model: With a layer `logits`, as the networks of `models.networks` have.
        optimizer: Not used before.
        x: Training images.
        y: Their classes.
        batch_size: Images in a batch, at most as many as there are.
        seed: Of the order and the augmentation; not of the weights, which `model` has.
        augment: As in `models.data.training_batches`.

    Raises:
        ValueError: `batch_size` is out of range.
    """

    def __init__(
        self,
        model: keras.Model,
        optimizer: keras.optimizers.Optimizer,
        x: np.ndarray,
        y: np.ndarray,
        batch_size: int,
        seed: int,
        augment: Augment | None = None,
    ):
        if not 1 <= batch_size <= len(x):
            raise ValueError(f"`batch_size` must be in [1, {len(x)}], the number of images. Received: {batch_size}")
        self.model, self.optimizer = model, optimizer
        self.step = 0
        optimizer.build(model.trainable_variables)
        self._variables = [*model.variables, *optimizer.variables]
        self._initial = [variable.numpy() for variable in self._variables]
        network, self._images, self._labels = logits_of(model), tf.constant(x), tf.constant(y)
        batches = len(x) // batch_size

        def batch(step: tf.Tensor, images: tf.Tensor, labels: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            places = step % batches * batch_size + tf.range(batch_size)
            chosen = tf.random.experimental.index_shuffle(places, tf.stack([seed, step // batches]), len(x) - 1)
            picked = tf.gather(images, chosen)
            if augment is not None:
                picked = augment(picked, tf.stack([seed, step]))
            return picked, tf.gather(labels, chosen)

        # The images are arguments: a graph with a `tf.custom_gradient` stays for good, and so would what it captured.
        @tf.function
        def steps(begin: tf.Tensor, end: tf.Tensor, images: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
            total = tf.constant(0.0)
            for step in tf.range(begin, end):
                batch_images, batch_labels = batch(step, images, labels)
                with tf.GradientTape() as tape:
                    loss = cross_entropy(network(batch_images, training=True), batch_labels)
                variables = model.trainable_variables
                optimizer.apply(tape.gradient(loss, [variable.value for variable in variables]), variables)
                total += loss
            return total / tf.cast(tf.maximum(end - begin, 1), tf.float32)

        self._steps = steps

    def train(self, steps: int) -> float:
        """Take so many steps.

        Returns:
            The mean of their losses; not finite where the training has diverged.
        """
        begin, end = tf.constant(self.step), tf.constant(self.step + steps)
        loss = float(self._steps(begin, end, self._images, self._labels))
        self.step += steps
        return loss

    def reset(self, learning_rate: float) -> None:
        """Go back to the beginning, with another learning rate."""
        for variable, value in zip(self._variables, self._initial, strict=True):
            variable.assign(value)
        self.optimizer.learning_rate.assign(learning_rate)
        self.step = 0


class Accuracy:
    """The share of images that a network answers rightly, computed in one call.

    What the network's normalizations use (`keras_bn.use_statistics`) is settled by the first call.

    Args:
        model: As for `Trainer`.
        x: Images.
        y: Their classes.
        batch_size: Images computed at a time; those that are left over count too.
        training: The mode that the network is called in.
    """

    def __init__(self, model: keras.Model, x: np.ndarray, y: np.ndarray, batch_size: int = 1000, training=False):
        network = logits_of(model)
        self._images, self._labels = tf.constant(x), tf.constant(y)

        @tf.function
        def right(images: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
            count = tf.constant(0)
            for begin in tf.range(0, len(x), batch_size):
                answers = tf.argmax(
                    network(images[begin : begin + batch_size], training=training), 1, output_type=tf.int32
                )
                count += tf.math.count_nonzero(answers == labels[begin : begin + batch_size], dtype=tf.int32)
            return count

        self._right, self._size = right, len(x)

    def __call__(self) -> float:
        return int(self._right(self._images, self._labels)) / self._size


def logits_of(model: keras.Model) -> keras.Model:
    """The same network up to its logits, with which the loss keeps its digits and its gradient."""
    return keras.Model(model.inputs, model.get_layer("logits").output)


def cross_entropy(logits: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
    """The mean over a batch, in nats."""
    return tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits))


def curve(
    trainer: Trainer, accuracy: Callable[[], float], steps: int, every: int, tick: Callable[[], None] = lambda: None
) -> dict[str, list[float]]:
    """Train, and look at the accuracy every so many steps.

    A training whose loss is not finite any more is not gone on with: what it has reached is all that follows.

    Args:
        trainer: Trained from where it stands.
        accuracy: Asked after `every` steps.
        steps: A multiple of `every`.
        every: Steps between two looks.
        tick: Called at each look.

    Returns:
        `step`, `accuracy`, and `loss`, the mean of the training batches since the last look.

    Raises:
        ValueError: `every` does not divide `steps`.
    """
    if every < 1 or steps % every:
        raise ValueError(f"`every` must divide `steps`. Received: steps={steps}, every={every}")
    seen: dict[str, list[float]] = {"step": [], "accuracy": [], "loss": []}
    loss = 0.0
    for _ in range(steps // every):
        if math.isfinite(loss):
            loss = trainer.train(every)
        else:
            trainer.step += every
        seen["step"].append(trainer.step)
        seen["accuracy"].append(accuracy())
        seen["loss"].append(loss)
        tick()
    return seen


def steps_to(seen: Mapping[str, Sequence[float]], target: float) -> int | None:
    """The first step of a curve at which the accuracy was `target` or more; None where it never was."""
    reached = [step for step, value in zip(seen["step"], seen["accuracy"], strict=True) if value >= target]
    return int(reached[0]) if reached else None


def final(seen: Mapping[str, Sequence[float]], last: int = 3) -> float:
    """The accuracy in the end: the mean of the last looks, since one alone jumps."""
    return float(np.mean(seen["accuracy"][-last:]))


def best_rate(
    trainer: Trainer,
    accuracy: Callable[[], float],
    rates: Sequence[float],
    steps: int,
    tick: Callable[[], None] = lambda: None,
) -> tuple[float, dict[str, float]]:
    """The learning rate with which a training of so many steps ends best, each from the same weights.

    Args:
        trainer: Reset before each; left as the last one left it.
        accuracy: Asked at nine tenths and at the end of each.
        rates: To be tried.
        steps: Of each.
        tick: Called after each.

    Returns:
        The best rate (of equal ones the smallest), and the accuracy by rate.
    """
    reached: dict[str, float] = {}
    for rate in rates:
        trainer.reset(rate)
        tenth = max(1, steps // 10)
        first = trainer.train(steps - tenth)
        values = [accuracy()]
        if math.isfinite(first):
            trainer.train(tenth)
        values.append(accuracy())
        reached[f"{rate:g}"] = float(np.mean(values))
        tick()
    best = max(sorted(rates), key=lambda rate: reached[f"{rate:g}"])
    return best, reached


def seeded(seed: int, build: Callable[[], Any]) -> Any:
    """What `build` makes, with weights that are a function of `seed`."""
    keras.utils.set_random_seed(seed)
    return build()
