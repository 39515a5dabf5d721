"""Why does batch normalization help: because distributions drift less, or because the loss is smoother?"""

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
from models.experiments.drift import movements, summary, what_sigmoids_are_given

TITLE = "Drift put back on purpose after batch norm, and how smooth the loss is along its gradient"
CLAIM = (
    "Batch norm does not help by keeping distributions steady: with noise after it whose mean and scale change at "
    "every step, distributions drift more than without batch norm, and it trains nearly as well. It helps by making "
    "the loss smoother: along the gradient the loss and the gradient change less."
)
SOURCE = "Santurkar et al. 2018 (arXiv 1805.11604), sections 2.2 and 3, figures 1, 2 and 4, there VGG on CIFAR-10"
VARIANTS = {"without": "without batch norm", "with": "batch norm", "drifting": "batch norm, drift put back"}


@keras.saving.register_keras_serializable(package="models")
class DriftingBatchNormalization(keras_bn.BatchNormalization):
    """Batch normalization, after which in training each step shifts and scales every unit anew, and adds noise.

    y = (1 + spread * a) * BN(x) + spread * b + spread * c

    with a and b drawn for each unit at each step, c for each value, all evenly from [-1, 1]. In inference it is BN(x).

    Args:
        spread: How strong, 0 or more.
        seed: Of the draws.
        **kwargs: Of `keras_bn.BatchNormalization`.
    """

    def __init__(self, spread: float = 1.0, seed: int = 0, **kwargs):
        super().__init__(**kwargs)
        self.spread, self.seed = spread, seed
        self._draws = keras.random.SeedGenerator(seed)

    def call(self, inputs, training=None, mask=None):
        normalized = super().call(inputs, training=training, mask=mask)
        if not training:
            return normalized

        def drawn(shape):
            return keras.random.uniform(shape, -1.0, 1.0, seed=self._draws)

        units = normalized.shape[-1]
        scale, shift = 1.0 + self.spread * drawn((units,)), self.spread * drawn((units,))
        return scale * normalized + shift + self.spread * drawn(keras.ops.shape(normalized))

    def get_config(self):
        return {**super().get_config(), "spread": self.spread, "seed": self.seed}


@dataclasses.dataclass(frozen=True)
class Setting:
    """Of the experiment: `sigmoid_mlp` with plain SGD."""

    steps: int
    every: int
    batch_size: int = 60
    learning_rate: float = 0.3
    width: int = 100
    depth: int = 3
    spread: float = 1.0
    # The steps along the gradient that are looked at, as multiples of the learning rate.
    reaches: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0)
    observed_images: int = 1000
    test_images: int = 10_000
    cost: float = 90.0


FULL = Setting(steps=12_000, every=200)
QUICK = Setting(steps=1200, every=200, test_images=1000, cost=20.0)


def parts(setting: Setting) -> int:
    """How often a run ticks."""
    return len(VARIANTS) * setting.steps // setting.every


def run(setting: Setting, images: ImageData, seed: int, tick: Callable[[], None]) -> dict[str, Any]:
    """Train without batch norm, with it, and with drift put back; look along the gradient meanwhile.

    Returns:
        For each of `VARIANTS` `curve`; `drift`, of what the last sigmoids are given, as in the experiment drift but
        between successive steps; and for each look `loss_range`, `gradient_change` and `smoothness`, see `landscape`.
    """
    return {name: _watched(setting, images, seed, name, tick) for name in VARIANTS}


def _watched(setting: Setting, images: ImageData, seed: int, name: str, tick: Callable[[], None]) -> dict[str, Any]:
    made = iter(range(1000))

    def drifting(name: str) -> keras.Layer:
        return DriftingBatchNormalization(setting.spread, seed=1000 * seed + next(made), name=name)

    normalization = {"without": None, "with": keras_bn.BatchNormalization, "drifting": drifting}[name]
    model = training.seeded(
        seed,
        lambda: networks.sigmoid_mlp(
            setting.width, normalization, depth=setting.depth, image_shape=images.x_train.shape[1:]
        ),
    )
    optimizer = keras.optimizers.SGD(setting.learning_rate)
    trainer = training.Trainer(model, optimizer, images.x_train, images.y_train, setting.batch_size, seed)
    count, observed = setting.test_images, setting.observed_images
    accuracy = training.Accuracy(model, images.x_test[:count], images.y_test[:count])
    given = _given_in_training(model, setting, images.x_train[:observed])
    look_along = landscape(model, setting, images.x_train[:observed], images.y_train[:observed])
    looks: list[dict[str, float]] = []
    moved: list[float] = []

    def look() -> float:
        before = summary(given())
        trainer.train(1)
        after = summary(given())
        moved.append(float(movements(np.stack([before, after])).mean()))
        weights = model.get_weights()
        looks.append(look_along())
        # Looking in training mode moves the statistics.
        model.set_weights(weights)
        return accuracy()

    seen = training.curve(trainer, look, setting.steps, setting.every, tick)
    return {"curve": seen, "drift": moved, **{key: [one[key] for one in looks] for key in looks[0]}}


def _given_in_training(model: keras.Model, setting: Setting, images: np.ndarray) -> Callable[[], tf.Tensor]:
    """As `what_sigmoids_are_given`, with the drift that was put back: in training mode, what that moves put back."""
    if not any(isinstance(layer, DriftingBatchNormalization) for layer in model.layers):
        return what_sigmoids_are_given(model, f"hidden_{setting.depth}", images)
    observed = keras.Model(model.inputs, model.get_layer(f"hidden_{setting.depth}_sigmoid").input)
    held = tf.constant(images)

    @tf.function
    def compute() -> tf.Tensor:
        return observed(held, training=True)

    def given() -> tf.Tensor:
        statistics = [variable.numpy() for variable in model.non_trainable_variables]
        values = compute()
        for variable, value in zip(model.non_trainable_variables, statistics, strict=True):
            if "moving" in variable.path:
                variable.assign(value)
        return values

    return given


def landscape(
    model: keras.Model, setting: Setting, images: np.ndarray, labels: np.ndarray
) -> Callable[[], dict[str, float]]:
    """A function that says how smooth the loss is along its gradient, from where the weights stand.

    With g the gradient at the weights w, and the reach r going through the multiples of the learning rate:
    loss_range = max_r L(w - r g) - min_r L(w - r g), in nats
    gradient_change = max_r |g(w - r g) - g| / |g|
    smoothness = max_r |g(w - r g) - g| / (r |g|), the least Lipschitz constant of the gradient that is seen

    Args:
        model: In training mode, so with the statistics of these images.
        setting: With the `reaches`.
        images: Over which the loss is the mean.
        labels: Theirs.

    Returns:
        A function without arguments, which leaves the trainable weights as they were.
    """
    network, variables = training.logits_of(model), model.trainable_variables
    held, classes = tf.constant(images), tf.constant(labels)

    @tf.function
    def loss_and_gradient() -> tuple[tf.Tensor, list[tf.Tensor]]:
        with tf.GradientTape() as tape:
            loss = training.cross_entropy(network(held, training=True), classes)
        return loss, tape.gradient(loss, [variable.value for variable in variables])

    def norm(tensors: list[np.ndarray]) -> float:
        return float(np.sqrt(sum(np.sum(np.square(tensor, dtype=np.float64)) for tensor in tensors)))

    def look() -> dict[str, float]:
        start = [variable.numpy() for variable in variables]
        loss, gradient = loss_and_gradient()
        here = [tensor.numpy() for tensor in gradient]
        losses, changes, constants = [float(loss)], [], []
        for factor in setting.reaches:
            reach = factor * setting.learning_rate
            for variable, value, slope in zip(variables, start, here, strict=True):
                variable.assign(value - reach * slope)
            loss, gradient = loss_and_gradient()
            change = norm([there.numpy() - slope for there, slope in zip(gradient, here, strict=True)])
            losses.append(float(loss))
            changes.append(change / norm(here))
            constants.append(change / (reach * norm(here)))
        for variable, value in zip(variables, start, strict=True):
            variable.assign(value)
        return {
            "loss_range": max(losses) - min(losses),
            "gradient_change": max(changes),
            "smoothness": max(constants),
        }

    return look


def _ends(runs: figures.Runs, name: str) -> list[float]:
    return [100 * training.final(one[name]["curve"]) for one in runs]


def _means(runs: figures.Runs, name: str) -> list[float]:
    """Accuracy over the whole training: the sooner it is learned, the higher."""
    return [100 * float(np.mean(one[name]["curve"]["accuracy"])) for one in runs]


def _learned(runs: figures.Runs, name: str, key: str) -> list[float]:
    """Of each seed the median over the second half, when all networks have left the plateau of the beginning."""
    return [float(np.median(one[name][key][len(one[name][key]) // 2 :])) for one in runs]


def figure(runs: figures.Runs) -> Figure:
    """Accuracy, drift, and smoothness by step."""
    drawn, (left, middle, right) = figures.panels(3, 3.9)
    for (name, words), colour in zip(VARIANTS.items(), figures.COLOURS, strict=False):
        curves = figures.each(runs, name, "curve")
        steps = curves[0]["step"]
        figures.band(left, steps, figures.shares(curves), words, colour)
        figures.band(middle, steps, figures.each(runs, name, "drift"), words, colour)
        # The noise of two looks along the gradient differs, which is no change of the loss that is trained on.
        if name != "drifting":
            figures.band(right, steps, figures.each(runs, name, "smoothness"), words, colour)
    means = {name: np.mean(_means(runs, name)) for name in VARIANTS}
    words = f"Mean {means['without']:.1f} %, with batch norm {means['with']:.1f} %,"
    words += f"\ndrift put back {means['drifting']:.1f} %"
    figures.label(left, words, figures.STEPS, "test accuracy (%)", None)
    drift = {name: np.mean(_learned(runs, name, "drift")) for name in VARIANTS}
    figures.label(
        middle,
        f"Drift put back: {drift['drifting'] / drift['without']:.2g} times\nthat without batch norm",
        figures.STEPS,
        "drift (deviations a step, logarithmic)",
        None,
    )
    smooth = {name: np.mean(_learned(runs, name, "smoothness")) for name in VARIANTS}
    figures.label(
        right,
        f"Change of the gradient with batch\nnorm: {smooth['with'] / smooth['without']:.2g} times that without",
        figures.STEPS,
        "change of the gradient by way (logarithmic)",
        None,
    )
    for axes in (middle, right):
        figures.logarithmic(axes, "y")
    figures.legend_below(drawn, left)
    return drawn


def table(runs: figures.Runs) -> str:
    """Accuracy and drift of the three, and smoothness of the two without noise."""
    keys = ("loss_range", "gradient_change", "smoothness")
    rows = [
        [
            words,
            verdicts.spread(_means(runs, name), ".2f"),
            verdicts.spread(_ends(runs, name), ".2f"),
            verdicts.spread(_learned(runs, name, "drift")),
            *("" if name == "drifting" else verdicts.spread(_learned(runs, name, key)) for key in keys),
        ]
        for name, words in VARIANTS.items()
    ]
    header = [
        "medians of the second half",
        "test accuracy, mean over the training (%)",
        "test accuracy in the end (%)",
        "drift (deviations a step)",
        "range of the loss along the gradient (nats)",
        "change of the gradient along itself (relative)",
        "change of the gradient by way",
    ]
    return figures.markdown(header, rows)


def verdict(runs: figures.Runs) -> list[verdicts.Verdict]:
    """Whether drift matters, and whether batch norm makes the loss smoother."""

    def ratio(first_name: str, second_name: str, key: str) -> list[float]:
        pairs = zip(_learned(runs, first_name, key), _learned(runs, second_name, key), strict=True)
        return [a / b for a, b in pairs]

    plain, normal, drifting = (_means(runs, name) for name in ("without", "with", "drifting"))
    kept = [2 * c - a - b for a, b, c in zip(plain, normal, drifting, strict=True)]
    return [
        verdicts.judge_factor(
            "the drift put back is larger than that without batch norm",
            ratio("drifting", "without", "drift"),
            "Drift put back, as a multiple of that without batch norm",
        ),
        verdicts.judge(
            "with the drift put back, most of what batch norm gains is still there",
            kept,
            "Accuracy, the mean over the training: what is still gained less what is lost",
            "points",
        ),
        verdicts.judge(
            "the drift put back costs something",
            [b - c for b, c in zip(normal, drifting, strict=True)],
            "Accuracy, the mean over the training, with batch norm less that with drift put back",
            "points",
        ),
        verdicts.judge_factor(
            "with batch norm the gradient changes less along itself",
            ratio("without", "with", "smoothness"),
            "Change by way without, as a multiple of that with batch norm",
        ),
        verdicts.judge_factor(
            "with batch norm the loss varies less along the gradient",
            ratio("without", "with", "loss_range"),
            "Range of the loss without, as a multiple of that with batch norm",
        ),
    ]
