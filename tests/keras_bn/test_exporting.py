"""export(): where versions go, what they are called, and that they compute what the model computes."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_bn


def small_cnn(**output):
    """Picture -> convolution -> batch normalization -> classes."""
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(4, 3),
            keras.layers.BatchNormalization(),
            keras.layers.Flatten(),
            keras.layers.Dense(3, **output),
        ]
    )


def off_unit_statistics(model, seed=0):
    """Statistics and affine parameters that a forgotten term would show in."""
    rng = np.random.default_rng(seed)
    for layer in model._flatten_layers():
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.set_weights([rng.uniform(0.5, 2.0, w.shape).astype("float32") for w in layer.get_weights()])
    return model


def serve(path, **inputs):
    """What a server answers: the version loaded afresh, `serving_default` called with names."""
    answer = tf.saved_model.load(str(path)).signatures["serving_default"](
        **{name: tf.constant(value) for name, value in inputs.items()}
    )
    return {name: value.numpy() for name, value in answer.items()}


def images(n=5, seed=1):
    return np.random.default_rng(seed).normal(size=(n, 8, 8, 1)).astype("float32")


def test_versions_count_up_from_one(tmp_path):
    model = small_cnn()
    paths = [keras_bn.export(model, tmp_path / "served" / "small").path for _ in range(2)]
    assert [path.relative_to(tmp_path).as_posix() for path in paths] == ["served/small/1", "served/small/2"]


def test_the_next_version_is_one_more_than_the_highest(tmp_path):
    for name in ("7", "12", "notes", "99.old"):
        (tmp_path / name).mkdir()
    assert keras_bn.export(small_cnn(), tmp_path).version == 13


def test_nothing_but_versions_is_left_in_the_base_path(tmp_path):
    keras_bn.export(small_cnn(), tmp_path)
    assert [child.name for child in tmp_path.iterdir()] == ["1"]


def test_a_failed_export_leaves_no_folder(tmp_path, monkeypatch):
    def disk_full(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(tf.saved_model, "save", disk_full)
    with pytest.raises(OSError, match="No space left"):
        keras_bn.export(small_cnn(), tmp_path / "served" / "small")
    assert list(tmp_path.iterdir()) == []


def test_a_given_version_that_is_there_is_refused_and_kept(tmp_path):
    model = small_cnn()
    path = keras_bn.export(model, tmp_path, version=5).path
    before = (path / "saved_model.pb").read_bytes()
    with pytest.raises(ValueError, match=r"`version` must be a version that is not there yet.*version=5, .*\[5\]"):
        keras_bn.export(model, tmp_path, version=5)
    assert (path / "saved_model.pb").read_bytes() == before


def test_a_picture_classifier_takes_image_and_gives_probabilities(tmp_path):
    model = off_unit_statistics(small_cnn(activation="softmax"))
    answer = serve(keras_bn.export(model, tmp_path).path, image=images())
    np.testing.assert_allclose(answer["probabilities"], model.predict(images(), verbose=0), atol=1e-6)


def test_given_names_of_inputs_and_outputs_are_kept(tmp_path):
    inputs = {"height": keras.Input((1,), name="height"), "weight": keras.Input((1,), name="weight")}
    joined = keras.layers.Concatenate()(list(inputs.values()))
    outputs = [keras.layers.Dense(1, name="age")(joined), keras.layers.Dense(2, activation="softmax")(joined)]
    exported = keras_bn.export(keras.Model(inputs, outputs), tmp_path)
    assert (sorted(exported.inputs), sorted(exported.outputs)) == (["height", "weight"], ["age", "probabilities"])


def test_automatic_names_never_reach_the_signature(tmp_path):
    a, b = keras.Input((2,)), keras.Input((2,))
    model = keras.Model([a, b], [keras.layers.Dense(1)(a), keras.layers.Dense(1)(b)])
    exported = keras_bn.export(model, tmp_path)
    assert (sorted(exported.inputs), sorted(exported.outputs)) == (["input_1", "input_2"], ["output_1", "output_2"])


def test_dictionary_outputs_keep_their_keys(tmp_path):
    x = keras.Input((4,))
    doubled, tripled = keras.layers.Rescaling(2.0)(x), keras.layers.Rescaling(3.0)(x)
    answer = serve(
        keras_bn.export(keras.Model(x, {"z_double": doubled, "a_triple": tripled}), tmp_path).path,
        inputs=np.ones((1, 4), "float32"),
    )
    assert (answer["z_double"].max(), answer["a_triple"].max()) == (2.0, 3.0)


@pytest.mark.parametrize("fold", [True, False])
def test_training_true_written_by_the_author_is_overruled(tmp_path, fold):
    x = keras.Input((4,))
    y = keras.layers.Dropout(0.9)(keras.layers.BatchNormalization()(x, training=True), training=True)
    model = keras.Model(x, y)
    batch = np.random.default_rng(0).normal(5, 3, size=(16, 4)).astype("float32")
    answer = serve(keras_bn.export(model, tmp_path, fold=fold).path, inputs=batch)
    np.testing.assert_allclose(answer["outputs"], batch / np.sqrt(1.001), rtol=1e-5)


@pytest.mark.parametrize("norm", [keras.layers.BatchNormalization, keras_bn.BatchNormalization])
def test_statistics_switched_to_the_batch_are_not_exported(tmp_path, norm):
    model = off_unit_statistics(keras.Sequential([keras.Input((4,)), norm()]))
    batch = np.random.default_rng(0).normal(5, 3, size=(16, 4)).astype("float32")
    expected = model(batch)
    with keras_bn.use_statistics(model, "batch"):
        path = keras_bn.export(model, tmp_path).path
        assert np.abs(model(batch) - expected).max() > 0.1
    np.testing.assert_allclose(serve(path, inputs=batch)["outputs"], expected, rtol=1e-5)


def test_after_export_the_model_trains_as_before(tmp_path):
    model = small_cnn()
    keras_bn.export(model, tmp_path)
    model(images(), training=True)
    assert np.abs(model.layers[1].moving_mean.numpy()).max() > 0
    assert not any("call" in vars(layer) for layer in model._flatten_layers())


def test_a_subclassed_model_exports_once_it_was_called(tmp_path):
    class Doubler(keras.Model):
        def __init__(self):
            super().__init__()
            self.norm = keras.layers.BatchNormalization()

        def call(self, inputs):
            return self.norm(inputs, training=True)

    model = Doubler()
    with pytest.raises(ValueError, match="`model` must be built"):
        keras_bn.export(model, tmp_path)
    model(np.ones((2, 3), "float32"))
    off_unit_statistics(model)
    batch = np.ones((4, 3), "float32")
    expected = model.norm(batch, training=False)
    with pytest.raises(
        ValueError, match=r"`fold` must be False for a subclassed model.*Received: fold=True, model='doub"
    ):
        keras_bn.export(model, tmp_path)
    answer = serve(keras_bn.export(model, tmp_path, fold=False).path, inputs=batch)
    np.testing.assert_allclose(answer["outputs"], expected, rtol=1e-6)


def test_keys_of_dictionaries_name_inputs_and_outputs_of_a_subclassed_model(tmp_path):
    class Station(keras.Model):
        def __init__(self):
            super().__init__()
            self.norm = keras_bn.BatchNormalization()

        def call(self, inputs, training=None):
            x = self.norm(inputs["temperature"] - inputs["dew point"], training=training)
            return {"spread": x, "Sign": x > 0}

    rng = np.random.default_rng(0)
    inputs = {name: rng.normal(size=(6, 3)).astype("float32") for name in ("temperature", "dew point")}
    model = Station()
    model(inputs)
    exported = keras_bn.export(model, tmp_path, fold=False, warmup=inputs)
    assert list(exported.inputs) == ["dew_point", "temperature"]
    assert list(exported.outputs) == ["Sign", "spread"]
    answer = serve(exported.path, temperature=inputs["temperature"], dew_point=inputs["dew point"])
    np.testing.assert_allclose(answer["spread"], model(inputs)["spread"], rtol=1e-6)
    (drift,) = keras_bn.drift(exported.path, {"temperature": inputs["temperature"], "dew_point": inputs["dew point"]})
    (expected,) = keras_bn.drift(model, inputs)
    assert drift["layer"] == expected["layer"]
    assert drift["kl"] == pytest.approx(expected["kl"], rel=1e-4)


def test_any_batch_size_is_served_also_where_the_input_had_a_fixed_one(tmp_path):
    x = keras.Input(batch_shape=(7, 4), name="features")
    path = keras_bn.export(keras.Model(x, keras.layers.BatchNormalization()(x)), tmp_path).path
    assert serve(path, features=np.ones((3, 4), "float32"))["outputs"].shape == (3, 4)


def test_half_precision_never_reaches_the_wire(tmp_path):
    dense, norm = keras.layers.Dense(2, dtype="mixed_float16"), keras_bn.BatchNormalization(dtype="mixed_float16")
    model = off_unit_statistics(keras.Sequential([keras.Input((4,), dtype="float16"), dense, norm]))
    exported = keras_bn.export(model, tmp_path, fold=False)
    assert (exported.inputs["inputs"].dtype, exported.outputs["outputs"].dtype) == (tf.float32, tf.float32)
    assert serve(exported.path, inputs=np.ones((2, 4), "float32"))["outputs"].dtype == np.float32


def test_lookup_tables_travel_with_the_model(tmp_path):
    pytest.importorskip("tensorflow_serving.apis")
    layer = keras.layers.StringLookup(vocabulary=["shirt", "shoe"])
    x = keras.Input((1,), dtype="string", name="article")
    with pytest.raises(ValueError, match="`warmup` must be given for a model that takes strings"):
        keras_bn.export(keras.Model(x, layer(x)), tmp_path, fold=False)
    path = keras_bn.export(keras.Model(x, layer(x)), tmp_path, warmup=np.array([["hat"], ["shoe"]])).path
    assert serve(path, article=[["shoe"]])["outputs"].tolist() == [[2]]


def test_wrong_arguments_are_named(tmp_path):
    with pytest.raises(TypeError, match=r"`model` must be a `keras.Model`. Received: model='m' of type str"):
        keras_bn.export("m", tmp_path)
    with pytest.raises(TypeError, match=r"`version` must be an integer.*version='3'"):
        keras_bn.export(small_cnn(), tmp_path, version="3")
    with pytest.raises(ValueError, match=r"`version` must be an integer from 0.*version=-1"):
        keras_bn.export(small_cnn(), tmp_path, version=-1)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"`model_base_path` must be a folder.*which is a file"):
        keras_bn.export(small_cnn(), tmp_path / "file")


@pytest.mark.parametrize(("arguments", "error", "text"), [
    ({"version": 10**20}, ValueError, r"`version` must be an integer from 0 to 2\*\*63 - 1"),
    ({"fold": "no"}, TypeError, "`fold` must be True or False. Received: fold='no'"),
    ({"overwrite": "x"}, TypeError, "`overwrite` must be True or False"),
])  # fmt: skip
def test_arguments_that_would_be_taken_for_others_are_refused(tmp_path, arguments, error, text):
    model = keras.Sequential([keras.Input((2,)), keras_bn.BatchNormalization()])
    with pytest.raises(error, match=text):
        keras_bn.export(model, tmp_path, **arguments)
