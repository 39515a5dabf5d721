"""recalibrate(): the statistics of the whole population, and a model that is never left half changed."""

import io
import itertools
import json
import os
import re
import signal
import sys
import time
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_bn
from keras_bn.population.workers import Workers
from tests.reference import Reference

SPLIT = (2, 2, 4, 8, 16, 32, 64)


def four_layer_cnn():
    """Four convolutions with a normalization each, with weights that move every statistic off its initial value."""
    keras.utils.set_random_seed(7)
    x = inputs = keras.Input((8, 8, 3))
    for filters in (4, 5, 6, 7):
        x = keras.layers.Conv2D(filters, 3, padding="same", bias_initializer="random_normal")(x)
        x = keras.layers.BatchNormalization()(x)
        x = keras.layers.Activation("relu")(x)
    return keras.Model(inputs, keras.layers.GlobalAveragePooling2D()(x))


def norms(model):
    return [layer for layer in model._flatten_layers() if isinstance(layer, keras.layers.BatchNormalization)]


def pictures(n=128, seed=0):
    """Unlike each other, so that another split into batches gives other batch statistics."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(n, 8, 8, 3)) * rng.uniform(0.1, 3, (n, 1, 1, 1)) + rng.normal(size=(n, 1, 1, 3))).astype(
        "float32"
    )


def in_batches(x, sizes, *more):
    starts = np.cumsum([0, *sizes])
    parts = [tuple(a[i:j] for a in (x, *more)) for i, j in itertools.pairwise(starts)]
    return parts


def statistics(model):
    return [np.asarray(v) for layer in norms(model) for v in (layer.moving_mean, layer.moving_variance)]


def snapshot(model):
    return [v.numpy().tobytes() for v in model.variables]


def input_of(model, layer, x):
    """What `layer` is given in inference, in float64."""
    return keras.Model(model.inputs, layer.input)(x).numpy().astype("float64")


def recalibrated(data, model=None, **options):
    model = model or four_layer_cnn()
    keras_bn.recalibrate(model, data, verbose=0, **options)
    return model


def test_population_statistics_do_not_depend_on_the_batch_split():
    x = pictures()
    split = statistics(recalibrated(in_batches(x, SPLIT)))
    whole = statistics(recalibrated([(x,)]))
    for a, b in zip(split, whole, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6 * np.abs(b).max())


def test_sequential_statistics_are_those_of_what_each_layer_sees_in_inference():
    x = pictures()
    model = recalibrated(in_batches(x, SPLIT))
    for layer in norms(model):
        seen = input_of(model, layer, x)
        np.testing.assert_allclose(layer.moving_mean, seen.mean((0, 1, 2)), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(layer.moving_variance, seen.var((0, 1, 2)), rtol=1e-6)


def test_algorithm2_averages_unbiased_batch_variances():
    rng = np.random.default_rng(0)
    x = rng.normal(3, 2, (60, 5)).astype("float32")
    model = keras.Sequential([keras.Input((5,)), keras.layers.BatchNormalization()])
    recalibrated(in_batches(x, (2, 8, 50)), model, method="algorithm2")
    parts = [x[:2].astype("float64"), x[2:10].astype("float64"), x[10:].astype("float64")]
    np.testing.assert_allclose(model.layers[0].moving_mean, np.mean([p.mean(0) for p in parts], 0), rtol=1e-6)
    np.testing.assert_allclose(
        model.layers[0].moving_variance, np.mean([p.var(0, ddof=1) for p in parts], 0), rtol=1e-6
    )


def test_algorithm2_leaves_out_a_last_batch_of_one():
    x = np.random.default_rng(0).normal(3, 2, (9, 5)).astype("float32")
    model = keras.Sequential([keras.Input((5,)), keras.layers.BatchNormalization()])
    recalibrated(in_batches(x, (8, 1)), model, method="algorithm2")
    np.testing.assert_allclose(model.layers[0].moving_variance, x[:8].var(0, ddof=1), rtol=1e-5)


@pytest.mark.parametrize("scale", [1, 0.01], ids=["frequencies", "reliabilities"])
def test_algorithm2_takes_weights_as_the_layer_takes_a_mask(scale):
    x, weights = np.random.default_rng(0).normal(3, 2, (9, 5)).astype("float32"), scale * np.arange(9)
    model = keras.Sequential([keras.Input((5,)), keras.layers.BatchNormalization()])
    recalibrated(in_batches(x, (8, 1), np.zeros(9), weights), model, method="algorithm2")
    # A last batch of one example has no variance as a reliability; of weight 8 it is eight equal ones.
    parts = [Reference(part, -1, weights=w[:, None]) for part, w in ((x[:8], weights[:8]), (x[8:], weights[8:]))]
    parts = parts[: 1 if scale < 1 else 2]
    want = np.mean([part.unbiased_variance for part in parts], 0)
    np.testing.assert_allclose(model.layers[0].moving_variance, want, rtol=1e-5)


def test_joint_order_feeds_each_layer_from_batch_normalized_predecessors():
    x = pictures(24)
    model = recalibrated(in_batches(x, (8, 16)), order="joint")
    first, second = norms(model)[:2]
    seen = []
    for part in (x[:8], x[8:]):
        value = input_of(model, first, part)
        value = (value - value.mean((0, 1, 2))) / np.sqrt(value.var((0, 1, 2)) + first.epsilon)
        convolution = keras.Model(first.output, second.input)
        seen.append(convolution(value.astype("float32")).numpy().astype("float64"))
    seen = np.concatenate(seen)
    np.testing.assert_allclose(second.moving_variance, seen.var((0, 1, 2)), rtol=1e-4)
    np.testing.assert_allclose(second.moving_mean, seen.mean((0, 1, 2)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["array", "dataset", "pydataset", "generator"])
def test_every_kind_of_data_gives_the_same_statistics(kind):
    x = pictures(48)

    class Set(keras.utils.PyDataset):
        def __len__(self):
            return 3

        def __getitem__(self, index):
            return x[index * 16 : index * 16 + 16], np.zeros(16)

    data = {
        "array": x,
        "dataset": tf.data.Dataset.from_tensor_slices((x, np.zeros(48))).batch(20),
        "pydataset": Set(),
        "generator": (x[i : i + 12] for i in range(0, 48, 12)),
    }[kind]
    got, expected = statistics(recalibrated(data)), statistics(recalibrated([(x,)]))
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-6)


def test_steps_limits_the_batches_and_takes_none_too_many():
    x = np.arange(40, dtype="float32").reshape(10, 4)
    model = keras.Sequential([keras.Input((4,)), keras.layers.BatchNormalization()])
    taken = []

    def endless():
        while True:
            taken.append(len(taken))
            yield x[len(taken) - 1 : len(taken)]

    keras_bn.recalibrate(model, endless(), steps=3, verbose=0)
    assert taken == [0, 1, 2]
    np.testing.assert_allclose(model.layers[0].moving_mean, x[:3].mean(0), rtol=1e-6)


def test_sample_weights_count_as_copies():
    x = np.random.default_rng(0).normal(2, 3, (6, 4)).astype("float32")
    weights = np.array([0, 1, 2, 3, 1, 0], "float32")
    model = keras.Sequential([keras.Input((4,)), keras.layers.BatchNormalization()])
    recalibrated(in_batches(x, (2, 4), np.zeros(6), weights), model)
    copies = np.repeat(x.astype("float64"), weights.astype(int), 0)
    np.testing.assert_allclose(model.layers[0].moving_mean, copies.mean(0), rtol=1e-6)
    np.testing.assert_allclose(model.layers[0].moving_variance, copies.var(0), rtol=1e-6)


def test_masked_steps_do_not_count_even_if_they_are_nan():
    tokens = np.array([[1, 2, 0, 0], [3, 0, 0, 0]])
    table = np.array([[np.nan, np.nan], [1, 2], [3, 5], [8, 13]], "float32")
    model = keras.Sequential(
        [keras.Input((4,)), keras.layers.Embedding(4, 2, mask_zero=True), keras.layers.BatchNormalization()]
    )
    model.layers[0].set_weights([table])
    recalibrated([(tokens,)], model)
    np.testing.assert_allclose(model.layers[1].moving_mean, table[1:].mean(0), rtol=1e-6)
    np.testing.assert_allclose(model.layers[1].moving_variance, table[1:].var(0), rtol=1e-6)


@pytest.mark.parametrize("norm", [keras.layers.BatchNormalization, keras_bn.BatchNormalization])
def test_recalibration_counts_what_training_counts_under_a_mask(norm):
    """With momentum 0 one step of training leaves the statistics of the batch."""
    inputs, mask = keras.Input((5, 3)), keras.Input((5,), dtype="bool")
    layer = norm(momentum=0.0)
    model = keras.Model([inputs, mask], layer(inputs, mask=mask))
    rng = np.random.default_rng(0)
    x, keep = rng.normal(2, 3, (6, 5, 3)).astype("float32"), rng.random((6, 5)) < 0.6
    model([x, keep], training=True)
    trained = statistics(model)
    recalibrated([x, keep], model, batch_size=4)
    for a, b in zip(statistics(model), trained, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_a_shared_layer_gets_the_statistics_of_all_its_uses():
    a, b = keras.Input((3,)), keras.Input((3,))
    shared = keras.layers.BatchNormalization()
    model = keras.Model([a, b], [shared(a), shared(b)])
    rng = np.random.default_rng(0)
    x, y = rng.normal(0, 1, (10, 3)).astype("float32"), rng.normal(5, 2, (10, 3)).astype("float32")
    recalibrated([x, y], model, batch_size=3)
    together = np.concatenate([x, y])
    np.testing.assert_allclose(shared.moving_mean, together.mean(0), rtol=1e-5)
    np.testing.assert_allclose(shared.moving_variance, together.var(0), rtol=1e-5)


@pytest.mark.parametrize("batch_size", [10, 3])
def test_a_layer_used_twice_is_exact_in_one_batch_as_in_many(batch_size):
    """And so is the layer after one of the uses, which sees what is normalized with the statistics of both."""
    a, b = keras.Input((3,)), keras.Input((3,))
    shared, last = keras.layers.BatchNormalization(), keras.layers.BatchNormalization()
    model = keras.Model([a, b], [last(shared(a)), shared(b)])
    rng = np.random.default_rng(0)
    x, y = rng.normal(0, 1, (10, 3)).astype("float32"), rng.normal(5, 2, (10, 3)).astype("float32")
    report = keras_bn.recalibrate(model, [x, y], batch_size=batch_size, verbose=0)
    together, seen = np.concatenate([x, y]), shared(x).numpy()
    np.testing.assert_allclose(shared.moving_mean, together.mean(0), rtol=1e-5)
    np.testing.assert_allclose(shared.moving_variance, together.var(0), rtol=1e-5)
    np.testing.assert_allclose(last.moving_mean, seen.mean(0), rtol=1e-5)
    np.testing.assert_allclose(last.moving_variance, seen.var(0), rtol=1e-5)
    assert report.unsettled[shared.name] < 1e-9
    assert "no statistics are exact" not in str(report)


def test_a_layer_that_feeds_itself_is_reported_with_how_far_it_is_off():
    inputs = keras.Input((3,))
    norm, dense = keras.layers.BatchNormalization(name="twice"), keras.layers.Dense(3, activation="relu")
    model = keras.Model(inputs, norm(dense(norm(inputs))))
    x = np.random.default_rng(0).normal(2, 3, (40, 3)).astype("float32")
    report = keras_bn.recalibrate(model, x, batch_size=16, verbose=0)
    once = norm(x).numpy()
    seen = np.concatenate([x, dense(once)]).astype("float64")
    mean, variance = np.asarray(norm.moving_mean), np.asarray(norm.moving_variance) + norm.epsilon
    ratio = (seen.var(0) + norm.epsilon) / variance
    kl = np.mean((ratio + (seen.mean(0) - mean) ** 2 / variance - 1 - np.log(ratio)) / 2)
    np.testing.assert_allclose(report.unsettled["twice"], kl, rtol=1e-3)
    assert kl > 1e-4
    assert f"no statistics are exact: twice is off by KL {kl:.2g}" in str(report).replace("\n", " ")


def test_a_list_of_arrays_is_batches_where_the_model_has_one_input():
    x = pictures(24)
    got = statistics(recalibrated([x[:8], x[8:16], x[16:]]))
    for a, b in zip(got, statistics(recalibrated([(x,)])), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_a_list_of_arrays_for_a_model_that_does_not_tell_its_inputs_is_refused_with_both_ways_to_say_it():
    class Sum(keras.Model):
        def __init__(self):
            super().__init__()
            self.norm = keras.layers.BatchNormalization()

        def call(self, inputs):
            return self.norm(inputs[0] + inputs[1] if isinstance(inputs, list) else inputs)

    x = np.random.default_rng(0).normal(2, 3, (8, 3)).astype("float32")
    model = Sum()
    model(x)
    with pytest.raises(ValueError, match=r"`data` must say whether.*`\(\[a, b\],\)`.*`\[\(a,\), \(b,\)\]`.*2 arrays"):
        keras_bn.recalibrate(model, [x, x], verbose=0)
    recalibrated(([x, 2 * x],), model, batch_size=3)
    np.testing.assert_allclose(model.norm.moving_mean, 3 * x.mean(0), rtol=1e-5)
    recalibrated([(x,), (2 * x,)], model)
    np.testing.assert_allclose(model.norm.moving_mean, 1.5 * x.mean(0), rtol=1e-5)


def test_a_model_of_two_call_arguments_is_refused():
    class Two(keras.Model):
        def __init__(self):
            super().__init__()
            self.norm = keras.layers.BatchNormalization()

        def call(self, a, b):
            return self.norm(a) + b

    model = Two()
    model(np.ones((2, 3)), np.ones((2, 3)))
    with pytest.raises(TypeError, match=r"`model` must take its inputs as one argument.*needs \['a', 'b'\]"):
        keras_bn.recalibrate(model, np.ones((4, 3), "float32"))


def test_a_normalization_whose_call_names_its_input_otherwise_is_measured():
    class Own(keras.layers.BatchNormalization):
        def call(self, x, training=None, mask=None):
            return super().call(x, training, mask)

    x = np.random.default_rng(0).normal(2, 3, (8, 3)).astype("float32")
    model = recalibrated(x, keras.Sequential([keras.Input((3,)), Own()]))
    np.testing.assert_allclose(model.layers[0].moving_mean, x.mean(0), rtol=1e-5)


def test_inputs_with_targets_and_weights_are_split_together():
    a, b = keras.Input((3,)), keras.Input((3,))
    model = keras.Model([a, b], keras.layers.BatchNormalization()(a + b))
    x = np.random.default_rng(0).normal(2, 3, (8, 3)).astype("float32")
    weights = np.array([1, 1, 0, 0, 2, 0, 0, 0])
    recalibrated(([x, x], None, weights), model, batch_size=3)
    np.testing.assert_allclose(model.layers[-1].moving_mean, np.average(2 * x, 0, weights), rtol=1e-5)


def test_distributed_data_that_never_ends_needs_a_number_of_steps():
    strategy = tf.distribute.MirroredStrategy(["CPU:0"])
    data = tf.data.Dataset.from_tensor_slices(pictures(8)).batch(4).repeat()
    with pytest.raises(ValueError, match=r"`steps` must be given for data that never ends"):
        keras_bn.recalibrate(four_layer_cnn(), strategy.experimental_distribute_dataset(data))


def test_workers_that_would_stop_at_different_batches_are_refused(monkeypatch):
    class Strategy:
        cluster_resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(
            tf.train.ClusterSpec({"chief": ["a:1"], "worker": ["b:1"]})
        )

    monkeypatch.setattr(keras.Model, "distribute_strategy", Strategy())
    monkeypatch.setattr(Workers, "gathered", lambda self, values: [values] * self.count)
    with pytest.raises(ValueError, match=r"`tolerance` must be None for a model that several workers.*tolerance=0.1"):
        keras_bn.recalibrate(four_layer_cnn(), pictures(4), tolerance=0.1)


def test_nested_models_and_time_distributed_are_reached():
    inner = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), keras.layers.BatchNormalization(name="deep")])
    outer = keras.Sequential([keras.Input((5, 4)), keras.layers.TimeDistributed(inner, name="steps")])
    x = np.random.default_rng(0).normal(1, 2, (12, 5, 4)).astype("float32")
    report = keras_bn.recalibrate(outer, x, batch_size=5, verbose=0)
    seen = inner.layers[0](x).numpy().reshape(-1, 3)
    np.testing.assert_allclose(inner.layers[1].moving_variance, seen.var(0), rtol=1e-5)
    assert [layer.name for layer in report.layers] == [f"steps/{inner.name}/deep"]


def test_mixed_precision_inputs_are_measured_in_float64():
    model = keras.Sequential([keras.Input((2,)), keras.layers.BatchNormalization(dtype="mixed_float16")])
    x = np.array([[60000.0, 1.0], [50000.0, 3.0]], "float16")
    recalibrated([(x,)], model)
    np.testing.assert_allclose(model.layers[0].moving_variance, x.astype("float64").var(0), rtol=1e-3)


@pytest.mark.parametrize("axis", [1, 2, -1])
def test_any_axis_is_measured(axis):
    model = keras.Sequential([keras.Input((3, 4, 5)), keras.layers.BatchNormalization(axis=axis)])
    x = np.random.default_rng(0).normal(size=(6, 3, 4, 5)).astype("float32")
    recalibrated(x, model, batch_size=4)
    others = tuple(i for i in range(4) if i != axis % 4)
    np.testing.assert_allclose(model.layers[0].moving_variance, x.var(others), rtol=1e-5)


def test_frozen_layers_and_functions_of_the_author_are_measured():
    class Compiled(keras.Model):
        def __init__(self):
            super().__init__()
            self.norm = keras.layers.BatchNormalization(trainable=False)

        @tf.function
        def call(self, x):
            return self.norm(x)

    model = Compiled()
    x = np.random.default_rng(0).normal(4, 2, (8, 3)).astype("float32")
    model(x)
    recalibrated(x, model, batch_size=3)
    np.testing.assert_allclose(model.norm.moving_mean, x.mean(0), rtol=1e-5)
    assert not tf.config.functions_run_eagerly()


def test_renorm_statistics_follow():
    model = keras.Sequential([keras.Input((3,)), keras_bn.BatchNormalization(renorm=True)])
    x = np.random.default_rng(0).normal(4, 2, (8, 3)).astype("float32")
    recalibrated(x, model)
    np.testing.assert_allclose(model.layers[0].renorm_mean, x.mean(0), rtol=1e-5)
    np.testing.assert_allclose(model.layers[0].renorm_stddev, np.sqrt(x.var(0) + 1e-3), rtol=1e-5)


@pytest.mark.parametrize("order", ["sequential", "joint"])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt], ids=["a broken disk", "Ctrl-C"])
def test_data_that_raises_midway_leaves_the_model_bit_for_bit(order, error):
    def stop():
        if error is KeyboardInterrupt:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(10)
        raise error("disk")

    model = four_layer_cnn()
    recalibrated(pictures(16, seed=5), model)
    before = snapshot(model)

    class Breaks:
        passes = 0

        def __iter__(self):
            self.passes += 1
            yield pictures(4)
            if self.passes > 3 or order == "joint":
                stop()
            yield pictures(4, seed=2)

    with pytest.raises(error):
        keras_bn.recalibrate(model, Breaks(), order=order, verbose=0)
    assert snapshot(model) == before
    assert not any("call" in vars(layer) for layer in model._flatten_layers())


@pytest.mark.parametrize("order", ["sequential", "joint"])
def test_a_nan_batch_is_named_and_leaves_the_model_bit_for_bit(order):
    model = four_layer_cnn()
    before = snapshot(model)
    x = pictures(24)
    x[17, 2, 3, 1] = np.nan
    first = norms(model)[0].name
    with pytest.raises(
        ValueError, match=rf"batch 2 \(counted from 0\) with non-finite values at the input of '{first}'"
    ):
        keras_bn.recalibrate(model, x, order=order, batch_size=8, verbose=0)
    assert snapshot(model) == before


def test_a_layer_that_is_not_called_keeps_its_statistics_and_is_reported():
    class Auxiliary(keras.Model):
        def __init__(self):
            super().__init__()
            self.main, self.extra = (
                keras.layers.BatchNormalization(name="main"),
                keras.layers.BatchNormalization(name="extra"),
            )
            self.extra.build((None, 2))

        def call(self, x):
            return self.main(x)

    model = Auxiliary()
    model(np.zeros((1, 2), "float32"))
    report = keras_bn.recalibrate(model, np.random.default_rng(0).normal(3, 1, (8, 2)).astype("float32"), verbose=0)
    assert report.not_called == ["extra"]
    assert "Not called, left as it was: extra" in str(report)
    assert model.extra.moving_mean.numpy().tolist() == [0, 0]


def test_the_report_prints_as_a_table_with_old_and_new_distance():
    model = keras.Sequential([keras.Input((2,)), keras.layers.BatchNormalization(name="norm", epsilon=1e-9)])
    x = np.array([[1.0, 1.0], [5.0, 5.0]], "float32")
    report = keras_bn.recalibrate(model, x, verbose=0)
    assert report.layers[0].old_mean.tolist() == [0, 0]
    header, _, row = str(report).splitlines()[1:]
    assert header.split("  ")[0] == "layer"
    assert row.split()[:5] == ["norm", "2", "2", "3", "4"]


def test_the_progress_bar_counts_passes_times_batches(capsys):
    keras_bn.recalibrate(four_layer_cnn(), pictures(12), batch_size=4)
    assert "12/12" in capsys.readouterr().out


@pytest.mark.parametrize("data", ["generator", "unknown length"])
def test_the_progress_bar_tells_the_remaining_time_from_the_second_pass_on(data, capsys, monkeypatch):
    monkeypatch.setattr(keras.utils.Progbar.__init__, "__defaults__", (20, 1, 0.0, None, None, "step"))
    x = pictures(12)
    batches = tf.data.Dataset.from_tensor_slices(x).batch(4).filter(lambda part: True)
    given = (x[i : i + 4] for i in (0, 4, 8)) if data == "generator" else batches
    keras_bn.recalibrate(four_layer_cnn(), given, verbose=1)
    shown = re.sub(r"\x1b\[\d+m", "", capsys.readouterr().out)
    assert shown.count("3/Unknown") == 1
    assert all(f"{done:2}/12" in shown for done in range(3, 13))
    assert shown.endswith("\n")
    assert shown.count("\n") == 1


def test_the_progress_bar_is_whole_where_a_tolerance_ends_each_pass(capsys):
    keras_bn.recalibrate(four_layer_cnn(), pictures(120), batch_size=4, tolerance=100.0, verbose=1)
    shown = re.sub(r"\x1b\[\d+m", "", capsys.readouterr().out)
    assert "120/120" in shown
    assert shown.count("\n") == 1


def test_wrong_arguments_are_named():
    model = four_layer_cnn()
    with pytest.raises(ValueError, match=r"`method` must be one of 'pooled', 'algorithm2'. Received: method='mean'."):
        keras_bn.recalibrate(model, pictures(), method="mean")
    with pytest.raises(ValueError, match=r"`order` must be one of .* Received: order='random'."):
        keras_bn.recalibrate(model, pictures(), order="random")
    with pytest.raises(ValueError, match=r"`steps` must be a positive integer.* Received: steps=0."):
        keras_bn.recalibrate(model, pictures(), steps=0)
    with pytest.raises(ValueError, match=r"`batch_size` must be a positive integer. Received: batch_size=0."):
        keras_bn.recalibrate(model, pictures(), batch_size=0)
    with pytest.raises(ValueError, match=r"`verbose` must be one of 0, 1, 2, 'auto'. Received: verbose='no'."):
        keras_bn.recalibrate(model, pictures(), verbose="no")
    with pytest.raises(ValueError, match=r"`steps` must be given for data that never ends"):
        keras_bn.recalibrate(model, tf.data.Dataset.from_tensor_slices(pictures(4)).batch(2).repeat())
    with pytest.raises(TypeError, match=r"`data` must be an array.* Received: data='images' of type str."):
        keras_bn.recalibrate(model, "images")
    with pytest.raises(ValueError, match=r"`data` must hold at least one batch. Received: no batch."):
        keras_bn.recalibrate(model, iter([]))
    with pytest.raises(ValueError, match=r"`model` must have a batch normalization."):
        keras_bn.recalibrate(keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)]), np.ones((2, 2)))


def test_only_the_layers_that_were_chosen_are_measured():
    model = four_layer_cnn()
    names = [layer.name for layer in norms(model)]
    before = statistics(model)
    x = pictures()
    report = keras_bn.recalibrate(model, x, layers=[names[2]], verbose=0)
    assert [one.name for one in report.layers] == [names[2]]
    after = statistics(model)
    for number in (0, 1, 2, 3, 6, 7):
        np.testing.assert_array_equal(after[number], before[number])
    values = input_of(model, norms(model)[2], x).reshape(-1, 6)
    np.testing.assert_allclose(after[4], values.mean(0), rtol=1e-4)
    np.testing.assert_allclose(after[5], values.var(0), rtol=1e-4)


@pytest.mark.parametrize("order", ["sequential", "joint"])
def test_measuring_stops_where_the_standard_error_is_small_enough(order):
    x = np.random.default_rng(0).normal(3, 2, (20_000, 4)).astype("float32")
    model = keras.Sequential([keras.Input((4,)), keras_bn.BatchNormalization()])
    (layer,) = keras_bn.recalibrate(model, x, tolerance=0.05, batch_size=50, order=order, verbose=0).layers
    # The error of the mean is 1 / sqrt(count), that of the variance sqrt(2 / count): about 800 values.
    assert 500 <= layer.count <= 1500
    (layer,) = keras_bn.recalibrate(model, x, tolerance=10.0, batch_size=50, order=order, verbose=0).layers
    assert layer.count == 500


def _noise(count, **options):
    """The report on values of N(3, 2), whose standard errors are 1 / sqrt(count) and sqrt(2 / count)."""
    x = np.random.default_rng(0).normal(3, 2, (count, 4)).astype("float32")
    inputs = keras.Input((4,))
    norm = keras_bn.BatchNormalization(name="first")(inputs)
    model = keras.Model(inputs, keras_bn.BatchNormalization(name="second")(norm))
    return keras_bn.recalibrate(model, x, batch_size=50, verbose=0, **options)


@pytest.mark.parametrize("order", ["sequential", "joint"])
def test_data_that_end_before_the_tolerance_is_reached_are_told_of(order):
    with pytest.warns(UserWarning, match=r"`tolerance` was not reached.*below 0.01.*first 0.0\d+ after 40") as warned:
        report = _noise(2_000, tolerance=0.01, order=order)
    assert [warning.filename for warning in warned] == [__file__]
    # In joint order the second is fed what its batch has normalized: each of mean 0 and variance 1.
    short = ["first", "second"][: 1 if order == "joint" else 2]
    assert report.short_of_tolerance == short
    assert [layer.batches for layer in report.layers] == [40, 40]
    for layer in report.layers[: len(short)]:
        assert 0.02 < layer.standard_error < 0.05
    assert "The data ended before the standard errors were below 0.01" in str(report)
    sent = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert (sent["tolerance"], sent["short_of_tolerance"]) == (0.01, short)
    assert sent["layers"][0]["standard_error"] == report.layers[0].standard_error


@pytest.mark.parametrize("count", [50, 200])
def test_of_few_batches_no_tolerance_is_known_to_be_reached(count):
    with pytest.warns(UserWarning, match=f"takes 10 batches at least: .* after {count // 50}"):
        report = _noise(count, tolerance=100.0)
    assert report.short_of_tolerance == ["first", "second"]
    json.dumps(report.to_dict(), allow_nan=False)


def test_a_tolerance_that_is_reached_or_not_asked_for_is_no_matter_for_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reached, unasked = _noise(20_000, tolerance=0.05), _noise(100)
    assert reached.short_of_tolerance == unasked.short_of_tolerance == []
    assert all(layer.standard_error < 0.05 for layer in reached.layers)
    assert [layer.standard_error for layer in unasked.layers] == [None, None]
    assert "standard error" not in f"{reached}{unasked}"


def test_a_warning_that_is_an_error_leaves_the_model_as_it_was():
    model = four_layer_cnn()
    before = snapshot(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match=r"`tolerance` was not reached.*, and 1 more"):
            keras_bn.recalibrate(model, pictures(8), tolerance=0.01, verbose=0)
    assert snapshot(model) == before


def test_moments_of_parts_merged_in_any_place_are_those_of_the_whole_and_survive_json():
    rng = np.random.default_rng(0)
    x = rng.normal([0, 1e3, 1e6], 1, (30, 3))
    parts = [Reference(part, -1) for part in (x[:1], x[1:8], x[8:])]
    moments = [keras_bn.Moments(len(part.x), part.batch_mean, part.channels(part.m2)) for part in parts]
    sent = [keras_bn.Moments(**json.loads(json.dumps(one.to_dict()))) for one in moments]
    for merged in (sent[0] + sent[1] + sent[2], sent[2] + (sent[0] + sent[1])):
        whole = Reference(x, -1)
        np.testing.assert_array_equal(merged.count, [30] * 3)
        np.testing.assert_allclose(merged.mean, whole.batch_mean, rtol=1e-14)
        np.testing.assert_allclose(merged.variance, whole.channels(whole.biased_variance), rtol=1e-9)
    with pytest.raises(ValueError, match=r"as many channels.*\(3,\) and \(2,\)"):
        sent[0] + keras_bn.Moments(1.0, np.zeros(2), np.zeros(2))
    for other in ((1.0,), 1.0, None, np.zeros(3)[0]):
        with pytest.raises(TypeError, match=r"Moments can be added to Moments only.*Received: .* of type"):
            sent[0] + other
    for other in ((1.0,), 0, None):
        with pytest.raises(TypeError, match=r"Moments can be added to Moments only.*Received: .* of type"):
            other + sent[0]


@pytest.mark.parametrize("given", [lambda values: values, np.array, tf.constant, lambda values: np.float32(values)])
def test_moments_are_float64_before_and_behind_json_to_the_last_bit(given):
    moments = keras_bn.Moments(7, given([1, 2, 3]), given([1.0, 2.0, 0.1]))
    behind = keras_bn.Moments(**json.loads(json.dumps(moments.to_dict())))
    for one, other in zip((*moments, moments.variance), (*behind, behind.variance), strict=True):
        np.testing.assert_array_equal(one, other, strict=True)
        assert np.asarray(one).dtype == "float64"
    np.testing.assert_array_equal(moments.variance, np.asarray(given([1.0, 2.0, 0.1]), "float64") / 7)


def test_measured_moments_are_float64_before_and_behind_json_to_the_last_bit():
    model = four_layer_cnn()
    for moments in keras_bn.measure(model, pictures(8), verbose=0).values():
        behind = keras_bn.Moments(**json.loads(json.dumps(moments.to_dict())))
        np.testing.assert_array_equal(moments.variance, behind.variance, strict=True)
        assert behind.variance.dtype == "float64"


def test_moments_do_not_follow_the_arrays_they_were_made_of():
    mean = np.ones(3)
    moments = keras_bn.Moments(1.0, mean, np.zeros(3))
    mean[0] = np.nan
    np.testing.assert_array_equal(moments.mean, np.ones(3))


def test_layer_by_layer_shards_that_were_measured_apart_are_recalibrated_as_one():
    x = pictures()
    shards = np.split(x, [5, 70])
    whole, apart = four_layer_cnn(), four_layer_cnn()
    keras_bn.recalibrate(whole, x, verbose=0)
    before = snapshot(apart)
    names = list(keras_bn.measure(apart, shards[0], steps=1, verbose=0))
    assert names == [layer.name for layer in norms(apart)]
    assert snapshot(apart) == before
    for name in names:
        measured = [keras_bn.measure(apart, shard, layers=[name], verbose=0) for shard in shards]
        assert [list(part) for part in measured] == [[name]] * 3
        keras_bn.apply_statistics(apart, *measured)
    for one, other in zip(statistics(apart), statistics(whole), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


@pytest.mark.parametrize(
    ("measured", "error", "text"),
    [
        ({"nobody": keras_bn.Moments(1.0, np.zeros(4), np.zeros(4))}, ValueError, "Received: 'nobody' of shape (4,)"),
        ({"bn": keras_bn.Moments(1.0, np.zeros(3), np.zeros(3))}, ValueError, "Received: 'bn' of shape (3,)"),
        ({"bn": keras_bn.Moments(0.0, np.zeros(4), np.zeros(4))}, ValueError, "Received: 'bn' with count 0.0"),
        ({"bn": (1.0, np.zeros(4), np.zeros(4))}, TypeError, "as `keras_bn.measure` returns"),
        ([1.0], TypeError, "Received: [1.0]"),
        ({}, ValueError, "the moments of a normalization at least"),
    ],
)
def test_statistics_that_are_none_of_the_model_are_refused_and_nothing_is_changed(measured, error, text):
    model = keras.Sequential([keras.Input((4,)), keras_bn.BatchNormalization(name="bn")])
    good = {"bn": keras_bn.Moments(2.0, np.ones(4), np.ones(4))}
    before = snapshot(model)
    with pytest.raises(error, match=re.escape(text)):
        keras_bn.apply_statistics(model, *([good] if error is TypeError else []), measured)
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        (
            {"layers": "bn"},
            TypeError,
            "`layers` must be a list of names, one at least, or None. Received: layers=",
        ),
        ({"layers": ["other"]}, ValueError, "`layers` must be a list of some of ['bn']. Received: layers=['other']."),
        ({"layers": []}, ValueError, "Received: layers=[]."),
        ({"tolerance": -1}, ValueError, "`tolerance` must be a number not below 0, or None. Received: tolerance=-1."),
        ({"tolerance": "1"}, TypeError, "Received: tolerance='1'."),
    ],
)
def test_what_to_measure_is_checked(options, error, text):
    model = keras.Sequential([keras.Input((4,)), keras_bn.BatchNormalization(name="bn")])
    with pytest.raises(error, match=re.escape(text)):
        keras_bn.recalibrate(model, np.zeros((8, 4), "float32"), **options)


def test_of_many_normalizations_the_likely_ones_are_named():
    layers = [keras_bn.BatchNormalization(name=f"block{n}_norm") for n in range(30)]
    model = keras.Sequential([keras.Input((3,)), *layers])
    some = r"some of \['block17_norm', .*'\] and 25 more\. Received"
    with pytest.raises(ValueError, match=some):
        keras_bn.recalibrate(model, np.ones((4, 3)), layers=["blok17_norm"])
    with pytest.raises(ValueError, match=r"'block4_norm'\] and 25 more\. Received: 'other' of shape \(3,\)\."):
        keras_bn.apply_statistics(model, {"other": keras_bn.Moments(1.0, np.ones(3), np.ones(3))})
    with pytest.raises(ValueError, match=r"which has shape \(3,\)\. Received: 'block9_norm' of shape \(2,\)\."):
        keras_bn.apply_statistics(model, {"block9_norm": keras_bn.Moments(1.0, np.ones(2), np.ones(2))})


@pytest.mark.parametrize(
    "weights", [[1.0, 1.0, 1.0, -1.0], [1.0, np.nan, 1.0, 1.0], [-1.0] * 4, [np.inf, 1.0, 1.0, 1.0]]
)
def test_sample_weights_that_are_none_are_named(weights):
    inputs = keras.Input((2,))
    model = keras.Model(inputs, keras_bn.BatchNormalization()(inputs))
    x = np.array([[1, 2], [3, 4], [5, 9], [100, -7]], "float32")
    for take in (keras_bn.recalibrate, keras_bn.measure, keras_bn.health):
        with pytest.raises(ValueError, match="`data` must have sample weights that are finite and not negative"):
            take(model, (x, np.zeros(4), np.array(weights)), verbose=0)


@pytest.mark.parametrize(
    ("spoilt", "error", "text"),
    [
        ({"m2": [-5.0, 1.0]}, ValueError, "`m2` must not be negative. Received: m2=[-5.0, 1.0]."),
        ({"m2": [1.0]}, ValueError, "`m2` must have the shape of `mean`, (2,). Received: m2 of shape (1,)."),
        ({"m2": [np.inf, 1.0]}, ValueError, "`m2` must be finite. Received: m2=[inf, 1.0]."),
        ({"mean": [np.nan, 0.0]}, ValueError, "`mean` must be finite. Received: mean=[nan, 0.0]."),
        ({"mean": 1.0}, ValueError, "`mean` must have a number for each channel, one at least. Received: mean of sh"),
        ({"mean": [None, 1.0]}, TypeError, "`mean` must be real numbers, of one shape. Received: mean=[None, 1.0] of"),
        ({"mean": [[1.0], [1.0, 2.0]]}, TypeError, "`mean` must be real numbers, of one shape."),
        ({"count": -1.0}, ValueError, "`count` must not be negative. Received: count=-1.0."),
        ({"count": np.nan}, ValueError, "`count` must be finite. Received: count=nan."),
        ({"count": "1 value"}, TypeError, "`count` must be real numbers, of one shape. Received: count='1 value' of"),
        ({"count": [1.0, 2.0, 3.0]}, ValueError, "broadcasts to that of `mean`, (2,). Received: count of shape (3,)."),
        ({"unit": [[1.0, 1.0]]}, ValueError, "broadcasts to that of `mean`, (2,). Received: unit of shape (1, 2)."),
    ],
)
def test_moments_that_are_none_are_refused_where_they_are_made(spoilt, error, text):
    inputs = keras.Input((2,))
    model = keras.Model(inputs, keras_bn.BatchNormalization(name="norm")(inputs))
    moments = keras_bn.measure(model, np.random.default_rng(0).normal(size=(8, 2)).astype("float32"), verbose=0)["norm"]
    with pytest.raises(error, match=re.escape(text)):
        keras_bn.Moments(**{**moments.to_dict(), **spoilt})
    with pytest.raises(error, match=re.escape(text)):
        moments._replace(**spoilt)
    assert keras_bn.Moments(**moments.to_dict())._fields == ("count", "mean", "m2", "unit")


def test_moments_of_no_values_may_be_merged_and_count_nothing():
    none, one = keras_bn.Moments(0, [5.0], [0.0]), keras_bn.Moments(2, [1.0], [4.0])
    np.testing.assert_array_equal(none.variance, [0.0])
    for field, expected in zip(none + one, one, strict=True):
        np.testing.assert_array_equal(field, np.broadcast_to(expected, (1,)))


def test_nothing_measured_is_refused():
    model = keras.Sequential([keras.Input((2,)), keras_bn.BatchNormalization()])
    with pytest.raises(ValueError, match=r"`measured` must be what `keras_bn.measure` returned, once at least"):
        keras_bn.apply_statistics(model)


def test_weights_that_diverged_are_named_and_not_the_data():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3, name="dense"), keras_bn.BatchNormalization()])
    model.layers[0].kernel.assign(np.full((2, 3), np.nan))
    x = np.ones((8, 2), "float32")
    for take in (keras_bn.recalibrate, keras_bn.measure, keras_bn.drift, keras_bn.convert):
        with pytest.raises(ValueError, match=r"`model` must have finite weights.*Received: .*dense/kernel' with NaN"):
            take(model, x)
    assert any("dense/kernel" in one and "No data mends them" in one for one in keras_bn.health(model, x).findings)
    assert not any("mend them." in one.replace("mends them", "") for one in keras_bn.health(model, x).findings)


def test_a_negative_variance_is_a_finding_of_its_own():
    model = keras.Sequential([keras.Input((2,)), keras_bn.BatchNormalization(name="norm")])
    model.layers[0].moving_variance.assign([-1.0, 1.0])
    assert keras_bn.health(model).findings == ["norm: 1 channels have a moving variance below 0; recalibrate."]


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("verbose", "stream", "bar", "line"),
    [
        ("auto", io.StringIO, False, True),
        ("auto", Terminal, True, False),
        (1, io.StringIO, True, False),
        (2, Terminal, False, True),
        (0, Terminal, False, False),
    ],
)
def test_a_bar_is_drawn_where_someone_looks_on_and_else_a_line_is_written(verbose, stream, bar, line, monkeypatch):
    monkeypatch.delenv("PYCHARM_HOSTED", raising=False)
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    printed = stream()
    monkeypatch.setattr("sys.stdout", printed)
    keras_bn.measure(four_layer_cnn(), pictures(), batch_size=16, verbose=verbose)
    assert ("\r" in printed.getvalue()) == bar
    lines = printed.getvalue().splitlines()
    if line:
        assert len(lines) == 1
        assert re.match(r"(\d+)/\1 - ", lines[0])
    if verbose == 0:
        assert lines == []


@pytest.mark.parametrize(("dtype", "scale"), [("float32", 1e30), ("float16", 400.0)])
@pytest.mark.parametrize("order", ["sequential", "joint"])
def test_statistics_that_the_layer_cannot_hold_are_refused(dtype, scale, order):
    model = keras.Sequential([keras.Input((4,)), keras_bn.BatchNormalization(dtype=dtype, name="norm")])
    before = model.get_weights()
    x = (scale * np.random.default_rng(0).normal(size=(64, 4))).astype("float32")
    with pytest.raises(ValueError, match=rf"`data` must have statistics .*'norm' keeps them in {dtype}.*a variance of"):
        keras_bn.recalibrate(model, x, order=order, verbose=0)
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(new, old)


def test_moments_that_a_layer_cannot_hold_change_none_of_them():
    layers = [keras_bn.BatchNormalization(name=name) for name in ("first", "second")]
    model = keras.Sequential([keras.Input((1,)), *layers])
    measured = {"first": keras_bn.Moments(2.0, [3.0], [1.0]), "second": keras_bn.Moments(1.0, [1e300], [0.0])}
    with pytest.raises(ValueError, match=r"`measured` must have statistics .*'second' keeps .*a mean of 1e\+300"):
        keras_bn.apply_statistics(model, measured)
    assert float(layers[0].moving_mean[0]) == 0.0


def test_four_arrays_in_a_tuple_are_no_batches():
    x = pictures(8)
    with pytest.raises(ValueError, match=r"`data` must have batches of inputs.* Received: a batch of 4 parts"):
        keras_bn.recalibrate(four_layer_cnn(), (x, x, x, x), verbose=0)


def test_a_wrong_shape_is_said_and_not_the_values():
    with pytest.raises(
        ValueError, match=r"Received: Expected shape \(None, 8, 8, 3\), .* shape \(8, 8, 8\)$"
    ) as raised:
        keras_bn.recalibrate(four_layer_cnn(), pictures(8)[..., 0], verbose=0)
    assert "[[" not in str(raised.value)
