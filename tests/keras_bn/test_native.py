"""The compiled operations: their numbers, where they are taken, and what stands in for them in a graph."""

import contextlib
import functools
import resource
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2
from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

import keras_bn
from keras_bn import ops as kernels
from keras_bn.ops import native as _native
from keras_bn.ops import stand_ins as _stand_ins
from keras_bn.statistics import Moments, Moving
from tests.reference import Reference, assert_close

pytestmark = pytest.mark.skipif(_native._operations() is None, reason="installed without a C++ compiler")


def _operations(function, *specs):
    return _operations_of(tf.function(function, autograph=False).get_concrete_function(*specs))


def _operations_of(concrete):
    """The types of all operations in the graph of a function and of the functions it calls."""
    graph = concrete.graph.as_graph_def()
    return {node.op for nodes in (graph.node, *(f.node_def for f in graph.library.function)) for node in nodes}


def _saved_operations(path):
    saved = saved_model_pb2.SavedModel.FromString((Path(path) / "saved_model.pb").read_bytes())
    graph = saved.meta_graphs[0].graph_def
    return {node.op for nodes in (graph.node, *(f.node_def for f in graph.library.function)) for node in nodes}


def _own(operations):
    return sorted(name for name in operations if "KerasBn>" in name)


def _calls(concrete):
    """How many calls a graph holds that ours may take."""
    nodes = concrete.graph.as_graph_def().node
    return sum(node.attr["config_proto"].s == _stand_ins._SETTINGS for node in nodes)


@contextlib.contextmanager
def _not_taken():
    """Calls made here are run as in a process that knows nothing of ours."""
    assert _native._calls_are_taken()
    settings, _stand_ins._SETTINGS = _stand_ins._SETTINGS, b""
    _stand_ins._made.cache_clear()
    yield
    _stand_ins._SETTINGS = settings
    _stand_ins._made.cache_clear()


@pytest.fixture
def spoiled(monkeypatch):
    """All functions that stand in for an operation give NaN: what is finite was computed by the operation."""

    def with_nan(function):
        return lambda *inputs, **options: tf.nest.map_structure(
            lambda value: value * np.nan, function(*inputs, **options)
        )

    for name, (function, plain, gradient) in _native._OPERATIONS.items():
        monkeypatch.setitem(_native._OPERATIONS, name, (function, with_nan(plain), gradient))


def _finite(*values):
    return [bool(np.all(np.isfinite(value))) for value in values]


LAYOUTS = [
    ((256, 128), [1]),
    ((7, 5), [1]),
    ((6, 3, 3, 4), [3]),
    ((6, 20, 4, 5), [1]),
    ((3, 5, 17, 11), [1]),
    ((2, 3, 40, 40), [1]),
    ((5, 3, 4, 6), [1, 2]),
    ((4, 5, 6), [0]),
    ((300, 1), [1]),
    ((1, 300), [0]),
    ((0, 4), [1]),
    ((5, 0), [1]),
]


def _normalized(axes, x, gamma, beta, dy):
    with tf.GradientTape() as tape:
        tape.watch([x, gamma, beta])
        y, moments, count = _native.normalize_batch(x, gamma, beta, axes, 1e-3)
    return y, Moments(count, *tf.unstack(moments)), tape.gradient(y, [x, gamma, beta], output_gradients=dy)


@pytest.mark.parametrize("way", ["eager", "graph", "graph of unknown shape", "stand-in", "jit_compile"])
@pytest.mark.parametrize(("shape", "axes"), LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_layout_equals_the_oracle(shape, axes, dtype, way):
    rng = np.random.default_rng(0)
    x, dy = (tf.cast(rng.normal(1, 2, shape), dtype) for _ in range(2))
    channels = int(np.prod([shape[axis] for axis in axes]))
    gamma, beta = (tf.constant(rng.normal(1, 0.3, channels), "float32") for _ in range(2))
    function = functools.partial(_normalized, axes)
    if way != "eager":
        known = [size if "unknown" not in way or axis in axes else None for axis, size in enumerate(shape)]
        specs = [tf.TensorSpec(known, dtype), tf.TensorSpec([channels]), tf.TensorSpec([channels])]
        traced = tf.function(functools.partial(_normalized, axes), input_signature=[*specs, specs[0]], autograph=False)
        assert _own(_operations_of(traced.get_concrete_function())) == []
        # It is traced before XLA sees it.
        function = tf.function(lambda *inputs: traced(*inputs), jit_compile=True) if way == "jit_compile" else traced
    with _not_taken() if way == "stand-in" else contextlib.nullcontext():
        y, moments, gradients = function(x, gamma, beta, dy)
    assert y.dtype == gradients[0].dtype == x.dtype
    if 0 in shape:
        assert y.shape == gradients[0].shape == shape
        for value in (moments.m2, *gradients[1:]):
            np.testing.assert_array_equal(value, np.zeros(channels))
        return
    oracle = Reference(np.asarray(x, "float64"), axes, gamma, beta)
    assert_close(y, oracle.y, dtype, scale=2)
    assert np.all(moments.count == oracle.count)
    assert_close(moments.mean, oracle.batch_mean.ravel(), "float32")
    assert_close(moments.m2, oracle.m2.ravel(), "float32", scale=np.max(oracle.m2) + 1)
    for got, want in zip(gradients, oracle.gradients(np.asarray(dy, "float64")), strict=True):
        assert_close(tf.reshape(got, want.shape), want, dtype, scale=2 * max(1.0, np.abs(want).max()))


@pytest.mark.parametrize(("shape", "axes"), LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_layout_is_inferred_as_the_oracle_does(shape, axes, dtype):
    rng = np.random.default_rng(0)
    x = tf.cast(rng.normal(1, 2, shape), dtype)
    channels = int(np.prod([shape[axis] for axis in axes]))
    gamma, beta = (tf.constant(rng.normal(1, 0.3, channels), "float32") for _ in range(2))
    mean, variance = (tf.constant(rng.uniform(0.5, 2, channels), "float32") for _ in range(2))
    inferred = _native.normalize(x, mean, variance, gamma, beta, axes, 1e-3)
    assert inferred.dtype == x.dtype
    assert inferred.shape == shape
    if 0 not in shape:
        oracle = Reference(np.asarray(x, "float64"), axes, gamma, beta)
        assert_close(inferred, oracle.inference(mean, variance), dtype, scale=4)


def test_results_and_gradients_far_from_zero_know_what_the_rounded_mean_lacks():
    rng = np.random.default_rng(0)
    x = tf.constant(rng.normal(size=(128, 6)) + 1e6, "float32")
    gamma, beta = tf.constant(rng.normal(1, 0.3, 6), "float32"), tf.zeros([6])
    oracle = Reference(np.asarray(x, "float64"), -1, gamma)
    dy = tf.constant(oracle.normalized + 0.1 * rng.normal(size=x.shape), "float32")
    with tf.GradientTape() as tape:
        tape.watch([x, gamma, beta])
        y, *_ = _native.normalize_batch(x, gamma, beta, [1], 1e-3)
    np.testing.assert_allclose(y, oracle.y, atol=1e-5)
    for got, want in zip(
        tape.gradient(y, [x, gamma, beta], output_gradients=dy),
        oracle.gradients(np.asarray(dy, "float64")),
        strict=True,
    ):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


def _with_gamma(value, dtype):
    """`gamma * 1`, rounded to a half type by the operation."""
    ones, zeros = tf.ones(value.shape), tf.zeros(value.shape)
    return _native.normalize(tf.ones([1, *value.shape], dtype), zeros, ones, value, zeros, [1], 0.0)[0]


def test_every_half_is_read_right():
    halves = np.arange(2**16, dtype="uint16").view("float16")
    zero, one = tf.zeros([1]), tf.ones([1])
    got = _native.normalize(tf.constant(halves[:, None]), zero, one, one, zero, [1], 0.0)[:, 0]
    np.testing.assert_array_equal(got, halves)


@pytest.mark.parametrize("dtype", [tf.float16, tf.bfloat16])
def test_half_types_are_rounded_as_tensorflow_rounds(dtype):
    rng = np.random.default_rng(0)
    halves = np.arange(2**16, dtype="uint16").view("float16").astype("float32")
    halves = halves[np.isfinite(halves)]
    values = np.concatenate(
        [
            rng.normal(size=200_000) * 10.0 ** rng.uniform(-9, 6, 200_000),
            halves,
            # Halfway between two halves: ties.
            (halves[:-1] + halves[1:]) / 2,
            [np.inf, -np.inf, np.nan, 65504, 65519, 65520, 65536, 3.4e38],
        ]
    ).astype("float32")
    # Subnormal floats are flushed by TensorFlow's threads.
    values = values[~((np.abs(values) < 1.2e-38) & (values != 0))]
    np.testing.assert_array_equal(
        tf.cast(_with_gamma(tf.constant(values), dtype), tf.float32), tf.cast(tf.cast(values, dtype), tf.float32)
    )


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("count", [16, 1, 0])
@pytest.mark.parametrize("way", ["eager", "graph", "stand-in"])
def test_moving_statistics_follow_the_equation_and_keep_what_is_worth_nothing(way, count, unbiased):
    moving = tf.constant([1.0, 2, 3]), tf.constant([4.0, 5, 6])
    x = np.random.default_rng(0).normal(size=(count, 3)).astype("float32")
    x[:1, 1], x[:1, 2] = np.nan, np.inf
    ones = tf.ones([3])

    def moved(x):
        assigned = []
        how = Moving(*moving, 0.25, unbiased, lambda *values: assigned.extend(values))
        _native.normalize_batch(x, ones, ones, [1], 1e-3, how)
        return assigned

    with _not_taken() if way == "stand-in" else contextlib.nullcontext():
        got = (moved if way == "eager" else tf.function(moved, autograph=False))(tf.constant(x))
    first = [1.0, 4.0]
    if count > 1:
        first = [1 + 0.25 * (x[:, 0].mean() - 1), 4 + 0.25 * (x[:, 0].var(ddof=int(unbiased)) - 4)]
    np.testing.assert_allclose(got, [[first[0], 2, 3], [first[1], 5, 6]], rtol=1e-6)


def _training_step(layer):
    def step(x):
        with tf.GradientTape() as tape:
            y = layer(x, training=True)
        return tape.gradient(y, layer.gamma._value)

    return step


def test_eager_call_takes_them(monkeypatch):
    calls = []
    operations = _native._operations()

    class Counting:
        def __getattr__(self, name):
            calls.append(name)
            return getattr(operations, name)

    monkeypatch.setattr(_native, "_operations", Counting)
    x = tf.random.normal([8, 4])
    layer = keras_bn.BatchNormalization()
    layer(x, training=True)
    layer(x, training=False)
    assert calls == ["keras_bn_normalize_batch", "keras_bn_normalize"]


@pytest.mark.parametrize("size", [8, None])
def test_training_graph_holds_tensorflows_own_operations_and_runs_the_compiled_ones(size, spoiled):
    layer = keras_bn.BatchNormalization()
    layer.build([None, 4])

    def traced():
        return tf.function(_training_step(layer), input_signature=[tf.TensorSpec([size, 4])], autograph=False)

    step, x = traced(), tf.random.normal([8, 4])
    assert _own(_operations_of(step.get_concrete_function())) == []
    assert _finite(step(x), layer.moving_mean, layer.moving_variance) == [True, True, True]
    with _not_taken():
        assert _finite(traced()(x), layer.moving_mean, layer.moving_variance) == [False, False, False]


@pytest.mark.parametrize("shape", [(8, 4), (40, 30, 30, 4)])
def test_inferring_graph_of_known_shape_runs_the_compiled_one(shape, spoiled):
    layer = keras_bn.BatchNormalization()
    layer.build(shape)

    def traced():
        return tf.function(lambda x: layer(x, training=False), input_signature=[tf.TensorSpec(shape)], autograph=False)

    infer, x = traced(), tf.random.normal(shape)
    assert _own(_operations_of(infer.get_concrete_function())) == []
    assert _finite(infer(x)) == [True]
    with _not_taken():
        assert _finite(traced()(x)) == [False]


@pytest.mark.parametrize("call", ["predict", "evaluate", "fit"])
def test_loops_of_keras_run_the_compiled_one(call, spoiled):
    model = keras.Sequential([keras.Input((4,)), keras_bn.BatchNormalization()])
    model.compile("sgd", "mse", jit_compile=False)
    if call == "fit":
        keras_bn.freeze(model)
    # Keras gives `predict` the batches themselves, the others an iterator over batches of any size.
    x = np.random.default_rng(0).normal(size=(64 if call == "predict" else 50, 4)).astype("float32")
    result = model.predict(x, verbose=0) if call == "predict" else getattr(model, call)(x, x, verbose=0)
    assert _finite(result.history["loss"] if call == "fit" else result) == [True]


def test_nothing_stands_in_for_them_where_they_would_not_run(monkeypatch):
    layer = keras_bn.BatchNormalization()
    layer.build([None, 4])

    def calls(function, *specs, **options):
        return _calls(tf.function(function, autograph=False, **options).get_concrete_function(*specs))

    def infer(x):
        return layer(x, training=False)

    step, spec, known = _training_step(layer), tf.TensorSpec([None, 4]), tf.TensorSpec([8, 4])
    assert calls(step, spec) == 2
    # TensorFlow's fused operation is as fast.
    assert calls(step, tf.TensorSpec([1_000_000, 4])) == 0
    assert calls(step, spec, jit_compile=True) == 0
    assert calls(infer, known) == 1
    # It may be there to be exported.
    assert calls(infer, spec) == 0
    assert calls(infer, known, jit_compile=True) == 0
    assert calls(infer, tf.TensorSpec([8, 4], tf.float64)) == 1
    wide = keras_bn.BatchNormalization(dtype="float64")
    wide.build([None, 4])
    assert calls(lambda x: wide(x, training=False), tf.TensorSpec([8, 4], tf.float64)) == 0
    stable = keras_bn.BatchNormalization(kernel="stable")
    stable.build([None, 4])
    assert calls(_training_step(stable), spec) == 0
    elsewhere = [tf.config.LogicalDevice(f"/job:worker/task:{i}/device:CPU:0", "CPU") for i in range(2)]
    with monkeypatch.context() as patch:
        patch.setattr(tf.config, "list_logical_devices", lambda kind: elsewhere)
        assert calls(step, spec) == calls(infer, known) == 0
    # Another TensorFlow may inline calls, or leave out what nobody uses.
    monkeypatch.setattr(_stand_ins, "_KEPT", {})
    monkeypatch.setattr(_native, "_calls_are_taken", functools.cache(_native._calls_are_taken.__wrapped__))
    _stand_ins._made.cache_clear()
    with pytest.warns(UserWarning, match="calls are changed by TensorFlow"):
        assert calls(step, spec) == calls(infer, known) == 0


@pytest.mark.parametrize("mode", ["graph", "while loop"])
def test_call_may_have_constant_inputs_and_results_that_nobody_uses(mode, spoiled):
    x, one = tf.constant([[0.0], [2.0]]), tf.ones([1])

    def infer(x):
        constant = tf.ones([1])
        y, *_ = _native.normalize_batch(x, constant, constant * 0, [1], 0.0)
        z = kernels.normalize_with(tf.constant([[3.0]]), constant, constant, constant, axes=[1], epsilon=0.0)
        return y + z

    def loop(x):
        return tf.while_loop(lambda i, _: i < 2, lambda i, x: (i + 1, infer(x)), [0, x])[1]

    call = tf.function(infer if mode == "graph" else loop, autograph=False)
    np.testing.assert_array_equal(call(x), [[1], [3]] * one)


def test_inputs_that_others_need_stay_as_they_are():
    layer = keras_bn.BatchNormalization()
    layer.build([8, 4])
    layer.moving_mean.assign(np.full(4, 10.0))
    x, variable = tf.random.normal([8, 4]), tf.Variable(tf.random.normal([8, 4]))
    before = x.numpy(), variable.numpy()

    @tf.function(autograph=False)
    def infer(x):
        doubled, constant = 2 * x, tf.constant(before[0])
        ys = [layer(value, training=False) for value in (x, variable, doubled, constant)]
        return *ys, doubled, constant

    for _ in range(2):
        *ys, doubled, constant = infer(x)
        np.testing.assert_array_equal((x, variable, doubled, constant), (*before, 2 * before[0], before[0]))
        for y, value in zip(ys, (x, variable, doubled, constant), strict=True):
            np.testing.assert_allclose(y, (value - 10) / np.sqrt(1.001), rtol=1e-5)

    @tf.function(autograph=False)
    def gradients(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            first = layer(x, training=True)
            # Both take the same gradient of their sum.
            total = layer(first, training=True) + first
        return tape.gradient(total, x, output_gradients=x), x

    with _not_taken():
        want = tf.function(gradients.python_function, autograph=False)(x)
    for got, value in zip(gradients(x), want, strict=True):
        np.testing.assert_allclose(got, value, atol=1e-6)


# Whole blocks and a rest, of examples or, where there are few, of channels; rows that are long, short and odd.
LARGE = [
    ((70_000, 64), [1]),
    ((50, 3, 300, 100), [1]),
    ((20, 300, 250, 3), [3]),
    ((600, 129, 59), [1]),
    ((3, 400_001), [1]),
    ((1, 11, 100_000), [1]),
    ((37, 50_000), [0]),
]


@pytest.mark.parametrize("offset", [0, 1000])
@pytest.mark.parametrize(("shape", "axes"), LARGE, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_large_batches_are_normalized_right_by_all_threads_together(dtype, shape, axes, offset):
    rng = np.random.default_rng(0)
    x, dy = (tf.cast(rng.standard_normal(shape, "float32") * 2 + shift, dtype) for shift in (offset, 0))
    channels = int(np.prod([shape[axis] for axis in axes]))
    gamma, beta = (tf.constant(rng.normal(1, 0.3, channels), "float32") for _ in range(2))
    y, moments, gradients = _normalized(axes, x, gamma, beta, dy)
    oracle = Reference(np.asarray(x, "float64"), axes, gamma, beta)
    # One value of three is a third of the sum of squares.
    scale = 4 if shape[0] > 3 else 40
    assert_close(y, oracle.y, dtype, scale=scale)
    np.testing.assert_allclose(moments.mean, oracle.batch_mean.ravel(), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(moments.m2, oracle.m2.ravel(), rtol=1e-5)
    for got, want in zip(gradients, oracle.gradients(np.asarray(dy, "float64")), strict=True):
        assert_close(tf.reshape(got, want.shape), want, dtype, scale=scale * max(1.0, np.abs(want).max()))


def test_large_batches_give_the_same_bits_however_many_threads_there_are():
    x = tf.random.normal([4000, 300])
    gamma, beta = tf.ones([300]), tf.zeros([300])

    def normalized(_):
        y, moments, gradients = _normalized([1], x, gamma, beta, x)
        return [value.numpy().tobytes() for value in (y, moments.mean, moments.m2, *gradients)]

    alone = normalized(0)
    with ThreadPoolExecutor(4) as callers:
        assert all(other == alone for other in callers.map(normalized, range(40)))


@pytest.mark.parametrize(("shape", "axes"), LARGE, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("way", ["eager", "graph", "in place"])
def test_large_tensors_are_inferred_right_by_all_threads_together(way, dtype, shape, axes):
    rng = np.random.default_rng(0)
    x = tf.cast(rng.standard_normal(shape, "float32") + 3, dtype)
    channels = int(np.prod([shape[axis] for axis in axes]))
    mean, variance, gamma, beta = (tf.constant(rng.uniform(0.5, 2, channels), "float32") for _ in range(4))

    def infer(x):
        x = -x if way == "in place" else x
        return kernels.normalize_with(x, mean, variance, gamma, beta, axes=axes, epsilon=1e-3)

    y = (infer if way == "eager" else tf.function(infer, autograph=False))(x)
    sign = -1 if way == "in place" else 1
    oracle = Reference(sign * np.asarray(x, "float64"), axes, gamma, beta)
    assert_close(y, oracle.inference(mean, variance), dtype, scale=20)


def test_threads_flush_what_the_one_that_asks_flushes():
    layer = keras_bn.BatchNormalization(center=False, scale=False, epsilon=0.0)
    layer.build([None, 64])
    x = tf.fill([100_000, 64], np.float32(1e-39))
    y = tf.function(lambda x: layer(x, training=False))(x)
    np.testing.assert_array_equal(y, tf.fill(x.shape, y[0, 0]))


def test_calls_leave_no_memory_behind():
    layer = keras_bn.BatchNormalization()
    layer.build([None, 64])
    infer = tf.function(lambda x: tf.reduce_sum(layer(2 * x, training=False)), autograph=False)
    train = tf.function(_training_step(layer), autograph=False)
    x, small = tf.random.normal([60_000, 64]), tf.random.normal([30_000, 64])
    for repeats in (3, 60):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for _ in range(repeats):
            infer(x)
            train(small)
    # In KiB; each call has 8 to 15 MB.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000


def test_callers_at_the_same_time_share_the_threads():
    x = tf.random.normal([60_000, 32])
    zero, one = tf.zeros([32]), tf.ones([32])

    def infer(i):
        y = _native.normalize(x, zero, one, one, tf.fill([32], float(i)), [1], 0.0)
        return float(tf.reduce_max(tf.abs(y - x - float(i))))

    with ThreadPoolExecutor(8) as callers:
        assert max(callers.map(infer, range(200))) < 1e-4


@pytest.mark.parametrize(
    "options", [{}, {"momentum": None}, {"zero_debias": True}, {"unbiased_variance": True}], ids=str
)
@pytest.mark.parametrize("known", [True, False], ids=["known batch", "unknown batch"])
@pytest.mark.parametrize("dtype", ["float32", "mixed_float16", "float16"])
def test_graph_with_them_learns_what_a_stable_one_learns(dtype, known, options):
    rng = np.random.default_rng(0)
    batches = tf.cast(rng.normal(2, 3, (4, 16, 6)), "float16" if "16" in dtype else "float32")
    layers = [keras_bn.BatchNormalization(kernel=kernel, dtype=dtype, **options) for kernel in ("auto", "stable")]
    results = []
    for layer in layers:
        layer.build([None, 6])
        step = tf.function(
            _training_step(layer), input_signature=[tf.TensorSpec([16 if known else None, 6], batches.dtype)]
        )
        results.append([step(x) for x in batches] + [layer.moving_mean, layer.moving_variance])
    for got, want in zip(*results, strict=True):
        assert_close(got, np.asarray(want, "float64"), "float16" if dtype == "float16" else "float32", scale=50)


def test_training_may_be_a_tensor():
    layer = keras_bn.BatchNormalization()
    call = tf.function(lambda x, training: layer(x, training=training))
    x = tf.random.normal([32, 4], 5.0)
    assert np.abs(tf.reduce_mean(call(x, tf.constant(True)))) < 1e-5
    assert np.all(np.asarray(layer.moving_mean) != 0)
    assert np.abs(tf.reduce_mean(call(x, tf.constant(False)))) > 1


def test_gradients_through_loops_and_branches_equal_those_of_the_stable_kernel():
    x = tf.random.stateless_normal([16, 3], [0, 1], mean=2.0)
    gamma, beta = tf.constant([1.0, 2, 0.5]), tf.constant([0.0, 1, 2])

    def gradients(kernel):
        def normalize(x):
            return kernels.normalize_with_batch(x, gamma, beta, axes=[1], epsilon=1e-3, kernel=kernel)[0]

        @tf.function
        def run(x):
            with tf.GradientTape() as tape:
                tape.watch([x, gamma, beta])
                y = tf.while_loop(lambda i, _: i < 3, lambda i, y: (i + 1, normalize(y) ** 3), [0, x])[1]
                y = tf.cond(tf.reduce_sum(x) > 0, lambda: normalize(y) ** 2 * x, lambda: y)
            return tape.gradient(y, [x, gamma, beta])

        return run(x)

    for got, want in zip(gradients("auto"), gradients("stable"), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4 * np.abs(want).max())


_ALONE = """if True:
    import sys
    import numpy as np, tensorflow as tf
    module = tf.saved_model.load(sys.argv[1])
    results = [module.step(tf.constant(np.load(sys.argv[2]))) for _ in range(2)]
    assert "keras_bn" not in sys.modules
    np.save(sys.argv[3], results)
"""


def _saved_training_step(path):
    layer = keras_bn.BatchNormalization()
    layer.build([None, 4])
    module = tf.Module()
    module.step = tf.function(_training_step(layer), input_signature=[tf.TensorSpec([None, 4])])
    module.variables_of_layer = [variable._value for variable in layer.weights]
    tf.saved_model.save(module, path)
    assert _own(_saved_operations(path)) == []
    return module


def test_saved_training_step_runs_in_a_process_without_them(tmp_path):
    module = _saved_training_step(str(tmp_path / "step"))
    x = np.random.default_rng(0).normal(3, 2, (8, 4)).astype("float32")
    np.save(tmp_path / "x.npy", x)
    command = [sys.executable, "-c", _ALONE, tmp_path / "step", tmp_path / "x.npy", tmp_path / "y.npy"]
    subprocess.run(command, check=True, capture_output=True)
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), [module.step(x) for _ in range(2)], atol=1e-5)


def test_saved_training_step_runs_them_where_they_are(tmp_path, spoiled):
    _saved_training_step(str(tmp_path / "step"))
    loaded = tf.saved_model.load(str(tmp_path / "step"))
    assert _finite(loaded.step(tf.ones([8, 4])), *loaded.variables_of_layer) == [True] * 5


def test_gradient_of_a_function_that_is_called_is_that_of_the_operation(spoiled):
    layer = keras_bn.BatchNormalization()
    layer.build([None, 4])
    rng = np.random.default_rng(0)
    x, dy, direction = (tf.constant(rng.normal(size=(8, 4)), "float32") for _ in range(3))
    layer.gamma.assign(rng.normal(1, 0.3, 4))
    train = tf.function(lambda x: layer(x, training=True), autograph=False)
    with tf.GradientTape() as second:
        second.watch(x)
        with tf.GradientTape() as first:
            first.watch(x)
            y = train(x)
        dx = first.gradient(y, x, output_gradients=dy)
    d_x = second.gradient(dx, x, output_gradients=direction)

    def exact(step):
        moved = np.asarray(x, "float64") + step * np.asarray(direction)
        return Reference(moved, -1, np.asarray(layer.gamma)).gradients(np.asarray(dy, "float64"))[0]

    assert_close(dx, exact(0), "float32", scale=2)
    # The second derivatives are symmetric: those by x, along `direction`, are the change of the gradient that way.
    np.testing.assert_allclose(d_x, (exact(1e-6) - exact(-1e-6)) / 2e-6, rtol=1e-3, atol=1e-4)


def test_saved_function_is_differentiable_where_it_is_loaded(tmp_path):
    layer = keras_bn.BatchNormalization()
    layer.build([None, 4])
    module = tf.Module()
    module.train = tf.function(lambda x: layer(x, training=True), input_signature=[tf.TensorSpec([None, 4])])
    module.infer = tf.function(lambda x: layer(x, training=False), input_signature=[tf.TensorSpec([8, 4])])
    module.variables_of_layer = [variable._value for variable in layer.weights]
    tf.saved_model.save(module, str(tmp_path / "saved"))
    loaded = tf.saved_model.load(str(tmp_path / "saved"))
    rng = np.random.default_rng(0)
    x, dy = (tf.constant(rng.normal(size=(8, 4)), "float32") for _ in range(2))

    def gradient(call):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = call(x)
        return tape.gradient(y, x, output_gradients=dy)

    for name in ("infer", "train"):
        np.testing.assert_allclose(gradient(getattr(loaded, name)), gradient(getattr(module, name)), atol=1e-6)
    with tf.GradientTape() as tape:
        tape.watch(x)
        with pytest.raises(tf.errors.InvalidArgumentError, match="can be differentiated once, not twice"):
            gradient(loaded.train)
    assert_close(
        gradient(loaded.train), Reference(np.asarray(x, "float64"), -1).gradients(np.asarray(dy))[0], "float32"
    )


def test_next_operation_is_ready_when_the_statistics_are_assigned():
    layer = keras_bn.BatchNormalization()
    layer.build([None, 4])
    traced = tf.function(lambda x: layer(x, training=True), autograph=False)
    (y,) = traced.get_concrete_function(tf.TensorSpec([8, 4])).graph.outputs
    waits = [operation.type for operation in y.op.inputs[0].op.control_inputs]
    assert waits == ["AssignVariableOp"] * 2


def test_converters_find_plain_operations_in_a_graph_of_known_shape():
    layer = keras_bn.BatchNormalization()
    layer.build([8, 4])
    infer = tf.function(lambda x: layer(x, training=False)).get_concrete_function(tf.TensorSpec([8, 4]))
    assert _calls(infer) == 1
    frozen = convert_variables_to_constants_v2(infer)
    x = tf.random.normal([8, 4])
    np.testing.assert_array_equal(frozen(x)[0], infer(x))
    model = tf.lite.TFLiteConverter.from_concrete_functions([infer], layer).convert()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        interpreter = tf.lite.Interpreter(model_content=model)
    operations = {operation["op_name"] for operation in interpreter._get_ops_details()}
    assert operations >= {"SUB", "MUL", "ADD"}
    assert not any("CALL" in name for name in operations)


def test_trained_network_is_exported_without_them(tmp_path):
    model = keras.Sequential([keras.Input((4,)), keras_bn.BatchNormalization(), keras.layers.Dense(2)])
    model.compile("sgd", "mse", jit_compile=False)
    model.fit(np.ones((8, 4), "float32"), np.zeros((8, 2)), verbose=0)
    for save in (model.export, lambda path: tf.saved_model.save(model, path)):
        save(str(tmp_path / "model"))
        graph = (tmp_path / "model" / "saved_model.pb").read_bytes()
        assert b"KerasBn>" not in graph


def test_batch_of_one_in_a_graph_is_said_once(capfd):
    layer = keras_bn.BatchNormalization()
    layer.build([None, 4])
    call = tf.function(lambda x: layer(x, training=True), input_signature=[tf.TensorSpec([None, 4])])
    for size in (1, 2, 1):
        call(tf.ones([size, 4]))
    assert capfd.readouterr().err.count(kernels.SINGLE_VALUE) == 1


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_derivatives_other_than_a_gradient_equal_those_of_the_stable_kernel(mode):
    x, direction = (tf.random.stateless_normal([5, 3], [0, seed]) for seed in (1, 2))
    gamma, beta = tf.constant([1.0, 2, 0.5]), tf.constant([0.0, 1, 2])

    def derivatives(kernel):
        def normalize(x):
            return kernels.normalize_with_batch(x, gamma, beta, axes=[1], epsilon=1e-3, kernel=kernel)[0]

        with tf.autodiff.ForwardAccumulator(x, direction) as forward:
            y = normalize(x)
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(x)
            z = normalize(x)
        return forward.jvp(y), tape.jacobian(z, x), tape.batch_jacobian(z, x, experimental_use_pfor=False)

    call = derivatives if mode == "eager" else tf.function(derivatives, autograph=False)
    for got, want in zip(call("auto"), call("stable"), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda ops, x, v: ops.keras_bn_normalize_batch(x, v, v[:2], v, v, 1, 1, 0.0), "one value for each channel"),
        (lambda ops, x, v: ops.keras_bn_normalize_batch(x, v, v, v, v[:2], 1, 1, 0.0), "one value for each channel"),
        (lambda ops, x, v: ops.keras_bn_normalize(x, v, v, v, v[:2], 1, 1, 0.0), "one value for each channel"),
        (lambda ops, x, v: ops.keras_bn_normalize_batch_grad(x[:2], x, v, x[:2], 1, 1, 0.0), "must be of one size"),
        (lambda ops, x, v: ops.keras_bn_normalize_batch_grad(x, x, v, v, 1, 1, 0.0), "two values for each channel"),
    ],
)
def test_operation_refuses_sizes_that_do_not_belong_together(call, message):
    with pytest.raises(tf.errors.InvalidArgumentError, match=message):
        call(_native._operations(), tf.zeros([4, 3]), tf.zeros([3]))


def test_library_that_does_not_load_is_said_and_gone_without(tmp_path, monkeypatch):
    (tmp_path / "_operations.abi3.so").write_bytes(b"not a library")
    monkeypatch.setattr(_native, "__file__", str(tmp_path / "_native.py"))
    with pytest.warns(UserWarning, match="goes without its compiled operations, which do not load"):
        assert _native._loaded.__wrapped__() is None


def test_threads_that_call_layers_first_at_the_same_time_all_get_an_answer():
    program = """if True:
        import threading
        from concurrent.futures import ThreadPoolExecutor
        import numpy as np, keras_bn
        layers = [keras_bn.BatchNormalization() for _ in range(8)]
        for layer in layers:
            layer.build([4, 2])
        together = threading.Barrier(8)
        def call(layer):
            together.wait()
            return np.asarray(layer(np.ones((4, 2), "float32"), training=True)).sum()
        with ThreadPoolExecutor(8) as threads:
            print(sum(threads.map(call, layers)))
    """
    ran = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert ran.stdout.strip() == "0.0"
