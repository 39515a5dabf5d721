"""Figures of a training beside what the embedded server answered about a picture."""

import csv
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from keras_bn_serving.client import Client
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from models import demo, pretrained
from models.data import CLASS_NAMES
from models.experiments.figures import COLOURS
from tests import pages

MODEL_NAME = "fashion_cnn"


def start() -> Figure:
    """Runs docs/start.md, and draws what it leaves."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        try:
            os.chdir(folder)
            names = pages.run("docs/start.md").names
        finally:
            os.chdir(before)
    figure, curve, picture, bars = _panels()
    accuracy = [100 * value for value in names["training"].history["accuracy"]]
    epochs = range(1, len(accuracy) + 1)
    curve.plot(epochs, accuracy, "o-", color=COLOURS[0], label="training batches")
    for when, value, colour in (("before", names["before"], COLOURS[1]), ("after", names["after"], COLOURS[2])):
        curve.plot([epochs[-1]], [100 * value], "D", color=colour, label=f"test, {when} recalibrate")
    curve.set(title="Five epochs", xlabel="epoch", ylabel="accuracy (%)", ylim=(0, 102), xticks=list(epochs))
    curve.legend(fontsize=8, loc="center left")
    _draw_answer(picture, bars, names["question"][0], names["answer"])
    return figure


def pretrained_network() -> Figure:
    """Serves models/pretrained, asks it over REST, and draws the answer beside the log of its training."""
    import keras_bn

    asked = pretrained.load_examples()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / MODEL_NAME
        keras_bn.export(pretrained.load(), path, labels=CLASS_NAMES, preprocess=pretrained.preprocess, warmup=asked)
        with demo.serving(MODEL_NAME, path, Path(folder) / "server.log") as url, Client(url) as client:
            answer = client.predict(MODEL_NAME, asked[9:])
    with (pretrained.FOLDER / "log.csv").open() as log:
        accuracy = [100 * float(row["accuracy"]) for row in csv.DictReader(log)]
    test = 100 * pretrained.load_card()["accuracy"]
    figure, curve, picture, bars = _panels()
    curve.plot(range(1, len(accuracy) + 1), accuracy, color=COLOURS[0], label="training, augmented images")
    curve.axhline(test, color=COLOURS[2], linestyle="--", label=f"test, population statistics: {test:.2f} %")
    curve.set(title="Trained on Fashion-MNIST", xlabel="epoch", ylabel="accuracy (%)")
    curve.legend(fontsize=8, loc="lower right")
    _draw_answer(picture, bars, asked[9], answer)
    return figure


def _panels() -> tuple[Figure, Axes, Axes, Axes]:
    figure = Figure(figsize=(9, 2.9), layout="constrained")
    curve, picture, bars = figure.subplots(1, 3, width_ratios=(4, 2, 3))
    for axes in (curve, bars):
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=9)
    return figure, curve, picture, bars


def _draw_answer(picture: Axes, bars: Axes, asked: np.ndarray, answer: Any) -> None:
    picture.imshow(asked[..., 0], cmap="gray", vmin=0, vmax=255)
    picture.set_axis_off()
    picture.set_title("asked over REST", fontsize=11)
    labels, scores = ([*answer[name][0]] for name in ("top_labels", "top_scores"))
    _draw_bars(bars, [label.decode() for label in labels], scores)


def _draw_bars(bars: Axes, labels: Sequence[str], scores: Sequence[float]) -> None:
    places = range(len(labels))
    bars.barh(places, [100 * score for score in scores], color=[COLOURS[2], *[COLOURS[5]] * (len(labels) - 1)])
    bars.set_yticks(places, labels)
    bars.invert_yaxis()
    bars.set(title="answered", xlabel="probability (%)", xlim=(0, 100))
