"""recalibrate(): the moving statistics become those of the whole population, exactly."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np

from keras_bn import arguments
from keras_bn.drift.figures import distance, plain, summary
from keras_bn.model import check_model, check_statistics, required_batch_norms, set_statistics, statistics_of
from keras_bn.names import listed, shown
from keras_bn.population.accumulator import METHODS
from keras_bn.population.batches import Batches
from keras_bn.population.measurement import measure_as_it_stands, measure_joint, measure_repeated, measure_sequential
from keras_bn.population.moments import Moments
from keras_bn.population.report import RecalibratedLayer, Recalibration
from keras_bn.population.workers import Workers
from keras_bn.state import variables_restored
from keras_bn.statistics import has_variance
from keras_bn.warning import warn

ORDERS = ("sequential", "joint")
VERBOSE = (0, 1, 2, "auto")


def recalibrate(
    model: keras.Model,
    data: Any,
    steps: int | None = None,
    *,
    method: str = "pooled",
    order: str = "sequential",
    layers: Sequence[str] | None = None,
    tolerance: float | None = None,
    batch_size: int = 32,
    verbose: int | str = "auto",
) -> Recalibration:
    """Replaces the moving statistics of every batch normalization, ours and stock Keras's, by the population's.

    `"pooled"`, with moments merged in float64 by Chan's formula, so that the split into batches does not matter:

    moving_mean = sum(x) / N, moving_variance = sum((x - moving_mean)**2) / N (biased, over all N values)

    `"algorithm2"`, the paper's, an average over batches b of m_b values each:

    moving_mean = mean_b(mean_b), moving_variance = mean_b(sum((x - mean_b)**2) / (m_b - 1)) (unbiased, per batch)

    `"sequential"` measures each layer while those before it already normalize with population statistics, which is
    exact for inference; it goes through the data once for each of n normalizations, each time only as far as that
    layer: about n / 2 forward passes. `"joint"` goes through the data once, each layer fed by predecessors that
    normalize with batch statistics: one forward pass. Where sequential takes too long, fewer batches do (`steps`,
    `tolerance`).
    All other layers (dropout, augmentation) run in inference mode, frozen normalizations are measured like the others.
    A layer that is called several times gets the statistics of all its calls; where one of them feeds another no order
    is exact, and the report says how far off it is.

    Of data that is distributed among replicas each replica's part is a batch. A model made in the scope of a strategy
    of several worker processes is recalibrated by all of them together: each calls this with a share of the data, at
    least one batch, and all get the statistics of all shares, the same bit for bit.

    While it measures, the model's calls are replaced and all functions of the process run eagerly: do not use the model
    in another thread until it is through. On any exception, also Ctrl-C, the model is as it was, bit for bit.

    Args:
        model: a built Keras model of any kind.
        data: an array, for several inputs a list, a dictionary or the structure that the model takes, or a tuple of
            such inputs, targets and weights or shorter; a `tf.data.Dataset`, also as a strategy distributes it,
            `keras.utils.PyDataset`, generator or iterable of batches, each the inputs or a tuple `(inputs, targets,
            sample_weight)` or shorter. A list of arrays is batches where the model has one input, a tuple of arrays is
            inputs where it has as many and tells them; lists of numbers are no arrays. Targets are not
            looked at, but beside arrays there have to be as many. A sample of weight 2 counts as two, one of weight
            0 not at all, and masks are obeyed; for the unbiased variances of `"algorithm2"` floats are reliabilities,
            as the `mask` of the layer.
        steps: number of batches, or None for all.
        method: `"pooled"` or `"algorithm2"`.
        order: `"sequential"` or `"joint"`.
        layers: names of the normalizations that are measured, as the report has them; the others keep what they have.
            Default: all.
        tolerance: for batches of shuffled data: a layer is measured until the standard error of its mean, in standard
            deviations, and that of its variance, relative, are below this in every channel, estimated from ten batches
            or more as draws of the population. Where the data end before, the statistics are those of all of it, and
            the report and a warning say so. Default: all batches.
        batch_size: for arrays.
        verbose: 0 for no progress, 1 for a bar, 2 for a line at its end; "auto" for a bar on terminals and in notebooks
            and else the line.

    Returns:
        A `Recalibration` with the old and new statistics of each layer and their distance; prints as a table.

    Raises:
        TypeError: when `model` or `data` is of the wrong type.
        ValueError: when an argument is not allowed, the model has no batch normalization, `data` is empty or a
            subclassed model's list of arrays (inputs or batches?), or a batch makes a layer's input non-finite; the
            batch and the layer are named. Of several workers all raise one when one does.

    Reference: Ioffe & Szegedy 2015 (arXiv 1502.03167), Algorithm 2; Wu & Johnson 2021 (arXiv 2105.07576), "precise BN".
    """
    check_model(model, built=True)
    workers = Workers(model)

    def prepared() -> tuple[float | None, dict[str, keras.layers.BatchNormalization], list[str], Batches]:
        bound = check_options(method, order, verbose, tolerance, layers)
        if bound is not None and workers.count > 1:
            raise ValueError(
                "`tolerance` must be None for a model that several workers train: each would stop at another batch. "
                f"Take as many batches on each with `steps`. Received: tolerance={bound}."
            )
        batches = data if isinstance(data, Batches) else Batches(data, steps, batch_size)
        return bound, *chosen(model, layers), batches.settled(model)

    # What is wrong with the arguments of one worker, an empty share say, the others hear of, and wait for nothing.
    tolerance, norms, targets, batches = workers.together(prepared)
    workers.check_same(method=method, order=order)
    old = {name: statistics_of(norms[name]) for name in targets}
    measure_all = measure_joint if order == "joint" else measure_sequential
    with variables_restored(model, only_on_error=True):
        new = measure_all(model, norms, targets, batches, method, verbose, tolerance)
        for name, population in new.items():
            check_statistics("data", name, norms[name], population.mean, population.variance)
            set_statistics(norms[name], population.mean, population.variance)
        _warn_of_single_values("data", [name for name, population in new.items() if not population.has_variance])
        seen = measure_repeated(model, norms, targets, batches, verbose) if order == "sequential" else {}
        report = Recalibration(
            method=method,
            order=order,
            layers=[
                RecalibratedLayer(
                    name,
                    *population[:3],
                    *old[name],
                    norms[name].epsilon,
                    *((None, None) if tolerance is None else population[3:5]),
                )
                for name, population in new.items()
            ],
            not_called=[name for name in targets if name not in new],
            unsettled={
                name: plain(
                    summary(distance(one.mean, one.variance, *statistics_of(norms[name]), norms[name].epsilon))
                )["kl"]
                for name, one in seen.items()
            },
            tolerance=tolerance,
        )
        if report.short_of_tolerance:
            warn(
                f"`tolerance` was not reached. {report.shortfall()} Give more batches of shuffled data, or a larger "
                "tolerance; with None all batches are taken and nothing is asked of them."
            )
    return report


def measure(
    model: keras.Model,
    data: Any,
    steps: int | None = None,
    *,
    layers: Sequence[str] | None = None,
    batch_size: int = 32,
    verbose: int | str = "auto",
) -> dict[str, Moments]:
    """Measures what every batch normalization is given for `data`, in inference mode, with the statistics it has now.

    count = sum(w), mean = sum(w * x) / count, m2 = sum(w * (x - mean)**2)

    in float64, per channel. Moments of parts of the data, wherever they were measured, merge exactly with `+`, go
    through JSON with `to_dict` (and back with `keras_bn.Moments(**parsed)`), and become moving statistics with
    `apply_statistics`. One layer after the other, in the order they are called, that is `recalibrate` over data that is
    in several places:

    ```python
    for name in keras_bn.measure(model, shards[0], steps=1):
        keras_bn.apply_statistics(model, *[keras_bn.measure(model, shard, layers=[name]) for shard in shards])
    ```

    The model is left as it was, but do not use it in another thread meanwhile. It measures what is in this process: of
    data that is distributed among replicas their parts here, of a model of several workers this worker's share.

    Args:
        model: as for `recalibrate`.
        data: likewise.
        steps: likewise.
        layers: likewise.
        batch_size: likewise.
        verbose: likewise.

    Returns:
        The `keras_bn.Moments` of each layer that was called, by name, in the order of the calls.

    Raises:
        TypeError: as `recalibrate`.
        ValueError: likewise.

    Reference: Chan, Golub & LeVeque 1979, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances".
    """
    check_model(model, built=True)
    arguments.choice("verbose", verbose, VERBOSE)
    norms, targets = chosen(model, layers)
    with variables_restored(model):
        parts = measure_as_it_stands(model, norms, targets, Batches(data, steps, batch_size).settled(model), verbose)
    return {name: Moments(*part) for name, part in parts.items()}


def apply_statistics(model: keras.Model, *measured: Mapping[str, Moments]) -> None:
    """Gives the batch normalizations of `model` the statistics that were measured, of all parts together.

    moving_mean = mean, moving_variance = m2 / count (biased)

    Args:
        model: a built Keras model of any kind.
        *measured: what `measure` returned, for each part of the data; layers that are in none keep what they have.

    Raises:
        TypeError: when `model` is no Keras model, or something measured is not a mapping of `keras_bn.Moments`.
        ValueError: when the model has no layer of such a name with as many channels, or nothing was measured or
            counted.
    """
    check_model(model, built=True)
    norms = required_batch_norms(model)
    together: dict[str, Moments] = {}
    if not measured:
        raise ValueError("`measured` must be what `keras_bn.measure` returned, once at least. Received: nothing.")
    for part in measured:
        if not isinstance(part, Mapping) or not all(isinstance(moments, Moments) for moments in part.values()):
            raise TypeError(
                "`measured` must be mappings of names of layers to `keras_bn.Moments`, as `keras_bn.measure` returns. "
                f"Received: {shown(part)}."
            )
        if not part:
            raise ValueError(
                "`measured` must hold the moments of a normalization at least, as what `keras_bn.measure` returns. "
                "Received: an empty mapping."
            )
        for name, moments in part.items():
            together[name] = together[name] + moments if name in together else moments
    for name, moments in together.items():
        if name not in norms or moments.mean.shape != tuple(norms[name].moving_mean.shape):
            shape = f", which has shape {tuple(norms[name].moving_mean.shape)}" if name in norms else ""
            raise ValueError(
                f"`measured` must be of the normalizations of the model, {listed(list(norms))}{shape}. "
                f"Received: {name!r} of shape {moments.mean.shape}."
            )
        if not np.all(np.asarray(moments.count) > 0):
            raise ValueError(
                "`measured` must be of values that count, in every channel. "
                f"Received: {name!r} with count {moments.count}."
            )
        check_statistics("measured", name, norms[name], moments.mean, moments.variance)
    for name, moments in together.items():
        set_statistics(norms[name], moments.mean, moments.variance)
    _warn_of_single_values("measured", [name for name, one in together.items() if not np.all(has_variance(one))])


def chosen(model: keras.Model, layers: Any) -> tuple[dict[str, keras.layers.BatchNormalization], list[str]]:
    """Every normalization by its name, and the names that were chosen."""
    norms = required_batch_norms(model)
    arguments.names("layers", layers)
    if layers is None:
        return norms, list(norms)
    unknown = [name for name in layers if name not in norms]
    if unknown:
        likely = difflib.get_close_matches(unknown[0], norms, 3)
        known = [*likely, *(name for name in norms if name not in likely)]
        raise ValueError(f"`layers` must be a list of some of {listed(known)}. Received: layers={shown(layers)}.")
    return norms, list(layers)


def _warn_of_single_values(argument: str, layers: Sequence[str]) -> None:
    if layers:
        warn(
            f"`{argument}` should have more than one value per channel, as a single one has no variance; give more "
            f"examples. Received: a single one at {listed(layers)}, whose moving_variance is 0 there."
        )


def check_options(method: Any, order: Any, verbose: Any, tolerance: Any, layers: Any) -> float | None:
    """Of `recalibrate`, wherever they are given; returns the tolerance as a number of Python."""
    arguments.choice("method", method, METHODS)
    arguments.choice("order", order, ORDERS)
    arguments.choice("verbose", verbose, VERBOSE)
    arguments.names("layers", layers)
    return arguments.optional_number("tolerance", tolerance, 0.0)
