"""health(): what ails a model's normalizations, as an object, as a table and as a picture."""

from os import PathLike
from typing import Any, NamedTuple

import keras
import numpy as np

from keras_bn import arguments
from keras_bn.drift.figures import distance, plain, summary
from keras_bn.model import affine_weights, broken_weights, check_model, named_batch_norms, statistics_of
from keras_bn.names import shown
from keras_bn.population import VERBOSE
from keras_bn.population.accumulator import Accumulator
from keras_bn.population.batches import Batches
from keras_bn.population.measurement import measure_leniently
from keras_bn.state import variables_restored
from keras_bn.tables import table

# Below these, a channel is called dead.
SMALL_GAMMA = 1e-3
SMALL_VARIANCE = 1e-2  # times epsilon

# A normalization is named for a gap between training and validation from this divergence on, in nats.
NOTABLE_KL = 0.01


def health(
    model: keras.Model, data: Any = None, steps: int | None = None, *, batch_size: int = 32, verbose: int | str = "auto"
) -> "Health":
    """Looks at every batch normalization: dead channels, broken statistics, and whether they fit the data.

    With `data`, each layer's input is measured as in training, its predecessors on batch statistics, and compared:

    kl = mean over channels of KL(population, moving statistics): what evaluation suffers
    batch_kl = mean over channels and batches of KL(batch, population): what training is used to

    A layer whose `kl` is above both `batch_kl` and 0.01 nats is named for a gap between training and validation. See
    `keras_bn.drift.distance` for KL. Variances are biased. The model is left as it is; while it is measured, its calls
    are replaced and all functions of the process run eagerly: do not use it in another thread until then.

    Args:
        model: a built Keras model.
        data: optional, what the model was trained on, as for `recalibrate`.
        steps: number of batches of `data`, or None for all.
        batch_size: for arrays; that of training.
        verbose: 0 for no progress, 1 for a bar, 2 for a line at its end; "auto" for a bar on terminals and in notebooks
            and else the line.

    Returns:
        A `Health`; prints as a table.

    Raises:
        TypeError: when `model` or `data` is of the wrong type.
        ValueError: when `model` is not built, or an argument is not allowed.
    """
    check_model(model, built=True)
    arguments.choice("verbose", verbose, VERBOSE)
    if data is None and steps is not None:
        raise ValueError(
            "`steps` must be None without `data`, whose batches it counts; give both. "
            f"Received: steps={shown(steps)}, data=None."
        )
    batches = None if data is None else Batches(data, steps, batch_size)
    layers = named_batch_norms(model)
    statistics = {name: statistics_of(layer) for name, layer in layers.items()}
    accumulators: dict[str, Accumulator] = {}
    skipped: dict[str, int] = {}
    if batches is not None:
        with variables_restored(model):
            accumulators, skipped = measure_leniently(model, layers, batches.settled(model), verbose)
    rows = []
    for name, layer in layers.items():
        mean, variance = statistics[name]
        gamma, _ = affine_weights(layer)
        measured: dict[str, float] = {}
        if name in accumulators:
            population = accumulators[name].population("pooled")
            one = distance(population.mean, population.variance, mean, variance, layer.epsilon)
            divergence = accumulators[name].batch_divergence(population.mean, population.variance)
            measured = {**plain(summary(one)), "batch_kl": float(np.mean(divergence))}
        rows.append(
            LayerHealth(
                name=name,
                channels=mean.size,
                small_gamma=np.flatnonzero(np.abs(gamma) < SMALL_GAMMA).tolist(),
                small_variance=np.flatnonzero((variance >= 0) & (variance < SMALL_VARIANCE * layer.epsilon)).tolist(),
                negative_variance=tuple(np.flatnonzero(variance < 0).tolist()),
                non_finite=np.flatnonzero(~np.isfinite(mean) | ~np.isfinite(variance)).tolist(),
                non_finite_batches=skipped.get(name, 0),
                unmeasured=batches is not None and name not in accumulators,
                **measured,
            )
        )
    # Where data comes through finite, a mask may hide them.
    reached = batches is None or skipped
    return Health(rows, tuple(broken_weights(model)) if reached else ())


class LayerHealth(NamedTuple):
    """One layer's; the numbers that need data are NaN without.

    Attributes:
        name: the layer's, with the names of the nested models around it.
        channels: how many.
        small_gamma: indices of the channels that gamma switches off.
        small_variance: indices of the channels that hardly vary.
        non_finite: indices of the channels with a NaN or infinite moving statistic.
        non_finite_batches: number of batches with a non-finite value at the input of this layer first.
        negative_variance: indices of the channels whose moving variance is below 0, which gives NaN.
        unmeasured: whether there was data, but nothing finite of it that counts came to this layer.
        mean_shift: of the population from the moving mean, root mean square over channels, in standard deviations.
        variance_ratio: population's to moving variance, that of the channel farthest from 1.
        kl: divergence of the population from the moving statistics, nats, mean over channels.
        batch_kl: divergence of the batches from the population, nats, mean over channels and batches.
    """

    name: str
    channels: int
    small_gamma: list[int]
    small_variance: list[int]
    non_finite: list[int]
    non_finite_batches: int
    unmeasured: bool = False
    negative_variance: tuple[int, ...] = ()
    mean_shift: float = float("nan")
    variance_ratio: float = float("nan")
    kl: float = float("nan")
    batch_kl: float = float("nan")

    @property
    def dead(self) -> list[int]:
        """Indices of the channels of small gamma or small variance."""
        return sorted({*self.small_gamma, *self.small_variance})


class Health(NamedTuple):
    """What `health` found; prints as a table with what to do about it."""

    layers: list[LayerHealth]
    broken_weights: tuple[str, ...] = ()

    @property
    def suspects(self) -> list[str]:
        """Layers whose moving statistics explain a gap between training and validation, the worst first."""
        found = [one for one in self.layers if one.kl > max(NOTABLE_KL, one.batch_kl)]
        return [one.name for one in sorted(found, key=lambda one: -one.kl)]

    @property
    def findings(self) -> list[str]:
        """Sentences a person can act on; none for a healthy model."""
        said = []
        if self.broken_weights:
            said.append(
                f"Weights are not finite: {', '.join(self.broken_weights)}. No data mends them: train again, with a "
                "lower learning rate, or go back to an earlier checkpoint."
            )
        for one in self.layers:
            if one.non_finite:
                said.append(f"{one.name}: {len(one.non_finite)} channels have non-finite statistics; recalibrate.")
            if one.negative_variance:
                said.append(
                    f"{one.name}: {len(one.negative_variance)} channels have a moving variance below 0; recalibrate."
                )
            if one.non_finite_batches and not self.broken_weights:
                said.append(f"{one.name}: {one.non_finite_batches} batches of the data are not finite here; mend them.")
            if one.unmeasured:
                said.append(
                    f"{one.name}: nothing of the data that counts and is finite gets here; it was not measured."
                )
            if one.dead:
                said.append(
                    f"{one.name}: {len(one.dead)} of {one.channels} channels are dead "
                    f"(gamma near 0: {len(one.small_gamma)}, variance near 0: {len(one.small_variance)})."
                )
        if self.suspects:
            said.append(
                "Moving statistics far from the population, evaluation differs from training because of: "
                f"{', '.join(self.suspects)}. Recalibrate, or train longer or with a lower momentum."
            )
        return said

    def to_dict(self) -> dict[str, Any]:
        """For JSON; numbers that were not measured are None."""
        layers = [{k: None if v != v else v for k, v in one._asdict().items()} for one in self.layers]
        return {"layers": layers, "suspects": self.suspects, "findings": self.findings}

    def __str__(self) -> str:
        headers = ["layer", "channels", "dead"]
        rows = [[o.name, o.channels, len(o.dead)] for o in self.layers]
        if any(one.unmeasured or not np.isnan(one.kl) for one in self.layers):  # There was data.
            headers += ["mean shift", "variance ratio", "KL", "batch KL"]
            for row, o in zip(rows, self.layers, strict=True):
                row += [o.mean_shift, o.variance_ratio, o.kl, o.batch_kl]
        return "\n".join([table(headers, rows), *self.findings])

    def save_picture(self, path: str | PathLike[str]) -> None:
        """Draws each layer's distance of the population from the moving statistics, beside that of the batches.

        Args:
            path: where to, with the ending of the format (`.png`, `.svg`).

        Raises:
            ImportError: without matplotlib.
            ValueError: when `health` was called without data.
        """
        if all(np.isnan(one.kl) for one in self.layers):
            raise ValueError("`data` must have been given to `health` for a picture of distances. Received: data=None.")
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("`save_picture` needs matplotlib: pip install matplotlib") from error
        figure = Figure(figsize=(8, 1.2 + 0.3 * len(self.layers)), layout="constrained")
        axes = figure.subplots()
        at = np.arange(len(self.layers))
        floor = 1e-8  # A logarithmic axis has no place for 0.
        axes.barh(at - 0.2, [max(o.kl, floor) for o in self.layers], 0.4, label="population from moving statistics")
        axes.barh(at + 0.2, [max(o.batch_kl, floor) for o in self.layers], 0.4, label="batches from population")
        axes.axvline(NOTABLE_KL, color="gray", linestyle=":")
        axes.set(
            xscale="log", xlabel="KL divergence, nats, mean over channels", yticks=at, title="Batch normalizations"
        )
        axes.set_yticklabels([one.name for one in self.layers])
        axes.invert_yaxis()
        axes.legend()
        figure.savefig(path)
