"""Runs requests on worker threads and groups those that wait at the same time, with TensorFlow Serving's parameters."""

import itertools
import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from keras_bn_serving.engine.servable import Servable, Signature, check_inputs
from keras_bn_serving.errors import CancelledError, InvalidArgumentError, ServingError, UnavailableError

Outputs = dict[str, np.ndarray]
# Told once how a request has ended: with its outputs or with an error.
Finish = Callable[[Outputs | BaseException], None]

_log = logging.getLogger(__name__)
# Grouped and alone, an answer may differ in the last digits, as TensorFlow's kernels add up in another order.
_RELATIVE, _ABSOLUTE = 1e-3, 1e-4


@dataclass(frozen=True)
class BatchingOptions:
    """How requests are grouped.

    Attributes:
        max_batch_size: How many rows a group may have; a larger request runs alone, or is refused if `strict`.
        batch_timeout_seconds: How long a request may wait for others to join it.
        max_enqueued_batches: How many full groups may wait; what comes then is turned away.
        num_batch_threads: How many groups run at a time.
        allowed_batch_sizes: Where set, groups are filled up to the next of these sizes.
        pad_variable_length_inputs: Whether requests of different lengths are filled up with zeros to be grouped.
        strict: Whether to do as TensorFlow Serving does with batching on: trust every signature to be a batch one, and
            refuse a request larger than `max_batch_size`.
    """

    max_batch_size: int = 64
    batch_timeout_seconds: float = 0.0
    max_enqueued_batches: int = 64
    num_batch_threads: int = 2
    allowed_batch_sizes: tuple[int, ...] = ()
    pad_variable_length_inputs: bool = False
    strict: bool = False


@dataclass(slots=True)
class Task:
    """A request on its way.

    Attributes:
        servable: The model.
        signature: What runs.
        inputs: The arrays by input name.
        output_names: Which outputs are wanted; all where empty.
        finish: Called on a thread of the batcher's once the request has ended.
        rows: How many rows it has, 1 where it is no batch.
        alone: Whether it may not be grouped.
        unwanted: Whether nobody waits for the outputs any longer.
        since: When it came.
    """

    servable: Servable
    signature: Signature
    inputs: Mapping[str, np.ndarray]
    output_names: tuple[str, ...]
    finish: Finish
    rows: int = 1
    alone: bool = True
    unwanted: bool = False
    since: float = field(default_factory=time.monotonic)

    def cancel(self) -> None:
        """Says that nobody waits for the outputs any longer: what has not begun does not run."""
        self.unwanted = True


class Batcher:
    """Worker threads and the queue before them.

    Without `strict`, a request runs at once when a thread is free; only what arrives while all are busy is grouped, and
    only after a first group of that signature has given the same answers as its requests one by one.

    Args:
        options: How to group; `None` never groups.
        num_threads: How many requests run at a time where they are never grouped.
        max_waiting: How many may wait then.
        on_run: Told of every request that ran: its model, its rows, the seconds it waited and ran.
    """

    def __init__(
        self,
        options: BatchingOptions | None,
        num_threads: int = 2,
        max_waiting: int = 4096,
        on_run: Callable[[Servable, int, float, float], None] = lambda servable, rows, waited, ran: None,
    ):
        self._options = options
        self._on_run = on_run
        self._max_waiting = max_waiting if options is None else options.max_enqueued_batches * options.max_batch_size
        self._queues: OrderedDict[object, deque[Task]] = OrderedDict()
        self._waiting_rows = 0
        self._ready = threading.Condition()
        self._closing = False
        self._will_start = False
        count = num_threads if options is None else options.num_batch_threads
        self._threads = [threading.Thread(target=self._work, name=f"run-{n}", daemon=True) for n in range(count)]
        for thread in self._threads:
            thread.start()

    def submit(
        self,
        servable: Servable,
        signature: Signature,
        inputs: Mapping[str, np.ndarray],
        finish: Finish,
        output_names: Iterable[str] = (),
        start: Callable[[Callable[[], None]], object] | None = None,
    ) -> Task:
        """Runs a signature in the background.

        Args:
            servable: The model.
            signature: One of its signatures.
            inputs: The arrays by input name.
            finish: Told once how the request has ended, on another thread; never where this raises.
            output_names: Which outputs are wanted; all where empty.
            start: Calls what it is given a little later, and only then a free thread looks at the request: an event
                loop's `call_soon` lets those that arrive in one go be grouped.

        Raises:
            InvalidArgumentError: If the inputs do not fit, or are more than a group may have.
            UnavailableError: If too much is waiting already.
        """
        check_inputs(signature, inputs)
        task = Task(servable, signature, inputs, tuple(output_names), finish)
        key = self._key(task)
        with self._ready:
            if self._closing:
                raise CancelledError("The server is stopping.")
            if self._waiting_rows + task.rows > self._max_waiting and self._waiting_rows:
                raise UnavailableError("The batch scheduling queue to which this task was submitted is full")
            self._waiting_rows += task.rows
            self._queues.setdefault(key, deque()).append(task)
            if start is None:
                self._ready.notify()
            elif not self._will_start:
                self._will_start = True
                start(self._start)
        return task

    def waiting(self) -> int:
        """Returns how many rows wait to be run."""
        return self._waiting_rows

    def close(self, seconds: float) -> None:
        """Finishes what waits and ends the threads; gives up on what takes longer than `seconds`."""
        deadline = time.monotonic() + seconds
        with self._ready:
            self._closing = True
            self._ready.notify_all()
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _start(self) -> None:
        with self._ready:
            self._will_start = False
            self._ready.notify(len(self._queues))

    def _key(self, task: Task) -> object:
        """Returns what requests must share to be grouped, and sets the task's rows; a fresh object for one alone."""
        if self._options is None:
            return object()
        arrays = [task.inputs[name] for name in task.signature.inputs]
        rows = arrays[0].shape[0] if arrays and arrays[0].ndim else 0
        if not rows or not task.signature.takes_batches or any(array.shape[:1] != (rows,) for array in arrays):
            return object()
        task.rows = rows
        if task.rows > self._options.max_batch_size:
            if self._options.strict:
                raise InvalidArgumentError(
                    f"Task size {task.rows} is larger than maximum input batch size {self._options.max_batch_size}"
                )
            return object()
        if not self._options.strict and task.signature.name in task.servable.never_group:
            return object()
        pad = self._options.pad_variable_length_inputs
        task.alone = False
        shapes = tuple(array.ndim if pad else array.shape[1:] for array in arrays)
        return (id(task.servable), task.signature.name, task.output_names, shapes)

    def _work(self) -> None:
        while True:
            group = self._next_group()
            if group is None:
                return
            running = []
            for task in group:
                if task.unwanted:
                    _finish(task, CancelledError("Nobody waits for the answer any longer."))
                else:
                    running.append(task)
            started = time.monotonic()
            if len(running) == 1:
                self._run_alone(running[0])
            elif running:
                self._run_group(running)
            for task in running:
                self._on_run(task.servable, task.rows, started - task.since, time.monotonic() - started)

    def _next_group(self) -> list[Task] | None:
        with self._ready:
            while True:
                wait: float | None = None
                for key, queue in self._queues.items():
                    left = self._time_left(queue)
                    if left <= 0:
                        return self._take(key, queue)
                    wait = left if wait is None else min(wait, left)
                if self._closing and not self._queues:
                    return None
                self._ready.wait(wait)

    def _time_left(self, queue: deque[Task]) -> float:
        if self._options is None or not self._options.batch_timeout_seconds or self._closing or queue[0].alone:
            return 0.0
        if sum(task.rows for task in queue) >= self._options.max_batch_size:
            return 0.0
        return queue[0].since + self._options.batch_timeout_seconds - time.monotonic()

    def _take(self, key: object, queue: deque[Task]) -> list[Task]:
        group = [queue.popleft()]
        rows = group[0].rows
        limit = self._options.max_batch_size if self._options is not None else 0
        while queue and rows + queue[0].rows <= limit:
            group.append(queue.popleft())
            rows += group[-1].rows
        self._waiting_rows -= rows
        if queue:
            # Other signatures and models get their turn before the rest of this queue.
            self._queues.move_to_end(key)
            self._ready.notify()
        else:
            del self._queues[key]
        return group

    def _run_alone(self, task: Task) -> bool:
        try:
            sizes = self._options.allowed_batch_sizes if self._options is not None else ()
            if sizes and task.signature.takes_batches:
                (outputs,) = self._run_together([task])
            else:
                outputs = task.servable.run(task.signature, task.inputs, task.output_names)
        except BaseException as error:
            _finish(task, error)
            return False
        _finish(task, outputs)
        return True

    def _run_group(self, tasks: list[Task]) -> None:
        servable, name = tasks[0].servable, tasks[0].signature.name
        proved = name in servable.may_group or (self._options is not None and self._options.strict)
        try:
            results = self._run_together(tasks)
            agrees = proved or self._agrees_alone(tasks, results)
        except ServingError:
            # One request of the group may be at fault; alone, each gets the answer that is its own.
            agrees = False
        except BaseException as error:
            for task in tasks:
                _finish(task, error)
            return
        if agrees:
            servable.may_group.add(name)
            for task, outputs in zip(tasks, results, strict=True):
                _finish(task, outputs)
        elif sum(map(self._run_alone, tasks)) == len(tasks) and not proved:
            _log.info("signature %s of %s is not grouped", name, servable.path)
            servable.never_group.add(name)

    def _run_together(self, tasks: list[Task]) -> list[Outputs]:
        first = tasks[0]
        rows = sum(task.rows for task in tasks)
        sizes = self._options.allowed_batch_sizes if self._options is not None else ()
        padding = next((size for size in sizes if size >= rows), rows) - rows
        inputs = {name: _joined([task.inputs[name] for task in tasks], padding) for name in first.inputs}
        outputs = first.servable.run(first.signature, inputs, first.output_names)
        for name, array in outputs.items():
            if not array.ndim or len(array) != rows + padding:
                raise InvalidArgumentError(
                    f"Batched output tensor {name} does not have {rows + padding} rows. Received: shape "
                    f"{list(array.shape)}."
                )
        starts = np.cumsum([0, *(task.rows for task in tasks)]).tolist()
        return [
            {name: array[start:end] for name, array in outputs.items()} for start, end in itertools.pairwise(starts)
        ]

    def _agrees_alone(self, tasks: list[Task], results: list[Outputs]) -> bool:
        for task, together in zip(tasks, results, strict=True):
            alone = task.servable.run(task.signature, task.inputs, task.output_names)
            if not all(_close(alone[name], together[name]) for name in alone):
                return False
        return True


def _finish(task: Task, outcome: Outputs | BaseException) -> None:
    try:
        task.finish(outcome)
    except Exception:
        # The thread and the other requests of the group must go on.
        _log.exception("the end of a request could not be told")


def _joined(arrays: list[np.ndarray], padding: int) -> np.ndarray:
    longest = np.max([array.shape[1:] for array in arrays], axis=0) if arrays[0].ndim > 1 else ()
    if any(array.shape[1:] != tuple(longest) for array in arrays):
        arrays = [
            np.pad(array, [(0, 0), *((0, int(to - size)) for to, size in zip(longest, array.shape[1:], strict=True))])
            for array in arrays
        ]
    if padding:
        arrays = [*arrays, np.repeat(arrays[0][:1], padding, axis=0)]
    return np.concatenate(arrays)


def _close(alone: np.ndarray, together: np.ndarray) -> bool:
    if alone.shape != together.shape:
        return False
    if alone.dtype.kind in "fc":
        return bool(np.allclose(alone, together, _RELATIVE, _ABSOLUTE, equal_nan=True))
    return bool(np.array_equal(alone, together))
