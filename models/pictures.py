"""Pictures of images and answers, drawn without a display."""

import os
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

RIGHT, WRONG = "#1b7837", "#b2182b"


def save_answers(
    path: str | os.PathLike, images: np.ndarray, labels: np.ndarray, probabilities: np.ndarray, names: Sequence[str]
) -> None:
    """Draw images in four columns, each with the answer, its probability and the label; wrong answers in red.

    Args:
        path: Of the PNG file.
        images: Shape `(n, height, width, 1)`, intensities in `[0, 1]`.
        labels: Classes of shape `(n,)`.
        probabilities: Shape `(n, classes)`.
        names: One for each class.
    """
    rows = -(-len(images) // 4)
    figure = Figure(figsize=(8, 2.3 * rows), layout="constrained")
    grid = figure.subplots(rows, 4, squeeze=False).ravel()
    for cell in grid:
        cell.set_axis_off()
    for cell, image, label, row in zip(grid, images, labels, probabilities, strict=False):
        answer = int(np.argmax(row))
        cell.imshow(image[..., 0], cmap="gray_r", vmin=0, vmax=1)
        colour = RIGHT if answer == label else WRONG
        cell.set_title(f"{names[answer]}  {row[answer]:.1%}\n", color=colour, fontsize=10, fontweight="bold")
        cell.text(0.5, 1.02, f"label: {names[label]}", transform=cell.transAxes, ha="center", va="bottom", fontsize=9)
    figure.savefig(path, dpi=150)


def save_confusion(path: str | os.PathLike, confusion: np.ndarray, names: Sequence[str]) -> None:
    """Draw which classes are taken for which, as a grid of counts; the darker, the larger the share of the label.

    Args:
        path: Of the PNG file.
        confusion: Counts of shape `(classes, classes)`; rows are labels, columns answers.
        names: One for each class.
    """
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    figure = Figure(figsize=(7, 6.4), layout="constrained")
    axes = figure.subplots()
    # The square root lets the few wrong answers be seen beside the many right ones.
    axes.imshow(np.sqrt(shares), cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("answer")
    axes.set_ylabel("label")
    for row, column in np.argwhere(confusion):
        colour = "white" if shares[row, column] > 0.4 else "black"
        axes.text(column, row, confusion[row, column], ha="center", va="center", fontsize=8, color=colour)
    figure.savefig(path, dpi=110)


def save_curve(path: str | os.PathLike, log: Sequence[Mapping[str, str]]) -> None:
    """Draw loss and accuracy by epoch, those of the validation beside those of the training where there are some.

    Args:
        path: Of the PNG file.
        log: Rows of a `log.csv`.
    """
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    epochs = [int(row["epoch"]) for row in log]
    for axes, name in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for prefix, label in (("", "training"), ("val_", "validation")):
            if prefix + name in log[0]:
                axes.plot(epochs, [float(row[prefix + name]) for row in log], label=label)
        axes.set_xlabel("epoch")
        axes.set_ylabel(name)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=110)
