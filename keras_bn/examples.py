"""What a person gives a model to compute with: arrays of examples, and whose mistake it is where it cannot."""

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_bn.model import graph_of
from keras_bn.names import shown
from keras_bn.warning import warn


def as_arrays(argument: str, examples: Any, model: keras.Model | None = None, least: int = 1) -> Any:
    """`examples` in their structure, with an array or a tensor for each input.

    Args:
        argument: what a person calls them.
        examples: an array, or a structure of arrays; None stands for an optional input of several.
        model: what they are for, where it tells what it takes.
        least: how many examples there have to be.

    Raises:
        TypeError: for what is no array of numbers, booleans or strings.
        ValueError: when there are fewer examples, not as many for each input, for an input of whole numbers others, or
            a list of another number of arrays than the model has inputs.
    """
    arrays = _arrays_in(argument, examples)
    takes = _inputs(model)
    if takes and isinstance(arrays, list | tuple) and len(keras.tree.flatten(arrays)) != len(takes):
        raise ValueError(
            f"`{argument}` must be an array for each of the {len(takes)} inputs of the model; batches of one input are "
            f"put together by `np.concatenate`. Received: {len(keras.tree.flatten(arrays))} arrays."
        )
    there = [leaf for leaf in keras.tree.flatten(arrays) if leaf is not None]
    rows = [int(leaf.shape[0]) if len(leaf.shape) else None for leaf in there]
    if not there or None in rows or len(set(rows)) > 1 or min(row or 0 for row in rows) < least:
        raise ValueError(
            f"`{argument}` must have one example at least, along the first axis, and as many for each input. "
            f"Received: {f'shapes {[tuple(leaf.shape) for leaf in there]}' if there else 'nothing'}."
        )
    for leaf, spec in _beside_inputs(arrays, model):
        check_kind(argument, spec.name, leaf, tf.as_dtype(spec.dtype))
    if any(map(tf.is_tensor, there)):  # Keras takes arrays or tensors, and not both; strings are tensors.
        return keras.tree.map_structure(lambda leaf: None if leaf is None else _as_tensor(leaf), arrays)
    return arrays


def check_is_array(argument: str, value: Any) -> None:
    """Refuses what cannot hold examples: a number, a text, a path, a data set.

    Raises:
        TypeError: with the value, shortened.
    """
    is_stream = isinstance(value, tf.data.Dataset | Iterator)
    has_rows = tuple(value.shape) != () if hasattr(value, "shape") else hasattr(value, "__len__")
    if has_rows and not is_stream and not isinstance(value, str | bytes):
        return
    advice = "; of a data set take a batch, `next(iter(dataset))`, and of that the inputs" if is_stream else ""
    raise TypeError(
        f"`{argument}` must be arrays of numbers, booleans or strings, with the examples along the first axis{advice}. "
        f"Received: {shown(value)} of type {type(value).__name__}."
    )


def check_kind(argument: str, name: str, values: Any, dtype: tf.DType) -> None:
    """Refuses values that are another kind of thing than an input: strings, complex numbers, or for integers fractions.

    Raises:
        ValueError: naming the input.
    """
    there = tf.as_dtype(values.dtype)
    if _kind(there) != _kind(dtype):
        raise ValueError(
            f"`{argument}` must be {_kind(dtype)} for input {name!r}. "
            f"Received: {_kind(there)}, of dtype {values.dtype.name}."
        )
    if not dtype.is_integer or there == dtype or isinstance(values, tf.RaggedTensor | tf.SparseTensor):
        return
    known = np.asarray(values).astype("float64" if there.is_floating else there.as_numpy_dtype)
    if known.size and not (np.all(known == np.round(known)) and dtype.min <= known.min() <= known.max() <= dtype.max):
        raise ValueError(
            f"`{argument}` must be whole numbers from {dtype.min} to {dtype.max} for input {name!r}, which takes "
            f"{dtype.name}. Received: dtype {values.dtype.name}, with values from {known.min():g} to {known.max():g}."
        )


def check_shapes(argument: str, examples: Any, model: keras.Model | None) -> None:
    """Refuses a batch that a model cannot take, going by shapes alone, as far as the model tells them.

    Args:
        argument: what a person calls the batch.
        examples: arrays, tensors, or what describes tensors.
        model: what takes them.

    Raises:
        ValueError: naming the input, with both shapes.
    """
    for leaf, tensor in _beside_inputs(examples, model):
        shape = getattr(leaf, "shape", None)
        if shape is None or tf.TensorShape(shape).rank is None:
            continue
        sizes, needed = list(shape), list(tensor.shape)
        if not _fits(sizes, needed):
            unbatched = _fits([None, *sizes], needed)
            raise ValueError(
                f"`{argument}` must have batches of shape {tuple(needed)} for input {tensor.name!r}"
                f"{'; what is not in batches gets into them by `.batch(...)`' if unbatched else ''}. "
                f"Received: {tuple(sizes)}."
            )


def rows_not_finite(argument: str, inputs: Any, outputs: Any) -> int:
    """How many examples made a NaN or an infinity of finite inputs: of these nothing can be proved.

    Args:
        argument: what a person calls the examples.
        inputs: a structure of arrays, the examples along the first axis.
        outputs: what was made of them, likewise.

    Raises:
        ValueError: when an example is not finite itself, nor what was made of it; names it. What takes a NaN for a
            missing value, and makes finite numbers of it, may have it.
    """
    made = _broken_rows(outputs)
    for number, leaf in enumerate(keras.tree.flatten(inputs)):
        given = made & _broken_rows(leaf)
        if given:
            row = min(given)
            values = numbers(leaf)[row]
            kinds = ", ".join(f"{value:g}" for value in np.unique(values[~np.isfinite(values)]))
            which = f" of input {number}, counted from 0," if len(keras.tree.flatten(inputs)) > 1 else ""
            raise ValueError(
                f"`{argument}` must be finite: of what is made of a NaN or an infinity nothing can be proved. "
                f"Received: example {row} (counted from 0){which} with {kinds}"
                f"{f', and {len(given) - 1} more such examples' if len(given) > 1 else ''}."
            )
    return len(made)


def warn_of_rows(argument: str, count: int) -> None:
    """That so many examples prove nothing."""
    if count:
        warn(
            f"`{argument}` should be examples of which the model makes finite numbers, as others prove nothing. "
            f"Received: {count} of which it does not."
        )


def numbers(leaf: Any) -> np.ndarray:
    """The floating-point numbers of an array, as many rows as it has; of any other, zeros."""
    if not tf.as_dtype(leaf.dtype).is_floating:
        return np.zeros(np.shape(dense(leaf))[:1])
    return dense(leaf).astype("float64")


def rows(array: Any, first: int, last: int) -> Any:
    """The examples from `first` on and before `last`, as many of them as there are."""
    if isinstance(array, tf.SparseTensor):
        others = [0] * (array.shape.rank - 1)
        return tf.sparse.slice(array, [first, *others], [last - first, *array.shape[1:]])
    return array[first:last]


def dense(tensor: Any) -> np.ndarray:
    """As an array, where it is ragged or sparse with zeros for what is not there."""
    if isinstance(tensor, tf.RaggedTensor):
        tensor = tensor.to_tensor()
    elif isinstance(tensor, tf.SparseTensor):
        tensor = tf.sparse.to_dense(tensor)
    return np.asarray(tensor)


def _broken_rows(structure: Any) -> set[int]:
    """Along the first axis of all arrays, those with a NaN or an infinity."""
    rows: set[int] = set()
    for leaf in keras.tree.flatten(structure):
        values = np.zeros(0) if leaf is None else numbers(leaf)
        if values.ndim:
            finite = np.isfinite(values).reshape(len(values), -1).all(axis=1)
            rows |= set(np.flatnonzero(~finite).tolist())
    return rows


@contextlib.contextmanager
def computing_with(argument: str, model: Any) -> Iterator[None]:
    """Around the calls of a model for what a person gave: what it cannot compute with is said of that argument.

    Args:
        argument: what the person calls it.
        model: a Keras model, whose inputs are told; or anything else that computes.

    Raises:
        ValueError: for whatever Keras and TensorFlow refuse in a call; errors of ours are what they are.
    """
    try:
        yield
    except (ValueError, TypeError, tf.errors.InvalidArgumentError, tf.errors.UnimplementedError) as error:
        text = str(error)
        if text.startswith("`"):
            raise
        shapes = ", ".join(f"{tensor.name!r} {tuple(tensor.shape)}" for tensor in _inputs(model))
        takes = f", inputs {shapes}" if shapes else ""
        raise ValueError(
            f"`{argument}` must be what the model can compute with{takes}. Received: {reason(error)}"
        ) from error


def reason(error: Exception) -> str:
    """The one line of a message that says it, without colours, nodes and what Keras puts around it."""
    message = error.message if isinstance(error, tf.errors.OpError) else str(error)
    text = re.sub(r"\x1b\[[0-9;]*m|\{\{.*?\}\}|\[Op:.*", "", message)
    # Keras prints the values where their shape is meant.
    text = re.sub(r"Invalid input shape for input .*?\. Expected shape", "Expected shape", text, flags=re.DOTALL)
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    around = ("Exception encountered", "Graph execution", "Detected at", "Arguments received")
    said = [line for line in lines if not line.startswith(around)]
    return next((line for line in said if "must" in line), (said or lines or [type(error).__name__])[0])


def _arrays_in(argument: str, examples: Any) -> Any:
    if isinstance(examples, dict):
        return {name: None if value is None else _arrays_in(argument, value) for name, value in examples.items()}
    leaves = [leaf for leaf in keras.tree.flatten(examples) if leaf is not None]
    if examples is None or not all(hasattr(leaf, "shape") for leaf in leaves):  # Numbers in lists, or none.
        return _as_array(argument, examples)
    return keras.tree.map_structure(lambda leaf: None if leaf is None else _as_array(argument, leaf), examples)


def _as_array(argument: str, value: Any) -> Any:
    check_is_array(argument, value)
    if isinstance(value, tf.RaggedTensor | tf.SparseTensor) or tf.is_tensor(value):
        return value
    try:
        array = np.asarray(value)
        # TensorFlow takes objects that are strings.
        return array if array.dtype.kind in "biufc" else tf.convert_to_tensor(array)
    except (TypeError, ValueError, tf.errors.OpError) as error:
        raise TypeError(
            f"`{argument}` must be arrays of numbers, booleans or strings, each of one shape for all examples. "
            f"Received: {shown(value)} of type {type(value).__name__}."
        ) from error


def _as_tensor(leaf: Any) -> Any:
    return leaf if tf.is_tensor(leaf) else tf.convert_to_tensor(leaf)


def _kind(dtype: tf.DType) -> str:
    return "strings" if dtype == tf.string else "complex numbers" if dtype.is_complex else "real numbers"


def _inputs(model: Any) -> list[Any]:
    graph = graph_of(model)
    return [] if graph is None else list(graph.inputs)


def _beside_inputs(arrays: Any, model: keras.Model | None) -> list[tuple[Any, Any]]:
    """Each array that is there with the input it is for, as far as that can be told."""
    inputs = _inputs(model)
    if isinstance(arrays, dict) and not isinstance(graph_of(model).input if inputs else None, dict):
        pairs = [(arrays[tensor.name], tensor) for tensor in inputs if tensor.name in arrays]
    else:
        leaves = keras.tree.flatten(arrays)
        pairs = list(zip(leaves, inputs, strict=True)) if len(leaves) == len(inputs) else []
    return [(leaf, tensor) for leaf, tensor in pairs if leaf is not None and hasattr(leaf, "dtype")]


def _fits(sizes: list[int | None], needed: list[int | None]) -> bool:
    """As Keras has it, for which a last axis of size 1 may be there or not."""
    if len(sizes) == len(needed) - 1 and needed[-1] == 1:
        sizes = [*sizes, 1]
    elif len(sizes) == len(needed) + 1 and sizes[-1] == 1:
        sizes = sizes[:-1]
    if len(sizes) != len(needed):
        return False
    return all(None in two or two[0] == two[1] for two in zip(sizes[1:], needed[1:], strict=True))
