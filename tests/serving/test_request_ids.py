"""Every answer says which request it is to, and so does every line of the log about it."""

import asyncio
import http.client
import json
import logging
import subprocess
from pathlib import Path

import grpc
import pytest
from keras_bn_serving import request_ids
from keras_bn_serving.engine.background import Background
from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

from tests.serving.servers import ROOT, RunningServer, command, environment


def ask(server_url: str, path: str, headers: dict[str, str] | None = None) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection(server_url.removeprefix("http://"), timeout=60)
    connection.request("GET", path, headers=headers or {})
    response = connection.getresponse()
    response.read()
    return response


@pytest.mark.parametrize("path", ["/v1/models/half_plus_two", "/v1/models/nobody", "/nowhere", "/healthz", "/v1/%zz"])
def test_the_id_that_a_caller_gives_comes_back(server: RunningServer, path: str):
    assert ask(server.url, path, {"X-Request-Id": "my-id.1"}).getheader("x-request-id") == "my-id.1"


@pytest.mark.parametrize("given", ["", "a b", "x" * 129, "\u00e9"])
def test_who_gives_none_or_one_that_cannot_be_logged_gets_one_of_its_own(server: RunningServer, given: str):
    headers = {"X-Request-Id": given} if given else {}
    ids = {ask(server.url, "/v1/models/half_plus_two", headers).getheader("x-request-id") for _ in range(3)}
    assert len(ids) == 3
    assert given not in ids


@pytest.mark.parametrize(("model", "code"), [("half_plus_two", "OK"), ("nobody", "NOT_FOUND")])
def test_calls_of_grpc_have_theirs_in_the_trailing_metadata(server: RunningServer, model: str, code: str):
    request = predict_pb2.PredictRequest()
    request.model_spec.name = model
    request.inputs["x"].dtype = 1
    request.inputs["x"].tensor_shape.dim.add(size=1)
    request.inputs["x"].float_val.append(2.0)
    with grpc.insecure_channel(server.grpc_target) as channel:
        stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
        call = stub.Predict.future(request, timeout=60, metadata=(("x-request-id", "my-id.2"),))
        assert call.code().name == code
        assert ("x-request-id", "my-id.2") in [tuple(pair) for pair in call.trailing_metadata()]


def test_the_log_of_requests_has_them(models_folder: Path, tmp_path: Path):
    log = tmp_path / "log"
    flags = ("--rest_api_port=auto", "--model_name=m", f"--model_base_path={models_folder / 'multi'}", "--log_requests")
    with log.open("w") as stderr:
        process = subprocess.Popen(
            command(*flags), cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=stderr, text=True
        )
        try:
            assert process.stdout is not None
            lines = iter(process.stdout)
            url = next(line for line in lines if "REST at" in line).split("REST at ")[1].split()[0].strip(",;")
            next(line for line in lines if line.startswith("Ready"))
            ask(url, "/v1/models/m", {"X-Request-Id": "my-id.3"})
        finally:
            process.terminate()
            process.communicate(timeout=60)
    (line,) = [line for line in log.read_text().splitlines() if "/v1/models/m" in line and "{" in line]
    assert json.loads(line[line.index("{") :])["request_id"] == "my-id.3"
    assert " [request my-id.3]: {" in line


def test_what_is_logged_on_other_threads_is_of_the_request_too():
    records: list[logging.LogRecord] = []

    async def answer(background: Background) -> None:
        request_ids.begin("my-id.4")
        _, done = background.start(lambda go_on: logging.getLogger("test").warning("read"))
        await done

    handler = logging.Handler()
    handler.addFilter(request_ids.Marking())
    handler.emit = records.append  # type: ignore[method-assign]
    logging.getLogger("test").addHandler(handler)
    background = Background(1, "test")
    try:
        asyncio.run(answer(background))
    finally:
        background.close()
        logging.getLogger("test").removeHandler(handler)
    assert [record.request for record in records] == [" [request my-id.4]"]  # type: ignore[attr-defined]
