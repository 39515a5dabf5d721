"""Pictures of images and answers, drawn without a display."""

import os
from collections.abc import Sequence

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
