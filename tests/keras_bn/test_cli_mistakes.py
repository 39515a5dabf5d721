"""Two hundred wrong command lines: each is one line on stderr, and never a traceback."""

import random

import keras
import numpy as np
import pytest
from click.testing import CliRunner

import keras_bn
from keras_bn_cli import main

COUNT = 200
COMMANDS = ("health", "recalibrate", "fold", "export", "drift")
WRONG_MODELS = (
    *("nowhere.keras", "empty.keras", "text.keras", "cut.keras", "text.h5", "code.keras", "own.keras", "x.npy"),
    "folder",
)
WRONG_DATA = (
    *("nowhere.npy", "empty.npy", "text.npy", "cut.npy", "cut.npz", "several.npz", "none.npz", "objects.npy"),
    *("wide.npy", "one_number.npy", "no_rows.npy", "words.npy", "folder"),
)
WRONG_OPTIONS = {
    "health": (
        *(["--picture", "p.txt"], ["--picture", "x.npy"], ["--picture", "there.png"], ["--batch-size", "0"]),
        *(["--overwrite"], ["--batch-size", "true"], ["--array", "x"], ["--json=1"], ["--trust=no"]),
    ),
    "recalibrate": (
        *(["--method", "poled"], ["--order", "last"], ["--batch-size", "x"], ["--divide-by", "0"]),
        *(["--batch-size", "1.5"], ["--batch-size", "1e3"], ["--divide-by", ""], ["--divide-by", "True"]),
        *(["--method", "1"], ["--order", ""], ["--overwrite=yes"], ["--array", "x"], ["-o", "there.keras"]),
        *(["--steps", "0"], ["--steps", "x"], ["--tolerance", "0"], ["--tolerance", "nan"], ["--layers", "x"]),
    ),
    "fold": (
        *(["--tolerance", "-1"], ["--tolerance", "nan"], ["--tolerance", "1e-30"], ["--tolerance", "true"]),
        *(["--tolerance", ""], ["--overwrite=1"], ["-o", "there.keras"], ["-o", "model.keras"], ["--array", "x"]),
    ),
    "export": (
        *(["--accuracy", "2"], ["--version", "-1"], ["--version", "x"], ["--labels", "x.npy"], ["--labels", "one.txt"]),
        *(["--warmup", "wide.npy"], ["--warmup", "text.npy"], ["--array", "x"], ["--drft"], ["--labels", "blank.txt"]),
        *(["--version", "1.0"], ["--version", "true"], ["--version", str(2**63)], ["--accuracy", "yes"]),
        *(["--accuracy", "nan"], ["--fold=true"], ["--pixels=1"], ["--overwrite"], ["--jit-compile=yes"]),
        *(["--labels", "empty.txt"], ["--warmup", "x.npy", "--array", "y"]),
    ),
    "drift": (
        *(["--limit", "nan"], ["--limit", "-1"], ["--divide-by", "inf"], ["--limit", "true"], ["--limit", ""]),
        *(["--batch-size", "-3"], ["--batch-size", "1,000"], ["--import", ""], ["--json", "--json=0"]),
    ),
}
_SERVED = ["--model_base_path=folder"]
WRONG_FLAGS = {
    "serve": (
        *([], ["--model_base_path=nowhere"], ["--model_base_path=folder"], ["--model_base_path=x.npy"], ["--port=x"]),
        *(["--model_config_file=x.npy"], ["--model_config_file=nowhere"], ["--modelname=x"], ["stray"]),
        ["--batching_parameters_file=x", "--model_base_path=folder"],
        *([*_SERVED, "--rest_api_port=true"], [*_SERVED, "--port=1.5"], [*_SERVED, "--enable_batching=maybe"]),
        *([*_SERVED, "--rest_api_timeout_in_ms=1.5"], [*_SERVED, "--log_level=3"], [*_SERVED, "--port"]),
        [*_SERVED, "--file_system_poll_wait_seconds=true"],
    ),
    "ask": (
        *(["text.npy"], ["empty.npy"], ["cut.npz"], ["nowhere.png"], ["x.npy", "1"], ["folder"], ["--timeout=-1", "1"]),
        *(["--url=ftp://x", "1"], ["--url=http://127.0.0.1:1", "1"], ["--url=x", "1"], ["--what"], ["objects.npy"]),
        *(["--timeout=true", "1"], ["--model_version=1.5", "1"], ["--model_version=True", "1"], ["--json=1", "1"]),
        *(["--model_version=", "1"], ["--url=", "1"], ["--timeout", "1s", "1"]),
    ),
}


class Doubled(keras.layers.Layer):
    """A layer that no command knows."""

    def call(self, x):
        return x * 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")

    def model(*layers):
        return keras.Sequential([keras.Input((4,)), *layers, keras_bn.BatchNormalization(), keras.layers.Dense(2)])

    model().save(folder / "model.keras")
    model(keras.layers.Lambda(lambda x: x * 2)).save(folder / "code.keras")
    model(Doubled()).save(folder / "own.keras")
    whole = (folder / "model.keras").read_bytes()
    (folder / "cut.keras").write_bytes(whole[: len(whole) // 2])
    np.save(folder / "x.npy", np.random.default_rng(0).normal(0, 1, (20, 4)).astype("float32"))
    np.savez(folder / "several.npz", a=np.zeros((3, 4)), b=np.zeros((3, 4)))
    (folder / "cut.npz").write_bytes((folder / "several.npz").read_bytes()[:300])
    (folder / "cut.npy").write_bytes((folder / "x.npy").read_bytes()[:-7])
    np.savez(folder / "none.npz")
    np.save(folder / "objects.npy", np.array([{"a": 1}], object))
    np.save(folder / "wide.npy", np.zeros((3, 5), "float32"))
    np.save(folder / "one_number.npy", np.float32(1))
    np.save(folder / "no_rows.npy", np.zeros((0, 4), "float32"))
    np.save(folder / "words.npy", np.array([["a"] * 4]))
    (folder / "blank.txt").write_text("one\n\n")
    for name in ("empty.keras", "empty.npy", "empty.txt", "there.keras", "there.png"):
        (folder / name).touch()
    for name in ("text.keras", "text.h5", "text.npy", "one.txt"):
        (folder / name).write_text("no model, no data\n")
    (folder / "folder").mkdir()
    return folder


def mistaken(draw):
    """A command line with one mistake or two, of which each alone is enough."""
    command = draw.choice([*COMMANDS, *WRONG_FLAGS, "recalbrate"])
    if command in WRONG_FLAGS:
        # A server waits for what is not there yet.
        now = ["--wait_for_models=false"] if command == "serve" else []
        return [command, *now, *draw.choice(WRONG_FLAGS[command])]
    if command not in COMMANDS:
        return [command, "model.keras"]
    kinds = draw.sample(["model", "data", "output", "option", "unknown", "stray"], draw.choice([1, 1, 2]))
    if command == "export":
        kinds = ["option" if kind in ("data", "output") else kind for kind in kinds]
    if command in ("health", "drift"):
        kinds = ["data" if kind == "output" else kind for kind in kinds]
    words = [command, draw.choice(WRONG_MODELS) if "model" in kinds else "model.keras"]
    if command == "export":
        words.append("x.npy" if draw.random() < 0.2 else f"served{draw.random()}")
    else:
        data = draw.choice(WRONG_DATA) if "data" in kinds else "x.npy"
        words += ["--data", data] if command in ("recalibrate", "drift") or "data" in kinds else []
    if command in ("recalibrate", "fold"):
        wrong = ["-o", draw.choice(["out.txt", "out", "x.npy/out.keras", "folder", "model.keras", "there.keras", ""])]
        words += draw.choice([wrong, []]) if "output" in kinds else ["-o", "out.keras"]
    if "option" in kinds:
        words += draw.choice(WRONG_OPTIONS[command])
    if "unknown" in kinds:
        words.append(draw.choice(["--modl", "--data-set=x", "-z", "--json=yes"]))
    if "stray" in kinds:
        words += ["stray", "words"]
    return words


def test_two_hundred_wrong_command_lines_end_in_one_line_each(folder, monkeypatch):
    monkeypatch.chdir(folder)
    draw = random.Random(0)
    before = {path.name for path in folder.iterdir()}
    for number in range(COUNT):
        words = mistaken(draw)
        result = CliRunner().invoke(main, words)
        said = result.stderr
        assert result.exit_code in (1, 2), (number, words, result.output)
        assert isinstance(result.exception, SystemExit), (words, result.exception)
        assert said.count("\n") == 1, (words, said)
        assert said.startswith("Error: "), (words, said)
        assert "Traceback" not in said
        assert len(said) < 600, (words, said)
        assert result.stdout == "", (words, result.stdout)
        assert {path.name for path in folder.iterdir()} == before, words
