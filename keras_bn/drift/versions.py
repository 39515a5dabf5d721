"""An exported version, asked for the figures of examples."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from typing import Any

import tensorflow as tf
from google.protobuf.message import DecodeError
from tensorflow.core.protobuf import saved_model_pb2

from keras_bn.drift.figures import RowFigures
from keras_bn.examples import as_arrays, check_kind, reason
from keras_bn.names import argument

SIGNATURE = "batch_norm_drift"
_CARD = "assets.extra/keras_bn.json"
FiguresOf = Callable[[list[Any]], dict[str, RowFigures]]


def asked_of_version(folder: str | os.PathLike[str], inputs: Any) -> tuple[FiguresOf, list[Any]]:
    _check_version(os.fspath(folder))
    folder = os.fspath(folder)
    whole = (
        f"`model` must be the folder of a whole version; copy or export it anew. Received: model={folder!r}, of which"
    )
    if changed := _changed_file(folder):
        raise ValueError(f"{whole} {changed} is not as it was written.")
    try:
        loaded = tf.saved_model.load(folder)
    except Exception as error:  # Whatever TensorFlow's readers have against a file that is broken.
        raise ValueError(f"{whole} {_broken_part(folder)} cannot be read: {reason(error)}") from error
    if SIGNATURE not in loaded.signatures:
        raise ValueError(
            f"`model` must be a version with the signature {SIGNATURE} (a normalization, and `drift=True`). "
            f"Received: {folder} with {sorted(loaded.signatures)}."
        )
    specs = loaded.signatures[SIGNATURE].structured_input_signature[1]
    by_name = inputs if isinstance(inputs, Mapping) else dict(zip(specs, [inputs], strict=False))
    if by_name.keys() != specs.keys():
        by_name = {argument(name): value for name, value in by_name.items()}
    if by_name.keys() != specs.keys():
        raise ValueError(
            f"`inputs` must be a dictionary of arrays with the names {sorted(specs)}, or an array where there is one. "
            f"Received: {sorted(inputs) if isinstance(inputs, Mapping) else type(inputs).__name__}."
        )

    def figures_of(arrays: list[Any]) -> dict[str, RowFigures]:
        pairs = zip(specs, arrays, strict=True)
        tensors = {n: tf.constant(a) if specs[n].dtype == tf.string else tf.cast(a, specs[n].dtype) for n, a in pairs}
        return figures_by_layer(loaded.signatures[SIGNATURE](**tensors))

    arrays = as_arrays("inputs", {name: by_name[name] for name in specs})
    for name, spec in specs.items():
        if not spec.shape.is_compatible_with(arrays[name].shape):
            raise ValueError(
                f"`inputs` must have shape {tuple(spec.shape)} and dtype {spec.dtype.name} for input {name!r}. "
                f"Received: shape {tuple(arrays[name].shape)}, dtype {arrays[name].dtype.name}."
            )
        check_kind("inputs", name, arrays[name], spec.dtype)
    return figures_of, list(arrays.values())


def figures_by_layer(answer: Mapping[str, tf.Tensor]) -> dict[str, RowFigures]:
    """Takes apart what the signature `batch_norm_drift` answers, see `keras_bn.export`."""
    names = [name.decode() for name in answer["layer"][0].numpy()]
    sizes = answer["channels"][0].numpy()
    parts = [tf.split(answer[field], sizes, axis=1) for field in RowFigures._fields]
    return {name: RowFigures(*part) for name, part in zip(names, zip(*parts, strict=True), strict=True)}


def _check_version(folder: str) -> None:
    if tf.saved_model.contains_saved_model(folder):
        return
    below = tf.io.gfile.listdir(folder) if tf.io.gfile.isdir(folder) else []
    versions = sorted((name.rstrip("/") for name in below if name.rstrip("/").isdecimal()), key=int)
    hint = f", which has versions: pass {os.path.join(folder, versions[-1])}" if versions else ""
    raise ValueError(
        f"`model` must be a `keras.Model` or the folder of an exported version. Received: model={folder!r}{hint}."
    )


def _changed_file(folder: str) -> str | None:
    """A file that the card of the version says was written otherwise: TensorFlow reads many a changed graph as one."""
    card = os.path.join(folder, _CARD)
    if not tf.io.gfile.exists(card):
        return None
    try:
        with tf.io.gfile.GFile(card) as file:
            files = dict(json.load(file).get("files", {}))
    except (ValueError, AttributeError):
        return _CARD
    return next(
        (name for name, written in files.items() if _sum(os.path.join(folder, name)) != written["sha256"]), None
    )


def _sum(path: str) -> str | None:
    if not tf.io.gfile.exists(path):
        return None
    with tf.io.gfile.GFile(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


def _broken_part(folder: str) -> str:
    saved = saved_model_pb2.SavedModel()
    try:
        with open(os.path.join(folder, "saved_model.pb"), "rb") as file:
            saved.ParseFromString(file.read())
    except (OSError, DecodeError):
        return "saved_model.pb"
    return "variables/" if saved.meta_graphs else "saved_model.pb"
