"""A program for test_workers.py: one of several workers, or all replicas in one process, trains and writes its weights.

`workers.py FOLDER KIND [KILLED]`: what KIND trains is below; worker KILLED dies once in the middle of the second epoch.
"""

import os
import signal
import sys
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from models import data, distributed, training
from models.cluster import read
from models.settings import Settings

SETTINGS = {
    "mlp": Settings(
        network="sigmoid_mlp",
        width=20,
        epochs=3,
        batch_size=50,
        training_images=300,
        validation_images=100,
        augment=True,
        recalibrate=True,
        seed=7,
    ),
    # Batches that three do not share equally.
    "cnn": Settings(network="fashion_cnn", width=4, epochs=2, batch_size=40, training_images=120, recalibrate=True),
}
# The last ones leave replicas with a single image, and without any.
SIZES = (50, 31, 3, 2, 1)


def few():
    images = data.load()
    part = {name: getattr(images, name)[:500] for name in ("x_train", "y_train", "x_test", "y_test")}
    return data.ImageData(**part, origin="a few of Fashion-MNIST")


def uneven_batches():
    """Images and one-hot labels, in batches of `SIZES`."""
    images = few()
    labels = keras.utils.to_categorical(images.y_train, 10)
    ends = np.cumsum(SIZES)
    return [(images.x_train[end - size : end], labels[end - size : end]) for end, size in zip(ends, SIZES, strict=True)]


def uneven_model(synchronized):
    # SGD: of an image that is alone in its batch all gradients are rounding, of which Adam would make whole steps.
    keras.utils.set_random_seed(3)
    model = training.compiled(SETTINGS["mlp"], len(SIZES), synchronized)
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), model.loss, metrics=["accuracy"])
    return model


def train_on_uneven_batches(strategy, epochs=1, callbacks=()):
    batches = uneven_batches()
    spec = (tf.TensorSpec([None, 28, 28, 1]), tf.TensorSpec([None, 10], batches[0][1].dtype))
    with strategy.scope():
        model = uneven_model(synchronized=True)
        model.optimizer.build(model.trainable_variables)
    dataset = tf.data.Dataset.from_generator(lambda: iter(batches * epochs), output_signature=spec)
    distributed.fit(strategy, model, dataset, epochs=range(epochs), steps=len(SIZES), callbacks=callbacks)
    return model


class Stop(keras.callbacks.Callback):
    """Counts the epochs, and where it is the chief's ends the training after the second."""

    def __init__(self, chief):
        super().__init__()
        self.chief, self.epochs = chief, 0

    def on_epoch_end(self, epoch, logs=None):
        self.epochs += 1
        self.model.stop_training = self.chief and self.epochs == 2


def epochs_until_the_chief_stops(strategy):
    stop = Stop(distributed.is_chief(strategy))
    train_on_uneven_batches(strategy, epochs=5, callbacks=[stop])
    return stop.epochs


class DieOnce(keras.callbacks.Callback):
    """Is killed after the second batch of the second epoch, if it is the first time."""

    def __init__(self, mark):
        super().__init__()
        self.mark = mark

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        if (self.epoch, batch) == (1, 1) and not self.mark.exists():
            self.mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    folder, kind, killed = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
    members = read(os.environ)
    index = members.index if members else 0
    with distributed.workers() if members else distributed.mirrored(2) as strategy:
        callbacks = [DieOnce(folder / "died")] if killed == [str(index)] else []
        distributed.train(SETTINGS[kind], few(), folder / "run", strategy, callbacks=callbacks)
        uneven = train_on_uneven_batches(strategy)
        np.savez(folder / f"uneven_{index}.npz", *[variable.numpy() for variable in uneven.variables])
        (folder / f"epochs_{index}").write_text(str(epochs_until_the_chief_stops(strategy)))
