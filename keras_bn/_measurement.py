"""Passes over the data in which every normalization measures what it is given."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from keras_bn._batches import Batches
from keras_bn._layers import (
    Moments,
    calls_replaced,
    inference_mode,
    input_moments,
    merged,
    observed_call,
    set_statistics,
)

METHODS = ("pooled", "algorithm2")
Layers = dict[str, keras.layers.BatchNormalization]


class Population(NamedTuple):
    """What was measured of a layer's input over all batches.

    Attributes:
        count: number of values behind each channel, or their sum of weights.
        mean: shape `(C,)`, float64.
        variance: shape `(C,)`, float64; biased over all values for `"pooled"`, for `"algorithm2"` the mean of the
            batches' unbiased variances.
    """

    count: Any
    mean: np.ndarray
    variance: np.ndarray


def measure_joint(
    model: keras.Model, layers: Layers, batches: Batches, method: str, verbose: int | str
) -> dict[str, Population]:
    """One pass, each layer fed by predecessors that normalize with the statistics of the batch.

    Alters the moving statistics of `layers`: wrap it in `variables_restored`.
    """
    progress = _Progress(1, batches, verbose)
    return _one_pass(model, layers, batches, progress, targets=set(layers), known=set(), calls=None).populations(method)


def measure_sequential(
    model: keras.Model, layers: Layers, batches: Batches, method: str, verbose: int | str
) -> dict[str, Population]:
    """A pass for each layer, in the order they are called, those before it on their population's statistics.

    Leaves the measured statistics in `layers`; wrap it in `variables_restored`.
    """
    calls = _calls_in_order(model, layers, batches)
    if batches.length == 1 and method == "pooled":  # The batch is the population.
        return measure_joint(model, layers, batches, method, verbose)
    progress = _Progress(len(set(calls)), batches, verbose)
    done: dict[str, Population] = {}
    for name in dict.fromkeys(calls):
        done |= _one_pass(
            model, layers, batches, progress, targets={name}, known=set(done), calls=calls.count(name)
        ).populations(method)
        set_statistics(layers[name], done[name].mean, done[name].variance)
    return done


class _Reached(BaseException):
    """Ends a forward pass early: all that it was for has been measured. Not an error, so no `Exception`."""


class _Accumulator:
    """Moments of one layer over the batches."""

    def __init__(self) -> None:
        self.pooled: Moments | None = None
        self._batch: list[Moments] = []
        self._sum_mean: Any = 0.0
        self._sum_variance: Any = 0.0
        self._batches: Any = 0.0

    def add_call(self, moments: Moments) -> None:
        self._batch.append(moments)

    def end_batch(self) -> None:
        if not self._batch:
            return
        batch = merged(self._batch)
        self._batch = []
        self.pooled = batch if self.pooled is None else merged([self.pooled, batch])
        counted = np.asarray(batch.count) > 1  # Of one value there is no unbiased variance.
        self._sum_mean = self._sum_mean + np.where(counted, batch.mean, 0)
        unbiased = np.asarray(batch.m2) / np.where(counted, batch.count - 1, 1)
        self._sum_variance = self._sum_variance + np.where(counted, unbiased, 0)
        self._batches = self._batches + counted

    def population(self, method: str) -> Population:
        if self.pooled is None or not np.all(self.pooled.count > 0):
            raise ValueError("`data` must hold values that count. Received: only masked values or weights of zero.")
        count = float(np.max(self.pooled.count))
        if method == "pooled":
            return Population(count, np.asarray(self.pooled.mean), np.asarray(self.pooled.m2 / self.pooled.count))
        if not np.all(self._batches > 0):
            raise ValueError(
                '`method="algorithm2"` needs batches with more than one value per channel; use `method="pooled"`. '
                "Received: batches with one value only."
            )
        return Population(count, self._sum_mean / self._batches, self._sum_variance / self._batches)


class _Pass:
    """The accumulators that one pass fills."""

    def __init__(self) -> None:
        self.by_name: dict[str, _Accumulator] = {}
        self.problem: str | None = None

    def populations(self, method: str) -> dict[str, Population]:
        return {name: accumulator.population(method) for name, accumulator in self.by_name.items()}


class _Progress:
    """Keras's progress bar over all passes; silent where `verbose` is 0."""

    def __init__(self, passes: int, batches: Batches, verbose: int | str):
        self._passes, self._batches, self._verbose, self._done = passes, batches, verbose, 0
        self._bar: Any = None

    def batch_done(self) -> None:
        if self._verbose == 0:
            return
        if self._bar is None:
            length = self._batches.length
            self._bar = keras.utils.Progbar(None if length is None else self._passes * length, unit_name="batch")
        self._done += 1
        self._bar.update(self._done)


def _one_pass(
    model: keras.Model,
    layers: Layers,
    batches: Batches,
    progress: _Progress,
    targets: set[str],
    known: set[str],
    calls: int | None,
) -> _Pass:
    """Measures `targets`; all but the `known` layers normalize with the batch's statistics; stops after `calls`."""
    this = _Pass()
    for index, (inputs, weight) in enumerate(batches):
        remaining = [calls]

        def measure(name: str, x: tf.Tensor, mask: Any, index=index, weight=weight, remaining=remaining) -> None:
            layer = layers[name]
            if name in known:
                return
            moments = _checked_moments(this, name, layer, x, mask, weight, index)
            if name in targets:
                this.by_name.setdefault(name, _Accumulator()).add_call(moments)
                if remaining[0] is not None:
                    remaining[0] -= 1
                    if remaining[0] == 0:
                        raise _Reached
            set_statistics(layer, moments.mean, np.asarray(moments.m2) / np.maximum(moments.count, 1e-300))

        _forward(model, layers, inputs, measure)
        if this.problem is not None:
            raise ValueError(this.problem)
        for accumulator in this.by_name.values():
            accumulator.end_batch()
        progress.batch_done()
    return this


def _checked_moments(
    this: _Pass,
    name: str,
    layer: keras.layers.BatchNormalization,
    x: tf.Tensor,
    mask: Any,
    weight: Any,
    index: int,
) -> Moments:
    if not hasattr(x, "numpy"):
        this.problem = (
            "`model` must call its normalizations where they can be watched, not inside `tf.vectorized_map` or "
            f"`tf.map_fn`; call the layer on the whole tensor instead. Received: {name!r} called there."
        )
        raise _Reached
    if weight is not None and (np.ndim(weight) != 1 or np.shape(weight)[0] != x.shape[0]):
        this.problem = (
            f"`data` must have sample weights of shape (batch,) = ({x.shape[0]},) at the input of {name!r}. "
            f"Received: shape {np.shape(weight)} in batch {index}."
        )
        raise _Reached
    moments = input_moments(layer, x, mask, weight)
    if not (np.all(np.isfinite(moments.mean)) and np.all(np.isfinite(moments.m2))):
        this.problem = (
            f"`data` must be finite. Received: batch {index} (counted from 0) with non-finite values at the input of "
            f"{name!r}. The model is left as it was; leave that batch out or mend it."
        )
        raise _Reached
    return moments


def _calls_in_order(model: keras.Model, layers: Layers, batches: Batches) -> list[str]:
    """Names of the normalizations as they are called for the first batch, those called twice twice."""
    calls: list[str] = []
    for inputs, _ in batches:
        _forward(model, layers, inputs, lambda name, x, mask: calls.append(name))
        return calls
    raise ValueError("`data` must hold at least one batch. Received: no batch.")


def _forward(model: keras.Model, layers: Layers, inputs: Any, observe: Callable[[str, tf.Tensor, Any], None]) -> None:
    """Runs the model eagerly in inference mode, `observe(name, inputs, mask)` before each normalization."""

    def observed(name: str, layer: keras.layers.BatchNormalization) -> Callable[..., Any]:
        return observed_call(layer, lambda x, mask: observe(name, x, mask))

    with contextlib.ExitStack() as stack:
        stack.enter_context(_functions_run_eagerly())
        stack.enter_context(inference_mode(model))
        stack.enter_context(calls_replaced({layer: observed(name, layer) for name, layer in layers.items()}))
        stack.enter_context(contextlib.suppress(_Reached))
        model(inputs, training=False)


@contextlib.contextmanager
def _functions_run_eagerly() -> Iterator[None]:
    """Also what the model's author put into a `tf.function` runs as Python, where it can be watched."""
    before = tf.config.functions_run_eagerly()
    tf.config.run_functions_eagerly(True)
    try:
        yield
    finally:
        tf.config.run_functions_eagerly(before)
