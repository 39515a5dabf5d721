"""What the client is given is sent as it is, or refused: over REST and gRPC alike."""

import asyncio
import http.server
import threading

import ml_dtypes
import numpy as np
import pytest
from keras_bn_serving.client import AsyncClient, Client
from keras_bn_serving.client.inputs import fitting
from keras_bn_serving.errors import InvalidArgumentError, NotFoundError

from tests.serving.servers import RunningServer


@pytest.fixture(params=["REST", "gRPC"])
def client(server: RunningServer, request: pytest.FixtureRequest):
    with Client(server.url if request.param == "REST" else f"grpc://{server.grpc_target}") as client:
        yield client


@pytest.mark.parametrize(("dtype", "value"), [
    ("int32", np.int64(7 + 2**32)), ("int32", np.int64(2**31)), ("int8", np.int64(-129)), ("uint8", np.int64(300)),
    ("uint8", np.int64(-1)), ("uint32", np.int64(2**32)), ("int64", np.uint64(2**63)), ("int32", np.uint32(2**32 - 1)),
    ("float32", np.float64(1e300)), ("half", np.float32(1e6)),
])  # fmt: skip
def test_numbers_out_of_range_are_named_and_not_wrapped_around(client: Client, dtype: str, value):
    with pytest.raises(
        InvalidArgumentError, match=r"Input 'x' takes \w+: its numbers must be .* Received: numbers from"
    ):
        client.predict("types", np.array([0, value]).astype(value.dtype), signature_name=dtype)


@pytest.mark.parametrize(("dtype", "given"), [
    ("uint8", "int64"), ("int8", "uint64"), ("float32", "int32"), ("float64", "float16"), ("int64", "uint8"),
])  # fmt: skip
def test_numbers_of_another_width_that_fit_are_taken(client: Client, dtype: str, given: str):
    assert client.predict("types", np.array([0, 1, 100], given), signature_name=dtype).tolist() == [0, 1, 100]
    assert client.predict("types", np.zeros(0, given), signature_name=dtype).shape == (0,)


@pytest.mark.parametrize("order", ["<", ">"])
def test_the_order_of_bytes_does_not_matter(client: Client, order: str):
    assert client.predict("types", np.array([1, 2], f"{order}f4")).tolist() == [1, 2]


def test_numbers_beyond_a_float_are_refused_and_infinities_are_not():
    assert np.isinf(fitting("x", np.array([np.inf]), np.dtype("float32"))).all()
    assert np.isnan(fitting("x", np.array([np.nan]), np.dtype(ml_dtypes.bfloat16)).astype(float)).all()
    with pytest.raises(InvalidArgumentError):
        fitting("x", np.array([1e39]), np.dtype(ml_dtypes.bfloat16))


@pytest.mark.parametrize(("arguments", "error", "text"), [
    ((3, [1.0]), TypeError, "`model_name` must be a string. Received: model_name=3"),
    (("m", [1.0], {"version": "x"}), TypeError, "`version` must be an integer"),
    (("m", [1.0], {"version": -1}), ValueError, r"`version` must be from 0 to 2\*\*63 - 1"),
    (("m", [1.0], {"label": 3}), TypeError, "`label` must be a string"),
    (("m", [1.0], {"timeout": -1}), ValueError, "`timeout` must be a number of seconds above 0. Received: timeout=-1"),
    (("types", [object()]), ValueError, "`inputs` must be numbers, truth values, strings or bytes"),
])  # fmt: skip
def test_what_cannot_be_asked_is_said_before_anything_is_sent(client: Client, arguments, error, text: str):
    *positional, named = (*arguments, {}) if len(arguments) == 2 else arguments
    with pytest.raises(error, match=text):
        client.predict(*positional, **named)


@pytest.mark.parametrize("url", [3, "http://127.0.0.1:99999", "http://", "grpc://127.0.0.1:x", "http://127.0.0.1:0"])
def test_an_address_that_is_none_is_refused(url):
    with pytest.raises(ValueError, match="`url` must be http, https, grpc or grpcs://host:port"):
        Client(url)


def test_a_client_that_is_closed_says_so(server: RunningServer):
    async def ask(url: str) -> None:
        client = AsyncClient(url)
        await client.close()
        await client.status("multi")

    for url in (server.url, f"grpc://{server.grpc_target}"):
        client = Client(url)
        client.close()
        with pytest.raises(ValueError, match="The client is closed"):
            client.status("multi")
        with pytest.raises(ValueError, match="The client is closed"):
            asyncio.run(ask(url))


class Page(http.server.BaseHTTPRequestHandler):
    """Some other web server, which knows no models."""

    def do_GET(self) -> None:
        self.send_error(404, "Not Found")


def test_a_page_in_the_place_of_an_answer_is_its_title():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page) as other:
        thread = threading.Thread(target=other.serve_forever)
        thread.start()
        with Client(f"http://127.0.0.1:{other.server_address[1]}") as client, pytest.raises(NotFoundError) as caught:
            client.status("m")
        other.shutdown()
        thread.join()
    assert "\n" not in str(caught.value)
    assert "<" not in str(caught.value)
