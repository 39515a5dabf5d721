"""No request of a wrong shape or type ends the server: each gets an answer in words."""

import http.client
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import tensorflow as tf
from tensorflow.core.framework import types_pb2
from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

from serving.check.malformed import malformed
from tests.serving import saved_models
from tests.serving.conftest import OTHERS
from tests.serving.servers import ROOT, RunningServer, running_server

# The codec's words for what never becomes an array, the engine's for what does.
SHAPE_WORDS = ("shape", "rank", "size", "level", "list", "parsing", "instances")
CALLER_AT_FAULT = {
    grpc.StatusCode[name]
    # ABORTED: what oneDNN cannot do with the sizes given, a pool larger than the picture.
    # RESOURCE_EXHAUSTED: what broadcasts to more than --run_memory_in_mb; TensorFlow Serving would take all there is.
    for name in ("INVALID_ARGUMENT", "FAILED_PRECONDITION", "OUT_OF_RANGE", "ABORTED", "RESOURCE_EXHAUSTED")
}


def signatures(server: RunningServer, model: str) -> dict[str, Any]:
    """Returns the inputs of each signature, as the metadata has them."""
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"))
    connection.request("GET", f"/v1/models/{model}/metadata")
    found = json.loads(connection.getresponse().read())["metadata"]["signature_def"]["signature_def"]
    return {name: one["inputs"] for name, one in found.items() if one["inputs"]}


def send_all(server: RunningServer, model: str, seed: int, count: int, in_words: bool = False) -> Counter[str]:
    """Asks every signature of a model over REST and over gRPC; returns how many answers there were of each kind."""
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=120)
    answers: Counter[str] = Counter()
    # Inputs that broadcast against each other are answered by up to 20,000 times 1,000 numbers.
    any_size = [("grpc.max_receive_message_length", -1)]
    with grpc.insecure_channel(server.grpc_target, any_size) as channel:
        stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
        for signature, inputs in signatures(server, model).items():
            for one in malformed(signature, inputs, seed, count):
                connection.request("POST", f"/v1/models/{model}:predict", one.body)
                response = connection.getresponse()
                text = response.read().decode()
                answers[f"REST {response.status}"] += 1
                check_rest(response.status, text, in_words and misfits(inputs, one.shapes), one)
                one.request.model_spec.name = model
                code, details = outcome(stub, one.request)
                answers[f"gRPC {code.name}"] += 1
                assert code is grpc.StatusCode.OK or (code in CALLER_AT_FAULT and details), (one, code, details)
                assert server.process.poll() is None, f"ended by {one}"
    return answers


def outcome(stub: Any, request: Any) -> tuple[grpc.StatusCode, str]:
    try:
        stub.Predict(request, timeout=120)
    except grpc.RpcError as error:
        return error.code(), error.details()
    return grpc.StatusCode.OK, ""


def misfits(inputs: Any, shapes: Any) -> bool:
    """Whether a shape is not that of its input, as far as the signature says it."""
    for name, shape in shapes.items():
        expected = inputs[name]["tensor_shape"]
        # JSON has no words for what an empty list would hold.
        shape = shape[: shape.index(0) + 1] if 0 in shape else shape
        sizes = [int(dim["size"]) for dim in expected["dim"]]
        fits = len(sizes) == len(shape) and all(size in (-1, got) for size, got in zip(sizes, shape, strict=True))
        if not fits and not expected["unknown_rank"]:
            return True
    return False


def check_rest(status: int, text: str, about_shape: bool, one: Any) -> None:
    unsupported = status == 501 and "Conversion of " in text
    # Inputs that broadcast against each other: millions of numbers in JSON take longer than --rest_api_timeout_in_ms.
    late = status == 504 and "took too long" in text and len(one.request.inputs) > 1
    assert status == 200 or 400 <= status < 500 or unsupported or late, (status, text, one)
    message = "" if status == 200 else json.loads(text)["error"]
    assert (status == 200) != bool(message)
    if about_shape:
        assert any(word in message for word in SHAPE_WORDS), (message, one)


@pytest.fixture(scope="module")
def more_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped network, and models whose signatures leave sizes or ranks open."""
    base = tmp_path_factory.mktemp("more")
    command = [sys.executable, "-m", "models.pretrained", "export", str(base / "fashion_cnn")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)

    def spec(*shape: int | None, rank_is_open: bool = False) -> list[tf.TensorSpec]:
        return [tf.TensorSpec(None if rank_is_open else shape, tf.float32, name="x")]

    kernel, volume = tf.ones([3, 3, 2, 4]), tf.ones([2, 2, 2, 2, 3])

    def network(x: tf.Tensor) -> tf.Tensor:
        y = tf.nn.max_pool2d(tf.nn.relu(tf.nn.conv2d(x, kernel, 1, "SAME")), 2, 2, "VALID")
        return {"y": tf.reduce_mean(tf.nn.depthwise_conv2d(y, tf.ones([3, 3, 4, 1]), [1, 1, 1, 1], "SAME"), [1, 2])}

    functions = {
        "serving_default": (network, spec(None, None, None, 2)),
        "open": (network, spec(rank_is_open=True)),
        "later": (lambda x: network(tf.abs(x) * 2.0), spec(rank_is_open=True)),
        "volumes": (lambda x: {"y": tf.nn.conv3d(x, volume, [1] * 5, "SAME")}, spec(rank_is_open=True)),
        "pooled": (lambda x: {"y": tf.nn.max_pool3d(x, 2, 2, "SAME")}, spec(None, None, None, None, None)),
        "sequence": (lambda x: {"y": tf.nn.conv1d(x, kernel[0], 1, "SAME")}, spec(None, None, 2)),
        "mapped": (lambda x: {"y": tf.map_fn(lambda row: network(row[None])["y"][0], x)}, spec(None, 8, 8, 2)),
    }
    saved_models.export(base / "open" / "1", functions)
    return base


@pytest.fixture(scope="module")
def more_server(more_models: Path) -> Iterator[RunningServer]:
    path = more_models / "models.config"
    configs = "\n".join(
        f'config {{ name: "{n}" base_path: "{more_models / n}" model_platform: "tensorflow" }}'
        for n in ("fashion_cnn", "open")
    )
    path.write_text(f"model_config_list {{ {configs} }}")
    with running_server(f"--model_config_file={path}") as running:
        yield running


@pytest.mark.parametrize("model", ["half_plus_two", *OTHERS])
def test_wrong_shapes_leave_the_server_well(server: RunningServer, model: str):
    # As many for each model, some of which have many signatures.
    count = max(3, 60 // len(signatures(server, model)))
    assert send_all(server, model, seed=1, count=count)["REST 400"] > 0


@pytest.mark.parametrize("model", ["fashion_cnn", "open"])
def test_wrong_shapes_leave_a_server_of_convolutions_well(more_server: RunningServer, model: str):
    answers = send_all(more_server, model, seed=1, count=150, in_words=True)
    assert answers["REST 400"] > 300
    assert answers["gRPC INVALID_ARGUMENT"] > 300


@pytest.mark.slow
@pytest.mark.parametrize("model", ["half_plus_two", *OTHERS])
def test_five_thousand_wrong_shapes_leave_the_server_well(server: RunningServer, model: str):
    print(model, send_all(server, model, seed=2, count=5000))


@pytest.mark.slow
@pytest.mark.parametrize("model", ["fashion_cnn", "open"])
def test_five_thousand_wrong_shapes_leave_a_server_of_convolutions_well(more_server: RunningServer, model: str):
    print(model, send_all(more_server, model, seed=2, count=5000, in_words=True))


@pytest.mark.parametrize(("signature", "body", "received"), [
    ("serving_default", {"instances": [1]}, "[1]"),
    ("serving_default", {"inputs": []}, "[0]"),
    ("serving_default", {"inputs": 1}, "[]"),
    ("serving_default", {"instances": [[[]] * 28]}, "[1,28,0]"),
    ("serving_default", {"instances": [[[[1]] * 28] * 27]}, "[1,27,28,1]"),
])  # fmt: skip
def test_a_wrong_shape_is_named_beside_the_right_one(
    more_server: RunningServer, signature: str, body: Any, received: str
):
    connection = http.client.HTTPConnection(more_server.url.removeprefix("http://"))
    connection.request("POST", "/v1/models/fashion_cnn:predict", json.dumps({"signature_name": signature, **body}))
    response = connection.getresponse()
    error = json.loads(response.read())["error"]
    assert response.status == 400
    assert error == f"Input `image` must have the shape [?,28,28,1]. Received: shape {received}."


def test_where_a_signature_leaves_the_rank_open_the_graph_says_it(more_server: RunningServer):
    connection = http.client.HTTPConnection(more_server.url.removeprefix("http://"))
    connection.request("POST", "/v1/models/open:predict", '{"signature_name": "later", "instances": [[1, 2]]}')
    response = connection.getresponse()
    assert response.status == 400
    assert json.loads(response.read())["error"] == "Input `x` must have a rank of 4. Received: shape [1,2]."


@pytest.mark.parametrize("shape", [(0, 1, 1, 1, 2**31), (0, 2**20, 2**20, 1, 1), (2**31, 0, 1, 1, 1)])
def test_an_empty_array_of_sizes_that_kernels_cannot_count_is_refused(
    more_server: RunningServer, shape: tuple[int, ...]
):
    request = predict_pb2.PredictRequest()
    request.model_spec.name, request.model_spec.signature_name = "open", "pooled"
    request.inputs["x"].dtype = types_pb2.DT_FLOAT
    for size in shape:
        request.inputs["x"].tensor_shape.dim.add(size=size)
    with grpc.insecure_channel(more_server.grpc_target) as channel:
        code, details = outcome(prediction_service_pb2_grpc.PredictionServiceStub(channel), request)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "must multiply to 268435456 at most. Received: shape [" in details
