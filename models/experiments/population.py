"""How far are moving averages from the statistics of the population, how many images are enough, and which?"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from matplotlib.figure import Figure

import keras_bn
from models import networks, pretrained
from models.augmentation import augment
from models.data import ImageData
from models.experiments import figures, training, verdicts
from models.experiments.images import first, halved

TITLE = "Moving averages beside the statistics of the whole population"
CLAIM = (
    "In prediction, batch norm is to use the statistics of the whole training set, not those of a batch; a moving "
    "average is a stand-in for them that lags behind the weights. And the population is the one that the network was "
    "trained on: with its augmentation, if there was one."
)
SOURCE = (
    "The project's notes; Ioffe & Szegedy 2015 (arXiv 1502.03167), Algorithm 2; Wu & Johnson 2021 (arXiv 2105.07576)"
)
AVERAGES: dict[str, dict[str, Any]] = {
    "0.9": {"momentum": 0.9},
    "0.99": {"momentum": 0.99},
    "0.999": {"momentum": 0.999},
    "None": {"momentum": None},
    "0.99, zero_debias": {"momentum": 0.99, "zero_debias": True},
    "0.999, zero_debias": {"momentum": 0.999, "zero_debias": True},
}
LAST = "0.99"
WAYS: dict[str, dict[str, Any]] = {
    "sequential, pooled": {"order": "sequential", "method": "pooled"},
    "joint, pooled": {"order": "joint", "method": "pooled"},
    "sequential, algorithm2": {"order": "sequential", "method": "algorithm2"},
    "joint, algorithm2": {"order": "joint", "method": "algorithm2"},
}
MAIN_WAY = "sequential, pooled"
POPULATIONS = ("moving averages", "images as they are", "augmented images")
SHIPPED_ERASE = 8


@dataclasses.dataclass(frozen=True)
class Setting:
    """Of the experiment: `fashion_cnn` on images of half the size, Adam."""

    steps: int
    every: int
    image_counts: tuple[int, ...]
    batch_size: int = 64
    learning_rate: float = 0.003
    width: int = 8
    measured_images: int = 1024
    test_images: int = 5000
    # Of the network of models/pretrained, at their full size; 0 leaves it out.
    shipped_images: int = 2048
    cost: float = 150.0


FULL = Setting(steps=800, every=40, image_counts=(16, 64, 256, 1024, 4096))
QUICK = Setting(
    steps=60,
    every=20,
    image_counts=(16, 256),
    width=4,
    measured_images=256,
    test_images=500,
    shipped_images=0,
    cost=25.0,
)


def parts(setting: Setting) -> int:
    """How often a run ticks."""
    looks = setting.steps // setting.every
    return len(AVERAGES) * looks + len(WAYS) * len(setting.image_counts) + looks + 1


def run(setting: Setting, images: ImageData, seed: int, tick: Callable[[], None]) -> dict[str, Any]:
    """Train with each average; recalibrate; compare populations.

    Returns:
        `averages`: for each of `AVERAGES`, `kl` and `mean_shift` of the population from the moving statistics (the
        mean over the layers) and `accuracy`, by step; `recalibrated`, the accuracy at the same steps with population
        statistics; `counts`: for each of `WAYS` the accuracy by number of images; and `populations`, of `augmented`
        and (on Fashion-MNIST) `shipped`: the accuracy with each of `POPULATIONS`.
    """
    small = halved(first(images, len(images.x_train), setting.test_images))
    found: dict[str, Any] = {"averages": {}, "step": [], "counts": {}, "populations": {}}
    for name, options in AVERAGES.items():
        model, trainer, accuracy = _made(setting, small, seed, partial(keras_bn.BatchNormalization, **options))
        seen, recalibrated = _watched(setting, small, seed, model, trainer, accuracy, name == LAST, tick)
        found["averages"][name] = seen
        if name == LAST:
            found["recalibrated"], found["step"] = recalibrated, seen.pop("step")
            found["counts"] = _counts(setting, small, seed, model, accuracy, tick)
        seen.pop("step", None)
    model, trainer, accuracy = _made(setting, small, seed, keras_bn.BatchNormalization, _augmented)
    for _ in range(setting.steps // setting.every):
        trainer.train(setting.every)
        tick()
    chosen = _draw(small.x_train, setting.measured_images * 4, seed)
    moving = accuracy()
    populations = _populations(model, accuracy, chosen, _augmented, seed)
    found["populations"]["augmented"] = {"moving averages": moving, **populations}
    # It knows clothes: digits have the same shape.
    if setting.shipped_images and "fashion" in images.origin:
        found["populations"]["shipped"] = _shipped(setting, images, seed)
    tick()
    return found


def _augmented(images: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    # The shipped network's, at half the size.
    return augment(images, seed, shift=1, erase=SHIPPED_ERASE // 2)


def _made(setting, images, seed, normalization, augmentation=None):
    model = training.seeded(
        seed, lambda: networks.fashion_cnn(setting.width, normalization, image_shape=images.x_train.shape[1:])
    )
    trainer = training.Trainer(
        model,
        keras.optimizers.Adam(setting.learning_rate),
        images.x_train,
        images.y_train,
        setting.batch_size,
        seed,
        augmentation,
    )
    return model, trainer, training.Accuracy(model, images.x_test, images.y_test)


def _watched(setting, images, seed, model, trainer, accuracy, recalibrate, tick):
    population = _draw(images.x_train, setting.measured_images, seed)
    recalibrated: list[float] = []
    distances: dict[str, list[float]] = {"kl": [], "mean_shift": []}

    def look() -> float:
        rows = keras_bn.drift(model, population, batch_size=512)
        for key, values in distances.items():
            values.append(float(np.mean([row[key] for row in rows])))
        reached = accuracy()
        if recalibrate:
            weights = model.get_weights()
            keras_bn.recalibrate(model, population, batch_size=512, verbose=0)
            recalibrated.append(accuracy())
            model.set_weights(weights)
        return reached

    seen = training.curve(trainer, look, setting.steps, setting.every, tick)
    return {"step": seen["step"], "accuracy": seen["accuracy"], **distances}, recalibrated


def _counts(setting, images, seed, model, accuracy, tick):
    weights = model.get_weights()
    found: dict[str, dict[str, float]] = {name: {} for name in WAYS}
    for count in setting.image_counts:
        chosen = _draw(images.x_train, count, seed)
        for name, options in WAYS.items():
            model.set_weights(weights)
            keras_bn.recalibrate(model, chosen, batch_size=64, verbose=0, **options)
            found[name][str(count)] = accuracy()
            tick()
    model.set_weights(weights)
    return found


def _populations(model, accuracy, images, augmentation, seed):
    weights = model.get_weights()
    found = {}
    changed = augmentation(tf.constant(images), tf.constant([seed, 0]))
    for name, population in (("images as they are", images), ("augmented images", np.asarray(changed))):
        model.set_weights(weights)
        keras_bn.recalibrate(model, population, batch_size=256, verbose=0)
        found[name] = accuracy()
    return found


def _shipped(setting: Setting, images: ImageData, seed: int) -> dict[str, float | None]:
    """The network of `models/pretrained`, whose file has no moving averages any more; the card has their accuracy."""
    model = pretrained.load()
    accuracy = training.Accuracy(model, images.x_test, images.y_test, batch_size=500)
    chosen = _draw(images.x_train, setting.shipped_images, seed)
    found = _populations(model, accuracy, chosen, partial(augment, erase=SHIPPED_ERASE), seed)
    return {**found, "moving averages": pretrained.load_card()["accuracy_before_recalibration"]}


def _draw(images: np.ndarray, count: int, seed: int) -> np.ndarray:
    return images[np.random.default_rng(seed).permutation(len(images))[:count]]


def figure(runs: figures.Runs) -> Figure:
    """Distance by step, accuracy by step, accuracy by number of images."""
    drawn, (left, middle, right) = figures.panels(3, 3.9)
    steps = runs[0]["step"]
    for name, colour in zip(AVERAGES, figures.COLOURS, strict=False):
        figures.band(left, steps, figures.each(runs, "averages", name, "kl"), name, colour)
        if "debias" not in name:
            figures.band(middle, steps, _percent(figures.each(runs, "averages", name, "accuracy")), name, colour)
    recalibrated = _percent(figures.each(runs, "recalibrated"))
    figures.band(middle, steps, recalibrated, "recalibrated", figures.COLOURS[6], "--")
    # So that both are in the legend, which the left panel's lines are taken from.
    left.plot([], [], "--", color=figures.COLOURS[6], label="recalibrated")
    ends = {name: np.mean([one["averages"][name]["kl"][-1] for one in runs]) for name in AVERAGES}
    nearest = min(ends, key=lambda name: ends[name])
    figures.label(
        left,
        f"Nearest in the end: momentum\n{nearest}, {ends[nearest]:.1g} nats",
        figures.STEPS,
        "divergence from the population (nats)",
        None,
    )
    figures.logarithmic(left, "y")
    figures.label(
        middle,
        f"After {steps[0]} steps: {_first(runs, LAST):.0f} % with moving\naverages, "
        f"{100 * np.mean([one['recalibrated'][0] for one in runs]):.0f} % recalibrated",
        figures.STEPS,
        "test accuracy (%)",
        None,
    )
    counts = [int(count) for count in runs[0]["counts"][next(iter(WAYS))]]
    for name, colour in zip(WAYS, figures.COLOURS, strict=False):
        # Less the accuracy of the same network with the most images: networks differ by more than the images do.
        most = [one["counts"][MAIN_WAY][str(counts[-1])] for one in runs]
        pairs = list(zip(figures.each(runs, "counts", name), most, strict=True))
        values = [[100 * (found[str(count)] - last) for count in counts] for found, last in pairs]
        figures.band(right, counts, values, name, colour, marker="o")
    right.set_xscale("log", base=2)
    right.set_xticks(counts, [f"{count:,}" for count in counts])
    figures.label(
        right,
        f"{enough(runs):,} images are enough,\nto two tenths of a point",
        "images recalibrated on (logarithmic)",
        f"accuracy less that with {counts[-1]:,} (points)",
    )
    handles, words = left.get_legend_handles_labels()
    words = [word if word == "recalibrated" else f"momentum {word}" for word in words]
    drawn.legend(handles, words, loc="outside lower left", ncols=4, fontsize=8, frameon=False)
    return drawn


def _percent(values):
    return [[100 * value for value in row] for row in values]


def _first(runs: figures.Runs, name: str) -> float:
    return float(100 * np.mean([one["averages"][name]["accuracy"][0] for one in runs]))


def enough(runs: figures.Runs) -> int:
    """The smallest number of images that is as good as the largest, but for two tenths of a point on average."""
    by_count = [one["counts"][MAIN_WAY] for one in runs]
    means = {int(count): 100 * np.mean([one[count] for one in by_count]) for count in by_count[0]}
    most = means[max(means)]
    return min(count for count, mean in means.items() if mean >= most - 0.2)


def table(runs: figures.Runs) -> str:
    """Distance and accuracy by average; by number of images; by population."""
    averages = [
        [
            f"momentum {name}",
            *(
                verdicts.spread([one["averages"][name]["kl"][place] for one in runs])
                for place in (0, len(runs[0]["step"]) // 2, -1)
            ),
            verdicts.percent([one["averages"][name]["accuracy"][0] for one in runs]),
            verdicts.percent([one["averages"][name]["accuracy"][-1] for one in runs]),
        ]
        for name in AVERAGES
    ]
    steps = runs[0]["step"]
    at = [f"divergence (nats) at step {step}" for step in (steps[0], steps[len(steps) // 2], steps[-1])]
    header = ["", *at, f"test accuracy at step {steps[0]} (%)", "in the end (%)"]
    ends = [[one["recalibrated"][place] for one in runs] for place in (0, -1)]
    averages.append(["recalibrated", "", "", "", *map(verdicts.percent, ends)])
    counts = [
        [name, *(verdicts.percent([one["counts"][name][count] for one in runs]) for count in runs[0]["counts"][name])]
        for name in WAYS
    ]
    populations = [
        [name, *(verdicts.percent(figures.each(runs, "populations", name, which)) for which in POPULATIONS)]
        for name in runs[0]["populations"]
    ]
    return "\n\n".join(
        [
            figures.markdown(header, averages),
            "Test accuracy (%) after recalibration, by number of images:",
            figures.markdown(["", *map(str, runs[0]["counts"][next(iter(WAYS))])], counts),
            "Test accuracy (%) of networks trained on augmented images, by the population of their statistics "
            "(the shipped network's moving averages are those of its card):",
            figures.markdown(["", *POPULATIONS], populations),
        ]
    )


def verdict(runs: figures.Runs) -> list[verdicts.Verdict]:
    """Early and late, moving averages against the population; and which population."""
    pairs = {
        place: [100 * (one["recalibrated"][place] - one["averages"][LAST]["accuracy"][place]) for one in runs]
        for place in (0, -1)
    }
    steps = runs[0]["step"]
    what = f"Accuracy recalibrated less that with moving averages (momentum {LAST})"
    debias = [one["averages"]["0.999"]["kl"][-1] / one["averages"]["0.999, zero_debias"]["kl"][-1] for one in runs]
    found = [
        verdicts.judge(
            f"population statistics are better than moving averages early, at step {steps[0]}", pairs[0], what, "points"
        ),
        verdicts.judge(
            f"population statistics are better than moving averages in the end, at step {steps[-1]}",
            pairs[-1],
            what,
            "points",
        ),
        verdicts.judge_factor(
            "zero_debias brings a slow average (0.999) nearer to the population",
            debias,
            "Divergence without, as a multiple of that with zero_debias",
        ),
    ]
    for name, words in (("augmented", "a network"), ("shipped", "the shipped network")):
        if name in runs[0]["populations"]:
            of = figures.each(runs, "populations", name)
            found.append(
                verdicts.judge(
                    f"{words} that was trained on augmented images is better with the statistics of augmented images",
                    [100 * (one["augmented images"] - one["images as they are"]) for one in of],
                    "Accuracy on the statistics of augmented images less that on those of images as they are",
                    "points",
                )
            )
    return found
