"""export(): what a person can ask an exported model, and what lies beside it."""

import json
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_bn
from tests.reference import Reference, drift_of

LABELS = ["shirt", "shoe", "hat"]


@pytest.fixture(scope="module")
def model():
    """A picture classifier whose statistics are those of `pictures()`."""
    keras.utils.set_random_seed(4)
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(4, 3, name="conv"),
            keras.layers.BatchNormalization(name="early"),
            keras.layers.ReLU(),
            keras.layers.Flatten(),
            keras.layers.Dense(6),
            keras.layers.BatchNormalization(name="late"),
            keras.layers.Dense(3, activation="softmax"),
        ]
    )
    keras_bn.recalibrate(model, scaled(pictures(64)), verbose=0)
    return model


def pictures(n=8, seed=0):
    """Dark uint8 pictures."""
    return np.random.default_rng(seed).integers(0, 100, (n, 8, 8, 1), "uint8")


def scaled(x):
    return tf.cast(x, tf.float32) / 255.0


def ask(path, signature="serving_default", **inputs):
    loaded = tf.saved_model.load(str(path))
    answer = loaded.signatures[signature](**{name: tf.constant(value) for name, value in inputs.items()})
    return {name: value.numpy() for name, value in answer.items()}


def test_folding_is_part_of_the_export_and_reported(tmp_path, model):
    exported = keras_bn.export(model, tmp_path, drift=False)
    loaded = tf.saved_model.load(str(exported.path))
    assert exported.folding.absorbed == 2
    assert len(loaded.signatures["serving_default"].variables) == 6  # Three kernels and biases.
    assert exported.errors.relative < 1e-4


def test_without_folding_the_normalizations_stay(tmp_path, model):
    exported = keras_bn.export(model, tmp_path, fold=False)
    assert exported.folding is None
    loaded = tf.saved_model.load(str(exported.path))
    assert len(loaded.signatures["serving_default"].variables) == 14


def test_labels_name_the_likeliest_classes_in_order(tmp_path, model):
    exported = keras_bn.export(model, tmp_path, labels=LABELS)
    answer = ask(exported.path, image=scaled(pictures()).numpy())
    order = np.argsort(-answer["probabilities"], axis=1)
    assert answer["top_labels"].astype(str).tolist() == np.array(LABELS)[order].tolist()
    np.testing.assert_array_equal(answer["top_scores"], -np.sort(-answer["probabilities"], axis=1))


def sigmoid_model(units):
    layers = [keras.layers.Dense(4), keras_bn.BatchNormalization(), keras.layers.Dense(units, activation="sigmoid")]
    return keras.Sequential([keras.Input((8,), name="x"), *layers])


def rows():
    return np.random.default_rng(3).normal(size=(6, 8)).astype("float32")


def test_a_single_sigmoid_takes_one_label_which_every_row_gets(tmp_path):
    answer = ask(keras_bn.export(sigmoid_model(1), tmp_path, labels=["ripe"]).path, x=rows())
    assert answer["probabilities"].min() < 0.5
    assert answer["top_labels"].astype(str).tolist() == [["ripe"]] * 6
    np.testing.assert_array_equal(answer["top_scores"], answer["probabilities"])


def test_two_labels_of_a_single_sigmoid_are_refused_with_the_way_out(tmp_path):
    model = sigmoid_model(1)
    text = r"in a column for each, `Concatenate\(\)\(\[1 - p, p\]\)`\. Received: 2 labels for .*\(None, 1\)"
    with pytest.raises(ValueError, match=text):
        keras_bn.export(model, tmp_path, labels=["unripe", "ripe"])
    p = model.outputs[0]
    both = keras.Model(model.inputs, keras.layers.Concatenate(name="probabilities")([1 - p, p]))
    answer = ask(keras_bn.export(both, tmp_path, labels=["unripe", "ripe"]).path, x=rows())
    ripe = model.predict(rows(), verbose=0)[:, 0] > 0.5
    assert 0 < ripe.sum() < 6
    assert (answer["top_labels"].astype(str)[:, 0] == "ripe").tolist() == ripe.tolist()


def test_as_many_labels_as_classes_are_needed(tmp_path, model):
    with pytest.raises(ValueError, match=r"`labels` must be one for each class.*Received: 2 labels for .*\(None, 3\)"):
        keras_bn.export(model, tmp_path, labels=["a", "b"])
    with pytest.raises(TypeError, match=r"`labels` must be a sequence of strings.*labels='abc'"):
        keras_bn.export(model, tmp_path, labels="abc")
    assert list(tmp_path.iterdir()) == []


def test_pixels_are_posted_as_they_are(tmp_path, model):
    exported = keras_bn.export(model, tmp_path, preprocess=scaled)
    assert (exported.inputs["image"].dtype, exported.signatures) == (
        tf.uint8,
        ["serving_default", "image_bytes", "batch_norm_drift"],
    )
    answer = ask(exported.path, image=pictures())
    np.testing.assert_allclose(answer["probabilities"], model(scaled(pictures())), atol=1e-6)


def test_encoded_pictures_are_decoded_and_resized(tmp_path, model):
    path = keras_bn.export(model, tmp_path, preprocess=scaled, labels=LABELS).path
    png = [tf.io.encode_png(picture).numpy() for picture in pictures()]
    answer = ask(path, "image_bytes", image_bytes=png)
    np.testing.assert_allclose(answer["probabilities"], model(scaled(pictures())), atol=1e-6)
    assert answer["top_labels"].shape == (8, 3)
    large = np.repeat(np.repeat(pictures(1)[0], 4, 0), 4, 1)
    jpeg = tf.io.encode_jpeg(np.repeat(large, 3, 2), quality=100).numpy()
    answer = ask(path, "image_bytes", image_bytes=[jpeg])
    np.testing.assert_allclose(answer["probabilities"], model(scaled(pictures(1))), atol=0.05)


def test_a_keras_layer_with_weights_may_preprocess(tmp_path, model):
    normalization = keras.layers.Normalization(axis=None)
    normalization.adapt(pictures().astype("float32"))
    answer = ask(keras_bn.export(model, tmp_path, preprocess=normalization).path, image=pictures())
    np.testing.assert_allclose(answer["probabilities"], model(normalization(pictures())), atol=1e-5)


FAMILIES = {
    "resnet50": (keras.applications.resnet50, "ResNet50"),
    "vgg16": (keras.applications.vgg16, "VGG16"),
    "mobilenet_v2": (keras.applications.mobilenet_v2, "MobileNetV2"),
    "densenet": (keras.applications.densenet, "DenseNet121"),
    "inception_v3": (keras.applications.inception_v3, "InceptionV3"),
    "resnet_v2": (keras.applications.resnet_v2, "ResNet50V2"),
}


def applications_model(family):
    """The family's first layers, which are enough to see what reaches them: random weights, small pictures."""
    module, name = FAMILIES[family]
    keras.utils.set_random_seed(0)
    whole = getattr(module, name)(weights=None, include_top=False, input_shape=(75, 75, 3))
    first = keras.Model(whole.inputs, whole.layers[12].output)
    return module, keras.Sequential([keras.Input((75, 75, 3)), first, keras.layers.GlobalAveragePooling2D()])


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=[] if f in ("mobilenet_v2", "vgg16") else pytest.mark.slow) for f in FAMILIES]
)
def test_preprocessing_of_keras_applications_serves_what_keras_gives_for_the_same_pictures(family, tmp_path):
    module, model = applications_model(family)
    images = np.random.default_rng(0).integers(0, 256, (3, 75, 75, 3), "uint8")
    path = keras_bn.export(model, tmp_path, fold=False, preprocess=module.preprocess_input).path
    expected = model(module.preprocess_input(images.astype("float32")), training=False).numpy()
    for signature, inputs in (
        ("serving_default", {"image": images}),
        ("image_bytes", {"image_bytes": [tf.io.encode_png(one).numpy() for one in images]}),
    ):
        (answer,) = ask(path, signature, **inputs).values()
        np.testing.assert_allclose(answer, expected, atol=1e-4 * np.abs(expected).max())


def test_arithmetic_on_pixels_does_not_wrap_around(tmp_path, model):
    path = keras_bn.export(model, tmp_path, preprocess=lambda x: (x - 128) / 128).path
    expected = model((pictures().astype("float32") - 128) / 128)
    np.testing.assert_allclose(ask(path, image=pictures())["probabilities"], expected, atol=1e-6)


def test_a_preprocess_that_computes_something_else_when_traced_is_refused(tmp_path, model):
    with pytest.raises(ValueError, match="must compute the same when it is called and when it is served"):
        keras_bn.export(model, tmp_path, preprocess=lambda x: x / 255 if tf.executing_eagerly() else x)


def test_preprocess_is_for_pictures_only(tmp_path):
    flat = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    with pytest.raises(ValueError, match=r"`preprocess` must be None for a model that does not take.*\(None, 4\)"):
        keras_bn.export(flat, tmp_path, preprocess=scaled)
    with pytest.raises(TypeError, match=r"`preprocess` must be a function or a Keras layer.*preprocess=255"):
        keras_bn.export(flat, tmp_path, preprocess=255)


def test_drift_tells_inverted_pictures_from_those_it_was_trained_on(tmp_path, model):
    path = keras_bn.export(model, tmp_path, preprocess=scaled).path
    usual = keras_bn.drift(path, pictures(64, seed=1))
    inverted = keras_bn.drift(path, 255 - pictures(64, seed=1))
    assert [row["layer"] for row in usual] == ["early", "late"]
    largest = max(row["kl"] for row in usual)
    assert largest < 0.1 < 10 * largest < min(row["kl"] for row in inverted)
    assert min(row["mean_shift"] for row in inverted) > 1 > max(row["mean_shift"] for row in usual)


def test_the_signature_of_drift_answers_for_each_row(tmp_path, model):
    path = keras_bn.export(model, tmp_path).path
    x = scaled(pictures(32, seed=2)).numpy()
    served = ask(path, "batch_norm_drift", image=x)
    assert {name: value.shape for name, value in served.items()} == {
        "layer": (32, 2),
        "channels": (32, 2),
        **dict.fromkeys(("count", "mean_shift", "variance_ratio"), (32, 10)),
    }
    assert (served["layer"][5].tolist(), served["channels"][5].tolist()) == ([b"early", b"late"], [4, 6])
    assert served["count"][5].tolist() == [36.0] * 4 + [1.0] * 6
    early = model.get_layer("early")
    seen = Reference(model.get_layer("conv")(x[5:6]), -1)
    for name, value in drift_of(seen, early.moving_mean, early.moving_variance).items():
        if name in served:
            np.testing.assert_allclose(served[name][5, :4], value, rtol=1e-4, atol=1e-5)


def test_litert_converts_every_signature(tmp_path, model):
    exported = keras_bn.export(model, tmp_path)
    x = scaled(pictures(3)).numpy()
    # In a process of its own: a converter that fails leaves its messages on the error stream.
    program = (
        "import sys, numpy as np, tensorflow as tf\n"
        "content = tf.lite.TFLiteConverter.from_saved_model(sys.argv[1]).convert()\n"
        "run = tf.lite.Interpreter(model_content=content).get_signature_runner('serving_default')\n"
        "(name,) = run.get_input_details()\n"
        "np.save(sys.argv[3], *run(**{name: np.load(sys.argv[2])}).values())"
    )
    np.save(tmp_path / "x.npy", x)
    command = [sys.executable, "-c", program, exported.path, tmp_path / "x.npy", tmp_path / "y.npy"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), model.predict(x, verbose=0), atol=1e-5)


def test_drift_can_be_turned_off_and_is_absent_without_normalizations(tmp_path, model):
    plain = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    assert keras_bn.export(model, tmp_path, drift=False).signatures == ["serving_default"]
    assert keras_bn.export(plain, tmp_path).signatures == ["serving_default"]


def test_warmup_requests_can_be_replayed_on_every_signature(tmp_path, model):
    prediction_log_pb2 = pytest.importorskip("tensorflow_serving.apis.prediction_log_pb2")
    path = keras_bn.export(model, tmp_path / "fashion", preprocess=scaled, warmup=pictures(3)).path
    loaded = tf.saved_model.load(str(path))
    asked = []
    for record in tf.data.TFRecordDataset(str(path / "assets.extra" / "tf_serving_warmup_requests")):
        request = prediction_log_pb2.PredictionLog.FromString(record.numpy()).predict_log.request
        inputs = {name: tf.constant(tf.make_ndarray(tensor)) for name, tensor in request.inputs.items()}
        loaded.signatures[request.model_spec.signature_name](**inputs)
        asked.append((request.model_spec.name, request.model_spec.signature_name, len(next(iter(inputs.values())))))
    names = ["serving_default", "image_bytes", "batch_norm_drift"]
    assert asked == [("fashion", name, count) for name in names for count in (1, 3)]


def test_warmup_without_the_serving_extra_says_what_to_install(tmp_path, model, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_serving.apis", None)
    with pytest.raises(ImportError, match=r"`warmup` needs tensorflow-serving-api: pip install 'keras-bn\[serving\]'"):
        keras_bn.export(model, tmp_path, warmup=scaled(pictures()).numpy())
    assert list(tmp_path.iterdir()) == []


def test_warmup_has_to_fit_the_inputs(tmp_path, model):
    pytest.importorskip("tensorflow_serving.apis")
    with pytest.raises(ValueError, match=r"`warmup` must have shape \(None, 8, 8, 1\) for input 'image'.*\(2, 9\)"):
        keras_bn.export(model, tmp_path, warmup=np.ones((2, 9)), fold=False)
    with pytest.raises(ValueError, match=r"`warmup` must be a dictionary with the inputs \['image'\].*\['picture'\]"):
        keras_bn.export(model, tmp_path, warmup={"picture": np.ones((2, 8, 8, 1))}, fold=False)
    with pytest.raises(ValueError, match=r"`warmup` must be uint8 pictures.*float64"):
        keras_bn.export(model, tmp_path, warmup=np.ones((2, 8, 8, 1)), preprocess=scaled, fold=False)


def test_warmup_of_several_inputs_is_a_dictionary_or_for_a_model_that_takes_a_list_a_list(tmp_path):
    pytest.importorskip("tensorflow_serving.apis")
    a, b = keras.Input((3,)), keras.Input((2,), name="größe")
    model = keras.Model([a, b], keras.layers.Concatenate()([a, b]))
    left, right = np.ones((2, 3), "float32"), np.zeros((2, 2), "float32")
    by_name = {a.name: left, "größe": right}
    served = dict(zip(keras_bn.export(model, tmp_path).inputs, (left, right), strict=True))
    for warmup in ([left, right], by_name, served):
        folder = keras_bn.export(model, tmp_path, warmup=warmup).path
        (record,) = tf.data.TFRecordDataset(str(folder / "assets.extra/tf_serving_warmup_requests")).skip(1)
        from tensorflow_serving.apis import prediction_log_pb2

        sent = prediction_log_pb2.PredictionLog.FromString(record.numpy()).predict_log.request.inputs
        for name, values in served.items():
            np.testing.assert_array_equal(tf.make_ndarray(sent[name]), values)
    wrong = r"`warmup` must be a dictionary with the inputs .*, or a list of arrays in their order. Received: warmup="
    with pytest.raises(ValueError, match=wrong + "list of 3"):
        keras_bn.export(model, tmp_path, warmup=[left, right, right])
    with pytest.raises(ValueError, match=wrong + r"\['left', 'right'\]"):
        keras_bn.export(model, tmp_path, warmup={"left": left, "right": right})
    c, d = keras.Input((3,), name="c"), keras.Input((2,), name="d")
    named = keras.Model({"c": c, "d": d}, model([c, d]))
    with pytest.raises(ValueError, match=r"`warmup` must be a dictionary .*, or an array where there is one input"):
        keras_bn.export(named, tmp_path, warmup=[left, right])


def test_the_card_says_what_was_exported(tmp_path, model):
    report = keras_bn.recalibrate(model, scaled(pictures(64)), verbose=0)
    path = keras_bn.export(model, tmp_path, labels=LABELS, accuracy=0.93, recalibration=report).path
    card = json.loads((path / "assets.extra" / "keras_bn.json").read_text())
    assert card["versions"]["keras_bn"] == keras_bn.__version__
    assert (card["accuracy"], card["labels"], card["folding"]["absorbed"]) == (0.93, LABELS, 2)
    assert card["statistics"]["method"] == "pooled"
    assert card["signatures"]["serving_default"]["inputs"] == {"image": {"dtype": "float32", "shape": [None, 8, 8, 1]}}
    with pytest.raises(ValueError, match=r"`accuracy` must be a number in \[0, 1\], or None. Received: accuracy=93."):
        keras_bn.export(model, tmp_path, accuracy=93)


def test_several_inputs_and_outputs_are_served_in_inference_mode(tmp_path):
    keras.utils.set_random_seed(0)
    a, b = keras.Input((4,), name="left"), keras.Input((4,), name="right")
    norm = keras_bn.BatchNormalization()
    both = keras.layers.Add()([norm(keras.layers.Dense(3)(a), training=True), keras.layers.Dense(3)(b)])
    outputs = {"sum": both, "chance": keras.layers.Dense(1, activation="sigmoid")(both)}
    model = keras.Model({"left": a, "right": b}, outputs)
    norm.moving_variance.assign([4.0, 9.0, 16.0])
    inputs = {
        name: np.random.default_rng(i).normal(size=(5, 4)).astype("float32") for i, name in enumerate(("left", "right"))
    }
    frozen = keras.models.clone_model(model)
    frozen.set_weights(model.get_weights())
    frozen.trainable = False
    expected = frozen(inputs, training=False)
    answer = ask(keras_bn.export(model, tmp_path).path, **inputs)
    for name in ("sum", "chance"):
        np.testing.assert_allclose(answer[name], expected[name], atol=1e-6)


NAMES = {
    "a-b": "a_b",
    "a b": "a_b",
    "a.b": "a_b",
    "1a": "input_1a",
    "_a": "a",
    "ü": "inputs",
    "größe": "gr__e",
    "self": "self_",
    "class": "class_",
    "True": "True_",
    "kwargs": "kwargs",
}


@pytest.mark.parametrize("name", NAMES)
def test_a_legal_keras_name_becomes_one_that_a_signature_takes(name, tmp_path):
    x = keras.Input((4,), name=name)
    model = keras.Model(x, keras.layers.BatchNormalization()(x))
    rows = np.random.default_rng(0).normal(size=(5, 4)).astype("float32")
    exported = keras_bn.export(model, tmp_path, drift=True)
    assert list(exported.inputs) == [NAMES[name]]
    np.testing.assert_allclose(ask(exported.path, **{NAMES[name]: rows})["outputs"], model(rows), rtol=1e-5)
    assert keras_bn.drift(exported.path, {NAMES[name]: rows}) == keras_bn.drift(exported.path, rows)


@pytest.mark.parametrize(
    ("names", "served"),
    [
        (("x-ray", "age (years)"), ["x_ray", "age__years_"]),
        (("a-b", "a b"), ["a_b_1", "a_b_2"]),
        (("a-b", "a b", "a_b_1"), ["a_b_2", "a_b_3", "a_b_1"]),
        (("ü", "ö"), ["input_1", "input_2"]),
        (("class", "class_"), ["class__1", "class__2"]),
    ],
)
def test_several_names_stay_apart_once_they_are_cleaned(names, served, tmp_path):
    pytest.importorskip("tensorflow_serving.apis")
    inputs = [keras.Input((4,), name=name) for name in names]
    scaled_apart = [keras.layers.Rescaling(i + 1.0)(x) for i, x in enumerate(inputs)]
    model = keras.Model(inputs, keras.layers.BatchNormalization()(keras.layers.Add()(scaled_apart)))
    rows = [np.random.default_rng(i).normal(size=(5, 4)).astype("float32") for i in range(len(names))]
    examples = dict(zip(served, rows, strict=True))
    exported = keras_bn.export(model, tmp_path, warmup=examples)
    assert list(exported.inputs) == served
    np.testing.assert_allclose(ask(exported.path, **examples)["outputs"], model(rows), rtol=1e-5, atol=1e-6)
    assert keras_bn.drift(exported.path, examples)[0]["kl"] > 0


def test_warmup_and_drift_take_the_names_of_the_model_too(tmp_path):
    pytest.importorskip("tensorflow_serving.apis")
    inputs = [keras.Input((4,), name=name) for name in ("x-ray", "age (years)")]
    model = keras.Model(inputs, keras.layers.BatchNormalization()(keras.layers.Add()(inputs)))
    rows = np.random.default_rng(0).normal(size=(5, 4)).astype("float32")
    path = keras_bn.export(model, tmp_path, warmup={"x-ray": rows, "age (years)": rows}).path
    given = keras_bn.drift(path, {"x-ray": rows, "age (years)": rows})
    assert given == keras_bn.drift(path, {"x_ray": rows, "age__years_": rows})


def test_outputs_whose_names_are_equal_once_cleaned_are_all_answered(tmp_path):
    x = keras.Input((4,), name="x")
    outputs = {"a-b": keras.layers.Rescaling(2.0)(x), "a b": keras.layers.Rescaling(3.0)(x)}
    exported = keras_bn.export(keras.Model(x, outputs), tmp_path)
    answer = ask(exported.path, x=np.ones((1, 4), "float32"))
    assert {name: value[0, 0] for name, value in answer.items()} == {"a_b_1": 3.0, "a_b_2": 2.0}


@pytest.mark.parametrize(
    ("warmup", "words"),
    [
        ([b"\x89PNG"], r"uint8 pictures of shape \(n, 8, 8, 1\) for input 'image'.*dtype bytes, shape \(1,\)"),
        (np.zeros((2, 8, 8, 1)), r"uint8 pictures of shape \(n, 8, 8, 1\).*dtype float64"),
        (np.zeros((2, 8, 8), "uint8"), r"have shape \(None, 8, 8, 1\).*shape \(2, 8, 8\)"),
        (np.zeros((0, 8, 8, 1), "uint8"), r"sizes of at least \[1, 8, 8, 1\].*shape \(0, 8, 8, 1\)"),
        ([[1], [1, 2]], r"one shape for all examples of input 'image'"),
        ({"picture": np.zeros((2, 8, 8, 1), "uint8")}, r"dictionary with the inputs \['image'\].*\['picture'\]"),
    ],
)
def test_warmup_that_is_no_batch_of_pictures_is_refused_in_words(warmup, words, tmp_path, model):
    pytest.importorskip("tensorflow_serving.apis")
    with pytest.raises(ValueError, match=f"`warmup` must .*{words}"):
        keras_bn.export(model, tmp_path, preprocess=scaled, warmup=warmup)


def test_warmup_that_the_model_cannot_compute_with_is_refused_in_words(tmp_path):
    pytest.importorskip("tensorflow_serving.apis")
    x = keras.Input((None, None, 3), name="x")
    y = keras.layers.BatchNormalization()(keras.layers.Conv2D(2, 5)(x))
    model = keras.Model(x, keras.layers.GlobalAveragePooling2D()(y))
    with pytest.raises(ValueError, match=r"`warmup` must have shape .* at least \[1, 5, 5, 3\].*shape \(2, 3, 3, 3\)"):
        keras_bn.export(model, tmp_path, warmup=np.zeros((2, 3, 3, 3), "float32"))
    x = keras.Input((2,), dtype="int32", name="x")
    model = keras.Model(x, keras.layers.Embedding(5, 3)(x))
    with pytest.raises(
        ValueError, match=r"^`warmup` must be what the model can compute with, .*. Received: [^\x1b\n]*9"
    ):
        keras_bn.export(model, tmp_path, warmup=np.array([[1, 9]]), fold=False)
    with pytest.raises(ValueError, match=r"`warmup` must be numbers for input 'x'. Received: dtype str"):
        keras_bn.export(model, tmp_path, warmup=np.array([["a", "b"]]), fold=False)
