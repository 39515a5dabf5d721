"""recalibrate(): the moving statistics become those of the whole population, exactly."""

from typing import Any

import keras

from keras_bn import arguments
from keras_bn.drift import distance, plain, summary
from keras_bn.model import check_model, named_batch_norms, set_statistics, statistics_of, variables_restored
from keras_bn.population.accumulator import METHODS
from keras_bn.population.batches import Batches
from keras_bn.population.measurement import measure_joint, measure_repeated, measure_sequential
from keras_bn.population.report import RecalibratedLayer, Recalibration

ORDERS = ("sequential", "joint")
VERBOSE = (0, 1, 2, "auto")


def recalibrate(
    model: keras.Model,
    data: Any,
    steps: int | None = None,
    *,
    method: str = "pooled",
    order: str = "sequential",
    batch_size: int = 32,
    verbose: int | str = "auto",
) -> Recalibration:
    """Replaces the moving statistics of every batch normalization, ours and stock Keras's, by the population's.

    `"pooled"`, with moments merged in float64 by Chan's formula, so that the split into batches does not matter:

    moving_mean = sum(x) / N, moving_variance = sum((x - moving_mean)**2) / N (biased, over all N values)

    `"algorithm2"`, the paper's, an average over batches b of m_b values each:

    moving_mean = mean_b(mean_b), moving_variance = mean_b(sum((x - mean_b)**2) / (m_b - 1)) (unbiased, per batch)

    `"sequential"` measures each layer while those before it already normalize with population statistics, which is
    exact for inference; it goes through the data once for each normalization, each time only as far as that layer.
    `"joint"` goes through the data once, each layer fed by predecessors that normalize with batch statistics.
    All other layers (dropout, augmentation) run in inference mode, frozen normalizations are measured like the others.
    A layer that is called several times gets the statistics of all its calls; where one of them feeds another no order
    is exact, and the report says how far off it is.

    While it measures, the model's calls are replaced and all functions of the process run eagerly: do not use the model
    in another thread until it is through. On any exception, also Ctrl-C, the model is as it was, bit for bit.

    Args:
        model: a built Keras model of any kind.
        data: an array, a list or dictionary of arrays for several inputs, or a tuple of such inputs, targets and
            weights or shorter; a `tf.data.Dataset`, `keras.utils.PyDataset`, generator or iterable of batches, each the
            inputs or a tuple `(inputs, targets, sample_weight)` or shorter. A list of arrays is batches where the model
            has one input. A sample of weight 2 counts as two, one of weight 0 not at all, and masks are obeyed; for the
            unbiased variances of `"algorithm2"` floats are reliabilities, as the `mask` of the layer.
        steps: number of batches, or None for all.
        method: `"pooled"` or `"algorithm2"`.
        order: `"sequential"` or `"joint"`.
        batch_size: for arrays.
        verbose: 0 for no progress bar.

    Returns:
        A `Recalibration` with the old and new statistics of each layer and their distance; prints as a table.

    Raises:
        TypeError: when `model` or `data` is of the wrong type.
        ValueError: when an argument is not allowed, the model has no batch normalization or is trained on several
            machines, `data` is empty or a subclassed model's list of arrays (inputs or batches?), or a batch makes a
            layer's input non-finite; the batch and the layer are named.

    Reference: Ioffe & Szegedy 2015 (arXiv 1502.03167), Algorithm 2; Wu & Johnson 2021 (arXiv 2105.07576), "precise BN".
    """
    check_model(model, built=True)
    check_options(method, order, verbose)
    _check_one_machine(model)
    layers = named_batch_norms(model)
    if not layers:
        raise ValueError(f"`model` must have a batch normalization. Received: model={model.name!r}, which has none.")
    batches = data if isinstance(data, Batches) else Batches(data, steps, batch_size)
    batches.settled(model)
    old = {name: statistics_of(layer) for name, layer in layers.items()}
    measure = measure_joint if order == "joint" else measure_sequential
    with variables_restored(model, only_on_error=True):
        new = measure(model, layers, batches, method, verbose)
        for name, population in new.items():
            set_statistics(layers[name], population.mean, population.variance)
        seen = measure_repeated(model, layers, batches, verbose) if order == "sequential" else {}
    return Recalibration(
        method=method,
        order=order,
        layers=[
            RecalibratedLayer(name, *population, *old[name], layers[name].epsilon) for name, population in new.items()
        ],
        not_called=[name for name in layers if name not in new],
        unsettled={
            name: plain(summary(distance(one.mean, one.variance, *statistics_of(layers[name]), layers[name].epsilon)))[
                "kl"
            ]
            for name, one in seen.items()
        },
    )


def check_options(method: Any, order: Any, verbose: Any) -> None:
    """Of `recalibrate`, wherever they are given."""
    arguments.choice("method", method, METHODS)
    arguments.choice("order", order, ORDERS)
    arguments.choice("verbose", verbose, VERBOSE)


def _check_one_machine(model: keras.Model) -> None:
    strategy = model.distribute_strategy
    resolver = None if strategy is None else strategy.cluster_resolver
    workers = [] if resolver is None else resolver.cluster_spec().as_dict().get("worker", [])
    if len(workers) > 1:
        raise ValueError(
            "`model` must be of one machine: each worker would measure its own shard of the data only. Save it, and "
            f"recalibrate it with all the data in one process. Received: model={model.name!r} of a strategy with "
            f"{len(workers)} workers."
        )
