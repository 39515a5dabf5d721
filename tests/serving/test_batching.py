"""Grouping requests: the answers stay what they are alone, and TensorFlow Serving's parameters hold."""

import functools
import json
import re
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from keras_bn_serving.config.settings import read_batching
from keras_bn_serving.engine.arrivals import settle
from keras_bn_serving.engine.batching import Batcher
from keras_bn_serving.engine.grouping import BatchingOptions, count_rows
from keras_bn_serving.engine.loading import Loader
from keras_bn_serving.engine.servable import Servable
from keras_bn_serving.engine.signatures import Signature
from keras_bn_serving.errors import Code, FailedPreconditionError, InvalidArgumentError, ServingError, UnavailableError
from tensorflow_serving.apis import prediction_log_pb2

from tests.serving import saved_models

PATIENT = BatchingOptions(max_batch_size=2, batch_timeout_seconds=60.0)
RECORDED_BATCHING = {
    record["id"]: json.loads(record["answer"]["body"])
    for record in map(json.loads, (Path(__file__).parent / "recorded" / "rest_batching.jsonl").read_text().splitlines())
}
ANY = tf.TensorSpec([None], tf.float32, name="x")
TABLE = tf.TensorSpec([None, None], tf.float32, name="x")


@pytest.fixture(scope="module")
def servable(tmp_path_factory: pytest.TempPathFactory) -> Servable:
    """Signatures whose rows stand alone, and one whose rows depend on each other."""

    def picky(x: tf.Tensor) -> dict[str, tf.Tensor]:
        with tf.control_dependencies([tf.debugging.assert_greater(x, 0.0, message="x must be positive")]):
            return {"y": tf.sqrt(x)}

    path = saved_models.export(
        tmp_path_factory.mktemp("batching") / "1",
        {
            "serving_default": (lambda x: {"y": x * 2.0, "size": tf.fill(tf.shape(x), tf.size(x))}, [ANY]),
            "double": (lambda x: {"y": x * 2.0}, [ANY]),
            "share": (lambda x: {"y": x / tf.reduce_sum(x)}, [ANY]),
            "picky": (picky, [ANY]),
            "rows": (lambda x: {"y": tf.reduce_sum(x, 1)}, [TABLE]),
        },
    )
    return Servable(path)


@pytest.fixture
def make_batcher() -> Any:
    """Makes batchers and closes them."""
    made: list[Batcher] = []

    def make(options: BatchingOptions | None) -> Batcher:
        made.append(Batcher(options))
        return made[-1]

    yield make
    for batcher in made:
        batcher.close(60)


def run_all(batcher: Batcher, servable: Servable, name: str, arrays: list[Any]) -> list["Future[Any]"]:
    return [ask(batcher, servable, name, {"x": np.array(array, np.float32)}) for array in arrays]


def ask(batcher: Batcher, servable: Servable, name: str, inputs: dict[str, Any], **more: Any) -> "Future[Any]":
    future: Future[Any] = Future()
    # A future takes one outcome: a second one would be logged, and the request of another go without its own.
    batcher.submit(servable, servable.signature(name), inputs, functools.partial(settle, future), **more)
    return future


Make = Callable[[BatchingOptions | None], Batcher]


def strict(**options: Any) -> BatchingOptions:
    return BatchingOptions(**{"max_batch_size": 8, "batch_timeout_seconds": 60.0, "strict": True, **options})


def test_a_full_group_runs_at_once_and_each_request_gets_its_own_rows(servable: Servable, make_batcher: Make):
    futures = run_all(make_batcher(strict()), servable, "", [[1], [2, 3], [4, 5, 6, 7, 8]])
    outputs = [future.result(60) for future in futures]
    assert [each["y"].tolist() for each in outputs] == [[2], [4, 6], [8, 10, 12, 14, 16]]
    assert [each["size"].tolist() for each in outputs] == [[8], [8, 8], [8] * 5]


def test_a_group_that_is_not_full_runs_after_the_timeout(servable: Servable, make_batcher: Make):
    futures = run_all(make_batcher(strict(batch_timeout_seconds=0.05)), servable, "", [[1], [2]])
    assert [future.result(60)["size"].tolist() for future in futures] == [[2], [2]]


def test_groups_are_filled_up_to_an_allowed_size(servable: Servable, make_batcher: Make):
    options = strict(batch_timeout_seconds=0.05, allowed_batch_sizes=(4, 8))
    (future,) = run_all(make_batcher(options), servable, "", [[1, 2, 3]])
    assert future.result(60)["y"].tolist() == [2, 4, 6]
    assert future.result(60)["size"].tolist() == [4, 4, 4]


def test_a_request_larger_than_a_run_may_be_runs_in_parts(servable: Servable, make_batcher: Make):
    options = strict(batch_timeout_seconds=0.0, max_execution_batch_size=3, allowed_batch_sizes=(2, 3))
    (future,) = run_all(make_batcher(options), servable, "", [[1, 2, 3, 4, 5, 6, 7]])
    assert future.result(60)["y"].tolist() == [2, 4, 6, 8, 10, 12, 14]
    # The last part is filled up to the next allowed size.
    assert future.result(60)["size"].tolist() == [3, 3, 3, 3, 3, 3, 2]
    with pytest.raises(InvalidArgumentError, match="Task size 9 is larger than maximum input batch size 8"):
        run_all(make_batcher(options), servable, "", [[1] * 9])


def test_requests_of_different_lengths_are_filled_up_with_their_first_value_where_that_is_asked_for(
    servable: Servable, make_batcher: Make
):
    batcher = make_batcher(strict(max_batch_size=3, pad_variable_length_inputs=True))
    futures = run_all(batcher, servable, "rows", [[[1, 2, 3]], [[4], [5]]])
    # The first value of the array, not of the row.
    assert [future.result(60)["y"].tolist() for future in futures] == [[6], [12, 13]]


def test_an_empty_array_cannot_be_filled_up(servable: Servable, make_batcher: Make):
    batcher = make_batcher(strict(max_batch_size=2, pad_variable_length_inputs=True))
    for future in run_all(batcher, servable, "rows", [[[1, 2, 3]], [[]]]):
        with pytest.raises(InvalidArgumentError, match="Got empty tensor in batch of non-empty tensors"):
            future.result(60)


def test_requests_of_different_lengths_fail_together_where_they_are_not_filled_up(
    servable: Servable, make_batcher: Make
):
    futures = run_all(make_batcher(strict(max_batch_size=2)), servable, "rows", [[[1, 2, 3]], [[4]]])
    for future in futures:
        with pytest.raises(FailedPreconditionError) as caught:
            future.result(60)
        assert caught.value.message == RECORDED_BATCHING[133]["error"].replace("serving_default_x", "rows_x")


def test_a_request_larger_than_a_group_is_refused_with_tensorflow_servings_words(
    servable: Servable, make_batcher: Make
):
    with pytest.raises(InvalidArgumentError, match="Task size 9 is larger than maximum input batch size 8"):
        run_all(make_batcher(strict()), servable, "", [list(range(9))])


def test_requests_that_came_in_one_go_are_one_group_though_a_thread_is_free(servable: Servable, make_batcher: Make):
    batcher = make_batcher(strict(batch_timeout_seconds=0.0))
    later: list[Callable[[], None]] = []
    ones = {"x": np.ones(1, np.float32)}
    futures = [ask(batcher, servable, "", ones, start=later.append) for _ in range(5)]
    assert not any(future.done() for future in futures)
    (start,) = later
    start()
    assert [future.result(60)["size"].tolist() for future in futures] == [[5]] * 5


def test_a_full_queue_turns_requests_away(servable: Servable, make_batcher: Make):
    batcher = make_batcher(strict(max_batch_size=4, max_enqueued_batches=1))
    run_all(batcher, servable, "", [[1, 2, 3]])
    with pytest.raises(UnavailableError, match="queue to which this task was submitted is full"):
        run_all(batcher, servable, "double", [[1, 2]])


def test_one_bad_request_of_a_group_fails_alone(servable: Servable, make_batcher: Make):
    waiting = BatchingOptions(max_batch_size=3, batch_timeout_seconds=60.0)
    futures = run_all(make_batcher(waiting), servable, "picky", [[4], [-1], [9]])
    assert futures[0].result(60)["y"].tolist() == [2]
    assert futures[2].result(60)["y"].tolist() == [3]
    with pytest.raises(ServingError, match="x must be positive") as caught:
        futures[1].result(60)
    assert caught.value.code is Code.INVALID_ARGUMENT


def test_one_bad_request_of_a_group_fails_all_of_it_where_batching_is_tensorflow_servings(
    servable: Servable, make_batcher: Make
):
    for future in run_all(make_batcher(strict(max_batch_size=3)), servable, "picky", [[4], [-1], [9]]):
        with pytest.raises(ServingError, match="x must be positive") as caught:
            future.result(60)
        assert caught.value.code is Code.INVALID_ARGUMENT


def spied(servable: Servable, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Returns the number of rows of every run from now on."""
    runs: list[int] = []
    run = servable.run

    def counted(signature: Signature, inputs: Any, *more: Any) -> Any:
        runs.append(len(inputs["x"]))
        return run(signature, inputs, *more)

    monkeypatch.setattr(servable, "run", counted)
    return runs


def test_by_default_what_waits_is_grouped_where_rows_are_proved_to_stand_alone(
    servable: Servable, make_batcher: Make, monkeypatch: pytest.MonkeyPatch
):
    runs = spied(servable, monkeypatch)
    futures = run_all(make_batcher(PATIENT), servable, "double", [[1], [2]])
    assert [future.result(60)["y"].tolist() for future in futures] == [[2], [4]]
    assert runs == [2]


def test_by_default_rows_that_depend_on_each_other_are_never_grouped(
    servable: Servable, make_batcher: Make, monkeypatch: pytest.MonkeyPatch
):
    runs = spied(servable, monkeypatch)
    futures = run_all(make_batcher(PATIENT), servable, "share", [[1], [1], [3]])
    assert [future.result(60)["y"].tolist() for future in futures] == [[1], [1], [1]]
    assert runs == [1, 1, 1]


def test_by_default_other_shapes_than_the_signatures_are_never_grouped(
    servable: Servable, make_batcher: Make, monkeypatch: pytest.MonkeyPatch
):
    runs = spied(servable, monkeypatch)
    futures = run_all(make_batcher(PATIENT), servable, "double", [[[1]], [[2]]])
    assert [future.result(60)["y"].tolist() for future in futures] == [[[2]], [[4]]]
    assert runs == [1, 1]


@pytest.mark.parametrize(("inputs", "words"), [
    ({}, "Batching Run() must have at least one input tensor"),
    ({"a": 1.0}, "Batching Run() input tensors must have at least one dimension"),
    ({"a": [1.0], "b": [1.0, 2.0], "c": 1.0}, "Batching Run() input tensors must have equal 0th-dimension size"),
    ({"a": [1.0], "b": 1.0, "c": [1.0, 2.0]}, "Batching Run() input tensors must have at least one dimension"),
    ({"a": [1.0] * 9}, "Task size 9 is larger than maximum input batch size 8"),
])  # fmt: skip
def test_what_is_no_batch_is_refused_in_tensorflow_servings_words_and_order(inputs: dict[str, Any], words: str):
    with pytest.raises(InvalidArgumentError) as caught:
        count_rows({name: np.array(value) for name, value in inputs.items()}, strict())
    assert caught.value.message == words


def test_with_batching_rows_are_looked_at_before_types(servable: Servable, make_batcher: Make):
    with pytest.raises(InvalidArgumentError, match="must have at least one dimension"):
        ask(make_batcher(strict()), servable, "", {"x": np.array(1, np.int16)})
    with pytest.raises(InvalidArgumentError, match="to be float but int16 is provided"):
        ask(make_batcher(strict()), servable, "", {"x": np.array([1], np.int16)})


def test_without_grouping_every_request_runs_alone(servable: Servable, make_batcher: Make):
    futures = run_all(make_batcher(None), servable, "", [[1], [2], [3]])
    assert [future.result(60)["size"].tolist() for future in futures] == [[1], [1], [1]]


@pytest.mark.parametrize(("body", "words"), [
    (lambda x: {"y": tf.reduce_sum(x)}, "Batched output tensor has 0 dimensions"),
    (lambda x: {"y": tf.concat([x, x], 0)}, "Batched output tensor's 0th dimension does not equal the sum of the 0th "
     "dimension sizes of the input tensors"),
])  # fmt: skip
def test_with_batching_a_warm_up_request_of_a_signature_that_is_none_of_batches_fails_the_load(
    tmp_path: Path, body: Callable[[Any], Any], words: str
):
    path = saved_models.export(tmp_path / "1", {"serving_default": (body, [ANY])})
    log = prediction_log_pb2.PredictionLog()
    log.predict_log.request.inputs["x"].CopyFrom(tf.make_tensor_proto([1.0, 2.0]))
    (path / "assets.extra").mkdir()
    with tf.io.TFRecordWriter(str(path / "assets.extra" / "tf_serving_warmup_requests")) as file:
        file.write(log.SerializeToString())
    Loader()("m", 1, str(path)).close()
    with pytest.raises(ServingError, match=re.escape(words)) as caught:
        Loader(batching=strict())("m", 1, str(path))
    assert caught.value.code is Code.FAILED_PRECONDITION


def test_many_threads_get_their_own_answers(servable: Servable, make_batcher: Make):
    batcher = make_batcher(BatchingOptions())
    wrong: list[float] = []

    def count(start: int) -> None:
        for number in range(start, start + 200):
            (future,) = run_all(batcher, servable, "double", [[number]])
            if future.result(60)["y"].tolist() != [2.0 * number]:
                wrong.append(number)

    threads = [threading.Thread(target=count, args=[1000 * index]) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_what_nobody_waits_for_any_longer_does_not_run(servable: Servable, make_batcher: Make):
    batcher = make_batcher(strict())
    ends: list[Any] = []
    one = {"x": np.ones(1, np.float32)}
    batcher.submit(servable, servable.signature(""), one, ends.append).cancel()
    rest = ask(batcher, servable, "", {"x": np.ones(7, np.float32)})
    assert rest.result(60)["size"].tolist() == [7] * 7
    (end,) = ends
    assert isinstance(end, ServingError)
    assert end.code is Code.CANCELLED


def test_an_end_that_cannot_be_told_keeps_no_other_request_from_its_answer(
    servable: Servable, make_batcher: Make, caplog: pytest.LogCaptureFixture
):
    def fail(outcome: Any) -> None:
        raise RuntimeError("the connection object is gone")

    batcher = make_batcher(strict(max_batch_size=2))
    one = {"x": np.ones(1, np.float32)}
    for _ in range(3):
        batcher.submit(servable, servable.signature(""), one, fail)
        assert ask(batcher, servable, "", one).result(60)["size"].tolist() == [2]
    assert "the connection object is gone" in caplog.text


def test_a_parameters_file_is_read_and_its_mistakes_are_named(tmp_path: Path):
    path = tmp_path / "batching.config"
    path.write_text("max_batch_size { value: 16 } batch_timeout_micros { value: 500 } allowed_batch_sizes: [4, 16]")
    options = read_batching(str(path))
    assert (options.max_batch_size, options.batch_timeout_seconds, options.allowed_batch_sizes) == (16, 5e-4, (4, 16))
    assert options.strict
    path.write_text("max_batch_size { value: 0 }")
    with pytest.raises(InvalidArgumentError, match=r"`max_batch_size` must be at least 1\. Received: 0"):
        read_batching(str(path))
    path.write_text("max_batch_size { value: 8 } allowed_batch_sizes: [4, 16]")
    with pytest.raises(InvalidArgumentError, match=r"end with max_batch_size \(8\). Received: \[4, 16\]"):
        read_batching(str(path))
    split = "max_batch_size { value: 8 } enable_large_batch_splitting { value: true } "
    path.write_text(split + "max_execution_batch_size { value: 4 } allowed_batch_sizes: [2, 4]")
    options = read_batching(str(path))
    assert (options.max_batch_size, options.run_size, options.allowed_batch_sizes) == (8, 4, (2, 4))
    path.write_text(split + "max_execution_batch_size { value: 9 }")
    with pytest.raises(InvalidArgumentError, match=r"from 1 to max_batch_size \(8\)\. Received: 9"):
        read_batching(str(path))
    path.write_text(split + "max_execution_batch_size { value: 4 } allowed_batch_sizes: [2, 8]")
    with pytest.raises(InvalidArgumentError, match=r"end with max_execution_batch_size \(4\)"):
        read_batching(str(path))
    path.write_text("max_batch_sice { value: 8 }")
    with pytest.raises(InvalidArgumentError, match="max_batch_sice"):
        read_batching(str(path))
