"""The figure and the tables of the page on speed, from what the benchmarks measured last."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks import measuring
from models.experiments.figures import COLOURS

MODES = {"graph": "in a graph", "eager": "eager", "jit_compile": "`jit_compile=True`"}
FASTER = "keras / ours"


def rows(name: str, **wanted: str) -> list[dict[str, Any]]:
    """What a benchmark measured, of the rows with such values.

    Args:
        name: of the benchmark's results.
        **wanted: by column.
    """
    measured = json.loads((measuring.RESULTS / f"{name}.json").read_text())["rows"]
    return [row for row in measured if all(row[column] == value for column, value in wanted.items())]


def trainings() -> dict[str, dict[str, float]]:
    """Times as fast as Keras's layer a float32 training step with channels last is, by shape and mode."""
    found: dict[str, dict[str, float]] = {}
    for row in rows("layer", dtype="float32", axis="last", task="training"):
        found.setdefault(row["shape"], {})[row["mode"]] = row[FASTER]
    return {shape: by_mode for shape, by_mode in found.items() if set(MODES) <= set(by_mode)}


def fast() -> Figure:
    """Bars: times as fast as Keras's layer, in training."""
    measured = trainings()
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots()
    for index, (mode, name) in enumerate(MODES.items()):
        places = np.arange(len(measured)) + 0.27 * (index - 1)
        values = [by_mode[mode] for by_mode in measured.values()]
        bars = axes.bar(places, values, 0.25, color=COLOURS[index], label=name.replace("`", ""))
        axes.bar_label(bars, [_short(value) for value in values], fontsize=7)
    axes.axhline(1, color="black", linewidth=1)
    axes.set_xticks(range(len(measured)), [shape.replace(" ", "\n") for shape in measured], fontsize=8)
    axes.set_ylabel("times as fast as stock Keras")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=9)
    return figure


def table() -> str:
    """The same as Markdown."""
    measured = trainings()
    lines = [["input", *MODES.values()], ["---"] * (len(MODES) + 1)]
    lines += [[shape, *(_short(by_mode[mode]) for mode in MODES)] for shape, by_mode in measured.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def between(found: Sequence[Mapping[str, Any]], column: str = FASTER) -> str:
    """From the lowest to the highest of a column."""
    values = [row[column] for row in found if row[column] is not None]
    return f"{_short(min(values))} to {_short(max(values))}"


def _short(value: float) -> str:
    return f"{value:.2g}"
