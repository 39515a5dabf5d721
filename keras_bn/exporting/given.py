"""What a person gives to an export beside the model: the version's number, names of the classes, examples."""

import collections
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_bn import arguments
from keras_bn.examples import check_is_array, check_kind, computing_with, numbers, rows_not_finite, warn_of_rows
from keras_bn.exporting.checks import ROWS
from keras_bn.exporting.signatures import Serving, input_structure
from keras_bn.names import argument, shown
from keras_bn.warning import warn


def version_number(version: Any) -> int | None:
    """One that a server takes, or None for the next."""
    if version is None:
        return None
    version = arguments.whole_number("version", version, 0, ", or None for the next")
    if version >= 2**63:
        raise ValueError(
            f"`version` must be an integer from 0 to 2**63 - 1, or None for the next. Received: version={version}."
        )
    return version


def class_names(labels: Any) -> list[str] | None:
    """None of them blank; of those that come twice is warned."""
    if labels is None:
        return None
    allowed = "`labels` must be a sequence of strings that are not blank, one for each class."
    labels = labels.tolist() if isinstance(labels, np.ndarray) else labels
    is_sequence = isinstance(labels, Sequence) and not isinstance(labels, str | bytes)
    if not is_sequence or not all(isinstance(label, str) for label in labels):
        raise TypeError(f"{allowed} Received: labels={shown(labels)}.")
    blank = [number for number, label in enumerate(labels) if not label.strip()]
    if blank:
        raise ValueError(f"{allowed} Received: {shown(labels[blank[0]])} for class {blank[0]}, counted from 0.")
    broken = [number for number, label in enumerate(labels) if label.encode(errors="ignore").decode() != label]
    if broken:
        raise ValueError(
            "`labels` must be text, which half of a surrogate pair is not. "
            f"Received: {shown(labels[broken[0]])} for class {broken[0]}, counted from 0."
        )
    twice = [label for label, times in collections.Counter(labels).items() if times > 1]
    if twice:  # Refused it is not: ImageNet has two classes that are called "crane".
        warn(
            "`labels` should be another string for each class, as `top_labels` tells classes of one name not apart. "
            f"Received: {shown(twice[0])} for classes {[n for n, label in enumerate(labels) if label == twice[0]]}"
            f"{f', and {len(twice) - 1} more' if len(twice) > 1 else ''}."
        )
    return list(labels)


def examples(
    warmup: Any, model: keras.Model, original: Serving, least: Mapping[str, list[int]]
) -> dict[str, tf.Tensor]:
    """What was given to warm a server up with, by input name, once the model has computed with it."""
    inputs = original.inputs
    if len(inputs) == 1 and not isinstance(warmup, Mapping):
        warmup = _of_one_input(warmup, next(iter(inputs.values())))
    structure = input_structure(model)
    takes_list = isinstance(structure, list | tuple) and len(inputs) > 1
    in_order = warmup if takes_list and isinstance(warmup, list | tuple) else [warmup]
    by_name = warmup if isinstance(warmup, Mapping) else dict(zip(inputs, in_order, strict=False))
    if by_name.keys() != inputs.keys():
        served = dict(zip((leaf.name for leaf in keras.tree.flatten(structure)), inputs, strict=True))
        by_name = {served.get(name, argument(name)): value for name, value in by_name.items()}
    if by_name.keys() != inputs.keys() or len(in_order) > len(inputs):
        if not isinstance(warmup, Mapping):
            check_is_array("warmup", warmup)
        alternative = "a list of arrays in their order" if takes_list else "an array where there is one input"
        got = sorted(warmup) if isinstance(warmup, Mapping) else type(warmup).__name__
        raise ValueError(
            f"`warmup` must be a dictionary with the inputs {list(inputs)}, or {alternative}. Received: warmup={got}"
            f"{f' of {len(warmup)}' if isinstance(warmup, list | tuple) else ''}."
        )
    tensors = {name: _example(name, by_name[name], spec, least[name]) for name, spec in inputs.items()}
    with computing_with("warmup", model):
        outputs = original.predict(tensors).values()
    not_finite = rows_not_finite("warmup", list(tensors.values()), list(outputs))
    if not any(np.any(np.isfinite(numbers(output))) for output in outputs):
        raise ValueError(
            "`warmup` must be examples for which the model gives finite numbers, as it is checked on them. "
            "Received: outputs of NaN and infinities only."
        )
    warn_of_rows("warmup", not_finite)
    return tensors


def _of_one_input(warmup: Any, spec: tf.TensorSpec) -> Any:
    """The array in a list of one; a list of what has the rank of an example is the examples."""
    if not isinstance(warmup, list | tuple):
        return warmup
    arrays = [value for value in warmup if len(getattr(value, "shape", ())) == spec.shape.rank]
    if not arrays:
        return warmup
    if len(warmup) > 1:
        raise ValueError(
            f"`warmup` must be an array for the one input {spec.name!r}, without targets; batches are put together by "
            f"`np.concatenate`. Received: a {type(warmup).__name__} of {len(warmup)}, the first of shape "
            f"{tuple(arrays[0].shape)}."
        )
    return arrays[0]


def _example(name: str, given: Any, spec: tf.TensorSpec, least: list[int]) -> tf.Tensor:
    """What is given for one input, as a tensor that the model can compute with."""
    check_is_array("warmup", given)
    try:
        value = np.asarray(given)
    except ValueError as error:
        raise ValueError(
            f"`warmup` must have one shape for all examples of input {name!r}. Received: {error}"
        ) from error
    if spec.dtype == tf.uint8 and spec.shape.rank == 4 and value.dtype != np.uint8:
        shape = tuple(spec.shape[1:])
        raise ValueError(
            f"`warmup` must be uint8 pictures of shape (n, {', '.join(map(str, shape))}) for input {name!r}, decoded. "
            f"Received: dtype {_dtype_text(value)}, shape {value.shape}."
        )
    if (value.dtype.kind in "OSU") != (spec.dtype == tf.string):
        wanted = "strings" if spec.dtype == tf.string else "numbers"
        raise ValueError(f"`warmup` must be {wanted} for input {name!r}. Received: dtype {_dtype_text(value)}.")
    check_kind("warmup", name, value, spec.dtype)
    fits = spec.shape.is_compatible_with(value.shape)
    if not fits or any(size < smallest for size, smallest in zip(value.shape, least, strict=True)):
        raise ValueError(
            f"`warmup` must have shape {tuple(spec.shape)} for input {name!r}, with sizes of at least {least}. "
            f"Received: shape {value.shape}."
        )
    return tf.convert_to_tensor(value, spec.dtype) if spec.dtype == tf.string else tf.cast(value, spec.dtype)


def _dtype_text(value: Any) -> str:
    return {"S": "bytes", "U": "str"}.get(value.dtype.kind, str(value.dtype))


def seven_rows(tensors: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    """The examples from the first on, again where there are fewer."""
    return {name: tf.gather(value, np.arange(ROWS) % len(value)) for name, value in tensors.items()}
