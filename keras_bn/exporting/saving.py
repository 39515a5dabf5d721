"""A SavedModel written and read again: what TensorFlow says of it in words of ours, or not at all."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tensorflow as tf
from absl import logging


def save(root: tf.Module, folder: Path, signatures: Mapping[str, Any]) -> None:
    """Writes `root` with its signatures into `folder`.

    Raises:
        ValueError: where a signature uses what no layer has as an attribute.
    """
    options = tf.saved_model.SaveOptions(experimental_custom_gradients=False)
    try:
        tf.saved_model.save(root, os.fspath(folder), signatures=signatures, options=options)
    except AssertionError as error:
        captured = re.search(r"Trackable referencing this tensor = (.*)", str(error))
        if captured is None:
            raise
        raise ValueError(
            "`model` must have layers with all variables and tables that they use as attributes, made in `__init__` or "
            f"`build`, so that they are saved. Received: {captured[1]}, which is an attribute of no layer."
        ) from error


def load(folder: Path) -> Any:
    """What was written, without the warnings that it has no gradients: no server needs them."""
    before = logging.get_verbosity()
    logging.set_verbosity(min(before, logging.ERROR))
    try:
        return tf.saved_model.load(os.fspath(folder))
    finally:
        logging.set_verbosity(before)
