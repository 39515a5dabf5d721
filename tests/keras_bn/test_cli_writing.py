"""What the keras-bn command leaves behind: a whole file or the old one, and nothing half done."""

import errno
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from click.testing import CliRunner

import keras_bn
from keras_bn import exporting
from keras_bn_cli import main, shell
from keras_bn_cli.files import written_whole

ROOT = Path(keras_bn.__file__).parent.parent


@pytest.fixture
def files(tmp_path, monkeypatch):
    """In the working folder a model of 80 kB, examples for it, and nothing else."""
    monkeypatch.chdir(tmp_path)
    keras.utils.set_random_seed(0)
    dense, norm = keras.layers.Dense(100, name="dense"), keras_bn.BatchNormalization(name="norm")
    keras.Sequential([keras.Input((200,)), dense, norm, keras.layers.Dense(2, name="last")]).save("model.keras")
    np.save("x.npy", np.random.default_rng(0).normal(size=(20, 200)).astype("float32"))
    return tmp_path


def run(*arguments, code=0):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    if code:
        assert result.stderr.count("\n") == 1, result.stderr
    return result


COMMANDS = {
    "recalibrate": ("recalibrate", "model.keras", "--data", "x.npy", "-o"),
    "fold": ("fold", "model.keras", "-o"),
    "health": ("health", "model.keras", "--data", "x.npy", "--picture"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_file_that_is_there_is_replaced_only_where_that_is_asked_for(command, files):
    if command == "health":
        pytest.importorskip("matplotlib")
    output = "there.png" if command == "health" else "there.keras"
    Path(output).write_text("mine")
    said = run(*COMMANDS[command], output, code=2).stderr
    option = "--picture" if command == "health" else "--output"
    assert f"{option} must be a file that is not there yet, or pass --overwrite. Received: {output}." in said
    assert Path(output).read_text() == "mine"
    run(*COMMANDS[command], output, "--overwrite")
    assert len(Path(output).read_bytes()) > 1000
    assert sorted(path.name for path in files.iterdir()) == sorted(["model.keras", "x.npy", output])


def test_a_model_is_changed_in_its_own_place_only_where_that_is_asked_for(files):
    before = Path("model.keras").read_bytes()
    run(*COMMANDS["recalibrate"], "model.keras", code=2)
    assert Path("model.keras").read_bytes() == before
    run(*COMMANDS["recalibrate"], "model.keras", "--overwrite")
    assert keras.models.load_model("model.keras").get_layer("norm").moving_mean.numpy().any()


@pytest.fixture
def full_disk():
    """No file of this process grows beyond 20 kB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("output", ["there.keras", "there.h5", "there.hdf5"])
def test_where_the_disk_is_full_the_old_file_is_left(output, files, full_disk):
    Path(output).write_text("mine")
    full_disk()
    said = run(*COMMANDS["fold"], output, "--overwrite", code=1).stderr
    assert said == f"Error: {output} cannot be written: File too large.\n"
    assert Path(output).read_text() == "mine"
    assert sorted(path.name for path in files.iterdir()) == sorted(["model.keras", "x.npy", output])


def test_where_the_disk_is_full_there_is_no_version(files, full_disk):
    full_disk()
    said = run("export", "model.keras", "served", code=1).stderr
    assert said.startswith("Error: served cannot be written: ")
    assert "File too large" in said
    assert not Path("served").exists()


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_where_no_folder_can_be_made_it_is_named_with_the_way_out(number, files, monkeypatch):
    def refuse(path, *_, **__):
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    said = run("export", "model.keras", "served", code=1).stderr
    assert said == (f"Error: served cannot be written: {os.strerror(number)}. Give another folder, or mend this one.\n")


def test_an_error_of_the_system_is_told_without_its_number(files, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "somewhere")

    monkeypatch.setattr(keras_bn, "drift", refuse)
    said = run("drift", "model.keras", "--data", "x.npy", code=1).stderr
    assert said == "Error: somewhere: Read-only file system.\n"


def test_a_folder_on_a_file_system_that_is_read_only_is_named_before_the_work(files, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    monkeypatch.setattr(shell, "_is_read_only", lambda folder: folder == files)
    said = run("export", "model.keras", "served", code=2).stderr
    assert f"give another folder. Received: served; {files} is on a file system that is read-only." in said


def test_a_file_in_the_place_of_a_folder_is_named(files):
    said = run("export", "model.keras", "x.npy", code=2).stderr
    assert f"MODEL_BASE_PATH must be where a file can be written; give another folder. Received: x.npy; {files}" in said
    assert "x.npy is no folder." in said


@pytest.mark.parametrize("suffix", ["h5", "hdf5"])
def test_a_file_of_hdf5_is_read_again(suffix, files):
    run(*COMMANDS["recalibrate"], f"new.{suffix}")
    model = keras.models.load_model(f"new.{suffix}")
    seen = keras.models.load_model("model.keras").get_layer("dense")(np.load("x.npy")).numpy()
    np.testing.assert_allclose(model.get_layer("norm").moving_mean, seen.mean(0), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_an_export_that_is_told_to_end_leaves_nothing(name, files, monkeypatch):
    number = getattr(signal, name)

    def end(stage):
        if stage == "model written":
            os.kill(os.getpid(), number)

    monkeypatch.setattr(exporting, "STAGE_HOOKS", [end])
    assert run("export", "model.keras", "served", code=143).stderr == "Error: Terminated.\n"
    assert not Path("served").exists()
    assert signal.getsignal(number) is signal.SIG_DFL


def test_who_interrupts_an_export_is_told_so_in_a_line_and_nothing_is_left(files, monkeypatch):
    def interrupt(stage):
        if stage == "model written":
            raise KeyboardInterrupt

    monkeypatch.setattr(exporting, "STAGE_HOOKS", [interrupt])
    assert run("export", "model.keras", "served", code=130).stderr == "Error: Interrupted.\n"
    assert not Path("served").exists()


def test_what_tensorflow_says_of_the_machine_is_kept_from_who_interrupts_its_import():
    program = """if True:
        import os, sys

        class Interrupted:
            def find_spec(name, path=None, target=None):
                if name == "tensorflow":
                    os.write(2, b"chatter")
                    raise KeyboardInterrupt

        sys.meta_path.insert(0, Interrupted)
        sys.argv = ["keras-bn", "--version"]
        from keras_bn_cli import main
        main()
    """
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "Error: Interrupted.\n")


def test_who_interrupts_before_the_command_has_begun_is_told_so_in_a_line():
    program = """if True:
        import sys

        class Interrupted:
            def find_spec(name, path=None, target=None):
                if name == "click":
                    raise KeyboardInterrupt

        sys.meta_path.insert(0, Interrupted)
        import keras_bn_cli
    """
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "Error: Interrupted.\n")


def test_two_who_write_to_one_file_do_not_write_into_each_other(tmp_path):
    path = tmp_path / "new.txt"
    with written_whole(path, overwrite=True) as slow:
        slow.write_text("slow")
        with written_whole(path, overwrite=True) as fast:
            fast.write_text("fast")
        assert path.read_text() == "fast"
    assert path.read_text() == "slow"
    assert [one.name for one in tmp_path.iterdir()] == ["new.txt"]
