"""Which statistics batch norms use, and whether they learn, switched from outside and in force at once."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from typing import Any

import keras
import tensorflow as tf

from keras_bn import arguments, ops
from keras_bn.layer import BatchNormalization
from keras_bn.model import batch_norms_below, layers_below, optimized_variables
from keras_bn.names import listed, shown
from keras_bn.statistics import statistics_dtype
from keras_bn.warning import warn

STATISTICS = ("auto", "batch", "moving")
# Where a layer keeps what `freeze` did to it.
_FROZEN = "_keras_bn_frozen"


class StatisticsSwitch:
    """What `use_statistics` did. As a context manager it is undone at the end, also after an error."""

    def __init__(self, layers: list[keras.layers.BatchNormalization], statistics: str):
        self.layers = layers
        self._before = [_statistics_of(layer) for layer in layers]
        for layer in layers:
            _set_statistics(layer, statistics)
        _trace_again(layers)

    def __enter__(self) -> StatisticsSwitch:
        return self

    def __exit__(self, *_: object) -> None:
        for layer, statistics in zip(self.layers, self._before, strict=True):
            _set_statistics(layer, statistics)
        _trace_again(self.layers)


def use_statistics(model_or_layer: keras.Layer, statistics: str) -> StatisticsSwitch:
    """Chooses the statistics that all batch norms below a model normalize with, whatever `training` says.

    "auto":   the batch's if `training` and the layer is trainable, else the moving ones (what Keras does)
    "batch":  the batch's, always; the moving ones follow only if `training` and the layer is trainable
    "moving": the moving ones, always; nothing follows

    It holds at once for `fit`, `evaluate`, `predict`, `train_on_batch` and direct calls of every model that contains
    one of the layers, also for functions already traced, which are traced again; a `tf.function` of your own has to be
    made again. The switch is the layers' own and so holds in the whole process: for every thread, and for every model
    that shares one of them. It is not saved with the model.

    Args:
        model_or_layer: A model, a wrapper or a layer; its batch norms (ours and stock Keras's, nested and shared ones)
            are switched.
        statistics: "auto", "batch" or "moving".

    Returns:
        What can be used as a context manager, to go back at the end of the block:

    ```python
    with keras_bn.use_statistics(model, "batch"):
        model.evaluate(x, y)
    ```

    Raises:
        ValueError: If `statistics` is none of the three, or there is no batch norm below `model_or_layer`.
        TypeError: If `model_or_layer` is not a Keras layer.
    """
    arguments.choice("statistics", statistics, STATISTICS)
    return StatisticsSwitch(batch_normalizations(model_or_layer), statistics)


def freeze(model_or_layer: keras.Layer) -> None:
    """Stops all batch norms below a model from learning: gamma, beta and the moving statistics stay as they are.

    They normalize with the moving statistics from now on, as Keras defines `trainable = False`; it holds at once, also
    after `compile` and in the middle of `fit`, in the whole process: for every thread, and for every model that shares
    one of the layers, whose compiled functions are made anew. The optimizer keeps what it remembers of them; one that
    was not used yet gets its room for them now, for the day that they are unfrozen.

    Args:
        model_or_layer: A model, a wrapper or a layer; its batch norms (ours and stock Keras's) are frozen.

    Raises:
        ValueError: If there is no batch norm below `model_or_layer`.
        TypeError: If `model_or_layer` is not a Keras layer.
    """
    layers = batch_normalizations(model_or_layer)
    # What an earlier `freeze` froze would get no room in an optimizer that was made since.
    for frozen in _frozen_by_freeze(model_or_layer, layers):
        frozen.undo()
    _build_optimizers(_owners(layers))
    held = _below_frozen(model_or_layer)
    for layer in layers:
        # Into `__dict__`, past Keras's tracking: this belongs to the process, not to the model.
        layer.__dict__[_FROZEN] = _Frozen(layer, id(layer) in held) if layer.trainable else None
        layer.trainable = False
    _trace_again(layers)


def unfreeze(model_or_layer: keras.Layer) -> None:
    """Undoes `freeze`: all batch norms below a model that it stopped learn again, as far as they did before.

    It undoes nothing else: what had `trainable = False` before stays frozen, and so does what is in a model or layer
    that got it since. Where all batch norms are frozen and `freeze` has seen none of them, in a model that was loaded
    say, all learn again; where some are, a warning names them. As `freeze`, it holds in the whole process. What the
    optimizer remembers stays, of gamma and beta as of all other variables, where `freeze` came after `compile`. An
    optimizer that was made while they were frozen has no room for them, and Keras knows no way to give it some.

    Args:
        model_or_layer: A model, a wrapper or a layer; its batch norms (ours and stock Keras's) are unfrozen.

    Raises:
        ValueError: If there is no batch norm below `model_or_layer`, or an optimizer has no room for it.
        TypeError: If `model_or_layer` is not a Keras layer.
    """
    layers = batch_normalizations(model_or_layer)
    frozen = _frozen_by_freeze(model_or_layer, layers)
    others = [layer for layer in layers if not layer.trainable and _FROZEN not in layer.__dict__]
    thawed = others if len(others) == len(layers) else []
    learning = [variable for one in frozen for variable in one.learning]
    learning += [v for layer in thawed for v in (layer.gamma, layer.beta) if v is not None]
    _check_room(_owners(layers), learning)
    for one in frozen:
        one.undo()
    for layer in thawed:
        layer.trainable = True
    for layer in layers:
        if layer.trainable:
            layer.__dict__.pop(_FROZEN, None)
    if others and not frozen and not thawed:
        warn(
            "`model_or_layer` should have batch normalizations that `freeze` has frozen, in this process: `unfreeze` "
            f"undoes that and nothing else. Received: {model_or_layer.name!r}, with "
            f"{listed([layer.name for layer in others])} frozen otherwise, "
            "which stay so; give them, and the model that they are in, `trainable = True` and compile again."
        )
    _trace_again(layers)


class _Frozen:
    """What `freeze` found a layer to be that learned.

    Args:
        layer: a batch norm, trainable.
        held: whether it is in a layer that is frozen itself.
    """

    def __init__(self, layer: keras.layers.BatchNormalization, held: bool):
        self.held = held
        # An activation may be a layer too.
        self._parts = [(part, part.trainable) for part in [*layers_below(layer), *layer.variables]]

    @property
    def learning(self) -> list[keras.Variable]:
        """The variables that learn once it is undone."""
        return [part for part, trainable in self._parts if trainable and isinstance(part, keras.Variable)]

    def undo(self) -> None:
        for part, trainable in self._parts:  # The layer first, which hands it on to all others.
            part.trainable = trainable


def _frozen_by_freeze(model_or_layer: keras.Layer, layers: Iterable[keras.layers.BatchNormalization]) -> list[_Frozen]:
    """What `freeze` did to `layers` and nobody has changed since, on a layer or a model that it is in."""
    held = _below_frozen(model_or_layer)
    of_layers = [(layer, layer.__dict__.get(_FROZEN)) for layer in layers if not layer.trainable]
    return [frozen for layer, frozen in of_layers if frozen is not None and (frozen.held or id(layer) not in held)]


def _below_frozen(model_or_layer: keras.Layer) -> set[int]:
    """Of all that is in a model or layer that is frozen, the identities."""
    containers = [layer for layer in layers_below(model_or_layer) if not layer.trainable]
    return {id(layer) for container in containers for layer in layers_below(container) if layer is not container}


def batch_normalizations(model_or_layer: keras.Layer) -> list[keras.layers.BatchNormalization]:
    """All batch norms at or below a layer, each once, ours and stock Keras's.

    Raises:
        ValueError: If there is none.
        TypeError: If `model_or_layer` is not a Keras layer.
    """
    if not isinstance(model_or_layer, keras.Layer):
        raise TypeError(
            f"`model_or_layer` must be a Keras model or layer. Received: {type(model_or_layer).__name__}, "
            f"{shown(model_or_layer)}."
        )
    layers = batch_norms_below(model_or_layer)
    if not layers:
        raise ValueError(
            "`model_or_layer` must be or contain a batch normalization that was made already (a subclassed model "
            f"makes some when it is built). Received: {model_or_layer.name!r}, with none."
        )
    return layers


def _build_optimizers(models: Iterable[keras.Model]) -> None:
    for model in models:
        optimizer = getattr(model, "optimizer", None)
        if optimizer is not None and model.built and not optimizer.built:
            with model.distribute_strategy.scope():
                optimizer.build(model.trainable_variables)


def _check_room(models: Iterable[keras.Model], variables: Iterable[keras.Variable]) -> None:
    for model in models:
        optimizer = getattr(model, "optimizer", None)
        if optimizer is None or not optimizer.built:
            continue
        known = {id(variable) for variable in optimized_variables(optimizer)}
        below = {id(variable) for variable in model.variables}
        missing = [v.path for v in variables if id(v) in below and id(v) not in known]
        if missing:
            raise ValueError(
                "`model_or_layer` must have been frozen after `compile`, so that the optimizer has room for its "
                "weights; compile the model again, with a new optimizer, and then unfreeze. "
                f"Received: model {model.name!r}, whose optimizer was made without {listed(missing)}."
            )


def _statistics_of(layer: keras.layers.BatchNormalization) -> str:
    if isinstance(layer, BatchNormalization):
        return layer.statistics
    return getattr(layer.__dict__.get("call"), "statistics", "auto")


def _set_statistics(layer: keras.layers.BatchNormalization, statistics: str) -> None:
    if isinstance(layer, BatchNormalization):
        layer.statistics = statistics
    elif statistics == "auto":
        layer.__dict__.pop("call", None)
    else:
        # Into `__dict__`, past Keras's tracking: this belongs to the process, not to the model.
        layer.__dict__["call"] = _stock_call(layer, statistics)


def _stock_call(layer: keras.layers.BatchNormalization, statistics: str) -> Callable[..., Any]:
    """The `call` of a stock Keras layer with its statistics chosen."""

    def call(inputs, training=None, mask=None):
        if statistics == "moving":
            return type(layer).call(layer, inputs, training=False, mask=mask)
        if training and layer.trainable:
            return type(layer).call(layer, inputs, training=True, mask=mask)
        x = tf.convert_to_tensor(inputs)
        dtype = statistics_dtype(x.dtype)
        y, *_ = ops.normalize_batch(
            x,
            tf.cast(layer.gamma, dtype) if layer.scale else None,
            tf.cast(layer.beta, dtype) if layer.center else None,
            axes=[layer.axis % len(x.shape)],
            epsilon=layer.epsilon,
            weights=None if mask is None else tf.expand_dims(mask, -1),
            synchronized=layer.synchronized,
        )
        return tf.cast(y, layer.compute_dtype)

    call.statistics = statistics  # type: ignore[attr-defined]
    return call


def _owners(layers: Iterable[keras.Layer]) -> list[keras.Model]:
    """Every live model that contains one of `layers`.

    Nothing leads from a layer to the models it is part of, and a model may train another one's layers, so all live
    models are looked at.
    """
    wanted = {id(layer) for layer in layers}
    # By `type`, since `isinstance` may run code of the objects it looks at.
    models = [candidate for candidate in gc.get_objects() if issubclass(type(candidate), keras.Model)]
    return [model for model in models if any(id(layer) in wanted for layer in layers_below(model))]


def _trace_again(layers: Iterable[keras.Layer]) -> None:
    """Makes anew the compiled functions of every live model that contains one of `layers`."""
    for model in _owners(layers):
        for kind in ("train", "test", "predict"):
            # Not reset to None: a running `fit` calls them without asking.
            if getattr(model, f"{kind}_function", None) is not None:
                getattr(model, f"make_{kind}_function")(force=True)
