"""The compiled operations: their numbers, their threads and memory, and what an installation without them says."""

import functools
import re
import resource
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

import keras_bn
from keras_bn import ops
from keras_bn.ops import native
from keras_bn.statistics import Moving
from tests.reference import Reference, assert_close

pytestmark = pytest.mark.skipif(not keras_bn.compiled(), reason="installed without a C++ compiler")

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
    ((2, 5, 0, 7), [1]),
    ((0, 5, 7), [1]),
    ((5, 3, 4, 6), [1, 3]),
]


def _normalized(axes, x, gamma, beta, dy):
    with tf.GradientTape() as tape:
        tape.watch([x, gamma, beta])
        y, moments, _ = native.normalize_batch(x, gamma, beta, axes, 1e-3)
    return y, moments, tape.gradient(y, [x, gamma, beta], output_gradients=dy)


@pytest.mark.parametrize("way", ["eager", "graph", "graph of unknown shape"])
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
        function = tf.function(function, input_signature=[*specs, specs[0]], autograph=False)
    y, moments, gradients = function(x, gamma, beta, dy)
    assert y.dtype == gradients[0].dtype == x.dtype
    if 0 in shape:
        assert y.shape == gradients[0].shape == shape
        for value in (moments.mean, moments.m2, *gradients[1:]):
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
    inferred = native.normalize(x, mean, variance, gamma, beta, axes, 1e-3)
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
        y, *_ = native.normalize_batch(x, gamma, beta, [1], 1e-3)
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
    return native.normalize(tf.ones([1, *value.shape], dtype), zeros, ones, value, zeros, [1], 0.0)[0]


def test_every_half_is_read_right():
    halves = np.arange(2**16, dtype="uint16").view("float16")
    zero, one = tf.zeros([1]), tf.ones([1])
    got = native.normalize(tf.constant(halves[:, None]), zero, one, one, zero, [1], 0.0)[:, 0]
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
@pytest.mark.parametrize("way", ["eager", "graph"])
def test_moving_statistics_follow_the_equation_and_keep_what_is_worth_nothing(way, count, unbiased):
    moving = tf.constant([1.0, 2, 3]), tf.constant([4.0, 5, 6])
    x = np.random.default_rng(0).normal(size=(count, 3)).astype("float32")
    x[:1, 1], x[:1, 2] = np.nan, np.inf
    ones = tf.ones([3])

    def moved(x):
        return native.normalize_batch(x, ones, ones, [1], 1e-3, Moving(*moving, 0.25, unbiased))[2]

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


def _infer(x, offset=0.0):
    vector = tf.ones([x.shape[-1]])
    return native.normalize(x, offset * vector, vector, vector, 0 * vector, [len(x.shape) - 1], 0.0)


def test_inputs_that_others_need_stay_as_they_are():
    x, variable = tf.random.normal([8, 4]), tf.Variable(tf.random.normal([8, 4]))
    before = x.numpy(), variable.numpy()

    @tf.function(autograph=False)
    def infer(x):
        doubled, constant = 2 * x, tf.constant(before[0])
        ys = [_infer(value, 10) for value in (x, variable, doubled, constant)]
        return *ys, doubled, constant

    for _ in range(2):
        *ys, doubled, constant = infer(x)
        np.testing.assert_array_equal((x, variable, doubled, constant), (*before, 2 * before[0], before[0]))
        for y, value in zip(ys, (x, variable, doubled, constant), strict=True):
            np.testing.assert_allclose(y, value - 10, rtol=1e-5)

    def gradients(kernel, x):
        def normalize(x):
            return ops.normalize_batch(x, axes=[1], epsilon=1e-3, kernel=kernel).y

        with tf.GradientTape() as tape:
            tape.watch(x)
            first = normalize(x)
            # Both take the same gradient of their sum.
            total = normalize(first) + first
        return tape.gradient(total, x, output_gradients=x), x

    got, want = (tf.function(functools.partial(gradients, kernel))(x) for kernel in ("native", "plain"))
    for value, other in zip(got, want, strict=True):
        np.testing.assert_allclose(value, other, atol=1e-6)


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
        return native.normalize(-x if way == "in place" else x, mean, variance, gamma, beta, axes, 1e-3)

    y = (infer if way == "eager" else tf.function(infer, autograph=False))(x)
    sign = -1 if way == "in place" else 1
    oracle = Reference(sign * np.asarray(x, "float64"), axes, gamma, beta)
    assert_close(y, oracle.inference(mean, variance), dtype, scale=20)


def test_threads_flush_what_the_one_that_asks_flushes():
    y = tf.function(_infer)(tf.fill([100_000, 64], np.float32(1e-39)))
    np.testing.assert_array_equal(y, tf.fill(y.shape, y[0, 0]))


def test_calls_leave_no_memory_behind():
    layer = keras_bn.BatchNormalization()
    layer.build([None, 64])
    infer = tf.function(lambda x: tf.reduce_sum(_infer(2 * x)), autograph=False)
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
        y = native.normalize(x, zero, one, one, tf.fill([32], float(i)), [1], 0.0)
        return float(tf.reduce_max(tf.abs(y - x - float(i))))

    with ThreadPoolExecutor(8) as callers:
        assert max(callers.map(infer, range(200))) < 1e-4


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


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda ops, x, v: ops.keras_bn_normalize_batch(x, v, v[:2], v, v, 1, 1, 0.0), "one value for each channel"),
        (lambda ops, x, v: ops.keras_bn_normalize_batch(x, v, v, v, v[:2], 1, 1, 0.0), "one value for each channel"),
        (lambda ops, x, v: ops.keras_bn_normalize(x, v, v, v, v[:2], 1, 1, 0.0), "one value for each channel"),
        (lambda ops, x, v: ops.keras_bn_normalize_batch_grad(x[:2], x, v, v, v, v, 1, 1, 0.0), "must be of one size"),
        (
            lambda ops, x, v: ops.keras_bn_normalize_batch_grad(x, x, v, v[:2], v, v, 1, 1, 0.0),
            "value for each channel",
        ),
    ],
)
def test_operation_refuses_sizes_that_do_not_belong_together(call, message):
    with pytest.raises(tf.errors.InvalidArgumentError, match=message):
        call(native._library, tf.zeros([4, 3]), tf.zeros([3]))


def test_library_that_is_not_there_or_does_not_load_is_gone_without(tmp_path, monkeypatch):
    monkeypatch.setattr(native, "_path", tmp_path / "_operations.abi3.so")
    library, reason = native._load()
    assert library is None
    assert reason.startswith(f"they are not in {tmp_path}: no C++ compiler was there")
    native._path.write_bytes(b"not a library")
    with pytest.warns(UserWarning, match="goes without its compiled operations, which do not load"):
        library, reason = native._load()
    assert library is None
    assert reason.startswith("they do not load: ")


def test_library_whose_results_are_wrong_is_said_and_gone_without(monkeypatch):
    right = native.normalize_batch

    def wrong(x, *rest):
        y, *others = right(x, *rest)
        return y + 0.01, *others

    monkeypatch.setattr(native, "normalize_batch", wrong)
    with pytest.warns(UserWarning, match="goes without its compiled operations: with TensorFlow .* results are wrong"):
        said = native.compiled.__wrapped__()
    assert not said
    assert re.fullmatch(r"no compiled operations: with TensorFlow \S+ their results are wrong", str(said))
    monkeypatch.setattr(native, "compiled", lambda: said)
    monkeypatch.setattr(ops, "compiled", lambda: said)
    x = tf.random.normal([8, 4])
    traced = tf.function(lambda x: ops.normalize_batch(x, axes=[1], epsilon=1e-3).y).get_concrete_function(x)
    assert "FusedBatchNormV3" in {operation.type for operation in traced.graph.get_operations()}
    with pytest.raises(ValueError, match=r"must be 'auto', 'fused' or 'plain' where.*results are wrong.*'native'"):
        ops.normalize_batch(x, axes=[1], epsilon=1e-3, kernel="native")


def test_declarations_of_the_c_interface_are_those_of_the_installed_headers(tmp_path):
    compiler = shutil.which("c++") or pytest.skip("there is no C++ compiler")
    source = (Path(native.__file__).parent / "csrc" / "ops.cc").read_text()
    declarations = source[source.index('extern "C" {') : source.index("namespace {")]
    # A function that is declared a second time must be declared alike.
    declarations = re.sub(r"struct \w+;", "", declarations)
    values = re.findall(r"(TF_[A-Z0-9_]+) = (\d+)", source)
    assert declarations.count("TF_") > 30
    assert len(values) == 7
    program = tmp_path / "declarations.cc"
    includes = [f"#include <tensorflow/c/{name}.h>" for name in ("c_api", "kernels", "ops")]
    asserts = [f"static_assert({name} == {value});" for name, value in values]
    for text, compiles in (
        (declarations, True),
        (declarations.replace("int TF_NumDims", "long TF_NumDims"), False),
    ):
        program.write_text("\n".join([*includes, text, *asserts]))
        command = [compiler, "-std=c++17", "-fsyntax-only", f"-I{tf.sysconfig.get_include()}", program]
        ran = subprocess.run(command, capture_output=True, text=True)
        assert (ran.returncode == 0) == compiles, ran.stderr


@pytest.fixture
def asked_anew():
    """`keras_bn.compiled` as if it had not been asked, then and afterwards."""
    native.compiled.cache_clear()
    yield
    native.compiled.cache_clear()


def test_they_are_found_to_be_right_where_functions_run_eagerly(asked_anew):
    tf.config.run_functions_eagerly(True)
    try:
        assert keras_bn.compiled()
    finally:
        tf.config.run_functions_eagerly(False)


def test_they_are_found_to_be_right_within_a_tape(asked_anew):
    x = tf.Variable([[1.0, 2.0], [3.0, 5.0]])
    with tf.GradientTape():
        tf.reduce_sum(x)
        assert keras_bn.compiled()
