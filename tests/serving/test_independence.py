"""Rows are judged independent only where no operation on the way mixes them, and then grouping changes nothing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras_bn_serving.engine import flat_graph
from keras_bn_serving.engine.independence import prove
from keras_bn_serving.engine.independence.kinds import NotProvedError
from keras_bn_serving.engine.servable import Servable
from tensorflow.core.protobuf import meta_graph_pb2

RAW = tf.raw_ops
Body = Callable[[Any], Any]
VECTOR, TABLE, CUBE, PICTURE = [None], [None, 6], [None, 4, 6], [None, 8, 8, 3]


def weights(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape)).normal(size=shape).astype(np.float32)


def why_alone(body: Body, shape: list[int | None], dtype: tf.DType = tf.float32) -> str:
    """Returns what keeps the rows of a function from being proved independent; empty where they are."""
    function = tf.function(body, autograph=False, input_signature=[tf.TensorSpec(shape, dtype, name="x")])
    concrete = function.get_concrete_function()
    x = concrete.inputs[0]
    meta_graph = meta_graph_pb2.MetaGraphDef(graph_def=concrete.graph.as_graph_def())
    meta_graph.signature_def["s"].inputs["x"].name = x.name
    meta_graph.signature_def["s"].inputs["x"].dtype = dtype.as_datatype_enum
    outputs = [tensor.name for tensor in concrete.outputs]
    flat = flat_graph.of_signature(meta_graph, {"x": x.name}, outputs, {"x": shape})
    try:
        prove(flat)
    except NotProvedError as reason:
        return str(reason)
    return ""


def normalized(x: Any, training: bool, layout: str = "NHWC") -> Any:
    one, nothing = tf.ones([x.shape[3 if layout == "NHWC" else 1]]), tf.zeros([0])
    given = nothing if training else one
    return RAW.FusedBatchNormV3(
        x=x, scale=one, offset=one, mean=given, variance=given, is_training=training, data_format=layout
    ).y


def upsampled(x: Any) -> Any:
    size = tf.stack([tf.shape(x)[0], tf.shape(x)[1] * 2, tf.shape(x)[2] * 2, 5])
    return tf.nn.conv2d_transpose(x, weights(3, 3, 5, 3), size, 2)


def checked(x: Any, condition: Any) -> Any:
    with tf.control_dependencies([tf.debugging.Assert(condition, [x])]):
        return x * 2.0


def mapped(body: Body) -> Body:
    return lambda x: tf.map_fn(body, x)


def in_other_order(x: Any) -> Any:
    def step(i: Any, out: Any) -> Any:
        last = tf.shape(x)[0] - 1 - i
        return i + 1, out.write(i, x[last])

    out = tf.TensorArray(tf.float32, tf.shape(x)[0], element_shape=x.shape[1:])
    return tf.while_loop(lambda i, _: i < tf.shape(x)[0], step, [0, out])[1].stack()


def loop(read: Callable[[Any, Any], Any], written: Callable[[Any, Any], Any]) -> Body:
    """Returns a loop over the rows that reads and writes at places reckoned from counter and number of rows."""

    def body(x: Any) -> Any:
        count = tf.shape(x)[0]
        rows = tf.TensorArray(tf.float32, count, element_shape=x.shape[1:]).unstack(x)
        out = tf.TensorArray(tf.float32, count, element_shape=x.shape[1:])

        def step(i: Any, out: Any) -> Any:
            return i + 1, out.write(written(i, count), rows.read(read(i, count)))

        return tf.while_loop(lambda i, _: i < count, step, [0, out])[1].stack()

    return body


IN_TURN = lambda i, count: i  # noqa: E731
BACKWARDS = lambda i, count: count - 1 - i  # noqa: E731
FIRST = lambda i, count: 0  # noqa: E731


def across(body: Body) -> Body:
    """Returns what computes with the rows on axis 1, as recurrent layers do, and brings them back."""
    return lambda x: tf.transpose(body(tf.transpose(x, [1, 0, 2])), [1, 0, 2])


def back(body: Body) -> Body:
    """Returns what makes rows of rows on axis 1."""
    return lambda x: body(tf.transpose(x, [1, 0, 2]))


def over_steps(step: Callable[[Any, Any], Any], turns: Callable[[Any, Any], Any] = lambda i, _: i < 4) -> Body:
    """Returns a loop over axis 1 that hands a state on and writes it down."""

    def body(x: Any) -> Any:
        steps = tf.TensorArray(tf.float32, 4).unstack(tf.transpose(x, [1, 0, 2]))
        written = tf.TensorArray(tf.float32, 4, element_shape=[None, 6])

        def turn(i: Any, state: Any, written: Any) -> Any:
            state = step(state, steps.read(i))
            return i + 1, state, written.write(i, state)

        start = tf.zeros_like(x[:, 0])
        loop = tf.while_loop(lambda i, state, _: turns(i, state), turn, [0, start, written])
        return tf.transpose(loop[2].stack(), [1, 0, 2])

    return body


def between_blocks(body: Body, block: list[int]) -> Body:
    """Returns what computes between the two ends of a dilated convolution."""
    nothing = [[0, 0], [0, 0]]
    return lambda x: tf.batch_to_space(body(tf.space_to_batch(x, [2, 2], nothing)), block, nothing)


def counted(x: Any, **bounds: int) -> Any:
    return tf.math.bincount(tf.cast(x, tf.int32), axis=-1, **bounds)


def clamped(x: Any, least: int, most: int) -> Any:
    return tf.minimum(most, tf.maximum(least, tf.cast(tf.reduce_sum(x), tf.int32)))


def running_sum(x: Any) -> Any:
    return tf.scan(lambda total, row: total + row, x)


# For each rule a function that keeps rows apart, and one of the same operations that does not.
RULES: list[tuple[str, list[int | None], Body, Body]] = [
    ("elementwise", TABLE, lambda x: tf.nn.relu(x) + tf.tanh(x), lambda x: x + tf.reverse(x, [0])),
    ("constant of lower rank", TABLE, lambda x: x * weights(6), lambda x: x * weights(2, 6)),
    ("constant of one row", TABLE, lambda x: x - weights(1, 6), lambda x: x - weights(3, 1)),
    ("constant of higher rank", TABLE, lambda x: x[:, None] * weights(1, 2, 6), lambda x: x * weights(1, 2, 6)),
    ("rows beside rows", TABLE, lambda x: x * x[:, :1], lambda x: x[:, :1] * x[:, 0]),
    ("number of rows", TABLE, lambda x: x * tf.cast(tf.shape(x)[1], tf.float32),
     lambda x: x * tf.cast(tf.shape(x)[0], tf.float32)),
    ("add_n", TABLE, lambda x: tf.add_n([x, x]), lambda x: tf.add_n([x, tf.zeros([2, 6])])),
    ("where", TABLE, lambda x: tf.where(x > 0.0, x, 0.0), lambda x: tf.where(tf.reduce_mean(x) > 0.0, x, 0.0)),
    ("matmul", TABLE, lambda x: x @ weights(6, 2), lambda x: tf.matmul(x, x, transpose_b=True)),
    ("matmul of transposed rows", TABLE, lambda x: tf.matmul(x, weights(2, 6), transpose_b=True),
     lambda x: tf.matmul(x, x, transpose_a=True)),
    ("bias", PICTURE, lambda x: tf.nn.bias_add(x, weights(3)),
     lambda x: tf.nn.bias_add(tf.transpose(x[:, 0, 0]), weights(2))),
    ("batch matmul", CUBE, lambda x: RAW.BatchMatMulV2(x=x, y=x, adj_y=True),
     lambda x: RAW.BatchMatMulV2(x=x, y=weights(2, 6, 3))),
    ("einsum", CUBE, lambda x: tf.einsum("bij,bkj->bik", x, x), lambda x: tf.einsum("bij,ckj->bik", x, x)),
    ("einsum that moves rows", CUBE, lambda x: tf.einsum("bij,jk->bki", x, weights(6, 2)),
     lambda x: tf.einsum("bij,jk->ibk", x, weights(6, 2))),
    ("convolution", PICTURE, lambda x: tf.nn.conv2d(x, weights(3, 3, 3, 4), 2, "SAME", dilations=1),
     lambda x: tf.nn.conv2d(weights(1, 8, 8, 3), tf.transpose(x, [1, 2, 3, 0])[:3, :3], 1, "SAME")),
    ("depthwise", PICTURE, lambda x: tf.nn.depthwise_conv2d(x, weights(3, 3, 3, 2), [1, 1, 1, 1], "VALID"),
     lambda x: tf.nn.depthwise_conv2d(tf.reverse(x, [0]), weights(3, 3, 3, 2), [1, 1, 1, 1], "VALID")),
    ("convolution of channels first", [None, 3, 8, 8],
     lambda x: tf.nn.conv2d(x, weights(3, 3, 3, 4), 1, "SAME", data_format="NCHW"),
     lambda x: tf.nn.conv2d(tf.transpose(x, [1, 0, 2, 3]), weights(3, 3, 1, 4), 1, "SAME", data_format="NCHW")),
    ("convolution of three axes", [None, 4, 4, 4, 2],
     lambda x: tf.nn.conv3d(x, weights(2, 2, 2, 2, 3), [1] * 5, "SAME"),
     lambda x: tf.nn.conv3d(x[None, :, :, :, 0, :, None][:, :, :, :, 0], weights(2, 2, 2, 1, 3), [1] * 5, "SAME")),
    ("transposed convolution", PICTURE, upsampled,
     lambda x: tf.nn.conv2d_transpose(x, weights(3, 3, 5, 3), [2, 16, 16, 5], 2)),
    ("pools", PICTURE, lambda x: tf.nn.max_pool2d(x, 2, 2, "SAME") + tf.nn.avg_pool2d(x, 2, 2, "SAME"),
     lambda x: tf.nn.max_pool2d(tf.transpose(x, [1, 0, 2, 3]), 2, 2, "SAME")),
    ("normalization", PICTURE, lambda x: normalized(x, False), lambda x: normalized(x, True)),
    ("reductions", PICTURE, lambda x: tf.reduce_mean(x, [1, 2]), lambda x: x - tf.reduce_mean(x, [0, 1, 2])),
    ("argmax", TABLE, lambda x: tf.argmax(x, -1), lambda x: tf.argmax(x, 0)),
    ("softmax", TABLE, tf.nn.softmax, lambda x: tf.nn.softmax(x[:, 0])),
    ("layer normalization", TABLE, lambda x: (x - tf.reduce_mean(x, -1, keepdims=True)) * tf.math.rsqrt(
        tf.math.reduce_variance(x, -1, keepdims=True) + 1e-3), lambda x: tf.math.l2_normalize(x, 0)),
    ("cumulative sum", TABLE, lambda x: tf.cumsum(x, 1), lambda x: tf.cumsum(x, 0)),
    ("reverse", TABLE, lambda x: tf.reverse(x, [1]), lambda x: tf.reverse(x, [0])),
    ("flatten", PICTURE, lambda x: tf.reshape(x, [-1, 192]), lambda x: tf.reshape(x, [8, -1])),
    ("flatten by the number of rows", PICTURE, lambda x: tf.reshape(x, [tf.shape(x)[0], -1]),
     lambda x: tf.reshape(x, [-1, tf.shape(x)[0] * 192])),
    ("rows cut and put together again", CUBE,
     lambda x: tf.reshape(tf.reshape(x, [-1, 6]) @ weights(6, 5), [-1, 4, 5]), lambda x: tf.reshape(x, [-1, 16])),
    ("tensordot", CUBE, lambda x: tf.tensordot(x, weights(6, 2), 1),
     lambda x: tf.tensordot(x, tf.ones([tf.shape(x)[0], 2]), [[0], [0]])),
    ("transpose", CUBE, lambda x: tf.transpose(x, [0, 2, 1]), lambda x: tf.transpose(x, [1, 0, 2])),
    ("axes", TABLE, lambda x: tf.squeeze(tf.expand_dims(x, -1), [2]), lambda x: tf.squeeze(tf.expand_dims(x, 0), [0])),
    ("concatenation", TABLE, lambda x: tf.concat([x, x * 2.0], 1), lambda x: tf.concat([x, x], 0)),
    ("concatenation with what is fixed", TABLE, lambda x: tf.concat([x, tf.zeros_like(x)], -1),
     lambda x: tf.concat([x, tf.zeros([2, 1])], -1)),
    ("stack", TABLE, lambda x: tf.stack([x, x], 1), lambda x: tf.stack([x, x], 0)),
    ("split", TABLE, lambda x: tf.split(x, 3, 1)[1], lambda x: tf.unstack(tf.transpose(x), 6)[0] + x[0, 0]),
    ("pad", TABLE, lambda x: tf.pad(x, [[0, 0], [1, 2]]), lambda x: tf.pad(x, [[1, 0], [0, 0]])[:-1]),
    ("slices", CUBE, lambda x: x[:, 1:, ::2], lambda x: x[::-1]),
    ("one row for all", TABLE, lambda x: x[..., 0], lambda x: x + x[0]),
    ("slice", TABLE, lambda x: tf.slice(x, [0, 1], [-1, 2]), lambda x: tf.slice(x, [1, 0], [-1, 6])),
    ("table", TABLE, lambda x: tf.gather(weights(9, 2), tf.cast(x, tf.int32)), lambda x: tf.gather(x, [0])),
    ("gather along another axis", TABLE, lambda x: tf.gather(x, [3, 1], axis=1),
     lambda x: tf.gather(x, [0, 0], axis=0)),
    ("gather within rows", TABLE, lambda x: tf.gather(x, tf.argsort(x)[:, :2], batch_dims=1),
     lambda x: tf.gather(x, tf.cast(x[:, 0], tf.int32))),
    ("top", TABLE, lambda x: tf.math.top_k(x, 2).values, lambda x: tf.math.top_k(x[:, 0], 1).values),
    ("one hot", TABLE, lambda x: tf.one_hot(tf.argmax(x, 1), 6), lambda x: tf.one_hot(tf.argmax(x, 1), 6, axis=0)),
    ("cast", TABLE, lambda x: tf.cast(tf.cast(x, tf.int32), tf.float64), lambda x: tf.cast(tf.size(x), tf.float32) * x),
    ("resize", PICTURE, lambda x: tf.image.resize(x, [5, 4], antialias=True),
     lambda x: tf.image.resize(tf.transpose(x, [1, 0, 2, 3]), [5, 4])),
    ("required shape", [None, None], lambda x: tf.ensure_shape(x, [None, 6]), lambda x: tf.ensure_shape(x, [2, 6])),
    ("tile", TABLE, lambda x: tf.tile(x, [1, 2]), lambda x: tf.tile(x, [2, 1])),
    ("fixed row for each", TABLE, lambda x: tf.tile(weights(1, 3), [tf.shape(x)[0], 1]),
     lambda x: tf.tile(weights(2, 3), [tf.shape(x)[0], 1])),
    ("broadcast", TABLE, lambda x: tf.broadcast_to(weights(3), [tf.shape(x)[0], 3]),
     lambda x: tf.broadcast_to(tf.range(tf.shape(x)[0]), tf.shape(x)[:1])),
    ("fill", TABLE, lambda x: tf.concat([x, tf.fill([tf.shape(x)[0], 1], 7.0)], 1),
     lambda x: tf.cast(tf.range(tf.shape(x)[0]), tf.float32)),
    ("check of each row", TABLE, lambda x: checked(x, tf.reduce_all(x > -9.0)),
     lambda x: checked(x, tf.reduce_mean(x) > -9.0)),
    ("check of the shape", [None, None], lambda x: checked(x, tf.reduce_all(tf.shape(x)[1:] == [6])),
     lambda x: checked(x, tf.shape(x)[0] > 1)),
    ("check that there is a row", CUBE, lambda x: checked(x, tf.reduce_all(tf.shape(x) >= [1, 4, 6])),
     lambda x: checked(x, tf.reduce_all(tf.shape(x) >= [2, 4, 6]))),
    ("check from the other side", CUBE, lambda x: checked(x, tf.shape(x)[0] > 0),
     lambda x: checked(x, tf.equal(1, tf.shape(x)[0]))),
    ("guarded check", TABLE, lambda x: checked_by_tensorflow(x, 0.0 * x), lambda x: checked_by_tensorflow(
        x, tf.reduce_sum(x) * 0.0)),
    ("map", CUBE, mapped(lambda row: tf.reverse(row, [0]) / tf.reduce_sum(row)), running_sum),
    ("loop over rows", CUBE, mapped(lambda row: row * 2.0), in_other_order),
    ("rows read in turn", CUBE, loop(IN_TURN, IN_TURN), loop(BACKWARDS, IN_TURN)),
    ("rows written in turn", CUBE, loop(IN_TURN, IN_TURN), loop(IN_TURN, BACKWARDS)),
    ("each row read", CUBE, loop(IN_TURN, IN_TURN), loop(FIRST, IN_TURN)),
    ("each row written", CUBE, loop(IN_TURN, IN_TURN), loop(IN_TURN, FIRST)),
    ("map with a condition", CUBE, mapped(lambda row: tf.cond(tf.reduce_sum(row) > 0.0, lambda: row, lambda: -row)),
     lambda x: tf.map_fn(lambda row: row[0] * tf.reduce_sum(x), x)),
    ("condition", CUBE, lambda x: tf.cond(tf.shape(x)[1] > 3, lambda: x, lambda: -x),
     lambda x: tf.cond(tf.reduce_sum(x) > 0.0, lambda: x, lambda: -x)),
    ("repeat", CUBE, lambda x: tf.repeat(x, 2, 1), lambda x: tf.repeat(x, 2, 0)),
    ("dilated convolution", PICTURE, lambda x: tf.nn.convolution(x, weights(3, 3, 3, 4), dilations=2),
     between_blocks(lambda x: tf.reverse(x, [0]), [2, 2])),
    ("blocks put together again", PICTURE,
     between_blocks(lambda x: tf.nn.conv2d(x, weights(1, 1, 3, 4), 1, "SAME"), [2, 2]),
     between_blocks(lambda x: tf.nn.conv2d(x, weights(1, 1, 3, 4), 1, "SAME"), [2, 1])),
    ("blocks beside each other", PICTURE, between_blocks(tf.identity, [2, 2]),
     between_blocks(lambda x: x + x[:1], [2, 2])),
    ("arithmetic across", CUBE, across(lambda x: tf.nn.relu(x * weights(6) + weights(4, 1, 6) + x)),
     across(lambda x: x + weights(2, 6))),
    ("arithmetic across, by a size of the rows", CUBE, across(lambda x: x * tf.cast(tf.shape(x)[0], tf.float32)),
     across(lambda x: x * tf.cast(tf.shape(x)[1], tf.float32))),
    ("softmax across", CUBE, across(tf.identity), across(lambda x: tf.nn.softmax(x, 1))),
    ("reverse across", CUBE, across(lambda x: tf.reverse(x, [0])), across(lambda x: tf.reverse(x, [1]))),
    ("one step", CUBE, back(lambda x: x[1] + x[-1]), back(lambda x: x[:, 1])),
    ("some steps", CUBE, across(lambda x: x[1:3]), across(lambda x: x[:, ::-1])),
    ("steps and their rows", CUBE, across(lambda x: x[::2, :, 1:]), across(lambda x: x[::2, 1:])),
    ("steps unstacked", CUBE, back(lambda x: tf.unstack(x)[2]), back(lambda x: tf.unstack(x, 2, 1)[0])),
    ("steps stacked", CUBE, lambda x: tf.transpose(tf.stack([x[:, 0], x[:, 1]]), [1, 0, 2]),
     lambda x: tf.stack([x[:, 0], x[:, 1]])[0] + tf.stack([x[:, 0], x[:, 1]])[:, 0]),
    ("steps gathered", CUBE, across(lambda x: tf.gather(x, [2, 0])), across(lambda x: tf.gather(x, [0], axis=1))),
    ("a step gathered", CUBE, back(lambda x: tf.gather(x, 2)), back(lambda x: tf.gather(x, [[0]]))),
    ("axis across", CUBE, back(lambda x: tf.expand_dims(x, -1)[0]), back(lambda x: tf.expand_dims(x, 1)[0])),
    ("loop over steps", CUBE, over_steps(lambda state, row: tf.tanh(state @ weights(6, 6) + row)),
     over_steps(lambda state, row: state + row - tf.reduce_mean(row, 0, keepdims=True))),
    ("loop over steps as often for any rows", CUBE, over_steps(lambda state, row: state + row),
     over_steps(lambda state, row: state + row, lambda i, state: (i < 4) & (tf.reduce_sum(state) < 9.0))),
    ("loop over steps as often as there are rows", CUBE, over_steps(lambda state, row: row, lambda i, state: i < 3),
     over_steps(lambda state, row: row, lambda i, state: i < tf.minimum(tf.shape(state)[0], 4))),
    ("state that stays of one kind", CUBE, over_steps(lambda state, row: row * 2.0),
     over_steps(lambda state, row: tf.reverse(state, [0]) + row)),
    ("any length", [None, None, 6], lambda x: tf.tensordot(x, weights(6, 2), 1),
     lambda x: tf.reshape(x, [tf.shape(x)[1], -1, 6])),
    ("any length, flat and back", [None, None, 6],
     lambda x: tf.reshape(tf.nn.relu(tf.reshape(x, [tf.shape(x)[0] * tf.shape(x)[1], 6])), tf.shape(x)),
     lambda x: tf.reshape(x, [tf.shape(x)[0] * tf.shape(x)[0], -1])),
    ("counts up to a number", TABLE, lambda x: counted(x, minlength=9, maxlength=9), lambda x: counted(x, minlength=9)),
    ("counts of each row", TABLE, lambda x: counted(x, minlength=9, maxlength=9, binary_output=True),
     lambda x: counted(x, minlength=2, maxlength=9)),
    ("counts of one number", TABLE, lambda x: x, lambda x: tf.cast(RAW.DenseBincount(
        input=tf.cast(x[:, 0], tf.int32), size=9, weights=tf.zeros([0])), tf.float32) + tf.zeros([9])),
    ("clamp", TABLE, lambda x: tf.one_hot(tf.argmax(x, 1), clamped(x, 3, 3)),
     lambda x: tf.one_hot(tf.argmax(x, 1), clamped(x, 3, 4))),
    ("clamp of real numbers", TABLE, lambda x: x, lambda x: x * tf.minimum(3.0, tf.maximum(3.0, tf.reduce_sum(x)))),
    ("product of whole numbers", CUBE,
     lambda x: RAW.BatchMatMulV3(x=tf.cast(x, tf.int8), y=tf.cast(weights(1, 6, 3), tf.int8), Tout=tf.int32),
     lambda x: RAW.BatchMatMulV3(x=tf.cast(x, tf.int8), y=tf.cast(weights(2, 6, 3), tf.int8), Tout=tf.int32)),
    ("order of axes that is reckoned", CUBE,
     lambda x: tf.transpose(x, tf.concat([tf.range(tf.rank(x) - 2), [2, 1]], 0)),
     lambda x: tf.transpose(x, tf.concat([[1], tf.range(tf.rank(x) - 2), [2]], 0))),
    ("random numbers", TABLE, lambda x: x + tf.random.stateless_uniform([6], [1, 2]),
     lambda x: x + tf.random.uniform([6])),
    ("random numbers for each row", TABLE, lambda x: x * tf.ones_like(x),
     lambda x: x + tf.random.stateless_uniform([tf.shape(x)[0], 6], [1, 2])),
    ("unknown operation", TABLE, tf.identity, lambda x: tf.linalg.matrix_transpose(tf.sort(tf.transpose(x)))),
    ("values picked", TABLE, lambda x: x, lambda x: tf.unique(x[:, 0])[0]),
]  # fmt: skip


def checked_by_tensorflow(x: Any, y: Any) -> Any:
    with tf.control_dependencies([tf.debugging.assert_less(y, 9.0)]):
        return x * 2.0


@pytest.mark.parametrize(("shape", "body"), [(rule[1], rule[2]) for rule in RULES], ids=[rule[0] for rule in RULES])
def test_what_keeps_rows_apart_is_proved_to(shape: list[int | None], body: Body):
    assert why_alone(body, shape) == ""


@pytest.mark.parametrize(("shape", "body"), [(rule[1], rule[3]) for rule in RULES], ids=[rule[0] for rule in RULES])
def test_what_mixes_rows_is_not_proved_to_keep_them_apart(shape: list[int | None], body: Body):
    assert why_alone(body, shape) != ""


@pytest.mark.slow
@pytest.mark.parametrize("body", [rule[2] for rule in RULES], ids=[rule[0] for rule in RULES])
def test_what_is_proved_answers_a_group_as_each_of_its_rows(body: Body):
    shape = next(rule[1] for rule in RULES if rule[2] is body)
    values = np.random.default_rng(3).uniform(0.1, 5.0, [5, *[size or 6 for size in shape[1:]]])
    # On processors for which TensorFlow leaves oneDNN out, XLA alone computes convolutions of channels first.
    agree(body, values, jit_compile=body is body_of("convolution of channels first"))


def body_of(name: str) -> Body:
    return next(rule[2] for rule in RULES if rule[0] == name)


def agree(body: Body, values: np.ndarray, jit_compile: bool = False) -> None:
    function = tf.function(body, autograph=False, jit_compile=jit_compile)
    x = values.astype(np.float32)
    together = function(tf.constant(x)).numpy()
    apart = np.concatenate([function(tf.constant(x[start:end])).numpy() for start, end in ((0, 1), (1, 3), (3, 5))])
    np.testing.assert_allclose(together, apart, rtol=1e-5, atol=1e-5)


STEPS: list[Body] = [
    lambda x: x * 2.0,
    lambda x: x + x[:1],
    lambda x: x - tf.reduce_mean(x, -1, keepdims=True),
    lambda x: x - tf.reduce_mean(x, 0, keepdims=True),
    lambda x: x * weights(x.shape[-1]),
    lambda x: x * weights(5, *[1] * (len(x.shape) - 1)),
    lambda x: tf.reshape(x, [-1, x.shape[1:].num_elements()]),
    lambda x: tf.reshape(x, [tf.shape(x)[0], -1, 2]),
    lambda x: tf.reshape(x, [-1, 2, x.shape[-1]]),
    lambda x: tf.reshape(x, [-1, x.shape[-1]]),
    lambda x: tf.reshape(x, [-1, 4, 6]),
    lambda x: tf.reshape(x, [5, -1]),
    lambda x: tf.transpose(x, [0, *reversed(range(1, len(x.shape)))]),
    lambda x: tf.transpose(x, [1, 0, *range(2, len(x.shape))]),
    lambda x: tf.concat([x, tf.nn.relu(x)], -1),
    lambda x: tf.concat([x, x], 0),
    lambda x: x[:, :1] * x,
    lambda x: x[:, ::-1],
    lambda x: x[::-1],
    lambda x: tf.nn.softmax(x, 0),
    lambda x: tf.nn.softmax(x),
    lambda x: tf.cumsum(x, 0),
    lambda x: tf.cumsum(x, 1),
    lambda x: tf.linalg.matmul(x, weights(x.shape[-1], 4)),
    lambda x: tf.math.top_k(x, 2).values,
    lambda x: tf.gather(x, [1, 0], axis=1),
    lambda x: tf.expand_dims(x, 1),
    lambda x: tf.expand_dims(x, 0),
    lambda x: tf.squeeze(x[..., None], [-1]),
    lambda x: x * tf.cast(tf.shape(x)[0], tf.float32),
    lambda x: x * tf.cast(tf.shape(x)[1], tf.float32),
    lambda x: tf.map_fn(lambda row: row / tf.reduce_max(row), x),
    lambda x: tf.tile(x, [1, 2, *[1] * (len(x.shape) - 2)]),
    lambda x: tf.pad(x, [[0, 0]] * (len(x.shape) - 1) + [[1, 1]]),
    lambda x: tf.stack([x, -x], 1),
    lambda x: tf.reduce_max(x, 1),
    lambda x: tf.roll(x, 1, 0),
    lambda x: tf.repeat(x, 2, 1),
    lambda x: tf.repeat(x, 2, 0),
    lambda x: tf.transpose(tf.transpose(x, [1, 0, *range(2, len(x.shape))]) * weights(x.shape[1], 1, x.shape[-1])),
    lambda x: tf.transpose(x, [1, 0, *range(2, len(x.shape))])[1],
    lambda x: tf.transpose(x, [1, 0, *range(2, len(x.shape))])[:, 1],
    lambda x: tf.stack([x, x * 2.0])[1],
    lambda x: tf.stack([x, x * 2.0])[:, 1],
    lambda x: tf.reverse(tf.transpose(x, [1, 0, *range(2, len(x.shape))]), [0]),
    lambda x: tf.scan(lambda total, row: total + row, tf.transpose(x, [1, 0, *range(2, len(x.shape))])),
    over_steps(lambda state, row: tf.tanh(state + row)),
    over_steps(lambda state, row: state + row[::-1]),
    across(lambda x: x * weights(4, 1, 6)),
]


@pytest.mark.parametrize(("seed", "count"), [(7, 40), pytest.param(8, 400, marks=pytest.mark.slow)])
def test_random_graphs_that_are_proved_answer_groups_as_their_requests(seed: int, count: int):
    chance = np.random.default_rng(seed)
    proved = 0
    for _ in range(count):
        steps = [STEPS[index] for index in chance.integers(len(STEPS), size=chance.integers(1, 6))]

        def body(x: Any, steps: list[Body] = steps) -> Any:
            for step in steps:
                x = step(x)
            return x

        try:
            alone = why_alone(body, CUBE)
        except (ValueError, IndexError, TypeError, NotImplementedError):
            # The steps do not fit one after another.
            continue
        if not alone:
            values = chance.uniform(0.1, 2.0, [5, 4, 6])
            try:
                tf.function(body, autograph=False)(tf.constant(values[:1].astype(np.float32)))
            except tf.errors.InvalidArgumentError:
                # The steps fit no row.
                continue
            proved += 1
            agree(body, values)
    assert proved > count // 8


def test_strings_are_looked_up_row_by_row():
    table = tf.lookup.StaticHashTable(tf.lookup.KeyValueTensorInitializer(["a", "b"], [1, 2]), -1)
    assert why_alone(lambda s: table.lookup(tf.strings.lower(s)), VECTOR, tf.string) == ""
    assert "StringJoin" in why_alone(lambda s: tf.strings.join([s, s]), VECTOR, tf.string)


def test_a_variable_that_is_read_is_the_same_for_all_and_one_that_is_written_is_not():
    variable = tf.Variable(weights(6, 2))
    assert why_alone(lambda x: x @ variable, TABLE) == ""

    def writing(x: Any) -> Any:
        variable.assign_add(tf.ones([6, 2]))
        return x @ variable

    assert "AssignAddVariableOp" in why_alone(writing, TABLE)


def test_pictures_are_decoded_row_by_row():
    def decode(contents: Any) -> Any:
        picture = tf.io.decode_image(contents, channels=1, expand_animations=False)
        checks = [tf.debugging.assert_less(tf.shape(picture)[0], 5000)]
        with tf.control_dependencies(checks):
            picture = tf.image.resize(picture, (28, 28), antialias=True)
        return tf.cast(tf.round(picture), tf.uint8)

    def body(contents: Any) -> Any:
        pictures = tf.map_fn(decode, contents, fn_output_signature=tf.uint8)
        return tf.reduce_mean(tf.cast(tf.ensure_shape(pictures, [None, 28, 28, 1]), tf.float32), [1, 2, 3])

    assert why_alone(body, VECTOR, tf.string) == ""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["MobileNetV2", "ResNet50", "EfficientNetB0", "DenseNet121", "MobileNetV3Small"])
def test_networks_of_keras_are_proved_as_keras_exports_them(name: str, tmp_path: Path):
    model = getattr(keras.applications, name)(weights=None, input_shape=(64, 64, 3), classes=10)
    model.export(tmp_path / "1", verbose=False)
    assert Servable(tmp_path / "1").signature("").findings.alone == ""
