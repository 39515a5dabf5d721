"""What the flags beside the models change: metrics, CORS, encryption, sockets, XLA, batching, the list of models."""

import json
import re
import subprocess
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
import tensorflow as tf
from google.protobuf import text_format
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from keras_bn_serving.client import Client
from keras_bn_serving.config import flags, foreign_flags
from keras_bn_serving.config.files import model_configs
from keras_bn_serving.errors import Code, InvalidArgumentError, ServingError
from tensorflow_serving.apis import inference_pb2, input_pb2, model_management_pb2, model_service_pb2_grpc
from tensorflow_serving.apis import prediction_service_pb2_grpc as prediction_stubs
from tensorflow_serving.config import model_server_config_pb2

from tests.serving import saved_models
from tests.serving.servers import RunningServer, running_server

METRICS = "/monitoring/prometheus/metrics"


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A key and a certificate of our own for localhost."""
    folder = tmp_path_factory.mktemp("certificate")
    key, cert = folder / "key.pem", folder / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-keyout", key, "-out", cert,
         "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"],
        check=True, capture_output=True,
    )  # fmt: skip
    return key, cert


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a part of which was saved to be compiled by XLA."""
    base = tmp_path_factory.mktemp("flags")

    @tf.function(jit_compile=True)
    def compiled(x: tf.Tensor) -> tf.Tensor:
        return x * 3.0

    spec = [tf.TensorSpec([None], tf.float32, name="x")]
    plain = (lambda x: {"y": x * 2.0}, spec)
    saved_models.export(base / "1", {"serving_default": plain, "compiled": (lambda x: {"y": compiled(x)}, spec)})
    return base


@pytest.fixture(scope="module")
def full_server(base: Path, certificate: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory):
    """A server with everything on."""
    folder = tmp_path_factory.mktemp("configs")
    (folder / "monitoring.config").write_text("prometheus_config { enable: true }")
    (folder / "batching.config").write_text("max_batch_size { value: 4 } batch_timeout_micros { value: 1000 }")
    key, cert = (json.dumps(path.read_text()) for path in certificate)
    (folder / "ssl.config").write_text(f"server_key: {key} server_cert: {cert}")
    with running_server(
        "--model_name=m", f"--model_base_path={base}", f"--monitoring_config_file={folder / 'monitoring.config'}",
        "--rest_api_enable_cors_support", "--rest_api_list_models=true", "--log_requests",
        f"--ssl_config_file={folder / 'ssl.config'}", "--enable_batching",
        f"--batching_parameters_file={folder / 'batching.config'}", "--xla_cpu_compilation_enabled",
        f"--grpc_socket_path={folder / 'grpc.sock'}", "--tensorflow_intra_op_parallelism=1",
    ) as running:  # fmt: skip
        yield running


def get(
    server: RunningServer, path: str, method: str = "GET", headers: dict[str, str] | None = None
) -> tuple[int, dict[str, str], bytes]:
    request = urllib.request.Request(server.url + path, method=method, headers=headers or {})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, dict(response.headers), response.read()
    except urllib.error.HTTPError as error:
        return error.code, dict(error.headers), error.read()


def test_metrics_carry_tensorflow_servings_names(full_server: RunningServer):
    with Client(full_server.url) as client:
        client.predict("m", [1.0])
        with pytest.raises(ServingError):
            client.predict("m", ["a"])
        with pytest.raises(ServingError):
            client.status("nobody")
    status, headers, body = get(full_server, METRICS)
    text = body.decode()
    assert (status, headers["content-type"]) == (200, "text/plain")
    assert ':tensorflow:serving:request_count{model_name="m",status="OK"}' in text
    assert ':tensorflow:serving:request_count{model_name="m",status="INVALID_ARGUMENT"} 1.0' in text
    bucket = ':tensorflow:serving:request_latency_bucket{API="predict",entrypoint="REST",le="10.0",model_name="m"}'
    assert bucket in text
    # Each of two series, `predict` and the looks before it, which have no name.
    assert text.count(":tensorflow:serving:request_latency_bucket") == 2 * 34
    assert ':tensorflow:serving:request_count{model_name="nobody",status="NOT_FOUND"} 1.0' in text
    assert "# TYPE :tensorflow:serving:request_count counter" in text


def test_pages_of_other_origins_may_ask_only_where_that_is_on(full_server: RunningServer, server: RunningServer):
    status, headers, _ = get(full_server, "/v1/models/m", "OPTIONS", {"Origin": "http://a.example"})
    allowed = [headers[f"access-control-allow-{what}"] for what in ("origin", "methods", "headers")]
    assert (status, allowed) == (200, ["*", "POST, GET", "Content-Type"])
    assert get(full_server, "/v1/models/m", "OPTIONS")[0] == 400
    assert get(full_server, "/v1/models/m")[1]["access-control-allow-origin"] == "*"
    assert "access-control-allow-origin" not in get(server, "/v1/models/multi")[1]


def test_models_are_listed_only_where_that_is_on(full_server: RunningServer, server: RunningServer):
    listed = json.loads(get(full_server, "/v1/models")[2])["models"]
    assert [(one["name"], one["versions"][0]["state"]) for one in listed] == [("m", "AVAILABLE")]
    status, _, body = get(server, "/v1/models")
    assert (status, json.loads(body)) == (400, {"error": "Missing model name in request."})


def test_batching_refuses_what_no_group_can_hold(full_server: RunningServer):
    with Client(full_server.url) as client:
        with pytest.raises(ServingError, match="Task size 5 is larger than maximum input batch size 4") as caught:
            client.predict("m", [1.0] * 5)
        assert caught.value.code is Code.INVALID_ARGUMENT
        assert client.predict("m", [1.0] * 4).tolist() == [2.0] * 4


def test_functions_saved_for_xla_run_only_where_xla_is_on(full_server: RunningServer, base: Path):
    with Client(full_server.url) as client:
        assert client.predict("m", [1.0], signature_name="compiled").tolist() == [3.0]
    with running_server("--model_name=m", f"--model_base_path={base}") as plain, Client(plain.url) as client:
        assert client.predict("m", [1.0]).tolist() == [2.0]
        with pytest.raises(ServingError, match="XLA compilation disabled") as caught:
            client.predict("m", [1.0], signature_name="compiled")
        assert caught.value.code is Code.UNKNOWN


def test_grpc_is_encrypted_where_a_certificate_is_given(full_server: RunningServer, certificate: tuple[Path, Path]):
    root = certificate[1].read_bytes()
    with Client(f"grpcs://{full_server.grpc_target}", root_certificate=root) as client:
        assert client.predict("m", np.float32([1, 2])).tolist() == [2.0, 4.0]


def test_health_readiness_and_openapi_are_there(server: RunningServer):
    assert get(server, "/healthz")[0] == get(server, "/readyz")[0] == 200
    paths = json.loads(get(server, "/openapi.json")[2])["paths"]
    body = paths["/v1/models/image:predict"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    rows = body["oneOf"][0]["properties"]["inputs"]["properties"]["image"]
    assert rows["items"]["minItems"] == 2
    assert rows["items"]["items"]["items"]["items"] == {"type": "integer", "minimum": 0, "maximum": 255}


@pytest.fixture
def channel(server: RunningServer) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.grpc_target) as channel:
        yield channel


def test_grpc_health_checking_and_reflection_answer(channel: grpc.Channel):
    health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=60)
    assert health.status == health_pb2.HealthCheckResponse.SERVING
    asked = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
    (answer,) = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(asked, timeout=60)
    names = [service.name for service in answer.list_services_response.service]
    assert "tensorflow.serving.PredictionService" in names
    assert "tensorflow.serving.ModelService" in names


def test_multi_inference_answers_several_signatures_at_once(channel: grpc.Channel):
    request = inference_pb2.MultiInferenceRequest(input=input_pb2.Input())
    example = request.input.example_list.examples.add()
    example.features.feature["x"].float_list.value.append(0.25)
    for method, name in (("classify", ""), ("regress", "regress_x")):
        task = request.tasks.add(method_name=f"tensorflow/serving/{method}")
        task.model_spec.name, task.model_spec.signature_name = "examples", name
    stub = prediction_stubs.PredictionServiceStub(channel)
    classes, numbers = stub.MultiInference(request, timeout=60).results
    assert [one.label for one in classes.classification_result.classifications[0].classes] == ["yes", "no"]
    assert numbers.regression_result.regressions[0].value == 0.5
    request.tasks[1].model_spec.signature_name = ""
    with pytest.raises(grpc.RpcError, match="Duplicate evaluation of signature: serving_default"):
        stub.MultiInference(request, timeout=60)


def test_what_is_served_is_changed_over_the_network_only_where_that_is_on(models_folder: Path):
    with running_server("--model_name=one", f"--model_base_path={models_folder / 'multi'}") as server:
        request = model_management_pb2.ReloadConfigRequest()
        request.config.model_config_list.config.add(
            name="two", base_path=str(models_folder / "half_plus_two"), model_platform="tensorflow"
        )
        with grpc.insecure_channel(server.grpc_target) as channel:
            with pytest.raises(grpc.RpcError, match="--enable_model_management") as caught:
                model_service_pb2_grpc.ModelServiceStub(channel).HandleReloadConfigRequest(request, timeout=60)
            assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED


def test_a_reloaded_configuration_takes_the_place_of_the_old_one(models_folder: Path):
    flags = ("--model_name=one", f"--model_base_path={models_folder / 'multi'}", "--enable_model_management")
    with running_server(*flags) as server:
        request = model_management_pb2.ReloadConfigRequest()
        one = request.config.model_config_list.config.add(
            name="two", base_path=str(models_folder / "half_plus_two"), model_platform="tensorflow"
        )
        with grpc.insecure_channel(server.grpc_target) as channel, Client(server.url) as client:
            stub = model_service_pb2_grpc.ModelServiceStub(channel)
            assert stub.HandleReloadConfigRequest(request, timeout=60).HasField("status")
            assert client.predict("two", [2.0]).tolist() == [4.0]
            with pytest.raises(ServingError, match=r"Servable not found for request: Latest\(one\)"):
                client.predict("one", [2.0])
            one.base_path = str(models_folder / "nowhere")
            with pytest.raises(grpc.RpcError, match="does not exist"):
                stub.HandleReloadConfigRequest(request, timeout=60)
            assert client.predict("two", [2.0]).tolist() == [4.0]


@pytest.mark.parametrize(("models", "text"), [
    ('config { name: "a" base_path: "" }', "Expected model a to have an absolute path or URI; got base_path()="),
    ('config { name: "a" base_path: "b/c" }', "Expected model a to have an absolute path or URI; got base_path()=b/c"),
    ('config { name: "a" base_path: "/b" } config { name: "a" }', "Illegal to list model a multiple times"),
    ('config { name: "a" base_path: "/b" model_platform: "x" }', "Model a requests unsupported platform x"),
    (
        'config { name: "served" base_path: "/b" model_platform: "x" }',
        "Illegal to change a model's platform. For model served platform was tensorflow and new platform requested is ",
    ),
    ('config { name: "a" base_path: "gs://b/c" }', "Illegal setting neither ModelServerConfig::model_type"),
])  # fmt: skip
def test_lists_of_models_are_refused_in_the_words_of_tensorflow_serving(models: str, text: str):
    message = text_format.Parse(f"model_config_list {{ {models} }}", model_server_config_pb2.ModelServerConfig())
    with pytest.raises(InvalidArgumentError, match=re.escape(text)):
        model_configs(message, "here", served={"served"})


@pytest.mark.parametrize(
    ("given", "ignored"),
    [
        (["--model_base_path=/m"], "--model_base_path"),
        (["--model_name=m", "--model_base_path=/m"], "--model_name and --model_base_path"),
    ],
)
def test_what_a_config_file_makes_ignored_is_warned_of(
    given: list[str], ignored: str, caplog: pytest.LogCaptureFixture
):
    flags.parse(["--model_config_file=f", *given])
    flags.parse(["--model_config_file=f"])
    flags.parse(given if len(given) > 1 else ["--model_base_path=/m"])
    assert [record.message for record in caplog.records] == [
        f"{ignored} ignored: --model_config_file=f names the models"
    ]


@pytest.mark.parametrize(("policy", "served"), [
    ("specific {}", []), ("specific { versions: 1 }", [1]), ("latest { num_versions: 0 }", [2]),
    ("", [2]), ("all {}", [2, 1]),
])  # fmt: skip
def test_versions_are_those_that_tensorflow_serving_takes_by_a_policy(policy: str, served: list[int]):
    model = f'name: "a" base_path: "file:///b" model_platform: "tensorflow" model_version_policy {{ {policy} }}'
    text = f"model_config_list {{ config {{ {model} }} }}"
    message = text_format.Parse(text, model_server_config_pb2.ModelServerConfig())
    (config,) = model_configs(message, "here")
    assert config.policy.aspired([1, 2]) == served
    assert config.base_path == "/b"


@pytest.mark.parametrize("form", ["--{}=1", "--{} 1", "--{}"])
@pytest.mark.parametrize("name", foreign_flags.WITHOUT_EFFECT)
def test_flags_of_tensorflow_serving_that_change_no_answer_are_taken_with_a_warning(
    name: str, form: str, caplog: pytest.LogCaptureFixture
):
    options = flags.parse([*form.format(name).split(), "--model_base_path=/m"])
    assert options.model_base_path == "/m"
    assert [record.message for record in caplog.records] == [f"--{name} has no effect here, and changes no answer"]


@pytest.mark.parametrize("name", foreign_flags.REFUSED)
def test_flags_of_tensorflow_serving_that_cannot_be_followed_are_refused_with_the_way_out(name: str):
    default, way = foreign_flags.REFUSED[name]
    with pytest.raises(flags.UsageError, match=re.escape(f"--{name}=other cannot be followed here: {way}.")):
        flags.parse([f"--{name}=other", "--model_base_path=/m"])
    assert flags.parse([f"--{name}={default}", "--model_base_path=/m"]).model_base_path == "/m"


@pytest.mark.parametrize("name", ["file_system_poll_wait_seconds", "model_config_file_poll_wait_seconds"])
def test_a_pause_that_no_thread_can_wait_is_refused(name: str):
    for given in ("inf", "nan", "-1", "1e10"):
        with pytest.raises(flags.UsageError, match=rf"must be a number, from 0 to \d+\. Received: '{given}'"):
            flags.parse([f"--{name}={given}", "--model_base_path=/m"])
    longest = getattr(flags.parse([f"--{name}={int(threading.TIMEOUT_MAX)}", "--model_base_path=/m"]), name)
    event = threading.Event()
    threading.Timer(0.01, event.set).start()
    assert event.wait(longest)


def test_the_parallelism_of_sessions_is_that_of_both_pools_where_they_say_nothing():
    options = flags.parse(
        ["--tensorflow_session_parallelism=3", "--tensorflow_inter_op_parallelism=1", "--model_base_path=/m"]
    )
    assert (options.tensorflow_intra_op_parallelism, options.tensorflow_inter_op_parallelism) == (3, 1)
