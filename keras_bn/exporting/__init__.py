"""export(): a trained model becomes a numbered SavedModel that a server can load and a person can query."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from keras_bn import arguments
from keras_bn.drift.versions import SIGNATURE as DRIFT
from keras_bn.exporting import given
from keras_bn.exporting import saving as _saving
from keras_bn.exporting import signatures as _signatures
from keras_bn.exporting import versions as _versions
from keras_bn.exporting import warmup as _warmup
from keras_bn.exporting.card import CARD, describe
from keras_bn.exporting.checks import (
    ROWS,
    check_graph,
    check_keeps_no_state,
    check_layer_names,
    check_outputs,
    check_rows,
    check_shapes,
    check_variable_names,
)
from keras_bn.exporting.signatures import BYTES, SERVING
from keras_bn.folding import FoldingReport, fold_proved_on
from keras_bn.folding.proof import Errors, Tolerance
from keras_bn.folding.trials import accepted_inputs
from keras_bn.model import batch_norms_below, check_finite, check_model, graph_of, layers_below
from keras_bn.names import shown
from keras_bn.population.report import Recalibration

# Called with the name of each stage as it is reached.
STAGE_HOOKS: list[Callable[[str], None]] = []
STAGES = ("folder made", "model written", "extras written", "checked", "renamed")


class Exported(NamedTuple):
    """What `export` wrote.

    Attributes:
        path: of the version.
        version: its number.
        inputs: what `serving_default` takes, by name.
        outputs: what it answers, by name.
        signatures: names of all signatures.
        errors: largest differences between the served outputs and the model's.
        folding: what was folded, None where `fold=False`.
    """

    path: Path
    version: int
    inputs: dict[str, tf.TensorSpec]
    outputs: dict[str, tf.TensorSpec]
    signatures: list[str]
    errors: Errors
    folding: FoldingReport | None


def export(
    model: keras.Model,
    model_base_path: str | os.PathLike[str],
    version: int | None = None,
    fold: bool = True,
    labels: Sequence[str] | None = None,
    preprocess: Callable[[tf.Tensor], Any] | None = None,
    warmup: Any = None,
    jit_compile: bool = False,
    overwrite: bool = False,
    *,
    drift: bool = True,
    accuracy: float | None = None,
    recalibration: Recalibration | None = None,
    tolerance: float | None = None,
) -> Exported:
    """Writes `model` as a version below `model_base_path`, ready for TensorFlow Serving.

    The version is written into a sibling folder, loaded afresh and checked, and renamed into place when it is whole, so
    a server that polls never sees half a version, and a crash or a failed check leaves what was there. It runs in
    inference mode, whatever the model's author wrote, and takes any batch size. It is checked that it computes what the
    model computes, writes no variable, and holds stock TensorFlow operations only.

    Each row is answered by itself, whatever else is in the batch, and every input and output of every signature has the
    rows first, so that TensorFlow Serving may run requests of strangers together (`--enable_batching`). That is checked
    too: 7 rows together, and the same apart. Inputs of another rank or size, of no row, or of unequal rows get an
    `INVALID_ARGUMENT` that names the input and both shapes before anything is computed, which in TensorFlow would end
    the server for some of them. For sizes that are free, the smallest that the model can compute with are found by
    tracing it.

    Signatures:

    - `serving_default`. Inputs are called as in `keras.Input(name=...)`, a single nameless picture `image`. TensorFlow
      and Python take ASCII letters, digits and underscores, a letter first, no keyword and not `self`: other characters
      become underscores, those in front are dropped, `1a` becomes `input_1a` and `class` `class_`; of names that are
      then equal, each gets a number. Outputs that end in a softmax or sigmoid `probabilities`, others as their layer if
      it was given a name, else `outputs`.
    - `image_bytes`, with `preprocess` and pictures of fixed size: the same for encoded pictures (PNG, JPEG, BMP, the
      first frame of a GIF; as `{"b64": ...}` in JSON), resized to the model's size. JPEG is decoded to the same pixels
      as by Pillow, but not turned as its EXIF data say: the orientation is ignored. Pictures of more than 2**25 pixels
      (33 million, 100 MB once decoded) are refused before they are decoded.
    - `batch_norm_drift`, for models with a normalization: what `keras_bn.drift` needs to know of each row. `layer` and
      `channels` name the normalizations and their widths; `count`, `mean_shift` and `variance_ratio`, for all channels
      of all of them side by side, are how many values the row has there, and how far they are from the population's
      statistics. A client pools its rows, exactly: `keras_bn.drift`, the command `keras-bn drift`, `Client.drift`. It
      runs the model unfolded. A row's answer takes 12 bytes for each channel (ResNet50: 26,560 channels, 319 kB; ten
      digits each in JSON, so gRPC is the better way there); while a layer is measured it takes two or three times the
      memory of its input (ResNet50: 3.2 MB a row at most), or six where there is a mask.

    Beside them, in `assets.extra`: the card `keras_bn.json`, and with `warmup` the requests a server warms up with.

    Args:
        model: a built Keras model: functional, sequential, or (with `fold=False`) subclassed and called once.
        model_base_path: folder of the model's versions; made if it is not there.
        version: integer from 0, or None for one more than the highest there (1 in an empty folder).
        fold: whether normalizations are absorbed into other weights, see `keras_bn.fold`.
        labels: names of the classes, none of them blank; adds `top_labels` and `top_scores`, of the likeliest five, to
            the outputs. Names that come twice are taken with a warning. Of several sigmoids they are the five largest,
            above 0.5 or not. A single sigmoid takes one name, which is then every row's `top_labels`; for two, end the
            model in a column for each, `Concatenate()([1 - p, p])`.
        preprocess: makes the model's input of a batch of pictures, float32 in [0, 255] of shape (batch, height, width,
            channels): such as `keras.applications.resnet50.preprocess_input`, other TensorFlow operations, or a Keras
            layer. With it, pixels are posted as they are, uint8. What is served is compared with this function and the
            model, called one after the other.
        warmup: examples of what `serving_default` takes (with `preprocess`, uint8 pictures): an array; for several
            inputs a dictionary by input name, as served or as in `keras.Input(name=...)`, or for a model that takes a
            list a list. They are what is checked; without, random numbers are, of sizes that the model takes.
        jit_compile: whether XLA compiles the model in the signatures; a server has to be started to allow that. Inputs
            are checked before it and pictures decoded, as XLA can do neither.
        overwrite: whether a given version that is there is replaced.
        drift: whether there is a `batch_norm_drift`; it keeps its own copy of the weights.
        accuracy: for the card, in [0, 1].
        recalibration: the report of `keras_bn.recalibrate`, for the card.
        tolerance: largest relative error allowed; None as for `fold`.

    Returns:
        An `Exported`, with the `path` of the version.

    Raises:
        TypeError: when an argument is of the wrong type.
        ValueError: when an argument does not fit the model, `preprocess` raises or makes what the model does not take,
            weights or statistics are not finite, the version is there already, or a check fails.
        OSError: when the version cannot be written; nothing of it is left.
        ImportError: when `warmup` is given and `tensorflow-serving-api` is not installed.

    Example:

    ```python
    keras_bn.export(model, "served/fashion", labels=names, warmup=images[:8]).path  # served/fashion/1
    ```
    """
    check_model(model, built=True)
    base = Path(arguments.path("model_base_path", model_base_path))
    version = given.version_number(version)
    labels = given.class_names(labels)
    if preprocess is not None and not callable(preprocess):
        raise TypeError(f"`preprocess` must be a function or a Keras layer. Received: preprocess={shown(preprocess)}.")
    fold, jit_compile = arguments.flag("fold", fold), arguments.flag("jit_compile", jit_compile)
    overwrite, drift = arguments.flag("overwrite", overwrite), arguments.flag("drift", drift)
    accuracy = arguments.optional_number("accuracy", accuracy, 0.0, 1.0)
    tolerance = arguments.optional_number("tolerance", tolerance, 0.0)
    if recalibration is not None and not isinstance(recalibration, Recalibration):
        raise TypeError(
            "`recalibration` must be what `keras_bn.recalibrate` returned, or None. "
            f"Received: recalibration={shown(recalibration)} of type {type(recalibration).__name__}."
        )
    check_finite(model)
    check_keeps_no_state(model)
    check_layer_names(model)
    if fold and graph_of(model) is None:
        raise ValueError(
            "`fold` must be False for a subclassed model, as what it does is known to its own `call` only: its "
            f"normalizations are then exported as they are. Received: fold={fold}, model={model.name!r} of type "
            f"{type(model).__name__}."
        )
    _versions.check_free(base, version, overwrite)
    if warmup is not None:
        _warmup.require()
    original = _signatures.Serving(model, preprocess, jit_compile)
    least = original.least_sizes()
    examples = None if warmup is None else given.examples(warmup, model, original, least)
    served_model, folding = model, None
    if fold:
        check = None if examples is None else original.model_inputs(examples)
        served_model, folding = fold_proved_on(model, check, "warmup", tolerance)
    observed = model if drift and batch_norms_below(model) else None
    check_variable_names(served_model, observed)
    serving = _signatures.Serving(served_model, preprocess, jit_compile, named_after=original)
    with _versions.temporary_sibling(base) as folder:
        _reached("folder made")
        signatures = _trace(serving, labels, least)
        if observed is not None:
            signatures[DRIFT] = original.concrete(original.drift, original.inputs, least)
        root = tf.Module()
        root.kept = _resources(served_model, observed, preprocess)
        with _versions.writing(base):
            _saving.save(root, folder, signatures)
        _reached("model written")
        card = describe(model, signatures, labels, folding, accuracy, recalibration, folder)
        with _versions.writing(base):
            (folder / CARD).parent.mkdir(exist_ok=True)
            (folder / CARD).write_text(json.dumps(card, indent=2) + "\n")
            if examples is not None:
                _warmup.write(folder, base.name, examples, list(signatures))
        _reached("extras written")
        errors = _check(folder, original, signatures, examples, Tolerance(model, tolerance), jit_compile)
        _reached("checked")
        path = _versions.rename_into_place(folder, base, version, overwrite)
        _reached("renamed")
    outputs = {n: tf.TensorSpec(t.shape, t.dtype, n) for n, t in signatures[SERVING].structured_outputs.items()}
    return Exported(path, int(path.name), serving.inputs, outputs, list(signatures), errors, folding)


def _reached(stage: str) -> None:
    for hook in STAGE_HOOKS:
        hook(stage)


def _trace(
    serving: _signatures.Serving, labels: Sequence[str] | None, least: Mapping[str, list[int]]
) -> dict[str, Any]:
    predict = serving.predict if labels is None else serving.predict_with(labels)
    signatures = {SERVING: serving.concrete(predict, serving.inputs, least)}
    if serving.takes_pictures:
        signatures[BYTES] = serving.concrete(*serving.decoded(predict))
    return signatures


def _resources(*owners: Any) -> list[Any]:
    """All that a graph of these may capture: variables, and the tables of preprocessing layers."""
    layers = [layer for owner in owners if isinstance(owner, keras.Layer) for layer in layers_below(owner)]
    tables = [
        value
        for layer in layers
        for value in vars(layer).values()
        if isinstance(value, tf.saved_model.experimental.TrackableResource)
    ]
    variables = {id(v): v.value for owner in owners if isinstance(owner, keras.Layer) for v in owner.variables}
    return [*variables.values(), *tables]


def _check(
    folder: Path,
    original: _signatures.Serving,
    signatures: Mapping[str, Any],
    examples: dict[str, tf.Tensor] | None,
    tolerance: Tolerance,
    compiled_is_fine: bool,
) -> Errors:
    """Whether what was written is fit to be served, and computes what the person's own model and `preprocess` do."""
    for name in signatures:
        check_graph(folder, name, compiled_is_fine)
        check_shapes(folder, name)
    loaded = _saving.load(folder)
    if examples is None:
        # Asked of what was written: it refuses sizes below the least, of which the model makes numbers all the same.
        served = loaded.signatures[SERVING]
        normalized = original.normalized_inputs()
        batches = accepted_inputs(lambda inputs: served(**inputs), original.inputs, "warmup", ROWS, normalized)
    else:
        batches = [given.seven_rows(examples)]
    of_model = [original.model_inputs(batch) for batch in batches]
    errors = check_outputs(SERVING, loaded.signatures[SERVING], original.predict, batches, tolerance, of_model)
    asked = dict.fromkeys(signatures, batches[-1])
    if DRIFT in signatures:
        check_outputs(DRIFT, loaded.signatures[DRIFT], original.drift, batches, tolerance, of_model)
    if BYTES in signatures:
        encoded = _warmup.encoded(batches[-1])
        asked[BYTES] = {BYTES: encoded}
        served = loaded.signatures[BYTES]
        check_outputs(BYTES, served, lambda _: original.predict(batches[-1]), [asked[BYTES]], tolerance, of_model)
    for name, batch in asked.items():
        check_rows(name, loaded.signatures[name], batch, tolerance, of_model)
    return errors
