"""Passes over the data in which every normalization measures what it is given."""

import contextlib
import itertools
import os
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_bn.examples import computing_with
from keras_bn.inference import calls_replaced, inference_mode, observed_call
from keras_bn.model import check_statistics, check_weights_finite, input_moments, set_statistics
from keras_bn.population.accumulator import Accumulator, Population, is_settled
from keras_bn.population.batches import Batches
from keras_bn.population.workers import Workers
from keras_bn.statistics import Moments

Layers = dict[str, keras.layers.BatchNormalization]


def measure_joint(
    model: keras.Model,
    layers: Layers,
    targets: Sequence[str],
    batches: Batches,
    method: str,
    verbose: int | str,
    tolerance: float | None = None,
) -> dict[str, Population]:
    """One pass, each layer fed by predecessors that normalize with the statistics of the batch, if they are targets.

    Alters the moving statistics of `targets`: wrap it in `variables_restored`.
    """
    progress, known = _Progress(1, batches, verbose), set(layers) - set(targets)
    accumulators = _pooled_pass(model, layers, batches, progress, set(targets), known, tolerance=tolerance)
    return {name: accumulator.population(method) for name, accumulator in accumulators.items()}


def measure_sequential(
    model: keras.Model,
    layers: Layers,
    targets: Sequence[str],
    batches: Batches,
    method: str,
    verbose: int | str,
    tolerance: float | None = None,
) -> dict[str, Population]:
    """A pass for each target, in the order they are called, those before it on their population's statistics.

    Leaves the measured statistics in `targets`; wrap it in `variables_restored`.
    """
    workers = Workers(model)
    calls = workers.agreed(lambda: [name for name in _calls_in_order(model, layers, batches) if name in targets])
    is_one_batch = batches.length == 1 and workers.count == 1
    if is_one_batch and method == "pooled" and len(set(calls)) == len(calls):  # The batch is the population.
        return measure_joint(model, layers, targets, batches, method, verbose, tolerance)
    progress = _Progress(len(set(calls)), batches, verbose)
    others = set(layers) - set(targets)
    done: dict[str, Population] = {}
    for name in dict.fromkeys(calls):
        accumulators = _pooled_pass(
            model,
            layers,
            batches,
            progress,
            targets={name},
            known=others | set(done),
            calls=calls.count(name),
            tolerance=tolerance,
        )
        done[name] = accumulators[name].population(method)
        check_statistics("data", name, layers[name], done[name].mean, done[name].variance)
        set_statistics(layers[name], done[name].mean, done[name].variance)
    return done


def measure_as_it_stands(
    model: keras.Model, layers: Layers, targets: Sequence[str], batches: Batches, verbose: int | str
) -> dict[str, Moments]:
    """One pass in inference mode: moments of what each target is given while all normalize with what they have."""
    accumulators = _one_pass(
        model, layers, batches, _Progress(1, batches, verbose), targets=set(targets), known=set(layers)
    )
    return {name: accumulator.pooled for name, accumulator in accumulators.items()}


def measure_repeated(
    model: keras.Model, layers: Layers, targets: Sequence[str], batches: Batches, verbose: int | str
) -> dict[str, Population]:
    """What targets that are called several times see in inference, everything on the statistics it has now."""
    calls = Workers(model).agreed(lambda: _calls_in_order(model, layers, batches))
    repeated = {name for name in calls if calls.count(name) > 1 and name in targets}
    if not repeated:
        return {}
    accumulators = _pooled_pass(
        model, layers, batches, _Progress(1, batches, verbose), targets=repeated, known=set(layers)
    )
    return {name: accumulator.population("pooled") for name, accumulator in accumulators.items()}


def measure_leniently(
    model: keras.Model, layers: Layers, batches: Batches, verbose: int | str
) -> tuple[dict[str, Accumulator], dict[str, int]]:
    """As `measure_joint`, but a batch that is not finite at a layer is left out from there on, and counted.

    Returns:
        The accumulator of each layer that was given anything finite, and by the name of the layer that saw it first the
        number of non-finite batches.
    """
    skipped: dict[str, int] = {}
    accumulators = _one_pass(
        model, layers, batches, _Progress(1, batches, verbose), targets=set(layers), skipped=skipped
    )
    return {name: one for name, one in accumulators.items() if one.has_values}, skipped


class _Stop(BaseException):
    """Ends a forward pass early. Not an error, so no `Exception`, which Keras would wrap.

    Attributes:
        problem: what to tell the person, or None when all that the pass was for has been measured.
        non_finite: name of the layer whose input holds a NaN or an infinity.
    """

    def __init__(self, problem: str | None = None, non_finite: str | None = None):
        super().__init__(problem)
        self.problem, self.non_finite = problem, non_finite


class _Progress:
    """Keras's progress over all passes: a bar, a line when they are through, or nothing, as `verbose` says.

    Of data of unknown length the first pass tells how long the others are.
    """

    def __init__(self, passes: int, batches: Batches, verbose: int | str):
        self._passes, self._length, self._verbose = passes, batches.length, verbose
        self._passed = self._done = 0
        self._bar: Any = None

    def batch_done(self) -> None:
        self._done += 1
        self._show()

    def pass_done(self) -> None:
        """Also a pass that has ended early counts as whole."""
        self._passed += 1
        was_unknown, self._length = self._length is None, self._length or self._done
        if was_unknown or self._done < self._passed * self._length:
            self._done = self._passed * self._length
            self._show()

    def _show(self) -> None:
        if self._verbose == 0:
            return
        if self._bar is None:
            verbose = (1 if _is_watched() else 2) if self._verbose == "auto" else self._verbose
            self._bar = keras.utils.Progbar(None, verbose=verbose, unit_name="batch")
        if self._length is not None:
            self._bar.target = self._passes * self._length
        self._bar.update(self._done)


def _is_watched() -> bool:
    """Whether what redraws its line is seen to; Keras takes every file of Linux and macOS for such a place."""
    in_notebook = "ipykernel" in sys.modules or "PYCHARM_HOSTED" in os.environ
    return in_notebook or (hasattr(sys.stdout, "isatty") and sys.stdout.isatty())


def _pooled_pass(model: keras.Model, *args: Any, **options: Any) -> dict[str, Accumulator]:
    """`_one_pass`, of all workers' data together."""
    workers = Workers(model)
    accumulators: dict[str, Accumulator] = {}

    def measure() -> list[str]:
        accumulators.update(_one_pass(model, *args, **options))
        return list(accumulators)

    names = workers.agreed(measure)
    if workers.count == 1:
        return accumulators
    return {name: accumulators[name].merged(workers.gathered(accumulators[name].to_array())) for name in names}


def _one_pass(
    model: keras.Model,
    layers: Layers,
    batches: Batches,
    progress: _Progress,
    targets: set[str],
    known: Collection[str] = (),
    calls: int | None = None,
    skipped: dict[str, int] | None = None,
    tolerance: float | None = None,
) -> dict[str, Accumulator]:
    """Measures `targets`; all but the `known` layers normalize with the batch's statistics; stops after `calls`.

    Non-finite batches are counted in `skipped`, or refused where that is None. No more batches are taken where the
    standard error of each target is below `tolerance`.
    """
    accumulators: dict[str, Accumulator] = {}
    index = -1
    for index, (inputs, weight) in enumerate(batches):
        calls_left = itertools.count(calls or 0, -1)
        next(calls_left)

        def measure(name: str, x: tf.Tensor, mask: Any, index=index, weight=weight, calls_left=calls_left) -> None:
            if name in known and name not in targets:
                return
            layer = layers[name]
            moments = _checked_moments(name, layer, x, mask, weight, index)
            if name in targets:
                accumulators.setdefault(name, Accumulator(layer.epsilon)).add_call(moments)
                if calls is not None and next(calls_left) == 0:
                    raise _Stop
            if name not in known:
                set_statistics(layer, moments.mean, np.asarray(tf.math.divide_no_nan(moments.m2, moments.count)))

        stop = _forward(model, layers, inputs, measure)
        if stop is not None and stop.non_finite is not None and skipped is not None:
            skipped[stop.non_finite] = skipped.get(stop.non_finite, 0) + 1
        elif stop is not None and stop.problem is not None:
            if stop.non_finite is not None:
                check_weights_finite(model)
            raise ValueError(stop.problem)
        for name, accumulator in accumulators.items():
            # Layers before the one that refuses have seen a whole batch.
            accumulator.end_batch(counts=stop is None or name != stop.non_finite)
        progress.batch_done()
        if _are_settled(accumulators.values(), tolerance):
            break
    if index < 0 or (not accumulators and skipped is None):
        raise ValueError("`data` must hold at least one batch. Received: no batch.")
    progress.pass_done()
    return accumulators


def _are_settled(accumulators: Collection[Accumulator], tolerance: float | None) -> bool:
    if tolerance is None or not accumulators:
        return False
    return all(is_settled(one.standard_error, one.batches, tolerance) for one in accumulators)


def _checked_moments(
    name: str, layer: keras.layers.BatchNormalization, x: tf.Tensor, mask: Any, weight: Any, index: int
) -> Moments:
    if not hasattr(x, "numpy"):
        raise _Stop(
            "`model` must call its normalizations where they can be watched, not inside `tf.vectorized_map` or "
            f"`tf.map_fn`; call the layer on the whole tensor instead. Received: {name!r} called there."
        )
    if weight is not None and (np.ndim(weight) != 1 or np.shape(weight)[0] != x.shape[0]):
        raise _Stop(
            f"`data` must have sample weights of shape (batch,) = ({x.shape[0]},) at the input of {name!r}. "
            f"Received: shape {np.shape(weight)} in batch {index}."
        )
    for what, weights in (("sample weights", weight), ("masks", mask)):
        values = np.zeros(0) if weights is None else np.asarray(weights)
        if values.dtype != bool and not np.all((values >= 0) & np.isfinite(values.astype("float64"))):
            raise _Stop(
                f"`data` must have {what} that are finite and not negative. Received: from {values.min()} to "
                f"{values.max()} in batch {index} (counted from 0), at the input of {name!r}."
            )
    moments = input_moments(layer, x, mask, weight)
    if not (np.all(np.isfinite(moments.mean)) and np.all(np.isfinite(moments.m2))):
        raise _Stop(
            f"`data` must be finite. Received: batch {index} (counted from 0) with non-finite values at the input of "
            f"{name!r}. The model is left as it was; leave that batch out or mend it.",
            non_finite=name,
        )
    return moments


def _calls_in_order(model: keras.Model, layers: Layers, batches: Batches) -> list[str]:
    """Names of the normalizations as they are called for the first batch, those called twice twice."""
    calls: list[str] = []
    for inputs, _ in batches:
        _forward(model, layers, inputs, lambda name, x, mask: calls.append(name))
        return calls
    raise ValueError("`data` must hold at least one batch. Received: no batch.")


def _forward(
    model: keras.Model, layers: Layers, inputs: Any, observe: Callable[[str, tf.Tensor, Any], None]
) -> _Stop | None:
    """Runs the model eagerly in inference mode, `observe(name, inputs, mask)` before each normalization."""

    def observed(name: str, layer: keras.layers.BatchNormalization) -> Callable[..., Any]:
        return observed_call(layer, lambda x, mask: observe(name, x, mask))

    with contextlib.ExitStack() as stack:
        stack.enter_context(_functions_run_eagerly())
        stack.enter_context(inference_mode(model))
        stack.enter_context(calls_replaced({layer: observed(name, layer) for name, layer in layers.items()}))
        try:
            with computing_with("data", model):
                model(inputs, training=False)
        except _Stop as stop:
            return stop
    return None


@contextlib.contextmanager
def _functions_run_eagerly() -> Iterator[None]:
    """Also what the model's author put into a `tf.function` runs as Python, where it can be watched."""
    before = tf.config.functions_run_eagerly()
    tf.config.run_functions_eagerly(True)
    try:
        yield
    finally:
        tf.config.run_functions_eagerly(before)
