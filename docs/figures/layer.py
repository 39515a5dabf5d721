"""Figures of the layer: how moving averages get there, and how many digits are left far from zero."""

import keras
import numpy as np
from matplotlib.figure import Figure

import keras_bn
from models.experiments.figures import COLOURS, panels
from tests.reference import Reference

UPDATES = 600
OFFSETS = [10.0**power for power in range(8)]


def momentum() -> Figure:
    """The moving mean and variance of batches of 32 values of N(3, 2), by what averages them."""
    layers = {
        "momentum=0.99": keras_bn.BatchNormalization(momentum=0.99),
        "momentum=0.99, zero_debias=True": keras_bn.BatchNormalization(momentum=0.99, zero_debias=True),
        "momentum=0.9": keras_bn.BatchNormalization(momentum=0.9),
        "momentum=None": keras_bn.BatchNormalization(momentum=None),
    }
    means: dict[str, list[float]] = {name: [] for name in layers}
    variances: dict[str, list[float]] = {name: [] for name in layers}
    rng = np.random.default_rng(0)
    for _ in range(UPDATES):
        x = rng.normal(3, 2, (32, 1)).astype("float32")
        for name, layer in layers.items():
            layer(x, training=True)
            means[name].append(float(layer.moving_mean[0]))
            variances[name].append(float(layer.moving_variance[0]))
    figure, (left, right) = panels(2, height=3.2)
    for index, name in enumerate(layers):
        left.plot(range(1, UPDATES + 1), means[name], color=COLOURS[index], label=name, linewidth=1.4)
        right.plot(range(1, UPDATES + 1), variances[name], color=COLOURS[index], linewidth=1.4)
    for axes, truth, title in ((left, 3, "moving_mean"), (right, 4, "moving_variance")):
        axes.axhline(truth, color="black", linestyle=":", linewidth=1)
        axes.set(title=title, xlabel="update")
    left.legend(fontsize=8, loc="lower right")
    return figure


def digits() -> Figure:
    """The error of normalized batches of N(offset, 1), by offset."""
    figure, (left, right) = panels(2, height=3.2)
    for axes, training, title in ((left, True, "training"), (right, False, "inference")):
        for (name, kind), colour in zip(
            {"keras.layers": keras.layers.BatchNormalization, "keras_bn": keras_bn.BatchNormalization}.items(),
            (COLOURS[1], COLOURS[0]),
            strict=True,
        ):
            axes.plot(OFFSETS, [_error(kind, offset, training) for offset in OFFSETS], "o-", color=colour, label=name)
        axes.set(title=title, xscale="log", yscale="log", xlabel="offset (standard deviations)")
    left.set_ylabel("largest error of an output")
    left.legend(fontsize=9)
    return figure


def _error(kind: type, offset: float, training: bool) -> float:
    x = np.random.default_rng(0).normal(offset, 1, (64, 8, 8, 4)).astype("float32")
    layer = kind()
    layer.build(x.shape)
    reference = Reference(x, axes=-1)
    layer.moving_mean.assign(reference.batch_mean)
    layer.moving_variance.assign(reference.biased_variance)
    want = reference.y if training else reference.inference(layer.moving_mean.numpy(), layer.moving_variance.numpy())
    return float(np.abs(np.asarray(layer(x, training=training), "float64") - want).max())
