"""The keras-bn command, as a person types it."""

import json
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from click.testing import CliRunner

import keras_bn
from keras_bn_cli import main

ROOT = Path(keras_bn.__file__).parent.parent


@pytest.fixture
def model_file(tmp_path):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((6, 6, 1)),
            keras.layers.Conv2D(3, 3, name="conv"),
            keras_bn.BatchNormalization(name="norm"),
            keras.layers.Flatten(),
            keras.layers.Dense(2, activation="softmax"),
        ]
    )
    model.save(tmp_path / "model.keras")
    return tmp_path / "model.keras"


@pytest.fixture
def data_file(tmp_path):
    x = np.random.default_rng(0).normal(3, 2, (40, 6, 6, 1)).astype("float32")
    np.savez(tmp_path / "data.npz", x_train=x, y_train=np.zeros(40))
    np.save(tmp_path / "x.npy", x)
    return tmp_path / "data.npz"


def run(*arguments, code=0):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result


def test_help_names_every_command_and_imports_no_tensorflow():
    program = (
        "import sys; sys.argv = ['keras-bn', '--help']\n"
        "from keras_bn_cli import main\n"
        "try:\n    main()\n"
        "finally:\n    print('heavy:', sorted({'tensorflow', 'keras', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for word in ("health", "inspect", "recalibrate", "fold", "export", "drift", "Exit codes"):
        assert word in done.stdout
    assert "heavy: []" in done.stdout


def test_the_installed_command_knows_the_layer_in_a_file(model_file):
    program = "import sys; sys.argv[0] = 'keras-bn'\nfrom keras_bn_cli import main\nmain(sys.argv[1:])"
    command = [sys.executable, "-c", program, "health", str(model_file), "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["layers"][0]["name"] == "norm"


@pytest.mark.parametrize("command", ["health", "inspect", "recalibrate", "fold", "export", "drift"])
def test_every_command_explains_itself(command):
    output = run(command, "--help").output
    assert "--json" in output
    assert ("VERSION" if command == "inspect" else "MODEL") in output


def test_health_names_the_layer_behind_a_gap(model_file, data_file):
    output = run("health", model_file, "--data", data_file, "--array", "x_train").output
    assert "because of: norm." in output


def test_health_prints_json_and_nothing_else(model_file, data_file):
    output = run("health", model_file, "--data", data_file, "--array", "x_train", "--json").stdout
    assert json.loads(output)["suspects"] == ["norm"]


def test_recalibrate_writes_a_new_file_with_the_population_statistics(model_file, data_file, tmp_path):
    new = tmp_path / "exact.keras"
    output = run("recalibrate", model_file, "--data", tmp_path / "x.npy", "-o", new, "--batch-size", 16).stdout
    assert "Moving statistics replaced (pooled, sequential):" in output
    model = keras.models.load_model(new)
    seen = model.layers[0](np.load(tmp_path / "x.npy")).numpy()
    np.testing.assert_allclose(model.get_layer("norm").moving_mean, seen.mean((0, 1, 2)), rtol=1e-4)
    assert keras.models.load_model(model_file).get_layer("norm").moving_mean.numpy().tolist() == [0, 0, 0]


def test_recalibrate_takes_what_the_function_takes(model_file, data_file, tmp_path):
    data = ("--data", tmp_path / "x.npy", "--batch-size", 2, "--json", "-o")
    few = run("recalibrate", model_file, *data, tmp_path / "few.keras", "--steps", 3, "--layers", "norm")
    assert json.loads(few.stdout)["layers"][0]["count"] == 3 * 2 * 16
    said = run("recalibrate", model_file, *data, tmp_path / "all.keras", "--tolerance", 1e-6)
    assert said.stderr.startswith("Warning: `tolerance` was not reached.")
    assert len(said.stderr.splitlines()) == 1
    assert json.loads(said.stdout)["short_of_tolerance"] == ["norm"]
    stopped = run("recalibrate", model_file, *data, tmp_path / "soon.keras", "--tolerance", 10)
    assert json.loads(stopped.stdout)["layers"][0]["batches"] == 10
    other = run("recalibrate", model_file, *data, tmp_path / "no.keras", "--layers", "norm", "--layers", "x", code=1)
    assert "`layers` must be a list of some of ['norm']. Received: layers=('norm', 'x')." in other.stderr
    assert not (tmp_path / "no.keras").exists()


def test_fold_writes_a_model_without_normalizations(model_file, data_file, tmp_path):
    report = json.loads(run("fold", model_file, "-o", tmp_path / "folded.keras", "--json").stdout)
    assert (report["absorbed"], report["normalizations"][0]["into"]) == (1, ["conv"])
    assert len(keras.models.load_model(tmp_path / "folded.keras").layers) == 3


def test_export_then_inspect_and_drift_on_the_exported_version(model_file, data_file, tmp_path):
    (tmp_path / "labels.txt").write_text("shirt\nshoe\n")
    exact, served = tmp_path / "exact.keras", tmp_path / "served"
    run("recalibrate", model_file, "--data", tmp_path / "x.npy", "-o", exact)
    output = run("export", exact, served, "--labels", tmp_path / "labels.txt", "--accuracy", 0.9).output
    assert "output  probabilities: float32 (any, 2)" in output
    assert "folding: 1 of 1 normalizations absorbed" in output
    assert run("inspect", served / "1").output == output
    near = json.loads(run("drift", served / "1", "--data", tmp_path / "x.npy", "--json", "--limit", 0.1).stdout)
    assert near["layers"][0]["layer"] == "norm"
    assert near["layers"][0]["kl"] < 1e-3
    np.save(tmp_path / "other.npy", -np.load(tmp_path / "x.npy"))
    for model in (served / "1", exact):
        result = run("drift", model, "--data", tmp_path / "other.npy", "--limit", 0.1, code=3)
        assert "KL above 0.1: norm" in result.stderr


def test_drift_of_a_version_of_two_inputs_takes_an_array_of_the_name_of_each(tmp_path):
    a, b = keras.Input((4,), name="left"), keras.Input((4,), name="right")
    norm = keras.layers.BatchNormalization(name="norm")
    model = keras.Model([a, b], norm(keras.layers.Add()([a, b])))
    rng = np.random.default_rng(0)
    inputs = {name: rng.normal(size=(9, 4)).astype("float32") for name in ("left", "right")}
    version = keras_bn.export(model, tmp_path / "served").path
    np.savez(tmp_path / "both.npz", **inputs, more=np.zeros(3))
    rows = json.loads(run("drift", version, "--data", tmp_path / "both.npz", "--batch-size", 4, "--json").stdout)
    assert rows["layers"] == keras_bn.drift(version, inputs)
    np.savez(tmp_path / "one.npz", left=inputs["left"])
    assert "right" in run("drift", version, "--data", tmp_path / "one.npz", code=1).stderr


def test_export_takes_pixels_as_they_are(model_file, tmp_path):
    facts = json.loads(run("export", model_file, tmp_path / "served", "--pixels", "--no-drift", "--json").stdout)
    assert facts["signatures"] == ["serving_default", "image_bytes"]
    loaded = tf.saved_model.load(facts["path"])
    answer = loaded.signatures["serving_default"](image=tf.fill((1, 6, 6, 1), tf.constant(255, tf.uint8)))
    expected = keras.models.load_model(model_file)(np.ones((1, 6, 6, 1), "float32"))
    np.testing.assert_allclose(answer["probabilities"], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["health", "MODEL", "--data", "DATA"], "--array must be one of ['x_train', 'y_train'], those in"),
        (["drift", "DIR", "--data", "X"], "The folder must be a version that keras_bn exported"),
        (["inspect", "DIR"], "The folder must be a version that keras_bn exported"),
        (["fold", "X", "-o", "OUT"], "MODEL must be a .keras, .h5, .hdf5 file."),
        (["fold", "MODEL", "-o", "OUT", "--tolerance", "1e-15"], "`tolerance` must be above the error"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_1(arguments, message, model_file, data_file, tmp_path):
    files = {
        "MODEL": model_file,
        "DATA": data_file,
        "DIR": tmp_path,
        "X": tmp_path / "x.npy",
        "OUT": tmp_path / "o.keras",
    }
    result = run(*[files.get(argument, argument) for argument in arguments], code=1)
    assert result.stderr.startswith("Error: ")
    assert message in result.stderr
    assert not (tmp_path / "o.keras").exists()


@pytest.mark.parametrize(("flag", "said"), [("--batch-sze=3", "Did you mean --batch-size?"), ("--nope", "--nope. See")])
def test_a_misspelled_option_is_told_one_that_is_near(flag, said, model_file):
    assert said in run("health", model_file, flag, code=2).stderr


def test_a_misspelled_command_is_exit_code_2():
    assert "No such command 'recalibrated'" in run("recalibrated", code=2).stderr


@pytest.mark.parametrize(
    ("missing", "arguments"),
    [("httpx", ["ask", "1"]), ("httptools", ["serve", "--model_base_path=.", "--rest_api_port=auto"])],
)
def test_without_the_extra_a_line_says_what_to_install(missing, arguments, tmp_path):
    (tmp_path / "1").mkdir()
    program = f"import sys; sys.modules[{missing!r}] = None\nfrom keras_bn_cli import main\nmain({arguments})"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert missing in line
    assert line.endswith("python -m pip install 'keras-bn[serving]'")


def test_version_says_whether_the_compiled_operations_are_there():
    version, *compiled = run("--version").stdout.splitlines()
    assert version == f"keras-bn {keras_bn.__version__}"
    assert compiled == [f"{keras_bn.compiled()}"]


def test_pixels_are_spoken_of_as_the_option_they_are(model_file, data_file, tmp_path):
    keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)]).save(tmp_path / "rows.keras")
    said = run("export", tmp_path / "rows.keras", tmp_path / "served", "--pixels", code=1).stderr
    assert said.startswith("Error: --pixels must be left out for a model that does not take one batch of pictures")
    warmup = ["--pixels", "--warmup", tmp_path / "x.npy"]
    said = run("export", model_file, tmp_path / "served", *warmup, code=1).stderr
    assert said.startswith("Error: --warmup must hold uint8 pictures with --pixels. Received: float32 in ")


def test_warmup_of_several_inputs_is_a_file_of_their_names(tmp_path):
    inputs = [keras.Input((4,), name=name) for name in ("x-ray", "age")]
    keras.Model(inputs, keras.layers.Add()(inputs)).save(tmp_path / "two.keras")
    np.savez(tmp_path / "two.npz", **{"x-ray": np.zeros((3, 4)), "age": np.ones((3, 4))})
    run("export", tmp_path / "two.keras", tmp_path / "served", "--warmup", tmp_path / "two.npz")
    assert (tmp_path / "served/1/assets.extra/tf_serving_warmup_requests").stat().st_size


def test_health_without_data_has_no_columns_of_what_needs_it(model_file, data_file, tmp_path):
    assert run("health", model_file).stdout.splitlines()[0].split() == ["layer", "channels", "dead"]
    output = run("health", model_file, "--data", tmp_path / "x.npy").stdout
    assert output.splitlines()[0].endswith("batch KL")


def test_a_base_path_in_place_of_a_version_is_told_the_version(model_file, data_file, tmp_path):
    run("export", model_file, tmp_path / "served")
    for command in (["inspect"], ["drift", "--data", tmp_path / "x.npy"]):
        said = run(*command, tmp_path / "served", code=1).stderr
        assert f"which has versions: give {tmp_path / 'served' / '1'}." in said


def test_drift_of_nothing_is_null_in_json(tmp_path):
    x = keras.Input((6, 3))
    model = keras.Model(x, keras.layers.BatchNormalization()(keras.layers.Masking()(x)))
    model.save(tmp_path / "masked.keras")
    np.save(tmp_path / "zeros.npy", np.zeros((2, 6, 3), "float32"))
    output = run("drift", tmp_path / "masked.keras", "--data", tmp_path / "zeros.npy", "--json").stdout
    assert '"kl": null' in output
    np.save(tmp_path / "nan.npy", np.full((2, 6, 3), np.nan, "float32"))
    said = run("drift", tmp_path / "masked.keras", "--data", tmp_path / "nan.npy", code=1).stderr
    assert said.startswith("Error: `inputs` must be finite.")
