"""The page on speed: its figure and its numbers, from what the benchmarks measured last."""

import json
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks import measuring
from models.experiments.figures import COLOURS

PAGE = Path(__file__).resolve().parent.parent / "fast.md"
MODES = {"graph": "in a graph", "eager": "eager", "jit_compile": "`jit_compile=True`"}
FASTER = "keras / ours"
QUESTION = ("protocol", "images", "connections")
SMALL = ("MLP 256x128", "MLP 32x64")

Rows = Sequence[dict[str, Any]]


def fast() -> Figure:
    """Draws how much faster than Keras's layer training is, and writes the numbers of the page anew."""
    PAGE.write_text(with_numbers(PAGE.read_text()))
    measured = _trainings()
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots()
    for index, (mode, name) in enumerate(MODES.items()):
        places = np.arange(len(measured)) + 0.27 * (index - 1)
        values = [by_mode[mode] for by_mode in measured.values()]
        bars = axes.bar(places, values, 0.25, color=COLOURS[index], label=name.replace("`", ""))
        axes.bar_label(bars, [_short(value) for value in values], fontsize=7, padding=2)
    axes.axhline(1, color="gray", linewidth=0.8, zorder=0)
    axes.set_xticks(range(len(measured)), [shape.replace(" ", "\n") for shape in measured], fontsize=8)
    axes.set_ylabel("times as fast as stock Keras")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=9)
    return figure


def with_numbers(page: str) -> str:
    """The page with the parts that hold what was measured, each between a comment of its name and `<!-- end -->`.

    Args:
        page: as it is.
    """
    for name, text in PARTS.items():
        part = f"<!-- {name} -->\n\n{text()}\n\n<!-- end -->"
        page, count = re.subn(rf"<!-- {name} -->.*?<!-- end -->", lambda _: part, page, flags=re.DOTALL)  # noqa: B023
        if count != 1:
            raise ValueError(f"{PAGE.name} must have <!-- {name} --> once. Received: {count} of them.")
    return page


def _rows(name: str, **wanted: Any) -> list[dict[str, Any]]:
    """What a benchmark measured, of the rows whose columns have such values."""
    measured = json.loads((measuring.RESULTS / f"{name}.json").read_text())["rows"]
    return [row for row in measured if all(row[column] == value for column, value in wanted.items())]


def _trainings() -> dict[str, dict[str, float]]:
    """Times as fast as Keras's layer a float32 training step with channels last is, by shape and mode."""
    found: dict[str, dict[str, float]] = {}
    for row in _rows("layer", dtype="float32", axis="last", task="training"):
        found.setdefault(row["shape"], {})[row["mode"]] = row[FASTER]
    return {shape: by_mode for shape, by_mode in found.items() if set(MODES) <= set(by_mode)}


def _table() -> str:
    lines = [["input", *MODES.values()], ["---"] * (len(MODES) + 1)]
    lines += [[shape, *(_short(by_mode[mode]) for mode in MODES)] for shape, by_mode in _trainings().items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _more() -> str:
    def of_cnn(**wanted: Any) -> Rows:
        return [
            row for row in _rows("layer", task="training", mode="graph", **wanted) if row["shape"].startswith("CNN")
        ]

    half = [*of_cnn(axis="last", dtype="bfloat16"), *of_cnn(axis="last", dtype="float16")]
    eager = _rows("layer", mode="eager", task="inference")
    single = [row for row in eager if row["dtype"] == "float32"]
    steps = _rows("layer", mode="steps", task="training")
    calls = [row for row in _rows("layer", mode="graph", task="training") if row["shape"] in SMALL]
    return "\n".join(
        [
            f"- The four of pictures, in a graph: {_between(half)} times as fast in bfloat16 and float16, and "
            f"{_between(of_cnn(axis='first'))} times with the channels after the examples (`axis=1`).",
            f"- Eager inference: {_between(single)} times as fast in float32, "
            f"{_between([row for row in eager if row not in single])} in half precision.",
            f"- Small inputs, {' and '.join(shape.split()[1] for shape in SMALL)}, in a graph that takes many steps "
            f"in a call: {_between(steps)} times as fast. Where each call takes one step, calling the function takes "
            f"as long whatever the layer does; without the call, which the benchmark measures beside them, "
            f"{_between(calls, 'keras / ours without call')} times.",
        ]
    )


def _networks() -> str:
    lines = [["network, a step of 128", "mode", "without", "ours", "Keras's", "folded"], ["---"] * 6]
    for row in _rows("network"):
        folded = f"{row['folded']:.0f}" if row.get("folded") is not None else "-"
        name = f"{row['network']}, {row['task']}"
        times = [f"{row[column]:.0f}" for column in ("without", "ours", "keras")]
        lines.append([name, MODES[row["mode"]], *times, folded])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _losses() -> str:
    first = _rows("layer", mode="jit_compile", task="training", axis="first", dtype="float32")
    half = _rows("layer", mode="jit_compile", task="training", dtype="bfloat16")
    deep = [
        row for row in _rows("layer", mode="jit_compile", task="training", dtype="float16") if "3-D" in row["shape"]
    ]
    eager = [row for row in _rows("layer", mode="eager") if row.get("torch")]
    for row in eager:
        row["ours / torch"] = row["ours"] / row["torch"]
    training = [row for row in eager if row["task"] == "training" and row["dtype"] == "float32"]
    inference = [row for row in eager if row["task"] == "inference"]
    own = [
        row
        for name in ("layer", "layer_unknown_batch")
        for row in _rows(name, mode="graph", task="inference", dtype="float32")
    ]
    memory = {
        mode: [abs(row["ours"] - row["keras"]) for row in _rows("memory", mode=mode)]
        for mode in ("graph", "jit_compile")
    }
    peaks = [row["ours"] for row in _rows("memory", mode="jit_compile")]
    return "\n".join(
        [
            f"- Training under `jit_compile=True` with `axis=1`: {_between(first)} times as fast in float32; "
            f"bfloat16 {_between(half)}; float16 of rank 5, {_between(deep)}; what the table has below 1. "
            "There both are plain operations, and ours sum twice, for the digits.",
            f"- PyTorch's layer, eagerly: it trains {_between(training, 'ours / torch')} times as fast as ours "
            f"(float32), and infers up to {_short(max(row['ours / torch'] for row in inference))} times as fast.",
            f"- Inference in a graph of your own, unfolded, float32: {_between(own)} times as fast, in the middle "
            f"{_short(statistics.median(row[FASTER] for row in own))}. It holds three plain operations where Keras's "
            "layer has two or TensorFlow's fused one, so that it can be exported and keeps its digits. `predict` and "
            "`evaluate` have the compiled operation; folded, as an export is, nothing is left of them.",
            f"- Memory under `jit_compile=True`: a training step of the reference networks peaks "
            f"{min(memory['jit_compile']):.0f} to {max(memory['jit_compile']):.0f} MiB higher (batches of 512, at "
            f"{min(peaks):.0f} to {max(peaks):.0f} MiB; part of that is the compiler itself); in a graph it peaks "
            f"{min(memory['graph']):.0f} to {max(memory['graph']):.0f} MiB lower.",
        ]
    )


def _server() -> str:
    asked = _answers_by_question()
    peers = list(dict.fromkeys(name for by_server in asked.values() for name in by_server if name != "ours"))
    lines = [[*QUESTION, "requests/s", "p50 ms", "p99 ms", *(f"times {peer}" for peer in peers)]]
    lines.append(["---"] * len(lines[0]))
    for question, by_server in asked.items():
        ours = by_server["ours"]
        times = [by_server[peer]["ours, times as many"] if peer in by_server else None for peer in peers]
        lines.append(
            [*map(str, question), f"{ours['requests/s']:.0f}", _short(ours["p50 ms"]), _short(ours["p99 ms"])]
            + ["-" if value is None else _short(value) for value in times]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _answers_by_question() -> dict[tuple[Any, ...], dict[str, dict[str, Any]]]:
    """What each server gave, and how many times as many ours did."""
    asked: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in _rows("serving"):
        by_server = asked.setdefault(tuple(row[column] for column in QUESTION), {})
        if "server" in row:
            by_server[row["server"]] = row
            continue
        # Of a run from before each server had a row of its own.
        for column in row:
            name, rate, _ = column.partition(" requests/s")
            if rate:
                by_server[name] = {
                    "ours, times as many": row.get(f"ours / {name}"),
                    **{key: row.get(f"{name} {key}") for key in ("requests/s", "p50 ms", "p99 ms")},
                }
    return asked


def _machine() -> str:
    machine = _measured_on("layer")
    return f"{_described(machine)}, PyTorch {machine['torch']}. Medians; contestants ran in turn, in one run."


def _server_machine() -> str:
    return f"{_described(_measured_on('serving'))}. Medians; servers were loaded in turn, in one run."


def _measured_on(name: str) -> dict[str, str]:
    return json.loads((measuring.RESULTS / f"{name}.json").read_text())["machine"]


def _described(machine: dict[str, str]) -> str:
    return (
        f"One {machine['processor']}, {machine['cores']} cores; Python {machine['python']}, TensorFlow "
        f"{machine['tensorflow']}, Keras {machine['keras']}"
    )


PARTS: dict[str, Callable[[], str]] = {
    "machine": _machine,
    "table": _table,
    "more": _more,
    "networks": _networks,
    "losses": _losses,
    "server machine": _server_machine,
    "server": _server,
}


def _between(found: Rows, column: str = FASTER) -> str:
    """From the lowest to the highest of a column."""
    values = [row[column] for row in found if row.get(column) is not None]
    return f"{_short(min(values))} to {_short(max(values))}"


def _short(value: float) -> str:
    """Two digits, as the tables of the benchmarks have them."""
    return f"{value:.0f}" if value >= 100 else f"{value:.2g}" if value >= 10 or value < 1 else f"{value:.1f}"
