"""The keras-bn command on the files that people have."""

import json
import subprocess
import sys
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest
from click.testing import CliRunner

import keras_bn
from keras_bn_cli import main
from keras_bn_cli.files import Data

ROOT = Path(keras_bn.__file__).parent.parent
SHIFTED = """
import keras

@keras.saving.register_keras_serializable("mine")
class Shifted(keras.layers.Layer):
    def call(self, x):
        return x + 1.0
"""


def run(*arguments, code=0):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result


def small_model(*layers):
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [keras.Input((4,)), *layers, keras_bn.BatchNormalization(name="norm"), keras.layers.Dense(2)]
    )


@pytest.fixture
def data(tmp_path):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(3, 2, (40, 4)).astype("float32"))
    return tmp_path / "x.npy"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A module with a layer of one's own in the working folder, and a name that no other test has imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "shifted_layers.py").write_text(SHIFTED)
    yield tmp_path
    sys.modules.pop("shifted_layers", None)
    keras.saving.get_custom_objects().pop("mine>Shifted", None)


def own_loss(y, p):
    return keras.ops.mean(y - p)


def compiled_with_mse(path):
    model = small_model()
    model.compile("adam", "mse", metrics=["mse"])
    model.save(path)


def compiled_with_lr(path):
    compiled_with_mse(path)
    with h5py.File(path, "r+") as file:
        config = json.loads(file.attrs["training_config"])
        config["optimizer_config"]["config"]["lr"] = config["optimizer_config"]["config"].pop("learning_rate")
        file.attrs["training_config"] = json.dumps(config)


def compiled_with_own_loss(path):
    model = small_model()
    model.compile("sgd", own_loss)
    model.save(path)


@pytest.mark.parametrize(
    ("save", "name"),
    [
        (compiled_with_mse, "model.h5"),
        (compiled_with_mse, "model.hdf5"),
        (compiled_with_lr, "model.h5"),
        (compiled_with_own_loss, "model.keras"),
        (compiled_with_own_loss, "model.h5"),
    ],
)
def test_a_file_whose_loss_or_optimizer_does_not_load_is_worked_on(save, name, data, tmp_path):
    save(tmp_path / name)
    assert json.loads(run("health", tmp_path / name, "--json").stdout)["layers"][0]["name"] == "norm"
    run("recalibrate", tmp_path / name, "--data", data, "-o", tmp_path / "exact.keras")
    exact = keras.models.load_model(tmp_path / "exact.keras", compile=False)
    np.testing.assert_allclose(exact.get_layer("norm").moving_mean, np.load(data).mean(0), rtol=1e-5)


def test_recalibrate_says_when_it_leaves_out_loss_and_optimizer_and_else_keeps_them(data, tmp_path):
    compiled_with_own_loss(tmp_path / "own.keras")
    said = run("recalibrate", tmp_path / "own.keras", "--data", data, "-o", tmp_path / "exact.keras").stderr
    assert said.startswith(f"Loss and optimizer of {tmp_path / 'own.keras'} do not load")
    assert "own_loss" in said
    compiled_with_mse(tmp_path / "mse.keras")
    assert run("recalibrate", tmp_path / "mse.keras", "--data", data, "-o", tmp_path / "kept.keras").stderr == ""
    assert isinstance(keras.models.load_model(tmp_path / "kept.keras").optimizer, keras.optimizers.Adam)


def test_several_inputs_come_from_a_npz_file_by_name(tmp_path):
    a, b = keras.Input((3,), name="a"), keras.Input((2,), name="b")
    y = keras.layers.Concatenate()([keras_bn.BatchNormalization(name="of_a")(a), keras_bn.BatchNormalization()(b)])
    keras.Model([b, a], keras.layers.Dense(1)(y)).save(tmp_path / "two.keras")
    rng = np.random.default_rng(0)
    values = {"a": rng.normal(5, 1, (50, 3)).astype("float32"), "b": rng.normal(0, 1, (50, 2)).astype("float32")}
    np.savez(tmp_path / "two.npz", **values)
    run("recalibrate", tmp_path / "two.keras", "--data", tmp_path / "two.npz", "-o", tmp_path / "exact.keras")
    exact = keras.models.load_model(tmp_path / "exact.keras")
    np.testing.assert_allclose(exact.get_layer("of_a").moving_mean, values["a"].mean(0), rtol=1e-5)
    near = json.loads(run("drift", tmp_path / "exact.keras", "--data", tmp_path / "two.npz", "--json").stdout)
    assert max(row["kl"] for row in near["layers"]) < 1e-3
    np.savez(tmp_path / "one.npz", a=values["a"])
    said = run("health", tmp_path / "two.keras", "--data", tmp_path / "one.npz", code=1).stderr
    assert "must hold an array for each input, ['a', 'b']" in said
    said = run("health", tmp_path / "two.keras", "--data", tmp_path / "two.keras", code=1).stderr
    assert "it is an archive with 'config.json', which is no array" in said


def test_nested_inputs_come_from_a_npz_file_by_name_too(tmp_path):
    a, b, c = (keras.Input((2,), name=name) for name in "abc")
    together = keras_bn.BatchNormalization(name="norm")(keras.layers.Concatenate()([a, b, c]))
    keras.Model({"pairs": {"p": a, "q": b}, "other": c}, together).save(tmp_path / "m.keras")
    arrays = {name: np.full((24, 2), n) + np.arange(24)[:, None] for n, name in enumerate("abc")}
    np.savez(tmp_path / "x.npz", **arrays)
    run("recalibrate", tmp_path / "m.keras", "--data", tmp_path / "x.npz", "--output", tmp_path / "r.keras")
    mean = keras.models.load_model(tmp_path / "r.keras").get_layer("norm").moving_mean
    np.testing.assert_allclose(mean, [11.5, 11.5, 12.5, 12.5, 13.5, 13.5])


def test_layers_of_ones_own_are_imported_by_name(here, data):
    namespace = {}
    exec(SHIFTED, namespace)
    small_model(namespace["Shifted"]()).save(here / "own.keras")
    del namespace
    keras.saving.get_custom_objects().pop("mine>Shifted")
    assert "--import MODULE names the module that has it." in run("health", "own.keras", code=1).stderr
    run("recalibrate", "own.keras", "--import", "shifted_layers", "--data", data, "-o", "exact.keras")
    assert "norm" in run("health", "exact.keras", "--import", "shifted_layers").stdout
    assert "--import must name a module" in run("health", "own.keras", "--import", "nowhere", code=1).stderr
    said = run("health", "own.keras", "--import", "shifted_layers.py", code=1).stderr
    assert said.endswith(" Did you mean --import shifted_layers?\n")


def test_a_file_of_weights_alone_is_called_that(tmp_path):
    small_model().save_weights(tmp_path / "a.weights.h5")
    said = run("health", tmp_path / "a.weights.h5", code=1).stderr
    assert said.endswith('it holds weights only; `model.save("model.keras")` saves the whole model.\n')


@pytest.mark.parametrize("suffix", ["keras", "h5"])
def test_operations_of_keras_are_in_files_of_keras_only(suffix, tmp_path):
    inputs = keras.Input((3,))
    y = keras.ops.tanh(keras_bn.BatchNormalization(name="norm")(inputs))
    keras.Model(inputs, y).save(tmp_path / f"model.{suffix}")
    ran = run("health", tmp_path / f"model.{suffix}", code=int(suffix == "h5"))
    if suffix == "keras":
        assert "norm" in ran.stdout
    else:
        assert "'Tanh'. Operations of `keras.ops` are in no .h5 file: save the model as .keras." in ran.stderr


@pytest.mark.parametrize("suffix", ["keras", "h5"])
def test_code_in_a_file_runs_only_when_it_is_trusted(suffix, tmp_path):
    path = tmp_path / f"code.{suffix}"
    small_model(keras.layers.Lambda(lambda x: x * 2.0)).save(path)
    said = run("health", path, code=1).stderr
    assert said == f"Error: {path} cannot be loaded: it holds Python code (a Lambda layer), which only --trust runs.\n"
    assert "norm" in run("health", path, "--trust").stdout


def test_output_goes_into_a_folder_that_is_made_in_the_format_that_its_name_says(tmp_path):
    small_model().save(tmp_path / "model.keras")
    run("fold", tmp_path / "model.keras", "-o", tmp_path / "new/folder/folded.h5")
    with h5py.File(tmp_path / "new/folder/folded.h5") as file:
        assert "model_weights" in file


@pytest.mark.parametrize(
    ("output", "words"),
    [("folded.txt", "--output must end in .keras, .h5, .hdf5."), ("x.npy/folded.keras", "x.npy is no folder.")],
)
def test_where_the_result_goes_is_checked_before_the_model_is_read(output, words, data, tmp_path):
    (tmp_path / "model.keras").write_text("no model")
    arguments = ["recalibrate", tmp_path / "model.keras", "--data", data, "-o", tmp_path / output]
    assert words in run(*arguments, code=2).stderr


def test_data_of_another_shape_is_refused_in_words(tmp_path):
    small_model().save(tmp_path / "model.keras")
    np.save(tmp_path / "x.npy", np.zeros((10, 5), "float32"))
    said = run("drift", tmp_path / "model.keras", "--data", tmp_path / "x.npy", code=1).stderr
    assert said == f"Error: {tmp_path / 'x.npy'} must hold examples of shape (4). Received: (5,).\n"


def test_stdout_is_the_result_and_stderr_stays_empty_where_nobody_looks_on(data, tmp_path):
    small_model().save(tmp_path / "model.h5")
    command = [sys.executable, "-c", "from keras_bn_cli import main; main()", "recalibrate", tmp_path / "model.h5"]
    done = subprocess.run(
        [*command, "--data", data, "-o", tmp_path / "exact.keras", "--json"], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["method"] == "pooled"


def test_an_error_that_nobody_has_thought_of_is_one_line_and_can_be_looked_into(tmp_path):
    small_model().save(tmp_path / "model.keras")
    (tmp_path / "1/assets.extra").mkdir(parents=True)
    (tmp_path / "1/saved_model.pb").touch()
    (tmp_path / "1/assets.extra/keras_bn.json").write_text('{"signatures": {}, "folding": null}')
    assert run("inspect", tmp_path / "1", code=1).stderr == "Error: KeyError: 'model'\n"
    with pytest.raises(KeyError):
        CliRunner().invoke(main, ["--traceback", "inspect", str(tmp_path / "1")], catch_exceptions=False)


def test_a_text_that_is_called_npy_is_no_pickle_to_be_trusted(tmp_path):
    small_model().save(tmp_path / "m.keras")
    (tmp_path / "x.npy").write_text("1 2 3")
    said = run("drift", tmp_path / "m.keras", "--data", tmp_path / "x.npy", code=1).stderr
    assert f"{tmp_path / 'x.npy'} cannot be read as .npy or .npz of numbers: it is neither." in said
    assert "pickle" not in said


@pytest.mark.parametrize("suffix", ["npy", "npz"])
@pytest.mark.parametrize("command", ["drift", "ask"])
def test_objects_of_python_are_named_and_not_read(command, suffix, tmp_path):
    content = np.array([{"a": 1}, None], object)
    file = tmp_path / f"objects.{suffix}"
    if suffix == "npy":
        np.save(file, content)
    else:
        np.savez(file, x=content)
    small_model().save(tmp_path / "model.keras")
    words = ("ask", file) if command == "ask" else ("drift", tmp_path / "model.keras", "--data", file)
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code != 0
    assert result.stderr.startswith(f"Error: {file} cannot be read as .")
    assert "it holds Python objects, which are never read; save an array of numbers" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("content", ["{", "[]", '{"model": "m"}'])
def test_a_broken_card_is_named(content, tmp_path):
    (tmp_path / "assets.extra").mkdir()
    (tmp_path / "assets.extra" / "keras_bn.json").write_text(content)
    said = run("inspect", tmp_path, code=1).stderr
    assert f"{tmp_path / 'assets.extra' / 'keras_bn.json'} is broken; export the version anew." in said
    assert len(said.splitlines()) == 1


def test_a_model_that_does_not_tell_its_inputs_gets_all_arrays_by_name(tmp_path):
    class Both(keras.Model):
        def call(self, inputs):
            return inputs["u"] + inputs["v"]

    u, v = np.ones((4, 2), "float32"), np.zeros((4, 2), "float32")
    np.savez(tmp_path / "both.npz", u=u, v=v)
    model = Both()
    model({"u": u, "v": v})
    given = Data(tmp_path / "both.npz", None).for_model(model)
    assert sorted(given) == ["u", "v"]
    np.testing.assert_array_equal(model(given), u)
    np.testing.assert_array_equal(Data(tmp_path / "both.npz", "v").for_model(model), v)


def test_the_command_runs_as_a_module_too():
    done = subprocess.run([sys.executable, "-m", "keras_bn_cli", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()[0]) == (0, "keras-bn")
