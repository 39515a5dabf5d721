"""A client of TensorFlow Serving that others made, as it is."""

import numpy as np
import pytest

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
