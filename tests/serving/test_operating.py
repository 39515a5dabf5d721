"""What whoever operates a server relies on: switches, bounds, lines in the log, metrics, and no thread that dies."""

import asyncio
import http.client
import logging
import os
import signal
import socket
import subprocess
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tensorflow as tf
from keras_bn_serving.config import flags
from keras_bn_serving.config.models import ModelConfig
from keras_bn_serving.engine import batching, repository
from keras_bn_serving.engine.loading import Loader
from keras_bn_serving.engine.machine import usable_cores
from keras_bn_serving.engine.metrics import Metrics
from keras_bn_serving.engine.servable import LoadOptions
from keras_bn_serving.engine.versions import State
from keras_bn_serving.rest import hosting
from tensorflow_serving.apis import predict_pb2, prediction_log_pb2, prediction_service_pb2_grpc

from tests.serving import saved_models
from tests.serving.servers import ROOT, RunningServer, command, environment, running_server
from tests.serving.test_robustness import address_of
from tests.serving.test_under_load import wait_for

MEBIBYTE = 2**20
MODEL = "--model_base_path=/m"


@pytest.mark.parametrize(
    ("given", "ports"),
    [
        ([], (8501, 8500)),
        (["--port=0"], (8501, 0)),
        (["--rest_api_port=0"], (0, 8500)),
        (["--rest_api_port=auto"], (flags.AUTO, flags.AUTO)),
        (["--rest_api_port=auto", "--port=0"], (flags.AUTO, 0)),
    ],
)
def test_a_port_of_0_switches_a_protocol_off_and_auto_takes_a_free_one(given: list[str], ports: tuple[int, int]):
    options = flags.parse([MODEL, *given])
    assert (options.rest_api_port, options.port) == ports


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--port=0", "--rest_api_port=0"], "leave no way to ask"),
        (["--port=9000", "--rest_api_port=9000"], "must differ. Received: 9000 for both"),
    ],
)
def test_ports_that_cannot_both_be_are_refused(given: list[str], words: str):
    with pytest.raises(flags.UsageError, match=words):
        flags.parse([MODEL, *given])


def test_threads_are_those_of_the_cores_that_the_process_may_use():
    assert flags.parse([MODEL]).rest_api_num_threads == 4 * usable_cores()
    assert batching.BatchingOptions().num_batch_threads == usable_cores()


def test_metrics_tell_of_warm_ups_states_memory_failures_and_the_process():
    metrics = Metrics()
    metrics.warmed_up("m", "OK", 0.002)
    metrics.background_failure("model-repository")
    metrics.ran("m", 3, 0.001, 0.002)
    metrics.ran_together("m", 5)
    text = metrics.text(7, 11, [("m", 1, State.AVAILABLE)]).decode()
    for line in (
        ':tensorflow:serving:model_warmup_latency_sum{model_name="m",status="OK"} 2000.0',
        'keras_bn_serving_background_failures_total{thread="model-repository"} 1.0',
        ':tensorflow:serving:request_example_counts_sum{model="m"} 3.0',
        ':tensorflow:serving:batching_session:processed_batch_size_sum{name="m"} 5.0',
        ':tensorflow:serving:batching_session:queuing_latency_sum{name="m"} 1000.0',
        ":tensorflow:serving:batching_session:waiting_rows 7.0",
        "keras_bn_serving_request_memory_bytes 11.0",
        'keras_bn_serving_model_state{model_name="m",version="1"} 30.0',
    ):
        assert line + "\n" in text
    assert "python_gc_collections_total" in text
    if os.path.isdir("/proc/self"):
        assert "process_resident_memory_bytes" in text


class Loaded:
    """A version of which nothing is asked."""

    def close(self) -> None:
        """Has nothing to free."""


def test_a_folder_that_cannot_be_read_keeps_what_is_loaded_and_is_looked_at_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    base = tmp_path / "base"
    (base / "1").mkdir(parents=True)
    models = repository.ModelRepository(lambda name, number, path: Loaded(), poll_wait_seconds=0)  # type: ignore[arg-type]
    models.start([ModelConfig("m", str(base))])
    base.rename(tmp_path / "away")
    base.symlink_to(base)  # ELOOP, which neither "not found" nor permissions are; root may read anything.
    for _ in range(3):
        models._poll()
    assert [(number, state) for number, state, _ in models.known("m")] == [(1, State.AVAILABLE)]
    assert caplog.text.count("cannot read its folder, keeping what is loaded") == 1
    base.unlink()
    (tmp_path / "away").rename(base)
    (base / "2").mkdir()
    models._poll()
    assert (2, State.AVAILABLE) in [(number, state) for number, state, _ in models.known("m")]
    models.close(1)


def test_what_is_named_as_a_version_and_cannot_be_one_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    for name in ("1", "01", str(2**63), str(2**63 - 1), "no_version"):
        (tmp_path / name).mkdir()
    (tmp_path / "7").write_text("")
    config = ModelConfig("m", str(tmp_path))
    assert sorted(config.find_versions()) == [1, 2**63 - 1]
    assert sorted(config.find_versions()) == [1, 2**63 - 1]
    told = sorted(record.getMessage() for record in caplog.records)
    assert told == [
        f"{tmp_path / '1'} is not served: {tmp_path / '01'} is version 1 already",
        f"{tmp_path / '7'} is not served: it is no folder",
        f"{tmp_path / str(2**63)} is not served: a version is {2**63 - 1} at most",
    ]


def spin(rounds: tf.Tensor) -> dict[str, tf.Tensor]:
    """Multiplies matrices as often as it is told to."""
    start = tf.fill([256, 256], 1.0 / 256.0)
    end = tf.while_loop(lambda i, m: i < rounds[0], lambda i, m: (i + 1, m @ m), [0, start])[1]
    return {"y": tf.cast(rounds, tf.float32) + 0.0 * end[0, 0]}


def spinning(rounds: int) -> predict_pb2.PredictRequest:
    request = predict_pb2.PredictRequest()
    request.model_spec.name = "m"
    request.inputs["rounds"].CopyFrom(tf.make_tensor_proto(np.int32([rounds])))
    return request


@pytest.fixture(scope="module")
def busy_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("busy")
    saved_models.export(base / "1", {"serving_default": (spin, [tf.TensorSpec([1], tf.int32, name="rounds")])})
    return base


def test_the_time_limit_of_rest_is_none_of_a_warm_ups(busy_model: Path):
    log = prediction_log_pb2.PredictionLog()
    log.predict_log.request.CopyFrom(spinning(300))
    (busy_model / "1" / "assets.extra").mkdir()
    with tf.io.TFRecordWriter(str(busy_model / "1" / "assets.extra" / "tf_serving_warmup_requests")) as file:
        file.write(log.SerializeToString())
    warmed: list[str] = []
    load = Loader(LoadOptions(timeout_seconds=0.001), on_warm_up=lambda name, status, seconds: warmed.append(status))
    load("m", 1, str(busy_model / "1")).close()
    assert warmed == ["OK"]


def test_more_connections_than_may_be_are_told_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hosting, "_MOST_CONNECTIONS", 3)

    async def application(scope: Any, receive: Any, send: Callable[[Any], Awaitable[None]]) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    async def ask_all(port: int) -> list[bytes]:
        open_ones = []
        answers = []
        for _ in range(4):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
            answers.append((await reader.readline()).rstrip())
            open_ones.append(writer)
        for writer in open_ones:
            writer.close()
        return answers

    async def run() -> list[bytes]:
        listening = socket.create_server(("127.0.0.1", 0))
        listening.setblocking(False)
        server = hosting.HttpServer(application, listening)  # type: ignore[arg-type]
        await server.start()
        try:
            return await ask_all(listening.getsockname()[1])
        finally:
            await server.stop(5)

    *first, last = asyncio.run(run())
    assert first[0] == b"HTTP/1.1 200 OK"
    assert last == b"HTTP/1.1 503 Service Unavailable"


@pytest.fixture(scope="module")
def busy(busy_model: Path):
    """A server of that model, whose answers over REST may take half a second."""
    with running_server("--model_name=m", f"--model_base_path={busy_model}", "--rest_api_timeout_in_ms=500") as running:
        yield running


@pytest.mark.slow
def test_more_calls_than_may_be_are_told_so(busy: RunningServer):
    with grpc.insecure_channel(busy.grpc_target) as channel:
        ask = prediction_service_pb2_grpc.PredictionServiceStub(channel).Predict
        calls = [ask.future(spinning(20_000)) for _ in range(1500)]
        wait_for(lambda: sum(call.done() for call in calls) >= 400)
        assert {call.code() for call in calls if call.done()} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        for call in calls:
            call.cancel()
        assert list(ask(spinning(2), timeout=120).outputs["y"].float_val) == [2.0]


@pytest.mark.slow
def test_a_client_of_a_body_that_is_too_large_reads_why(busy: RunningServer):
    """It sends all of it before it reads, as most clients do."""
    connection = http.client.HTTPConnection(*address_of(busy), timeout=120)
    connection.request("POST", "/v1/models/m:predict", b" " * (257 * MEBIBYTE))
    response = connection.getresponse()
    assert response.status == 413
    assert b"256.0 MiB" in response.read()
    connection.close()


@pytest.mark.slow
def test_reading_that_is_given_up_ends_and_does_not_keep_the_server(busy_model: Path):
    flags = ("--model_name=m", f"--model_base_path={busy_model}", "--rest_api_timeout_in_ms=500")
    with running_server(*flags) as server:
        body = b'{"inputs": [' + b"[]," * (10 * MEBIBYTE) + b"[]]}"
        connection = http.client.HTTPConnection(*address_of(server), timeout=120)
        connection.request("POST", "/v1/models/m:predict", body)
        assert connection.getresponse().status in (400, 504)
        connection.close()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(timeout=60) == 0


@pytest.mark.slow
@pytest.mark.parametrize(("level", "seen"), [("info", True), ("warning", False)])
def test_swaps_and_drains_are_in_the_log_unless_it_is_told_otherwise(busy_model: Path, level: str, seen: bool):
    flags = ("--rest_api_port=auto", "--model_name=m", f"--model_base_path={busy_model}", f"--log_level={level}")
    process = subprocess.Popen(
        command(*flags), cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert "Ready\n" in iter(process.stdout.readline, "")
        process.send_signal(signal.SIGTERM)
        log = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    for words in ("model m version 1: available", "stopping: no further connections", "model m version 1: unloaded"):
        assert (words in log) is seen


def test_the_level_of_the_log_is_info_unless_told_otherwise():
    assert flags.parse([MODEL]).log_level == logging.getLevelName(logging.INFO)
    assert flags.parse([MODEL, "--log_level=debug"]).log_level == "DEBUG"
    with pytest.raises(flags.UsageError, match="debug, info, warning or error"):
        flags.parse([MODEL, "--log_level=loud"])
