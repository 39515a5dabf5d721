"""TensorFlow Serving's metrics, by its names, in Prometheus's text format."""

from typing import Any

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = "text/plain"
_PREFIX = ":tensorflow:serving:"
_MICROSECONDS = 1e6
# 33 buckets of microseconds: from 10 on, each 1.8 times the one before.
_BUCKETS = [10 * 1.8**power for power in range(33)]

# The library would add a second series of creation times to every counter and histogram.
prometheus_client.disable_created_metrics()


class Metrics:
    """Counts and times of everything served."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._known: dict[tuple[object, tuple[str, ...]], Any] = {}

        def histogram(name: str, help: str, labels: list[str]) -> Histogram:
            return Histogram(_PREFIX + name, help, labels, registry=self._registry, buckets=_BUCKETS)

        self._requests = Counter(
            _PREFIX + "request_count", "Requests by outcome.", ["model_name", "status"], registry=self._registry
        )
        self._latency = histogram(
            "request_latency", "Microseconds from a whole request to its answer.", ["model_name", "API", "entrypoint"]
        )
        self._runtime = histogram("runtime_latency", "Microseconds in TensorFlow.", ["model_name", "API", "runtime"])
        self._examples = histogram("request_example_counts", "Rows a request.", ["model"])
        self._warm_up = histogram(
            "model_warmup_latency", "Microseconds of a version's warm-up.", ["model_name", "status"]
        )
        self._queuing = histogram("batching_session:queuing_latency", "Microseconds before a group runs.", ["name"])
        self._waiting = Gauge(
            _PREFIX + "batching_session:waiting_rows", "Rows that wait to be run.", registry=self._registry
        )

    def request(self, model_name: str, api: str, entrypoint: str, status: str, seconds: float) -> None:
        """Counts a request that has been answered."""
        self._series(self._requests, model_name, status).inc()
        self._series(self._latency, model_name, api, entrypoint).observe(seconds * _MICROSECONDS)

    def ran(self, name: str, rows: int, waited_seconds: float, seconds: float) -> None:
        """Counts a run of a model: `name` is the model's, `rows` those of one request."""
        self._series(self._runtime, name, "Predict", "TF1").observe(seconds * _MICROSECONDS)
        self._series(self._examples, name).observe(rows)
        self._series(self._queuing, name).observe(waited_seconds * _MICROSECONDS)

    def warmed_up(self, model_name: str, status: str, seconds: float) -> None:
        """Counts a version's warm-up."""
        self._warm_up.labels(model_name, status).observe(seconds * _MICROSECONDS)

    def text(self, waiting_rows: int) -> bytes:
        """Returns everything in Prometheus's text format."""
        self._waiting.set(waiting_rows)
        # TensorFlow Serving's counters go without the suffix that the library gives them.
        return generate_latest(self._registry).replace(b"request_count_total", b"request_count")

    def _series(self, metric: Any, *labels: str) -> Any:
        # The library's own look-up takes a lock and makes strings of strings, five times a request.
        key = (metric, labels)
        if key not in self._known:
            self._known[key] = metric.labels(*labels)
        return self._known[key]
