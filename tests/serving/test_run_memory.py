"""What a model takes while it runs is bounded: many rows run in parts where they stand alone, or are refused."""

import http.client
import json
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from keras_bn_serving.engine.grouping import BatchingOptions, run_one, run_together
from keras_bn_serving.engine.machine import usable_memory
from keras_bn_serving.engine.run_memory import RunMemory
from keras_bn_serving.engine.servable import LoadOptions, Servable
from keras_bn_serving.errors import CancelledError, DeadlineExceededError, ResourceExhaustedError

from tests.serving import saved_models
from tests.serving.servers import running_server
from tests.serving.test_robustness import address_of

MEBIBYTE = 2**20
WIDTH = 4096
# Of a row: two layers of the width, one read while the other is written.
WIDE_BYTES = 2 * 4 * WIDTH


def wide(x: tf.Tensor) -> dict[str, tf.Tensor]:
    """Takes a hundred times as much memory as its input and output."""
    layer = tf.abs(tf.matmul(x, tf.ones([4, WIDTH])))
    return {"y": tf.reduce_mean(layer * layer[:, :1], 1, keepdims=True)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    table = tf.TensorSpec([None, 4], tf.float32, name="x")
    signatures = {
        "serving_default": (wide, [table]),
        "mixing": (lambda x: {"y": wide(x)["y"] + tf.reduce_mean(x)}, [table]),
        "large": (lambda x: {"y": tf.matmul(x, tf.ones([4, WIDTH]))}, [table]),
        "any_length": (wide_of_any_length, [tf.TensorSpec([None, None], tf.float32, name="x")]),
        "beside": (
            lambda x, shift: {"y": wide(x)["y"] + shift},
            [table, tf.TensorSpec([], tf.float32, name="shift")],
        ),
        "meeting": (lambda x: {"y": tf.reduce_sum(tf.matmul(x, x, transpose_b=True), 1)}, [table]),
        "broadcast": (
            lambda a, b: {"y": a + b[:, None]},
            [tf.TensorSpec([None, 2], tf.float32, name="a"), tf.TensorSpec([None], tf.float32, name="b")],
        ),
        "named": (lambda x: {"name": tf.strings.as_string(wide(x)["y"])}, [table]),
    }
    return saved_models.export(tmp_path_factory.mktemp("wide") / "1", signatures)


def wide_of_any_length(x: tf.Tensor) -> dict[str, tf.Tensor]:
    return {"y": tf.reduce_sum(tf.sin(x[:, :, None] * tf.ones([WIDTH])), [1, 2])}


@pytest.fixture(scope="module")
def bounded(folder: Path) -> Servable:
    """The model, of which a run may take what some 32 rows need."""
    return Servable(folder, LoadOptions(run_memory=32 * WIDE_BYTES))


def rows(count: int) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(count, 4)).astype(np.float32)


def run_sizes(servable: Servable, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Returns a list that will have the number of rows of every run from now on."""
    sizes: list[int] = []
    make = servable._callable

    def counting(*arguments: Any) -> Callable[..., Any]:
        run: Any = make(*arguments)

        def counted(*arrays: np.ndarray) -> Any:
            sizes.append(max(len(array) for array in arrays if array.ndim))
            return run(*arrays)

        return counted

    monkeypatch.setattr(servable, "_callable", counting)
    return sizes


@pytest.mark.parametrize("name", ["serving_default", "named"])
def test_many_rows_run_in_parts_and_answer_as_at_once(
    folder: Path, bounded: Servable, name: str, monkeypatch: pytest.MonkeyPatch
):
    inputs = {"x": rows(101)}
    unbounded = Servable(folder)
    at_once = unbounded.run(unbounded.signature(name), inputs)
    sizes = run_sizes(bounded, monkeypatch)
    in_parts = bounded.run(bounded.signature(name), inputs)
    assert sum(sizes) == 101
    assert 8 < max(sizes) <= 16
    for key, expected in at_once.items():
        # Products of matrices of another size may be rounded otherwise.
        np.testing.assert_allclose(in_parts[key].astype(np.float32), expected.astype(np.float32), rtol=1e-5)


def test_what_fits_runs_at_once(bounded: Servable, monkeypatch: pytest.MonkeyPatch):
    sizes = run_sizes(bounded, monkeypatch)
    bounded.run(bounded.signature(""), {"x": rows(24)})
    assert sizes == [24]


def test_a_group_keeps_within_the_bound_as_well(bounded: Servable, monkeypatch: pytest.MonkeyPatch):
    sizes = run_sizes(bounded, monkeypatch)
    requests = [{"x": rows(count)} for count in (40, 1, 60)]
    answers = run_together(bounded, bounded.signature(""), requests, (), BatchingOptions(max_batch_size=200))
    assert [len(answer["y"]) for answer in answers] == [40, 1, 60]
    assert max(sizes) <= 16


def test_rows_that_depend_on_each_other_are_refused_where_they_are_too_many(bounded: Servable):
    mixing = bounded.signature("mixing")
    assert len(bounded.run(mixing, {"x": rows(20)})["y"]) == 20
    with pytest.raises(ResourceExhaustedError, match=r"400 rows, which cannot be run in parts.*--run_memory_in_mb"):
        bounded.run(mixing, {"x": rows(400)})


def test_rows_that_meet_each_other_take_more_the_more_there_are(bounded: Servable):
    most = int((32 * WIDE_BYTES / 4) ** 0.5)
    signature = bounded.signature("meeting")
    # What each takes of a thousand is enough for a few rows, and far too little for many.
    assert len(bounded.run(signature, {"x": rows(400)})["y"]) == 400
    bounded.run(signature, {"x": rows(most - 20)})
    with pytest.raises(ResourceExhaustedError, match=f"{2 * most} rows, which cannot be run in parts, need 5 MiB"):
        bounded.run(signature, {"x": rows(2 * most)})


@pytest.mark.parametrize(("a", "b"), [((1000,), (1000,)), ((1, 1000), (1, 1000, 1)), ((1000, 2), (1000, 1, 1))])
def test_shapes_that_are_not_the_signatures_and_multiply_are_refused(bounded: Servable, a: Any, b: Any):
    signature = bounded.signature("broadcast")
    fits = bounded.run(signature, {"a": np.ones([100], "float32"), "b": np.ones([50], "float32")})
    assert fits["y"].shape == (50, 100)
    with pytest.raises(ResourceExhaustedError, match=r"cannot be run in parts, need \d+ MiB"):
        bounded.run(signature, {"a": np.ones(a, "float32"), "b": np.ones(b, "float32")})


def test_an_input_beside_the_rows_keeps_them_together(bounded: Servable):
    with pytest.raises(ResourceExhaustedError, match="cannot be run in parts"):
        bounded.run(bounded.signature("beside"), {"x": rows(400), "shift": np.float32(2)})


def test_outputs_that_would_not_fit_are_refused(bounded: Servable):
    with pytest.raises(ResourceExhaustedError, match="400 rows have outputs that need"):
        bounded.run(bounded.signature("large"), {"x": rows(400)})


def test_a_single_row_always_runs(folder: Path):
    tight = Servable(folder, LoadOptions(run_memory=1))
    assert tight.run(tight.signature("mixing"), {"x": rows(1)})["y"].shape == (1, 1)
    assert tight.run(tight.signature("any_length"), {"x": np.ones((1, 2000), np.float32)})["y"].shape == (1,)


def test_sizes_that_a_signature_leaves_open_are_those_of_the_request(
    bounded: Servable, monkeypatch: pytest.MonkeyPatch
):
    sizes = run_sizes(bounded, monkeypatch)
    any_length = bounded.signature("any_length")
    bounded.run(any_length, {"x": np.ones((40, 1), np.float32)})
    assert 8 <= max(sizes) <= 16
    sizes.clear()
    bounded.run(any_length, {"x": np.ones((40, 100), np.float32)})
    assert set(sizes) == {1}


def test_shapes_that_do_not_fit_are_told_as_ever(folder: Path):
    free = Servable(folder)
    tight = Servable(folder, LoadOptions(run_memory=1))
    messages = []
    for servable in (free, tight):
        with pytest.raises(Exception, match="shape") as caught:
            servable.run(servable.signature(""), {"x": np.ones((600, 5), np.float32)})
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_no_further_part_runs_for_nobody(bounded: Servable, monkeypatch: pytest.MonkeyPatch):
    sizes = run_sizes(bounded, monkeypatch)
    with pytest.raises(CancelledError):
        run_one(bounded, bounded.signature(""), {"x": rows(101)}, (), None, unwanted=lambda: len(sizes) == 2)
    assert len(sizes) == 2


def test_the_parts_of_a_run_have_one_time_limit(folder: Path):
    slow = Servable(folder, LoadOptions(timeout_seconds=0.05, run_memory=64 * WIDE_BYTES))
    with pytest.raises(DeadlineExceededError):
        slow.run(slow.signature(""), {"x": rows(50_000)}, limited=True)


def test_what_a_layer_needs_is_reckoned_while_something_needs_it(tmp_path: Path):
    """Of ten layers one after another, two are there at a time; of ten beside each other, all."""

    def chain(x: tf.Tensor) -> dict[str, tf.Tensor]:
        for _ in range(10):
            x = tf.sin(x)
        return {"y": x[:, :1]}

    def fan(x: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"y": tf.concat([tf.sin(x * float(index)) for index in range(10)], 1)[:, :1]}

    table = [tf.TensorSpec([None, 256], tf.float32, name="x")]
    saved_models.export(tmp_path / "1", {"chain": (chain, table), "fan": (fan, table)})
    servable = Servable(tmp_path / "1")
    memory = RunMemory(servable.meta_graph, 10**9)
    need = {name: memory._need(servable.signature(name), {"x": (1024, 256)}) for name in ("chain", "fan")}
    assert need["chain"] is not None
    assert 2 * 1024 <= need["chain"].run < 3 * 1024
    assert need["fan"] is not None
    assert 20 * 1024 <= need["fan"].run < 32 * 1024


def test_loops_and_sizes_that_are_not_known_count(tmp_path: Path):
    def looping(x: tf.Tensor) -> dict[str, tf.Tensor]:
        def step(index: tf.Tensor, state: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            return index + 1, tf.reduce_mean(tf.sin(state[:, :, None] * tf.ones([WIDTH])), 2)

        return {"y": tf.while_loop(lambda i, _: i < 3, step, [0, x])[1]}

    table = [tf.TensorSpec([None, 1], tf.float32, name="x")]
    saved_models.export(tmp_path / "1", {"serving_default": (looping, table)})
    servable = Servable(tmp_path / "1")
    need = RunMemory(servable.meta_graph, 10**9)._need(servable.signature(""), {"x": (1024, 1)})
    assert need is not None
    assert need.run >= WIDE_BYTES


def test_the_limits_of_the_process_count_as_its_memory(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (12345, 12345))
    usable_memory.cache_clear()
    assert usable_memory() == 12345
    monkeypatch.undo()
    usable_memory.cache_clear()


@pytest.mark.slow
def test_a_body_of_a_million_rows_does_not_end_a_process_with_little_memory(folder: Path):
    """At once the rows would need 50 GB."""
    count = 1_200_000
    body = b'{"instances": [' + b",".join([b"[0.1250,0.2500,0.5000,%d]" % (n % 7) for n in range(count)]) + b"]}"
    flags = ("--model_name=m", f"--model_base_path={folder.parent}", "--rest_api_timeout_in_ms=500000")
    with running_server(*flags, "--request_memory_in_mb=4000") as server:
        process = server.process.pid
        mapped = int(Path(f"/proc/{process}/statm").read_text().split()[0]) * resource.getpagesize()
        limit = mapped + 10_000 * MEBIBYTE
        resource.prlimit(process, resource.RLIMIT_AS, (limit, limit))
        connection = http.client.HTTPConnection(*address_of(server), timeout=500)
        connection.request("POST", "/v1/models/m:predict", body)
        response = connection.getresponse()
        text = response.read()
        assert response.status == 200, text[:500]
        answers = json.loads(text)["predictions"]
        assert len(answers) == count
        np.testing.assert_allclose(answers[:700_000], answers[:7] * 100_000, rtol=1e-5)
