"""What is known of a tensor: how it depends on the rows that a request brings."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import tensorflow as tf

# Not tuples: two of different kinds must never be equal, and those without fields would be.


@dataclass(frozen=True)
class Fixed:
    """The same whatever the rows hold and however many they are; it may depend on what requests of a group share."""


@dataclass(frozen=True)
class Rows:
    """Axis 0 is the rows', in their order, and what stands for one row depends on that row alone.

    Attributes:
        per: How many entries of axis 0 stand for one row; what reckons it where that is not known.
    """

    per: int | tf.Operation = 1


@dataclass(frozen=True)
class Across:
    """Axis 1 is the rows', in their order, and what stands for one row depends on that row alone."""


@dataclass(frozen=True)
class Blocks:
    """Axis 0 is made of blocks that have all rows each, in their order; what stands for a row depends on it alone.

    Attributes:
        count: How many blocks.
    """

    count: int


@dataclass(frozen=True)
class Multiple:
    """The number of rows, times a factor; what reckons it where that is not known."""

    factor: int | tf.Operation


@dataclass(frozen=True)
class Sizes:
    """A whole number, or a list of them, that may depend on the number of rows and on nothing else.

    Attributes:
        entries: What is known of each: an integer, a multiple of the number of rows, or `None` for a fixed number.
    """

    entries: tuple[int | Multiple | None, ...]


@dataclass(frozen=True)
class Every:
    """True where something holds of every row by itself: for a group true if it is for each of its requests."""


@dataclass(frozen=True)
class RowList:
    """A list of tensors, one a row, each depending on its row alone."""


@dataclass(frozen=True)
class NewList:
    """An empty list for one tensor a row."""


@dataclass(frozen=True)
class Steps:
    """A list of tensors, as many as for any rows, each with the rows on its axis 0, each once."""


@dataclass(frozen=True)
class NewSteps:
    """An empty list for as many tensors as for any rows.

    Attributes:
        fixed: Whether the shape of a tensor in it is fixed as well.
    """

    fixed: bool


@dataclass(frozen=True)
class Counter:
    """In a loop over the rows: the number of the row whose turn it is."""


@dataclass(frozen=True)
class Item:
    """In a loop over the rows: something that depends on the row whose turn it is, and on no other."""


@dataclass(frozen=True)
class Unknown:
    """Nothing is known.

    Attributes:
        reason: Why, for a person.
    """

    reason: str


Kind: TypeAlias = (
    Fixed | Rows | Across | Blocks | Sizes | Every | RowList | NewList | Steps | NewSteps | Counter | Item | Unknown
)


# What axes and orders of axes are reckoned by, of numbers that the graph holds.
_RECKONED: dict[str, Callable[..., Any]] = {
    "AddV2": np.add,
    "ConcatV2": lambda *values: np.concatenate(values[:-1], values[-1]),
    "Mul": np.multiply,
    "Range": np.arange,
    "Sub": np.subtract,
}

# Says what is known of an operation's outputs, each or all alike, from what is known of its inputs.
Rule: TypeAlias = Callable[[tf.Operation, Sequence[Kind]], Kind | list[Kind]]


class NotProvedError(Exception):
    """Something keeps a signature's rows from being proved independent."""


def is_fixed(kind: Kind) -> bool:
    """Whether it is the same for a group as for each of its requests."""
    match kind:
        case Fixed() | NewSteps(fixed=True):
            return True
        case Sizes(entries):
            return not any(isinstance(entry, Multiple) for entry in entries)
    return False


def all_fixed(kinds: Iterable[Kind]) -> bool:
    """Whether `is_fixed` holds of all."""
    return all(is_fixed(kind) for kind in kinds)


def refuse(operation: tf.Operation, why: str) -> Unknown:
    """Returns that nothing is known of what an operation makes."""
    return Unknown(f"{operation.type} `{operation.name}` {why}")


def rank(tensor: tf.Tensor) -> int | None:
    """Returns the number of axes, `None` where it is not known."""
    return tensor.shape.rank


def static(tensor: tf.Tensor) -> Any:
    """Returns the value as a NumPy array where it is known before anything runs, else `None`."""
    tensor = traced(tensor)
    value = tf.get_static_value(tensor)
    if value is None and (tensor.op.type in _RECKONED or (tensor.op.type == "Pack" and rank(tensor) == 1)):
        values = [static(operand) for operand in tensor.op.inputs]
        if all(operand is not None for operand in values):
            reckoned = values if tensor.op.type == "Pack" else _RECKONED[tensor.op.type](*values)
            return np.asarray(reckoned, tensor.dtype.as_numpy_dtype)
    return value


def static_entries(tensor: tf.Tensor) -> list[int | None] | None:
    """Returns the whole numbers of a scalar or list, `None` for each that is not known before anything runs."""
    value = static(tensor)
    value = tf.get_static_value(traced(tensor), partial=True) if value is None else value
    if value is None:
        return None
    numbers = np.asarray(value, object).reshape(-1).tolist()
    return [None if number is None else int(number) for number in numbers]


def traced(tensor: tf.Tensor) -> tf.Tensor:
    """Returns the tensor that is handed on unchanged as this one."""
    while tensor.op.type == "Identity":
        tensor = tensor.op.inputs[0]
    return tensor


def axes(tensor: tf.Tensor, of_rank: int | None) -> list[int] | None:
    """Returns the axes that a tensor names, counted from the front, `None` where they are not known."""
    value = static(tensor)
    if value is None:
        return None
    numbers = [int(number) for number in value.reshape(-1)]
    if of_rank is None:
        return None
    return [number + of_rank if number < 0 else number for number in numbers]


def entries(tensor: tf.Tensor, kind: Kind) -> Sequence[int | Multiple | None] | None:
    """Returns what is known of each number of a scalar or list, `None` where not even their count is known."""
    if isinstance(kind, Sizes):
        return kind.entries
    if not isinstance(kind, Fixed) or rank(tensor) not in (0, 1):
        return None
    if tensor.dtype.is_integer and (numbers := static_entries(tensor)) is not None:
        return numbers
    count = 1 if rank(tensor) == 0 else tensor.shape[0]
    return None if count is None else [None] * count
