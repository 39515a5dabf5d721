"""Versions of which a file is broken: the command and the library say which, in one line."""

import json
import shutil

import keras
import numpy as np
import pytest
import tensorflow as tf
from click.testing import CliRunner

import keras_bn
from keras_bn_cli import main

DATA, INDEX, GRAPH = "variables/variables.data-00000-of-00001", "variables/variables.index", "saved_model.pb"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("versions")
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(30), keras_bn.BatchNormalization()])
    np.save(folder / "x.npy", np.ones((3, 4), "float32"))
    return keras_bn.export(model, folder / "served").path, folder / "x.npy"


def flipped(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(bytes(content))


def cut(path):
    path.write_bytes(path.read_bytes()[:100])


def emptied(path):
    path.write_bytes(b"")


def removed(path):
    path.unlink()


def run(*arguments, code=1):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result.stderr


@pytest.mark.parametrize("break_file", [flipped, cut, emptied, removed])
@pytest.mark.parametrize("name", [DATA, INDEX, GRAPH])
def test_a_broken_file_of_a_version_is_named(name, break_file, exported, tmp_path):
    version, data = exported
    broken = shutil.copytree(version, tmp_path / "1")
    break_file(broken / name)
    for command in (["inspect", broken], ["drift", broken, "--data", data]):
        said = run(*command)
        assert said.startswith(f"Error: {broken / name} is {'missing' if break_file is removed else 'broken'}; ")
        assert said.count("\n") == 1
    with pytest.raises(ValueError, match=r"`model` must be .*the folder of a") as raised:
        keras_bn.drift(broken, np.ones((3, 4), "float32"))
    said = str(raised.value)
    assert str(broken) in said
    assert "\n" not in said
    if (name, break_file) != (GRAPH, removed):  # Of which it is said that it is no version.
        assert f"of which {name.split('/')[0]}" in said


def test_a_graph_that_still_loads_with_another_byte_in_it_is_not_asked(exported, tmp_path):
    version = shutil.copytree(exported[0], tmp_path / "1")
    path = version / GRAPH
    assert path.read_bytes().count(b"batch_norm_drift") > 0
    # A field that nobody has: all readers pass over it.
    path.write_bytes(path.read_bytes() + b"\xfa\x3f\x01x")
    assert "batch_norm_drift" in tf.saved_model.load(str(version)).signatures
    with pytest.raises(ValueError, match=r"of which saved_model.pb is not as it was written"):
        keras_bn.drift(version, np.ones((3, 4), "float32"))


def test_a_version_whose_card_says_nothing_of_its_files_is_inspected_as_before(exported, tmp_path):
    version = shutil.copytree(exported[0], tmp_path / "1")
    card = version / "assets.extra/keras_bn.json"
    content = json.loads(card.read_text())
    del content["files"]
    card.write_text(json.dumps(content))
    run("inspect", version, code=0)
    cut(version / DATA)
    said = run("drift", version, "--data", exported[1])
    assert said.startswith("Error: `model` must be the folder of a whole version; copy or export it anew. Received: ")
    assert "of which variables/ cannot be read" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("left", [1, 11, 12, -1])
def test_warm_up_requests_that_end_within_a_record_are_named(left, exported, tmp_path):
    version = shutil.copytree(exported[0], tmp_path / "1")
    file = version / "assets.extra/tf_serving_warmup_requests"
    with tf.io.TFRecordWriter(str(file)) as writer:
        for _ in range(2):
            writer.write(b"a request")
    run("inspect", version, code=0)
    whole = file.read_bytes()
    start = len(whole) // 2
    file.write_bytes(whole[: start + left] if left > 0 else whole[:left])
    said = run("inspect", version)
    assert said.startswith(f"Error: {file} is broken, no server warms up with it; export the version anew or remove")
    assert said.endswith(f"ends within the record at {start}.\n")
    assert said.count("\n") == 1


def test_a_model_file_is_no_version_and_the_command_for_it_is_named(exported):
    said = run("inspect", exported[1], code=2)
    assert "must be the folder of an exported version; keras-bn health tells of a model file" in said


def test_errors_of_tensorflow_are_the_line_that_says_it(exported, monkeypatch):
    def fails(*_, **__):
        tf.debugging.assert_equal(1, 2, message="one and two differ")

    monkeypatch.setattr(keras_bn, "drift", fails)
    said = run("drift", exported[0], "--data", exported[1])
    assert said == "Error: InvalidArgumentError: one and two differ\n"
