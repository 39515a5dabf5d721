"""What a version brings for the page: examples from its warm-up requests, and its card."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from keras_bn_serving.engine.assets import WARMUP_FILE, read_card, read_examples
from keras_bn_serving.engine.loading import Loader
from keras_bn_serving.engine.servable import Servable
from keras_bn_serving.errors import Code, DataLossError, ServingError
from tensorflow_serving.apis import predict_pb2, prediction_log_pb2

from tests.serving import saved_models


@pytest.fixture
def version(tmp_path: Path) -> Servable:
    """A version with inputs of several types."""
    anything = [
        tf.TensorSpec([None, None], tf.float32, name="x"),
        tf.TensorSpec([None], tf.int64, name="n"),
        tf.TensorSpec([None], tf.string, name="s"),
    ]
    one = [tf.TensorSpec([None, None], tf.float32, name="x")]
    signatures = {
        "serving_default": (lambda x, n, s: {"x": tf.identity(x), "n": n + 1, "s": tf.identity(s)}, anything),
        "one": (lambda x: {"y": x * 2.0}, one),
    }
    return Servable(saved_models.export(tmp_path / "1", signatures))


def write(version: Servable, *requests: tuple[str, dict[str, Any]]) -> None:
    """Writes warm-up requests, of a signature's name and its inputs."""
    file = Path(version.path) / WARMUP_FILE
    file.parent.mkdir(exist_ok=True)
    with tf.io.TFRecordWriter(str(file)) as writer:
        for name, inputs in requests:
            request = predict_pb2.PredictRequest(inputs={key: tf.make_tensor_proto(v) for key, v in inputs.items()})
            request.model_spec.signature_name = name
            log = prediction_log_pb2.PredictLog(request=request)
            writer.write(prediction_log_pb2.PredictionLog(predict_log=log).SerializeToString())


def rows(count: int, width: int = 2) -> np.ndarray:
    return np.arange(count * width, dtype=np.float32).reshape(count, width)


def test_examples_are_the_rows_of_the_request_with_the_most_for_each_signature(version: Servable):
    default = {"x": rows(3), "n": np.int64([1, 2, 2**53 + 1]), "s": np.array([b"a", b"\xff", b""], object)}
    first = {name: value[:1] for name, value in default.items()}
    write(version, ("", first), ("", default), ("one", {"x": rows(2)}), ("one", {"x": rows(1)}))
    found = read_examples(version.path, version.signatures)
    assert sorted(found) == ["one", "serving_default"]
    np.testing.assert_array_equal(found["one"]["x"], rows(2))
    for name, value in default.items():
        np.testing.assert_array_equal(found["serving_default"][name], value)


def test_of_many_rows_and_of_large_ones_only_the_first_are_taken(version: Servable):
    write(version, ("one", {"x": rows(40)}))
    np.testing.assert_array_equal(read_examples(version.path, version.signatures)["one"]["x"], rows(12))
    write(version, ("one", {"x": rows(5, 100_000)}))
    np.testing.assert_array_equal(read_examples(version.path, version.signatures)["one"]["x"], rows(5, 100_000)[:2])
    write(version, ("one", {"x": rows(1, 300_000)}))
    assert read_examples(version.path, version.signatures) == {}


def test_what_json_does_not_know_and_what_the_version_does_not_have_is_left_out(version: Servable):
    assert read_examples(version.path, version.signatures) == {}
    write(version, ("one", {"x": np.float32([[np.nan]])}), ("gone", {"x": rows(2)}), ("one", {"x": rows(0)}))
    assert read_examples(version.path, version.signatures) == {}


def test_requests_that_cannot_be_read_are_said_to_be_so(version: Servable):
    write(version, ("one", {"y": rows(1)}))
    with pytest.raises(DataLossError, match=r"Cannot read .*tf_serving_warmup_requests: .*input size does not match"):
        read_examples(version.path, version.signatures)
    (Path(version.path) / WARMUP_FILE).write_bytes(b"no record, but long enough to be one")
    with pytest.raises(DataLossError, match=r"Cannot read .*tf_serving_warmup_requests"):
        read_examples(version.path, version.signatures)


@pytest.mark.parametrize("whole", [0, 2], ids=["alone", "after whole ones"])
@pytest.mark.parametrize("left", [1, 8, 11, 12, 30, -1])
def test_a_version_whose_warm_up_file_ends_within_a_record_does_not_load(whole: int, left: int, version: Servable):
    write(version, *[("one", {"x": rows(2)})] * (whole + 1))
    file = Path(version.path) / WARMUP_FILE
    content = file.read_bytes()
    size = len(content) // (whole + 1)
    file.write_bytes(content[: whole * size + (left if left > 0 else size + left)])
    outcomes: list[str] = []
    load = Loader(on_warm_up=lambda name, status, seconds: outcomes.append(status))
    text = rf"Cannot read record {whole + 1} of .*tf_serving_warmup_requests: .*truncated record at {whole * size}\b"
    with pytest.raises(ServingError, match=text) as raised:
        load("m", 1, version.path)
    assert raised.value.code == Code.DATA_LOSS
    assert outcomes == ["DATA_LOSS"]
    with pytest.raises(DataLossError, match=rf"Cannot read .*truncated record at {whole * size}\b"):
        read_examples(version.path, version.signatures)


@pytest.mark.parametrize("whole", [0, 2])
def test_a_warm_up_file_of_whole_records_or_none_is_read_to_its_end(whole: int, version: Servable):
    write(version, *[("one", {"x": rows(2)})] * whole)
    outcomes: list[str] = []
    Loader(on_warm_up=lambda name, status, seconds: outcomes.append(status))("m", 1, version.path).close()
    assert outcomes == ["OK"]


def test_a_card_is_read_where_there_is_one(tmp_path: Path):
    assert read_card(str(tmp_path)) is None
    card = tmp_path / "assets.extra" / "keras_bn.json"
    card.parent.mkdir()
    card.write_text(json.dumps({"accuracy": 0.5}))
    assert read_card(str(tmp_path)) == {"accuracy": 0.5}
    for text, reason in (("{", "Expecting"), ("[]", "it must hold an object. Received: list.")):
        card.write_text(text)
        with pytest.raises(DataLossError, match=reason):
            read_card(str(tmp_path))
