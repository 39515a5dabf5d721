"""Runs requests on worker threads and groups those that wait at the same time, with TensorFlow Serving's parameters."""

import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from keras_bn_serving.engine.grouping import BatchingOptions, Outputs, count_rows, run_one, run_together
from keras_bn_serving.engine.machine import usable_cores
from keras_bn_serving.engine.servable import Servable
from keras_bn_serving.engine.signatures import Signature, check_names, check_shapes, check_types
from keras_bn_serving.errors import CancelledError, ServingError, UnavailableError

# Told once how a request has ended: with its outputs or with an error.
Finish = Callable[[Outputs | BaseException], None]

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Task:
    """A request on its way.

    Attributes:
        servable: The model.
        signature: What runs.
        inputs: The arrays by input name.
        output_names: Which outputs are wanted; all where empty.
        finish: Called on a thread of the batcher's once the request has ended.
        limited: Whether it may run no longer than the servable's time limit.
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
    limited: bool = False
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
    only where the signature's graph proves that no row's outputs depend on another row.

    Args:
        options: How to group; `None` never groups.
        num_threads: How many requests run at a time where they are never grouped; None for one a core.
        max_waiting: How many may wait then.
        on_run: Told of every request that ran: its model, its rows, the seconds it waited and ran.
        on_group: Told of every run: its model, and the rows of all its requests.
    """

    def __init__(
        self,
        options: BatchingOptions | None,
        num_threads: int | None = None,
        max_waiting: int = 4096,
        on_run: Callable[[Servable, int, float, float], None] = lambda servable, rows, waited, ran: None,
        on_group: Callable[[Servable, int], None] = lambda servable, rows: None,
    ):
        self._options = options
        self._on_run = on_run
        self._on_group = on_group
        self._max_waiting = max_waiting if options is None else options.max_enqueued_batches * options.max_batch_size
        self._queues: OrderedDict[object, deque[Task]] = OrderedDict()
        self._waiting_rows = 0
        self._ready = threading.Condition()
        self._closing = False
        self._will_start = False
        count = options.num_batch_threads if options is not None else num_threads or usable_cores()
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
        limited: bool = False,
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
            limited: Whether it may run no longer than the servable's time limit.

        Raises:
            InvalidArgumentError: If the inputs do not fit, or are more than a group may have.
            UnavailableError: If too much is waiting already.
        """
        check_names(signature, inputs)
        if self._options is not None and self._options.strict:  # TensorFlow Serving looks at rows before types.
            count_rows(inputs, self._options)
        check_types(signature, inputs)
        check_shapes(signature, inputs)
        task = Task(servable, signature, inputs, tuple(output_names), finish, limited)
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
        key = (id(task.servable), task.signature.name, task.output_names, task.limited)
        if not rows:
            return object()
        if self._options.strict:
            task.rows, task.alone = rows, False
            # Of different ranks nothing is said where arrays are filled up; otherwise they meet, and are refused.
            pad = self._options.pad_variable_length_inputs
            return (*key, tuple(array.ndim for array in arrays)) if pad else key
        if any(array.shape[:1] != (rows,) for array in arrays) or rows > self._options.max_batch_size:
            return object()
        # What is proved is proved of the signature's shapes.
        if not task.signature.rows_stand_alone or task.signature.misfit(task.inputs):
            return object()
        task.rows, task.alone = rows, False
        return (*key, tuple(array.shape[1:] for array in arrays))

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
            if len(running) > 1 and self._options is not None:
                self._run_group(running, self._options)
            else:
                for task in running:
                    self._run_alone(task)
            for task in running:
                self._on_run(task.servable, task.rows, started - task.since, time.monotonic() - started)
            if running:
                self._on_group(running[0].servable, sum(task.rows for task in running))

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
        if sum(task.rows for task in queue) >= self._options.run_size:
            return 0.0
        return queue[0].since + self._options.batch_timeout_seconds - time.monotonic()

    def _take(self, key: object, queue: deque[Task]) -> list[Task]:
        group = [queue.popleft()]
        rows = group[0].rows
        limit = self._options.run_size if self._options is not None else 0
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

    def _run_alone(self, task: Task) -> None:
        try:
            outputs = run_one(
                task.servable,
                task.signature,
                task.inputs,
                task.output_names,
                self._options,
                task.limited,
                lambda: task.unwanted,
            )
        except BaseException as error:
            _finish(task, error)
        else:
            _finish(task, outputs)

    def _run_group(self, tasks: list[Task], options: BatchingOptions) -> None:
        first = tasks[0]
        try:
            requests = [task.inputs for task in tasks]
            results = run_together(
                first.servable, first.signature, requests, first.output_names, options, first.limited
            )
        except ServingError as error:
            if options.strict:
                # TensorFlow Serving has one outcome for a group. What is asked together in production fails together.
                for task in tasks:
                    _finish(task, error)
                return
            # One request of the group may be at fault; alone, each gets the answer that is its own.
            for task in tasks:
                self._run_alone(task)
        except BaseException as error:
            for task in tasks:
                _finish(task, error)
        else:
            for task, outputs in zip(tasks, results, strict=True):
                _finish(task, outputs)


def _finish(task: Task, outcome: Outputs | BaseException) -> None:
    try:
        task.finish(outcome)
    except Exception:
        # The thread and the other requests of the group must go on.
        _log.exception("the end of a request could not be told")
