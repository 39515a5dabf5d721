"""What a server has to live with: broken requests, slow clients, too much of everything, and being told to stop."""

import gzip
import json
import shutil
import signal
import socket
import subprocess
import threading
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import tensorflow as tf
from keras_bn_serving.client import Client
from keras_bn_serving.errors import ServingError
from tensorflow_serving.apis import prediction_log_pb2

from tests.serving import fuzzing, saved_models
from tests.serving.servers import ROOT, RunningServer, command, environment, running_server


def address_of(server: RunningServer) -> tuple[str, int]:
    parts = urlsplit(server.url)
    assert parts.hostname is not None
    assert parts.port is not None
    return parts.hostname, parts.port


def resident_kilobytes(server: RunningServer) -> int:
    for line in Path(f"/proc/{server.process.pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1])
    raise AssertionError("the process has no resident memory")


def check_answers(server: RunningServer) -> None:
    with Client(server.url) as client:
        assert client.predict("half_plus_two", [1.0, 2.0]).tolist() == [3.5, 4.0]
        assert client.predict("multi", {"a": [[1, 2]], "b": [3]})["t"].tolist() == [6]


def test_broken_requests_get_answers_and_leave_the_server_well(server: RunningServer):
    statuses = fuzzing.send_all(address_of(server), seed=1, count=1500)
    assert statuses[200] > 100
    assert statuses[400] > 100
    check_answers(server)


@pytest.mark.slow
def test_a_hundred_thousand_broken_requests_neither_hang_nor_grow_the_server(server: RunningServer):
    address = address_of(server)
    fuzzing.send_all(address, seed=2, count=10_000)
    before = resident_kilobytes(server)
    statuses: Counter[int] = Counter()
    for seed in range(3, 12):
        statuses += fuzzing.send_all(address, seed, count=10_000)
    after = resident_kilobytes(server)
    print(f"answers by status: {dict(sorted(statuses.items()))}; resident {before} KiB, after {after} KiB")
    assert after < before * 1.1
    check_answers(server)


def exchange(server: RunningServer, request: bytes) -> tuple[int, bytes]:
    """Returns the status and body of the last answer."""
    answer = fuzzing.exchange(address_of(server), request)
    head, _, body = answer.rpartition(b"\r\n\r\n")
    return int(head.rpartition(b"HTTP/1.1 ")[2][:3]), body


def post(body: bytes, *headers: bytes) -> bytes:
    lines = [b"POST /v1/models/half_plus_two:predict HTTP/1.1", b"Host: a", *headers]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def test_a_client_that_stops_sending_gets_its_answers_and_the_end_of_the_connection(server: RunningServer):
    one = b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n"
    two = post(b'{"instances": [1]}', b"Content-Length: 18")
    # The end of what is sent may be seen before, between and after the answers.
    for request, count in [(one, 1), (two, 1), (one + two, 2), (two + one + two, 3), (two + one + one[:20], 2)] * 100:
        assert fuzzing.exchange(address_of(server), request).count(b"HTTP/1.1 200 OK") == count


def test_requests_sent_all_at_once_are_all_answered_in_order(server: RunningServer):
    numbers = range(3000)
    requests = [post(body := b'{"instances": [%d]}' % n, b"Content-Length: %d" % len(body)) for n in numbers]
    with socket.create_connection(address_of(server), timeout=30) as connection:
        sender = threading.Thread(target=connection.sendall, args=[b"".join(requests)])
        sender.start()
        received = b""
        while received.count(b"]\n}") < len(numbers):
            piece = connection.recv(1 << 20)
            assert piece, "the server closed the connection"
            received += piece
        sender.join()
    answers = [json.loads(part.partition(b"\r\n\r\n")[2]) for part in received.split(b"HTTP/1.1 200 OK\r\n")[1:]]
    assert answers == [{"predictions": [n / 2 + 3]} for n in numbers]


def test_nonsense_behind_a_request_does_not_come_before_its_answer(server: RunningServer):
    body = b'{"instances": [1]}'
    one = post(body, b"Content-Length: %d" % len(body))
    answer = fuzzing.exchange(address_of(server), one + b"no request at all\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert json.loads(answer.partition(b"\r\n\r\n")[2].partition(b"HTTP/1.1")[0]) == {"predictions": [3.5]}


def test_a_chunked_body_and_an_expected_continue_are_understood(server: RunningServer):
    body = b'5\r\n{"ins\r\n12\r\ntances": [1.0, 2]}\r\n0\r\n\r\n'
    status, answer = exchange(server, post(body, b"Transfer-Encoding: chunked"))
    assert (status, json.loads(answer)) == (200, {"predictions": [3.5, 4.0]})
    body = b'{"instances": [1]}'
    answer = fuzzing.exchange(
        address_of(server), post(body, b"Expect: 100-continue", b"Content-Length: %d" % len(body))
    )
    assert answer.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n")


def test_requests_sent_in_one_go_are_answered_in_order(server: RunningServer):
    bodies = [b'{"instances": [%d]}' % number for number in range(20)]
    answer = fuzzing.exchange(
        address_of(server), b"".join(post(body, b"Content-Length: %d" % len(body)) for body in bodies)
    )
    found = [json.loads(part[: part.index(b"}") + 1]) for part in answer.split(b"\r\n\r\n")[1:]]
    assert [each["predictions"] for each in found] == [[number / 2 + 3] for number in range(20)]


@pytest.mark.parametrize(("version", "header", "stays"), [
    (b"1.1", b"X: y", True), (b"1.1", b"Connection: close", False),
    (b"1.0", b"X: y", False), (b"1.0", b"Connection: keep-alive", True), (b"1.0", b"Connection: close", False),
])  # fmt: skip
def test_a_connection_stays_as_the_protocol_says(server: RunningServer, version: bytes, header: bytes, stays: bool):
    request = b"GET /v1/models/multi HTTP/%s\r\nHost: a\r\n%s\r\n\r\n" % (version, header)
    with socket.create_connection(address_of(server), timeout=30) as connection:
        connection.sendall(request)
        answer = b""
        while b"}\n ]\n}\n" not in answer:
            answer += connection.recv(65536)
        connection.sendall(request if stays else b"")
        rest = connection.recv(65536)
    assert rest.startswith(b"HTTP/1.1 200 OK") if stays else rest == b""
    # What is the rule of HTTP/1.1 has to be said to an older client.
    assert (b"connection: keep-alive\r\n" in answer) is (stays and version == b"1.0")


@pytest.mark.parametrize(("request_bytes", "status", "words"), [
    (post(b"", b"Content-Length: 300000000"), 413, b"256.0 MiB"),
    (post(b"", b"X: " + b"y" * 70000), 431, b"64.0 KiB"),
    (post(b"", b"\r\n".join([b"A: b"] * 11000)), 431, b"64.0 KiB"),
    (b"no request at all\r\n\r\n", 400, b"Not an HTTP request"),
    (post(b"[" * 5000, b"Content-Length: 5000"), 400, b"100 deep"),
], ids=["body", "headers", "many headers", "no http", "nesting"])  # fmt: skip
def test_too_much_or_nonsense_is_refused_in_words(
    server: RunningServer, request_bytes: bytes, status: int, words: bytes
):
    got, answer = exchange(server, request_bytes)
    assert got == status
    assert words in answer


WHOLE = gzip.compress(b'{"instances": [1.0]}')


@pytest.mark.parametrize("body", [
    b'{"instances": [1.0]}', WHOLE[:-1], WHOLE[:-8], WHOLE + b"x", WHOLE + WHOLE, WHOLE[:12] + b"\xff" + WHOLE[13:],
    zlib.compress(b'{"instances": [1.0]}'), gzip.compress(bytes(101 * 1024 * 1024)),
], ids=["plain", "short", "no trailer", "more", "twice", "damaged", "zlib", "huge"])  # fmt: skip
def test_a_body_that_claims_to_be_gzip_and_is_not_is_as_good_as_empty(server: RunningServer, body: bytes):
    headers = [b"Content-Encoding: gzip", b"Content-Length: %d" % len(body)]
    status, answer = exchange(server, post(body, *headers))
    assert (status, json.loads(answer)) == (400, {"error": "JSON Parse error: The document is empty"})
    # A request that has no use for a body is answered whatever it is.
    status, _ = exchange(
        server, post(body, *headers).replace(b"POST /v1/models/half_plus_two:predict", b"GET /v1/models/multi")
    )
    assert status == 200


@pytest.mark.parametrize(
    ("encoding", "status"), [(b"x-gzip", 200), (b"gzip, deflate", 200), (b"GZIP", 400), (b"br", 400)]
)
def test_a_body_is_decompressed_where_its_encoding_says_gzip(server: RunningServer, encoding: bytes, status: int):
    headers = [b"Content-Encoding: " + encoding, b"Content-Length: %d" % len(WHOLE)]
    assert exchange(server, post(WHOLE, *headers))[0] == status


@pytest.fixture(scope="module")
def slow_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that multiplies large matrices as often as its input says, and returns the input."""

    def work(x: tf.Tensor) -> dict[str, tf.Tensor]:
        start = tf.fill([256, 256], 1.0 / 256.0)
        rounds = tf.cast(tf.reduce_max(x), tf.int32)
        end = tf.while_loop(lambda i, m: i < rounds, lambda i, m: (i + 1, m @ m), [0, start])[1]
        return {"y": x + 0.0 * end[0, 0]}

    base = tmp_path_factory.mktemp("slow")
    saved_models.export(base / "1", {"serving_default": (work, [tf.TensorSpec([None], tf.float32, name="x")])})
    return base


@pytest.fixture(scope="module")
def slow_server(slow_model: Path) -> Iterator[RunningServer]:
    flags = ["--model_name=m", f"--model_base_path={slow_model}", "--rest_api_timeout_in_ms=500"]
    with running_server(*flags) as running:
        yield running


def test_an_answer_that_takes_too_long_is_a_deadline_error_and_others_go_on(slow_server: RunningServer):
    body = b'{"instances": [300000]}'
    request = b"POST /v1/models/m:predict HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    status, answer = exchange(slow_server, request)
    assert status == 504
    assert b"too long" in answer
    with Client(slow_server.url) as client:
        assert client.status("m")[0].state == "AVAILABLE"


def test_requests_given_up_while_a_large_body_is_read_leave_no_version_in_use(models_folder: Path, tmp_path: Path):
    base = tmp_path / "half"
    shutil.copytree(models_folder / "half_plus_two", base)
    # The second key sends the body the long way, which takes far longer than the time given.
    body = json.dumps({"inputs": {"x": [0.5] * 300_000, "ignored": None}}).encode()
    flags = ["--model_name=half_plus_two", f"--model_base_path={base}", "--file_system_poll_wait_seconds=0.05"]
    with running_server(*flags, "--rest_api_timeout_in_ms=1") as server, Client(server.url) as client:
        # Whether the lease is taken before or after the time is over differs from try to try.
        for _ in range(30):
            assert exchange(server, post(body, b"Content-Length: %d" % len(body)))[0] == 504
        shutil.rmtree(base / "2")
        for _ in range(1000):
            if client.status("half_plus_two", version=2)[0].state == "END":
                break
            threading.Event().wait(0.02)
        assert [(each.version, each.state) for each in client.status("half_plus_two")] == [
            (2, "END"),
            (1, "AVAILABLE"),
        ]


def test_a_server_told_to_stop_answers_the_request_that_has_begun_and_takes_nothing_new(slow_model: Path):
    body = b'{"instances": [500]}'
    head = b"POST /v1/models/m:predict HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(body)
    with running_server("--model_name=m", f"--model_base_path={slow_model}") as server:
        with socket.create_connection(address_of(server), timeout=60) as connection:
            connection.sendall(head)
            assert connection.recv(65536) == b"HTTP/1.1 100 Continue\r\n\r\n"
            server.process.send_signal(signal.SIGTERM)
            connection.sendall(body)
            answer = b""
            while piece := connection.recv(65536):
                answer += piece
        assert answer.startswith(b"HTTP/1.1 200 OK")
        assert b"connection: close" in answer.lower()
        assert json.loads(answer.partition(b"\r\n\r\n")[2]) == {"predictions": [500.0]}
        assert server.process.wait(timeout=60) == 0
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address_of(server), timeout=5).close()


def test_what_takes_too_long_is_cut_off_at_one_deadline_whatever_it_came_by(slow_model: Path):
    flags = ("--model_name=m", f"--model_base_path={slow_model}", "--drain_timeout_in_ms=1500")
    with running_server(*flags) as server:
        clients = [Client(server.url), Client(f"grpc://{server.grpc_target}")]
        failures: list[ServingError] = []

        def ask(client: Client) -> None:
            try:
                client.predict("m", [1e6], timeout=60)
            except ServingError as error:
                failures.append(error)

        threads = [threading.Thread(target=ask, args=[client]) for client in clients]
        for thread in threads:
            thread.start()
        threading.Event().wait(1)
        server.process.send_signal(signal.SIGTERM)
        told = time.monotonic()
        server.process.wait(timeout=60)
        # With a deadline for each part it would take 6 seconds, or as long as the model does.
        assert 1.4 < time.monotonic() - told < 5
        for thread in threads:
            thread.join()
        assert len(failures) == 2


def test_a_server_told_to_stop_while_it_loads_ends_at_once(slow_model: Path, tmp_path: Path):
    shutil.copytree(slow_model / "1", tmp_path / "1")
    log = prediction_log_pb2.PredictionLog()
    log.predict_log.request.inputs["x"].CopyFrom(tf.make_tensor_proto([1e6], tf.float32))
    (tmp_path / "1" / "assets.extra").mkdir()
    with tf.io.TFRecordWriter(str(tmp_path / "1" / "assets.extra" / "tf_serving_warmup_requests")) as file:
        file.write(log.SerializeToString())
    flags = ("--rest_api_port=auto", "--model_name=m", f"--model_base_path={tmp_path}")
    process = subprocess.Popen(
        command(*flags), cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if "shapes are" in line:  # It is read, and warms up.
                break
        threading.Event().wait(0.5)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=5) == 0
        assert process.stdout is not None
        assert process.stdout.read() == "Stopped while the models were loading\n"
    finally:
        process.kill()
        process.communicate()
