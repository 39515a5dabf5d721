"""From a finished training to the files that are shipped."""

import json
import shutil
import sys
import zipfile
import zlib
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

import keras_bn
from models import data, pictures, pretrained
from models.augmentation import augment
from models.checkpoint import read_log, whole
from models.pretrained import evaluation
from models.pretrained.card_text import card_text
from models.settings import Settings

LARGEST_FILE = 2_000_000
# What the card says of the training, whatever the statistics are of.
FACTS = (
    "network",
    "parameters",
    "command",
    "seed",
    "epochs",
    "training_images",
    "minutes",
    "machine",
    "versions",
    "accuracy_before_recalibration",
)
# Of initializers and of Dense, since some version after Keras 3.12.
NEW_ARGUMENTS = ("input_axes", "output_axes", "quantization_config")


def make(run: Path, images: data.ImageData, folder: Path, machine: str, minutes: float | None = None) -> dict:
    """Recalibrate the network of a finished training and write all that is shipped.

    The statistics become those of the training images as the network saw them: augmented, where it was trained so.

    `folder` gets `fashion_cnn.keras` (without the optimizer's state), `card.json`, `README.md`, `confusion.png`,
    `curve.png`, `log.csv`, `settings.json` and `examples/`: the first test image of each class.

    Args:
        run: Folder of the training.
        images: The data that it was trained on.
        folder: For the files.
        machine: What the training ran on, in words.
        minutes: What it took; None for the sum of its log.

    Returns:
        The card.

    Raises:
        FileNotFoundError: The training is not there or not finished.
        ValueError: It was trained on other images, or the network does not fit into `LARGEST_FILE` bytes.
    """
    if not (run / "model.keras").exists():
        raise FileNotFoundError(f"{run} must hold a finished training with its model.keras. `python -m models.train`")
    settings, trained_on = _settings(run, images)
    # Not compiled, so its file will hold no optimizer.
    model = keras.models.load_model(run / "model.keras", compile=False)
    folder.mkdir(parents=True, exist_ok=True)
    log = read_log(run / "log.csv")
    facts = {
        "network": settings.network,
        "parameters": model.count_params(),
        "command": training_command(settings),
        "seed": settings.seed,
        "epochs": len(log),
        "training_images": trained_on,
        "minutes": round(sum(float(row["seconds"]) for row in log) / 60 if minutes is None else minutes, 1),
        "machine": machine,
        "versions": {"keras_bn": keras_bn.__version__, "keras": keras.__version__, "tensorflow": tf.__version__},
        "accuracy_before_recalibration": evaluation.evaluate(model, images)["accuracy"],
    }
    return _recalibrated(model, settings, facts, images, run, folder)


def remake(images: data.ImageData, folder: Path) -> dict:
    """Recalibrate the shipped network once more, and write all of its files anew, where its training is not kept.

    Args:
        images: The data that it was trained on.
        folder: Of the shipped files.

    Returns:
        The card.

    Raises:
        FileNotFoundError: There is no network.
        ValueError: As `make`.
    """
    model, card = pretrained.load(folder), pretrained.load_card(folder)
    settings, _ = _settings(folder, images)
    facts = {name: card[name] for name in FACTS}
    return _recalibrated(model, settings, facts, images, folder, folder)


def population(settings: Settings, images: np.ndarray) -> np.ndarray:
    """What the statistics are to be of: the images as the network saw them in training, augmented where it was.

    Args:
        settings: Of the training.
        images: Those it was trained on.

    Returns:
        As many images.
    """
    if not settings.augment:
        return images
    parts = [
        augment(tf.constant(images[begin : begin + 500]), tf.constant([settings.seed, begin]), erase=settings.erase)
        for begin in range(0, len(images), 500)
    ]
    return np.concatenate(parts)


def _recalibrated(
    model: keras.Model, settings: Settings, facts: dict, images: data.ImageData, run: Path, folder: Path
) -> dict:
    """Write the network with the statistics of its population, the card of it, and what `run` has of its training."""
    bar = "auto" if sys.stdout.isatty() else 0
    of = population(settings, images.x_train[: facts["training_images"]])
    recalibration = keras_bn.recalibrate(model, of, batch_size=500, verbose=bar)
    with whole(folder / pretrained.NETWORK) as path:
        model.save(path)
        forget_new_arguments(path)
        size = path.stat().st_size
        if size > LARGEST_FILE:
            path.unlink()
            raise ValueError(f"the network must fit into {LARGEST_FILE:,} bytes. Received: {size:,} bytes")
    for name in ("log.csv", "settings.json"):
        if run != folder:
            shutil.copyfile(run / name, folder / name)
    _write_examples(folder / pretrained.EXAMPLES, images)
    numbers = evaluation.evaluate(pretrained.load(folder), images)
    card = {
        **facts,
        "population": "training images, augmented as in the training" if settings.augment else "training images",
        **numbers,
        "recalibration": recalibration.to_dict(),
    }
    (folder / pretrained.CARD).write_text(json.dumps(card, indent=2) + "\n")
    (folder / "README.md").write_text(card_text(card))
    pictures.save_confusion(folder / "confusion.png", np.array(numbers["confusion"]), data.CLASS_NAMES)
    pictures.save_curve(folder / "curve.png", read_log(folder / "log.csv"))
    return card


def training_command(settings: Settings) -> str:
    """The command line of a training: what differs from the flags' defaults.

    Args:
        settings: Of the training.

    Returns:
        One line.
    """
    return " ".join(["python -m models.train", *settings.flags(), "--output runs/pretrained"])


def forget_new_arguments(path: Path) -> None:
    """Leaves out of a `.keras` file what Keras 3.12 does not know and is None anyway."""
    with zipfile.ZipFile(path) as archive:
        members = [(member, archive.read(member)) for member in archive.infolist()]

    def known(config: dict) -> dict:
        return {key: value for key, value in config.items() if value is not None or key not in NEW_ARGUMENTS}

    with zipfile.ZipFile(path, "w") as archive:
        for member, content in members:
            if member.filename == "config.json":
                content = json.dumps(json.loads(content, object_hook=known)).encode()
            archive.writestr(member, content)


def _settings(run: Path, images: data.ImageData) -> tuple[Settings, int]:
    """The settings of the training, and on how many of the images it was."""
    values = json.loads((run / "settings.json").read_text())
    fingerprint = values.pop("data")
    settings = Settings(**values)
    if settings.network != "fashion_cnn":
        raise ValueError(f"`network` of the shipped network must be fashion_cnn. Received: {settings.network}")
    if settings.recalibrate:
        raise ValueError(
            "`recalibrate` must be False for the network that is shipped, which is recalibrated here. "
            "Received: recalibrate=True"
        )
    if fingerprint["crc32"] != zlib.crc32(np.ascontiguousarray(images.x_train).data):
        raise ValueError(f"{run} was trained on other images than {images}. Name its own by `--data`.")
    return settings, settings.training_images or len(images.x_train) - settings.validation_images


def _write_examples(folder: Path, images: data.ImageData) -> None:
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.png"):
        old.unlink()
    for label, name in enumerate(data.CLASS_NAMES):
        chosen = images.x_test[images.y_test == label]
        if not len(chosen):
            raise ValueError(f"the test images must hold every class. Missing: {name}")
        stem = f"{label}_{name.lower().replace('/', '_').replace(' ', '_').replace('-', '_')}"
        encoded = tf.io.encode_png(np.round(chosen[0] * 255).astype(np.uint8))
        (folder / f"{stem}.png").write_bytes(encoded.numpy())
