"""Rules for loops over the rows, as `tf.map_fn` makes them, and for conditions."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import tensorflow as tf

from keras_bn_serving.engine.flat_graph import FlatGraph, of_function
from keras_bn_serving.engine.independence.kinds import (
    Counter,
    Every,
    Fixed,
    Item,
    Kind,
    Multiple,
    NewList,
    NewSteps,
    NotProvedError,
    RowList,
    Rows,
    Sizes,
    Steps,
    Unknown,
    is_fixed,
    refuse,
    static,
    traced,
)

# Judges the operations of a function; returns what is known of its outputs.
Judge = Callable[[FlatGraph, Mapping[str, Kind]], list[Kind]]
_ONE_EACH = Sizes((Multiple(1),))


def list_rule(operation: tf.Operation, kinds: Sequence[Kind]) -> Kind:
    """Lists of tensors: made of rows, written and read at the loop's counter, stacked again."""
    rest = kinds[1:]
    match operation.type:
        case "TensorListFromTensor" if kinds[0] == Rows(1) and is_fixed(kinds[1]):
            return RowList()
        case "TensorListReserve" if is_fixed(kinds[0]) and kinds[1] == _ONE_EACH:
            return NewList()
        case "TensorListGetItem" if kinds[0] == RowList() and rest[0] == Counter() and is_fixed(rest[1]):
            return Item()
        case "TensorListSetItem" if kinds[0] == NewList() and rest[0] == Counter():
            if isinstance(rest[1], Item) or is_fixed(rest[1]):
                return NewList()
        case "TensorListStack" if kinds[0] == RowList() and is_fixed(kinds[1]):
            return Rows(1)
    return refuse(operation, "uses a list in another way than a loop over the rows does")


def loop(operation: tf.Operation, kinds: Sequence[Kind], flat: FlatGraph, judge: Judge) -> list[Kind]:
    """While that runs as often for any rows; or once for each row, reads that row, and writes what it makes of it."""
    body = of_function(flat.library, operation.get_attr("body").name, operation.inputs)
    condition = of_function(flat.library, operation.get_attr("cond").name, operation.inputs)
    over_steps = _over_steps(kinds, body, condition, judge)
    if over_steps is not None:
        return over_steps
    inside: list[Kind] = []
    for position, (initial, kind) in enumerate(zip(operation.inputs, kinds, strict=True)):
        argument, result = body.inputs[str(position)], traced(body.outputs[position])
        if result.name == argument.name:
            inside.append(kind)
        elif _counts(argument, result) and _is(static(initial), 0):
            inside.append(Counter())
        elif kind == NewList() and _writes(argument, result):
            inside.append(kind)
        else:
            return _cannot(operation, f"changes its variable {position} in a way that is not a loop over the rows'")
    if not _runs_once_a_row(traced(condition.outputs[0]), condition, inside):
        return _cannot(operation, "does not run once for each row")
    made = judge(body, {str(position): kind for position, kind in enumerate(inside)})
    outputs: list[Kind] = []
    for kind, result in zip(inside, made, strict=True):
        if isinstance(kind, Counter):
            outputs.append(_ONE_EACH)
        elif isinstance(kind, NewList):
            # Nothing is known of a list that something else than a row was written to.
            outputs.append(RowList() if isinstance(result, NewList) else result)
        else:
            outputs.append(kind)
    return outputs


def condition(operation: tf.Operation, kinds: Sequence[Kind], flat: FlatGraph, judge: Judge) -> list[Kind]:
    """If and Case: by what is the same for a group, or by what holds of every row, as checks are guarded."""
    if not is_fixed(kinds[0]) and not isinstance(kinds[0], Every):
        return _cannot(operation, "is decided by what is known of no single row")
    if "branches" in operation.node_def.attr:
        names = [function.name for function in operation.get_attr("branches")]
    else:
        names = [operation.get_attr("then_branch").name, operation.get_attr("else_branch").name]
    arguments = list(operation.inputs)[1:]
    results = [
        judge(
            of_function(flat.library, name, arguments),
            {str(position): kind for position, kind in enumerate(kinds[1:])},
        )
        for name in names
    ]
    if not is_fixed(kinds[0]):
        # Which branch runs may differ between a group and its requests: only its checks count.
        return [refuse(operation, "answers by what holds of all rows")] * len(operation.outputs)
    joined: list[Kind] = []
    for outcomes in zip(*results, strict=True):
        if all(is_fixed(kind) for kind in outcomes):
            joined.append(Fixed())
        elif len(set(outcomes)) == 1:
            joined.append(outcomes[0])
        else:
            joined.append(refuse(operation, "answers differently by branch"))
    return joined


def _over_steps(kinds: Sequence[Kind], body: FlatGraph, condition: FlatGraph, judge: Judge) -> list[Kind] | None:
    """Returns what is known of the variables after any number of turns, `None` where rows decide how many."""

    def runs_as_often(inside: Sequence[Kind]) -> bool:
        names = map(str, range(len(inside)))
        return is_fixed(judge(condition, dict(zip(names, inside, strict=True)))[0])

    inside = list(kinds)
    while runs_as_often(inside):
        made = judge(body, {str(position): kind for position, kind in enumerate(inside)})
        # What holds before a turn and after it holds after any number of them.
        joined = [_joined(before, after) for before, after in zip(inside, made, strict=True)]
        if joined == inside:
            return inside
        inside = joined
    return None


def _joined(before: Kind, after: Kind) -> Kind:
    if isinstance(before, Rows) and not isinstance(before.per, int):
        # In the next turn it may be another number.
        return Unknown("a loop's variable has a number of entries a row that is not known")
    if before == after or isinstance(before, Unknown):
        return before
    if isinstance(before, NewSteps) and after == Steps():
        return after
    if is_fixed(before) and is_fixed(after):
        return Fixed()
    return Unknown("a loop's variable is not of one kind")


def _cannot(operation: tf.Operation, why: str) -> list[Kind]:
    # What cannot be read may hold a check that fails for one request and not for a group.
    if operation.op_def.is_stateful:
        raise NotProvedError(f"{operation.type} `{operation.name}` {why}")
    return [Unknown(f"{operation.type} `{operation.name}` {why}")] * len(operation.outputs)


def _counts(argument: tf.Tensor, result: tf.Tensor) -> bool:
    if result.op.type not in ("AddV2", "Add"):
        return False
    left, right = result.op.inputs
    return (traced(left).name == argument.name and _is(static(right), 1)) or (
        traced(right).name == argument.name and _is(static(left), 1)
    )


def _is(value: object, number: int) -> bool:
    return value is not None and bool(np.all(value == number))


def _writes(argument: tf.Tensor, result: tf.Tensor) -> bool:
    # Another index than the counter is seen by `list_rule`.
    return result.op.type == "TensorListSetItem" and traced(result.op.inputs[0]).name == argument.name


def _runs_once_a_row(tensor: tf.Tensor, flat: FlatGraph, inside: Sequence[Kind]) -> bool:
    operation = tensor.op
    if operation.type == "LogicalAnd":
        return all(_runs_once_a_row(traced(part), flat, inside) for part in operation.inputs)
    if operation.type != "Less":
        return False
    positions = {argument.name: int(name) for name, argument in flat.inputs.items()}
    sides = [positions.get(traced(side).name) for side in operation.inputs]
    if sides[0] is None or sides[1] is None:
        return False
    return isinstance(inside[sides[0]], Counter) and inside[sides[1]] == _ONE_EACH
