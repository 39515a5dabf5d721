"""Training that can be interrupted anywhere and ends as if it had not been."""

import dataclasses
import json
import os
import sys
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from models import data, networks
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
        for name in ("settings.json", "log.csv", "checkpoint.weights.h5", "model.keras"):
            (folder / name).unlink(missing_ok=True)
    _claim(folder, settings, images)
    if (folder / "model.keras").exists():
        print(f"Trained already: {folder / 'model.keras'}")
        return keras.models.load_model(folder / "model.keras")

    x, y, validation = _split(settings, images)
    steps = len(x) // settings.batch_size
    keras.utils.set_random_seed(settings.seed)
    checkpoint = Checkpoint(folder)
    model = _compiled(settings, steps)
    checkpoint.restore(model)
    first_epoch = int(model.optimizer.iterations) // steps
    if first_epoch:
        print(f"Going on after epoch {first_epoch}/{settings.epochs} of {folder}")
    batches = data.training_batches(
        x, y, settings.batch_size, seed=settings.seed, first_epoch=first_epoch, augment=_augmentation(settings)
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
    with whole(folder / "model.keras") as path:
        model.save(path)
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


def _claim(folder: Path, settings: Settings, images: data.ImageData) -> None:
    """Write down whose folder this is, or refuse it where another run's settings stand there."""
    fingerprint = {
        "training_images": len(images.x_train),
        "crc32": zlib.crc32(np.ascontiguousarray(images.x_train).data),
    }
    wanted = {**dataclasses.asdict(settings), "data": fingerprint}
    path = folder / "settings.json"
    if path.exists():
        found = json.loads(path.read_text())
        other = [
            f"{name}: {found.get(name)}, now {value}" for name, value in wanted.items() if found.get(name) != value
        ]
        if other:
            raise ValueError(
                f"{folder} holds a training with other settings ({'; '.join(other)}). Go on with the same settings, "
                "choose another `--output`, or start anew with `--restart`."
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(wanted, indent=2) + "\n")


def _split(settings: Settings, images: data.ImageData):
    """The images to train on, their labels as one-hot rows, and the validation data (None for none)."""
    available = len(images.x_train) - settings.validation_images
    used = available if settings.training_images is None else settings.training_images
    if not settings.batch_size <= used <= available:
        raise ValueError(
            f"`batch_size` <= `training_images` <= {available} must hold, with {len(images.x_train)} images of which "
            f"{settings.validation_images} are held out. Received: batch_size={settings.batch_size}, "
            f"training_images={used}"
        )
    labels = keras.utils.to_categorical(images.y_train, len(data.CLASS_NAMES))
    validation = (images.x_train[available:], labels[available:]) if settings.validation_images else None
    return images.x_train[:used], labels[:used], validation


def _compiled(settings: Settings, steps_per_epoch: int) -> keras.Model:
    options = {} if settings.width is None else {"width": settings.width}
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


def _augmentation(settings: Settings) -> Callable[[tf.Tensor, tf.Tensor], tf.Tensor] | None:
    if not settings.augment:
        return None
    return lambda images, seed: augment(images, seed, erase=settings.erase)
