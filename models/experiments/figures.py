"""The style that all figures share: one line or band for each thing compared, drawn without a display."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

# Okabe & Ito's, which people see who do not see all colours.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8c6d1f")
DOTS_PER_INCH = 110
WIDTH = 9.0
STEPS = "training step"

Runs = Sequence[Mapping[str, Any]]


def panels(columns: int, height: float = 3.8, rows: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure as wide as the page, with panels beside each other."""
    figure = Figure(figsize=(WIDTH, height * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).ravel())
    for each in axes:
        each.grid(alpha=0.25, linewidth=0.6)
        each.spines[["top", "right"]].set_visible(False)
        each.tick_params(labelsize=9)
    return figure, axes


def band(
    axes: Axes,
    x: Sequence[float],
    values: Sequence[Sequence[float | None]],
    label: str,
    colour: str,
    style: str = "-",
    marker: str | None = None,
) -> None:
    """The mean over the seeds, and the band between the lowest and the highest.

    Args:
        axes: Drawn into.
        x: One for each point.
        values: For each seed as many; None where there is none.
        label: For the legend.
        colour: Of line and band.
        style: Of the line.
        marker: Of the points.
    """
    array = np.array([[np.nan if value is None else value for value in row] for row in values], float)
    known = ~np.isnan(array).all(axis=0)
    points, array = np.asarray(x, float)[known], array[:, known]
    axes.plot(
        points,
        np.nanmean(array, axis=0),
        style,
        color=colour,
        label=label,
        marker=marker,
        markersize=4,
        linewidth=1.6,
    )
    axes.fill_between(points, np.nanmin(array, axis=0), np.nanmax(array, axis=0), color=colour, alpha=0.2, linewidth=0)


def shares(curves: Runs) -> list[list[float]]:
    """The accuracies of curves, in percent."""
    return [[100 * value for value in one["accuracy"]] for one in curves]


def label(axes: Axes, title: str, x: str, y: str, legend: str | None = "best") -> None:
    """Title and axes with units; the legend where it covers least, or where it is asked to be."""
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    if x == STEPS:
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    if legend is not None:
        options: dict[str, Any] = {"loc": legend}
        axes.legend(fontsize=8, frameon=False, **options)


def legend_below(figure: Figure, axes: Axes) -> None:
    """One legend for all panels, below them, of what is drawn in one of them."""
    handles, words = axes.get_legend_handles_labels()
    figure.legend(handles, words, loc="outside lower center", ncols=min(len(words), 6), fontsize=8, frameon=False)


def logarithmic(axes: Axes, which: str) -> None:
    """A logarithmic axis, "x" or "y", with plain numbers at 1, 2 and 5; at the powers of ten alone where it is long."""
    axes.set(**{f"{which}scale": "log"})
    axis: Axis = getattr(axes, f"{which}axis")
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 200 * low else (1.0,), numticks=20))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1000 else f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def capital(words: str) -> str:
    """With a capital letter at the begin, and the others as they are."""
    return words[:1].upper() + words[1:]


def save(figure: Figure, path: Path) -> None:
    """Write the PNG file, the same bytes for the same numbers."""
    figure.savefig(path, dpi=DOTS_PER_INCH, metadata={"Software": None})


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown, numbers to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def mean(runs: Runs, *keys: str) -> float:
    """The mean over the seeds of a number, found by its keys."""
    return float(np.mean(each(runs, *keys)))


def each(runs: Runs, *keys: str) -> list[Any]:
    """A value of every seed, found by its keys."""
    found: list[Any] = list(runs)
    for key in keys:
        found = [value[key] for value in found]
    return found
