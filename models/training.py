"""Training that can be interrupted anywhere and ends as if it had not been."""

import functools
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import keras_bn
from models import data, networks, run_folder
from models.augmentation import augment
from models.checkpoint import Checkpoint, whole
from models.settings import Settings


def train(
    settings: Settings,
    images: data.ImageData,
    folder: str | os.PathLike,
    callbacks: Sequence[keras.callbacks.Callback] = (),
    restart: bool = False,
) -> keras.Model:
    """Train a network, or go on with a training that was interrupted, and save it.

    `folder` holds `settings.json`, `log.csv` (one row an epoch), `checkpoint.weights.h5` (after each whole epoch:
    weights, the optimizer's too) and in the end `model.keras`. Batches are a function of seed and epoch alone, so an
    interrupted training ends with the weights that it would have had without the interruption. A finished one is
    loaded.

    Args:
        settings: What to train and how.
        images: The data.
        folder: Of this run; made where it is missing.
        callbacks: More Keras callbacks for `fit`.
        restart: Forget the run that `folder` holds, and start anew.

    Returns:
        The trained and compiled model.

    Raises:
        ValueError: `folder` holds a run with other settings, or a setting does not fit the data.
    """
    folder = Path(folder)
    if restart:
        run_folder.forget(folder)
    run_folder.claim(folder, settings, images)
    path = folder / run_folder.MODEL
    if path.exists():
        print(f"Trained already: {path}")
        return keras.models.load_model(path)

    x, y, validation = split(settings, images)
    steps = len(x) // settings.batch_size
    keras.utils.set_random_seed(settings.seed)
    checkpoint = Checkpoint(folder)
    model = compiled(settings, steps)
    checkpoint.restore(model)
    first_epoch = int(model.optimizer.iterations) // steps
    if first_epoch:
        print(f"Going on after epoch {first_epoch}/{settings.epochs} of {folder}")
    batches = data.training_batches(
        x, y, settings.batch_size, seed=settings.seed, first_epoch=first_epoch, augment=augmentation(settings)
    )
    model.fit(
        batches,
        initial_epoch=first_epoch,
        epochs=settings.epochs,
        steps_per_epoch=steps,
        validation_data=validation,
        validation_batch_size=500,
        shuffle=False,
        # The bar redraws its line; where that is not a terminal, a line for each epoch says as much.
        verbose=1 if sys.stdout.isatty() else 2,
        callbacks=[checkpoint, *callbacks],
    )
    if settings.recalibrate:
        keras_bn.recalibrate(model, x, batch_size=500, verbose=0)
    with whole(path) as half:
        model.save(half)
    return model


def accuracy(model: keras.Model, x: np.ndarray, y: np.ndarray) -> float:
    """The share of images whose most probable class is their label.

    Args:
        model: A network that gives `probabilities` of shape `(batch, classes)`.
        x: Images, float32 of shape `(n, 28, 28, 1)`.
        y: Labels, integers of shape `(n,)`.

    Returns:
        A number in `[0, 1]`.
    """
    return float(np.mean(model.predict(x, batch_size=500, verbose=0).argmax(axis=-1) == y))


def split(
    settings: Settings, images: data.ImageData
) -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, np.ndarray] | None]:
    """The images to train on, their labels as one-hot rows, and the validation data (None for none)."""
    used = settings.used_images(len(images.x_train))
    available = len(images.x_train) - settings.validation_images
    labels = keras.utils.to_categorical(images.y_train, len(data.CLASS_NAMES))
    validation = (images.x_train[available:], labels[available:]) if settings.validation_images else None
    return images.x_train[:used], labels[:used], validation


def compiled(settings: Settings, steps_per_epoch: int, synchronized: bool = False) -> keras.Model:
    """The network with its optimizer, whose normalizations are those of all replicas where they are `synchronized`."""
    options: dict[str, Any] = {} if settings.width is None else {"width": settings.width}
    if synchronized:
        options["normalization"] = functools.partial(keras_bn.BatchNormalization, synchronized=True)
    model = getattr(networks, settings.network)(**options)
    steps = settings.epochs * steps_per_epoch
    warmup = steps // 10
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0, steps - warmup, warmup_target=settings.learning_rate, warmup_steps=warmup
    )
    optimizer = keras.optimizers.AdamW(schedule, weight_decay=settings.weight_decay)
    # What normalization scales and shifts, and biases, are not decayed towards 0.
    optimizer.exclude_from_weight_decay(var_names=["gamma", "beta", "bias"])
    loss = keras.losses.CategoricalCrossentropy(label_smoothing=settings.label_smoothing)
    model.compile(optimizer, loss, metrics=["accuracy"])
    return model


def augmentation(settings: Settings) -> Callable[[tf.Tensor, tf.Tensor], tf.Tensor] | None:
    """What `data.training_batches` is to do to its images."""
    if not settings.augment:
        return None
    return lambda images, seed: augment(images, seed, erase=settings.erase)
