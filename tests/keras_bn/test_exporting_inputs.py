"""export(): what a signature answers to inputs of other shapes, in a plain session with TensorFlow's optimizers on."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_bn
from tests.sessions import plain_session

PICTURES = {
    "a number": (),
    "one number": (1,),
    "a row of pixels": (784,),
    "one picture without a batch": (28, 28, 1),
    "too deep": (2, 28, 28, 1, 1),
    "no rows": (0, 28, 28, 1),
    "no columns": (2, 28, 0, 1),
    "no channel": (2, 28, 28, 0),
    "colours": (2, 28, 28, 3),
    "too high": (2, 30, 28, 1),
}


def picture_model():
    return keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            keras.layers.Conv2D(4, 3, activation="relu"),
            keras.layers.BatchNormalization(),
            keras.layers.Flatten(),
            keras.layers.Dense(3, activation="softmax"),
        ]
    )


def refusal(run, signature, **inputs):
    """The words of the INVALID_ARGUMENT that a request is answered with."""
    with pytest.raises(tf.errors.InvalidArgumentError) as caught:
        run(signature, inputs)
    return str(caught.value)


@pytest.fixture(scope="module", params=[False, True], ids=["", "jit_compile"])
def picture_version(request, tmp_path_factory):
    base = tmp_path_factory.mktemp("served")
    return keras_bn.export(picture_model(), base, jit_compile=request.param).path


def test_a_picture_model_names_input_expected_and_received_shape(picture_version):
    with plain_session(picture_version) as run:
        for signature in ("serving_default", "batch_norm_drift"):
            for shape in PICTURES.values():
                said = refusal(run, signature, image=np.ones(shape, "float32"))
                assert "image" in said
                assert "[?,28,28,1]" in said
                received = "[0 28 28 1]" if shape[:1] == (0,) else "[" + ",".join(map(str, shape)) + "]"
                assert received in said
            assert all(
                len(value) == 2 for value in run(signature, {"image": np.ones((2, 28, 28, 1), "float32")}).values()
            )


def test_the_same_is_said_to_one_who_loads_the_version_in_python(picture_version):
    signature = tf.saved_model.load(str(picture_version)).signatures["serving_default"]
    for shape in PICTURES.values():
        with pytest.raises((tf.errors.InvalidArgumentError, TypeError, ValueError), match="image"):
            signature(image=tf.ones(shape))


def test_two_operations_check_an_input(picture_version):
    with plain_session(picture_version) as run:
        library = run.graph.as_graph_def().library.function
    checks = [node.op for f in library for node in f.node_def if node.op in ("EnsureShape", "Assert")]
    assert sorted(checks) == ["Assert", "Assert", "EnsureShape", "EnsureShape"]  # Two signatures of one input.


def test_several_inputs_of_unequal_rows_are_both_named(tmp_path):
    a, b, c = keras.Input((4,), name="left"), keras.Input((2, 3), name="right"), keras.Input((), name="weight")
    both = keras.layers.Dense(3)(a) + keras.layers.Dense(3)(keras.layers.Flatten()(b)) + keras.ops.expand_dims(c, -1)
    version = keras_bn.export(keras.Model({"x": [a, b], "y": c}, both), tmp_path, fold=False).path

    def inputs(*rows):
        shapes = {"left": (rows[0], 4), "right": (rows[1], 2, 3), "weight": (rows[2],)}
        return {name: np.ones(shape, "float32") for name, shape in shapes.items()}

    with plain_session(version) as run:
        assert len(run("serving_default", inputs(3, 3, 3))["outputs"]) == 3
        said = refusal(run, "serving_default", **inputs(3, 2, 3))
        assert "Inputs `left` and `right` must have as many rows. Received:] [3] [and] [2]" in said
        said = refusal(run, "serving_default", **inputs(3, 3, 1))
        assert "Inputs `left` and `weight` must have as many rows. Received:] [3] [and] [1]" in said
        said = refusal(run, "serving_default", **{**inputs(3, 3, 3), "weight": np.ones((3, 1), "float32")})
        assert "weight" in said
        assert "[3,1] is not compatible with expected shape [?]" in said
        assert "weight" in refusal(run, "serving_default", **{**inputs(3, 3, 3), "weight": np.float32(1)})
        said = refusal(run, "serving_default", **inputs(0, 0, 0))
        assert "Input `left` must have the shape [?,4], with sizes of at least [1, 4]. Received: shape] [0 4]" in said


def test_free_sizes_may_not_be_zero(tmp_path):
    x = keras.Input((None, None, 3), name="image")
    y = keras.layers.GlobalAveragePooling2D()(keras.layers.Conv2D(4, 3, padding="same")(x))
    version = keras_bn.export(keras.Model(x, keras.layers.Dense(2)(y)), tmp_path).path
    with plain_session(version) as run:
        assert run("serving_default", {"image": np.ones((2, 1, 9, 3), "float32")})["outputs"].shape == (2, 2)
        said = refusal(run, "serving_default", image=np.ones((2, 0, 9, 3), "float32"))
        assert "Input `image` must have the shape [?,?,?,3]" in said
        assert "[2 0 9 3]" in said


@pytest.mark.parametrize("dtype", ["uint8", "int32"])
def test_values_of_integers_that_a_model_leaves_out_count_too(tmp_path, dtype):
    inputs = keras.Input((None, 4), dtype=dtype, name="codes")
    values = keras.layers.Lambda(lambda x: tf.cast(tf.reduce_max(x[:, 5:-5], 1), "float32"))(inputs)
    model = keras.Model(inputs, keras.layers.BatchNormalization()(keras.layers.Dense(3)(values)))
    with plain_session(keras_bn.export(model, tmp_path / "codes").path) as run:
        said = refusal(run, "serving_default", codes=np.ones((2, 10, 4), dtype))
        assert "with sizes of at least [1, 11, 4]. Received: shape] [2 10 4]" in said


def test_free_sizes_are_at_least_what_the_model_accepts(tmp_path):
    x = keras.Input((None, 40, 3), name="image")
    y = keras.layers.Conv2D(4, 5)(keras.layers.MaxPool2D(2)(keras.layers.Conv2D(4, 3)(x)))
    version = keras_bn.export(keras.Model(x, keras.layers.GlobalAveragePooling2D()(y)), tmp_path, fold=False).path
    with plain_session(version) as run:
        assert run("serving_default", {"image": np.ones((2, 12, 40, 3), "float32")})["outputs"].shape == (2, 4)
        said = refusal(run, "serving_default", image=np.ones((2, 11, 40, 3), "float32"))
        assert "with sizes of at least [1, 12, 40, 3]. Received: shape] [2 11 40 3]" in said


def test_strings_are_checked_too(tmp_path):
    pytest.importorskip("tensorflow_serving.apis")
    x = keras.Input((1,), dtype="string", name="article")
    model = keras.Model(x, keras.layers.StringLookup(vocabulary=["shirt", "shoe"])(x))
    version = keras_bn.export(model, tmp_path, fold=False, warmup=np.array([["hat"], ["shoe"]])).path
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        meta_graph = tf.compat.v1.saved_model.load(session, ["serve"], str(version))
        spec = meta_graph.signature_def["serving_default"]
        graph = session.graph
        with graph.as_default():
            tf.compat.v1.tables_initializer().run()
        feed = graph.get_tensor_by_name(spec.inputs["article"].name)
        with pytest.raises(tf.errors.InvalidArgumentError, match=r"article.*\[0 1\]"):
            session.run(spec.outputs["outputs"].name, {feed: np.empty((0, 1), object)})
