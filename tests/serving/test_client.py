"""The client against a real server."""

import asyncio
import http.server
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

import httpx
import numpy as np
import pytest
from keras_bn_serving.client import AsyncClient, Client, Retry, types
from keras_bn_serving.errors import (
    Code,
    DeadlineExceededError,
    InvalidArgumentError,
    NotFoundError,
    ServingError,
    error_of,
)

from tests.serving.servers import RunningServer


@pytest.fixture(scope="module")
def client(server: RunningServer):
    with Client(server.url) as client:
        yield client


@pytest.mark.parametrize("dtype", ["float32", "float64", "int8", "int32", "int64", "uint8", "uint32", "uint64", "bool"])
def test_an_array_comes_back_with_its_type_shape_and_values(client: Client, dtype: str):
    array = np.array([[0, 1], [100, 7]]).astype(dtype)
    answer = client.predict("types", array, signature_name=dtype)
    assert answer.dtype == array.dtype
    np.testing.assert_array_equal(answer, array)


def test_numbers_that_are_not_finite_go_and_come(client: Client):
    array = np.array([np.nan, np.inf, -np.inf, 1.5], np.float32)
    np.testing.assert_array_equal(client.predict("types", array), array)


def test_every_float32_survives_the_way_there_and_back(client: Client):
    array = np.random.default_rng(7).integers(0, 2**32, 10_000, np.uint32).view(np.float32)
    array = array[np.isfinite(array) & (np.abs(array) > np.finfo(np.float32).tiny)]
    np.testing.assert_array_equal(client.predict("types", array), array)


def test_several_inputs_and_outputs_go_by_name(client: Client):
    answer = client.predict("multi", {"a": np.float32([[1, 2]]), "b": np.int32([3])})
    assert answer["s"].tolist() == [[4.0, 5.0]]
    assert answer["t"].tolist() == [6]
    assert answer["t"].dtype == np.int32


@pytest.mark.parametrize("protocol", ["REST", "gRPC"])
def test_a_name_that_is_no_input_is_refused_over_both_protocols(server: RunningServer, protocol: str):
    values = {"a": np.float32([[1, 2]]), "b": np.int32([3]), "c": 0}
    with (
        Client(server.url if protocol == "REST" else f"grpc://{server.grpc_target}") as client,
        pytest.raises(InvalidArgumentError, match=r"names of \['a', 'b'\]\. Received: \['a', 'b', 'c'\]|extra: {c}"),
    ):
        client.predict("multi", values)


def test_strings_and_bytes_come_back_as_bytes(client: Client):
    answer = client.predict("strings", [b"a", b"\xff"])
    assert answer["raw_bytes"].tolist() == [b"a", b"\xff"]
    assert answer["length"].tolist() == [1, 1]


def test_a_version_and_a_label_can_be_asked_for(client: Client):
    assert client.predict("half_plus_two", [2.0], version=1).tolist() == [3.0]
    assert client.predict("half_plus_two", [2.0], label="canary").tolist() == [4.0]
    with pytest.raises(ValueError, match=r"Received: version=1, label='canary'"):
        client.predict("half_plus_two", [2.0], version=1, label="canary")


def test_an_error_carries_code_and_message(client: Client):
    with pytest.raises(ServingError, match=r"Servable not found for request: Latest\(nobody\)") as caught:
        client.predict("nobody", [1.0])
    assert caught.value.code is Code.NOT_FOUND
    with pytest.raises(ServingError, match="Type: String is not of expected type: float") as caught:
        client.predict("half_plus_two", "a")
    assert caught.value.code is InvalidArgumentError.code


def test_status_and_metadata_tell_versions_and_signatures(client: Client):
    assert [(each.version, each.state) for each in client.status("half_plus_two")] == [
        (2, "AVAILABLE"),
        (1, "AVAILABLE"),
    ]
    metadata = client.metadata("image")
    assert [dim["size"] for dim in metadata["serving_default"]["inputs"]["image"]["tensor_shape"]["dim"]] == [
        *("-1", "2", "2", "1")
    ]


def test_waiting_for_a_server_that_is_not_there_ends_with_what_was_seen():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
    with Client(f"http://127.0.0.1:{port}") as client, pytest.raises(DeadlineExceededError, match="UNAVAILABLE"):
        client.wait_until_ready("m", timeout=0.5)


def test_waiting_for_a_model_that_is_ready_returns(client: Client):
    client.wait_until_ready("half_plus_two")


def test_an_address_of_another_kind_is_refused():
    with pytest.raises(ValueError, match=re.escape("Received: url='ftp://x'")):
        Client("ftp://x")


def test_grpc_gives_the_same_as_rest(server: RunningServer, client: Client):
    pixels = np.arange(8, dtype=np.uint8).reshape(2, 2, 2, 1)
    with Client(f"grpc://{server.grpc_target}") as other:
        other.wait_until_ready("image")
        for name, value in client.predict("image", pixels).items():
            np.testing.assert_array_equal(other.predict("image", pixels)[name], value)
        assert other.predict("half_plus_two", [1, 2], version=1).tolist() == [2.5, 3.0]
        assert other.predict("strings", ["ä", b"\xff"])["raw_bytes"].tolist() == ["ä".encode(), b"\xff"]
        assert other.status("half_plus_two") == client.status("half_plus_two")
        assert other.metadata("image") == client.metadata("image")
        with pytest.raises(ServingError, match="Unrecognized servable version label: nope") as caught:
            other.predict("half_plus_two", [1.0], label="nope")
        assert caught.value.code is Code.INVALID_ARGUMENT


@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_examples_are_classified_and_regressed(server: RunningServer, scheme: str):
    with Client(server.url if scheme == "http" else f"grpc://{server.grpc_target}") as client:
        examples = [{"x": 0.25}, {"x": [0.5]}]
        assert client.classify("examples", examples) == [[("yes", 0.25), ("no", 0.75)], [("yes", 0.5), ("no", 0.5)]]
        answer = client.regress("examples", [{}, {"x": 2.0}], context={"x": 0.5}, signature_name="regress_x")
        assert answer.tolist() == [1.0, 4.0]


@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_the_asynchronous_client_asks_many_things_at_once(server: RunningServer, scheme: str):
    async def ask() -> list[float]:
        async with AsyncClient(server.url if scheme == "http" else f"grpc://{server.grpc_target}") as client:
            await client.wait_until_ready("half_plus_two")
            answers = await asyncio.gather(*(client.predict("half_plus_two", [float(n)]) for n in range(20)))
            with pytest.raises(ServingError, match=r"Latest\(nobody\)"):
                await client.predict("nobody", [1.0])
            return [float(answer[0]) for answer in answers]

    assert asyncio.run(ask()) == [number / 2 + 3 for number in range(20)]


@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_what_is_raised_is_the_class_of_its_code(server: RunningServer, scheme: str):
    with Client(server.url if scheme == "http" else f"grpc://{server.grpc_target}") as client:
        with pytest.raises(NotFoundError):
            client.status("nobody")
        with pytest.raises(InvalidArgumentError):
            client.predict("half_plus_two", [1.0], signature_name="none")
    for code in set(Code) - {Code.OK, Code.UNKNOWN}:
        assert type(error_of(code, "")) is not ServingError
        assert error_of(code, "").code is code


def test_a_client_of_httpx_is_taken_with_its_headers_and_left_open(server: RunningServer):
    seen: list[str] = []
    hooks = {"request": [lambda request: seen.append(request.headers["Authorization"])]}
    with httpx.Client(headers={"Authorization": "Bearer token"}, event_hooks=hooks) as http_client:
        with Client(server.url, http=http_client) as client:
            assert client.predict("half_plus_two", [2.0]).tolist() == [4.0]
        assert set(seen) == {"Bearer token"}
        assert not http_client.is_closed
        with pytest.raises(ValueError, match="with gRPC leave it out"):
            Client("grpc://127.0.0.1:1", http=http_client)


class Slow(http.server.BaseHTTPRequestHandler):
    """Answers a byte every fifth of a second, for a minute."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "300")
        self.end_headers()
        try:
            for _ in range(300):
                self.wfile.write(b" ")
                time.sleep(0.2)
        except OSError:
            self.close_connection = True


@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_the_time_is_for_the_whole_call_however_often_a_little_comes(kind: type):
    async def ask(client: AsyncClient) -> None:
        async with client:
            await client.status("m")

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Slow) as slow:
        thread = threading.Thread(target=slow.serve_forever)
        thread.start()
        client = kind(f"http://127.0.0.1:{slow.server_address[1]}", timeout=1.0)
        started = time.monotonic()
        with pytest.raises(DeadlineExceededError):
            client.status("m") if kind is Client else asyncio.run(ask(client))
        assert 0.9 < time.monotonic() - started < 3
        slow.shutdown()
        thread.join()


class Swapped(http.server.BaseHTTPRequestHandler):
    """Answers with one output of another type from the second question on."""

    dtypes: ClassVar[list[str]] = ["DT_FLOAT", "DT_INT64"]

    def do_GET(self) -> None:
        dtype = self.dtypes.pop(0) if len(self.dtypes) > 1 else self.dtypes[0]
        signature = {"outputs": {"y": {"dtype": dtype}}}
        self.answer({"metadata": {"signature_def": {"signature_def": {"serving_default": signature}}}})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.answer({"outputs": [1, 2]})

    def answer(self, content: dict) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def test_types_are_asked_for_again_after_a_while(monkeypatch: pytest.MonkeyPatch):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Swapped) as swapped:
        thread = threading.Thread(target=swapped.serve_forever)
        thread.start()
        with Client(f"http://127.0.0.1:{swapped.server_address[1]}") as client:
            assert client.predict("m", [1]).dtype == np.float32
            assert client.predict("m", [1]).dtype == np.float32
            monkeypatch.setattr(types, "_REMEMBERED_SECONDS", 0.0)
            assert client.predict("m", [1]).dtype == np.int64
        swapped.shutdown()
        thread.join()


def test_threads_that_ask_for_types_at_the_same_time_do_not_meet(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(types, "_REMEMBERED_SECONDS", 0.0005)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Swapped) as swapped:
        thread = threading.Thread(target=swapped.serve_forever)
        thread.start()
        with Client(f"http://127.0.0.1:{swapped.server_address[1]}") as client, ThreadPoolExecutor(8) as threads:
            answers = list(threads.map(lambda _: client.predict("m", [1]).tolist(), range(200)))
        assert answers == [[1, 2]] * 200
        swapped.shutdown()
        thread.join()


class Flaky(http.server.BaseHTTPRequestHandler):
    """Answers 503 twice, then the truth; 500 to one path."""

    asked = 0

    def do_GET(self) -> None:
        type(self).asked += 1
        status = 500 if "broken" in self.path else 503 if self.asked < 3 else 200
        body = b'{"model_version_status": []}' if status == 200 else b'{"error": "busy"}'
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def flaky_url() -> Iterator[str]:
    """An HTTP server that is busy at first: a real server is not busy on demand."""
    Flaky.asked = 0
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Flaky) as flaky:
        thread = threading.Thread(target=flaky.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{flaky.server_address[1]}"
        flaky.shutdown()
        thread.join()


def test_a_busy_server_is_asked_again_and_a_broken_one_is_not(flaky_url: str):
    with Client(flaky_url, retry=Retry(first_wait_seconds=0.01)) as client:
        assert client.status("m") == []
        assert Flaky.asked == 3
        with pytest.raises(ServingError, match="busy") as caught:
            client.status("broken")
        assert caught.value.code is Code.UNKNOWN
        assert Flaky.asked == 4


def test_no_more_is_asked_than_the_attempts_allow(flaky_url: str):
    with Client(flaky_url, retry=Retry(attempts=2, first_wait_seconds=0.01)) as client:
        with pytest.raises(ServingError) as caught:
            client.status("m")
        assert caught.value.code is Code.UNAVAILABLE
        assert Flaky.asked == 2


class Page(http.server.BaseHTTPRequestHandler):
    """Answers every question with a page of its own, or JSON of its own."""

    def do_GET(self) -> None:
        is_missing = "missing" in self.path
        body = b"[1]" if "json" in self.path else b"<html><title>My\n site</title></html>"
        self.send_response(404 if is_missing else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET


@pytest.mark.parametrize(
    ("name", "code", "said"),
    [
        ("missing", Code.NOT_FOUND, "HTTP status 404 from what is no server of models: My site"),
        ("there", Code.UNKNOWN, "HTTP status 200 from what is no server of models: My site"),
        ("json", Code.UNKNOWN, r"HTTP status 200 from what is no server of models: \[1\]"),
    ],
)
def test_what_is_no_server_of_models_is_called_that(name: str, code: Code, said: str):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page) as site:
        thread = threading.Thread(target=site.serve_forever)
        thread.start()
        with Client(f"http://127.0.0.1:{site.server_address[1]}") as client:
            for ask in (client.status, client.metadata, lambda name: client.predict(name, [1.0])):
                with pytest.raises(ServingError, match=said) as caught:
                    ask(name)
                assert caught.value.code is code
        site.shutdown()
        thread.join()
