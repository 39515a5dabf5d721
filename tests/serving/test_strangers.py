"""No request's answer depends on what strangers ask at the same time, with the flags that nobody has changed."""

import concurrent.futures
import http.client
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from tests.serving import saved_models
from tests.serving.servers import RunningServer, running_server

CLIENTS = 32


def always(x: np.ndarray) -> np.ndarray:
    return x - x.mean()


def sometimes(x: np.ndarray) -> np.ndarray:
    return x * (0.5 if x.max() > 90.0 else 1.0)


def never(x: np.ndarray) -> np.ndarray:
    return x * 2.0 + 1.0


SIGNATURES = {"always": always, "sometimes": sometimes, "never": never}


@pytest.fixture(scope="module")
def stranger_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    base: Path = tmp_path_factory.mktemp("strangers")
    table = tf.TensorSpec([None], tf.float32, name="x")
    functions = {
        "always": (lambda x: {"y": x - tf.reduce_mean(x)}, [table]),
        "sometimes": (lambda x: {"y": x * tf.where(tf.reduce_max(x) > 90.0, 0.5, 1.0)}, [table]),
        "never": (lambda x: {"y": x * 2.0 + 1.0}, [table]),
    }
    saved_models.export(base / "m" / "1", functions)
    with running_server("--model_name=m", f"--model_base_path={base / 'm'}") as running:
        yield running


def wrong_answers(server: RunningServer, count: int) -> list[tuple[str, list[float], object]]:
    """Asks `count` times, from many clients at once; returns what was not answered as alone."""
    start = threading.Barrier(CLIENTS)

    def ask(number: int) -> list[tuple[str, list[float], object]]:
        chance = np.random.default_rng(number)
        connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=120)
        start.wait()
        wrong: list[tuple[str, list[float], object]] = []
        for turn in range(count // CLIENTS):
            # Identical requests first: whoever trusts what agrees once is led astray.
            identical = turn < count // CLIENTS // 4
            x = [1.0, 3.0] if identical else np.round(chance.uniform(0, 91 if turn % 2 else 40, 2), 2).tolist()
            name = ("always", "sometimes", "always", "sometimes", "never")[turn % 5]
            connection.request("POST", "/v1/models/m:predict", json.dumps({"signature_name": name, "instances": x}))
            response = connection.getresponse()
            answer = json.loads(response.read())
            expected = SIGNATURES[name](np.array(x, np.float32))
            got = answer.get("predictions")
            if response.status != 200 or not np.allclose(got, expected, rtol=1e-6, atol=1e-5):
                wrong.append((name, x, answer))
        return wrong

    with concurrent.futures.ThreadPoolExecutor(CLIENTS) as clients:
        return [each for found in clients.map(ask, range(CLIENTS)) for each in found]


def test_signatures_that_depend_on_their_batch_answer_as_alone(stranger_server: RunningServer):
    assert wrong_answers(stranger_server, 1600) == []


@pytest.mark.slow
def test_ten_thousand_answers_of_signatures_that_depend_on_their_batch_are_as_alone(stranger_server: RunningServer):
    assert wrong_answers(stranger_server, 10_240) == []
