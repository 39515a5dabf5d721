"""Training runs on a few real images: what they write, and that an interruption leaves no trace."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys

import keras
import numpy as np
import pytest

import keras_bn
from models import train
from models.checkpoint import read_log
from models.data import ImageData
from models.settings import Settings
from models.training import accuracy
from models.training import train as run

SMALL = Settings(network="sigmoid_mlp", width=20, epochs=3, batch_size=50, training_images=300, augment=True, seed=7)


@pytest.fixture(scope="module")
def images(fashion_mnist):
    part = {name: getattr(fashion_mnist, name)[:500] for name in ("x_train", "y_train", "x_test", "y_test")}
    return ImageData(**part, origin="a few of Fashion-MNIST")


@pytest.fixture(scope="module")
def uninterrupted(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    return run(SMALL, images, folder), folder


class InterruptAt(keras.callbacks.Callback):
    """Raises KeyboardInterrupt in the middle of an epoch."""

    def __init__(self, epoch):
        super().__init__()
        self.epoch = epoch

    def on_epoch_begin(self, epoch, logs=None):
        self.now = epoch

    def on_train_batch_end(self, batch, logs=None):
        if (self.now, batch) == (self.epoch, 2):
            raise KeyboardInterrupt


def test_an_interrupted_training_ends_as_if_it_had_not_been(images, uninterrupted, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(SMALL, images, tmp_path, callbacks=[InterruptAt(2)])
    assert len(read_log(tmp_path / "log.csv")) == 2
    assert not (tmp_path / "model.keras").exists()

    resumed = run(SMALL, images, tmp_path)
    model, folder = uninterrupted
    for ours, theirs in zip(resumed.weights, model.weights, strict=True):
        np.testing.assert_array_equal(ours, theirs, err_msg=ours.path)
    rows, other_rows = read_log(tmp_path / "log.csv"), read_log(folder / "log.csv")
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert [row["loss"] for row in rows] == [row["loss"] for row in other_rows]


def test_a_run_that_stopped_before_saving_its_model_saves_it(images, uninterrupted, tmp_path):
    model, _ = uninterrupted

    class StopAtTheEnd(keras.callbacks.Callback):
        def on_train_end(self, logs=None):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(SMALL, images, tmp_path, callbacks=[StopAtTheEnd()])
    resumed = run(SMALL, images, tmp_path)
    np.testing.assert_array_equal(resumed.weights[0], model.weights[0])
    assert (tmp_path / "model.keras").exists()


def test_the_saved_model_is_the_trained_one(images, uninterrupted):
    model, folder = uninterrupted
    saved = keras.models.load_model(folder / "model.keras")
    x = images.x_test[:20]
    np.testing.assert_array_equal(saved.predict(x, verbose=0), model.predict(x, verbose=0))


def test_a_finished_run_is_loaded_and_not_trained_again(images, uninterrupted, capsys):
    model, folder = uninterrupted
    again = run(SMALL, images, folder, callbacks=[InterruptAt(0)])
    np.testing.assert_array_equal(again.weights[0], model.weights[0])
    assert "Trained already" in capsys.readouterr().out


def test_a_folder_of_another_run_is_refused(images, uninterrupted):
    _, folder = uninterrupted
    with pytest.raises(ValueError, match=r"seed: 7, now 1\).*`--restart`"):
        run(dataclasses.replace(SMALL, seed=1), images, folder)


def test_a_run_from_before_a_setting_was_there_goes_on(images, uninterrupted, capsys):
    _, folder = uninterrupted
    settings = json.loads((folder / "settings.json").read_text())
    assert settings.pop("recalibrate") is False
    (folder / "settings.json").write_text(json.dumps(settings))
    run(SMALL, images, folder)
    assert "Trained already" in capsys.readouterr().out
    with pytest.raises(ValueError, match="recalibrate: False, now True"):
        run(dataclasses.replace(SMALL, recalibrate=True), images, folder)


def test_a_recalibrated_run_is_saved_with_the_statistics_of_all_training_images(images, tmp_path):
    run(dataclasses.replace(SMALL, epochs=1, recalibrate=True), images, tmp_path)
    saved = keras.models.load_model(tmp_path / "model.keras")
    for name, moments in keras_bn.measure(saved, images.x_train[:300], verbose=0).items():
        np.testing.assert_allclose(saved.get_layer(name).moving_mean, moments.mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(saved.get_layer(name).moving_variance, moments.variance, rtol=1e-5)


def test_a_run_on_other_images_is_refused(images, uninterrupted):
    _, folder = uninterrupted
    with pytest.raises(ValueError, match=r"data: .*crc32"):
        run(SMALL, dataclasses.replace(images, x_train=images.x_train[::-1]), folder)
    with pytest.raises(ValueError, match=r"data: .*labels_crc32"):
        run(SMALL, dataclasses.replace(images, y_train=9 - images.y_train), folder)


def test_a_run_from_before_labels_were_written_down_goes_on(images, uninterrupted, tmp_path, capsys):
    _, folder = uninterrupted
    shutil.copytree(folder, tmp_path / "old")
    path = tmp_path / "old" / "settings.json"
    found = json.loads(path.read_text())
    del found["data"]["labels_crc32"]
    path.write_text(json.dumps(found))
    run(SMALL, images, tmp_path / "old")
    assert "Trained already" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"training_images": 401, "validation_images": 100}, r"must be from 128, .*, to 400, .*training_images=401"),
        ({"training_images": 100}, r"`training_images` must be from 128.*training_images=100"),
        (
            {"validation_images": 400},
            r"`validation_images` must leave a batch of 128 of the 500 .*validation_images=400",
        ),
    ],
)
def test_images_that_are_too_few_are_refused_and_leave_no_folder(images, tmp_path, setting, message):
    with pytest.raises(ValueError, match=message):
        run(Settings(**setting), images, tmp_path / "run")
    assert not (tmp_path / "run" / "settings.json").exists()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"epochs": 0}, r"`epochs` must be at least 1\. Received: epochs=0"),
        ({"label_smoothing": 1.0}, r"`label_smoothing` must be in \[0, 1\)\. Received: label_smoothing=1.0"),
        ({"learning_rate": 0.0}, r"`learning_rate` must be finite and above 0\. Received: learning_rate=0.0"),
        ({"learning_rate": -1e-3}, r"`learning_rate` must be finite and above 0\. Received: learning_rate=-0.001"),
        ({"weight_decay": -0.1}, r"`weight_decay` must be finite and at least 0\. Received: weight_decay=-0.1"),
        ({"network": "alexnet"}, "`network` must be one of fashion_cnn, resnet, sigmoid_mlp"),
        ({"erase": 4}, "`erase` needs `augment`"),
    ],
)
def test_settings_out_of_range_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        Settings(**setting)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Settings) if field.type is float])
def test_a_setting_that_is_not_finite_is_refused_before_anything_is_begun(name, value, monkeypatch, capsys):
    monkeypatch.setattr(train, "start_tensorflow", lambda: pytest.fail("work has begun"))
    with pytest.raises(SystemExit) as ended:
        train.main([f"--{name}={value}"])
    assert ended.value.code == 2
    assert re.search(rf"error: `{name}` must be .*\. Received: {name}={value}$", capsys.readouterr().err.strip())


def test_accuracy_counts_the_most_probable_class(images):
    # A network that does nothing: its "images" are the probabilities.
    probabilities = keras.Input((3,))
    model = keras.Model(probabilities, keras.layers.Identity()(probabilities))
    assert accuracy(model, np.eye(3, dtype=np.float32)[[0, 1, 2, 2]], np.array([0, 1, 2, 0])) == 0.75


def test_the_command_restarts_trains_reports_on_held_out_images_and_says_how_good(images, tmp_path, capsys):
    few, folder = tmp_path / "few.npz", tmp_path / "run"
    np.savez(few, **{name: getattr(images, name) for name in ("x_train", "y_train", "x_test", "y_test")})
    folder.mkdir()
    (folder / "settings.json").write_text(json.dumps({"seed": 1}))
    (folder / "notes.txt").write_text("not of the run")
    train.main(
        f"--data {few} --output {folder} --restart --network sigmoid_mlp --width 4 --epochs 1 --training_images 200 "
        "--validation_images 100 --label_smoothing 0.1".split()
    )
    printed = capsys.readouterr().out
    saved = keras.models.load_model(folder / "model.keras")
    assert f"Test accuracy: {accuracy(saved, images.x_test, images.y_test):.4f} on 500 images" in printed
    assert f"Saved: {folder / 'model.keras'}" in printed
    assert {"loss", "accuracy", "val_loss", "val_accuracy", "seconds"} <= set(read_log(folder / "log.csv")[0])
    assert json.loads((folder / "settings.json").read_text())["seed"] == 0
    assert (folder / "notes.txt").exists()


@pytest.mark.parametrize(
    ("flags", "code", "line"),
    [
        (["--data", "nowhere"], 1, "python -m models.train: error: `source` must be"),
        (["--epochs", "0"], 2, "python -m models.train: error: `epochs` must be at least 1"),
    ],
)
def test_the_command_ends_with_one_line_and_a_code_on_a_mistake(flags, code, line, capsys):
    with pytest.raises(SystemExit) as ended:
        train.main(flags)
    assert ended.value.code == code
    assert capsys.readouterr().err.splitlines()[-1].startswith(line)


def test_help_does_not_wait_for_tensorflow():
    script = "import sys, models.train\ntry: models.train.main(['--help'])\nfinally: print('tensorflow' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert "--batch_size" in shown
    assert shown.splitlines()[-1] == "False"
