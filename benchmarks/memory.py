"""How much memory does a training step need? `python -m benchmarks.memory`."""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from benchmarks import measuring, network
from models.console import count

ROOT = Path(__file__).parents[1]
SERIES = ("without", "ours", "keras")
BATCH = 512
COLUMNS = ("network", "mode", "batch", *SERIES, "added by ours", "added by keras")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory",
        description="Peak memory of a process that trains, above its peak before the first step, in MiB: the network "
        "less its normalizations, with ours, with stock Keras's. Each is a process of its own. With `jit_compile` this "
        "includes what the compiler needs.",
    )
    parser.add_argument("--networks", nargs="+", choices=network.NETWORKS, default=network.NETWORKS)
    parser.add_argument("--modes", nargs="+", choices=network.MODES, default=network.MODES)
    parser.add_argument("--rounds", type=count, default=3, help="processes of each kind (default: 3)")
    parser.add_argument("--name", default="memory", help="of the files below benchmarks/results (default: memory)")
    parser.add_argument("--one", nargs=3, metavar=("NETWORK", "MODE", "SERIES"), help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.one:
        print(_peak(*flags.one))
        return
    kinds = [(name, mode) for name in flags.networks for mode in flags.modes]
    found: dict[tuple[str, str, str], list[float]] = {}
    # One of each kind after the other, and that again: what the machine does meanwhile hits all alike.
    questions = [(*kind, series) for _ in range(flags.rounds) for kind in kinds for series in SERIES]
    for question in measuring.progress(questions, "memory"):
        found.setdefault(question, []).append(_ask(question))
    rows = []
    for name, mode in kinds:
        peaks = {series: statistics.median(found[name, mode, series]) for series in SERIES}
        added = {f"added by {series}": peaks[series] - peaks["without"] for series in ("ours", "keras")}
        rows.append({"network": name, "mode": mode, "batch": BATCH, **peaks, **added})
    measuring.save(flags.name, rows, COLUMNS)
    picture = measuring.bars(flags.name, rows, lambda row: f"{row['network']} {row['mode']}", SERIES, "MiB (median)")
    print(f"\n{picture}")


def _ask(question: tuple[str, str, str]) -> float:
    command = [sys.executable, "-m", "benchmarks.memory", "--one", *question]
    answer = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return float(answer.stdout)


def _peak(name: str, mode: str, series: str) -> float:
    import tensorflow as tf

    step = tf.function(network.training_step(network.build(name, series)), jit_compile=mode == "jit_compile")
    images = tf.random.uniform([BATCH, 28, 28, 1])
    labels = tf.one_hot(tf.random.uniform([BATCH], 0, 10, tf.int32), 10)
    step.get_concrete_function(images, labels)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(3):
        step(images, labels)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


if __name__ == "__main__":
    main()
