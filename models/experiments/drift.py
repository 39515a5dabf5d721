"""Does batch normalization keep the distribution of what a layer sees steady while those before it learn?"""

import dataclasses
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from matplotlib.figure import Figure

import keras_bn
from models import networks
from models.data import ImageData
from models.experiments import figures, training, verdicts

TITLE = "What the last hidden layer's sigmoids are given, while the network trains"
CLAIM = (
    "While a network learns, the distribution of what each of its layers is given drifts, which the layer has to keep "
    "up with. Normalized by the batch, it stays steady, and the network learns faster and generalizes better."
)
SOURCE = "Ioffe & Szegedy 2015 (arXiv 1502.03167), section 4.1 and figure 1, there on MNIST; the project's notes: drift"
PERCENTILES = (15, 50, 85)
VARIANTS = {"without": "no batch norm", "with": "batch norm"}
TARGET = 0.8


@dataclasses.dataclass(frozen=True)
class Setting:
    """Of the experiment: `sigmoid_mlp` with plain SGD."""

    steps: int
    every: int
    batch_size: int = 60
    learning_rate: float = 0.1
    width: int = 100
    depth: int = 3
    observed_images: int = 1000
    test_images: int = 10_000
    cost: float = 100.0


FULL = Setting(steps=50_000, every=250)
QUICK = Setting(steps=1_500, every=100, test_images=2000, cost=10.0)


def parts(setting: Setting) -> int:
    """How often a run ticks."""
    return len(VARIANTS) * setting.steps // setting.every


def run(setting: Setting, images: ImageData, seed: int, tick: Callable[[], None]) -> dict[str, Any]:
    """Train both networks and watch their last hidden layer.

    Returns:
        For each of `VARIANTS`: `curve`; `percentiles` of a typical unit, three for each look; `drift`, in standard
        deviations per 1,000 steps; and `drift_late`, that of the second half of the training.
    """
    return {name: _watched(setting, images, seed, name == "with", tick) for name in VARIANTS}


def _watched(setting: Setting, images: ImageData, seed: int, normalized: bool, tick: Callable[[], None]) -> dict:
    normalization = keras_bn.BatchNormalization if normalized else None
    model = training.seeded(
        seed,
        lambda: networks.sigmoid_mlp(
            setting.width, normalization, depth=setting.depth, image_shape=images.x_train.shape[1:]
        ),
    )
    optimizer = keras.optimizers.SGD(setting.learning_rate)
    trainer = training.Trainer(model, optimizer, images.x_train, images.y_train, setting.batch_size, seed)
    count = setting.test_images
    accuracy = training.Accuracy(model, images.x_test[:count], images.y_test[:count])
    given = what_sigmoids_are_given(model, f"hidden_{setting.depth}", images.x_train[: setting.observed_images])
    looks: list[np.ndarray] = [summary(given())]

    def look() -> float:
        looks.append(summary(given()))
        return accuracy()

    seen = training.curve(trainer, look, setting.steps, setting.every, tick)
    by_unit = np.array(looks)
    moved = movements(by_unit) * 1000 / setting.every
    typical = int(np.argsort(moved.mean(axis=0))[moved.shape[1] // 2])
    return {
        "curve": seen,
        "percentiles": by_unit[1:, : len(PERCENTILES), typical],
        "drift": moved.mean(),
        "drift_late": moved[len(moved) // 2 :].mean(),
    }


def what_sigmoids_are_given(model: keras.Model, layer: str, images: np.ndarray) -> Callable[[], tf.Tensor]:
    """A function that computes the input of a layer's sigmoids, normalized as in training: with these images' own.

    Args:
        model: A `sigmoid_mlp`.
        layer: Name of the hidden layer.
        images: That the layer is watched on.

    Returns:
        A function without arguments; its result has shape `(images, units)`.
    """
    observed = keras.Model(model.inputs, model.get_layer(f"{layer}_sigmoid").input)
    held = tf.constant(images)

    @tf.function
    def given() -> tf.Tensor:
        return observed(held, training=False)

    if not any(isinstance(each, keras.layers.BatchNormalization) for each in model.layers):
        return given
    # Traced with the batch's statistics, which a function of its own keeps to; nothing moves where `training` is False.
    with keras_bn.use_statistics(model, "batch"):
        given.get_concrete_function()
    return given


def summary(given: tf.Tensor) -> np.ndarray:
    """Percentiles and, last, the standard deviation over the images: shape `(4, units)`."""
    values = np.asarray(given)
    return np.concatenate([np.percentile(values, PERCENTILES, axis=0), values.std(axis=0, keepdims=True)])


def movements(looks: np.ndarray) -> np.ndarray:
    """How far the median of each unit moves between looks, in standard deviations of that unit at the later look.

    Args:
        looks: From `summary`, shape `(looks, 4, units)`.

    Returns:
        Shape `(looks - 1, units)`.
    """
    medians, deviations = looks[:, PERCENTILES.index(50)], looks[:, -1]
    return np.abs(np.diff(medians, axis=0)) / np.maximum(deviations[1:], 1e-12)


def figure(runs: figures.Runs) -> Figure:
    """Accuracy, and the percentiles of a typical unit without and with batch norm."""
    drawn, (left, middle, right) = figures.panels(3, 3.4)
    for (name, words), colour in zip(VARIANTS.items(), figures.COLOURS, strict=False):
        curves = figures.each(runs, name, "curve")
        figures.band(left, curves[0]["step"], figures.shares(curves), words, colour)
    ends = {name: 100 * np.mean(_ends(runs, name)) for name in VARIANTS}
    figures.label(
        left,
        f"Accuracy in the end: {ends['without']:.1f} %,\n{ends['with']:.1f} % with batch norm",
        figures.STEPS,
        "test accuracy (%)",
        "center right",
    )
    for axes, name, colour in ((middle, "without", figures.COLOURS[0]), (right, "with", figures.COLOURS[1])):
        steps = runs[0][name]["curve"]["step"]
        for number, (percentile, style) in enumerate(zip(PERCENTILES, ("--", "-", ":"), strict=True)):
            # One seed: units of other networks are other units.
            values = [[look[number] for look in runs[0][name]["percentiles"]]]
            figures.band(axes, steps, values, f"{percentile}th percentile", colour, style)
        title = (
            f"Drift of the median, {VARIANTS[name]}:\n{figures.mean(runs, name, 'drift'):.2f} deviations / 1,000 steps"
        )
        figures.label(axes, title, figures.STEPS, "input of a typical sigmoid (seed 0)", None)
    handles, names = middle.get_legend_handles_labels()
    drawn.legend(handles, names, loc="outside lower right", ncols=3, fontsize=8, frameon=False)
    return drawn


def table(runs: figures.Runs) -> str:
    """Drift and accuracy of both."""
    rows = [
        [
            words,
            verdicts.spread(figures.each(runs, name, "drift")),
            verdicts.spread(figures.each(runs, name, "drift_late")),
            verdicts.percent(_ends(runs, name)),
        ]
        for name, words in VARIANTS.items()
    ]
    header = ["", "drift (deviations per 1,000 steps)", "in the second half", "test accuracy in the end (%)"]
    words = (
        "Drift: how far the median of each unit moves between two looks, back and forth added up, in standard "
        "deviations of that unit over the images; the mean over the units."
    )
    return f"{figures.markdown(header, rows)}\n\n{words}"


def verdict(runs: figures.Runs) -> list[verdicts.Verdict]:
    """Whether the distribution is steadier, and the accuracy higher, with batch norm."""
    whole, late = ([one["without"][key] / one["with"][key] for one in runs] for key in ("drift", "drift_late"))
    more = [100 * (b - a) for a, b in zip(_ends(runs, "without"), _ends(runs, "with"), strict=True)]
    steps = [[training.steps_to(one[name]["curve"], TARGET) for one in runs] for name in VARIANTS]
    faster = [a / b if a and b else None for a, b in zip(*steps, strict=True)]
    factor = "Drift without batch norm, as a multiple of that with it"
    return [
        verdicts.judge_factor(
            "with batch norm the distribution that the last hidden layer sees drifts less", whole, factor
        ),
        # In the beginning the units without batch norm hardly differ between images: a small movement is many
        # deviations. Both have learned in the second half.
        verdicts.judge_factor("and so it does in the second half of the training", late, factor),
        verdicts.judge_factor(
            f"with batch norm {100 * TARGET:g} % of the test images are answered rightly sooner",
            faster,
            "Steps without batch norm, as a multiple of those with it",
        ),
        verdicts.judge(
            "with batch norm the test accuracy is higher in the end",
            more,
            "Test accuracy with batch norm less that without",
            "points",
        ),
    ]


def _ends(runs: figures.Runs, name: str) -> list[float]:
    return [training.final(one[name]["curve"]) for one in runs]
