"""Versions that cannot be loaded: the server says of which files, and not where in TensorFlow's graph that was."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from keras_bn_serving.engine.servable import Servable
from keras_bn_serving.errors import Code, ServingError
from keras_bn_serving.sizes import exact_size_text, size_text

DATA, INDEX, GRAPH = "variables/variables.data-00000-of-00001", "variables/variables.index", "saved_model.pb"


@pytest.fixture(scope="module")
def version(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A version with weights."""
    module = tf.Module()
    module.weights = tf.Variable(tf.random.normal([100]))
    body = tf.function(lambda x: {"y": x * module.weights}, input_signature=[tf.TensorSpec([None, 100], name="x")])
    folder = tmp_path_factory.mktemp("loading") / "1"
    tf.saved_model.save(module, str(folder), signatures=body.get_concrete_function())
    return folder


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _changed(file: Path) -> None:
    file.write_bytes(bytes(byte ^ 0xFF for byte in file.read_bytes()))


@pytest.mark.parametrize("spoil", [_cut, _changed, Path.unlink])
@pytest.mark.parametrize("name", [DATA, INDEX, GRAPH])
def test_a_version_with_a_broken_file_is_named_and_its_weights_where_they_are_meant(name, spoil, version, tmp_path):
    broken = shutil.copytree(version, tmp_path / "1")
    spoil(broken / name)
    with pytest.raises(ServingError) as caught:
        Servable(broken)
    said = caught.value.message
    assert str(broken) in said
    assert "Graph execution error" not in said
    assert "{{" not in said
    assert "\n" not in said
    if name == DATA and spoil is not Path.unlink:
        assert said.startswith(f"Cannot load the weights in {broken / 'variables'}: ")
        assert said.endswith("; copy or export the version anew")


def _saved_by_hand(folder: Path, tags: list[str], asset_twice: bool = False) -> Path:
    """As programs of TensorFlow 1 do it; what is fetched is what is fed."""
    v1 = tf.compat.v1
    words = folder.parent / "words.txt"
    words.write_text("a\n")
    with tf.Graph().as_default(), v1.Session() as session:
        x, sparse = v1.placeholder(tf.float32, [None], "x"), v1.sparse_placeholder(tf.float32, [None, 4])
        asset = tf.constant(str(words), name="asset")
        for _ in range(1 + asset_twice):
            v1.add_to_collection(v1.GraphKeys.ASSET_FILEPATHS, asset)
        info = v1.saved_model.build_tensor_info
        signatures = {
            name: v1.saved_model.build_signature_def({"x": info(tensor)}, {"y": info(x)}, "tensorflow/serving/predict")
            for name, tensor in (("same", x), ("sparse", sparse))
        }
        builder = v1.saved_model.Builder(str(folder))
        assets = v1.get_collection(v1.GraphKeys.ASSET_FILEPATHS)
        builder.add_meta_graph_and_variables(session, tags, signatures, assets_collection=assets)
        builder.save()
    return folder


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("same", "x:0 is both fed and fetched."),
        ("sparse", "Tensor :0, specified in either feed_devices or fetch_devices was not found in the Graph"),
    ],
)
def test_what_tensorflow_refuses_to_run_is_said_in_its_words(tmp_path, name, said):
    servable = Servable(_saved_by_hand(tmp_path / "1", ["serve"]))
    with pytest.raises(ServingError, match=said) as caught:
        servable.run(servable.signature(name), {"x": np.ones(2, np.float32)})
    assert caught.value.code is Code.INVALID_ARGUMENT


def test_a_savedmodel_without_the_tag_of_servers_is_not_found(tmp_path):
    with pytest.raises(
        ServingError, match=r"Could not find meta graph def matching supplied tags: \{ serve \}"
    ) as caught:
        Servable(_saved_by_hand(tmp_path / "1", ["train"]))
    assert caught.value.code is Code.NOT_FOUND


def test_an_asset_that_is_named_twice_is_refused(tmp_path):
    with pytest.raises(ServingError, match=r'Endpoint "asset:0" fed more than once\.') as caught:
        Servable(_saved_by_hand(tmp_path / "1", ["serve"], asset_twice=True))
    assert caught.value.code is Code.INVALID_ARGUMENT


@pytest.mark.parametrize(
    ("size", "text", "exact"),
    [
        (0, "0 bytes", "0 bytes"),
        (1023, "1023 bytes", "1023 bytes"),
        (1024, "1.0 KiB", "1.0 KiB (1,024 bytes)"),
        (1_258_291, "1.2 MiB", "1.2 MiB (1,258,291 bytes)"),
        (2**20 - 1, "1.0 MiB", "1.0 MiB (1,048,575 bytes)"),
        (256 * 2**20, "256.0 MiB", "256.0 MiB (268,435,456 bytes)"),
        (3 * 2**50, "3072.0 TiB", "3072.0 TiB (3,377,699,720,527,872 bytes)"),
    ],
)
def test_bytes_are_told_in_units_that_people_read(size, text, exact):
    assert (size_text(size), exact_size_text(size)) == (text, exact)
