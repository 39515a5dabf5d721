"""The server where much is asked of it at once: what it holds is bounded, nothing large holds up what is small."""

import contextlib
import http.client
import json
import shutil
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import pytest
import tensorflow as tf
from grpc_health.v1 import health_pb2, health_pb2_grpc
from keras_bn_serving.client import Client
from keras_bn_serving.engine.memory import Memory
from keras_bn_serving.errors import ResourceExhaustedError, UnavailableError
from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

from tests.serving import saved_models
from tests.serving.servers import RunningServer, running_server
from tests.serving.test_robustness import address_of

MEBIBYTE = 2**20
REQUEST_MEMORY = 512 * MEBIBYTE


@pytest.fixture(scope="module")
def large_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that answers as many numbers as it is asked for, and with `wait` multiplies matrices that often."""

    def numbers(count: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"y": tf.reshape(tf.random.uniform([count[0]]), [1, -1])}

    def wait(rounds: tf.Tensor) -> dict[str, tf.Tensor]:
        start = tf.fill([256, 256], 1.0 / 256.0)
        end = tf.while_loop(lambda i, m: i < rounds[0], lambda i, m: (i + 1, m @ m), [0, start])[1]
        return {"y": tf.cast(rounds, tf.float32) + 0.0 * end[0, 0]}

    base = tmp_path_factory.mktemp("large")
    signatures = {
        "serving_default": (numbers, [tf.TensorSpec([1], tf.int32, name="count")]),
        "wait": (wait, [tf.TensorSpec([1], tf.int32, name="rounds")]),
    }
    saved_models.export(base / "1", signatures)
    return base


@pytest.fixture(scope="module")
def loaded(large_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server of that model, whose requests may hold half a gibibyte."""
    monitoring = tmp_path_factory.mktemp("monitoring") / "monitoring.config"
    monitoring.write_text("prometheus_config { enable: true }")
    flags = (f"--request_memory_in_mb={REQUEST_MEMORY // MEBIBYTE}", f"--monitoring_config_file={monitoring}")
    with running_server("--model_name=m", f"--model_base_path={large_model}", *flags) as running:
        yield running


def memory_of(server: RunningServer, field: str) -> int:
    for line in Path(f"/proc/{server.process.pid}/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"the process has no {field}")


def post(server: RunningServer, body: bytes, path: str = "/v1/models/m:predict") -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(*address_of(server), timeout=120)
    with contextlib.closing(connection):
        connection.request("POST", path, body)
        response = connection.getresponse()
        return response.status, response.read()


def held(server: RunningServer) -> int:
    connection = http.client.HTTPConnection(*address_of(server), timeout=60)
    with contextlib.closing(connection):
        connection.request("GET", "/monitoring/prometheus/metrics")
        for line in connection.getresponse().read().decode().splitlines():
            if line.startswith("keras_bn_serving_request_memory_bytes "):
                return int(float(line.split()[1]))
    raise AssertionError("there is no such metric")


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


WORST = {
    "empty lists": b'{"instances": [' + b"[]," * MEBIBYTE + b"[]]}",
    "objects": b'{"instances": [' + b"{}," * MEBIBYTE + b"{}]}",
    "short strings": b'{"instances": [' + b'"ab",' * (MEBIBYTE // 2) + b'"ab"]}',
    "members": b'{"instances": [{' + b'"a":1.5,' * (MEBIBYTE // 2) + b'"a":2}]}',
    "numbers": b'{"instances": [' + b"1," * (2 * MEBIBYTE) + b"1]}",
    "many numbers": b'{"instances": [' + b"1.25," * (4 * MEBIBYTE) + b"1]}",
    "large answers": b'{"instances": [2000000]}',
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", WORST)
def test_the_worst_bodies_of_many_clients_take_no_more_memory_than_is_set_aside(loaded: RunningServer, kind: str):
    Path(f"/proc/{loaded.process.pid}/clear_refs").write_text("5")  # The peak is counted anew.
    before = memory_of(loaded, "VmRSS:")
    with ThreadPoolExecutor(64) as clients:
        statuses = Counter(status for status, _ in clients.map(lambda _: post(loaded, WORST[kind]), range(64)))
    peak = memory_of(loaded, "VmHWM:")
    print(f"{kind}: {(peak - before) / MEBIBYTE:.0f} MiB more at the peak; answers {dict(statuses)}")
    assert peak - before < REQUEST_MEMORY
    assert statuses.keys() <= {200, 400, 413, 429, 503, 504}
    wait_for(lambda: held(loaded) == 0)


def test_what_needs_more_than_there_is_is_told_so(loaded: RunningServer):
    status, body = post(loaded, b'{"instances": [' + b"{}," * (6 * MEBIBYTE) + b"{}]}")
    assert status == 429
    assert "--request_memory_in_mb" in json.loads(body)["error"]


def test_memory_is_given_and_given_back():
    memory = Memory(125)  # A fifth is the allocator's.
    assert memory.limit == 100
    with memory.share() as one, memory.share() as other:
        one.hold(60)
        with pytest.raises(UnavailableError, match="Try again later"):
            other.hold(41)
        assert other.held == 0
        one.hold(10)
        other.hold(90)
        assert memory.held == 100
        with pytest.raises(ResourceExhaustedError, match="needs 101 bytes"):
            one.hold(101)
    assert memory.held == 0


def test_a_client_of_rest_that_leaves_frees_what_its_request_holds(loaded: RunningServer):
    body = b'{"signature_name": "wait", "instances": [1000]}'
    head = b"POST /v1/models/m:predict HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(body)
    connection = socket.create_connection(address_of(loaded), timeout=30)
    connection.sendall(head + body)
    wait_for(lambda: held(loaded) > 0)
    connection.close()
    wait_for(lambda: held(loaded) == 0)


def test_a_cancelled_call_of_grpc_frees_what_it_holds(loaded: RunningServer):
    with grpc.insecure_channel(loaded.grpc_target) as channel:
        call = prediction_service_pb2_grpc.PredictionServiceStub(channel).Predict.future(waiting(3000))
        wait_for(lambda: held(loaded) > 0)
        call.cancel()
        wait_for(lambda: held(loaded) == 0)


def waiting(rounds: int) -> predict_pb2.PredictRequest:
    request = predict_pb2.PredictRequest()
    request.model_spec.name, request.model_spec.signature_name = "m", "wait"
    request.inputs["rounds"].CopyFrom(tf.make_tensor_proto(np.int32([rounds])))
    return request


def test_the_time_limit_of_rest_is_none_of_grpcs(large_model: Path):
    flags = ("--model_name=m", f"--model_base_path={large_model}", "--rest_api_timeout_in_ms=50")
    with running_server(*flags) as server, grpc.insecure_channel(server.grpc_target) as channel:
        status, body = post(server, b'{"signature_name": "wait", "instances": [1000]}')
        assert (status, b"too long" in body) == (504, True)
        answer = prediction_service_pb2_grpc.PredictionServiceStub(channel).Predict(waiting(1000), timeout=120)
        assert list(answer.outputs["y"].float_val) == [1000.0]


def test_health_over_grpc_is_that_of_the_models_and_ends_before_the_server_does(large_model: Path):
    serving = health_pb2.HealthCheckResponse
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(running_server("--model_name=m", f"--model_base_path={large_model}"))
        with grpc.insecure_channel(server.grpc_target) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            for name in ("", "m", "tensorflow.serving.PredictionService"):
                assert health.Check(health_pb2.HealthCheckRequest(service=name)).status == serving.SERVING
            with pytest.raises(grpc.RpcError) as caught:
                health.Check(health_pb2.HealthCheckRequest(service="nobody"))
            assert caught.value.code() is grpc.StatusCode.NOT_FOUND
            seen = health.Watch(health_pb2.HealthCheckRequest(service="m"), timeout=60)
            assert next(seen).status == serving.SERVING
            # What is under way keeps the server, which says meanwhile that it takes nothing new.
            call = prediction_service_pb2_grpc.PredictionServiceStub(channel).Predict.future(waiting(3000))
            wait_for(lambda: call.running())
            time.sleep(0.2)
            server.process.terminate()
            assert next(seen).status == serving.NOT_SERVING
            assert list(call.result(timeout=60).outputs["y"].float_val) == [3000.0]


def test_a_version_that_is_never_given_back_stops_the_swaps_of_no_other_model(tmp_path: Path, large_model: Path):
    for name in ("a", "b"):
        shutil.copytree(large_model / "1", tmp_path / name / "1")
    config = tmp_path / "models.config"
    entries = "".join(
        f'config {{ name: "{name}" base_path: "{tmp_path / name}" model_platform: "tensorflow" }}' for name in "ab"
    )
    config.write_text(f"model_config_list {{ {entries} }}")
    flags = (f"--model_config_file={config}", "--file_system_poll_wait_seconds=0.1", "--rest_api_timeout_in_ms=300000")
    with running_server(*flags, "--drain_timeout_in_ms=500") as server, Client(server.url) as client:
        body = b'{"signature_name": "wait", "instances": [100000000]}'
        stuck = threading.Thread(target=try_post, args=(server, body))
        stuck.start()
        time.sleep(0.5)
        for name in ("a", "b"):
            shutil.copytree(large_model / "1", tmp_path / name / "2")
        wait_for(lambda: [one.state for one in client.status("b")] == ["AVAILABLE", "END"])
        wait_for(lambda: [one.state for one in client.status("a")] == ["AVAILABLE", "UNLOADING"])
    stuck.join()


def try_post(server: RunningServer, body: bytes) -> None:
    with contextlib.suppress(OSError, http.client.HTTPException):
        post(server, body, "/v1/models/a:predict")


def test_small_requests_are_answered_while_large_ones_are_read_and_written(loaded: RunningServer):
    """No time is asserted: the large one is still under way when a hundred small ones have their answers."""
    with ThreadPoolExecutor(3) as clients:
        # An error quotes what it is about, however long that is.
        quoting = clients.submit(post, loaded, b'{"instances": ["' + b"a" * (2 * MEBIBYTE) + b'"]}')
        reading = clients.submit(post, loaded, WORST["members"])
        writing = clients.submit(post, loaded, b'{"instances": [400000]}')
        connection = http.client.HTTPConnection(*address_of(loaded), timeout=60)
        while_busy = 0
        with contextlib.closing(connection):
            while not (reading.done() and writing.done() and quoting.done()):
                connection.request("GET", "/healthz")
                assert connection.getresponse().read()
                while_busy += 1
        assert writing.result()[0] == 200
        assert quoting.result()[0] == 400
    assert while_busy > 5
