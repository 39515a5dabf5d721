"""The operations that a signature may hold and go unchecked answer every shape, of any rank, and end no process."""

import contextlib
import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from keras_bn_serving.engine.findings import SURVIVE_ANY_SHAPE

SHAPES = [
    *([0] * rank for rank in range(11)),
    *itertools.product([0, 1, 3], repeat=3),
    *itertools.product([0, 1, 3], repeat=2),
    *((size,) for size in (1, 2, 3, 70_000)),
    *itertools.product([1, 2], [0, 1, 4], [0, 4], [0, 1, 3]),
    *([1] * rank for rank in range(1, 11)),
    *([2, 1] * half + [3] for half in range(1, 4)),
]


def bodies(tf: Any) -> dict[str, Callable[[Any], Any]]:
    """Returns a function for each operation in question, alone and as they come together."""
    three, table = np.ones(3, np.float32), np.ones([3, 2], np.float32)
    one_input = (
        "Abs Ceil Erf Exp Floor Identity Log Neg Relu Rsqrt Shape Sigmoid Size Softmax Sqrt Square Tanh ZerosLike"
    )
    two_inputs = (
        "Add AddV2 Equal FloorDiv FloorMod Greater GreaterEqual Less LessEqual Maximum Minimum Mul NotEqual Pow "
        "RealDiv Sub"
    )
    raw = tf.raw_ops
    found: dict[str, Callable[[Any], Any]] = {}
    for name in one_input.split():
        operation = getattr(raw, name)
        argument = next(
            each
            for each in ("x", "input", "features", "logits")
            if each in operation.__wrapped__.__code__.co_varnames[: operation.__wrapped__.__code__.co_argcount]
        )
        found[name] = lambda x, operation=operation, argument=argument: operation(**{argument: x})
    for name in two_inputs.split():
        operation = getattr(raw, name)
        found[name] = lambda x, operation=operation: operation(x=x, y=three)
        found[name + " backwards"] = lambda x, operation=operation: operation(x=three, y=x)
        found[name + " of itself"] = lambda x, operation=operation: operation(x=x, y=x)
    for name in ("Max", "Mean", "Min", "Prod", "Sum"):
        operation = getattr(raw, name)
        for axes in ([1], [-1], [0], [1, 2, 3], []):
            found[f"{name} {axes}"] = lambda x, operation=operation, axes=axes: operation(input=x, axis=axes)
    found |= {
        "AddN": lambda x: raw.AddN(inputs=[x, x]),
        "AddN of others": lambda x: raw.AddN(inputs=[x, three]),
        "All": lambda x: raw.All(input=x > 0.0, axis=[1]),
        "Any": lambda x: raw.Any(input=x > 0.0, axis=[0]),
        "Assert": lambda x: tf.debugging.Assert(tf.reduce_all(x > 0.0), [x]),
        "BiasAdd": lambda x: raw.BiasAdd(value=x, bias=three),
        "BiasAdd of channels first": lambda x: raw.BiasAdd(value=x, bias=three, data_format="NCHW"),
        "Cast": lambda x: tf.cast(x, tf.int32),
        "ConcatV2": lambda x: tf.concat([x, x], 0),
        "ConcatV2 last": lambda x: tf.concat([x, x], -1),
        "ConcatV2 with others": lambda x: tf.concat([x, table], 1),
        "ExpandDims": lambda x: tf.expand_dims(x, 1),
        "LogicalAnd": lambda x: raw.LogicalAnd(x=x > 0.0, y=three > 0.0),
        "LogicalOr": lambda x: raw.LogicalOr(x=x > 0.0, y=three > 0.0),
        "LogicalNot": lambda x: raw.LogicalNot(x=x > 0.0),
        "MatMul": lambda x: raw.MatMul(a=x, b=table),
        "MatMul backwards": lambda x: raw.MatMul(a=table, b=x),
        "MatMul of itself": lambda x: raw.MatMul(a=x, b=x, transpose_a=True),
        "Pack": lambda x: tf.stack([x, x], 1),
        "ParseExampleV2": lambda x: tf.io.parse_example(
            tf.strings.as_string(x), {"x": tf.io.FixedLenFeature([], tf.float32)}
        )["x"],
        "SelectV2": lambda x: tf.where(x > 0.0, x, three),
        "StridedSlice": lambda x: x[:, None],
        "StridedSlice of one": lambda x: x[:, 0],
        "StridedSlice of some": lambda x: x[1:, ::2],
        "StridedSlice of the last": lambda x: x[..., -1],
        "StringLength": lambda x: tf.strings.length(tf.strings.as_string(x)),
        "Tile": lambda x: tf.tile(x, [1, 2]),
        # TensorFlow makes one kernel of these.
        "dense": lambda x: tf.nn.relu(tf.nn.bias_add(raw.MatMul(a=x, b=table), three[:2])),
        "dense softmax": lambda x: tf.nn.softmax(tf.nn.bias_add(raw.MatMul(a=x, b=table), three[:2])),
        "dense sigmoid": lambda x: tf.sigmoid(raw.MatMul(a=x, b=table) + three[:2]),
        "gelu": lambda x: 0.5 * x * (1.0 + tf.math.erf(x / np.float32(np.sqrt(2.0)))),
        "layer normalization": lambda x: (
            (x - tf.reduce_mean(x, -1, keepdims=True))
            * tf.math.rsqrt(tf.reduce_mean(tf.square(x), -1, keepdims=True) + 1e-3)
        ),
    }
    return found


def run(name: str) -> None:
    """Runs one of the functions with every shape; what TensorFlow answers does not matter."""
    import tensorflow as tf

    graph = tf.Graph()
    with graph.as_default():
        x = tf.compat.v1.placeholder(tf.float32, None)
        fetched = bodies(tf)[name](x)
    with tf.compat.v1.Session(graph=graph) as session:
        for shape in SHAPES:
            with contextlib.suppress(tf.errors.OpError):
                session.run(fetched, {x: np.ones(shape, np.float32)})


def names() -> list[str]:
    import tensorflow as tf

    return sorted(bodies(tf))


# Answers do not depend on what they are given, or on the rank that a placeholder has in the graph.
WITHOUT_INPUT = {"Const", "NoOp", "Placeholder", "ReadVariableOp", "VarHandleOp"}


def test_every_operation_that_goes_unchecked_is_tried():
    assert SURVIVE_ANY_SHAPE - WITHOUT_INPUT - {name.split()[0] for name in names()} == set()


@pytest.mark.parametrize("optimized", ["0", pytest.param("1", marks=pytest.mark.slow)])
def test_operations_that_go_unchecked_survive_every_shape(optimized: str):
    code = "from tests.serving import test_operations as t; [t.run(n) or print(n, flush=True) for n in t.names()]"
    environment = {**os.environ, "TF_ENABLE_ONEDNN_OPTS": optimized}
    root = Path(__file__).parents[2]
    finished = subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, (finished.stdout.splitlines()[-1:], finished.stderr[-2000:])
    assert finished.stdout.splitlines() == names()
