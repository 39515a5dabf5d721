"""Rules for the numbers that graphs reckon shapes with: which of them depend on the number of rows, and how."""

import math
from collections.abc import Sequence

import tensorflow as tf

from keras_bn_serving.engine.independence.kinds import (
    Fixed,
    Kind,
    Multiple,
    Rows,
    Sizes,
    all_fixed,
    entries,
    is_fixed,
    rank,
    refuse,
    static,
)


def shape(operation: tf.Operation, kinds: Sequence[Kind]) -> list[Kind]:
    """Shape and ShapeN: the first size of rows is a multiple of their number."""
    return [_shape_of(operation, tensor, kind) for tensor, kind in zip(operation.inputs, kinds, strict=True)]


def rank_of(operation: tf.Operation, kinds: Sequence[Kind]) -> Kind:
    """Rank: the same for any number of rows."""
    return Fixed() if isinstance(kinds[0], Rows | Sizes) else refuse(operation, "takes what is not known")


def size(operation: tf.Operation, kinds: Sequence[Kind]) -> Kind:
    """Size: of rows a multiple of their number where the size of one is known."""
    if isinstance(kinds[0], Sizes):
        return Fixed()
    tail = operation.inputs[0].shape[1:] if rank(operation.inputs[0]) else None
    if not isinstance(kinds[0], Rows) or tail is None or tail.num_elements() is None:
        return refuse(operation, "counts entries of rows of unknown size")
    if not isinstance(kinds[0].per, int):
        return refuse(operation, "counts entries of rows of unknown size")
    return Sizes((Multiple(kinds[0].per * tail.num_elements()),))


def same(operation: tf.Operation, kinds: Sequence[Kind]) -> Kind:
    """What keeps the numbers and their order: a cast to integers, or one more or less axis of size 1."""
    if (rank(operation.outputs[0]) or 0) > 1 or not operation.outputs[0].dtype.is_integer:
        return refuse(operation, "reckons with the number of rows")
    return kinds[0] if all_fixed(kinds[1:]) else refuse(operation, "reckons with the number of rows")


def listed(operation: tf.Operation, kinds: Sequence[Kind]) -> Kind:
    """Pack and ConcatV2 of numbers and lists."""
    tensors = operation.inputs[: len(kinds)]
    if any((rank(tensor) or 0) > 1 for tensor in tensors):
        return refuse(operation, "reckons with the number of rows")
    if operation.type == "ConcatV2":
        tensors, kinds = tensors[:-1], kinds[:-1]
    parts = [entries(tensor, kind) for tensor, kind in zip(tensors, kinds, strict=True)]
    if any(part is None for part in parts):
        return refuse(operation, "lists numbers of which nothing is known")
    return Sizes(tuple(entry for part in parts for entry in part or ()))


def picked(operation: tf.Operation, kinds: Sequence[Kind]) -> Kind:
    """StridedSlice and GatherV2 of a list of numbers at known places."""
    numbers = entries(operation.inputs[0], kinds[0])
    if numbers is None or rank(operation.inputs[0]) != 1:
        return refuse(operation, "reckons with the number of rows")
    places = _places(operation, len(numbers))
    if places is None:
        return refuse(operation, "picks from a shape at places that are not known")
    return Sizes(tuple(numbers[place] for place in places))


def product(operation: tf.Operation, kinds: Sequence[Kind]) -> Kind:
    """Mul of two numbers and Prod of a list: a multiple of the number of rows where that is one factor."""
    if operation.type == "Prod":
        factors = entries(operation.inputs[0], kinds[0])
    else:
        pair = [entries(tensor, kind) for tensor, kind in zip(operation.inputs, kinds, strict=True)]
        factors = [part[0] for part in pair if part and len(part) == 1]
        factors = factors if len(factors) == len(pair) else None
    if factors is None or rank(operation.outputs[0]) != 0:
        return refuse(operation, "reckons with the number of rows")
    multiples = [factor.factor for factor in factors if isinstance(factor, Multiple)]
    numbers = [*multiples, *(factor for factor in factors if not isinstance(factor, Multiple))]
    known = [number for number in numbers if isinstance(number, int)]
    if len(multiples) > 1:
        return refuse(operation, "multiplies the number of rows by itself")
    if not multiples:
        return Sizes((math.prod(known) if len(known) == len(numbers) else None,))
    return Sizes((Multiple(math.prod(known) if len(known) == len(numbers) else operation),))


def comparison(operation: tf.Operation, kinds: Sequence[Kind]) -> Kind:
    """GreaterEqual, Equal, ... that come out alike for any number of rows from one on: no group has fewer."""
    sides = [entries(tensor, kind) for tensor, kind in zip(operation.inputs, kinds, strict=True)]
    left, right = ([] if side is None else list(side) for side in sides)
    if not left or not right:
        return refuse(operation, "compares the number of rows with what is not known")
    count = max(len(left), len(right))
    for one, other in zip(left * (count // len(left)), right * (count // len(right)), strict=True):
        # Multiples of the same number keep their order.
        if isinstance(one, Multiple) == isinstance(other, Multiple):
            continue
        many, number = (one, other) if isinstance(one, Multiple) else (other, one)
        reached = operation.type in (("GreaterEqual", "Less") if many is one else ("LessEqual", "Greater"))
        if not isinstance(many, Multiple) or not isinstance(many.factor, int) or not isinstance(number, int):
            return refuse(operation, "compares the number of rows with what is not known")
        if number >= many.factor + reached:
            return refuse(operation, "depends on the number of rows")
    return Fixed()


def _shape_of(operation: tf.Operation, tensor: tf.Tensor, kind: Kind) -> Kind:
    if is_fixed(kind) or isinstance(kind, Sizes):
        return Fixed()
    if not isinstance(kind, Rows) or not rank(tensor):
        return refuse(operation, "takes what is not known")
    return Sizes((Multiple(kind.per), *tensor.shape.as_list()[1:]))


def _places(operation: tf.Operation, count: int) -> list[int] | None:
    if operation.type == "GatherV2":
        indices = static(operation.inputs[1])
        if indices is None or operation.get_attr("batch_dims"):
            return None
        return [int(index) for index in indices.reshape(-1)]
    begin, end, stride = (static(tensor) for tensor in operation.inputs[1:])
    if begin is None or end is None or stride is None or begin.size != 1:
        return None
    if operation.get_attr("new_axis_mask") or operation.get_attr("ellipsis_mask"):
        return None
    start, step = int(begin[0]), int(stride[0])
    if operation.get_attr("shrink_axis_mask"):
        return [range(count)[start]] if -count <= start < count else None
    first = None if operation.get_attr("begin_mask") else start
    last = None if operation.get_attr("end_mask") else int(end[0])
    return list(range(count))[slice(first, last, step)]
