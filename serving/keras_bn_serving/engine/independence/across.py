"""Rules for rows on axis 1, as recurrent layers lay them: steps first, and lists of steps."""

from collections.abc import Sequence

import tensorflow as tf

from keras_bn_serving.engine.independence.kinds import (
    Across,
    Fixed,
    Kind,
    Multiple,
    NewSteps,
    Rows,
    Sizes,
    Steps,
    all_fixed,
    axes,
    is_fixed,
    rank,
    refuse,
    static_entries,
)


def of_one(operation: tf.Operation, kinds: Sequence[Kind]) -> Kind:
    """Each entry of the first input; the rest says how."""
    fits = kinds[0] == Across() and all_fixed(kinds[1:])
    return Across() if fits else refuse(operation, "depends on the rows in more than its first input")


def elementwise(operation: tf.Operation, kinds: Sequence[Kind]) -> Kind:
    """Entry by entry with broadcasting: what is fixed must reach every row alike."""
    ranks = [rank(tensor) for tensor in operation.inputs]
    most = max((value or 0 for value in ranks), default=0)
    for tensor, kind, own in zip(operation.inputs, kinds, ranks, strict=True):
        if kind == Across() and own == most:
            continue
        # Shapes are laid beside each other from the last axis on: this one's axis beside axis 1 of the result.
        beside = None if own is None else own - (most - 1)
        alike = beside is not None and (beside < 0 or tensor.shape[beside] == 1)
        if not is_fixed(kind) or not alike:
            return refuse(operation, "lays something else beside the rows")
    return Across()


def transpose(operation: tf.Operation, kinds: Sequence[Kind]) -> Kind:
    """Transpose that keeps axis 1 where it is, or makes it axis 0."""
    order = static_entries(operation.inputs[1])
    if order and kinds[0] == Across() and all_fixed(kinds[1:]):
        if order[0] == 1:
            return Rows()
        if order[1:2] == [1]:
            return Across()
    return refuse(operation, "moves the rows' axis")


def new_axis(operation: tf.Operation, kinds: Sequence[Kind]) -> Kind:
    """ExpandDims behind axis 1."""
    along = axes(operation.inputs[1], rank(operation.outputs[0]))
    fits = along is not None and min(along) > 1 and kinds[0] == Across()
    return Across() if fits else refuse(operation, "puts an axis before the rows'")


def reverse(operation: tf.Operation, kinds: Sequence[Kind]) -> Kind:
    """ReverseV2 of other axes than the rows'."""
    along = axes(operation.inputs[1], rank(operation.inputs[0]))
    fits = along is not None and 1 not in along and kinds[0] == Across()
    return Across() if fits else refuse(operation, "moves along the rows' axis")


def strided_slice(operation: tf.Operation, kinds: Sequence[Kind]) -> Kind:
    """StridedSlice of steps: one of them, or several, with all rows."""
    begin, step = static_entries(operation.inputs[1]), static_entries(operation.inputs[3])
    if not begin or not step or kinds[0] != Across() or not all_fixed(kinds[1:]):
        return refuse(operation, "takes what is not known")
    masks = {name: operation.get_attr(f"{name}_mask") for name in ("begin", "end", "ellipsis", "new_axis")}
    single = operation.get_attr("shrink_axis_mask")
    starts = masks["begin"] & 2 or begin[1:2] == [0]
    whole = len(begin) == 1 or (starts and masks["end"] & 2 and step[1] == 1 and not single & 2)
    if masks["ellipsis"] or masks["new_axis"] or not whole:
        return refuse(operation, "cuts through the rows' axis")
    return Rows() if single & 1 else Across()


def unpack(operation: tf.Operation, kinds: Sequence[Kind]) -> list[Kind]:
    """Unpack of the steps."""
    fits = kinds[0] == Across() and operation.get_attr("axis") == 0
    return [Rows() if fits else refuse(operation, "splits the rows")] * len(operation.outputs)


def gather(operation: tf.Operation, kinds: Sequence[Kind]) -> Kind:
    """GatherV2 of one step, or several."""
    along, known = axes(operation.inputs[2], rank(operation.inputs[0])), rank(operation.inputs[1])
    if kinds[0] != Across() or not all_fixed(kinds[1:]) or along != [0] or operation.get_attr("batch_dims"):
        return refuse(operation, "gathers from other rows")
    if known is None or known > 1:
        return refuse(operation, "moves the rows' axis")
    return Across() if known else Rows()


def shape(operation: tf.Operation, kinds: Sequence[Kind]) -> Kind:
    """Shape: the second size is the number of rows."""
    sizes = operation.inputs[0].shape
    if kinds[0] != Across() or sizes.rank is None or sizes.rank < 2:
        return refuse(operation, "takes what is not known")
    return Sizes((sizes[0], Multiple(1), *sizes[2:].as_list()))


def list_rule(operation: tf.Operation, kinds: Sequence[Kind]) -> Kind:
    """Lists of steps: made of rows that lie across, written and read at fixed places, stacked again."""
    match operation.type, *kinds:
        case "TensorListFromTensor", Across(), Sizes() | Fixed():
            return Steps()
        case "TensorListReserve", Sizes() | Fixed(), count if is_fixed(count):
            return NewSteps(is_fixed(kinds[0]))
        case "TensorListLength", Steps() | NewSteps():
            return Fixed()
        case "TensorListGetItem", Steps(), index, Sizes() | Fixed() if is_fixed(index):
            return Rows()
        case "TensorListSetItem", Steps() | NewSteps(), index, Rows(per=1) if is_fixed(index):
            return Steps()
        case "TensorListStack", Steps(), Sizes() | Fixed():
            return Across()
    return refuse(operation, "uses a list in another way than a loop over steps does")
