"""The card of a version: what was exported, from what, and with what result."""

import datetime
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from keras_bn._version import __version__
from keras_bn.folding import FoldingReport
from keras_bn.population.report import Recalibration

CARD = "assets.extra/keras_bn.json"


def describe(
    model: keras.Model,
    signatures: Mapping[str, Any],
    labels: Sequence[str] | None,
    folding: FoldingReport | None,
    accuracy: float | None,
    recalibration: Recalibration | None,
    folder: Path,
) -> dict[str, Any]:
    """What a version is, for JSON: see `export` for the arguments.

    `files` are those of the model in `folder`, where it is written, with their sizes and SHA-256 sums.
    """

    def described(tensors: Mapping[str, Any]) -> dict[str, Any]:
        return {name: {"dtype": t.dtype.name, "shape": t.shape.as_list()} for name, t in sorted(tensors.items())}

    return {
        "model": model.name,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": {"keras_bn": __version__, "keras": keras.__version__, "tensorflow": tf.__version__},
        "parameters": model.count_params(),
        "signatures": {
            name: {
                "inputs": described(traced.structured_input_signature[1]),
                "outputs": described(traced.structured_outputs),
            }
            for name, traced in signatures.items()
        },
        "labels": None if labels is None else list(labels),
        "accuracy": accuracy,
        "statistics": None if recalibration is None else recalibration.to_dict(),
        "folding": None if folding is None else folding.to_dict(),
        "files": {
            path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": _sha256(path)}
            for path in sorted([folder / "saved_model.pb", *folder.glob("variables/*")])
        },
    }


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
