"""Does the noise of the batch regularize, as dropout does, and what becomes of it when the mode is switched?"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from matplotlib.figure import Figure

import keras_bn
from models import networks
from models.data import ImageData
from models.experiments import figures, training, verdicts
from models.experiments.images import first, halved

TITLE = "Training on few images: the gap to the test images, and the noise that makes it smaller"
CLAIM = (
    "An example's output depends on the others of its batch. That noise regularizes: dropout can be left out or made "
    "weaker beside batch norm. It is the smaller, the larger the batch, and it is gone when the mode is switched to "
    "inference."
)
SOURCE = "The project's notes; Ioffe & Szegedy 2015 (arXiv 1502.03167), section 3.4; Li et al. 2018 (arXiv 1801.05134)"
NORMALIZATIONS = {"without": "no batch norm", "with": "batch norm"}


@dataclasses.dataclass(frozen=True)
class Setting:
    """Of the experiment: `fashion_cnn` on images of half the size, Adam."""

    training_images: int
    steps: int
    noise_sizes: tuple[int, ...]
    draws: int
    rates: tuple[float, ...] = (0.0, 0.2, 0.5)
    batch_size: int = 64
    learning_rate: float = 0.003
    width: int = 8
    noise_images: int = 1024
    test_images: int = 5000
    cost: float = 90.0


FULL = Setting(training_images=1024, steps=800, noise_sizes=(4, 8, 16, 32, 64, 128, 256), draws=12)
QUICK = Setting(
    training_images=256,
    steps=60,
    noise_sizes=(4, 64),
    draws=6,
    rates=(0.0, 0.5),
    width=4,
    noise_images=256,
    test_images=500,
    cost=15.0,
)


def parts(setting: Setting) -> int:
    """How often a run ticks."""
    return len(NORMALIZATIONS) * len(setting.rates)


def run(setting: Setting, images: ImageData, seed: int, tick: Callable[[], None]) -> dict[str, Any]:
    """Train every combination on few images.

    Returns:
        `networks`: for each of `NORMALIZATIONS` and each rate of dropout `training` and `test` accuracy in inference
        mode, `training_mode`, the accuracy on the training images in training mode, and `switched`, how far the
        probabilities of training images are in training mode from those in inference (mean of the total variation);
        and `noise`: of the network with batch norm and no dropout, by size of the batch, see `noise`.
    """
    small = halved(first(images, setting.training_images, setting.test_images))
    found: dict[str, Any] = {"networks": {}, "noise": {}}
    for name in NORMALIZATIONS:
        normalization = keras_bn.BatchNormalization if name == "with" else None
        for rate in setting.rates:
            shape = small.x_train.shape[1:]
            build = partial(networks.fashion_cnn, setting.width, normalization, image_shape=shape, dropout=rate)
            model = training.seeded(seed, build)
            optimizer = keras.optimizers.Adam(setting.learning_rate)
            trainer = training.Trainer(model, optimizer, small.x_train, small.y_train, setting.batch_size, seed)
            trainer.train(setting.steps)
            if name == "with":
                keras_bn.recalibrate(model, small.x_train, batch_size=512, verbose=0)
            found["networks"].setdefault(name, {})[f"{rate:g}"] = _measured(setting, model, small)
            if name == "with" and rate == 0:
                found["noise"] = noise(setting, model, small.x_train[: setting.noise_images], seed)
            tick()
    return found


def _measured(setting: Setting, model: keras.Model, images: ImageData) -> dict[str, float]:
    accuracies = {
        "training": training.Accuracy(model, images.x_train, images.y_train)(),
        "test": training.Accuracy(model, images.x_test, images.y_test)(),
    }
    weights = model.get_weights()
    size = setting.batch_size
    batches = [images.x_train[begin : begin + size] for begin in range(0, len(images.x_train) - size + 1, size)]
    pairs = [(np.asarray(model(batch, training=True)), np.asarray(model(batch, training=False))) for batch in batches]
    # In training mode the moving statistics follow.
    model.set_weights(weights)
    noisy, steady = (np.concatenate(parts) for parts in zip(*pairs, strict=True))
    accuracies["training_mode"] = float(np.mean(noisy.argmax(axis=1) == images.y_train[: len(noisy)]))
    accuracies["switched"] = float(np.abs(noisy - steady).sum(axis=1).mean() / 2)
    return accuracies


def noise(setting: Setting, model: keras.Model, images: np.ndarray, seed: int) -> dict[str, float]:
    """How far an example's output moves with the others that its batch may hold, by the size of the batch.

    noise = mean over examples and logits of Var over batches / Var over examples of the mean over batches

    Args:
        setting: With `noise_sizes` that divide the number of images, and `draws`, batches for each example.
        model: With batch norm.
        images: From which all batches are drawn.
        seed: Of the draws.

    Returns:
        The noise, a share of the variance between examples, by size.
    """
    network = training.logits_of(model)

    @tf.function
    def logits(batch: tf.Tensor) -> tf.Tensor:
        return network(batch, training=False)

    with keras_bn.use_statistics(model, "batch"):
        compute = logits.get_concrete_function(tf.TensorSpec([None, *images.shape[1:]], tf.float32))
    found = {}
    for size in setting.noise_sizes:
        draws = np.random.default_rng([seed, size])
        outputs = np.empty((setting.draws, len(images), network.output_shape[-1]))
        for draw in range(setting.draws):
            order = draws.permutation(len(images))
            for begin in range(0, len(images), size):
                chosen = order[begin : begin + size]
                outputs[draw, chosen] = compute(tf.constant(images[chosen])).numpy()
        found[str(size)] = float(outputs.var(axis=0, ddof=1).mean() / outputs.mean(axis=0).var(axis=0).mean())
    return found


def _gaps(runs: figures.Runs, name: str, rate: str) -> list[float]:
    cells = figures.each(runs, "networks", name, rate)
    return [100 * (cell["training"] - cell["test"]) for cell in cells]


def _tests(runs: figures.Runs, name: str, rate: str) -> list[float]:
    return [100 * cell["test"] for cell in figures.each(runs, "networks", name, rate)]


def _rates(runs: figures.Runs) -> list[str]:
    return list(runs[0]["networks"]["with"])


def figure(runs: figures.Runs) -> Figure:
    """Test accuracy and gap by dropout, and noise by size of the batch."""
    drawn, (left, middle, right) = figures.panels(3, 3.6)
    rates = _rates(runs)
    numbers = [float(rate) for rate in rates]
    for (name, words), colour in zip(NORMALIZATIONS.items(), figures.COLOURS, strict=False):
        for axes, found in ((left, _tests), (middle, _gaps)):
            figures.band(
                axes,
                numbers,
                np.array([found(runs, name, rate) for rate in rates]).T.tolist(),
                words,
                colour,
                marker="o",
            )
    accuracy = {name: np.mean(_tests(runs, name, "0")) for name in NORMALIZATIONS}
    gap = {name: np.mean(_gaps(runs, name, "0")) for name in NORMALIZATIONS}
    figures.label(
        left,
        f"No dropout: {accuracy['without']:.1f} %,\nwith batch norm {accuracy['with']:.1f} %",
        "rate of dropout",
        "test accuracy (%)",
    )
    figures.label(
        middle,
        f"No dropout: gap {gap['without']:.1f} points,\nwith batch norm {gap['with']:.1f}",
        "rate of dropout",
        "training less test accuracy (points)",
    )
    sizes = [int(size) for size in runs[0]["noise"]]
    values = [[100 * one["noise"][str(size)] for size in sizes] for one in runs]
    figures.band(right, sizes, values, "batch norm", figures.COLOURS[1], marker="o")
    right.set_xscale("log", base=2)
    figures.logarithmic(right, "y")
    right.set_xticks(sizes, [str(size) for size in sizes])
    ends = [np.mean([row[place] for row in values]) for place in (0, -1)]
    figures.label(
        right,
        f"Noise: {ends[0]:.2g} % in batches of {sizes[0]},\n{ends[1]:.2g} % in batches of {sizes[-1]}",
        "images in a batch (logarithmic)",
        "variance (% of that over images)",
    )
    return drawn


def table(runs: figures.Runs) -> str:
    """All combinations, and the noise."""
    rows = []
    for name, words in NORMALIZATIONS.items():
        for rate in _rates(runs):
            cells = figures.each(runs, "networks", name, rate)
            columns = [[cell[key] for cell in cells] for key in ("training", "test", "training_mode", "switched")]
            trained, tested, noisy, switched = columns
            gaps = verdicts.spread(_gaps(runs, name, rate), ".2f")
            rows.append(
                [
                    f"{words}, dropout {rate}",
                    verdicts.percent(trained),
                    verdicts.percent(tested),
                    gaps,
                    verdicts.percent(noisy),
                    verdicts.spread(switched),
                ]
            )
    header = [
        "",
        "training accuracy (%)",
        "test accuracy (%)",
        "gap (points)",
        "training accuracy in training mode (%)",
    ]
    header.append("probability that moves when the mode is switched")
    sizes = list(runs[0]["noise"])
    noises = [verdicts.percent([one["noise"][size] for one in runs]) for size in sizes]
    words = "Variance of an image's logits over the batches it may stand in, in percent of that over the images:"
    return "\n\n".join(
        [
            figures.markdown(header, rows),
            words,
            figures.markdown(["images in a batch", *sizes], [["noise (%)", *noises]]),
        ]
    )


def verdict(runs: figures.Runs) -> list[verdicts.Verdict]:
    """Whether batch norm narrows the gap, whether dropout still helps beside it, and whether noise falls with size."""
    rates = _rates(runs)
    highest = rates[-1]

    def difference(first_values: list[float], second_values: list[float]) -> list[float]:
        return [a - b for a, b in zip(first_values, second_values, strict=True)]

    gained = {
        name: np.max([difference(_tests(runs, name, rate), _tests(runs, name, "0")) for rate in rates[1:]], axis=0)
        for name in NORMALIZATIONS
    }
    sizes = list(runs[0]["noise"])
    return [
        verdicts.judge(
            "batch norm alone narrows the gap between training and test accuracy",
            difference(_gaps(runs, "without", "0"), _gaps(runs, "with", "0")),
            "Gap without less that with batch norm, no dropout",
            "points",
        ),
        verdicts.judge(
            "batch norm alone makes the test accuracy higher",
            difference(_tests(runs, "with", "0"), _tests(runs, "without", "0")),
            "Test accuracy with less without batch norm, no dropout",
            "points",
        ),
        verdicts.judge(
            "dropout gains less beside batch norm than without it",
            difference(list(gained["without"]), list(gained["with"])),
            "Points of test accuracy that the best rate of dropout gains without, less those with batch norm",
            "points",
        ),
        verdicts.judge_factor(
            "the noise of batch norm is smaller in larger batches",
            [one["noise"][sizes[0]] / one["noise"][sizes[-1]] for one in runs],
            f"Noise in batches of {sizes[0]}, as a multiple of that in batches of {sizes[-1]}",
        ),
        verdicts.judge(
            f"switching the mode moves the output more with dropout {highest} than with batch norm",
            [
                one["networks"]["without"][highest]["switched"] - one["networks"]["with"]["0"]["switched"]
                for one in runs
            ],
            "Probability moved, dropout without batch norm less batch norm without dropout",
        ),
    ]
