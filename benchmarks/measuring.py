"""Interleaved timing, tables with ratios, JSON and pictures, for all benchmarks."""

from __future__ import annotations

import json
import os
import platform
import random
import socket
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

# Threads that wait by spinning would slow down whoever is measured next; read when PyTorch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("KMP_BLOCKTIME", "0")

RESULTS = Path(__file__).parent / "results"


def interleaved(
    contestants: dict[str, Callable[[], Any]],
    seconds: float = 1.0,
    least: int = 7,
    most: int = 400,
    warm_up: int = 3,
    turn: int = 1,
) -> dict[str, float]:
    """Median time of each contestant in milliseconds, all of them run in turn so that a drift of the machine hits all.

    Args:
        contestants: Functions that return when their work is done.
        seconds: About how long all of them are measured for, after a warm-up.
        least: Rounds at least.
        most: Rounds at most.
        warm_up: Calls of each before anything is measured.
        turn: How often each is called in a row. Where that is more than once, one more call before them is not timed.
    """
    for run in contestants.values():
        for _ in range(warm_up):
            run()
    times: dict[str, list[float]] = {name: [] for name in contestants}
    end = time.perf_counter() + seconds
    order = random.Random(0)
    for rounds in range(most):
        if rounds >= least and time.perf_counter() > end:
            break
        # What one leaves behind (caches, freed memory, threads not yet asleep) must not always meet the same other.
        for name in order.sample(list(contestants), len(contestants)):
            if turn > 1:
                contestants[name]()
            for _ in range(turn):
                start = time.perf_counter()
                contestants[name]()
                times[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(values) for name, values in times.items()}


def machine() -> dict[str, str]:
    """What the figures were measured on."""
    import importlib.metadata

    versions = {}
    for package in ("tensorflow", "keras", "tf_keras", "torch", "numpy"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    processor = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        text = information.read_text()
        names = [line.split(":")[1].strip() for line in text.splitlines() if "model name" in line]
        # One name may stand for generations that differ in this, which is a factor for oneDNN.
        processor = f"{names[0] if names else processor} {'with' if ' avx512f ' in text else 'without'} AVX-512"
    return {"processor": processor, "cores": str(os.cpu_count()), "python": platform.python_version(), **versions}


def table(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> str:
    """Rows as a Markdown table; numbers with three digits, what is missing as a dash."""

    def cell(value: Any) -> str:
        return "-" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)

    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(cell(row.get(column)) for column in columns) + " |" for row in rows]
    return "\n".join(lines)


def save(name: str, rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> None:
    """Prints the table, and writes it with the machine as JSON and Markdown."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")
    text = table(rows, columns)
    described = ", ".join(f"{key} {value}" for key, value in machine().items())
    (RESULTS / f"{name}.md").write_text(f"Measured on: {described}\n\n{text}\n")
    _collect()
    print(text)


def with_earlier(name: str, rows: list[dict[str, Any]], keys: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of an earlier run whose `keys` were not measured now, and after them `rows`."""
    earlier = RESULTS / f"{name}.json"
    if not earlier.exists():
        return rows
    measured = {tuple(row[key] for key in keys) for row in rows}
    kept = [row for row in json.loads(earlier.read_text())["rows"] if tuple(row[key] for key in keys) not in measured]
    return kept + rows


def _collect() -> None:
    """Writes RESULTS.md anew from all results."""
    parts = ["# Results\n\nWhat `make bench` measured last. Times are medians; contestants ran in turn in one run.\n"]
    for path in sorted(RESULTS.glob("*.md")):
        picture = f"![{path.stem}](results/{path.stem}.png)\n"
        parts.append(f"## {path.stem}\n\n{path.read_text()}\n{picture}")
    (RESULTS.parent / "RESULTS.md").write_text("\n".join(parts))


def bars(
    name: str,
    rows: Sequence[dict[str, Any]],
    label: Callable[[dict[str, Any]], str],
    series: Sequence[str],
    axis: str = "milliseconds (median)",
) -> Path:
    """A picture of grouped horizontal bars on a logarithmic axis; returns its path."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 0.6 + 0.16 * len(rows) * (len(series) + 1)))
    height = 0.8 / len(series)
    for index, one in enumerate(series):
        places = [row_index + index * height for row_index, row in enumerate(rows) if row.get(one) is not None]
        axes.barh(places, [row[one] for row in rows if row.get(one) is not None], height, label=one)
    axes.set_yticks([index + 0.4 - height / 2 for index in range(len(rows))], [label(row) for row in rows], fontsize=7)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel(axis)
    axes.legend(fontsize=7)
    figure.tight_layout()
    path = RESULTS / f"{name}.png"
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def progress(items: Sequence[Any], description: str) -> Any:
    """A progress bar over the questions."""
    return tqdm(items, desc=description, disable=None)


def free_port() -> int:
    """A port of this machine that nobody listens at now."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])
