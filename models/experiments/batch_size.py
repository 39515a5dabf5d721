"""How small, and how large, may a batch be?"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import keras
import numpy as np
from matplotlib.figure import Figure

import keras_bn
from models import networks
from models.data import ImageData
from models.experiments import figures, training, verdicts
from models.experiments.images import first, halved

TITLE = "Test error by the size of the batch, at the same number of epochs"
CLAIM = (
    "Batches of 50 to 100 are best for batch norm. In small ones the statistics are noise and its error rises, while "
    "that of group norm does not; statistics of the whole population, or groups, or a correction, help."
)
SOURCE = "The project's notes; Wu & He 2018 (arXiv 1803.08494), figure 1; Wu & Johnson 2021 (arXiv 2105.07576)"

# Without the initial values, which a few large batches would not outweigh.
_batch_norm = partial(keras_bn.BatchNormalization, zero_debias=True)
VARIANTS: dict[str, Callable[..., keras.Layer] | None] = {
    "batch norm": _batch_norm,
    "virtual batches of 32": partial(_batch_norm, virtual_batch_size=32),
    "renorm": partial(_batch_norm, renorm=True, renorm_clipping={"rmax": 3.0, "rmin": 1 / 3, "dmax": 5.0}),
    "group norm": partial(keras.layers.GroupNormalization, groups=4),
    "layer norm": partial(keras.layers.LayerNormalization, axis=(1, 2, 3)),
    "none": None,
}
RECALIBRATED = "batch norm, recalibrated"
BEST = (32, 64, 128)


@dataclasses.dataclass(frozen=True)
class Setting:
    """Of the experiment: `fashion_cnn` on images of half the size; SGD with a rate in proportion to the batch."""

    training_images: int
    epochs: int
    batch_sizes: tuple[int, ...] = (2, 4, 8, 16, 32, 64, 128, 256, 512)
    rate_at_32: float = 0.02
    sgd_momentum: float = 0.9
    width: int = 8
    test_images: int = 2000
    cost: float = 200.0


FULL = Setting(training_images=3072, epochs=2)
QUICK = Setting(training_images=512, epochs=1, batch_sizes=(2, 64), width=4, test_images=500, cost=25.0)


def parts(setting: Setting) -> int:
    """How often a run ticks."""
    return len(VARIANTS) * len(setting.batch_sizes)


def run(setting: Setting, images: ImageData, seed: int, tick: Callable[[], None]) -> dict[str, Any]:
    """Train with each normalization and each size of batch.

    Returns:
        `error`, the share of wrong answers, by variant and size; and `steps` by size.
    """
    small = halved(first(images, setting.training_images, setting.test_images))
    errors: dict[str, dict[str, float]] = {name: {} for name in [*VARIANTS, RECALIBRATED]}
    for size in setting.batch_sizes:
        for name, normalization in VARIANTS.items():
            virtual = name.startswith("virtual")
            if virtual and size <= 32:
                # One group is the whole batch: the same network, number by number.
                errors[name][str(size)] = errors["batch norm"][str(size)]
            else:
                accuracy, model = _trained(setting, small, seed, size, normalization)
                errors[name][str(size)] = 1 - accuracy()
                if name == "batch norm":
                    keras_bn.recalibrate(model, small.x_train, batch_size=512, verbose=0)
                    errors[RECALIBRATED][str(size)] = 1 - accuracy()
            tick()
    steps = {str(size): setting.epochs * (setting.training_images // size) for size in setting.batch_sizes}
    return {"error": errors, "steps": steps}


def _trained(setting: Setting, images: ImageData, seed: int, size: int, normalization):
    model = training.seeded(
        seed, lambda: networks.fashion_cnn(setting.width, normalization, image_shape=images.x_train.shape[1:])
    )
    optimizer = keras.optimizers.SGD(setting.rate_at_32 * size / 32, setting.sgd_momentum)
    trainer = training.Trainer(model, optimizer, images.x_train, images.y_train, size, seed)
    accuracy = training.Accuracy(model, images.x_test, images.y_test)
    trainer.train(setting.epochs * (len(images.x_train) // size))
    return accuracy, model


def _errors(runs: figures.Runs, name: str, size: int | str) -> list[float]:
    return [100 * error for error in figures.each(runs, "error", name, str(size))]


def _sizes(runs: figures.Runs) -> list[int]:
    return [int(size) for size in runs[0]["steps"]]


def best_size(runs: figures.Runs, name: str) -> int:
    """The size with the lowest mean error."""
    return min(_sizes(runs), key=lambda size: np.mean(_errors(runs, name, size)))


def figure(runs: figures.Runs) -> Figure:
    """Error by size: what is done to batch norm, and what stands in its place."""
    drawn, (left, right) = figures.panels(2, 4.2)
    sizes = _sizes(runs)
    shown = {
        left: ("batch norm", RECALIBRATED, "virtual batches of 32", "renorm"),
        right: ("batch norm", "group norm", "layer norm", "none"),
    }
    colours = dict(zip([*VARIANTS, RECALIBRATED], figures.COLOURS, strict=False))
    for axes, names in shown.items():
        for name in names:
            by_seed = np.array([_errors(runs, name, size) for size in sizes]).T
            figures.band(axes, sizes, by_seed.tolist(), name, colours[name], marker="o")
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.set_yscale("log")
        axes.set_yticks([10, 15, 20, 30, 50, 90], ["10", "15", "20", "30", "50", "90"])
        axes.minorticks_off()
    best, smallest = best_size(runs, "batch norm"), sizes[0]
    error = np.mean(_errors(runs, "batch norm", best))
    figures.label(
        left,
        f"Batch norm is best with batches of {best}: {error:.1f} % wrong",
        "images in a batch (logarithmic)",
        "test error (%, logarithmic)",
    )
    behind = np.mean(_errors(runs, "batch norm", smallest)) - np.mean(_errors(runs, "group norm", smallest))
    figures.label(
        right,
        f"Batches of {smallest}: batch norm {behind:+.1f} points of error\nbeside group norm",
        "images in a batch (logarithmic)",
        "test error (%, logarithmic)",
    )
    return drawn


def table(runs: figures.Runs) -> str:
    """Error by variant and size."""
    sizes = _sizes(runs)
    rows = [
        [
            name,
            *(
                f"{np.mean(values):.1f} ({np.ptp(values):.1f})"
                for size in sizes
                for values in [_errors(runs, name, size)]
            ),
        ]
        for name in runs[0]["error"]
    ]
    steps = ["steps", *(f"{runs[0]['steps'][str(size)]:,}" for size in sizes)]
    words = "Test error in percent, the mean over the seeds, and in brackets the highest less the lowest."
    return f"{words}\n\n{figures.markdown(['images in a batch', *map(str, sizes)], [*rows, steps])}"


def verdict(runs: figures.Runs) -> list[verdicts.Verdict]:
    """Whether middle sizes are best, small ones worse than with group norm, and what helps."""
    sizes = _sizes(runs)
    smallest, largest = sizes[0], sizes[-1]
    middle = [size for size in sizes if size in BEST]

    def least(among: list[int]) -> np.ndarray:
        return np.min([_errors(runs, "batch norm", size) for size in among], axis=0)

    others = [size for size in sizes if size not in middle]

    def less(name: str, other: str, size: int) -> list[float]:
        pairs = zip(_errors(runs, name, size), _errors(runs, other, size), strict=True)
        return [a - b for a, b in pairs]

    return [
        verdicts.judge(
            f"of all sizes of a batch, one of {', '.join(map(str, middle))} is best for batch norm",
            list(least(others) - least(middle)),
            "Error of the best other size less that of the best of these",
            "points",
        ),
        verdicts.judge(
            f"with batches of {smallest} batch norm (moving averages) errs more often than group norm",
            less("batch norm", "group norm", smallest),
            "Error with batch norm less that with group norm",
            "points",
        ),
        verdicts.judge(
            f"with batches of {smallest} recalibration makes batch norm better",
            less("batch norm", RECALIBRATED, smallest),
            "Error with moving averages less that with population statistics",
            "points",
        ),
        verdicts.judge(
            f"with batches of {smallest} renorm makes batch norm better",
            less("batch norm", "renorm", smallest),
            "Error of batch norm less that of renorm",
            "points",
        ),
        verdicts.judge(
            f"with batches of {largest} virtual batches make batch norm better",
            less("batch norm", "virtual batches of 32", largest),
            "Error of whole batches less that of virtual ones of 32",
            "points",
        ),
    ]
