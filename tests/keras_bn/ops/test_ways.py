"""The numbers of every way to normalize: far from zero, constant, huge, missing, and their derivatives."""

import functools

import numpy as np
import pytest
import tensorflow as tf

import keras_bn
from keras_bn import ops
from keras_bn.ops import where
from keras_bn.statistics import statistics_dtype
from tests.reference import Reference, assert_close

MODES = ("eager", "graph", "jit_compile")
KERNELS = ("native", "fused", "plain") if keras_bn.compiled() else ("fused", "plain")
WAYS = [(mode, kernel) for mode in ("eager", "graph") for kernel in KERNELS] + [("jit_compile", "plain")]


def _run(function, mode):
    return function if mode == "eager" else tf.function(function, jit_compile=mode == "jit_compile", autograph=False)


def _normalized(x, gamma=None, beta=None, **options):
    y, moments, _ = ops.normalize_batch(x, gamma, beta, epsilon=1e-3, **{"axes": [len(x.shape) - 1], **options})
    return y, moments


def _affine(channels, dtype="float32", seed=5):
    rng = np.random.default_rng(seed)
    return tf.constant(rng.normal(1, 0.3, channels), dtype), tf.constant(rng.normal(size=channels), dtype)


@pytest.mark.parametrize("offset", [0.0, 3.0, 30.0, 1e4, 1e6])
@pytest.mark.parametrize(("mode", "kernel"), WAYS)
def test_output_keeps_its_digits_at_any_offset(mode, kernel, offset):
    rng = np.random.default_rng(0)
    x = tf.constant(rng.normal(size=(64, 14, 14, 8)) + offset, "float32")
    gamma, beta = _affine(8)
    y, moments = _run(lambda x: _normalized(x, gamma, beta, kernel=kernel), mode)(x)
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
def test_weights_and_groups_keep_their_digits_at_any_offset(options, mode):
    x = tf.constant(np.random.default_rng(0).normal(size=(32, 6)) + 1e6, "float32")
    y, _ = _run(lambda x: _normalized(x, **options), mode)(x)
    size = options.get("group_size", 32)
    want = np.concatenate([Reference(x[start : start + size], -1).y for start in range(0, 32, size)])
    assert np.abs(y - want).max() < 1e-4


@pytest.mark.parametrize("offset", [0.0, 1e4, 1e6])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("shape", "axis"), [((16, 5, 5, 4), 3), ((16, 4, 5, 5), 1), ((64, 64, 64, 4), 3)], ids=str)
def test_inference_keeps_its_digits_at_any_offset(shape, axis, mode, offset):
    rng = np.random.default_rng(0)
    x = tf.constant(rng.normal(size=shape) + offset, "float32")
    mean, variance = tf.fill([4], np.float32(offset)), tf.constant(rng.uniform(0.5, 2, 4), "float32")
    gamma, beta = _affine(4)
    call = _run(lambda x: ops.normalize(x, mean, variance, gamma, beta, axes=[axis], epsilon=1e-3), mode)
    assert np.abs(call(x) - Reference(x, axis, gamma, beta).inference(mean, variance)).max() < 1e-4


@pytest.mark.parametrize(("dtype", "value"), [("float32", 1e30), ("float16", 6e4), ("bfloat16", 2.0**100)])
@pytest.mark.parametrize("mode", MODES)
def test_inference_of_one_constant_channel_is_beta(mode, dtype, value):
    x = np.random.default_rng(0).normal(size=(16, 3, 5, 5))
    x[:, 1] = value
    x = tf.cast(x, dtype)
    mean, variance = tf.cast(x[0, :, 0, 0], "float32"), tf.constant([1.0, 0.0, 1.0])
    gamma, beta = _affine(3)
    y = _run(lambda x: ops.normalize(x, mean, variance, gamma, beta, axes=[1], epsilon=1e-3), mode)(x)
    np.testing.assert_array_equal(y[:, 1], tf.fill([16, 5, 5], tf.cast(beta[1], dtype)))


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "neither scale nor center"])
@pytest.mark.parametrize(("shape", "axis"), [((16, 5, 5, 4), 3), ((None, 4, None, 5), 1)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("mode", [*MODES, "compiled later"])
def test_inference_and_its_derivatives_equal_those_in_float64(mode, dtype, shape, axis, affine):
    rng = np.random.default_rng(0)
    x, dy = (tf.cast(rng.normal(size=[size or 5 for size in (16, *shape[1:])]) + shift, dtype) for shift in (30, 0))
    mean, variance = rng.normal(30, 1, 4), rng.uniform(0.5, 2, 4)
    affine = [rng.normal(1, 0.3, 4), rng.normal(size=4)] if affine else []

    def derivatives(x, dy, mean, variance, *affine):
        inputs = [x, mean, variance, *affine]
        with tf.GradientTape() as outer:
            outer.watch(inputs)
            with tf.GradientTape() as inner:
                inner.watch(inputs)
                y = ops.normalize(x, mean, variance, *affine, axes=[axis], epsilon=1e-3)
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


@pytest.mark.parametrize(
    "shape", [(9, 5, 4, 70), (None, 5, 4, 3), (None, 5, None, 3), (9, 2, 3, 4, 5), (None, 70), (9, 6, 70)], ids=str
)
@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_layout_is_normalized_right(kernel, dtype, axis, shape):
    _assert_normalized_right(kernel, dtype, axis, shape)


@pytest.mark.parametrize("shape", [(None, 5, 4, 3), (9, 3), (None, 3, 4, 2, 5)], ids=str)
@pytest.mark.parametrize("axis", [1, -1])
def test_layout_of_a_gpu_is_normalized_right(axis, shape, monkeypatch):
    monkeypatch.setattr(where, "on_cpu", lambda: False)
    _assert_normalized_right("auto", "float32", axis, shape)


def _assert_normalized_right(kernel, dtype, axis, shape):
    rng = np.random.default_rng(0)
    x = tf.cast(rng.normal(1, 1, [9, *(size or 4 for size in shape[1:])]), dtype)
    channels = shape[axis]
    gamma, beta = _affine(channels)
    axes = [axis % len(shape)]

    @tf.function(input_signature=[tf.TensorSpec(shape, dtype)], autograph=False)
    def run(x):
        dy = tf.cast(tf.reshape(tf.range(tf.size(x)) % 11, tf.shape(x)), dtype)
        with tf.GradientTape() as tape:
            tape.watch([x, gamma, beta])
            y, moments = _normalized(x, gamma, beta, axes=axes, kernel=kernel)
        gradients = tape.gradient(y, [x, gamma, beta], output_gradients=dy)
        return y, moments, gradients

    y, moments, gradients = run(x)
    oracle = Reference(np.asarray(x, "float64"), axis, gamma, beta)
    assert y.dtype == dtype
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
            loss = tf.reduce_sum(_normalized(x, gamma, beta, kernel=kernel)[0] * dy)
        return tape.gradient(loss, [x, gamma, beta])

    for got, want in zip(
        _run(gradients, mode)(x, gamma, beta), Reference(x, -1, gamma, beta).gradients(dy), strict=True
    ):
        np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())


@pytest.mark.parametrize("away", [0.0, 300.0])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize(("mode", "kernel"), [way for way in WAYS if way[1] != "fused"])
def test_digits_are_kept_however_far_a_shift_may_be_from_the_mean(mode, kernel, axis, dtype, away):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1000, 30, 6) if axis == -1 else (1000, 6, 30)) + 3
    # Where a shift may be taken from: the first, the middle and the last value of a channel, in either layout.
    for example in (0, 500, 999):
        x[example] = 3 + away
    x, dy = tf.cast(x, dtype), tf.cast(rng.normal(size=x.shape), dtype)
    gamma, beta = _affine(6)

    def run(x, dy):
        with tf.GradientTape() as tape:
            tape.watch([x, gamma, beta])
            y, moments = _normalized(x, gamma, beta, axes=[axis % 3], kernel=kernel)
        return y, moments, tape.gradient(y, [x, gamma, beta], output_gradients=dy)

    y, moments, gradients = _run(run, mode)(x, dy)
    oracle = Reference(np.asarray(x, "float64"), axis, gamma, beta)
    np.testing.assert_allclose(moments.m2, oracle.channels(oracle.m2), rtol=1e-5 if kernel == "native" else 1e-4)
    assert_close(y, oracle.y, dtype, scale=4 * np.abs(oracle.y).max())
    for got, want in zip(gradients, oracle.gradients(np.asarray(dy, "float64")), strict=True):
        assert_close(got, want, dtype, scale=4 * max(1.0, np.abs(want).max()))


@pytest.mark.parametrize("value", [0.0, 0.1, -7.3, 1e6, 3e-20])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(("mode", "kernel"), WAYS)
def test_constant_input_gives_beta_exactly(mode, kernel, dtype, value):
    x = tf.cast(tf.fill([37, 3, 4], np.float64(min(value, 6e4) if dtype == "float16" else value)), dtype)
    gamma, beta = _affine(4, statistics_dtype(x.dtype))
    y, moments = _run(lambda x: _normalized(x, gamma, beta, kernel=kernel), mode)(x)
    np.testing.assert_array_equal(y, tf.broadcast_to(tf.cast(beta, dtype), x.shape))
    np.testing.assert_array_equal(moments.m2, np.zeros(4))


@pytest.mark.parametrize("known", [True, False], ids=["known batch", "unknown batch"])
@pytest.mark.parametrize("count", [1, 0])
@pytest.mark.parametrize(("mode", "kernel"), WAYS)
def test_one_value_gives_beta_and_none_gives_nothing_and_neither_has_a_gradient(mode, kernel, count, known):
    gamma, beta = _affine(4)

    def run(x):
        with tf.GradientTape() as tape:
            tape.watch([x, gamma])
            y, moments = _normalized(x, gamma, beta, kernel=kernel)
        return y, moments.count, moments.mean, moments.m2, *tape.gradient(y, [x, gamma])

    if mode != "eager":
        spec = tf.TensorSpec([count if known else None, 4])
        run = tf.function(run, input_signature=[spec], jit_compile=mode == "jit_compile", autograph=False)
    y, number, mean, m2, dx, dgamma = run(tf.fill([count, 4], 3.0))
    np.testing.assert_array_equal(y, np.tile(beta, (count, 1)))
    assert number == count
    np.testing.assert_array_equal(mean, np.full(4, 3.0 * count))
    for zeros in (m2, dx, dgamma):
        np.testing.assert_array_equal(zeros, np.zeros_like(zeros))


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("mode", "kernel"), WAYS)
def test_what_is_not_finite_spoils_its_channel_and_no_other(mode, kernel, poison):
    x = np.random.default_rng(0).normal(size=(16, 4)).astype("float32")
    clean = Reference(x, -1).y
    for row in (0, 3):
        x[row, 2] = poison
    y, moments = _run(lambda x: _normalized(x, kernel=kernel), mode)(tf.constant(x))
    assert_close(np.delete(y, 2, 1), np.delete(clean, 2, 1), "float32")
    np.testing.assert_array_equal(np.isfinite(moments.m2), [True, True, False, True])


@pytest.mark.parametrize(("mode", "kernel"), WAYS)
def test_one_outlier_among_equal_values_is_normalized_right(kernel, mode):
    x = np.full((1001, 2), 1e6, "float32")
    x[0] = 1e6 + 7
    x[500, 1] = -3e5
    y, moments = _run(lambda x: _normalized(x, kernel=kernel), mode)(tf.constant(x))
    oracle = Reference(x, -1)
    assert np.abs(y - oracle.y).max() < 1e-4 * np.abs(oracle.y).max()
    np.testing.assert_allclose(moments.m2, oracle.m2[0], rtol=1e-4)


@pytest.mark.parametrize(("mode", "kernel"), WAYS)
def test_variance_is_never_negative(mode, kernel):
    rng = np.random.default_rng(2)
    for scale in (1e-8, 1e-3, 1.0):
        x = tf.constant(1e5 + scale * rng.normal(size=(50, 16)), "float32")
        assert np.all(_run(functools.partial(_normalized, kernel=kernel), mode)(x)[1].m2 >= 0)


@pytest.mark.parametrize(("mode", "kernel"), WAYS)
def test_half_precision_survives_values_whose_squares_and_sums_overflow(mode, kernel):
    rng = np.random.default_rng(0)
    x = tf.cast(rng.uniform(-60000, 60000, (256, 4)), tf.float16)
    y, moments = _run(functools.partial(_normalized, kernel=kernel), mode)(x)
    assert y.dtype == tf.float16
    assert moments.m2.dtype == tf.float32
    assert_close(y, Reference(tf.cast(x, tf.float64), -1).y, "float16")
    y, _ = _run(functools.partial(_normalized, kernel=kernel), mode)(
        tf.concat([tf.fill([255, 1], np.float16(60000)), [[np.float16(-60000)]]], 0)
    )
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
        y, _ = _normalized(x, gamma, beta, axes=axes)
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
@pytest.mark.parametrize(("mode", "kernel"), WAYS)
def test_second_derivatives_in_float32_equal_those_in_float64(mode, kernel, offset):
    rng = np.random.default_rng(4)
    x, w = rng.normal(size=(32, 3)) + offset, rng.normal(size=(32, 3))
    gamma, beta = _affine(3)

    def second(kernel, x, w, gamma, beta):
        with tf.GradientTape() as outer:
            outer.watch([x, gamma, beta])
            with tf.GradientTape() as inner:
                inner.watch([x, gamma, beta])
                result = tf.reduce_sum(w * _normalized(x, gamma, beta, kernel=kernel)[0] ** 3)
            norm = tf.add_n([tf.reduce_sum(d**2) for d in inner.gradient(result, [x, gamma, beta])])
        return outer.gradient(norm, [x, gamma, beta])

    single = [tf.constant(value, "float32") for value in (x, w, gamma, beta)]
    want = second("plain", *(tf.cast(value, tf.float64) for value in single))
    for got, exact in zip(_run(functools.partial(second, kernel), mode)(*single), want, strict=True):
        np.testing.assert_allclose(got, exact, atol=2e-4 * np.abs(exact).max())


def test_kernels_refuse_float64_that_do_not_take_it():
    for kernel in ("native", "fused"):
        with pytest.raises(ValueError, match=rf"`kernel` must be 'auto' or 'plain' for float64 inputs.*'{kernel}'"):
            _normalized(tf.zeros([4, 2], tf.float64), kernel=kernel)


def test_normalization_after_a_convolution_of_the_other_layout_is_right_in_a_graph():
    rng = np.random.default_rng(0)
    x = tf.constant(rng.normal(size=(2, 6, 6, 3)), "float32")
    filters = tf.constant(rng.normal(size=(1, 1, 3, 6)), "float32")
    mean, variance = (tf.constant(rng.uniform(1, 2, 6), "float32") for _ in range(2))

    @tf.function
    def network(x):
        convolved = tf.nn.conv2d(x, filters, 1, "VALID")
        return ops.normalize(convolved, mean, variance, axes=[1], epsilon=1e-3)

    want = Reference(tf.nn.conv2d(x, filters, 1, "VALID"), 1).inference(mean, variance)
    np.testing.assert_allclose(network(x), want, atol=1e-4)
