"""health(): which normalizations are ill, and which are behind a gap between training and validation."""

import keras
import numpy as np
import pytest

import keras_bn
from keras_bn.tables import table


def three_norms():
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((4,), name="x")])
    for name in ("first", "second", "third"):
        model.add(keras.layers.Dense(4, kernel_initializer="orthogonal"))
        model.add(keras.layers.BatchNormalization(name=name))
    return model


def normal_data(n=512):
    return np.random.default_rng(0).normal(2, 3, (n, 4)).astype("float32")


def test_a_recalibrated_model_is_healthy():
    model = three_norms()
    keras_bn.recalibrate(model, normal_data(), order="joint", batch_size=64, verbose=0)
    report = keras_bn.health(model, normal_data(), batch_size=64, verbose=0)
    assert (report.suspects, report.findings) == ([], [])
    assert max(layer.kl for layer in report.layers) < 1e-6


def test_the_layer_with_the_wrong_statistics_is_named_and_only_that():
    model = three_norms()
    keras_bn.recalibrate(model, normal_data(), order="joint", batch_size=64, verbose=0)
    model.get_layer("second").moving_variance.assign(model.get_layer("second").moving_variance * 4)
    report = keras_bn.health(model, normal_data(), batch_size=64, verbose=0)
    assert report.suspects == ["second"]
    assert "because of: second." in str(report)


def test_a_layer_no_farther_off_than_its_own_batches_is_not_named():
    """With batches of four the batch statistics training sees are far from the population themselves."""
    model = three_norms()
    keras_bn.recalibrate(model, normal_data(), order="joint", batch_size=4, verbose=0)
    model.get_layer("first").moving_variance.assign(model.get_layer("first").moving_variance * 1.25)
    report = keras_bn.health(model, normal_data(), batch_size=4, verbose=0)
    assert 0.01 < report.layers[0].kl < report.layers[0].batch_kl
    assert report.suspects == []


def test_the_worst_suspect_comes_first():
    model = three_norms()
    keras_bn.recalibrate(model, normal_data(), order="joint", batch_size=64, verbose=0)
    model.get_layer("first").moving_variance.assign(model.get_layer("first").moving_variance * 2)
    model.get_layer("third").moving_variance.assign(model.get_layer("third").moving_variance * 9)
    assert keras_bn.health(model, normal_data(), batch_size=64, verbose=0).suspects == ["third", "first"]


def test_batch_kl_is_the_mean_divergence_of_the_batches():
    model = keras.Sequential([keras.Input((4,)), keras.layers.BatchNormalization()])
    x = normal_data(60)
    mean, variance = x.astype("float64").mean(0), x.astype("float64").var(0) + 1e-3
    expected = []
    for part in np.split(x.astype("float64"), 3):
        v = part.var(0) + 1e-3
        expected.append(((v + (part.mean(0) - mean) ** 2) / variance - 1 - np.log(v / variance)) / 2)
    layer = keras_bn.health(model, x, batch_size=20, verbose=0).layers[0]
    np.testing.assert_allclose(layer.batch_kl, np.mean(expected), rtol=1e-6)


def test_dead_channels_are_listed_without_data():
    model = three_norms()
    norm = model.get_layer("second")
    norm.gamma.assign([1, 1e-5, 1, 1])
    norm.moving_variance.assign([1, 1, 1, 0])
    report = keras_bn.health(model)
    assert [layer.dead for layer in report.layers] == [[], [1, 3], []]
    assert "second: 2 of 4 channels are dead (gamma near 0: 1, variance near 0: 1)." in report.findings


def test_non_finite_statistics_and_batches_are_found_and_left_out():
    model = three_norms()
    model.get_layer("third").moving_mean.assign([0, np.nan, 0, 0])
    x = normal_data(32)
    x[9, 0] = np.inf
    report = keras_bn.health(model, x, batch_size=8, verbose=0)
    assert [layer.non_finite for layer in report.layers] == [[], [], [1]]
    assert [layer.non_finite_batches for layer in report.layers] == [1, 0, 0]
    assert "first: 1 batches of the data are not finite here; mend them." in report.findings
    assert np.isfinite(report.layers[0].kl)


def test_a_layer_whose_input_is_never_finite_is_named_and_those_before_it_are_measured():
    model = three_norms()
    model.layers[2].kernel.assign(np.full((4, 4), np.inf))
    report = keras_bn.health(model, normal_data(32), batch_size=8, verbose=0)
    assert [layer.non_finite_batches for layer in report.layers] == [0, 4, 0]
    assert [layer.unmeasured for layer in report.layers] == [False, True, True]
    assert np.isfinite(report.layers[0].kl)
    assert "third: nothing of the data that counts and is finite gets here; it was not measured." in report.findings


def test_a_model_that_is_not_built_is_refused():
    model = keras.Sequential([keras.layers.BatchNormalization()])
    for function in (lambda: keras_bn.health(model), lambda: keras_bn.recalibrate(model, normal_data())):
        with pytest.raises(ValueError, match=r"`model` must be built: give it an `Input`, or call it once"):
            function()


def test_normalizations_that_a_model_never_calls_do_not_hinder():
    class Spare(keras.Model):
        def __init__(self):
            super().__init__()
            self.used, self.spare = keras.layers.BatchNormalization(name="used"), keras.layers.BatchNormalization()

        def call(self, x):
            return self.used(x)

    model = Spare()
    model(normal_data(4))
    assert [layer.name for layer in keras_bn.health(model, normal_data(), verbose=0).layers] == ["used"]


def test_health_leaves_every_variable_bit_for_bit():
    model = three_norms()
    before = [v.numpy().tobytes() for v in model.variables]
    keras_bn.health(model, normal_data(), verbose=0)
    assert [v.numpy().tobytes() for v in model.variables] == before


def test_numbers_without_data_are_none_in_json():
    layer = keras_bn.health(three_norms()).to_dict()["layers"][0]
    assert (layer["kl"], layer["channels"]) == (None, 4)


def test_the_picture_is_a_png(tmp_path):
    pytest.importorskip("matplotlib")
    keras_bn.health(three_norms(), normal_data(), verbose=0).save_picture(tmp_path / "health.png")
    assert (tmp_path / "health.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_steps_without_data_are_refused():
    with pytest.raises(ValueError, match=r"`steps` must be None without `data`.*Received: steps=3, data=None\.$"):
        keras_bn.health(keras.Sequential([keras.Input((4,)), keras_bn.BatchNormalization()]), steps=3)


def test_a_picture_needs_data(tmp_path):
    with pytest.raises(ValueError, match=r"`data` must have been given to `health`"):
        keras_bn.health(three_norms()).save_picture(tmp_path / "health.png")


def test_tables_align_numbers_right_and_text_left():
    lines = table(["layer", "KL"], [["a", 0.5], ["longer", 12.25]]).splitlines()
    assert lines == ["layer      KL", "-------------", "a         0.5", "longer  12.25"]
