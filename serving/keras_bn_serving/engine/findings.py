"""What a signature's graph tells before anything runs: whether rows stand alone, and which shapes may do harm."""

import logging
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from tensorflow.core.protobuf import meta_graph_pb2

from keras_bn_serving.codec.tensor_spec import TensorSpec
from keras_bn_serving.engine import flat_graph, independence
from keras_bn_serving.engine.independence.kinds import NotProvedError

_log = logging.getLogger(__name__)
# Tried with some hundred shapes each (tests/serving/test_operations.py): these answer a shape that they cannot use with
# an error. Others end the process, convolutions among them, and TensorFlow has more than a thousand: a list of those
# that do would never be whole. So a signature goes unchecked, as on TensorFlow Serving, only where it holds no others.
SURVIVE_ANY_SHAPE = frozenset(
    [
        "Abs",
        "Add",
        "AddV2",
        "AddN",
        "All",
        "Any",
        "BiasAdd",
        "Cast",
        "Ceil",
        "ConcatV2",
        "Const",
        "Equal",
        "Erf",
        "Exp",
        "ExpandDims",
        "Floor",
        "FloorDiv",
        "FloorMod",
        "Greater",
        "GreaterEqual",
        "Identity",
        "Less",
        "LessEqual",
        "Log",
        "LogicalAnd",
        "LogicalNot",
        "LogicalOr",
        "MatMul",
        "Max",
        "Maximum",
        "Mean",
        "Min",
        "Minimum",
        "Mul",
        "Neg",
        "NoOp",
        "NotEqual",
        "Pack",
        "ParseExampleV2",
        "Placeholder",
        "Pow",
        "Prod",
        "ReadVariableOp",
        "RealDiv",
        "Relu",
        "Rsqrt",
        "SelectV2",
        "Shape",
        "Sigmoid",
        "Size",
        "Softmax",
        "Sqrt",
        "Square",
        "StridedSlice",
        "StringLength",
        "Sub",
        "Sum",
        "Tanh",
        "Tile",
        "VarHandleOp",
        "ZerosLike",
        "Assert",
    ]
)
_CONDITIONS = ("If", "StatelessIf")
# TensorFlow's kernels know no more axes than this.
_MOST_AXES = 8


class Findings(NamedTuple):
    """What is known of a signature.

    Attributes:
        checks_shapes: Whether a shape other than the signature's may end the process, and is refused.
        ranks: For inputs whose rank the signature leaves open and that are checked, the numbers of axes that fit.
        alone: Why a request's rows must not run together with another's; empty where they may.
    """

    checks_shapes: bool
    ranks: Mapping[str, frozenset[int]]
    alone: str


def find(
    meta_graph: meta_graph_pb2.MetaGraphDef,
    inputs: Mapping[str, str],
    outputs: Sequence[str],
    specs: Mapping[str, TensorSpec],
    takes_batches: bool,
) -> Findings:
    """Looks at the graph behind a signature.

    Args:
        meta_graph: The model.
        inputs: TensorFlow's tensor name by input.
        outputs: TensorFlow's tensor names of the outputs.
        specs: What goes in, by name.
        takes_batches: Whether inputs and outputs have a first dimension of any size.
    """
    if not inputs:
        return Findings(False, {}, "it takes no inputs")
    shapes = {name: spec.shape for name, spec in specs.items()}
    try:
        flat = flat_graph.of_signature(meta_graph, inputs, outputs, shapes)
        checks_shapes = not _survives(flat)
        ranks = {
            name: _ranks(meta_graph, inputs, outputs, shapes, name)
            for name, shape in shapes.items()
            if checks_shapes and shape is None
        }
        alone = _why_alone(flat) if takes_batches else "not all that goes in and comes out has a first axis of any size"
    except Exception:
        # Reading is no condition for serving: what cannot be read is checked and runs alone.
        _log.exception("the graph behind a signature with the inputs %s cannot be read", sorted(inputs))
        return Findings(True, {}, "its graph cannot be read")
    return Findings(checks_shapes, ranks, alone)


def _why_alone(flat: flat_graph.FlatGraph) -> str:
    try:
        independence.prove(flat)
    except NotProvedError as reason:
        return str(reason)
    return ""


def _survives(flat: flat_graph.FlatGraph) -> bool:
    for operation in flat.operations():
        if operation.type in _CONDITIONS:
            names = (operation.get_attr("then_branch").name, operation.get_attr("else_branch").name)
            if any(node.op not in SURVIVE_ANY_SHAPE for name in names for node in flat.library[name].node_def):
                return False
        elif operation.type not in SURVIVE_ANY_SHAPE:
            return False
    return True


def _ranks(
    meta_graph: meta_graph_pb2.MetaGraphDef,
    inputs: Mapping[str, str],
    outputs: Sequence[str],
    shapes: Mapping[str, Sequence[int] | None],
    name: str,
) -> frozenset[int]:
    """Returns the ranks of an input that TensorFlow's own reckoning of shapes does not object to."""
    found = set()
    for rank in range(_MOST_AXES + 1):
        try:
            flat_graph.of_signature(meta_graph, inputs, outputs, {**shapes, name: [-1] * rank})
        except ValueError:
            continue
        found.add(rank)
    return frozenset(found)
