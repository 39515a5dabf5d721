"""The folder of a training run: whose it is, and how it is forgotten."""

import dataclasses
import json
import zlib
from pathlib import Path

import numpy as np

from models.data import ImageData
from models.settings import Settings

SETTINGS, LOG, CHECKPOINT, MODEL = "settings.json", "log.csv", "checkpoint.weights.h5", "model.keras"


def forget(folder: Path) -> None:
    """Remove the run that `folder` holds, and nothing else."""
    for name in (SETTINGS, LOG, CHECKPOINT, MODEL):
        (folder / name).unlink(missing_ok=True)


def claim(folder: Path, settings: Settings, images: ImageData) -> None:
    """Write down whose folder this is; make it where it is missing.

    Raises:
        ValueError: Another run's settings stand there, or the images are too few for these.
    """
    settings.used_images(len(images.x_train))
    fingerprint = {
        "training_images": len(images.x_train),
        "crc32": zlib.crc32(np.ascontiguousarray(images.x_train).data),
        "labels_crc32": zlib.crc32(np.ascontiguousarray(images.y_train).data),
    }
    wanted = {**dataclasses.asdict(settings), "data": fingerprint}
    path = folder / SETTINGS
    if path.exists():
        # A setting that came later had its default before.
        found = {**dataclasses.asdict(Settings()), **json.loads(path.read_text())}
        found["data"] = {"labels_crc32": fingerprint["labels_crc32"], **found.get("data", {})}
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
