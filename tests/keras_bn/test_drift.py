"""The distance of one normal distribution from another, and of examples from the population, pooled exactly."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras_bn_serving.client import drift as client_drift

import keras_bn
from keras_bn.drift.figures import distance, pooled, summary
from keras_bn.drift.rows import row_figures
from keras_bn.drift.versions import figures_by_layer
from tests.reference import Reference, drift_of


def test_distance_agrees_with_numerical_integration():
    mean, variance, mean0, variance0, epsilon = 1.0, 2.0, -0.5, 0.7, 0.3
    one = distance([mean], [variance], [mean0], [variance0], epsilon)
    v, r = variance + epsilon, variance0 + epsilon
    x = np.linspace(-30, 30, 200_001)
    p = np.exp(-((x - mean) ** 2) / (2 * v)) / np.sqrt(2 * np.pi * v)
    log_q = -((x - mean0) ** 2) / (2 * r) - np.log(2 * np.pi * r) / 2
    log_p = -((x - mean) ** 2) / (2 * v) - np.log(2 * np.pi * v) / 2
    np.testing.assert_allclose(one.kl, [np.sum(p * (log_p - log_q)) * (x[1] - x[0])], rtol=1e-9)
    np.testing.assert_allclose(one.mean_shift, [1.5 / np.sqrt(r)])
    np.testing.assert_allclose(one.variance_ratio, [v / r])


def test_a_channel_that_never_varies_is_at_distance_zero_from_itself():
    one = distance([3.0], [0.0], [3.0], [0.0], 1e-3)
    assert (float(one.kl[0]), float(one.variance_ratio[0])) == (0.0, 1.0)


def test_the_summary_takes_the_variance_ratio_farthest_from_one():
    one = distance([0.0, 0, 0], [1.0, 3, 0.1], [0.0, 0, 0], [1.0, 1, 1], 0.0)
    assert float(summary(one)["variance_ratio"]) == 0.1


def set_statistics(model, seed=0):
    """Statistics far from those at the start, in several orders of magnitude."""
    rng = np.random.default_rng(seed)
    for layer in model._flatten_layers():
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.moving_mean.assign(rng.normal(0, 30, layer.moving_mean.shape))
            layer.moving_variance.assign(10 ** rng.uniform(-3, 3, layer.moving_variance.shape))
    return model


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(20, 5, shape).astype("float32")


def single(norm, shape, **options):
    x = keras.Input(shape, **options)
    return set_statistics(keras.Model(x, norm(x)))


CASES = {
    "vectors": lambda: (keras.layers.BatchNormalization(name="norm"), (6,), -1),
    "pictures": lambda: (keras_bn.BatchNormalization(name="norm"), (9, 5, 4), -1),
    "channels first": lambda: (keras_bn.BatchNormalization(axis=1, name="norm"), (3, 9, 5), 1),
    "two axes": lambda: (keras_bn.BatchNormalization(axis=[1, 3], name="norm"), (3, 9, 2), [1, 3]),
    "volumes": lambda: (keras.layers.BatchNormalization(name="norm"), (2, 3, 4, 5), -1),
}


@pytest.mark.parametrize("case", CASES)
def test_pooled_rows_are_the_batch_in_process_and_served(case, tmp_path):
    norm, shape, axis = CASES[case]()
    model = single(norm, shape, name="x")
    x = normal(37, *shape)
    expected = drift_of(Reference(x, axis, epsilon=norm.epsilon), norm.moving_mean, norm.moving_variance)
    one = pooled(row_figures(model, x)["norm"])
    for name, value in expected.items():
        np.testing.assert_allclose(getattr(one, name), value.ravel(), rtol=2e-5, atol=1e-6)
    version = keras_bn.export(model, tmp_path).path
    answer = tf.saved_model.load(str(version)).signatures["batch_norm_drift"](x=tf.constant(x))
    served = pooled(figures_by_layer(answer)["norm"])
    for name, value in expected.items():
        np.testing.assert_allclose(getattr(served, name), value.ravel(), rtol=2e-5, atol=1e-6)
    (asked_of_client,) = client_drift.pooled({name: value.numpy() for name, value in answer.items()})
    (in_process,) = keras_bn.drift(model, x, batch_size=5)
    (of_version,) = keras_bn.drift(version, x, batch_size=11)
    oracle = {
        "mean_shift": np.sqrt(np.mean(expected["mean_shift"] ** 2)),
        "variance_ratio": expected["variance_ratio"].ravel()[np.abs(np.log(expected["variance_ratio"])).argmax()],
        "kl": expected["kl"].mean(),
    }
    for row in (asked_of_client, in_process, of_version):
        assert row["layer"] == "norm"
        assert {name: row[name] for name in oracle} == pytest.approx(oracle, rel=2e-5)


def shared_twice():
    a, b = keras.Input((1, 3), name="a"), keras.Input((5, 3), name="b")
    norm = keras.layers.BatchNormalization(name="norm")
    return set_statistics(keras.Model([a, b], keras.layers.Concatenate(1)([norm(a), norm(b)]))), norm


def test_a_layer_called_several_times_is_pooled_over_all_its_values(tmp_path):
    model, norm = shared_twice()
    inputs = {"a": normal(7, 1, 3), "b": 2 * normal(7, 5, 3, seed=1)}
    values = np.concatenate([inputs["a"], inputs["b"]], axis=1)
    expected = drift_of(Reference(values, -1), norm.moving_mean, norm.moving_variance)["kl"].mean()
    version = keras_bn.export(model, tmp_path, fold=False).path
    for asked in (model, version, str(version)):
        (row,) = keras_bn.drift(asked, inputs, batch_size=3)
        assert row["kl"] == pytest.approx(expected, rel=2e-5)
    figures = row_figures(model, [inputs["a"], inputs["b"]])["norm"]
    assert figures.count.numpy().tolist() == [[6.0] * 3] * 7


@pytest.mark.parametrize("norm", [keras.layers.BatchNormalization, keras_bn.BatchNormalization])
def test_masked_steps_do_not_count(norm, tmp_path):
    x = keras.Input((6, 3), name="x")
    layer = norm(name="norm")
    model = set_statistics(keras.Model(x, layer(keras.layers.Masking()(x))))
    steps = normal(5, 6, 3)
    lengths = [6, 1, 3, 0, 2]
    for row, length in enumerate(lengths):
        steps[row, length:] = 0
    kept = np.concatenate([steps[row, :length] for row, length in enumerate(lengths)])
    expected = drift_of(Reference(kept, -1), layer.moving_mean, layer.moving_variance)["kl"].mean()
    assert row_figures(model, steps)["norm"].count.numpy()[:, 0].tolist() == lengths
    version = keras_bn.export(model, tmp_path, fold=False).path
    for asked in (model, version):
        assert keras_bn.drift(asked, steps, batch_size=2)[0]["kl"] == pytest.approx(expected, rel=2e-5)


def test_where_nothing_counts_nothing_is_known():
    x = keras.Input((6, 3))
    model = keras.Model(x, keras.layers.BatchNormalization()(keras.layers.Masking()(x)))
    assert np.isnan(keras_bn.drift(model, np.zeros((2, 6, 3), "float32"))[0]["kl"])


class NormalizingCell(keras.layers.Layer):
    state_size = output_size = 4

    def build(self, shape):
        self.norm = keras.layers.BatchNormalization(name="inside")
        self.norm.build(shape)

    def call(self, x, states):
        y = self.norm(x) + states[0]
        return y, [y]


def test_a_normalization_inside_a_loop_is_named_and_the_way_out(tmp_path):
    x = keras.Input((5, 4))
    model = keras.Model(x, keras.layers.RNN(NormalizingCell())(x))
    with pytest.raises(ValueError, match=r"not inside a loop .* with `drift=False`. Received: \['.*inside'\] called"):
        keras_bn.export(model, tmp_path, fold=False)
    assert keras_bn.export(model, tmp_path, fold=False, drift=False).signatures == ["serving_default"]


def test_time_steps_inside_the_batch_axis_are_pooled_by_example(tmp_path):
    norm = keras.layers.BatchNormalization(name="norm")
    x = keras.Input((5, 4), name="x")
    rows = keras.layers.Lambda(lambda t: tf.reshape(t, (-1, 4)), output_shape=(4,))(x)
    back = keras.layers.Lambda(lambda t: tf.reshape(t, (-1, 5, 4)), output_shape=(5, 4))(norm(rows))
    model = set_statistics(keras.Model(x, back))
    values = normal(7, 5, 4)
    figures = row_figures(model, values)["norm"]
    assert figures.count.numpy().tolist() == [[5.0] * 4] * 7
    version = keras_bn.export(model, tmp_path, fold=False).path
    expected = drift_of(Reference(values, -1), norm.moving_mean, norm.moving_variance)["kl"].mean()
    assert keras_bn.drift(version, values)[0]["kl"] == pytest.approx(expected, rel=2e-5)


def test_wrong_arguments_of_drift_are_named(tmp_path):
    model, _ = shared_twice()
    version = keras_bn.export(model, tmp_path, fold=False).path
    with pytest.raises(
        ValueError, match=r"`inputs` must be a dictionary of arrays with the names \['a', 'b'\].*ndarray"
    ):
        keras_bn.drift(version, normal(7, 3))
    with pytest.raises(ValueError, match=r"`inputs` must have one example at least,.*shapes \[\(7, 1, 3"):
        keras_bn.drift(version, {"a": normal(7, 1, 3), "b": normal(6, 5, 3)})
    with pytest.raises(TypeError, match=r"`model` must be a `keras.Model` or the folder of an exported version"):
        keras_bn.drift(3, normal(7, 3))
    with pytest.raises(ValueError, match=r"`batch_size` must be a positive integer. Received: batch_size=0"):
        keras_bn.drift(model, normal(7, 3), batch_size=0)
    plain = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)], name="plain")
    with pytest.raises(ValueError, match=r"`model` must have a batch normalization. Received: model='plain'"):
        keras_bn.drift(plain, normal(7, 3))
    version = keras_bn.export(plain, tmp_path).path
    with pytest.raises(ValueError, match=r"`model` must be a version with the signature batch_norm_drift"):
        keras_bn.drift(version, normal(7, 3))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_data_that_is_not_finite_is_refused_with_its_place(value, tmp_path):
    model = single(keras.layers.BatchNormalization(name="norm"), (6,), name="x")
    x = normal(7, 6)
    x[4, 2] = value
    for asked in (model, keras_bn.export(model, tmp_path).path):
        with pytest.raises(ValueError, match=r"`inputs` must be finite. Received: example 4 .* input of layer 'norm'"):
            keras_bn.drift(asked, x, batch_size=3)


def test_what_a_version_does_not_take_is_refused_in_words(tmp_path):
    x = keras.Input((None, None, 3), name="x")
    norm = keras.layers.BatchNormalization()(keras.layers.Conv2D(2, 5)(x))
    model = keras.Model(x, keras.layers.GlobalAveragePooling2D()(norm))
    version = keras_bn.export(model, tmp_path).path
    with pytest.raises(ValueError, match=r"`inputs` must have shape \(None, None, None, 3\).*'x'.*shape \(2, 9, 3\)"):
        keras_bn.drift(version, normal(2, 9, 3))
    with pytest.raises(ValueError, match=r"`inputs` must be real numbers for input 'x'. Received: strings"):
        keras_bn.drift(version, np.full((2, 9, 9, 3), "a"))
    for asked in (version, model):
        with pytest.raises(
            ValueError, match=r"^`inputs` must be what the model can compute with.* Received: [^\x1b\n]*$"
        ):
            keras_bn.drift(asked, normal(2, 3, 3, 3))


def test_a_base_path_in_place_of_a_version_is_told_the_version(tmp_path):
    model = single(keras.layers.BatchNormalization(), (6,))
    for number in (9, 10):
        keras_bn.export(model, tmp_path, version=number)
    with pytest.raises(ValueError, match=r"`model` must be .* which has versions: pass .*/10\.$"):
        keras_bn.drift(tmp_path, normal(2, 6))
    with pytest.raises(ValueError, match=r"`model` must be .* Received: model='.*nowhere'\.$"):
        keras_bn.drift(tmp_path / "nowhere", normal(2, 6))


def test_the_client_refuses_data_that_is_not_finite_too():
    model = single(keras.layers.BatchNormalization(name="norm"), (6,), name="x")
    x = normal(7, 6)
    x[4, 2] = np.nan

    def predict(rows):
        yield
        figures = row_figures(model, rows)["norm"]._asdict()
        shape = (len(rows), 1)
        return {"layer": np.full(shape, "norm"), "channels": np.full(shape, 6)} | {
            k: v.numpy() for k, v in figures.items()
        }

    with pytest.raises(ValueError, match=r"`inputs` must be finite. Received: example 4 "):
        list(client_drift.operation(predict, x, 3))
    x[4, 2] = 0
    assert len(list(client_drift.operation(predict, x, 3))) == 3


def test_sparse_examples_are_measured_as_dense_ones():
    dense = np.random.default_rng(0).normal(size=(10, 4)).astype("float32")
    dense[::2, 1:3] = 0
    model = keras.Sequential([keras.Input((4,), sparse=True), keras.layers.Dense(3), keras_bn.BatchNormalization()])
    rows = [keras_bn.drift(model, given, batch_size=3)[0]["kl"] for given in (tf.sparse.from_dense(dense), dense)]
    assert rows[0] == pytest.approx(rows[1], rel=1e-5)
