"""Do adaptive optimizers make batch normalization needless, or it them?"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from matplotlib.figure import Figure

import keras_bn
from models import networks
from models.data import ImageData
from models.experiments import figures, training, verdicts
from models.experiments.images import halved
from models.optimizers import DistributedShampoo, Yogi

TITLE = "Six optimizers, without and with batch norm, each at its best learning rate"
CLAIM = (
    "Optimizers that adapt the step of each weight fight the same drift that batch norm removes: with them batch norm "
    "should gain less than with plain gradient descent."
)
SOURCE = (
    "The project's notes; Yogi: Zaheer et al. 2018; Shampoo: Gupta et al. 2018 (arXiv 1802.09568), Anil et al. 2020 "
    "(arXiv 2002.09018)"
)
Optimizer = Callable[[float], keras.optimizers.Optimizer]
OPTIMIZERS: dict[str, tuple[Optimizer, tuple[float, ...]]] = {
    "SGD": (keras.optimizers.SGD, (0.1, 0.4, 1.6)),
    "momentum": (lambda rate: keras.optimizers.SGD(rate, momentum=0.9), (0.01, 0.04, 0.16)),
    "Adam": (keras.optimizers.Adam, (0.001, 0.004, 0.016)),
    "AdaGrad": (keras.optimizers.Adagrad, (0.01, 0.04, 0.16)),
    "Yogi": (Yogi, (0.001, 0.004, 0.016)),
    "Shampoo": (DistributedShampoo, (0.01, 0.04, 0.16)),
}
ADAPTIVE = ("Adam", "AdaGrad", "Yogi", "Shampoo")
NORMALIZATIONS = {"without": "without batch norm", "with": "with batch norm"}
NETWORKS = {"sigmoid_mlp": "sigmoid network", "fashion_cnn": "convolutional network"}


@dataclasses.dataclass(frozen=True)
class Setting:
    """Of the experiment; the convolutional network sees images of half the size."""

    mlp_steps: int
    cnn_steps: int
    looks: int
    batch_size: int = 60
    mlp_width: int = 100
    cnn_width: int = 8
    target: float = 0.8
    # Steps of each training of the sweep, a share of those of the final one.
    sweep: float = 0.34
    rates_tried: int = 3
    test_images: int = 2000
    cost: float = 120.0


FULL = Setting(mlp_steps=1500, cnn_steps=300, looks=20)
QUICK = Setting(
    mlp_steps=120, cnn_steps=24, looks=4, mlp_width=50, cnn_width=4, rates_tried=1, test_images=500, cost=60.0
)


def parts(setting: Setting) -> int:
    """How often a run ticks."""
    return len(NETWORKS) * len(OPTIMIZERS) * len(NORMALIZATIONS)


def run(setting: Setting, images: ImageData, seed: int, tick: Callable[[], None]) -> dict[str, Any]:
    """Sweep the learning rate of every combination and train with the best.

    Returns:
        For each of `NETWORKS`, of `OPTIMIZERS` and of `NORMALIZATIONS`: `rate`; `sweep`, the accuracy by rate; `curve`;
        `steps` to the target; and under `timings` the milliseconds of a step.
    """
    small = halved(images)

    def mlp(normalization):
        return networks.sigmoid_mlp(setting.mlp_width, normalization, image_shape=images.x_train.shape[1:])

    def cnn(normalization):
        return networks.fashion_cnn(setting.cnn_width, normalization, image_shape=small.x_train.shape[1:])

    kinds = {"sigmoid_mlp": (images, mlp, setting.mlp_steps), "fashion_cnn": (small, cnn, setting.cnn_steps)}
    found: dict[str, Any] = {}
    for network, (data, build, steps) in kinds.items():
        for name, (optimizer, rates) in OPTIMIZERS.items():
            for normalization in NORMALIZATIONS:
                layer = keras_bn.BatchNormalization if normalization == "with" else None
                model = training.seeded(seed, lambda build=build, layer=layer: build(layer))  # type: ignore[misc]
                one = _at_best_rate(setting, data, seed, model, optimizer, rates, steps)
                found.setdefault(network, {}).setdefault(name, {})[normalization] = one
                tick()
    return found


def _at_best_rate(setting, images, seed, model, optimizer, rates, steps) -> dict[str, Any]:
    count = setting.test_images
    # The rate is chosen on images that are neither trained on nor tested with.
    x, y = images.x_train[:-count], images.y_train[:-count]
    trainer = training.Trainer(model, optimizer(rates[0]), x, y, setting.batch_size, seed)
    accuracy = training.Accuracy(model, images.x_test[:count], images.y_test[:count])
    validation = training.Accuracy(model, images.x_train[-count:], images.y_train[-count:])
    middle = len(rates) // 2
    tried = rates if setting.rates_tried >= len(rates) else rates[middle : middle + setting.rates_tried]
    best, sweep = training.best_rate(trainer, validation, tried, round(setting.sweep * steps))
    trainer.reset(best)
    seen = training.curve(trainer, accuracy, steps, steps // setting.looks)
    begin = time.perf_counter()
    trainer.train(steps // setting.looks)
    milliseconds = 1000 * (time.perf_counter() - begin) / (steps // setting.looks)
    return {
        "rate": best,
        "sweep": sweep,
        "curve": seen,
        "steps": training.steps_to(seen, setting.target),
        "timings": {"milliseconds": milliseconds},
    }


def _cells(runs: figures.Runs, network: str, name: str, normalization: str) -> list[Any]:
    return figures.each(runs, network, name, normalization)


def _means(runs: figures.Runs, network: str, name: str, normalization: str) -> list[float]:
    """Accuracy over the whole training: the sooner it is learned, the higher."""
    return [100 * float(np.mean(cell["curve"]["accuracy"])) for cell in _cells(runs, network, name, normalization)]


def gains(runs: figures.Runs, network: str, name: str) -> np.ndarray:
    """What batch norm adds to the mean accuracy over the training, in points, by seed."""
    return np.subtract(_means(runs, network, name, "with"), _means(runs, network, name, "without"))


def figure(runs: figures.Runs) -> Figure:
    """Accuracy by step of all optimizers: a row for each network, without batch norm left and with it right."""
    drawn, axes = figures.panels(2, 3.6, rows=2)
    for number, (network, words) in enumerate(NETWORKS.items()):
        adaptive = np.mean([gains(runs, network, name) for name in ADAPTIVE])
        sgd = np.mean(gains(runs, network, "SGD"))
        for place, (normalization, with_words) in enumerate(NORMALIZATIONS.items()):
            panel = axes[2 * number + place]
            panel.sharey(axes[2 * number])
            for name, colour in zip(OPTIMIZERS, figures.COLOURS, strict=False):
                curves = [cell["curve"] for cell in _cells(runs, network, name, normalization)]
                figures.band(panel, curves[0]["step"], figures.shares(curves), name, colour)
            first_words = f"{figures.capital(words)}, {with_words}"
            gained = f"gain: {sgd:+.1f} points with SGD, {adaptive:+.1f} with adaptive ones"
            title = first_words if place == 0 else f"{first_words}\n{gained}"
            figures.label(panel, title, figures.STEPS, "test accuracy (%)", None)
    figures.legend_below(drawn, axes[0])
    return drawn


def table(runs: figures.Runs) -> str:
    """Steps to the target, accuracies and time of all combinations."""
    rows = []
    for network, words in NETWORKS.items():
        for name in OPTIMIZERS:
            for normalization, with_words in NORMALIZATIONS.items():
                cells = _cells(runs, network, name, normalization)
                rates = "/".join(sorted({f"{cell['rate']:g}" for cell in cells}))
                rows.append(
                    [
                        f"{words}, {name} {with_words}",
                        rates,
                        verdicts.spread([cell["steps"] for cell in cells], ".0f"),
                        verdicts.spread(_means(runs, network, name, normalization), ".2f"),
                        verdicts.percent([training.final(cell["curve"]) for cell in cells]),
                        verdicts.spread([cell["timings"]["milliseconds"] for cell in cells]),
                    ]
                )
    header = [
        "",
        "best rate",
        "steps to the target",
        "test accuracy, mean over the training (%)",
        "in the end (%)",
        "ms a step",
    ]
    return figures.markdown(header, rows)


def verdict(runs: figures.Runs) -> list[verdicts.Verdict]:
    """Whether batch norm gains less with adaptive optimizers, and anything at all."""
    found = []
    for network, words in NETWORKS.items():
        adaptive = np.mean([gains(runs, network, name) for name in ADAPTIVE], axis=0)
        found += [
            verdicts.judge(
                f"in the {words} batch norm gains less with adaptive optimizers than with SGD",
                list(gains(runs, network, "SGD") - adaptive),
                "Gain with SGD less the mean of those with adaptive ones",
                "points",
            ),
            verdicts.judge(
                f"in the {words} batch norm gains something with adaptive optimizers, too",
                list(adaptive),
                "Gain in accuracy, the mean over the training and over adaptive optimizers",
                "points",
            ),
        ]
    return found
