"""Clients of TensorFlow Serving that others made, as they are, and what others' clients rely on."""

from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest
import tensorflow as tf
from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

from tests.serving.servers import RunningServer

ovmsclient = pytest.importorskip("ovmsclient")


def test_ovmsclient_asks_over_http(server: RunningServer):
    client = ovmsclient.make_http_client(server.url.removeprefix("http://"))
    check(client)
    # Over HTTP it hands TensorFlow Serving's metadata on as it comes.
    definitions = client.get_model_metadata("half_plus_two", 2)["metadata"]["signature_def"]["signature_def"]
    assert definitions["serving_default"]["inputs"]["x"]["dtype"] == "DT_FLOAT"


def test_ovmsclient_asks_over_grpc(server: RunningServer):
    client = ovmsclient.make_grpc_client(server.grpc_target)
    check(client)
    assert client.get_model_metadata("half_plus_two", 2)["inputs"]["x"]["dtype"] == "DT_FLOAT"


def check(client: object) -> None:
    answer = client.predict({"x": np.float32([1.0, 2.0])}, "half_plus_two", 1)
    np.testing.assert_array_equal(answer, np.float32([2.5, 3.0]))
    # Its default version is 0, which is the newest for another server and a version like any other for this protocol.
    assert {version: one["state"] for version, one in client.get_model_status("half_plus_two", 2).items()} == {
        2: "AVAILABLE"
    }


@pytest.fixture
def predict(server: RunningServer) -> Iterator[Callable[..., Any]]:
    with grpc.insecure_channel(server.grpc_target) as channel:
        stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
        yield lambda request: stub.Predict(request, timeout=60)


def test_tensorflow_servings_example_clients_find_their_scores(predict: Callable[..., Any]):
    request = predict_pb2.PredictRequest()
    request.model_spec.name = "half_plus_two"
    request.model_spec.signature_name = "serving_default"
    request.inputs["x"].CopyFrom(tf.make_tensor_proto([1.0, 2.0], shape=[2]))
    response = predict(request)
    assert np.array(response.outputs["y"].float_val).tolist() == [3.5, 4.0]
    assert tf.make_ndarray(response.outputs["y"]).tolist() == [3.5, 4.0]


@pytest.mark.parametrize(("signature", "field", "values"), [
    ("float32", "float_val", [1.5, -2.0]), ("float64", "double_val", [1.5, -2.0]), ("int8", "int_val", [-1, 2]),
    ("int16", "int_val", [-1, 2]), ("int32", "int_val", [-1, 2]), ("int64", "int64_val", [-1, 2**40]),
    ("uint8", "int_val", [0, 255]), ("uint16", "int_val", [0, 65535]), ("uint32", "uint32_val", [0, 2**32 - 1]),
    ("uint64", "uint64_val", [0, 2**64 - 1]), ("bool", "bool_val", [True, False]),
    ("complex64", "scomplex_val", [1.0, 2.0, 3.0, 4.0]), ("half", "half_val", [15360, 16384]),
    ("bfloat16", "half_val", [16256, 16384]),
])  # fmt: skip
def test_clients_that_know_typed_fields_alone_send_and_find_their_values(
    predict: Callable[..., Any], signature: str, field: str, values: list[Any]
):
    # As `min-tfs-client` does it, whose copies of TensorFlow's messages cannot be imported beside TensorFlow.
    request = predict_pb2.PredictRequest()
    request.model_spec.name, request.model_spec.signature_name = "types", signature
    tensor = request.inputs["x"]
    tensor.dtype = tf.as_dtype(signature).as_datatype_enum
    tensor.tensor_shape.dim.add(size=2)
    getattr(tensor, field).extend(values)
    answer = predict(request).outputs["y"]
    assert list(getattr(answer, field)) == values
    assert not answer.tensor_content


def test_strings_that_c_plus_plus_clients_send_in_one_piece_arrive(predict: Callable[..., Any]):
    request = predict_pb2.PredictRequest()
    request.model_spec.name = "strings"
    tensor = request.inputs["s"]
    tensor.dtype = tf.string.as_datatype_enum
    tensor.tensor_shape.dim.add(size=2)
    tensor.tensor_content = b"\x01\x02abc"
    assert list(predict(request).outputs["echo"].string_val) == [b"a", b"bc"]
    tensor.tensor_content = b"\x01\x02ab"
    with pytest.raises(grpc.RpcError, match="tensor parsing error: s"):
        predict(request)
