"""The numbers of every kernel: far from zero, constant, huge, and their derivatives."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_bn import ops as kernels
from keras_bn.ops import fused as _batch_kernels
from keras_bn.ops import layouts
from tests.reference import Reference, assert_close

MODES = ("eager", "graph", "jit_compile")
KERNELS = ("auto", "fused", "xla", "stable")
# Under XLA all kernels are the same one.
WAYS = [(mode, kernel) for mode in ("eager", "graph") for kernel in KERNELS] + [("jit_compile", "fused")]


def _run(function, mode):
    return function if mode == "eager" else tf.function(function, jit_compile=mode == "jit_compile", autograph=False)


def _with_batch(x, gamma=None, beta=None, **options):
    return kernels.normalize_with_batch(x, gamma, beta, epsilon=1e-3, **{"axes": [len(x.shape) - 1], **options})


def _affine(channels, dtype="float32", seed=5):
    rng = np.random.default_rng(seed)
    return tf.constant(rng.normal(1, 0.3, channels), dtype), tf.constant(rng.normal(size=channels), dtype)


@pytest.mark.parametrize("offset", [0.0, 3.0, 30.0, 1e4, 1e6])
@pytest.mark.parametrize(("mode", "kernel"), WAYS)
def test_output_keeps_its_digits_at_any_offset(mode, kernel, offset):
    rng = np.random.default_rng(0)
    x = tf.constant(rng.normal(size=(64, 14, 14, 8)) + offset, "float32")
    gamma, beta = _affine(8)
    y, moments = _run(lambda x: _with_batch(x, gamma, beta, kernel=kernel), mode)(x)
    oracle = Reference(x, -1, gamma, beta)
    assert np.abs(y - oracle.y).max() < 1e-4
    np.testing.assert_allclose(moments.m2 / moments.count, oracle.biased_variance, rtol=1e-4)
    np.testing.assert_allclose(moments.mean, oracle.batch_mean, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "options",
    [{"weights": np.ones((32, 1))}, {"group_size": 8}, {"group_size": 5}],
    ids=["weights", "groups", "uneven groups"],
)
def test_rarer_kernels_keep_their_digits_at_any_offset(options, mode):
    x = tf.constant(np.random.default_rng(0).normal(size=(32, 6)) + 1e6, "float32")
    y, _ = _run(lambda x: _with_batch(x, **options), mode)(x)
    size = options.get("group_size", 32)
    want = np.concatenate([Reference(x[start : start + size], -1).y for start in range(0, 32, size)])
    assert np.abs(y - want).max() < 1e-4


@pytest.mark.parametrize("offset", [0.0, 1e4, 1e6])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(16, 5, 5, 4), (512, 256), (64, 64, 64, 4)], ids=str)
def test_inference_keeps_its_digits_at_any_offset(mode, offset, shape):
    rng = np.random.default_rng(0)
    x = tf.constant(rng.normal(size=shape) + offset, "float32")
    channels, axes = shape[-1], [len(shape) - 1]
    mean, variance = tf.fill([channels], np.float32(offset)), tf.constant(rng.uniform(0.5, 2, channels), "float32")
    gamma, beta = _affine(channels)
    call = _run(lambda x: kernels.normalize_with(x, mean, variance, gamma, beta, axes=axes, epsilon=1e-3), mode)
    assert np.abs(call(x) - Reference(x, -1, gamma, beta).inference(mean, variance)).max() < 1e-4


@pytest.mark.parametrize("offset", [0.0, 300.0])
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "neither scale nor center"])
@pytest.mark.parametrize("shape", [(16, 5, 5, 4), (None, 5, None, 4)], ids=str)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("mode", [*MODES, "compiled later"])
def test_inference_of_small_halves_and_its_derivatives_equal_those_in_float64(mode, dtype, shape, affine, offset):
    rng = np.random.default_rng(0)
    x, dy = (tf.cast(rng.normal(size=(16, 5, 5, 4)) + shift, dtype) for shift in (offset, 0))
    mean, variance = rng.normal(offset, 1, 4), rng.uniform(0.5, 2, 4)
    affine = [rng.normal(1, 0.3, 4), rng.normal(size=4)] if affine else []

    def derivatives(x, dy, mean, variance, *affine):
        inputs = [x, mean, variance, *affine]
        with tf.GradientTape() as outer:
            outer.watch(inputs)
            with tf.GradientTape() as inner:
                inner.watch(inputs)
                y = kernels.normalize_with(x, mean, variance, *affine, axes=[3], epsilon=1e-3)
            first = inner.gradient(y, inputs, output_gradients=dy)
            value = tf.add_n([tf.reduce_sum(tf.cast(d, mean.dtype) ** 2) for d in first])
        return y, first, outer.gradient(value, inputs, unconnected_gradients="zero")

    function = derivatives
    if mode != "eager":
        specs = [tf.TensorSpec(shape, dtype)] * 2 + [tf.TensorSpec([4])] * (2 + len(affine))
        function = tf.function(derivatives, specs, jit_compile=mode == "jit_compile", autograph=False)
    if mode == "compiled later":
        function.get_concrete_function()
        function = tf.function(lambda *inputs, traced=function: traced(*inputs), jit_compile=True)
    got = function(x, dy, *(tf.constant(value, "float32") for value in (mean, variance, *affine)))
    want = derivatives(*(tf.cast(value, tf.float64) for value in (x, dy, mean, variance, *affine)))
    for a, b in zip(tf.nest.flatten(got), tf.nest.flatten(want), strict=True):
        assert_close(a, b, dtype, scale=8 * max(1.0, np.abs(b).max()))


@pytest.mark.parametrize("offset", [0.0, 3.0, 30.0, 1e4])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("mode", MODES)
def test_inference_of_large_planes_keeps_its_digits_at_any_offset(mode, dtype, offset, monkeypatch):
    monkeypatch.setattr(_batch_kernels, "_SMALL", 0)
    rng = np.random.default_rng(0)
    x = tf.cast(rng.normal(size=(16, 4, 5, 5)) + offset, dtype)
    mean, variance = tf.fill([4], np.float32(offset)), tf.constant(rng.uniform(0.5, 2, 4), "float32")
    gamma, beta = _affine(4)
    call = _run(lambda x: kernels.normalize_with(x, mean, variance, gamma, beta, axes=[1], epsilon=1e-3), mode)
    want = Reference(np.asarray(x, "float64"), 1, gamma, beta).inference(mean, variance)
    assert_close(call(x), want, dtype, scale=4 * np.abs(want).max())


@pytest.mark.parametrize("shape", [(16, 3, 5, 5), (None, 3, None, None)], ids=str)
@pytest.mark.parametrize(("dtype", "value"), [("float32", 1e30), ("float16", 6e4), ("bfloat16", 2.0**100)])
@pytest.mark.parametrize("mode", MODES)
def test_inference_of_one_constant_channel_among_large_planes_is_beta(mode, dtype, value, shape, monkeypatch):
    monkeypatch.setattr(_batch_kernels, "_SMALL", 0)
    x = np.random.default_rng(0).normal(size=(16, 3, 5, 5))
    x[:, 1] = value
    x = tf.cast(x, dtype)
    mean, variance = tf.cast(x[0, :, 0, 0], "float32"), tf.constant([1.0, 0.0, 1.0])
    gamma, beta = _affine(3)

    def infer(x):
        return kernels.normalize_with(x, mean, variance, gamma, beta, axes=[1], epsilon=1e-3)

    if mode != "eager":
        infer = tf.function(infer, [tf.TensorSpec(shape, dtype)], jit_compile=mode == "jit_compile", autograph=False)
    with np.errstate(over="raise"):
        y = infer(x)
    np.testing.assert_array_equal(y[:, 1], tf.fill([16, 5, 5], tf.cast(beta[1], dtype)))
    want = Reference(np.asarray(x, "float64"), 1, gamma, beta).inference(mean, variance)
    assert_close(y, want, dtype, scale=2 * np.abs(want).max())


@pytest.mark.parametrize("offset", [0.0, 30.0])
@pytest.mark.parametrize("examples", [16, 64])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("mode", [*MODES, "compiled later"])
def test_inference_of_large_planes_has_the_gradients_of_its_formula(mode, dtype, examples, offset, monkeypatch):
    monkeypatch.setattr(_batch_kernels, "_SMALL", 0)
    rng = np.random.default_rng(0)
    x, dy = (tf.cast(rng.normal(size=(examples, 3, 5, 5)) + shift, dtype) for shift in (offset, 0))
    mean, variance = tf.fill([3], np.float32(offset)), tf.constant(rng.uniform(0.5, 2, 3), "float32")
    gamma, beta = _affine(3)
    probe = rng.normal(size=x.shape)

    def gradients(x, gamma, beta):
        with tf.GradientTape() as outer:
            outer.watch(gamma)
            with tf.GradientTape() as tape:
                tape.watch([x, gamma, beta])
                y = kernels.normalize_with(x, mean, variance, gamma, beta, axes=[1], epsilon=1e-3)
            first = tape.gradient(y, [x, gamma, beta], output_gradients=dy)
            probed = tf.reduce_sum(tf.cast(first[0], "float32") * tf.constant(probe, "float32"))
        return y, *first, outer.gradient(probed, gamma)

    call = _run(gradients, "graph" if mode == "compiled later" else mode)
    if mode == "compiled later":
        call.get_concrete_function(x, gamma, beta)
        call = tf.function(lambda *inputs, traced=call: traced(*inputs), jit_compile=True)
    inverse_std = 1 / np.sqrt(variance.numpy() + 1e-3)[:, None, None]
    weighted = np.asarray(dy, "float64") * inverse_std
    wants = (
        Reference(np.asarray(x, "float64"), 1, gamma, beta).inference(mean, variance),
        weighted * gamma.numpy()[:, None, None],
        (weighted * (np.asarray(x, "float64") - offset)).sum((0, 2, 3)),
        np.asarray(dy, "float64").sum((0, 2, 3)),
        (weighted * probe).sum((0, 2, 3)),
    )
    for got, want in zip(call(x, gamma, beta), wants, strict=True):
        assert_close(got, want, dtype, scale=2 * max(1.0, np.abs(want).max()))


@pytest.mark.parametrize(
    "shape", [(9, 5, 4, 70), (None, 5, 4, 3), (None, 5, None, 3), (9, 2, 3, 4, 5), (None, 70), (9, 6, 70)], ids=str
)
@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_large_inputs_of_every_layout_are_normalized_right(dtype, axis, shape, monkeypatch):
    monkeypatch.setattr(_batch_kernels, "_SMALL", 0)
    _assert_normalized_right(dtype, axis, shape)


def test_transposed_halves_keep_every_bit():
    bits = np.tile(np.arange(2**16, dtype="uint16"), 32).reshape(8, 512, 512)
    halves = tf.bitcast(tf.constant(bits), tf.float16)
    for call in (layouts.as_rows, tf.function(lambda x, axes: layouts.as_rows(x, axes)[0])):
        rows = call(halves, [1])
        rows = rows[0] if isinstance(rows, tuple) else rows
        np.testing.assert_array_equal(tf.bitcast(rows, tf.uint16), bits.transpose(0, 2, 1).reshape(-1, 512))


@pytest.mark.parametrize("axis", [1, -1])
def test_layout_of_a_gpu_is_normalized_right(axis, monkeypatch):
    monkeypatch.setattr(_batch_kernels, "_SMALL", 0)
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: [kind])
    _assert_normalized_right("float32", axis, (None, 5, 4, 3))


def _assert_normalized_right(dtype, axis, shape):
    rng = np.random.default_rng(0)
    x = tf.cast(rng.normal(1, 1, [9, *(size or 4 for size in shape[1:])]), dtype)
    channels = shape[axis]
    mean, variance = (
        tf.constant(rng.normal(1, 1, channels), "float32"),
        tf.constant(rng.uniform(0.5, 2, channels), "float32"),
    )
    gamma, beta = _affine(channels)
    axes = [axis % len(shape)]

    @tf.function(input_signature=[tf.TensorSpec(shape, dtype)], autograph=False)
    def run(x):
        dy = tf.cast(tf.reshape(tf.range(tf.size(x)) % 11, tf.shape(x)), dtype)
        with tf.GradientTape() as tape:
            tape.watch([x, gamma, beta])
            y, moments = _with_batch(x, gamma, beta, axes=axes)
        gradients = tape.gradient(y, [x, gamma, beta], output_gradients=dy)
        return kernels.normalize_with(x, mean, variance, gamma, beta, axes=axes, epsilon=1e-3), y, moments, gradients

    inferred, y, moments, gradients = run(x)
    oracle = Reference(np.asarray(x, "float64"), axis, gamma, beta)
    assert inferred.dtype == y.dtype == dtype
    assert_close(inferred, oracle.inference(mean, variance), dtype, scale=4)
    assert_close(y, oracle.y, dtype, scale=2)
    assert_close(moments.m2, oracle.channels(oracle.m2), "float32", scale=10)
    wants = oracle.gradients(np.arange(x.shape.num_elements()).reshape(x.shape) % 11)
    for got, want in zip(gradients, wants, strict=True):
        assert_close(got, want, dtype, scale=2 * max(1.0, np.abs(want).max()))


@pytest.mark.parametrize("offset", [0.0, 30.0, 1e4])
@pytest.mark.parametrize(("mode", "kernel"), WAYS)
def test_gradients_keep_their_digits_at_any_offset(mode, kernel, offset):
    rng = np.random.default_rng(0)
    x = tf.constant(rng.normal(size=(128, 6)) + offset, "float32")
    dy = tf.constant(rng.normal(size=x.shape), "float32")
    gamma, beta = _affine(6)

    def gradients(x, gamma, beta):
        with tf.GradientTape() as tape:
            tape.watch([x, gamma, beta])
            loss = tf.reduce_sum(_with_batch(x, gamma, beta, kernel=kernel)[0] * dy)
        return tape.gradient(loss, [x, gamma, beta])

    for got, want in zip(
        _run(gradients, mode)(x, gamma, beta), Reference(x, -1, gamma, beta).gradients(dy), strict=True
    ):
        np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())


@pytest.mark.parametrize("known", [True, False], ids=["known batch", "unknown batch"])
@pytest.mark.parametrize(
    "shape",
    [(3, 5), (127, 5), (131, 5), (280, 5), (8253, 5), (3, 5, 80), (3, 5, 8, 9), (16, 5, 40), (19, 5, 9), (33, 5, 70)],
    ids=str,
)
def test_xla_sums_in_parts_whatever_their_number(shape, known):
    rng = np.random.default_rng(0)
    x, dy = (tf.constant(rng.normal(size=shape), "float32") for _ in range(2))
    gamma, beta = _affine(5)
    spec = tf.TensorSpec([shape[0] if known else None, *shape[1:]])

    @tf.function(jit_compile=True, input_signature=[spec, spec])
    def run(x, dy):
        with tf.GradientTape() as tape:
            tape.watch([x, gamma, beta])
            y, moments = _with_batch(x, gamma, beta, axes=[1])
        return y, moments, tape.gradient(y, [x, gamma, beta], output_gradients=dy)

    y, moments, gradients = run(x, dy)
    oracle = Reference(x, 1, gamma, beta)
    assert_close(y, oracle.y, "float32")
    assert_close(moments.m2, oracle.channels(oracle.m2), "float32", scale=10)
    for got, want in zip(gradients, oracle.gradients(dy), strict=True):
        assert_close(got, want, "float32", scale=10)


@pytest.mark.parametrize("batch", [64, 200, 4096])
def test_xla_sums_batches_that_grow_as_it_sums_known_ones(batch):
    x = tf.random.stateless_normal([batch, 64], seed=[1, 2])

    def moments(x):
        return _with_batch(x, axes=[1])[1]

    grown = tf.function(moments, [tf.TensorSpec([None, 64])], jit_compile=True)
    known = tf.function(moments, [tf.TensorSpec([batch, 64])], jit_compile=True)
    for got, want in zip(grown(x), known(x), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("away", [0.0, 2.9, 3.1, 300.0])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("axis", [1, -1])
def test_xla_keeps_its_digits_however_far_the_shift_is_from_the_mean(axis, dtype, away):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1000, 30, 6) if axis == -1 else (1000, 6, 30)) + 3
    # What the shift is taken from: the first, the middle and the last value of a channel, in either layout.
    for example in (0, 500, 999):
        x[example] = 3 + away
    x, dy = tf.cast(x, dtype), tf.cast(rng.normal(size=x.shape), dtype)
    gamma, beta = _affine(6)

    @tf.function(jit_compile=True, autograph=False)
    def run(x, dy):
        with tf.GradientTape() as tape:
            tape.watch([x, gamma, beta])
            y, moments = _with_batch(x, gamma, beta, axes=[axis % 3])
        return y, moments, tape.gradient(y, [x, gamma, beta], output_gradients=dy)

    y, moments, gradients = run(x, dy)
    oracle = Reference(np.asarray(x, "float64"), axis, gamma, beta)
    np.testing.assert_allclose(moments.m2, oracle.channels(oracle.m2), rtol=1e-5)
    assert_close(y, oracle.y, dtype, scale=4 * np.abs(oracle.y).max())
    for got, want in zip(gradients, oracle.gradients(np.asarray(dy, "float64")), strict=True):
        assert_close(got, want, dtype, scale=4 * max(1.0, np.abs(want).max()))


@pytest.mark.parametrize("value", [0.0, 0.1, -7.3, 1e6, 3e-20])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("mode", MODES)
def test_constant_input_gives_beta_exactly(mode, dtype, value):
    x = tf.cast(tf.fill([37, 3, 4], np.float64(min(value, 6e4) if dtype == "float16" else value)), dtype)
    gamma, beta = _affine(4, kernels.statistics_dtype(x.dtype))
    y, moments = _run(lambda x: _with_batch(x, gamma, beta), mode)(x)
    np.testing.assert_array_equal(y, tf.broadcast_to(tf.cast(beta, dtype), x.shape))
    np.testing.assert_array_equal(moments.m2, np.zeros(4))


@pytest.mark.parametrize(("mode", "kernel"), WAYS)
def test_one_outlier_among_equal_values_is_normalized_right(kernel, mode):
    x = np.full((1001, 2), 1e6, "float32")
    x[0] = 1e6 + 7
    x[500, 1] = -3e5
    y, moments = _run(lambda x: _with_batch(x, kernel=kernel), mode)(tf.constant(x))
    oracle = Reference(x, -1)
    assert np.abs(y - oracle.y).max() < 1e-4 * np.abs(oracle.y).max()
    np.testing.assert_allclose(moments.m2, oracle.m2[0], rtol=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_variance_is_never_negative(mode):
    rng = np.random.default_rng(2)
    for scale in (1e-8, 1e-3, 1.0):
        x = tf.constant(1e5 + scale * rng.normal(size=(50, 16)), "float32")
        assert np.all(_run(_with_batch, mode)(x)[1].m2 >= 0)


@pytest.mark.parametrize("mode", MODES)
def test_half_precision_survives_values_whose_squares_and_sums_overflow(mode):
    rng = np.random.default_rng(0)
    x = tf.cast(rng.uniform(-60000, 60000, (256, 4)), tf.float16)
    y, moments = _run(_with_batch, mode)(x)
    assert y.dtype == tf.float16
    assert moments.m2.dtype == tf.float32
    assert_close(y, Reference(tf.cast(x, tf.float64), -1).y, "float16")
    y, _ = _run(_with_batch, mode)(tf.concat([tf.fill([255, 1], np.float16(60000)), [[np.float16(-60000)]]], 0))
    assert np.all(np.isfinite(y))


@pytest.mark.parametrize("axes", [[1], [0, 1]], ids=str)
@pytest.mark.parametrize("dtype", ["float64"])
@pytest.mark.parametrize("mode", MODES)
def test_first_and_second_derivatives_equal_finite_differences(mode, dtype, axes):
    rng = np.random.default_rng(4)
    shape = (3, 2, 2) if len(axes) == 1 else (2, 1, 4)
    channels = int(np.prod([shape[axis] for axis in axes]))
    x, w = tf.constant(rng.normal(size=shape), dtype), tf.constant(rng.normal(size=shape), dtype)
    gamma, beta = _affine(channels, dtype)

    def value(x, gamma, beta):
        y, _ = kernels.normalize_with_batch(x, gamma, beta, axes=axes, epsilon=1e-3)
        return tf.reduce_sum(w * y**3)

    def gradient(position, *arguments):
        with tf.GradientTape() as tape:
            tape.watch(arguments[position])
            result = value(*arguments)
        return tape.gradient(result, arguments[position])

    for function in (value, *(functools.partial(gradient, position) for position in range(3))):
        analytic, numeric = tf.test.compute_gradient(_run(function, mode), [x, gamma, beta], delta=1e-5)
        for got, want in zip(analytic, numeric, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * max(1.0, np.abs(want).max()))


@pytest.mark.parametrize("offset", [0.0, 100.0])
@pytest.mark.parametrize("mode", MODES)
def test_second_derivatives_of_the_float32_kernels_equal_those_in_float64(mode, offset):
    rng = np.random.default_rng(4)
    x, w = rng.normal(size=(32, 3)) + offset, rng.normal(size=(32, 3))
    gamma, beta = _affine(3)

    def second(x, w, gamma, beta):
        with tf.GradientTape() as outer:
            outer.watch([x, gamma, beta])
            with tf.GradientTape() as inner:
                inner.watch([x, gamma, beta])
                result = tf.reduce_sum(w * _with_batch(x, gamma, beta)[0] ** 3)
            norm = tf.add_n([tf.reduce_sum(d**2) for d in inner.gradient(result, [x, gamma, beta])])
        return outer.gradient(norm, [x, gamma, beta])

    single = [tf.constant(value, "float32") for value in (x, w, gamma, beta)]
    want = second(*(tf.cast(value, tf.float64) for value in single))
    for got, exact in zip(_run(second, mode)(*single), want, strict=True):
        np.testing.assert_allclose(got, exact, atol=2e-4 * np.abs(exact).max())


@pytest.mark.parametrize(("mode", "kernel"), WAYS)
def test_rectified_output_and_gradients_equal_a_rectifier_applied_after(mode, kernel):
    rng = np.random.default_rng(8)
    x, dy = (tf.constant(rng.normal(size=(64, 5)), "float32") for _ in range(2))
    gamma, beta = _affine(5)

    def step(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y, _ = _with_batch(x, gamma, beta, activation=keras.activations.relu, kernel=kernel)
            loss = tf.reduce_sum(y * dy)
        return y, tape.gradient(loss, x)

    y, dx = _run(step, mode)(x)
    oracle = Reference(x, -1, gamma, beta)
    np.testing.assert_allclose(y, np.maximum(oracle.y, 0), atol=1e-5)
    np.testing.assert_allclose(dx, oracle.gradients(dy * (oracle.y > 0))[0], atol=1e-4)


def test_fused_kernel_refuses_float64():
    with pytest.raises(ValueError, match=r"`kernel` must be 'auto', 'xla' or 'stable' for float64 inputs.*'fused'"):
        _with_batch(tf.zeros([4, 2], tf.float64), kernel="fused")


def test_fused_kernel_is_what_a_graph_holds_and_nothing_is_compiled():
    graph = tf.function(_with_batch).get_concrete_function(tf.TensorSpec([None, 56, 56, 64])).graph
    assert "FusedBatchNormV3" in {operation.type for operation in graph.get_operations()}
    # More than one value for each channel, whatever the batch: nobody has to be warned.
    printing = {node.op for function in graph.as_graph_def().library.function for node in function.node_def}
    assert "Print" not in printing


def test_xla_kernel_is_compiled_within_a_graph_that_is_not():
    traced = tf.function(lambda x: _with_batch(x, kernel="xla")).get_concrete_function(tf.TensorSpec([None, 8]))
    library = traced.graph.as_graph_def().library.function
    assert any(function.attr["_XlaMustCompile"].b for function in library)


def test_normalization_after_a_convolution_of_the_other_layout_is_right_in_a_graph():
    rng = np.random.default_rng(0)
    x = tf.constant(rng.normal(size=(2, 6, 6, 3)), "float32")
    filters = tf.constant(rng.normal(size=(1, 1, 3, 6)), "float32")
    mean, variance = (tf.constant(rng.uniform(1, 2, 6), "float32") for _ in range(2))

    @tf.function
    def network(x):
        convolved = tf.nn.conv2d(x, filters, 1, "VALID")
        return kernels.normalize_with(convolved, mean, variance, axes=[1], epsilon=1e-3)

    want = Reference(tf.nn.conv2d(x, filters, 1, "VALID"), 1).inference(mean, variance)
    np.testing.assert_allclose(network(x), want, atol=1e-4)
