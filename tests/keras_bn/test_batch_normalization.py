"""What each argument of the layer does, compared with the oracle."""

import inspect
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_bn
from tests.reference import Reference

MODES = ("eager", "graph", "jit_compile")


def _x(shape=(16, 4), seed=0, mean=1.0, deviation=2.0):
    return np.random.default_rng(seed).normal(mean, deviation, shape).astype("float32")


def _call(layer, mode, signature=None, **arguments):
    """The layer in training, run in `mode`."""

    def step(x):
        return layer(x, training=True, **arguments)

    if mode == "eager":
        return step
    return tf.function(step, jit_compile=mode == "jit_compile", autograph=False, input_signature=signature)


def _close(got, want, tolerance=1e-5):
    np.testing.assert_allclose(np.asarray(got), np.asarray(want), rtol=tolerance, atol=tolerance)


def _state(layer):
    return {weight.name: weight.numpy() for weight in layer.non_trainable_variables}


# Modes


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mode", ["graph", "jit_compile"])
def test_training_may_be_a_tensor(mode, training):
    layer, x = keras_bn.BatchNormalization(momentum=0.5), _x()
    layer.build(x.shape)
    call = tf.function(lambda x, flag: layer(x, training=flag), jit_compile=mode == "jit_compile", autograph=False)
    y = call(x, tf.constant(training))
    oracle = Reference(x, -1)
    _close(y, oracle.y if training else oracle.inference(np.zeros(4), np.ones(4)))
    _close(layer.moving_mean, 0.5 * oracle.batch_mean if training else np.zeros(4))


@pytest.mark.parametrize("mode", MODES)
def test_layer_that_is_not_trainable_normalizes_with_the_moving_statistics(mode):
    layer, x = keras_bn.BatchNormalization(), _x()
    layer.build(x.shape)
    layer.trainable = False
    _close(_call(layer, mode)(x), Reference(x, -1).inference(np.zeros(4), np.ones(4)))
    _close(layer.moving_mean, np.zeros(4))


# Averages


_SLOW = keras.optimizers.schedules.PolynomialDecay(0.9, 100, 0.999)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
@pytest.mark.parametrize(
    "options",
    [
        {"momentum": 0.999, "zero_debias": True},
        {"momentum": _SLOW, "zero_debias": True},
        {"momentum": _SLOW},
        {"momentum": None},
        {"momentum": 0.9, "renorm": True, "renorm_clipping": "warmup"},
    ],
    ids=["debiased", "debiased schedule", "schedule", "cumulative", "renorm"],
)
def test_averages_over_many_updates_are_those_of_float32_whatever_the_precision(options, dtype):
    layer, in_float32 = (keras_bn.BatchNormalization(dtype=one, **options) for one in (dtype, "float32"))
    batches = np.stack([_x((32, 2), seed=seed, mean=seed % 7) for seed in range(100)])
    for one in (layer, in_float32):
        one.build((32, 2))

    @tf.function(autograph=False)
    def step(x):
        return [one(tf.cast(x, one.compute_dtype), training=True) for one in (layer, in_float32)]

    for x in batches:
        step(x)
    tolerance = {"bfloat16": 2e-2, "float16": 4e-3, "float64": 1e-5}[dtype]
    for mine, theirs in zip(layer.non_trainable_weights, in_float32.non_trainable_weights, strict=True):
        _close(mine.numpy().astype("float64"), theirs, tolerance)


def test_momentum_none_averages_all_batches_alike():
    layer = keras_bn.BatchNormalization(momentum=None)
    batches = [_x(seed=seed) for seed in range(5)]
    for batch in batches:
        layer(batch, training=True)
    _close(layer.moving_mean, np.mean([Reference(x, -1).batch_mean for x in batches], 0))
    _close(layer.moving_variance, np.mean([Reference(x, -1).biased_variance for x in batches], 0))
    assert [weight.name for weight in layer.non_trainable_weights] == ["moving_mean", "moving_variance", "update_count"]


@pytest.mark.parametrize("mode", MODES)
def test_momentum_may_follow_a_schedule_over_the_updates(mode):
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([1, 3], [0.5, 0.8, 0.9])
    layer = keras_bn.BatchNormalization(momentum=schedule)
    layer.build((16, 4))
    call, mean = _call(layer, mode), np.zeros(4)
    for step in range(6):
        x = _x(seed=step)
        call(x)
        momentum = (0.5, 0.5, 0.8, 0.8, 0.9, 0.9)[step]
        mean = momentum * mean + (1 - momentum) * Reference(x, -1).batch_mean
    _close(layer.moving_mean, mean)


@pytest.mark.parametrize("mode", MODES)
def test_zero_debias_leaves_the_initial_values_out_of_the_average(mode):
    momentum, steps = 0.9, 7
    layer = keras_bn.BatchNormalization(
        momentum=momentum, zero_debias=True, moving_mean_initializer="ones", moving_variance_initializer="zeros"
    )
    layer.build((16, 4))
    call = _call(layer, mode)
    oracles = [Reference(_x(seed=seed), -1) for seed in range(steps)]
    for oracle in oracles:
        call(oracle.x.astype("float32"))
    weights = np.array([(1 - momentum) * momentum ** (steps - 1 - step) for step in range(steps)])
    weights /= 1 - momentum**steps
    _close(layer.moving_mean, np.tensordot(weights, [oracle.batch_mean for oracle in oracles], 1))
    _close(layer.moving_variance, np.tensordot(weights, [oracle.biased_variance for oracle in oracles], 1))


@pytest.mark.parametrize("kernel", ["auto", "plain"])
def test_unbiased_variance_averages_the_variance_with_one_value_less(kernel):
    layer, x = keras_bn.BatchNormalization(momentum=0.0, unbiased_variance=True, kernel=kernel), _x((5, 3))
    _close(layer(x, training=True), Reference(x, -1).y)
    _close(layer.moving_variance, Reference(x, -1).unbiased_variance)


def test_batches_of_two_give_half_the_variance_unless_it_is_unbiased():
    # Keras pull request 9028: a population of variance 1 in batches of two ends at 0.4708 biased, 0.9978 unbiased.
    rng = np.random.default_rng(9028)
    biased = keras_bn.BatchNormalization(momentum=0.99)
    unbiased = keras_bn.BatchNormalization(momentum=0.99, unbiased_variance=True)
    biased.build((2, 256))
    unbiased.build((2, 256))
    both = tf.function(lambda x: (biased(x, training=True), unbiased(x, training=True)), autograph=False)
    for _ in range(1000):
        both(rng.normal(size=(2, 256)).astype("float32"))
    assert np.mean(biased.moving_variance) == pytest.approx(0.5, abs=0.03)
    assert np.mean(unbiased.moving_variance) == pytest.approx(1.0, abs=0.06)


@pytest.mark.parametrize(("initial", "plain"), [(1.0, 2.94), (9.0, 5.79)])
def test_a_hundred_steps_reach_the_population_variance_only_without_the_initial_bias(initial, plain):
    # Keras pull request 9003: variance 4, momentum 0.99, 100 steps. From 1 it got 2.94 without and 3.89 with the
    # correction, from 9 it got 5.79 and 4.08, of one random column each; their expectations are 2.90, 5.83 and 4.
    rng = np.random.default_rng(9003)
    options = {"momentum": 0.99, "moving_variance_initializer": keras.initializers.Constant(initial)}
    biased = keras_bn.BatchNormalization(**options)
    debiased = keras_bn.BatchNormalization(zero_debias=True, **options)
    for _ in range(100):
        x = rng.normal(0, 2, (1000, 16)).astype("float32")
        biased(x, training=True)
        debiased(x, training=True)
    assert np.mean(biased.moving_variance) == pytest.approx(4 + (initial - 4) * 0.99**100, abs=0.02)
    assert np.mean(biased.moving_variance) == pytest.approx(plain, abs=0.06)
    assert np.mean(debiased.moving_variance) == pytest.approx(4.0, abs=0.02)


@pytest.mark.parametrize("options", [{"momentum": 0.0}, {"momentum": None}, {"zero_debias": True}], ids=str)
@pytest.mark.parametrize("kernel", ["auto", "plain"])
@pytest.mark.parametrize("mode", MODES)
def test_first_batch_alone_is_averaged_to_the_last_digit_wherever_the_average_was(mode, kernel, options):
    layer = keras_bn.BatchNormalization(
        moving_mean_initializer=keras.initializers.Constant(1e6), kernel=kernel, **options
    )
    layer.build((16, 4))
    x = _x(mean=1e-4, deviation=1e-4)
    _call(layer, mode)(x)
    oracle = Reference(x, -1)
    np.testing.assert_allclose(layer.moving_mean, oracle.batch_mean, rtol=1e-5)
    np.testing.assert_allclose(layer.moving_variance, oracle.biased_variance, rtol=1e-5)


# Groups


@pytest.mark.parametrize(
    ("mode", "axis", "batch"),
    [("eager", axis, batch) for axis in (-1, 1) for batch in (12, 10, 3, 4, 1)]
    + [(mode, -1, batch) for mode in ("graph", "jit_compile") for batch in (10, 3)],
)
def test_groups_are_normalized_by_themselves_and_averaged_by_size(mode, axis, batch):
    x = _x((batch, 3, 5))
    layer = keras_bn.BatchNormalization(axis=axis, momentum=0.0, virtual_batch_size=4)
    layer.build((None, 3, 5))
    y = _call(layer, mode, signature=[tf.TensorSpec([None, 3, 5])])(x)
    groups = [Reference(x[start : start + 4], axis) for start in range(0, batch, 4)]
    _close(y, np.concatenate([group.y for group in groups]))
    sizes = [len(group.x) for group in groups]
    _close(layer.moving_mean, np.average([group.batch_mean for group in groups], 0, sizes))
    _close(layer.moving_variance, np.average([group.biased_variance for group in groups], 0, sizes))


@pytest.mark.parametrize("batch", [8, 10, 3, 0])
@pytest.mark.parametrize("options", [{"virtual_batch_size": 4}, {}], ids=["groups", "whole batch"])
@pytest.mark.parametrize("mode", MODES)
def test_gradients_of_groups_and_of_empty_batches_equal_the_oracle(mode, options, batch):
    x, dy = _x((batch, 3, 2)), _x((batch, 3, 2), seed=1)
    layer = keras_bn.BatchNormalization(**options)
    layer.build((None, 3, 2))

    def step(x, dy):
        variables = [layer.gamma.value, layer.beta.value]
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = tf.reduce_sum(layer(x, training=True) * dy)
        return tape.gradient(loss, [x, *variables])

    if mode != "eager":
        signature = [tf.TensorSpec([None, 3, 2])] * 2
        step = tf.function(step, jit_compile=mode == "jit_compile", autograph=False, input_signature=signature)
    dx, dgamma, dbeta = step(tf.constant(x), tf.constant(dy))
    size = options.get("virtual_batch_size", max(batch, 1))
    wanted = [Reference(x[i : i + size], -1).gradients(dy[i : i + size]) for i in range(0, batch, size)]
    _close(dx, np.concatenate([np.zeros((0, 3, 2)), *(group[0] for group in wanted)]), 3e-5)
    _close(dgamma, np.sum([np.zeros(2), *(group[1] for group in wanted)], 0), 3e-5)
    _close(dbeta, np.sum([np.zeros(2), *(group[2] for group in wanted)], 0), 3e-5)


def test_groups_do_not_change_inference():
    x = _x((7, 4))
    plain, grouped = keras_bn.BatchNormalization(), keras_bn.BatchNormalization(virtual_batch_size=3)
    np.testing.assert_array_equal(plain(x), grouped(x))


def test_groups_respect_weights():
    x, weights = _x((6, 3)), np.array([1, 0, 2, 1, 1, 0.5], "float32")
    layer = keras_bn.BatchNormalization(virtual_batch_size=3, momentum=0.0)
    y = layer(x, training=True, mask=weights)
    groups = [Reference(x[i : i + 3], -1, weights=weights[i : i + 3, None]) for i in (0, 3)]
    _close(y, np.concatenate([group.y for group in groups]))
    _close(layer.moving_mean, np.average([group.batch_mean for group in groups], 0, [3, 2.5]))


# Renorm


def _renorm(x, state, limits, epsilon=1e-3):
    oracle = Reference(x, -1)
    stddev = np.sqrt(oracle.biased_variance + epsilon)
    scale = np.maximum(state["renorm_stddev"], epsilon**0.5)
    r = np.clip(stddev / scale, limits.get("rmin", 0), limits.get("rmax", np.inf))
    d = np.clip(
        (oracle.batch_mean - state["renorm_mean"]) / scale, -limits.get("dmax", np.inf), limits.get("dmax", np.inf)
    )
    return oracle, stddev, oracle.normalized * r + d


@pytest.mark.parametrize("limits", [{}, {"rmax": 1.5, "rmin": 0.8, "dmax": 0.3}], ids=["free", "clipped"])
@pytest.mark.parametrize("mode", MODES)
def test_renorm_corrects_towards_its_own_moving_statistics(mode, limits):
    layer = keras_bn.BatchNormalization(momentum=0.9, renorm=True, renorm_clipping=limits, renorm_momentum=0.7)
    layer.build((16, 4))
    layer.gamma.assign([1, 2, 3, 4.0])
    layer.beta.assign([0, 1, 0, -1.0])
    call = _call(layer, mode)
    for seed in range(4):
        before, x = _state(layer), _x(seed=seed)
        oracle, stddev, corrected = _renorm(x, before, limits)
        _close(call(x), corrected * layer.gamma.numpy() + layer.beta.numpy(), 3e-5)
        after = _state(layer)
        _close(after["renorm_mean"], 0.7 * before["renorm_mean"] + 0.3 * oracle.batch_mean)
        _close(after["renorm_stddev"], 0.7 * before["renorm_stddev"] + 0.3 * stddev)
        _close(after["moving_stddev"], 0.9 * before["moving_stddev"] + 0.1 * stddev)
        _close(after["moving_variance"], np.maximum(after["moving_stddev"] ** 2 - 1e-3, 0), 1e-5)


def test_renorm_warmup_is_plain_batch_norm_for_5000_updates_and_then_loosens():
    limits = keras_bn.updates.renorm_warmup()
    at = {
        step: {name: float(limit(step)) for name, limit in limits.items()}
        for step in (0, 5000, 15000, 25000, 40000, 99999)
    }
    assert at[0] == at[5000] == {"rmax": 1.0, "rmin": 1.0, "dmax": 0.0}
    assert at[15000]["dmax"] == pytest.approx(2.5)
    assert at[25000]["dmax"] == 5.0
    assert at[40000] == at[99999] == pytest.approx({"rmax": 3.0, "rmin": 1 / 3, "dmax": 5.0})


@pytest.mark.parametrize("mode", MODES)
def test_renorm_limits_follow_their_schedules_over_the_updates(mode):
    layer = keras_bn.BatchNormalization(renorm=True, renorm_clipping="warmup")
    layer.build((16, 4))
    call, x = _call(layer, mode), _x(deviation=9.0)
    _close(call(x), Reference(x, -1).y, 3e-5)
    assert np.all(layer.update_count.numpy() == 1)
    layer.update_count.assign(np.full(4, 1e6))
    before = _state(layer)
    _close(call(x), _renorm(x, before, {"rmax": 3.0, "rmin": 1 / 3, "dmax": 5.0})[2], 3e-5)


# Masks


_MASKS = {
    "examples": ((6, 5, 3), -1, (6, 1)),
    "examples and steps": ((6, 5, 3), -1, (6, 5)),
    "as Keras has it where it could lack the channels": ((6, 5, 5), 1, (6, 5)),
    "examples and rows of square pictures": ((5, 5, 5, 3), -1, (5, 5)),
    "with the channel axis": ((6, 5, 3), -1, (6, 5, 3)),
    "with one channel": ((6, 5, 3), -1, (6, 5, 1)),
    "channels first": ((6, 3, 5, 4), 1, (6, 5, 4)),
    "channels first, with the channel axis": ((6, 3, 5, 4), 1, (6, 1, 5, 4)),
    "two channel axes": ((6, 3, 5, 4), [1, 3], (6, 5)),
    "vector": ((6, 3), -1, (6,)),
}
_LACK_CHANNELS = ("channels first", "two channel axes")


@pytest.mark.parametrize(
    ("mode", "kind"), [("eager", "boolean"), ("eager", "weights"), ("graph", "weights"), ("jit_compile", "boolean")]
)
@pytest.mark.parametrize("case", _MASKS)
def test_masks_of_every_shape_say_what_counts(case, mode, kind):
    shape, axis, mask_shape = _MASKS[case]
    x, rng = _x(shape), np.random.default_rng(1)
    mask = rng.uniform(size=mask_shape) < 0.7 if kind == "boolean" else rng.uniform(0, 3, mask_shape).astype("float32")
    mask.flat[0] = True
    weights = np.asarray(mask, "float64")
    if case in _LACK_CHANNELS:
        weights = np.expand_dims(weights, axis)
    weights = weights.reshape(weights.shape + (1,) * (x.ndim - weights.ndim))
    layer = keras_bn.BatchNormalization(axis=axis, momentum=0.0)
    layer.build(shape)
    y = _call(layer, mode, mask=mask)(x)
    oracle = Reference(x, axis, weights=weights)
    _close(y, oracle.y, 3e-5)
    counted = oracle.channels(oracle.count) > 1
    _close(layer.moving_mean.numpy()[counted], oracle.batch_mean[counted])
    _close(layer.moving_variance.numpy()[counted], oracle.biased_variance[counted], 3e-5)


def test_a_mask_is_read_as_the_stock_layer_reads_it_wherever_that_does():
    x, mask = _x((6, 5, 5)), np.random.default_rng(1).uniform(size=(6, 5)) < 0.7
    ours, stock = (
        kind(axis=1, momentum=0.0) for kind in (keras_bn.BatchNormalization, keras.layers.BatchNormalization)
    )
    _close(ours(x, training=True, mask=mask), stock(x, training=True, mask=mask))
    _close(ours.moving_mean, stock.moving_mean)
    unknown = tf.function(lambda x, mask: ours(x, training=True, mask=mask)).get_concrete_function(
        tf.TensorSpec([None, 5, None]), tf.TensorSpec([None, None], tf.bool)
    )
    _close(unknown(tf.constant(x), tf.constant(mask)), stock(x, training=True, mask=mask))


@pytest.mark.parametrize(
    "weights",
    [
        np.full(16, 1.04 / 16),
        np.linspace(0, 0.1, 16),
        np.linspace(0, 5, 16),
        np.arange(16) % 3,
        np.arange(16) % 3 > 0,
    ],
    ids=["like weights of sum 1.04", "sum 0.8", "sum 40", "integers", "booleans"],
)
@pytest.mark.parametrize(
    ("mode", "options"),
    [("eager", {}), ("graph", {"synchronized": True}), ("jit_compile", {"virtual_batch_size": 16})],
    ids=MODES,
)
def test_unbiased_variance_under_weights_is_that_of_frequencies_or_of_reliabilities(mode, options, weights):
    x = _x()
    layer = keras_bn.BatchNormalization(momentum=0.0, unbiased_variance=True, **options)
    layer.build(x.shape)
    weights = weights.astype("float32") if weights.dtype == "float64" else weights
    _call(layer, mode, mask=weights)(x)
    oracle = Reference(x, -1, weights=weights[:, None])
    _close(layer.moving_mean, oracle.batch_mean)
    _close(layer.moving_variance, oracle.unbiased_variance, 3e-5)


@pytest.mark.parametrize("alone", [True, 1, 0.3, 7.0], ids=str)
@pytest.mark.parametrize("options", [{}, {"unbiased_variance": True}, {"renorm": True}], ids=str)
def test_one_value_that_counts_moves_nothing_whatever_it_weighs(options, alone):
    layer = keras_bn.BatchNormalization(momentum=0.5, **options)
    layer.build((16, 4))
    before, mask = _state(layer), np.zeros(16, type(alone))
    mask[5] = alone
    layer(_x(), training=True, mask=mask)
    for name, value in _state(layer).items():
        np.testing.assert_array_equal(value, before[name], err_msg=name)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_under_a_mask_equal_the_oracle(mode):
    x, dy = tf.constant(_x((8, 5, 3))), tf.constant(_x((8, 5, 3), seed=1))
    mask = np.random.default_rng(1).uniform(size=(8, 5)) < 0.6
    layer = keras_bn.BatchNormalization()
    layer.build(x.shape)

    def gradient(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = tf.reduce_sum(layer(x, training=True, mask=mask) * dy)
        return tape.gradient(loss, x)

    call = gradient if mode == "eager" else tf.function(gradient, jit_compile=mode == "jit_compile")
    _close(call(x), Reference(x, -1, weights=mask[..., None].astype(float)).gradients(dy)[0], 3e-5)


@pytest.mark.parametrize("mode", MODES)
def test_what_a_mask_hides_has_no_influence_even_if_it_is_not_a_number(mode):
    x, mask = _x((6, 3)), np.array([1, 1, 0, 1, 1, 1], bool)
    x[2] = np.nan
    layer = keras_bn.BatchNormalization(momentum=0.0)
    layer.build(x.shape)
    y = _call(layer, mode, mask=mask)(x)
    _close(np.asarray(y)[mask], Reference(x[mask], -1).y)
    _close(layer.moving_mean, Reference(x[mask], -1).batch_mean)


@pytest.mark.parametrize("mode", MODES)
def test_fully_masked_batch_outputs_what_keras_does_and_moves_nothing(mode):
    x, mask = np.zeros((4, 5), "float32"), np.zeros(4, bool)
    layer = keras_bn.BatchNormalization(center=False, scale=False, moving_mean_initializer="ones")
    layer.build(x.shape)
    np.testing.assert_array_equal(_call(layer, mode, mask=mask)(x), np.zeros((4, 5)))
    np.testing.assert_array_equal(layer.moving_mean, np.ones(5))
    np.testing.assert_array_equal(layer.moving_variance, np.ones(5))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["bool", "int32", "float32"])
@pytest.mark.parametrize(
    "options",
    [
        *({}, {"renorm": True}, {"zero_debias": True}, {"unbiased_variance": True}, {"virtual_batch_size": 2}),
        {"momentum": None},
    ],
    ids=str,
)
def test_a_batch_of_which_no_value_counts_is_finite_and_leaves_everything_as_it_was(options, kind, mode):
    x, mask = _x((4, 5, 3)), np.zeros((4, 5), kind)
    layer, stock = keras_bn.BatchNormalization(**options), keras.layers.BatchNormalization()
    for one in (layer, stock):
        one(_x((4, 5, 3), seed=1), training=True)
    before, expected = _state(layer), stock(x, training=True, mask=mask.astype(bool)).numpy()
    y = np.asarray(_call(layer, mode, mask=mask)(x))
    assert np.all(np.isfinite(y))
    if not options.get("renorm"):
        _close(y, expected)
        _close(y, x / np.sqrt(layer.epsilon))
    for name, value in _state(layer).items():
        np.testing.assert_array_equal(value, before[name], err_msg=name)


# Ragged tensors


_RAGGED = {
    "steps": (tf.RaggedTensor.from_row_lengths(_x((9, 3)), [2, 0, 3, 4]), -1),
    "pictures": (tf.RaggedTensor.from_row_lengths(_x((9, 4, 3)), [2, 3, 4]), 2),
    "channels before": (
        tf.RaggedTensor.from_uniform_row_length(tf.RaggedTensor.from_row_lengths(_x((12,)), [1, 2, 3, 2, 2, 2]), 3),
        1,
    ),
}


@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.parametrize("case", _RAGGED)
def test_ragged_tensors_are_normalized_over_the_values_that_are_there_as_in_the_stock_layer(case, mode):
    x, axis = _RAGGED[case]
    ours, stock = (
        kind(axis=axis, momentum=0.0) for kind in (keras_bn.BatchNormalization, keras.layers.BatchNormalization)
    )
    for layer in (ours, stock):
        layer.build(x.shape)
    # In a graph, stock loses the size of channels that come before ragged steps.
    y, want = _call(ours, mode)(x), _call(stock, "eager")(x)
    assert y.shape == want.shape
    np.testing.assert_array_equal(y.nested_row_splits[-1], want.nested_row_splits[-1])
    _close(y.flat_values, want.flat_values)
    _close(ours.moving_mean, stock.moving_mean)
    _close(ours.moving_variance, stock.moving_variance)
    _close(ours(x).flat_values, stock(x).flat_values)


def test_groups_of_ragged_examples_are_normalized_by_themselves():
    x, _ = _RAGGED["steps"]
    y = keras_bn.BatchNormalization(virtual_batch_size=2)(x, training=True)
    groups = [Reference(x[i : i + 2].flat_values.numpy(), -1) for i in (0, 2)]
    _close(y.flat_values, np.concatenate([group.y for group in groups]))


def test_a_mask_of_ragged_inputs_is_refused():
    x, _ = _RAGGED["steps"]
    with pytest.raises(
        ValueError, match=r"`mask` must be None for ragged inputs.*`inputs.to_tensor\(\)`.*Received: mask="
    ):
        keras_bn.BatchNormalization()(x, training=True, mask=np.ones((4, 4), bool))


def test_a_model_of_ragged_inputs_trains_predicts_and_is_recalibrated():
    x, _ = _RAGGED["steps"]
    inputs = keras.Input((None, 3), ragged=True)
    layer = keras_bn.BatchNormalization(momentum=0.0)
    sums = keras.layers.Lambda(lambda x: tf.reduce_sum(x, 1), output_shape=(3,))(layer(inputs))
    model = keras.Model(inputs, keras.layers.Dense(1)(sums))
    model.compile("sgd", "mse")
    model.fit(tf.data.Dataset.from_tensors((x, tf.zeros((4, 1)))), verbose=0)
    oracle = Reference(x.flat_values.numpy(), -1)
    _close(layer.moving_mean, oracle.batch_mean)
    assert model.predict(x, verbose=0).shape == (4, 1)
    layer.moving_mean.assign(np.zeros(3))
    keras_bn.recalibrate(model, [(x[:1],), (x[1:],)], verbose=0)
    _close(layer.moving_mean, oracle.batch_mean)
    _close(layer.moving_variance, oracle.biased_variance)


# Several channel axes


@pytest.mark.parametrize(("axis", "channels"), [([1, 3], (3, 2)), ([2, 3], (5, 2)), ([1, 2], (3, 5)), ([0, 3], (6, 2))])
@pytest.mark.parametrize("mode", MODES)
def test_list_of_axes_keeps_statistics_for_each_combination(mode, axis, channels):
    x = _x((6, 3, 5, 2))
    layer = keras_bn.BatchNormalization(axis=axis, momentum=0.0)
    layer.build(x.shape)
    y = _call(layer, mode)(x)
    oracle = Reference(x, axis)
    assert layer.gamma.shape == channels
    _close(y, oracle.y)
    _close(layer.moving_mean, oracle.batch_mean)
    _close(layer.moving_variance, oracle.biased_variance)
    _close(layer(x), oracle.inference(oracle.batch_mean, oracle.biased_variance), 3e-5)


# What must not poison anything


@pytest.mark.parametrize(
    ("options", "poison"),
    [
        *(({}, poison) for poison in (np.nan, np.inf, -np.inf)),
        *((options, np.nan) for options in ({"kernel": "plain"}, {"virtual_batch_size": 16}, {"renorm": True})),
    ],
    ids=str,
)
@pytest.mark.parametrize("mode", MODES)
def test_non_finite_value_stops_the_update_of_its_channel_and_of_no_other(mode, options, poison):
    x = _x()
    clean = x.copy()
    x[3, 2] = poison
    layer = keras_bn.BatchNormalization(momentum=0.5, **options)
    layer.build(x.shape)
    before = _state(layer)
    y = np.asarray(_call(layer, mode)(x))
    after = _state(layer)
    for name, value in after.items():
        assert value[2] == before[name][2], name
    _close(after["moving_mean"][[0, 1, 3]], 0.5 * Reference(clean, -1).batch_mean[[0, 1, 3]])
    assert np.all(np.isfinite(np.delete(y, 2, axis=1)))


@pytest.mark.parametrize("mode", MODES)
def test_empty_batch_gives_an_empty_output_and_moves_nothing(mode):
    layer = keras_bn.BatchNormalization(momentum=0.5)
    layer.build((None, 3, 4))
    y = _call(layer, mode, signature=[tf.TensorSpec([None, 3, 4])])(np.zeros((0, 3, 4), "float32"))
    assert y.shape == (0, 3, 4)
    np.testing.assert_array_equal(layer.moving_mean, np.zeros(4))
    np.testing.assert_array_equal(layer.moving_variance, np.ones(4))


@pytest.mark.parametrize("options", [{}, {"unbiased_variance": True}, {"momentum": None}, {"renorm": True}], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_one_value_per_channel_gives_beta_or_with_renorm_what_stock_gives_and_moves_nothing(mode, options):
    layer = keras_bn.BatchNormalization(beta_initializer="ones", **options)
    layer.build((None, 4))
    before = _state(layer)
    y = _call(layer, mode, signature=[tf.TensorSpec([None, 4])])(_x((1, 4)))
    if "renorm" in options:
        # gamma * d + beta, with d the distance from a renorm mean of 0 in standard deviations of 1.
        _close(y, _x((1, 4)) + 1)
        assert np.abs(y - 1).max() > 0.5
        if "renorm" in inspect.signature(keras.layers.BatchNormalization).parameters:  # Keras 3.12 does not know it.
            _close(y, keras.layers.BatchNormalization(beta_initializer="ones", renorm=True)(_x((1, 4)), training=True))
    else:
        np.testing.assert_array_equal(y, np.ones((1, 4)))
    for name, value in _state(layer).items():
        np.testing.assert_array_equal(value, before[name], err_msg=name)


def test_one_value_per_channel_is_warned_of_once():
    layer = keras_bn.BatchNormalization(name="lonely")
    message = r"one value per channel.*`renorm`, by its mean alone.*drop_remainder=True.*Layer: 'lonely'"
    with pytest.warns(UserWarning, match=message):
        layer(_x((1, 4)), training=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(_x((1, 4)), training=True)


@pytest.mark.parametrize("mode", ["layer", "model", "fit"])
def test_a_warning_points_at_the_line_of_the_program_that_led_to_it(mode):
    model = keras.Sequential([keras.Input((4,)), keras_bn.BatchNormalization()])
    model.compile("sgd", "mse")
    calls = {
        "layer": lambda: model.layers[0](_x((1, 4)), training=True),
        "model": lambda: model(_x((1, 4)), training=True),
        "fit": lambda: model.fit(_x((1, 4)), _x((1, 4)), verbose=0),
    }
    if mode == "fit":
        model.run_eagerly = True
    with pytest.warns(UserWarning, match="one value per channel") as caught:
        calls[mode]()
    assert {warning.filename for warning in caught} == {__file__}


def test_last_batch_of_one_does_not_end_a_training_and_is_said_once(capfd):
    model = keras.Sequential([keras.Input((4,)), keras_bn.BatchNormalization(), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    model.fit(_x((9, 4)), _x((9, 1)), batch_size=4, epochs=3, verbose=0)
    assert np.all(np.isfinite(model.predict(_x((9, 4)), verbose=0)))
    assert capfd.readouterr().err.count("one value per channel") == 1


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_vectorized_map_over_a_layer_does_what_it_does_over_the_stock_one(mode, training):
    x = tf.constant(_x((5, 16, 4)))
    results = []
    for kind in (keras_bn.BatchNormalization, keras.layers.BatchNormalization):
        layer = kind(momentum=0.5)
        layer.build((16, 4))

        def call(x, layer=layer):
            return tf.vectorized_map(lambda part: layer(part, training=training), x)

        run = call if mode == "eager" else tf.function(call, jit_compile=mode == "jit_compile", autograph=False)
        results.append([run(x), *_state(layer).values()])
    for ours, theirs in zip(*results, strict=True):
        _close(ours, theirs)


# Activation, configuration, precision


@pytest.mark.parametrize("activation", ["relu", "tanh", keras.activations.softplus])
@pytest.mark.parametrize("mode", MODES)
def test_activation_is_applied_last_in_training_and_inference(mode, activation):
    layer, x = keras_bn.BatchNormalization(activation=activation), _x()
    layer.build(x.shape)
    function, oracle = keras.activations.get(activation), Reference(x, -1)
    _close(_call(layer, mode)(x), function(oracle.y.astype("float32")))
    layer.set_weights([np.ones(4), np.zeros(4), np.zeros(4), np.ones(4)])
    _close(layer(x), function(oracle.inference(np.zeros(4), np.ones(4)).astype("float32")))


_CONFIGURATIONS = [
    {"axis": [1, 2]},
    {"momentum": None},
    {"momentum": keras.optimizers.schedules.ExponentialDecay(0.9, 10, 0.5)},
    {"virtual_batch_size": 8, "unbiased_variance": True},
    {"zero_debias": True, "activation": "relu", "kernel": "plain"},
    {"renorm": True, "renorm_clipping": "warmup"},
    {
        "renorm": True,
        "renorm_clipping": {"rmax": keras.optimizers.schedules.ExponentialDecay(1.0, 10, 2.0), "dmax": 3.0},
    },
]


@pytest.mark.parametrize("options", _CONFIGURATIONS, ids=lambda options: "+".join(options))
def test_every_option_survives_configuration_and_file(options, tmp_path):
    layer = keras_bn.BatchNormalization(**options)
    model = keras.Sequential([keras.Input((3, 4)), layer])
    x = _x((16, 3, 4))
    for _ in range(3):
        layer(x, training=True)
    model.save(tmp_path / "model.keras")
    reloaded = keras.models.load_model(tmp_path / "model.keras").layers[0]
    assert reloaded.get_config() == layer.get_config()
    assert dir(reloaded) == dir(layer)
    _close(reloaded(x, training=True), layer(x, training=True))
    for mine, theirs in zip(reloaded.weights, layer.weights, strict=True):
        _close(mine, theirs)


@pytest.mark.parametrize("kernel", ["stable", "xla"])
def test_files_that_name_a_kernel_of_earlier_versions_load_as_plain(kernel, tmp_path):
    model = keras.Sequential([keras.Input((4,)), keras_bn.BatchNormalization(kernel="plain")])
    model.layers[0].kernel = kernel
    model.save(tmp_path / "model.keras")
    assert keras.models.load_model(tmp_path / "model.keras").layers[0].kernel == "plain"
    with pytest.raises(ValueError, match="`kernel` must be one of"):
        keras_bn.BatchNormalization(kernel=kernel)


def test_pure_half_precision_layer_keeps_its_policy():
    layer = keras_bn.BatchNormalization(dtype="bfloat16")
    y = layer(tf.cast(_x(), "bfloat16"), training=True)
    assert y.dtype == tf.bfloat16
    assert layer.moving_mean.dtype == "bfloat16"


@pytest.mark.parametrize("mode", ["eager", "graph", "jit_compile"])
@pytest.mark.parametrize("options", [{}, {"unbiased_variance": True}, {"momentum": None}], ids=str)
def test_synchronized_layers_normalize_float64(mode, options):
    x = np.random.default_rng(0).normal(1e6, 2, (12, 3))
    layer = keras_bn.BatchNormalization(dtype="float64", synchronized=True, **options)

    def call(x):
        return layer(x, training=True)

    if mode != "eager":
        call = tf.function(call, jit_compile=mode == "jit_compile", autograph=False)
    layer.build(x.shape)
    np.testing.assert_allclose(call(tf.constant(x)), Reference(x, -1).y, atol=1e-9)
