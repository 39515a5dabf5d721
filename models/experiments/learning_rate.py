"""How many fewer steps does batch normalization need, and which learning rates does it bear?"""

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
from models.experiments.images import halved

TITLE = "Steps to the accuracy that the network without batch norm reaches at its own best learning rate"
CLAIM = (
    "With batch norm, learning rates many times as high can be used, and the accuracy of the network without it is "
    "reached in a fraction of the steps: 2.1 million instead of 31 million. Networks of sigmoids, which hardly train "
    "without it, train with it. The scale of the weights does not matter to the output, and larger weights get smaller "
    "gradients."
)
SOURCE = "Ioffe & Szegedy 2015 (arXiv 1502.03167), sections 3.3 and 4.2, figures 2 and 3, there Inception on ImageNet"
FACTORS = (1, 5, 30)
NETWORKS = {"sigmoid_mlp": "sigmoid network", "fashion_cnn": "ReLU network"}
SCALES = (0.01, 0.1, 1.0, 10.0, 100.0)
LEAST = 10


@dataclasses.dataclass(frozen=True)
class Setting:
    """Of the experiment: plain SGD; the convolutional network sees images of half the size."""

    mlp_steps: int
    mlp_every: int
    cnn_steps: int
    cnn_every: int
    mlp_rates: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0)
    cnn_rates: tuple[float, ...] = (0.03, 0.1, 0.3)
    batch_size: int = 60
    mlp_width: int = 100
    cnn_width: int = 8
    test_images: int = 2000
    cost: float = 110.0


FULL = Setting(mlp_steps=6_000, mlp_every=30, cnn_steps=600, cnn_every=20)
QUICK = Setting(
    mlp_steps=1_000,
    mlp_every=50,
    cnn_steps=60,
    cnn_every=20,
    mlp_rates=(0.3, 1.0),
    cnn_rates=(0.1,),
    cnn_width=4,
    test_images=500,
    cost=15.0,
)


def parts(setting: Setting) -> int:
    """How often a run ticks."""
    return len(setting.mlp_rates) + len(setting.cnn_rates) + 2 * len(FACTORS) + 1


def run(setting: Setting, images: ImageData, seed: int, tick: Callable[[], None]) -> dict[str, Any]:
    """Sweep the learning rate without batch norm, and train at multiples of the best with it.

    The best is that of the test accuracy itself, which favours the network without batch norm.

    Returns:
        For each of `NETWORKS`: `best_rate`; `sweep`, the accuracy in the end by rate without batch norm; `target`, the
        best accuracy at the best rate; `curves` and `steps` to the target, by variant. And `scaling`, see there.
    """
    small = halved(images)
    shape = images.x_train.shape[1:]

    def mlp(normalization):
        return networks.sigmoid_mlp(setting.mlp_width, normalization, image_shape=shape)

    def cnn(normalization):
        return networks.fashion_cnn(setting.cnn_width, normalization, image_shape=small.x_train.shape[1:])

    kinds = {"x1": 1.0, "x5": 5.0, "x30": 30.0}
    mlps = {f"batch norm {name}": (mlp, factor) for name, factor in kinds.items()}
    cnns = {f"batch norm {name}": (cnn, factor) for name, factor in kinds.items()}
    cnns["batch norm x5, sigmoid"] = (lambda normalization: with_sigmoids(cnn(normalization)), 5.0)
    compare = {
        "sigmoid_mlp": (images, mlp, mlps, setting.mlp_rates, setting.mlp_steps, setting.mlp_every),
        "fashion_cnn": (small, cnn, cnns, setting.cnn_rates, setting.cnn_steps, setting.cnn_every),
    }
    found: dict[str, Any] = {name: _compared(setting, seed, tick, *rest) for name, rest in compare.items()}
    found["scaling"] = {name: scaling(images.x_train[:60], seed, epsilon) for name, epsilon in EPSILONS.items()}
    return found


EPSILONS = {"epsilon 1e-3": 1e-3, "epsilon 1e-9": 1e-9}


def _compared(setting, seed, tick, images, plain, normalized, rates, steps, every) -> dict[str, Any]:
    count = setting.test_images

    def train(build: Callable[[], keras.Model], rate: float) -> dict[str, list[float]]:
        model = training.seeded(seed, build)
        optimizer = keras.optimizers.SGD(rate)
        trainer = training.Trainer(model, optimizer, images.x_train, images.y_train, setting.batch_size, seed)
        accuracy = training.Accuracy(model, images.x_test[:count], images.y_test[:count])
        seen = training.curve(trainer, accuracy, steps, every)
        tick()
        return seen

    without = {rate: train(lambda: plain(None), rate) for rate in rates}
    best = max(without, key=lambda rate: training.final(without[rate]))
    curves = {"without": without[best]}
    for name, (build, factor) in normalized.items():
        curves[name] = train(lambda build=build: build(keras_bn.BatchNormalization), factor * best)  # type: ignore[misc]
    target = max(curves["without"]["accuracy"])
    return {
        "best_rate": best,
        "sweep": {f"{rate:g}": training.final(seen) for rate, seen in without.items()},
        "target": target,
        "curves": curves,
        "steps": {name: training.steps_to(seen, target) for name, seen in curves.items()},
    }


def with_sigmoids(model: keras.Model) -> keras.Model:
    """The same network with a sigmoid in the place of each ReLU, and weights of its own."""

    def cloned(layer: keras.Layer) -> keras.Layer:
        if isinstance(layer, keras.layers.ReLU):
            return keras.layers.Activation("sigmoid", name=layer.name)
        return layer.__class__.from_config(layer.get_config())

    return keras.models.clone_model(model, clone_function=cloned)


def scaling(images: np.ndarray, seed: int, epsilon: float) -> dict[str, list[float]]:
    """What becomes of output and gradients where the weights before batch norm are scaled by a.

    For BN((a W) u) of a dense layer of 100 units and a random linear function of its output, in float64:

    output = max |BN(aWu) - BN(Wu)|, weight_gradient = a |dl / d(aW)| / |dl / dW|
    input_gradient = |dl / du| with aW / |dl / du| with W

    the last two of which are 1 where section 3.3 of the paper holds.

    Args:
        images: The inputs u.
        seed: Of weights and function.
        epsilon: Of the layer, which the paper's equations leave out.

    Returns:
        `scale`, `output`, `weight_gradient` and `input_gradient`, each with one for each of `SCALES`.
    """
    draws = np.random.default_rng(seed)
    u = tf.constant(images.reshape(len(images), -1).astype("float64"))
    weights = 0.05 * draws.standard_normal((u.shape[1], 100))
    towards = draws.standard_normal((len(images), 100))
    layer = keras_bn.BatchNormalization(epsilon=epsilon, dtype="float64")

    def at(scale: float) -> tuple[np.ndarray, float, float]:
        w = tf.constant(scale * weights)
        with tf.GradientTape() as tape:
            tape.watch([w, u])
            y = layer(u @ w, training=True)
            loss = tf.reduce_sum(y * towards)
        by_w, by_u = tape.gradient(loss, [w, u])
        return np.asarray(y), float(tf.norm(by_w)), float(tf.norm(by_u))

    y, by_w, by_u = at(1.0)
    rows = [(np.abs(other - y).max(), scale * w / by_w, v / by_u) for scale in SCALES for other, w, v in [at(scale)]]
    output, weight_gradient, input_gradient = (list(column) for column in zip(*rows, strict=True))
    return {
        "scale": list(SCALES),
        "output": output,
        "weight_gradient": weight_gradient,
        "input_gradient": input_gradient,
    }


def factors(runs: figures.Runs, network: str, name: str) -> list[float | None]:
    """How many times fewer steps than without batch norm, by seed; None where the target was not reached."""
    steps = [(one[network]["steps"]["without"], one[network]["steps"][name]) for one in runs]
    return [base / other if other else None for base, other in steps]


def best_variant(runs: figures.Runs, network: str) -> str:
    """Of the learning rates with batch norm, the one that gets to the target soonest, over the seeds."""
    names = [f"batch norm x{factor}" for factor in FACTORS]
    return max(
        names, key=lambda name: sum(np.log(factor) if factor else -10 for factor in factors(runs, network, name))
    )


def figure(runs: figures.Runs) -> Figure:
    """Accuracy by step, for both networks."""
    drawn, axes = figures.panels(2, 4.2)
    for panel, (network, words) in zip(axes, NETWORKS.items(), strict=True):
        for name, colour in zip(runs[0][network]["curves"], figures.COLOURS, strict=False):
            curves = figures.each(runs, network, "curves", name)
            figures.band(panel, curves[0]["step"], figures.shares(curves), name, colour)
        target = figures.mean(runs, network, "target")
        panel.axhline(100 * target, color="grey", linewidth=0.8, linestyle=":")
        best = best_variant(runs, network)
        known = [factor for factor in factors(runs, network, best) if factor]
        times = f"{np.exp(np.mean(np.log(known))):.1f} times fewer steps" if known else "not reached"
        title = f"{figures.capital(words)}: {100 * target:.1f} % (dotted)\n{times} with {best}"
        figures.label(panel, title, "training step (logarithmic)", "test accuracy (%)", None)
        figures.logarithmic(panel, "x")
    figures.legend_below(drawn, axes[-1])
    return drawn


def table(runs: figures.Runs) -> str:
    """Steps to the target and accuracies, and what scaled weights do."""
    rows = []
    for network, words in NETWORKS.items():
        for name in runs[0][network]["curves"]:
            ends = [training.final(one[network]["curves"][name]) for one in runs]
            steps = figures.each(runs, network, "steps", name)
            rate = ", ".join(sorted({f"{value:g}" for value in figures.each(runs, network, "best_rate")}))
            shown = f"{name} (rate {rate})" if name == "without" else name
            rows.append([f"{words}, {shown}", verdicts.spread(steps, ".0f"), verdicts.percent(ends)])
            rows[-1].insert(2, verdicts.spread(factors(runs, network, name)))
    header = ["", "steps to the target", "times fewer", "test accuracy in the end (%)"]
    scaled = []
    for name in EPSILONS:
        one = runs[0]["scaling"][name]
        for scale, *rest in zip(*(one[key] for key in one), strict=True):
            scaled.append([f"{name}, a = {scale:g}", *(f"{value:.4g}" for value in rest)])
    scaled_header = [
        "weights scaled by a",
        "largest change of the output",
        "gradient of the weights, times a",
        "gradient of the input",
    ]
    words = "Weights before batch norm scaled by a (float64, seed 0): the gradients as multiples of those at a = 1."
    return "\n\n".join([figures.markdown(header, rows), words, figures.markdown(scaled_header, scaled)])


def verdict(runs: figures.Runs) -> list[verdicts.Verdict]:
    """Whether the target is reached in fewer steps, and whether scale does not matter."""
    found = []
    for network, least in (("sigmoid_mlp", LEAST), ("fashion_cnn", 1)):
        best = best_variant(runs, network)
        times = f"at least {least} times " if least > 1 else ""
        claim = f"the {NETWORKS[network]} needs {times}fewer steps with batch norm"
        what = f"Steps without, as a multiple of those with {best}"
        found.append(verdicts.judge_factor(claim, factors(runs, network, best), what, least))
    ends = [
        [100 * training.final(one["sigmoid_mlp"]["curves"][name]) for one in runs]
        for name in ("without", "batch norm x30")
    ]
    found.append(
        verdicts.judge(
            "the sigmoid network bears 30 times the best learning rate of the one without, and ends no worse",
            [high - low for low, high in zip(*ends, strict=True)],
            "Accuracy in the end at x30 with, less without",
            "points",
        )
    )
    errors = [
        abs(value - 1)
        for one in runs
        for key in ("weight_gradient", "input_gradient")
        for value in one["scaling"]["epsilon 1e-9"][key]
    ]
    exact = max(errors) < 1e-3
    found.append(
        verdicts.Verdict(
            "weights scaled by a leave the output alone and get gradients divided by a",
            verdicts.HELD if exact else verdicts.DID_NOT_HOLD,
            f"Largest relative deviation, a from {min(SCALES):g} to {max(SCALES):g}, epsilon 1e-9: {max(errors):.1e}.",
        )
    )
    return found
