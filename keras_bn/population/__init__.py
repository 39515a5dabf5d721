"""recalibrate(): the moving statistics become those of the whole population, exactly."""

import zlib
from typing import Any

import keras
import numpy as np

from keras_bn.model import check_model, named_batch_norms, set_statistics, statistics_of, variables_restored
from keras_bn.population.batches import Batches
from keras_bn.population.measurement import METHODS, measure_joint, measure_sequential
from keras_bn.population.report import RecalibratedLayer, Recalibration

ORDERS = ("sequential", "joint")


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

    On any exception, also Ctrl-C, the model is as it was, bit for bit.

    Args:
        model: a built Keras model of any kind.
        data: an array or list or dictionary of arrays; a `tf.data.Dataset`, `keras.utils.PyDataset`, generator or
            iterable of batches, each the inputs or a tuple `(inputs, targets, sample_weight)` or shorter. A sample of
            weight 2 counts as two, one of weight 0 not at all. Masks are obeyed.
        steps: number of batches, or None for all.
        method: `"pooled"` or `"algorithm2"`.
        order: `"sequential"` or `"joint"`.
        batch_size: for arrays.
        verbose: 0 for no progress bar.

    Returns:
        A `Recalibration` with the old and new statistics of each layer and their distance; prints as a table.

    Raises:
        TypeError: when `model` or `data` is of the wrong type.
        ValueError: when an argument is not allowed, the model has no batch normalization, `data` is empty, or a batch
            makes a layer's input non-finite; the batch and the layer are named.

    Reference: Ioffe & Szegedy 2015 (arXiv 1502.03167), Algorithm 2; Wu & Johnson 2021 (arXiv 2105.07576), "precise BN".
    """
    _check_arguments(model, method, order)
    layers = named_batch_norms(model)
    if not layers:
        raise ValueError(f"`model` must have a batch normalization. Received: model={model.name!r}, which has none.")
    batches = data if isinstance(data, Batches) else Batches(data, steps, batch_size)
    old = {name: statistics_of(layer) for name, layer in layers.items()}
    measure = measure_joint if order == "joint" else measure_sequential
    with variables_restored(model, only_on_error=True):
        new = measure(model, layers, batches, method, verbose)
        for name, population in new.items():
            set_statistics(layers[name], population.mean, population.variance)
    return Recalibration(
        method=method,
        order=order,
        layers=[
            RecalibratedLayer(name, *population, *old[name], layers[name].epsilon) for name, population in new.items()
        ],
        not_called=[name for name in layers if name not in new],
    )


class Recalibrate(keras.callbacks.Callback):
    """Recalibrates in `fit`: at the end of training, or also whenever the model is about to be evaluated or saved.

    With `SwapEMAWeights`, put it after it in the list of callbacks: it then measures with the averaged weights whenever
    those are in the model, and again with the others if they are put back.

    Args:
        data, steps, method, order, batch_size, verbose: as for `recalibrate`.
        when: `"end"` for the end of training, or `"epoch"` for each validation and the end of each epoch, measured
            again only if weights have changed since.
    """

    def __init__(self, data: Any, steps: int | None = None, when: str = "end", verbose: int | str = 0, **options: Any):
        super().__init__()
        if when not in ("end", "epoch"):
            raise ValueError(f'`when` must be "end" or "epoch". Received: when={when!r}.')
        # A generator can be read only once, this object as often as there are epochs.
        self._batches = Batches(data, steps, options.pop("batch_size", 32))
        self._when = when
        self._options = {"verbose": verbose, **options}
        self._fitting = False
        self._measured_for: int | None = None
        self.report: Recalibration | None = None

    def on_train_begin(self, logs: Any = None) -> None:
        self._fitting = True

    def on_test_begin(self, logs: Any = None) -> None:
        if self._fitting and self._when == "epoch":
            self._recalibrate()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if self._when == "epoch":
            self._recalibrate()

    def on_train_end(self, logs: Any = None) -> None:
        self._fitting = False
        self._recalibrate()

    def _recalibrate(self) -> None:
        if self._measured_for is None or self._measured_for != _fingerprint(self.model):
            self.report = recalibrate(self.model, self._batches, **self._options)
            self._measured_for = _fingerprint(self.model)


def _check_arguments(model: Any, method: str, order: str) -> None:
    check_model(model)
    if method not in METHODS:
        raise ValueError(f"`method` must be one of {METHODS}. Received: method={method!r}.")
    if order not in ORDERS:
        raise ValueError(f"`order` must be one of {ORDERS}. Received: order={order!r}.")


def _fingerprint(model: keras.Model) -> int:
    """Changes when any weight does, of normalizations also when only training moved their statistics."""
    checksum = 0
    for variable in model.variables:
        checksum = zlib.crc32(np.ascontiguousarray(variable.numpy()).tobytes(), checksum)
    return checksum
