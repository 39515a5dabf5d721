"""Whatever a person calls data, as batches of a model's inputs that can be gone through again."""

import itertools
import numbers
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_bn import arguments
from keras_bn.examples import as_arrays, check_shapes, rows
from keras_bn.model import check_one_argument, graph_of, input_structure
from keras_bn.names import shown

Batch = tuple[Any, Any]


class Batches:
    """Goes through `data` as (inputs, sample_weight), as often as asked.

    Args:
        data: inputs, split into batches of `batch_size`: an array, a structure of arrays, or a tuple
            `(inputs,)`, `(inputs, targets)` or `(inputs, targets, sample_weight)`; or batches of such: a
            `tf.data.Dataset`, a `keras.utils.PyDataset`, any iterable, a generator. A generator can be gone through
            only once, so its batches are kept in memory. A list or tuple of arrays may be inputs: `settled` decides. Of
            a batch that is distributed among replicas the part of each replica of this process is a batch.
        steps: number of batches to take, or None for all.
        batch_size: for arrays.
    """

    def __init__(self, data: Any, steps: int | None = None, batch_size: int = 32):
        if steps is not None:
            steps = arguments.whole_number("steps", steps, alternative=", or None for all batches")
        batch_size = arguments.whole_number("batch_size", batch_size)
        _refuse_numbers(data)
        if isinstance(data, tuple) and len(data) > 3 and all(map(_is_arrays, data)):
            _unpacked(data)  # Refuses it: batches are in a list.
        if isinstance(data, str | bytes | keras.KerasTensor) or not (
            _is_arrays(data) or isinstance(data, Iterable | keras.utils.PyDataset)
        ):
            raise TypeError(
                "`data` must be an array, a `tf.data.Dataset`, a `keras.utils.PyDataset` or an iterable of batches. "
                f"Received: data={shown(data)} of type {type(data).__name__}."
            )
        self._data, self._steps, self._batch_size = data, steps, batch_size
        self._arrays: bool | None = None if isinstance(data, list) and _is_arrays(data) else _is_arrays(data)
        self._kept: list[Batch] = []
        self._model: keras.Model | None = None
        once_only = not self._arrays and isinstance(data, Iterator)
        # One iterator of parts: who stops in the middle of a distributed batch goes on with its next part.
        self._source = itertools.chain.from_iterable(map(_parts, _take(data, steps))) if once_only else None
        length = None if self._arrays is None else self._length()
        if length is None and steps is None and _is_endless(data):
            raise ValueError(
                "`steps` must be given for data that never ends (a `repeat()`ed data set). Received: steps=None."
            )
        self.length = steps if length is None else length if steps is None else min(steps, length)
        if isinstance(data, tf.distribute.DistributedDataset | tf.distribute.DistributedIterator):
            self.length = None  # A batch counts as often as it has parts, of which some are empty.

    def settled(self, model: keras.Model) -> "Batches":
        """Decides what lists and tuples of arrays are.

        A list of arrays is batches where `model` has one input, and its inputs where it has several. A tuple of as
        many arrays as it has inputs, of which the first alone would not do, is its inputs; so is a list or tuple with
        others within that has the structure of its inputs.

        Raises:
            TypeError: for a model that takes its inputs as several arguments.
            ValueError: for a list of arrays and a model that does not tell how many inputs it has.
        """
        check_one_argument(model)
        self._model = model
        takes = [] if graph_of(model) is None else model.inputs
        if isinstance(self._data, tuple):
            if not _is_inputs(self._data, model, len(takes)):
                return self
            self._arrays, self._data = True, (self._data,)
        elif self._arrays is not None:
            return self
        elif any(map(_is_container, self._data)):
            self._arrays = _is_inputs(self._data, model, len(takes))
        elif takes:
            self._arrays = len(takes) > 1
        else:
            raise ValueError(
                "`data` must say whether a list of arrays is inputs or batches, as a subclassed model does not tell "
                "how many inputs it has: `([a, b],)` for inputs `[a, b]`, `[(a,), (b,)]` for batches. "
                f"Received: a list of {len(self._data)} arrays."
            )
        length = self._length()
        self.length = length if self._steps is None or length is None else min(self._steps, length)
        return self

    def check_shapes(self) -> None:
        """Holds the shape of the first batch against the inputs of the model of `settled`, where it tells them.

        The batches of a `tf.data.Dataset` are not read, which may take long and draws from its random numbers: their
        shapes are known. That of a generator is kept, so none is lost.

        Raises:
            ValueError: when the model cannot take it, or there is none.
        """
        if isinstance(self._data, tf.data.Dataset | tf.distribute.DistributedDataset):
            x, _ = self._inputs_of(self._data.element_spec)
        else:
            first = next(iter(self), None)
            if first is None:
                raise ValueError("`data` must hold at least one batch. Received: no batch.")
            x, _ = first
        check_shapes("data", x, self._model)

    def __iter__(self) -> Iterator[Batch]:
        if self._source is None:
            for batch in _take(self._raw(), self._steps):
                yield from map(self._ready, _parts(batch))
            return
        yield from self._kept
        for batch in self._source:
            self._kept.append(self._ready(batch))
            yield self._kept[-1]
        self.length = len(self._kept)

    def _inputs_of(self, batch: Any) -> Batch:
        x, _, weight = _unpacked(batch)
        graph = graph_of(self._model)
        takes = [] if graph is None else graph.inputs
        if len(takes) > 1 and hasattr(x, "shape"):
            raise ValueError(
                f"`data` must have an array for each of the {len(takes)} inputs of the model, in a list or dictionary; "
                "a tuple is `(inputs, targets, sample_weight)` or shorter. "
                f"Received: one array of shape {x.shape}."
            )
        return x, weight

    def _ready(self, batch: Any) -> Batch:
        x, weight = self._inputs_of(batch)
        return keras.tree.map_structure(_as_tensor, as_arrays("data", x, self._model, least=0)), weight

    def _raw(self) -> Iterator[Any]:
        if self._arrays:
            x, _, weight = _unpacked(self._data if isinstance(self._data, tuple) else (self._data,))
            for start in range(0, _rows(x), self._batch_size):
                end = start + self._batch_size
                yield (
                    keras.tree.map_structure(lambda a, start=start, end=end: rows(a, start, end), x),
                    None,
                    None if weight is None else weight[start:end],
                )
        elif isinstance(self._data, keras.utils.PyDataset):
            for i in range(self._length() or 0):
                yield self._data[i]
        else:
            yield from self._data

    def _length(self) -> int | None:
        length = self._known_length()
        if length == 0:
            raise ValueError("`data` must hold at least one batch. Received: no batch.")
        return length

    def _known_length(self) -> int | None:
        if self._arrays:
            x, *others = self._data if isinstance(self._data, tuple) else (self._data,)
            _check_beside(_rows(x), others)
            return -(-_rows(x) // self._batch_size)
        if isinstance(self._data, tf.data.Dataset):
            known = int(self._data.cardinality())
            return known if known >= 0 else None
        if isinstance(self._data, keras.utils.PyDataset):
            return self._data.num_batches
        return len(self._data) if hasattr(self._data, "__len__") else None


def _refuse_numbers(data: Any) -> None:
    """Lists of numbers, which could be one array or batches; as `fit` does, but in words."""
    for part in data if isinstance(data, tuple) else [data]:
        leaf = part
        while isinstance(leaf, list) and leaf:
            leaf = leaf[0]
        if isinstance(part, list) and isinstance(leaf, numbers.Number):
            raise TypeError(
                "`data` must hold arrays, not lists of numbers; `np.asarray(...)` makes an array of one. "
                f"Received: a list of {len(part)} that begins with {shown(leaf)}."
            )


def _unpacked(batch: Any) -> tuple[Any, Any, Any]:
    """Inputs, targets and weights, None where there are none."""
    _refuse_numbers(batch if isinstance(batch, list) else None)
    if isinstance(batch, list | tuple) and not 0 < len(batch) < 4:
        kinds = ", ".join(type(part).__name__ for part in batch) or "nothing"
        raise ValueError(
            "`data` must have batches of inputs, `(inputs,)`, `(inputs, targets)` or `(inputs, targets, "
            "sample_weight)`; several inputs are a list or dictionary in the first place. "
            f"Received: a batch of {len(batch)} parts ({kinds})."
        )
    return keras.utils.unpack_x_y_sample_weight(batch)


def _check_beside(rows: int, others: Sequence[Any]) -> None:
    """Targets and weights that stand beside arrays; what stands in batches of others is nobody's business here."""
    for what, values in zip(("targets", "sample weights"), others, strict=False):
        for leaf in keras.tree.flatten(values):
            if leaf is not None and (not len(leaf.shape) or int(leaf.shape[0]) != rows):
                raise ValueError(
                    f"`data` must have as many {what} as inputs, along the first axis. "
                    f"Received: {rows} inputs, and {what} of shape {tuple(leaf.shape)}."
                )


def _parts(batch: Any) -> Iterator[Any]:
    """What each replica of this process has of a batch, those without an example left out; else the batch itself."""
    values = [leaf for leaf in tf.nest.flatten(batch) if isinstance(leaf, tf.distribute.DistributedValues)]
    if not values:
        yield batch
        return
    for replica in range(len(values[0].values)):
        part = tf.nest.map_structure(
            lambda leaf, i=replica: leaf.values[i] if isinstance(leaf, tf.distribute.DistributedValues) else leaf, batch
        )
        if all(leaf.shape[0] for leaf in tf.nest.flatten(part) if tf.is_tensor(leaf) and leaf.shape.rank):
            yield part


def _take(batches: Iterable[Any], steps: int | None) -> Iterator[Any]:
    for i, batch in enumerate(batches):
        if i == steps:
            return
        yield batch
        if i + 1 == steps:  # Before the iterable is asked for one more, which a generator would make in vain.
            return


def _is_arrays(data: Any) -> bool:
    """A structure of arrays, or a tuple of such, targets and weights; not a tuple of batches that are tuples."""
    if isinstance(data, tuple):
        x, *others = data or (None,)
        parts = [x, *(part for part in others if part is not None)]
        return len(others) < 3 and all(not isinstance(part, tuple) and _is_arrays(part) for part in parts)
    leaves = keras.tree.flatten(data)
    return bool(leaves) and all(isinstance(leaf, np.ndarray) or tf.is_tensor(leaf) for leaf in leaves)


def _is_container(data: Any) -> bool:
    return isinstance(data, dict | list | tuple)


def _is_inputs(data: list | tuple, model: keras.Model, count: int) -> bool:
    """Whether `data` in whole is what a model of `count` inputs takes, several arrays."""
    if not (count > 1 and _is_arrays(list(data)) and len(keras.tree.flatten(data)) == count):
        return False
    flat = not any(map(_is_container, data))
    return flat or _have_one_structure(data, input_structure(model))


def _have_one_structure(one: Any, other: Any) -> bool:
    """With lists and tuples taken for the same, as Keras does."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_have_one_structure(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_have_one_structure, one, other))
    return not _is_container(one) and not _is_container(other)


def _is_endless(data: Any) -> bool:
    if isinstance(data, tf.data.Dataset):
        return bool(data.cardinality() == tf.data.INFINITE_CARDINALITY)
    if isinstance(data, tf.distribute.DistributedDataset):  # Some of them know it, as an attribute.
        return bool(getattr(data, "cardinality", 0) == tf.data.INFINITE_CARDINALITY)
    return isinstance(data, keras.utils.PyDataset) and data.num_batches is None


def _rows(x: Any) -> int:
    rows = {int(leaf.shape[0]) if len(leaf.shape) else None for leaf in keras.tree.flatten(x)}
    if len(rows) != 1 or None in rows:
        raise ValueError(
            "`data` must hold arrays of one length; for a list of batches make each a tuple, `(inputs,)`. "
            f"Received: lengths {sorted(-1 if row is None else row for row in rows)}."
        )
    return rows.pop() or 0


def _as_tensor(x: Any) -> Any:
    return x if tf.is_tensor(x) else tf.convert_to_tensor(x)
