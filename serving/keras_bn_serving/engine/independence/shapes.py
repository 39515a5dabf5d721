"""Rules for what moves entries about: reductions, reshapes, slices, look-ups, and rows made of a number of rows."""

from collections.abc import Sequence

import tensorflow as tf

from keras_bn_serving.engine.independence.kinds import (
    Across,
    Every,
    Kind,
    Multiple,
    Rows,
    all_fixed,
    axes,
    entries,
    is_fixed,
    rank,
    refuse,
    static,
    static_entries,
)


def reduction(operation: tf.Operation, kinds: Sequence[Kind]) -> Kind:
    """Sum, Mean, ArgMax, ... along axes other than the rows'; All over rows is `Every`."""
    if operation.type == "All" and isinstance(kinds[0], Every) and is_fixed(kinds[1]):
        return Every()
    along = axes(operation.inputs[1], rank(operation.inputs[0]))
    if along is None or not isinstance(kinds[0], Rows):
        return refuse(operation, "reduces along axes that are not known, or what is not known")
    if 0 not in along:
        return kinds[0]
    return Every() if operation.type == "All" else refuse(operation, "reduces along the rows' axis")


def along_axis(operation: tf.Operation, kinds: Sequence[Kind]) -> Kind:
    """Cumsum, ReverseV2, Roll: along axes other than the rows'."""
    found = axes(operation.inputs[-1], rank(operation.inputs[0]))
    if found is None or 0 in found or not all_fixed(kinds[1:]) or not isinstance(kinds[0], Rows):
        return refuse(operation, "moves along the rows' axis")
    return kinds[0]


def reshape(operation: tf.Operation, kinds: Sequence[Kind]) -> Kind:
    """Reshape where what is of one row stays in one piece."""
    source, result = operation.inputs[0], operation.outputs[0]
    if not isinstance(kinds[0], Rows) or not rank(result):
        return refuse(operation, "takes or makes what is not known")
    target = entries(operation.inputs[1], kinds[1])
    if target is not None and isinstance(target[0], Multiple):
        if any(isinstance(size, Multiple) for size in target[1:]):
            return refuse(operation, "lays rows along another axis")
        return Rows(target[0].factor)
    if not is_fixed(kinds[1]):
        return refuse(operation, "reshapes by what is not known")
    # A fixed shape: the sizes behind axis 0 say how many entries of it one row makes, or that rows come out uneven.
    before, after, per = source.shape[1:].num_elements(), result.shape[1:].num_elements(), kinds[0].per
    if before and after and isinstance(per, int) and (per * before) % after == 0:
        return Rows(per * before // after)
    return refuse(operation, "may cut rows in pieces")


def transpose(operation: tf.Operation, kinds: Sequence[Kind]) -> Kind:
    """Transpose that keeps axis 0 where it is, or makes it axis 1."""
    order = static_entries(operation.inputs[1])
    if order and isinstance(kinds[0], Rows) and all_fixed(kinds[1:]):
        if order[0] == 0:
            return kinds[0]
        if order[1:2] == [0] and kinds[0] == Rows():
            return Across()
    return refuse(operation, "moves the rows' axis")


def new_axis(operation: tf.Operation, kinds: Sequence[Kind]) -> Kind:
    """ExpandDims behind axis 0."""
    along = axes(operation.inputs[1], rank(operation.outputs[0]))
    if along is None or 0 in along or not isinstance(kinds[0], Rows):
        return refuse(operation, "puts an axis before the rows'")
    return kinds[0]


def squeeze(operation: tf.Operation, kinds: Sequence[Kind]) -> Kind:
    """Squeeze of named axes behind axis 0."""
    named, known = operation.get_attr("squeeze_dims"), rank(operation.inputs[0])
    if not named or known is None or any(axis % known == 0 for axis in named) or not isinstance(kinds[0], Rows):
        return refuse(operation, "may remove the rows' axis")
    return kinds[0]


def split(operation: tf.Operation, kinds: Sequence[Kind]) -> list[Kind]:
    """Split, SplitV and Unpack along an axis other than the rows'."""
    position = {"Split": 1, "SplitV": 0, "Unpack": 0}[operation.type]
    value, kind = operation.inputs[position], kinds[position]
    if operation.type == "Unpack":
        axis = operation.get_attr("axis")
        along = None if rank(value) is None else [axis % (rank(value) or 1)]
    else:
        along = axes(operation.inputs[0 if operation.type == "Split" else 2], rank(value))
    others = [other for index, other in enumerate(kinds) if index != position]
    fits = along is not None and 0 not in along and isinstance(kind, Rows) and all_fixed(others)
    return [kind if fits else refuse(operation, "splits the rows")] * len(operation.outputs)


def strided_slice(operation: tf.Operation, kinds: Sequence[Kind]) -> Kind:
    """StridedSlice that takes all of axis 0."""
    if not isinstance(kinds[0], Rows) or not all_fixed(kinds[1:]):
        return refuse(operation, "takes what is not known")
    begin, step = static_entries(operation.inputs[1]), static_entries(operation.inputs[3])
    known = rank(operation.inputs[0])
    if begin is None or step is None or known is None:
        return refuse(operation, "cuts at places that are not known")
    masks = {
        name: operation.get_attr(f"{name}_mask") & 1 for name in ("begin", "end", "ellipsis", "new_axis", "shrink_axis")
    }
    if masks["ellipsis"]:
        # The dots reach over axis 0 unless what follows them names every axis.
        named = sum(1 for index in range(1, len(begin)) if not operation.get_attr("new_axis_mask") >> index & 1)
        whole = named < known
    else:
        starts = masks["begin"] or begin[0] == 0
        whole = not (masks["new_axis"] or masks["shrink_axis"]) and starts and masks["end"] and step[0] == 1
    return kinds[0] if not begin or whole else refuse(operation, "cuts through the rows' axis")


def slice_(operation: tf.Operation, kinds: Sequence[Kind]) -> Kind:
    """Slice that takes all of axis 0."""
    begin, size = entries(operation.inputs[1], kinds[1]), entries(operation.inputs[2], kinds[2])
    if not isinstance(kinds[0], Rows) or not begin or not size or not is_fixed(kinds[1]):
        return refuse(operation, "cuts at places that are not known")
    whole = begin[0] == 0 and size[0] in (-1, Multiple(kinds[0].per))
    rest = any(isinstance(entry, Multiple) for entry in size[1:])
    return kinds[0] if whole and not rest else refuse(operation, "cuts through the rows' axis")


def pad(operation: tf.Operation, kinds: Sequence[Kind]) -> Kind:
    """Pad, PadV2 and MirrorPad that add nothing to axis 0."""
    amounts = static(operation.inputs[1])
    if amounts is None or amounts[:1].any() or not isinstance(kinds[0], Rows) or not all_fixed(kinds[1:]):
        return refuse(operation, "adds rows")
    return kinds[0]


def gather(operation: tf.Operation, kinds: Sequence[Kind]) -> Kind:
    """GatherV2 from a fixed table, along another axis, or within each row."""
    along = axes(operation.inputs[2], rank(operation.inputs[0]))
    inner = operation.get_attr("batch_dims")
    if along is None or not is_fixed(kinds[2]):
        return refuse(operation, "gathers along an axis that is not known")
    if is_fixed(kinds[0]) and isinstance(kinds[1], Rows) and along[0] == 0 and inner == 0:
        return kinds[1] if rank(operation.inputs[1]) else refuse(operation, "takes indices of unknown rank")
    if isinstance(kinds[0], Rows) and is_fixed(kinds[1]) and along[0] != 0 and inner == 0:
        return kinds[0]
    if isinstance(kinds[0], Rows) and kinds[0] == kinds[1] and along[0] != 0 and inner > 0:
        return kinds[0]
    return refuse(operation, "gathers from other rows")


def look_up(operation: tf.Operation, kinds: Sequence[Kind]) -> Kind:
    """GatherNd, ResourceGather and LookupTableFindV2: from something fixed, by rows."""
    least = 2 if operation.type == "GatherNd" else 1
    inner = operation.node_def.attr["batch_dims"].i if "batch_dims" in operation.node_def.attr else 0
    known = rank(operation.inputs[1])
    if not is_fixed(kinds[0]) or not all_fixed(kinds[2:]) or inner or known is None or known < least:
        return refuse(operation, "looks up in what is not fixed")
    return kinds[1] if isinstance(kinds[1], Rows) else refuse(operation, "looks up what is not known")


def top(operation: tf.Operation, kinds: Sequence[Kind]) -> list[Kind]:
    """TopKV2 along the last axis."""
    known = rank(operation.inputs[0])
    fits = known is not None and known >= 2 and is_fixed(kinds[1]) and isinstance(kinds[0], Rows)
    return [kinds[0] if fits else refuse(operation, "sorts rows among each other")] * len(operation.outputs)


def one_hot(operation: tf.Operation, kinds: Sequence[Kind]) -> Kind:
    """OneHot along a new axis behind axis 0."""
    known, axis = rank(operation.outputs[0]), operation.get_attr("axis")
    if not known or axis % known == 0 or not all_fixed(kinds[1:]) or not isinstance(kinds[0], Rows):
        return refuse(operation, "puts an axis before the rows'")
    return kinds[0]


def ensure_shape(operation: tf.Operation, kinds: Sequence[Kind]) -> Kind:
    """EnsureShape that leaves the number of rows open."""
    required = tf.TensorShape(operation.get_attr("shape"))
    if required.rank == 0 or (required.rank is not None and required[0] is not None):
        return refuse(operation, "asks for a number of rows")
    return kinds[0] if isinstance(kinds[0], Rows) else refuse(operation, "takes what is not known")


def repeated(operation: tf.Operation, kinds: Sequence[Kind]) -> Kind:
    """Tile and BroadcastTo: of rows along other axes, or of something fixed once for each row."""
    source = operation.inputs[0]
    counts = entries(operation.inputs[1], kinds[1])
    if not counts or rank(source) is None or any(isinstance(count, Multiple) for count in counts[1:]):
        return refuse(operation, "repeats rows")
    same_rank = rank(source) == len(counts)
    if isinstance(kinds[0], Rows) and same_rank:
        unchanged = (1,) if operation.type == "Tile" else (Multiple(kinds[0].per),)
        return kinds[0] if counts[0] in unchanged else refuse(operation, "repeats rows")
    once_each = source.shape[0] == 1 if same_rank else operation.type == "BroadcastTo"
    if is_fixed(kinds[0]) and isinstance(counts[0], Multiple) and once_each:
        return Rows(counts[0].factor)
    return refuse(operation, "repeats what is not known")


def filled(operation: tf.Operation, kinds: Sequence[Kind]) -> Kind:
    """Fill: the same for each row."""
    counts = entries(operation.inputs[0], kinds[0])
    if not counts or not isinstance(counts[0], Multiple) or not is_fixed(kinds[1]):
        return refuse(operation, "fills a shape that is not known")
    if any(isinstance(count, Multiple) for count in counts[1:]):
        return refuse(operation, "lays rows along another axis")
    return Rows(counts[0].factor)


def examples(operation: tf.Operation, kinds: Sequence[Kind]) -> list[Kind]:
    """ParseExampleV2 of features of one length each; others are filled up to the longest of the batch."""
    attributes = operation.node_def.attr
    lengths = operation.get_attr("dense_shapes")
    fits = (
        isinstance(kinds[0], Rows)
        and rank(operation.inputs[0]) == 1
        and all_fixed(kinds[1:])
        and not attributes["num_sparse"].i
        and not attributes["ragged_value_types"].list.type
        and all(tf.TensorShape(shape).is_fully_defined() for shape in lengths)
    )
    return [kinds[0] if fits else refuse(operation, "parses features of any length")] * len(operation.outputs)
