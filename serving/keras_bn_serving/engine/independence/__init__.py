"""Proves from a signature's graph that rows do not depend on each other, so that requests may run together.

Every operation between inputs and outputs is looked at once, with what is known of its inputs (`kinds`): what is the
same for any request, what holds each row's own beside those of the others, what is reckoned from the number of rows. A
rule for each operation that is known to keep rows apart says the same of its outputs; of what any other operation makes
nothing is known. Checks count too: one that looks at rows one by one fails a group where it fails one of its requests
alone, any other could let a request pass in a group.
"""

from collections.abc import Mapping, Sequence

import tensorflow as tf

from keras_bn_serving.engine.flat_graph import FlatGraph
from keras_bn_serving.engine.independence import across, effects, layers, loops, shapes, sizes
from keras_bn_serving.engine.independence.kinds import (
    Across,
    Blocks,
    Every,
    Fixed,
    Item,
    Kind,
    NewSteps,
    NotProvedError,
    Rows,
    Rule,
    Sizes,
    Steps,
    Unknown,
    all_fixed,
    is_fixed,
    rank,
    refuse,
)


def _table(rules: Mapping[Rule, str]) -> dict[str, Rule]:
    return {name: rule for rule, names in rules.items() for name in names.split()}


_OF_ONE = (
    "Abs Acos Acosh AsString Asin Asinh Atan Atanh Bucketize Cast Ceil CheckNumerics Conj Cos Cosh DecodeBase64 "
    "Digamma Elu EncodeBase64 Erf Erfc Erfinv Exp Expm1 Floor Imag Inv Invert IsFinite IsInf IsNan LeakyRelu "
    "Lgamma Log Log1p LogicalNot Ndtri Neg OnesLike PreventGradient Real Reciprocal RegexReplace Relu Relu6 Rint "
    "Round Rsqrt Selu Sigmoid Sign Sin Sinh Softplus Softsign Sqrt Square StaticRegexReplace StopGradient "
    "StringLength StringLower StringStrip StringToHashBucket StringToHashBucketFast StringToHashBucketStrong "
    "StringToNumber StringUpper Tan Tanh ZerosLike FakeQuantWithMinMaxArgs FakeQuantWithMinMaxVars"
)
_ELEMENTWISE = (
    "Add AddV2 Atan2 BitwiseAnd BitwiseOr BitwiseXor ClipByValue Div DivNoNan Equal FloorDiv FloorMod Greater "
    "GreaterEqual LeftShift Less LessEqual LogicalAnd LogicalOr Maximum Minimum Mod Mul MulNoNan NextAfter "
    "NotEqual Pow RealDiv RightShift SelectV2 SquaredDifference Sub Substr TruncateDiv TruncateMod Xdivy Xlogy"
)
_RULES = _table({
    layers.of_one: _OF_ONE,
    layers.of_rows_of_rank(2): "Softmax LogSoftmax RGBToHSV HSVToRGB MatrixDiag FakeQuantWithMinMaxVarsPerChannel",
    layers.of_rows_of_rank(3): "MatrixBandPart",
    layers.of_rows_of_rank(4): (
        "DepthToSpace LRN ResizeArea ResizeBicubic ResizeBilinear ResizeNearestNeighbor ScaleAndTranslate SpaceToDepth"
    ),
    layers.elementwise: _ELEMENTWISE,
    layers.together: "AddN Select",
    layers.bias: "BiasAdd",
    layers.matmul: "MatMul",
    layers.batch_matmul: "BatchMatMul BatchMatMulV2 BatchMatMulV3",
    layers.einsum: "Einsum",
    layers.convolution: (
        "AvgPool AvgPool3D Conv2D Conv3D DepthwiseConv2dNative MaxPool MaxPool3D"
    ),
    layers.transposed_convolution: (
        "Conv2DBackpropInput Conv3DBackpropInputV2 DepthwiseConv2dNativeBackpropInput"
    ),
    layers.to_blocks: "SpaceToBatchND",
    layers.bincount: "DenseBincount",
    layers.normalization: "FusedBatchNorm FusedBatchNormV2 FusedBatchNormV3",
    shapes.reduction: "All Any ArgMax ArgMin EuclideanNorm Max Mean Min Prod Sum",
    shapes.along_axis: "Cumprod Cumsum ReverseV2 Roll",
    shapes.reshape: "Reshape",
    shapes.transpose: "Transpose",
    shapes.new_axis: "ExpandDims",
    shapes.squeeze: "Squeeze",
    shapes.split: "Split SplitV Unpack",
    shapes.strided_slice: "StridedSlice",
    shapes.slice_: "Slice",
    shapes.pad: "MirrorPad Pad PadV2",
    shapes.gather: "GatherV2",
    shapes.look_up: "GatherNd LookupTableFindV2 ResourceGather",
    shapes.top: "TopKV2",
    shapes.one_hot: "OneHot",
    shapes.ensure_shape: "EnsureShape",
    shapes.repeated: "BroadcastTo Tile",
    shapes.filled: "Fill",
    shapes.examples: "ParseExampleV2",
    layers.cut_and_joined: "ConcatV2",
    layers.stacked: "Pack",
    sizes.shape: "Shape ShapeN",
    sizes.rank_of: "Rank",
    sizes.size: "Size",
    loops.list_rule: "TensorListFromTensor TensorListGetItem TensorListReserve TensorListSetItem TensorListStack",
})  # fmt: skip
# For rows that lie across, and lists of steps.
_ACROSS_RULES = _table({
    across.of_one: _OF_ONE,
    across.elementwise: _ELEMENTWISE,
    across.transpose: "Transpose",
    across.new_axis: "ExpandDims",
    across.reverse: "ReverseV2",
    across.strided_slice: "StridedSlice",
    across.unpack: "Unpack",
    across.gather: "GatherV2",
    across.shape: "Shape",
    across.list_rule: (
        "TensorListFromTensor TensorListGetItem TensorListLength TensorListReserve TensorListSetItem TensorListStack"
    ),
})  # fmt: skip
_BLOCK_RULES = _table({
    layers.of_blocks(layers.convolution): "Conv2D Conv3D DepthwiseConv2dNative",
    layers.of_blocks(shapes.new_axis): "ExpandDims",
    layers.of_blocks(shapes.squeeze): "Squeeze",
    layers.from_blocks: "BatchToSpaceND",
})  # fmt: skip
# For numbers that depend on the number of rows, alone or beside fixed ones.
_SIZE_RULES = _RULES | _table({
    sizes.same: "Cast ExpandDims Reshape Squeeze",
    sizes.listed: "ConcatV2 Pack",
    sizes.picked: "GatherV2 StridedSlice",
    sizes.product: "Mul Prod",
    sizes.comparison: "Equal Greater GreaterEqual Less LessEqual NotEqual",
})  # fmt: skip


def prove(flat: FlatGraph) -> None:
    """Returns if no row of the outputs depends on another row than its own.

    Args:
        flat: The operations behind a signature; its inputs have a first axis of open size, the rows'.

    Raises:
        NotProvedError: With the first thing that is not known to keep rows apart.
    """
    outputs = _judge(flat, dict.fromkeys(flat.inputs, Rows()))
    for tensor, kind in zip(flat.outputs, outputs, strict=True):
        if isinstance(kind, Unknown):
            raise NotProvedError(kind.reason)
        if kind != Rows():
            raise NotProvedError(f"output `{tensor.name}` has not one row for each of the inputs")


def _judge(flat: FlatGraph, inputs: Mapping[str, Kind]) -> list[Kind]:
    known = {tensor.name: inputs[name] for name, tensor in flat.inputs.items()}
    fed = {tensor.op.name for tensor in flat.inputs.values()}
    for operation in flat.operations():
        if operation.name in fed:
            continue
        kinds = [known[tensor.name] for tensor in operation.inputs]
        made = _kinds_of(operation, kinds, flat)
        for tensor, kind in zip(operation.outputs, made, strict=True):
            if isinstance(kind, Rows) and rank(tensor) and tensor.shape[0] is not None:
                kind = refuse(operation, f"is known to make {tensor.shape[0]} rows")
            if isinstance(kind, Across) and (rank(tensor) or 0) > 1 and tensor.shape[1] is not None:
                kind = refuse(operation, f"is known to make {tensor.shape[1]} rows")
            known[tensor.name] = kind
    return [known[tensor.name] for tensor in flat.outputs]


def _kinds_of(operation: tf.Operation, kinds: list[Kind], flat: FlatGraph) -> Sequence[Kind]:
    effects.check(operation, flat.library)
    count = len(operation.outputs)
    if operation.type == "TensorListReserve" and is_fixed(kinds[1]):
        return [across.list_rule(operation, kinds)]
    if layers.clamped(operation):
        return [Fixed()]
    if all(isinstance(kind, Item) or is_fixed(kind) for kind in kinds):
        # Whatever it computes, it computes it from one row, or from none.
        return [Fixed() if all_fixed(kinds) else Item()] * count
    if operation.type == "Assert":
        if not isinstance(kinds[0], Every | Item) and not is_fixed(kinds[0]):
            raise NotProvedError(f"Assert `{operation.name}` looks at rows together")
        return []
    if operation.type in ("If", "StatelessIf", "Case", "StatelessCase"):
        return loops.condition(operation, kinds, flat, _judge)
    if operation.type in ("While", "StatelessWhile"):
        return loops.loop(operation, kinds, flat, _judge)
    if operation.type in ("Identity", "IdentityN", "Snapshot"):
        return kinds
    for kind in kinds:
        if isinstance(kind, Unknown):
            return [kind] * count
    rule = _rules_for(kinds).get(operation.type)
    if rule is None:
        return [refuse(operation, "is not known to keep rows apart")] * count
    result = rule(operation, kinds)
    return result if isinstance(result, list) else [result] * count


def _rules_for(kinds: Sequence[Kind]) -> Mapping[str, Rule]:
    if any(isinstance(kind, Across | Steps | NewSteps) for kind in kinds):
        return _ACROSS_RULES
    if any(isinstance(kind, Blocks) for kind in kinds):
        return _BLOCK_RULES
    reckons = any(isinstance(kind, Sizes) for kind in kinds) and all(isinstance(k, Sizes) or is_fixed(k) for k in kinds)
    return _SIZE_RULES if reckons else _RULES
