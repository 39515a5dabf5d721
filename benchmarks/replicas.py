"""What do synchronized statistics send, and how many digits are left? `python -m benchmarks.replicas`."""

from __future__ import annotations

import argparse
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf

from benchmarks import measuring
from keras_bn.ops import plain
from keras_bn.statistics import merged_across_replicas, weighted_moments
from models.console import number

EPSILON = 1e-3
CHANNELS = 64
PAGE = Path(__file__).resolve().parents[1] / "docs" / "scale.md"
COLUMNS = ("replicas", "offset", "contestant", "bytes per channel", "error of mean", "error of variance")

T = TypeVar("T")


class SimulatedReplicas:
    """A simulation of the replicas of a distribution strategy: a thread for each, whose all-reduces add up in order.

    Nothing is sent; `sent` counts what one replica hands over, in bytes.
    """

    def __init__(self, count: int):
        self.num_replicas_in_sync = count
        self.sent = 0
        self._own = threading.local()
        self._barrier = threading.Barrier(count)
        self._values: list[Any] = [None] * count

    @property
    def replica_id_in_sync_group(self) -> int:
        return self._own.id

    def run(self, function: Callable[[int], T]) -> list[T]:
        """`function(replica)` on each, with what `tf.distribute.get_replica_context` gives there."""
        results: list[Any] = [None] * self.num_replicas_in_sync

        def target(replica: int) -> None:
            self._own.id = replica
            try:
                results[replica] = function(replica)
            except BaseException:
                self._barrier.abort()
                raise

        threads = [threading.Thread(target=target, args=(replica,)) for replica in range(len(results))]
        of_strategy = tf.distribute.get_replica_context
        tf.distribute.get_replica_context = lambda: self
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            tf.distribute.get_replica_context = of_strategy
        if self._barrier.broken:
            raise RuntimeError("a simulated replica failed: see above")
        return results

    def all_reduce(self, operation: tf.distribute.ReduceOp, value: Any) -> tf.Tensor:
        return tf.convert_to_tensor(sum(self.gather(value)))

    def gather(self, value: Any) -> list[np.ndarray]:
        """What each replica hands over, known to all."""
        value = np.asarray(value)
        if self._own.id == 0:
            self.sent += value.nbytes
        self._values[self._own.id] = value
        self._barrier.wait()
        values = list(self._values)
        self._barrier.wait()
        return values


def ours(replicas: SimulatedReplicas, x: np.ndarray) -> tuple[Any, Any]:
    shift = plain.central_value(tf.constant(x), [0])
    moments, center = merged_across_replicas(weighted_moments(x - shift, None), tf.squeeze(shift, 0), True)
    return moments.mean + center, moments.m2 / moments.count


def stock_keras(replicas: SimulatedReplicas, x: np.ndarray) -> tuple[Any, Any]:
    return keras.ops.moments(x, axes=[0], synchronized=True)


def pytorch_formula(replicas: SimulatedReplicas, x: np.ndarray) -> tuple[Any, Any]:
    """What PyTorch's SyncBatchNorm computes, in NumPy: everyone's mean and 1 / std, gathered and merged one by one."""
    inverse_std = 1 / np.sqrt(np.var(x, 0, dtype="float32") + np.float32(EPSILON))
    packed = np.concatenate([np.mean(x, 0, dtype="float32"), inverse_std, [np.float32(len(x))]]).astype("float32")
    mean = m2 = np.zeros(x.shape[1], "float32")
    count = np.float32(0)
    for part in replicas.gather(packed):
        means, stds, n = part[: x.shape[1]], 1 / part[x.shape[1] : -1], part[-1]
        variance = stds * stds - np.float32(EPSILON)
        m2 = m2 + variance * n + (means - mean) ** 2 * (n * count / (n + count))
        mean = (count * mean + n * means) / (count + n)
        count = count + n
    if replicas.replica_id_in_sync_group == 0:  # Each gathers what all of them hand over.
        replicas.sent += packed.nbytes * (replicas.num_replicas_in_sync - 1)
    return mean, m2 / count


CONTESTANTS = {"ours": ours, "stock Keras": stock_keras, "PyTorch's formula": pytorch_formula}


def rows_of(replica_counts: Sequence[int], offsets: Sequence[float]) -> list[dict[str, Any]]:
    """Bytes and errors of each contestant, on 32 rows a replica of N(offset, 1)."""
    rows = []
    for count in measuring.progress(replica_counts, "replicas"):
        for offset in offsets:
            x = np.random.default_rng(0).normal(offset, 1, (count, 32, CHANNELS)).astype("float32")
            exact = x.reshape(-1, CHANNELS).astype("float64")
            for name, contestant in CONTESTANTS.items():
                replicas = SimulatedReplicas(count)
                results = replicas.run(lambda replica, ask=contestant, of=replicas, x=x: ask(of, x[replica]))
                mean, variance = (np.asarray(value, "float64") for value in results[0])
                rows.append({
                    "replicas": count,
                    "offset": offset,
                    "contestant": name,
                    "bytes per channel": replicas.sent / CHANNELS,
                    "error of mean": np.abs((mean - exact.mean(0)) / exact.std(0)).max(),
                    "error of variance": np.abs(variance / exact.var(0) - 1).max(),
                })  # fmt: skip
    return rows


def page_table(rows: Sequence[dict[str, Any]]) -> str:
    """The part of the rows that is in docs/scale.md: a line for each number of replicas and contestant."""
    cells = {(row["replicas"], row["contestant"], row["offset"]): row for row in rows}
    lines = ["| replicas | | bytes | mean at 1e6 | variance at 0 | at 1e3 | at 1e6 |", "|---|---|---|---|---|---|---|"]
    for count, name in dict.fromkeys((count, name) for count, name, _ in cells):
        near, far, farthest = (cells[count, name, offset] for offset in (0.0, 1e3, 1e6))
        variances = " | ".join(f"{row['error of variance']:.2g}" for row in (near, far, farthest))
        sent = f"{near['bytes per channel']:.4g}"
        lines.append(f"| {count} | {name} | {sent} | {farthest['error of mean']:.2g} | {variances} |")
    return "\n".join(lines)


def write_page(rows: Sequence[dict[str, Any]]) -> None:
    """Puts the table into docs/scale.md, in the place of the one that is there."""
    before, rest = PAGE.read_text().split("<!-- benchmarks.replicas -->\n", 1)
    _, after = rest.split("<!-- end -->\n", 1)
    table = f"<!-- benchmarks.replicas -->\n{page_table(rows)}\n<!-- end -->\n"
    PAGE.write_text(f"{before}{table}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.replicas",
        description="What one replica hands over for one channel in one training step forward, in bytes, and the "
        "largest errors of the mean (in standard deviations) and of the variance (relative). The replicas are a "
        "simulation: threads of one process whose sums are made in order.",
    )
    parser.add_argument("--replicas", nargs="+", type=number(int, 1), default=[2, 8, 64, 256])
    parser.add_argument("--offsets", nargs="+", type=number(float), default=[0.0, 1e3, 1e6])
    parser.add_argument("--name", default="replicas", help="of the files below benchmarks/results (default: replicas)")
    flags = parser.parse_args()
    rows = rows_of(flags.replicas, flags.offsets)
    measuring.save(flags.name, rows, COLUMNS)
    if flags.name == parser.get_default("name"):
        write_page(rows)


if __name__ == "__main__":
    main()
