"""Recalibrate: population statistics in `fit`, whatever the order of the callbacks."""

import contextlib
import gc
import weakref
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np

from keras_bn import arguments
from keras_bn.population import check_options, chosen, recalibrate
from keras_bn.population.batches import Batches
from keras_bn.population.report import Recalibration

_SAVING = ("save", "save_weights", "export")
# Of `keras.callbacks.CallbackList`: what other callbacks save the model in.
_EVENTS = ("on_epoch_begin", "on_epoch_end", "on_train_batch_begin", "on_train_batch_end", "on_test_end")


class Recalibrate(keras.callbacks.Callback):
    """Recalibrates in `fit`: at the end of training, or also whenever the model is about to be evaluated or saved.

    Its place in the list of callbacks does not matter. At the end it measures when all others are through, such as
    `EarlyStopping(restore_best_weights=True)`; before a validation when `SwapEMAWeights` has put its averages in.

    Args:
        data: as for `recalibrate`; whether the model takes its shape is seen when the training begins, where the model
            tells its inputs (functional, sequential).
        steps: likewise.
        when: `"end"` for the end of training, or `"epoch"` also for each validation, the end of each epoch, and
            whenever a callback saves the model; measured again only if weights have changed since.
        verbose: as for `recalibrate`.
        method: likewise.
        order: likewise.
        layers: likewise.
        tolerance: likewise.
        batch_size: likewise.

    Attributes:
        report: the `Recalibration` of the last time.
    """

    def __init__(
        self,
        data: Any,
        steps: int | None = None,
        when: str = "end",
        verbose: int | str = 0,
        *,
        method: str = "pooled",
        order: str = "sequential",
        layers: Sequence[str] | None = None,
        tolerance: float | None = None,
        batch_size: int = 32,
    ):
        super().__init__()
        self._when = arguments.choice("when", when, ("end", "epoch"))
        tolerance = check_options(method, order, verbose, tolerance, layers)
        # A generator can be read only once, this object as often as there are epochs.
        self._batches = Batches(data, steps, batch_size)
        self._options: dict[str, Any] = {
            "verbose": verbose,
            "method": method,
            "order": order,
            "layers": layers,
            "tolerance": tolerance,
        }
        self._lists: weakref.WeakSet[keras.callbacks.CallbackList] = weakref.WeakSet()
        self._fitting = False
        self._measured_for: int | None = None
        self.report: Recalibration | None = None

    def set_model(self, model: keras.Model) -> None:
        super().set_model(model)
        self._batches.settled(model)
        if model.built:  # Else its layers may still be to come.
            chosen(model, self._options["layers"])

    def on_train_begin(self, logs: Any = None) -> None:
        self._batches.check_shapes()
        self._fitting = True
        # Nothing leads from a callback to the list it is in.
        for candidate in gc.get_objects():
            if not issubclass(type(candidate), keras.callbacks.CallbackList) or candidate in self._lists:
                continue
            if any(callback is self for callback in candidate.callbacks):
                self._lists.add(candidate)
                self._follow(candidate)

    def _follow(self, callbacks: keras.callbacks.CallbackList) -> None:
        """Has its turn after all others of the list, and before each saving; as long as the list lives."""

        def followed_by(name: str, then: Callable[[], None]) -> None:
            event = getattr(callbacks, name)

            def event_and_then(*args: Any, **kwargs: Any) -> None:
                with self._before_saving():
                    event(*args, **kwargs)
                then()

            setattr(callbacks, name, event_and_then)

        followed_by("on_train_end", self._finish)
        if self._when == "epoch":
            followed_by("on_test_begin", self._recalibrate_while_fitting)
            for name in _EVENTS:
                followed_by(name, self._recalibrate if name == "on_epoch_end" else lambda: None)

    @contextlib.contextmanager
    def _before_saving(self) -> Iterator[None]:
        model = self.model

        def recalibrated(name: str) -> Callable[..., Any]:
            save = getattr(model, name)

            def recalibrate_and_save(*args: Any, **kwargs: Any) -> Any:
                self._recalibrate()
                return save(*args, **kwargs)

            return recalibrate_and_save

        own = model.__dict__  # Past Keras's tracking.
        before = {name: own.get(name) for name in _SAVING}
        own.update({name: recalibrated(name) for name in _SAVING})
        try:
            yield
        finally:
            for name, save in before.items():
                if save is None:
                    own.pop(name)
                else:
                    own[name] = save

    def _finish(self) -> None:
        self._fitting = False
        self._recalibrate()

    def _recalibrate_while_fitting(self) -> None:
        if self._fitting:
            self._recalibrate()

    def _recalibrate(self) -> None:
        if self._measured_for is None or self._measured_for != _fingerprint(self.model):
            self.report = recalibrate(self.model, self._batches, **self._options)
            self._measured_for = _fingerprint(self.model)


def _fingerprint(model: keras.Model) -> int:
    """Changes when any weight does, of normalizations also when only training moved their statistics."""
    checksum = 0
    for variable in model.variables:
        checksum = zlib.crc32(np.ascontiguousarray(variable.numpy()).tobytes(), checksum)
    return checksum
