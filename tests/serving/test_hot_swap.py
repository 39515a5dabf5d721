"""Versions come and go below a running server."""

import shutil
import subprocess
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from keras_bn_serving.client import Client
from keras_bn_serving.config.models import ModelConfig
from keras_bn_serving.engine import repository
from keras_bn_serving.engine.recurring import Recurring
from keras_bn_serving.engine.servable import Servable
from keras_bn_serving.errors import InvalidArgumentError, ServingError
from tensorflow_serving.apis import predict_pb2, prediction_log_pb2

from tests.serving import saved_models
from tests.serving.servers import ROOT, command, environment, run_to_the_end, running_server

POLL = "--file_system_poll_wait_seconds=0.05"
LAST = 20
CORRUPT = 7
FAILS_WARM_UP = 13


def write_warm_up(version_folder: Path, input_name: str = "x") -> None:
    """Adds one warm-up request to a version."""
    log = prediction_log_pb2.PredictionLog()
    request = log.predict_log.request
    request.CopyFrom(predict_pb2.PredictRequest())
    request.model_spec.name = "m"
    request.inputs[input_name].CopyFrom(tf.make_tensor_proto([1.0], tf.float32))
    (version_folder / "assets.extra").mkdir(exist_ok=True)
    with tf.io.TFRecordWriter(str(version_folder / "assets.extra" / "tf_serving_warmup_requests")) as writer:
        writer.write(log.SerializeToString())


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty versions, version n of which adds n; one is corrupt and one fails its warm-up."""
    base = tmp_path_factory.mktemp("versions")
    for number in range(1, LAST + 1):
        folder = saved_models.half_plus(base, number, float(number))
        write_warm_up(folder, "y" if number == FAILS_WARM_UP else "x")
    (base / str(CORRUPT) / "saved_model.pb").write_bytes(b"corrupt")
    return base


def publish(versions: Path, base: Path, number: int) -> None:
    """Makes a version appear in one step, as an exporter does."""
    shutil.copytree(versions / str(number), base / f"copying-{number}")
    (base / f"copying-{number}").rename(base / str(number))


def await_state(client: Client, number: int, state: str, model: str = "m") -> None:
    for _ in range(2000):
        if any(each.version == number and each.state == state for each in client.status(model)):
            return
        threading.Event().wait(0.02)
    raise AssertionError(f"version {number} did not become {state}: {client.status(model)}")


def test_twenty_versions_in_a_row_are_swapped_under_sixteen_clients_without_a_failure(versions: Path, tmp_path: Path):
    publish(versions, tmp_path, 1)
    answers: Counter[float] = Counter()
    failures: list[str] = []
    backward: list[tuple[float, float]] = []
    done = threading.Event()

    def ask(url: str) -> None:
        last = 0.0
        with Client(url) as client:
            while not done.is_set():
                try:
                    answer = float(client.predict("m", [0.0])[0])
                except ServingError as error:
                    failures.append(str(error))
                    continue
                answers[answer] += 1
                if answer < last:
                    backward.append((last, answer))
                last = answer

    with (
        running_server("--model_name=m", f"--model_base_path={tmp_path}", POLL) as server,
        Client(server.url) as client,
    ):
        threads = [threading.Thread(target=ask, args=[server.url]) for _ in range(16)]
        for thread in threads:
            thread.start()
        try:
            for number in range(2, LAST + 1):
                publish(versions, tmp_path, number)
                await_state(client, number, "END" if number in (CORRUPT, FAILS_WARM_UP) else "AVAILABLE")
            await_state(client, LAST - 1, "END")
        finally:
            done.set()
            for thread in threads:
                thread.join()
        errors = {each.version: each.error_message for each in client.status("m") if each.error_message}
    assert failures == []
    assert backward == []
    assert answers[float(CORRUPT)] == 0
    assert answers[float(FAILS_WARM_UP)] == 0
    assert set(answers) <= {float(number) for number in range(1, LAST + 1)}
    assert answers[float(LAST)] > 0
    assert sorted(errors) == [CORRUPT, FAILS_WARM_UP]
    assert "Cannot load the SavedModel" in errors[CORRUPT]
    assert "Warm-up request 1" in errors[FAILS_WARM_UP]
    assert "Missing but required: {x}" in errors[FAILS_WARM_UP]


def test_a_removed_version_is_unloaded_and_a_mended_one_is_loaded(versions: Path, tmp_path: Path):
    for number in (1, 2):
        publish(versions, tmp_path, number)
    config = tmp_path / "models.config"
    config.write_text(
        f'model_config_list {{ config {{ name: "m" base_path: "{tmp_path}" model_platform: "tensorflow" '
        "model_version_policy { all {} } } }"
    )
    with running_server(f"--model_config_file={config}", POLL) as server, Client(server.url) as client:
        assert client.predict("m", [0.0], version=1).tolist() == [1.0]
        shutil.rmtree(tmp_path / "1")
        await_state(client, 1, "END")
        with pytest.raises(ServingError, match=r"Servable not found for request: Specific\(m, 1\)"):
            client.predict("m", [0.0], version=1)
        publish(versions, tmp_path, CORRUPT)
        await_state(client, CORRUPT, "END")
        shutil.copy(versions / "3" / "saved_model.pb", tmp_path / str(CORRUPT) / "saved_model.pb")
        await_state(client, CORRUPT, "AVAILABLE")
        assert client.predict("m", [0.0]).tolist() == [3.0]


def save_with_variables(folder: Path, number: float) -> Path:
    module = tf.Module()
    module.variable = tf.Variable([number] * 1000)
    spec = tf.TensorSpec([None], tf.float32, name="x")
    function = tf.function(lambda x: {"y": x + module.variable[0]}).get_concrete_function(spec)
    tf.saved_model.save(module, str(folder), signatures=function)
    write_warm_up(folder)
    return folder


@pytest.mark.parametrize("first", ["saved_model.pb", "variables/variables.index", "assets.extra"])
def test_a_version_that_is_copied_file_by_file_is_served_once_it_is_whole(tmp_path: Path, first: str):
    base = tmp_path / "served"
    publish(save_with_variables(tmp_path / "made" / "1", 1.0).parent, base, 1)
    made = save_with_variables(tmp_path / "made" / "2", 2.0)
    files = sorted((path for path in made.rglob("*") if path.is_file()), key=lambda path: first not in str(path))
    flags = ("--model_name=m", f"--model_base_path={base}", POLL)
    with running_server(*flags) as server, Client(server.url) as client:
        for file in files:
            assert client.predict("m", [0.0]).tolist() in ([1.0], [2.0])  # Not every file is needed.
            target = base / "2" / file.relative_to(made)
            target.parent.mkdir(parents=True, exist_ok=True)
            content = file.read_bytes()
            target.write_bytes(content[: len(content) // 2])
            threading.Event().wait(0.3)
            target.write_bytes(content)
            threading.Event().wait(0.3)
        await_state(client, 2, "AVAILABLE")
        await_state(client, 1, "END")
        assert client.predict("m", [0.0]).tolist() == [2.0]


def test_a_base_path_and_a_version_that_are_not_there_yet_are_waited_for(versions: Path, tmp_path: Path):
    base = tmp_path / "later"
    flags = ("--rest_api_port=auto", "--model_name=m", f"--model_base_path={base}", POLL)
    process = subprocess.Popen(
        command(*flags), cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stderr is not None
        assert process.stdout is not None
        waits = (line for line in process.stderr if "waiting: " in line)
        assert f"the base path {base} does not exist" in next(waits)
        base.mkdir()
        assert f"no version found below {base}" in next(waits)
        publish(versions, base, 3)
        assert "Serving m, version 3\n" in iter(process.stdout.readline, "Ready\n")
    finally:
        process.kill()
        process.communicate()


def test_a_refused_reload_leaves_what_is_served_and_is_tried_again(versions: Path, tmp_path: Path):
    for number in (1, 2):
        publish(versions, tmp_path / "a", number)
    entry = (
        'config {{ name: "{name}" base_path: "{path}" model_platform: "tensorflow" model_version_policy {{ '
        'specific {{ versions: {version} }} }} version_labels {{ key: "live" value: {version} }} }}'
    )
    config = tmp_path / "models.config"

    def write(*entries: str) -> None:
        config.write_text(f"model_config_list {{ {' '.join(entries)} }}")

    write(entry.format(name="m", path=tmp_path / "a", version=1))
    follow = "--model_config_file_poll_wait_seconds=0.05"
    with running_server(f"--model_config_file={config}", follow, POLL) as server, Client(server.url) as client:
        broken = tmp_path / "b"
        publish(versions, broken, CORRUPT)
        write(
            entry.format(name="m", path=tmp_path / "a", version=2),
            entry.format(name="n", path=broken, version=CORRUPT),
        )
        for _ in range(30):
            assert client.predict("m", [0.0], label="live").tolist() == [1.0]
            assert client.predict("m", [0.0], version=1).tolist() == [1.0]
            threading.Event().wait(0.02)
        shutil.copy(versions / "3" / "saved_model.pb", broken / str(CORRUPT) / "saved_model.pb")
        await_state(client, CORRUPT, "AVAILABLE", "n")
        assert client.predict("n", [0.0], label="live").tolist() == [3.0]
        await_state(client, 1, "END")
        assert client.predict("m", [0.0], label="live").tolist() == [2.0]


def test_a_version_that_has_failed_is_tried_again_after_longer_and_longer_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "saved_model.pb").write_bytes(b"corrupt")
    now, tried = [0.0], []

    def load(name: str, version: int, path: str) -> Servable:
        tried.append(now[0])
        raise InvalidArgumentError("corrupt")

    monkeypatch.setattr(repository.time, "monotonic", lambda: now[0])
    models = repository.ModelRepository(load, poll_wait_seconds=0)
    with pytest.raises(ServingError, match="version 1 cannot be served: corrupt"):
        models.start([ModelConfig("m", str(tmp_path))])
    models._configs = {"m": ModelConfig("m", str(tmp_path))}
    for now[0] in range(1, 1000):
        models._poll()
    gaps = np.diff(tried).tolist()
    assert gaps == [5, 10, 20, 40, 80, 160, 300, 300]
    (tmp_path / "1" / "saved_model.pb").write_bytes(b"changed")
    models._poll()
    assert len(tried) == len(gaps) + 2


def test_work_in_the_background_goes_on_whatever_it_raises(caplog: pytest.LogCaptureFixture):
    turns: list[int] = []
    failures: list[str] = []

    def act() -> None:
        turns.append(len(turns))
        if len(turns) % 2:
            raise PermissionError(13, "no")

    recurring = Recurring("looker", 0.01, act, failures.append)
    recurring.start()
    for _ in range(500):
        if len(turns) >= 6:
            break
        threading.Event().wait(0.01)
    recurring.stop()
    assert len(turns) >= 6
    assert failures[:3] == ["looker"] * 3
    assert "looker: this turn has failed" in caplog.text


def test_a_version_policy_names_the_versions_and_a_config_file_is_followed(versions: Path, tmp_path: Path):
    for number in (1, 2, 3):
        publish(versions, tmp_path, number)
    config = tmp_path / "models.config"
    text = (
        'model_config_list {{ config {{ name: "m" base_path: "{}" model_platform: "tensorflow" '
        "model_version_policy {{ specific {{ versions: 1 versions: 2 }} }} "
        'version_labels {{ key: "live" value: {} }} }} }}'
    )
    config.write_text(text.format(tmp_path, 1))
    follow = "--model_config_file_poll_wait_seconds=0.05"
    with running_server(f"--model_config_file={config}", follow, POLL) as server, Client(server.url) as client:
        assert [each.version for each in client.status("m")] == [2, 1]
        assert client.predict("m", [0.0], label="live").tolist() == [1.0]
        config.write_text(text.format(tmp_path, 2))
        for _ in range(500):
            if client.predict("m", [0.0], label="live").tolist() == [2.0]:
                break
            threading.Event().wait(0.02)
        assert client.predict("m", [0.0], label="live").tolist() == [2.0]


def test_a_label_for_a_version_that_is_not_loaded_is_refused_at_the_start(versions: Path, tmp_path: Path):
    publish(versions, tmp_path, 1)
    config = tmp_path / "models.config"
    config.write_text(
        f'model_config_list {{ config {{ name: "m" base_path: "{tmp_path}" model_platform: "tensorflow" '
        'version_labels { key: "l" value: 9 } } }'
    )
    result = run_to_the_end(f"--model_config_file={config}", "--rest_api_port=auto")
    assert result.returncode == 1
    assert "label to version 9 of model m, which is not currently available" in result.stderr


def test_warm_up_can_be_switched_off(versions: Path, tmp_path: Path):
    publish(versions, tmp_path, FAILS_WARM_UP)
    flags = ("--model_name=m", f"--model_base_path={tmp_path}", "--enable_model_warmup=false")
    with running_server(*flags) as server, Client(server.url) as client:
        assert client.predict("m", [0.0]).tolist() == [float(FAILS_WARM_UP)]
