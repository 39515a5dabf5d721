"""Which statistics are best for images that are not as those of the training, and does `drift` tell such images?"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from matplotlib.figure import Figure

import keras_bn
from models import networks
from models.data import ImageData
from models.experiments import figures, training, verdicts
from models.experiments.corruptions import CORRUPTIONS, STRENGTHS, corrupt
from models.experiments.images import first, halved

TITLE = "Corrupted test images: accuracy by the statistics that normalize them, and what the drift foretells"
CLAIM = (
    "On corrupted images, batch norm with the statistics of the corrupted images themselves is more accurate than with "
    "those of the training; a mixture of both is proposed where they are few; on clean images it costs a little. The "
    "distance of the statistics foretells the loss of accuracy without any label."
)
SOURCE = (
    "Schneider et al. 2020 (arXiv 2006.16971); Nado et al. 2020 (arXiv 2006.10963); Wang et al. 2021 (arXiv "
    "2006.10726), of whose method this is the first half: no weight is trained here"
)
MODES = {"population": "population", "batch": "the batch's", "mixed": "half and half"}
# What a person who asks a server would want to be told of, in points of accuracy.
LOST = 10.0


@dataclasses.dataclass(frozen=True)
class Setting:
    """Of the experiment: `fashion_cnn` on images of half the size, corrupted before they are halved."""

    steps: int
    test_images: int
    strengths: tuple[int, ...] = STRENGTHS
    batch_size: int = 64
    learning_rate: float = 0.003
    width: int = 8
    # That normalize each other, and that drift and mixture are measured on.
    images_together: int = 200
    cost: float = 90.0


FULL = Setting(steps=1200, test_images=2000)
QUICK = Setting(steps=150, test_images=400, strengths=(2, 5), width=4, cost=25.0)


def parts(setting: Setting) -> int:
    """How often a run ticks."""
    return 10 + 1 + len(CORRUPTIONS) * len(setting.strengths)


def run(setting: Setting, images: ImageData, seed: int, tick: Callable[[], None]) -> dict[str, Any]:
    """Train on clean images, recalibrate, and test on corrupted ones.

    Returns:
        `clean`, the accuracy in each of `MODES`; and for each corruption and strength `name`, `strength`, the accuracy
        in each mode, and `drift`: the divergence in nats, the mean over the layers.
    """
    used = first(images, len(images.x_train), setting.test_images)
    small = halved(used)
    model = training.seeded(seed, lambda: networks.fashion_cnn(setting.width, image_shape=small.x_train.shape[1:]))
    optimizer = keras.optimizers.Adam(setting.learning_rate)
    trainer = training.Trainer(model, optimizer, small.x_train, small.y_train, setting.batch_size, seed)
    for _ in range(10):
        trainer.train(setting.steps // 10)
        tick()
    keras_bn.recalibrate(model, small.x_train[:2000], batch_size=500, verbose=0)
    mixed = keras.models.clone_model(model)
    tests = {"population": AccuracyOn(model, "moving", setting), "batch": AccuracyOn(model, "batch", setting)}
    tests["mixed"] = AccuracyOn(mixed, "moving", setting)

    def measure(test_images: np.ndarray) -> dict[str, float]:
        mix(mixed, model, test_images[: setting.images_together])
        accuracies = {name: test(test_images, small.y_test) for name, test in tests.items()}
        rows = keras_bn.drift(model, test_images[: setting.images_together], batch_size=setting.images_together)
        return {**accuracies, "drift": float(np.mean([row["kl"] for row in rows]))}

    clean = measure(small.x_test)
    tick()
    corrupted = []
    for name in CORRUPTIONS:
        for strength in setting.strengths:
            spoilt = dataclasses.replace(
                used, x_test=corrupt(used.x_test, name, strength, seed), x_train=used.x_train[:1]
            )
            corrupted.append({"name": name, "strength": strength, **measure(halved(spoilt).x_test)})
            tick()
    return {"clean": clean, "corrupted": corrupted}


class AccuracyOn:
    """The accuracy on any images, with the statistics of the population or of the images that are tested together.

    Args:
        model: The network.
        statistics: "moving" or "batch", as for `keras_bn.use_statistics`.
        setting: With `images_together`.
    """

    def __init__(self, model: keras.Model, statistics: str, setting: Setting):
        import tensorflow as tf

        network = training.logits_of(model)
        self._size = setting.images_together

        @tf.function
        def answers(images: tf.Tensor) -> tf.Tensor:
            return tf.argmax(network(images, training=False), 1)

        # Traced while the switch is on, which a function of its own keeps to.
        with keras_bn.use_statistics(model, statistics):
            self._answers = answers.get_concrete_function(tf.TensorSpec([None, *model.input_shape[1:]], tf.float32))
        self._constant = tf.constant

    def __call__(self, images: np.ndarray, labels: np.ndarray) -> float:
        parts = [images[begin : begin + self._size] for begin in range(0, len(images), self._size)]
        answers = np.concatenate([self._answers(self._constant(part)).numpy() for part in parts])
        return float(np.mean(answers == labels))


def mix(mixed: keras.Model, model: keras.Model, images: np.ndarray) -> None:
    """Give `mixed` the weights of `model`, and statistics half way between its own and those of `images`."""
    mixed.set_weights(model.get_weights())
    keras_bn.recalibrate(mixed, images, batch_size=len(images), order="joint", verbose=0)
    halves = [(a + b) / 2 for a, b in zip(model.get_weights(), mixed.get_weights(), strict=True)]
    # All weights but the statistics are the same in both.
    mixed.set_weights(halves)


def rank_correlation(first_values: Sequence[float], second_values: Sequence[float]) -> float:
    """Spearman's: Pearson's of the ranks, equal values sharing the mean of theirs."""

    def ranks(values: Sequence[float]) -> np.ndarray:
        array = np.asarray(values)
        return np.array([(array < value).sum() + ((array == value).sum() - 1) / 2 for value in array])

    return float(np.corrcoef(ranks(first_values), ranks(second_values))[0, 1])


def losses(one: Any) -> tuple[list[float], list[float]]:
    """Of a run: the drift, and the points of accuracy lost with population statistics, by corruption and strength."""
    drifts = [row["drift"] for row in one["corrupted"]]
    return drifts, [100 * (one["clean"]["population"] - row["population"]) for row in one["corrupted"]]


def best_threshold(runs: figures.Runs) -> tuple[float, float, float]:
    """The drift above which to warn, chosen where most of what is lost is told and least else, over all seeds.

    Returns:
        The threshold in nats, the share of sets with a loss of `LOST` points or more that are above it, and the share
        of the others that are.
    """
    pairs = [pair for one in runs for pair in zip(*losses(one), strict=True)]
    drifts, lost = np.array([drift for drift, _ in pairs]), np.array([loss >= LOST for _, loss in pairs])

    def rates(threshold: float) -> tuple[float, float]:
        above = drifts >= threshold
        return float(above[lost].mean()) if lost.any() else 0.0, float(above[~lost].mean()) if (~lost).any() else 0.0

    best = max(sorted(drifts), key=lambda threshold: np.subtract(*rates(threshold)))
    return float(best), *rates(best)


def _mean_accuracy(one: Any, mode: str) -> float:
    return 100 * float(np.mean([row[mode] for row in one["corrupted"]]))


def figure(runs: figures.Runs) -> Figure:
    """Accuracy by corruption in each mode, and the loss by drift."""
    drawn, (left, right) = figures.panels(2, 4.6)
    names = list(CORRUPTIONS)
    places = np.arange(len(names))
    for number, (mode, words) in enumerate(MODES.items()):
        by_seed = np.array([[100 * _of(one, name, mode) for name in names] for one in runs])
        means = by_seed.mean(axis=0)
        ends = np.abs(np.stack([by_seed.min(axis=0), by_seed.max(axis=0)]) - means)
        left.barh(
            places + 0.27 * (number - 1),
            means,
            0.25,
            xerr=ends,
            label=words,
            color=figures.COLOURS[number],
            ecolor="#333333",
        )
    left.set_yticks(places, names)
    left.invert_yaxis()
    means = {mode: np.mean([_mean_accuracy(one, mode) for one in runs]) for mode in MODES}
    figures.label(
        left,
        f"Corrupted: {means['population']:.1f} % with population statistics,\n{means['batch']:.1f} % with the batch's, "
        f"{means['mixed']:.1f} % half and half",
        "test accuracy, the mean over the strengths (%)",
        "corruption",
        None,
    )
    figures.legend_below(drawn, left)
    for number, name in enumerate(names):
        rows = [
            pair
            for one in runs
            for row, pair in zip(one["corrupted"], zip(*losses(one), strict=True), strict=True)
            if row["name"] == name
        ]
        colour = figures.COLOURS[number % len(figures.COLOURS)]
        drifts, lost = zip(*rows, strict=True)
        right.scatter(drifts, lost, s=16, color=colour, marker="os"[number // len(figures.COLOURS)], label=name)
    threshold, told, false = best_threshold(runs)
    right.axvline(threshold, color="grey", linestyle="--", linewidth=0.9)
    right.axhline(LOST, color="grey", linestyle=":", linewidth=0.9)
    correlation = np.mean([rank_correlation(*losses(one)) for one in runs])
    figures.label(
        right,
        f"Rank correlation {correlation:.2f}; above {threshold:.2g} nats: {100 * told:.0f} %\n"
        f"of losses over {LOST:g} points, {100 * false:.0f} % of the others",
        "drift (nats, logarithmic)",
        "accuracy lost (points)",
        "upper left",
    )
    figures.logarithmic(right, "x")
    return drawn


def _of(one: Any, name: str, mode: str) -> float:
    return float(np.mean([row[mode] for row in one["corrupted"] if row["name"] == name]))


def table(runs: figures.Runs) -> str:
    """Accuracy by corruption and mode."""
    rows = [["clean images", *(verdicts.percent(figures.each(runs, "clean", mode)) for mode in MODES), ""]]
    for name in CORRUPTIONS:
        drifts = [np.mean([row["drift"] for row in one["corrupted"] if row["name"] == name]) for one in runs]
        rows.append(
            [
                name,
                *(verdicts.percent([_of(one, name, mode) for one in runs]) for mode in MODES),
                verdicts.spread(drifts),
            ]
        )
    rows.append(
        [
            "all corruptions",
            *(verdicts.spread([_mean_accuracy(one, mode) for one in runs], ".2f") for mode in MODES),
            "",
        ]
    )
    threshold, told, false = best_threshold(runs)
    words = (
        f"A server that warns above a drift of {threshold:.2g} nats would have told of {100 * told:.0f} % of the sets "
        f"that lose {LOST:g} points or more, and of {100 * false:.0f} % of the others (chosen on these sets)."
    )
    header = ["test accuracy (%) with statistics of", *MODES.values(), "drift (nats)"]
    return f"{figures.markdown(header, rows)}\n\n{words}"


def verdict(runs: figures.Runs) -> list[verdicts.Verdict]:
    """Whether the batch's statistics help, what they cost, and whether drift foretells the loss."""

    def more(mode: str, other: str) -> list[float]:
        return [_mean_accuracy(one, mode) - _mean_accuracy(one, other) for one in runs]

    cost = [100 * (one["clean"]["population"] - one["clean"]["batch"]) for one in runs]
    return [
        verdicts.judge(
            "on corrupted images the batch's statistics are better than the population's",
            more("batch", "population"),
            "Mean accuracy with the batch's less that with the population's",
            "points",
        ),
        verdicts.judge(
            "statistics half and half are better than the population's",
            more("mixed", "population"),
            "Mean accuracy half and half less that with the population's",
            "points",
        ),
        verdicts.judge(
            "statistics half and half are better than the batch's",
            more("mixed", "batch"),
            "Mean accuracy half and half less that with the batch's",
            "points",
        ),
        verdicts.judge(
            "on clean images the batch's statistics cost accuracy",
            cost,
            "With the population's less the batch's",
            "points",
        ),
        verdicts.judge(
            "the drift foretells the loss of accuracy",
            [rank_correlation(*losses(one)) for one in runs],
            "Rank correlation of drift and loss over corruptions and strengths",
        ),
    ]
