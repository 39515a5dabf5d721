"""export(): models that must not be served are refused, and nothing that was there is harmed."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl import logging

import keras_bn
from keras_bn import exporting
from keras_bn.exporting import versions


class FromFunction(keras.layers.Layer):
    """Calls any function, as a careless author's layer would."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def call(self, x):
        return self.function(x)


def model_of(function):
    x = keras.Input((4,))
    return keras.Model(x, FromFunction(function)(x))


def refused(tmp_path, model, match, **options):
    with pytest.raises(ValueError, match=match):
        keras_bn.export(model, tmp_path / "served", fold=False, **options)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_computes_something_else_when_traced_is_refused(tmp_path):
    model = model_of(lambda x: x * (2.0 if tf.executing_eagerly() else 3.0))
    refused(
        tmp_path,
        model,
        r"`model` must compute the same when it is called and when it is served.*'serving_default'.*0.5 relative",
    )


def test_no_gradients_in_what_is_served_are_nothing_to_be_warned_of(tmp_path, caplog):
    level = logging.get_verbosity()
    logging.set_verbosity(logging.WARNING)
    x = keras.Input((4,))
    keras_bn.export(keras.Model(x, keras.layers.Dense(3, activation="swish")(x)), tmp_path)
    assert "unsaved custom gradients" not in caplog.text
    assert logging.get_verbosity() == logging.WARNING
    logging.set_verbosity(level)


def test_a_model_whose_rows_depend_on_each_other_is_refused(tmp_path):
    model = model_of(lambda x: x - tf.reduce_mean(x, 0, keepdims=True))
    refused(
        tmp_path,
        model,
        r"must answer for each example by itself.*'outputs' of signature 'serving_default' .*batch of 7",
    )


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_statistics_that_are_not_finite_are_refused(tmp_path, fold, value):
    model = keras.Sequential([keras.Input((4,)), keras.layers.BatchNormalization(name="ill")])
    model.layers[0].moving_variance.assign([1, value, 1, 1])
    with pytest.raises(ValueError, match=r"must have finite weights.*'.*ill/moving_variance' with a value"):
        keras_bn.export(model, tmp_path / "served", fold=fold)
    assert list(tmp_path.iterdir()) == []


def test_every_signature_is_checked_for_rows_that_depend_on_each_other(tmp_path):
    x = keras.Input((4,))
    turned = keras.layers.Lambda(lambda t: tf.reshape(tf.transpose(tf.reshape(t, (-1, 2, 2)), (1, 0, 2)), (-1, 2)))
    norm = keras.layers.BatchNormalization()
    back = keras.layers.Lambda(lambda t: tf.reshape(tf.transpose(tf.reshape(t, (2, -1, 2)), (1, 0, 2)), (-1, 4)))
    refused(tmp_path, keras.Model(x, back(norm(turned(x)))), r"each example by itself.*of signature 'batch_norm_drift'")


def test_a_model_that_writes_a_variable_is_refused(tmp_path):
    class Counting(keras.layers.Layer):
        def build(self, shape):
            self.calls = self.add_weight(shape=(), initializer="zeros", trainable=False)

        def call(self, x):
            self.calls.assign_add(1.0)
            return x

    x = keras.Input((4,))
    refused(tmp_path, keras.Model(x, Counting()(x)), r"`model` must not change in inference.*writes a variable")


@pytest.mark.parametrize("wrap", [lambda layer: layer, keras.layers.Bidirectional])
def test_a_model_that_keeps_a_state_is_refused(tmp_path, wrap):
    x = keras.Input((5, 3), batch_size=2)
    model = keras.Model(x, wrap(keras.layers.GRU(4, stateful=True, name="keeper"))(x))
    refused(
        tmp_path, model, r"`model` must keep no state .*Received: layer '.*keeper' with stateful=True; make the model"
    )


def test_a_model_that_uses_what_no_layer_has_is_refused(tmp_path):
    outside = tf.Variable([1.0, 2.0, 3.0, 4.0], name="outside")
    table = tf.lookup.StaticHashTable(tf.lookup.KeyValueTensorInitializer([1], [3.0]), 0.0)
    refused(tmp_path, model_of(lambda x: x * outside), r"variables and tables that they use as attributes.*'outside:0'")
    looked_up = model_of(lambda x: table.lookup(tf.cast(x, tf.int32)))
    refused(tmp_path, looked_up, r"variables and tables that they use as attributes.*StaticHashTable")


def test_a_model_that_computes_batch_statistics_is_refused(tmp_path):
    def normalize(x):
        picture = x[:, None, None, :]
        ones = tf.ones([4])
        return tf.raw_ops.FusedBatchNormV3(
            x=picture, scale=ones, offset=ones, mean=ones, variance=ones, is_training=True
        ).y[:, 0, 0, :]

    refused(
        tmp_path, model_of(normalize), r"must normalize with its own statistics.*FusedBatchNormV3.*takes the batch's"
    )


def test_a_model_that_needs_python_is_refused(tmp_path):
    def through_numpy(x):
        return tf.ensure_shape(tf.numpy_function(lambda a: a * 2, [x], tf.float32), x.shape)

    refused(tmp_path, model_of(through_numpy), r"`model` must consist of stock TensorFlow operations.*PyFunc")


def compiled(x):
    return tf.function(lambda a: a * 2, jit_compile=True)(x)


def test_a_compiled_function_inside_the_model_is_refused(tmp_path):
    refused(tmp_path, model_of(compiled), r"`model` must not hold compiled functions.*is compiled")


def test_compiled_signatures_are_written_where_they_are_asked_for(tmp_path):
    exported = keras_bn.export(model_of(compiled), tmp_path, fold=False, jit_compile=True)
    answer = tf.saved_model.load(str(exported.path)).signatures["serving_default"](inputs=tf.ones((2, 4)))
    np.testing.assert_array_equal(answer["outputs"], np.full((2, 4), 2.0))
    with pytest.raises(ValueError, match="is compiled"):
        exporting.check_graph(exported.path, "serving_default", compiled_is_fine=False)


def test_a_model_without_a_row_for_each_example_is_refused(tmp_path):
    refused(
        tmp_path,
        model_of(lambda x: x[0]),
        r"outputs of a row for each example.*'outputs' of signature 'serving_default' .*\(4,\)",
    )
    sums = model_of(lambda x: tf.reshape(x, (-1, 2)))
    refused(tmp_path, sums, r"must have outputs of a row for each example.*'outputs' .* shape \(14, 2\) for 7 examples")


def small_model(seed=0):
    keras.utils.set_random_seed(seed)
    return keras.Sequential([keras.Input((4,)), keras.layers.Dense(2), keras.layers.BatchNormalization()])


def test_overwrite_puts_the_new_version_in_the_place_of_the_old(tmp_path):
    keras_bn.export(small_model(0), tmp_path, version=3)
    path = keras_bn.export(small_model(1), tmp_path, version=3, overwrite=True).path
    answer = tf.saved_model.load(str(path)).signatures["serving_default"](inputs=tf.ones((1, 4)))
    np.testing.assert_allclose(answer["outputs"], small_model(1)(tf.ones((1, 4))), rtol=1e-5)
    assert [child.name for child in tmp_path.iterdir()] == ["3"]


def test_an_exchange_the_system_refuses_says_why_and_what_else_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No such file or directory: exchanging folders; export a new version"):
        versions._exchange(tmp_path / "new", tmp_path / "old")


def test_a_failed_overwrite_leaves_the_old_version(tmp_path):
    path = keras_bn.export(small_model(), tmp_path, version=3).path
    before = contents(path)
    with pytest.raises(ValueError, match="is compiled"):
        keras_bn.export(model_of(compiled), tmp_path, version=3, overwrite=True, fold=False)
    assert contents(tmp_path) == {f"3/{name}": data for name, data in before.items()}


def test_the_version_is_readable_by_a_server_that_runs_as_someone_else(tmp_path):
    path = keras_bn.export(small_model(), tmp_path / "served").path
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o777 & ~umask


def test_a_version_that_appears_meanwhile_is_not_harmed(tmp_path, monkeypatch):
    def someone_else_is_faster(stage):
        if stage == "checked":
            (tmp_path / "1").mkdir()
            (tmp_path / "1" / "theirs").write_text("")

    monkeypatch.setattr(exporting, "STAGE_HOOKS", [someone_else_is_faster])
    assert keras_bn.export(small_model(), tmp_path).version == 2
    assert (tmp_path / "1" / "theirs").exists()


def test_what_killed_exports_left_is_swept_by_the_next_one(tmp_path):
    (tmp_path / ".exporting-made-just-now").mkdir()
    held = versions.temporary_sibling(tmp_path)
    with held as folder:
        for left, minutes in ((tmp_path / ".exporting-killed", 2), (folder, 60 * 30)):
            left.mkdir(exist_ok=True)
            then = left.stat().st_mtime - 60 * minutes
            os.utime(left, (then, then))
        keras_bn.export(small_model(), tmp_path)
        names = {child.name for child in tmp_path.iterdir()}
    assert names == {".exporting-made-just-now", folder.name, "1"}


def test_where_there_are_no_locks_what_killed_exports_left_is_swept_a_day_later(tmp_path, monkeypatch):
    monkeypatch.setattr(versions, "fcntl", None)
    for name, hours in ((".exporting-old", 25), (".exporting-now", 1)):
        (tmp_path / name).mkdir()
        then = (tmp_path / name).stat().st_mtime - 3600 * hours
        os.utime(tmp_path / name, (then, then))
    with versions.temporary_sibling(tmp_path):
        pass
    assert [child.name for child in tmp_path.iterdir()] == [".exporting-now"]


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


KILLED = """
import os, signal, sys
import keras, keras_bn
from keras_bn.exporting import versions as _versions
from keras_bn import exporting

def kill(stage):
    if stage == sys.argv[2]:
        os.kill(os.getpid(), signal.SIGKILL)

exporting.STAGE_HOOKS.append(kill)
model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2), keras.layers.BatchNormalization()])
keras_bn.export(model, sys.argv[1], version=None if sys.argv[3] == "None" else int(sys.argv[3]), overwrite=True)
"""
QUICK = {("extras written", None)}


@pytest.mark.parametrize(
    ("stage", "version"),
    [
        pytest.param(stage, version, marks=[] if (stage, version) in QUICK else pytest.mark.slow)
        for version in (None, 1)
        for stage in exporting.STAGES
    ],
)
def test_kill_9_at_any_stage_leaves_whole_versions_only(tmp_path, stage, version):
    old = keras_bn.export(small_model(), tmp_path).path
    before = contents(old)
    root = Path(keras_bn.__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), stage, str(version)],
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    for folder in tmp_path.iterdir():
        if folder.name.isdecimal():
            tf.saved_model.load(str(folder)).signatures["serving_default"](inputs=tf.ones((3, 4)))
            assert (folder / "assets.extra" / "keras_bn.json").exists()
    renamed = stage == "renamed"
    assert {f.name for f in tmp_path.iterdir() if f.name.isdecimal()} == (
        {"1", "2"} if renamed and not version else {"1"}
    )
    assert (contents(old) == before) == (not (renamed and version))


def test_free_sizes_of_the_check_grow_until_the_model_takes_them(tmp_path):
    layers = [keras.layers.Conv2D(2, 3, strides=2) for _ in range(7)]
    model = keras.Sequential([keras.Input((None, None, 3)), *layers, keras.layers.BatchNormalization()])
    assert keras_bn.export(model, tmp_path / "deep").errors.relative < 1e-4


def test_examples_replace_the_random_numbers_of_the_check(tmp_path):
    def checked(x):
        with tf.control_dependencies([tf.debugging.assert_near(tf.reduce_sum(x, -1), 1.0)]):
            return tf.identity(x)

    layers = [keras.layers.Lambda(checked), keras.layers.Dense(2), keras.layers.BatchNormalization()]
    model = keras.Sequential([keras.Input((3,)), *layers])
    examples = np.full((2, 3), 1 / 3, "float32")
    assert keras_bn.export(model, tmp_path / "shares", warmup=examples).errors.relative < 1e-4
    with pytest.raises(ValueError, match=r"`warmup` must be given, a batch of what.*answered: InvalidArg.*: [^E]"):
        keras_bn.export(model, tmp_path / "shares")


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize("name", ["a b", "sch\u00f6n", "a:b", "a\\b"])
@pytest.mark.parametrize("place", ["layer", "nested", "model"])
def test_layers_whose_names_are_no_scopes_are_named(name, place, fold, tmp_path):
    names = {"layer": None, "nested": None, "model": None, place: name}
    inner = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, name=names["layer"])], name=names["nested"])
    model = keras.Sequential([keras.Input((3,)), inner, keras_bn.BatchNormalization()], name=names["model"])
    kind = "Dense" if place == "layer" else "Sequential"
    received = rf"layer {re.escape(repr(name))} of type {kind}\.$"
    text = f"^`model` must have layers and variables whose names TensorFlow takes: .* Received: {received}"
    with pytest.raises(ValueError, match=text):
        keras_bn.export(model, tmp_path, fold=fold)
    assert list(tmp_path.iterdir()) == []


class _Hidden(keras.layers.Layer):
    def build(self, shape):
        self.kernel = self.add_weight(shape=(shape[-1], 2))

    def call(self, x):
        return x @ self.kernel


def test_names_with_an_underscore_in_front_are_refused_only_where_tensorflow_does(tmp_path):
    text = "whose names TensorFlow takes.*a class that begins with `_`.*Received: {}"
    inputs = keras.Input((3,), name="_an input")
    outermost = keras.Model(inputs, keras_bn.BatchNormalization()(_Hidden(name="_x")(inputs)))
    with pytest.raises(ValueError, match=text.format("variable '_x/")):
        keras_bn.export(outermost, tmp_path)
    built_by_itself = keras.layers.Dense(2, name="_y")
    built_by_itself.build((None, 3))
    with pytest.raises(ValueError, match=text.format("variable '_y/")):
        keras_bn.export(keras.Sequential([inputs, built_by_itself, keras_bn.BatchNormalization()]), tmp_path)
    with pytest.raises(ValueError, match=text.format("layer '_m' of type Sequential")):
        keras_bn.export(keras.Sequential([keras.Input((3,)), keras_bn.BatchNormalization()], name="_m"), tmp_path)
    assert list(tmp_path.iterdir()) == []
    within = keras.Sequential([inputs, _Hidden(), keras_bn.BatchNormalization()])
    keras_bn.export(within, tmp_path, fold=False)
