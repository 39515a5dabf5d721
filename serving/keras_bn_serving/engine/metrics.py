"""TensorFlow Serving's metrics, by its names, in Prometheus's text format."""

import bisect
import itertools
import threading
from collections.abc import Iterable
from typing import Any

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from keras_bn_serving.errors import Code

CONTENT_TYPE = "text/plain"
_PREFIX = ":tensorflow:serving:"
_MICROSECONDS = 1e6
# Every name that is asked for makes a series of its own; strangers' names may not fill the memory.
_MOST_SERIES = 10_000
# 33 buckets of microseconds: from 10 on, each 1.8 times the one before.
_BUCKETS = [10 * 1.8**power for power in range(33)]

# The library would add a second series of creation times to every counter and histogram.
prometheus_client.disable_created_metrics()


class _Histogram(Collector):
    """Counts by bucket, many times as fast as the library's own, which looks at one bucket after the other."""

    def __init__(self, name: str, help: str, labels: list[str]):
        self._name, self._help, self._labels = _PREFIX + name, help, labels
        self._lock = threading.Lock()
        self._series: dict[tuple[str, ...], tuple[list[int], list[float]]] = {}

    def observe(self, value: float, *labels: str) -> None:
        """Counts one value."""
        with self._lock:
            if labels not in self._series:
                self._series[labels] = [0] * (len(_BUCKETS) + 1), [0.0]
            counts, total = self._series[labels]
            counts[bisect.bisect_left(_BUCKETS, value)] += 1
            total[0] += value

    def collect(self) -> Iterable[HistogramMetricFamily]:
        """Gives the library what it writes."""
        family = HistogramMetricFamily(self._name, self._help, labels=self._labels)
        with self._lock:
            seen = {
                labels: (list(itertools.accumulate(counts)), total[0])
                for labels, (counts, total) in self._series.items()
            }
        for labels, (counts, total) in seen.items():
            bounds = [*map(floatToGoString, _BUCKETS), "+Inf"]
            family.add_metric(labels, list(zip(bounds, counts, strict=True)), total)
        yield family


class Metrics:
    """Counts and times of everything served."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._known: dict[tuple[str, ...], Any] = {}

        def histogram(name: str, help: str, labels: list[str]) -> _Histogram:
            made = _Histogram(name, help, labels)
            self._registry.register(made)
            return made

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
        self._failures = Counter(
            "keras_bn_serving_background_failures", "Turns that failed.", ["thread"], registry=self._registry
        )
        self._waiting = Gauge(
            _PREFIX + "batching_session:waiting_rows", "Rows that wait to be run.", registry=self._registry
        )

    def request(self, model_name: str, api: str, entrypoint: str, status: str, seconds: float) -> None:
        """Counts a request that has been answered; times it where that went well."""
        self._counter(model_name, status).inc()
        if status == Code.OK.name:
            self._latency.observe(seconds * _MICROSECONDS, model_name, api, entrypoint)

    def ran(self, name: str, rows: int, waited_seconds: float, seconds: float) -> None:
        """Counts a run of a model: `name` is the model's, `rows` those of one request."""
        self._runtime.observe(seconds * _MICROSECONDS, name, "Predict", "TF1")
        self._examples.observe(rows, name)
        self._queuing.observe(waited_seconds * _MICROSECONDS, name)

    def warmed_up(self, model_name: str, status: str, seconds: float) -> None:
        """Counts a version's warm-up."""
        self._warm_up.observe(seconds * _MICROSECONDS, model_name, status)

    def background_failure(self, thread: str) -> None:
        """Counts a turn of a background thread that has failed."""
        self._failures.labels(thread).inc()

    def text(self, waiting_rows: int) -> bytes:
        """Returns everything in Prometheus's text format."""
        self._waiting.set(waiting_rows)
        # TensorFlow Serving's counters go without the suffix that the library gives them.
        return generate_latest(self._registry).replace(b"request_count_total", b"request_count")

    def _counter(self, *labels: str) -> Any:
        # The library's own look-up takes a lock and makes strings of strings.
        if labels not in self._known:
            if len(self._known) >= _MOST_SERIES:
                labels = ("", *labels[1:])
            self._known[labels] = self._requests.labels(*labels)
        return self._known[labels]
