"""TensorFlow Serving's metrics, by its names, in Prometheus's text format."""

from collections.abc import Iterable
from typing import Any

import prometheus_client
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    ProcessCollector,
    generate_latest,
)

from keras_bn_serving.errors import Code

CONTENT_TYPE = "text/plain"
_PREFIX = ":tensorflow:serving:"
_MICROSECONDS = 1e6
# Every name that is asked for makes a series of its own; strangers' names may not fill the memory.
_MOST_SERIES = 10_000
# 33 buckets of microseconds: from 10 on, each 1.8 times the one before.
_MICROSECONDS_BUCKETS = [10 * 1.8**power for power in range(33)]
_ROWS_BUCKETS = [2**power for power in range(15)]

# The library would add a second series of creation times to every counter and histogram.
prometheus_client.disable_created_metrics()


class Metrics:
    """Counts and times of everything served."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self._known: dict[tuple[Any, ...], Any] = {}
        ProcessCollector(registry=registry)
        GCCollector(registry=registry)

        def microseconds(name: str, help: str, labels: list[str]) -> Histogram:
            return Histogram(_PREFIX + name, help, labels, registry=registry, buckets=_MICROSECONDS_BUCKETS)

        def rows(name: str, help: str, labels: list[str]) -> Histogram:
            return Histogram(_PREFIX + name, help, labels, registry=registry, buckets=_ROWS_BUCKETS)

        self._requests = Counter(
            _PREFIX + "request_count", "Requests by outcome.", ["model_name", "status"], registry=registry
        )
        self._latency = microseconds(
            "request_latency", "Microseconds from a whole request to its answer.", ["model_name", "API", "entrypoint"]
        )
        self._runtime = microseconds("runtime_latency", "Microseconds in TensorFlow.", ["model_name", "API", "runtime"])
        self._examples = rows("request_example_counts", "Rows a request.", ["model"])
        self._batches = rows("batching_session:processed_batch_size", "Rows a run.", ["name"])
        self._warm_up = microseconds(
            "model_warmup_latency", "Microseconds of a version's warm-up.", ["model_name", "status"]
        )
        self._queuing = microseconds("batching_session:queuing_latency", "Microseconds before a group runs.", ["name"])
        self._failures = Counter(
            "keras_bn_serving_background_failures", "Turns that failed.", ["thread"], registry=registry
        )
        self._states = Gauge(
            "keras_bn_serving_model_state",
            "10 start, 20 loading, 30 available, 40 unloading, 50 end.",
            ["model_name", "version"],
            registry=registry,
        )
        self._held = Gauge(
            "keras_bn_serving_request_memory_bytes", "Memory that requests hold, as estimated.", registry=registry
        )
        self._waiting = Gauge(_PREFIX + "batching_session:waiting_rows", "Rows that wait to be run.", registry=registry)

    def request(self, model_name: str, api: str, entrypoint: str, status: str, seconds: float) -> None:
        """Counts a request that has been answered; times it where that went well."""
        self._of(self._requests, model_name, status).inc()
        if status == Code.OK.name:
            self._of(self._latency, model_name, api, entrypoint).observe(seconds * _MICROSECONDS)

    def ran(self, name: str, rows: int, waited_seconds: float, seconds: float) -> None:
        """Counts the run of one request: `name` is the model's."""
        self._of(self._runtime, name, "Predict", "TF1").observe(seconds * _MICROSECONDS)
        self._of(self._examples, name).observe(rows)
        self._of(self._queuing, name).observe(waited_seconds * _MICROSECONDS)

    def ran_together(self, name: str, rows: int) -> None:
        """Counts a run of a model, of one request or of several."""
        self._of(self._batches, name).observe(rows)

    def warmed_up(self, model_name: str, status: str, seconds: float) -> None:
        """Counts a version's warm-up."""
        self._warm_up.labels(model_name, status).observe(seconds * _MICROSECONDS)

    def background_failure(self, thread: str) -> None:
        """Counts a turn of a background thread that has failed."""
        self._failures.labels(thread).inc()

    def text(self, waiting_rows: int, held_bytes: int, states: Iterable[tuple[str, int, int]]) -> bytes:
        """Returns everything in Prometheus's text format.

        Args:
            waiting_rows: Rows that wait to be run.
            held_bytes: Memory that requests hold.
            states: Name, version and state of every version that is or was.
        """
        self._waiting.set(waiting_rows)
        self._held.set(held_bytes)
        self._states.clear()
        for name, version, state in states:
            self._states.labels(name, version).set(state)
        # TensorFlow Serving's counters go without the suffix that the library gives them.
        return generate_latest(self._registry).replace(b"request_count_total", b"request_count")

    def _of(self, family: Any, name: str, *labels: str) -> Any:
        # The library's own look-up takes a lock and makes strings of strings.
        key = (family, name, labels)
        if key not in self._known:
            if len(self._known) >= _MOST_SERIES:
                return family.labels("", *labels)
            self._known[key] = family.labels(name, *labels)
        return self._known[key]
