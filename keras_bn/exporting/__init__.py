"""export(): a trained model becomes a numbered SavedModel that a server can load and a person can query."""

import datetime
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from keras_bn._version import __version__
from keras_bn.drift import SIGNATURE as DRIFT
from keras_bn.exporting import signatures as _signatures
from keras_bn.exporting import versions as _versions
from keras_bn.exporting import warmup as _warmup
from keras_bn.exporting.checks import ROWS, check_graph, check_outputs, check_rows, check_shapes
from keras_bn.exporting.signatures import BYTES, SERVING
from keras_bn.folding import FoldingReport
from keras_bn.folding import fold as fold_model
from keras_bn.folding.proof import KINDS, Errors, random_inputs
from keras_bn.model import batch_norms_below, check_model, default_tolerance, layers_below
from keras_bn.population.report import Recalibration

CARD = "assets.extra/keras_bn.json"

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
    model computes, each row by itself, writes no variable, and holds stock TensorFlow operations only.

    Signatures:

    - `serving_default`. Inputs are called as in `keras.Input(name=...)`, a single nameless picture `image`; outputs
      that end in a softmax or sigmoid `probabilities`, others as their layer if it was given a name, else `outputs`.
    - `image_bytes`, with `preprocess` and pictures of fixed size: the same for encoded pictures (PNG, JPEG, as
      `{"b64": ...}` in JSON), resized to the model's size.
    - `batch_norm_drift`, for models with a normalization: for the batch posted, per normalization, how far its input is
      from the population's statistics (`layer`, `mean_shift`, `variance_ratio`, `kl`; see `keras_bn.drift.summary`). To
      be asked in the column format (`inputs`), as it answers by layer and not by row.

    Beside them, in `assets.extra`: the card `keras_bn.json`, and with `warmup` the requests a server warms up with.

    Args:
        model: a built Keras model: functional, sequential, or (with `fold=False`) subclassed and called once.
        model_base_path: folder of the model's versions; made if it is not there.
        version: integer from 0, or None for one more than the highest there (1 in an empty folder).
        fold: whether normalizations are absorbed into other weights, see `keras_bn.fold`.
        labels: names of the classes; adds `top_labels` and `top_scores`, of the likeliest five, to the outputs.
        preprocess: makes the model's input of a batch of pictures, uint8 of shape (batch, height, width, channels);
            TensorFlow operations or a Keras layer. With it, pixels are posted as they are.
        warmup: examples of what `serving_default` takes: an array, or a dictionary by input name. Also used to check.
        jit_compile: whether XLA compiles the signatures; a server has to be started to allow that.
        overwrite: whether a given version that is there is replaced.
        drift: whether there is a `batch_norm_drift`; it keeps its own copy of the weights.
        accuracy: for the card, in [0, 1].
        recalibration: the report of `keras_bn.recalibrate`, for the card.
        tolerance: largest relative error allowed; None for 1e-4, or 2e-2 where a layer computes in half precision.

    Returns:
        An `Exported`, with the `path` of the version.

    Raises:
        TypeError: when an argument is of the wrong type.
        ValueError: when an argument does not fit the model, the version is there already, or a check fails.
        ImportError: when `warmup` is given and `tensorflow-serving-api` is not installed.

    Example:

    ```python
    keras_bn.export(model, "served/fashion", labels=names, warmup=images[:8]).path  # served/fashion/1
    ```
    """
    _check_arguments(model, version, labels, preprocess, accuracy)
    base = Path(model_base_path)
    _versions.check_free(base, version, overwrite)
    if warmup is not None:
        _warmup.require()
    if tolerance is None:
        tolerance = default_tolerance(model)
    served_model, folding = model, None
    if fold:
        served_model, folding = fold_model(model, _fold_check(model, preprocess, warmup), tolerance)
    observed = model if drift and batch_norms_below(model) else None
    original = _signatures.Serving(model, preprocess, jit_compile)
    serving = _signatures.Serving(served_model, preprocess, jit_compile, named_after=original)
    examples = None if warmup is None else _examples(warmup, serving.inputs)
    with _versions.temporary_sibling(base) as folder:
        _reached("folder made")
        least = original.least_sizes()
        signatures = _trace(serving, labels, least)
        if observed is not None:
            signatures[DRIFT] = original.concrete(original.drift, original.inputs, least)
        root = tf.Module()
        root.kept = _resources(served_model, observed, preprocess)
        options = tf.saved_model.SaveOptions(experimental_custom_gradients=False)
        tf.saved_model.save(root, os.fspath(folder), signatures=signatures, options=options)
        _reached("model written")
        card = _card(model, signatures, labels, folding, accuracy, recalibration)
        (folder / CARD).parent.mkdir(exist_ok=True)
        (folder / CARD).write_text(json.dumps(card, indent=2) + "\n")
        if examples is not None:
            _warmup.write(folder, base.name, examples, list(signatures))
        _reached("extras written")
        errors = _check(folder, original, signatures, examples, tolerance, jit_compile)
        _reached("checked")
        path = _versions.rename_into_place(folder, base, version, overwrite)
        _reached("renamed")
    outputs = {n: tf.TensorSpec(t.shape, t.dtype, n) for n, t in signatures[SERVING].structured_outputs.items()}
    return Exported(path, int(path.name), serving.inputs, outputs, list(signatures), errors, folding)


def _check_arguments(model: Any, version: Any, labels: Any, preprocess: Any, accuracy: Any) -> None:
    check_model(model, built=True)
    if version is not None and (isinstance(version, bool) or not isinstance(version, int)):
        raise TypeError(f"`version` must be an integer from 0, or None for the next. Received: version={version!r}.")
    if version is not None and version < 0:
        raise ValueError(f"`version` must be an integer from 0, or None for the next. Received: version={version}.")
    if labels is not None and (isinstance(labels, str) or not all(isinstance(label, str) for label in labels)):
        raise TypeError(f"`labels` must be a sequence of strings, one for each class. Received: labels={labels!r}.")
    if preprocess is not None and not callable(preprocess):
        raise TypeError(f"`preprocess` must be a function or a Keras layer. Received: preprocess={preprocess!r}.")
    if accuracy is not None and not 0 <= accuracy <= 1:
        raise ValueError(f"`accuracy` must be in [0, 1]. Received: accuracy={accuracy!r}.")


def _reached(stage: str) -> None:
    for hook in STAGE_HOOKS:
        hook(stage)


def _fold_check(model: keras.Model, preprocess: Callable[[tf.Tensor], Any] | None, warmup: Any) -> Any:
    """The warm-up examples as the model itself takes them, to prove the folding on them too."""
    if warmup is None or not getattr(model, "inputs", None):
        return None
    if preprocess is not None:
        return preprocess(tf.convert_to_tensor(next(iter(keras.tree.flatten(warmup)))))
    serving = _signatures.Serving(model)
    examples = _examples(warmup, serving.inputs)
    return keras.tree.pack_sequence_as(_signatures.input_structure(model), [examples[name] for name in serving.inputs])


def _examples(warmup: Any, inputs: Mapping[str, tf.TensorSpec]) -> dict[str, tf.Tensor]:
    by_name = warmup if isinstance(warmup, dict) else {next(iter(inputs)): warmup} if len(inputs) == 1 else None
    if by_name is None or set(by_name) != set(inputs):
        raise ValueError(
            f"`warmup` must be a dictionary with the inputs {sorted(inputs)}, or an array where there is one input. "
            f"Received: warmup={sorted(by_name) if by_name else type(warmup).__name__}."
        )
    examples = {}
    for name, spec in inputs.items():
        value = np.asarray(by_name[name])
        if spec.dtype == tf.uint8 and value.dtype != np.uint8:
            raise ValueError(f"`warmup` must be uint8 pictures where `preprocess` is given. Received: {value.dtype}.")
        examples[name] = (
            tf.convert_to_tensor(value, spec.dtype) if value.dtype.kind in "OSU" else tf.cast(value, spec.dtype)
        )
        if not spec.shape.is_compatible_with(examples[name].shape) or not len(value):
            raise ValueError(
                f"`warmup` must have shape {tuple(spec.shape)} for input {name!r}, with one example at least. "
                f"Received: shape {value.shape}."
            )
    return examples


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


def _card(
    model: keras.Model,
    signatures: Mapping[str, Any],
    labels: Sequence[str] | None,
    folding: FoldingReport | None,
    accuracy: float | None,
    recalibration: Recalibration | None,
) -> dict[str, Any]:
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
    }


def _check(
    folder: Path,
    original: _signatures.Serving,
    signatures: Mapping[str, Any],
    examples: dict[str, tf.Tensor] | None,
    tolerance: float,
    compiled_is_fine: bool,
) -> Errors:
    """Whether what was written is fit to be served, and computes what the person's own model and `preprocess` do."""
    for name in signatures:
        check_graph(folder, name, compiled_is_fine)
        check_shapes(folder, name)
    loaded = tf.saved_model.load(os.fspath(folder))
    batches = [] if examples is None else [_seven_rows(examples)]
    if not any(spec.dtype == tf.string for spec in original.inputs.values()) or not batches:
        batches += [random_inputs(original.inputs, kind, "warmup", batch=ROWS) for kind in KINDS[:2]]
    errors = check_outputs(loaded.signatures[SERVING], original.predict, batches, tolerance)
    asked = dict.fromkeys(signatures, batches[-1])
    if DRIFT in signatures:
        check_outputs(loaded.signatures[DRIFT], original.drift, batches, tolerance)
    if BYTES in signatures:
        encoded = _warmup.encoded(batches[-1])
        asked[BYTES] = {BYTES: encoded}
        check_outputs(loaded.signatures[BYTES], lambda _: original.predict(batches[-1]), [asked[BYTES]], tolerance)
    for name, batch in asked.items():
        check_rows(name, loaded.signatures[name], batch, tolerance)
    return errors


def _seven_rows(examples: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    """The examples from the first on, again where there are fewer."""
    return {name: tf.gather(value, np.arange(ROWS) % len(value)) for name, value in examples.items()}
