"""Rules for what layers compute row by row: arithmetic with broadcasting, products, convolutions, pools."""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from keras_bn_serving.engine.independence.kinds import (
    Across,
    Blocks,
    Every,
    Fixed,
    Kind,
    Multiple,
    Rows,
    Rule,
    all_fixed,
    axes,
    entries,
    is_fixed,
    rank,
    refuse,
    static,
    traced,
)

_ROWS_FIRST = (b"NHWC", b"NCHW", b"NDHWC", b"NCDHW")


def of_one(operation: tf.Operation, kinds: Sequence[Kind]) -> Kind:
    """Each output of each entry, or of each row, of the first input; the rest says how."""
    if not all_fixed(kinds[1:]):
        return refuse(operation, "depends on the rows in more than its first input")
    return kinds[0] if isinstance(kinds[0], Rows) else refuse(operation, "takes what is not known")


def of_rows_of_rank(least: int) -> Rule:
    """As `of_one`, for what works on the last `least - 1` axes and must leave axis 0 alone."""

    def rule(operation: tf.Operation, kinds: Sequence[Kind]) -> Kind:
        known = rank(operation.inputs[0])
        if known is None or known < least:
            return refuse(operation, f"needs at least {least} axes to keep rows apart")
        return of_one(operation, kinds)

    return rule


def elementwise(operation: tf.Operation, kinds: Sequence[Kind]) -> Kind:
    """Entry by entry with broadcasting: rows must lie on axis 0 of the result, each beside itself."""
    if operation.type in ("LogicalAnd", "LogicalOr") and all(isinstance(k, Every) or is_fixed(k) for k in kinds):
        # "Or" of what holds of every row holds of each request of a group only if both are about the same.
        return Every() if operation.type == "LogicalAnd" else refuse(operation, "mixes what holds of every row")
    ranks = [rank(tensor) for tensor in operation.inputs]
    known = [value for value in ranks if value is not None]
    if len(known) < len(ranks) or not max(known):
        return refuse(operation, "takes tensors of unknown rank, or without axes")
    per = {kind.per for kind in kinds if isinstance(kind, Rows)}
    if len(per) != 1:
        return refuse(operation, "takes rows in different numbers")
    for tensor, kind, own in zip(operation.inputs, kinds, known, strict=True):
        if isinstance(kind, Rows) and own == max(known):
            continue
        # What is not rows must reach every row alike.
        if not is_fixed(kind) or (own == max(known) and tensor.shape[0] != 1):
            return refuse(operation, "lays something else beside the rows")
    return Rows(*per)


def together(operation: tf.Operation, kinds: Sequence[Kind]) -> Kind:
    """AddN and Select: entry by entry without broadcasting."""
    ranks = {rank(tensor) for tensor in operation.inputs}
    vector = operation.type == "Select" and rank(operation.inputs[0]) == 1
    if not vector and (len(ranks) != 1 or None in ranks):
        return refuse(operation, "takes tensors of different or unknown ranks")
    return _same_rows(operation, kinds)


def cut_and_joined(operation: tf.Operation, kinds: Sequence[Kind]) -> Kind:
    """ConcatV2 along an axis other than the rows'."""
    found = axes(operation.inputs[-1], rank(operation.outputs[0]))
    if found is None or found[0] == 0:
        return refuse(operation, "joins along the rows' axis")
    return _same_rows(operation, kinds[:-1])


def stacked(operation: tf.Operation, kinds: Sequence[Kind]) -> Kind:
    """Pack along a new axis that is not the first; along the first, rows come to lie across."""
    known = rank(operation.outputs[0])
    axis = operation.get_attr("axis")
    if known is None or (axis + known if axis < 0 else axis) == 0:
        if known and all(kind == Rows() for kind in kinds):
            return Across()
        return refuse(operation, "stacks along the first axis")
    return _same_rows(operation, kinds)


def bias(operation: tf.Operation, kinds: Sequence[Kind]) -> Kind:
    """BiasAdd: a fixed vector along the channels."""
    known = rank(operation.inputs[0])
    if known is None or known < 2:
        return refuse(operation, "needs at least 2 axes to keep rows apart")
    return of_one(operation, kinds)


def matmul(operation: tf.Operation, kinds: Sequence[Kind]) -> Kind:
    """MatMul with rows on the left and something fixed on the right."""
    if operation.get_attr("transpose_a"):
        return refuse(operation, "transposes the rows")
    return of_one(operation, kinds)


def batch_matmul(operation: tf.Operation, kinds: Sequence[Kind]) -> Kind:
    """BatchMatMulV2: with more than two axes each row has matrices of its own."""
    ranks = [rank(tensor) for tensor in operation.inputs]
    if ranks[0] == 2 and isinstance(kinds[0], Rows) and ranks[1] == 2 and not operation.get_attr("adj_x"):
        return of_one(operation, kinds)
    if None in ranks or max(value or 0 for value in ranks) < 3:
        return refuse(operation, "multiplies rows with each other")
    for tensor, kind, own in zip(operation.inputs, kinds, ranks, strict=True):
        if isinstance(kind, Rows) and (own != max(value or 0 for value in ranks) or (own or 0) < 3):
            return refuse(operation, "takes rows that are not on the first axis of the result")
        if is_fixed(kind) and own == max(value or 0 for value in ranks) and tensor.shape[0] != 1:
            return refuse(operation, "lays something else beside the rows")
    return _same_rows(operation, [kind for kind in kinds if not is_fixed(kind)])


def einsum(operation: tf.Operation, kinds: Sequence[Kind]) -> Kind:
    """Einsum where one letter is the first of the result and of all rows, and of nothing else."""
    equation = operation.get_attr("equation").decode()
    left, _, right = equation.partition("->")
    terms = left.split(",")
    if "." in equation or not right:
        return refuse(operation, "has an equation that is not read here")
    for term, kind in zip(terms, kinds, strict=True):
        apart = term.find(right[0]) == 0 and term.count(right[0]) == 1
        if (isinstance(kind, Rows) and not apart) or (is_fixed(kind) and right[0] in term):
            return refuse(operation, "contracts or moves the rows' axis")
    if right.count(right[0]) != 1:
        return refuse(operation, "contracts or moves the rows' axis")
    return _same_rows(operation, [kind for kind in kinds if not is_fixed(kind)])


def convolution(operation: tf.Operation, kinds: Sequence[Kind]) -> Kind:
    """Convolutions and pools: the batch is the first axis of every layout."""
    if operation.get_attr("data_format") not in _ROWS_FIRST:
        return refuse(operation, "has a layout that is not read here")
    return of_one(operation, kinds) if _leaves_batch_alone(operation) else refuse(operation, "reaches across rows")


def to_blocks(operation: tf.Operation, kinds: Sequence[Kind]) -> Kind:
    """SpaceToBatchND, as dilated convolutions use it: what lies apart within a row goes to blocks of all rows."""
    block = static(operation.inputs[1])
    if block is None or kinds[0] != Rows() or not all_fixed(kinds[1:]):
        return refuse(operation, "takes what is not known")
    return Blocks(int(block.prod()))


def from_blocks(operation: tf.Operation, kinds: Sequence[Kind]) -> Kind:
    """BatchToSpaceND: as many blocks as there are become one again."""
    block = static(operation.inputs[1])
    if block is None or kinds[0] != Blocks(int(block.prod())) or not all_fixed(kinds[1:]):
        return refuse(operation, "takes what is not known")
    return Rows()


def of_blocks(inner: Rule) -> Rule:
    """As a rule that leaves axis 0 alone, of each block."""

    def rule(operation: tf.Operation, kinds: Sequence[Kind]) -> Kind | list[Kind]:
        made = inner(operation, [Rows(), *kinds[1:]])
        return kinds[0] if made == Rows() else made

    return rule


def clamped(operation: tf.Operation) -> bool:
    """Whether it is Minimum or Maximum that leaves one number only, whatever it is given: what is counted up to."""
    other = {"Minimum": "Maximum", "Maximum": "Minimum"}.get(operation.type)
    if other is None or not operation.outputs[0].dtype.is_integer or rank(operation.outputs[0]) != 0:
        return False
    bounds = [(static(operation.inputs[place]), traced(operation.inputs[1 - place]).op) for place in (0, 1)]
    return any(
        bound is not None and inner.type == other and any(_equal(static(tensor), bound) for tensor in inner.inputs)
        for bound, inner in bounds
    )


def bincount(operation: tf.Operation, kinds: Sequence[Kind]) -> Kind:
    """DenseBincount within each row, up to a fixed number; weights, where there are any, are the rows' own."""
    weights = kinds[2] if operation.inputs[2].shape != [0] else Fixed()
    own = isinstance(weights, Rows) or operation.inputs[2].shape == [0]
    if rank(operation.inputs[0]) != 2 or not is_fixed(kinds[1]) or not own:
        return refuse(operation, "counts rows together")
    return _same_rows(operation, [kinds[0], *([weights] if isinstance(weights, Rows) else [])])


def transposed_convolution(operation: tf.Operation, kinds: Sequence[Kind]) -> Kind:
    """Conv2DBackpropInput with a size that may hold the number of rows, which it checks."""
    sizes = entries(operation.inputs[0], kinds[0])
    rows = kinds[2]
    if operation.get_attr("data_format") not in _ROWS_FIRST or not _leaves_batch_alone(operation):
        return refuse(operation, "reaches across rows")
    if not isinstance(rows, Rows) or not is_fixed(kinds[1]) or not sizes:
        return refuse(operation, "takes what is not known")
    fits = sizes[0] == Multiple(rows.per) and not any(isinstance(size, Multiple) for size in sizes[1:])
    return rows if fits else refuse(operation, "makes a number of rows that is not theirs")


def normalization(operation: tf.Operation, kinds: Sequence[Kind]) -> list[Kind]:
    """FusedBatchNormV3 with given statistics; with those of the batch rows depend on each other."""
    if operation.get_attr("is_training"):
        return [refuse(operation, "normalizes with the batch's statistics")] * len(operation.outputs)
    return [of_one(operation, kinds), *[Fixed()] * (len(operation.outputs) - 1)]


def _same_rows(operation: tf.Operation, kinds: Sequence[Kind]) -> Kind:
    found = set(kinds)
    (kind,) = found if len(found) == 1 else (None,)
    return kind if isinstance(kind, Rows) else refuse(operation, "takes rows beside what is not rows of that number")


def _equal(value: Any, bound: Any) -> bool:
    return value is not None and bool((value == bound).all())


def _leaves_batch_alone(operation: tf.Operation) -> bool:
    attributes = operation.node_def.attr
    lists = [list(attributes[name].list.i) for name in ("ksize", "strides", "dilations") if name in attributes]
    padding = list(attributes["explicit_paddings"].list.i)[:2] if "explicit_paddings" in attributes else []
    return all(values[:1] in ([], [1]) for values in lists) and not any(padding)
