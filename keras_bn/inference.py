"""A Keras model run in inference mode, whatever its author wrote; its layers' calls watched or replaced meanwhile."""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf

from keras_bn.layer import BatchNormalization
from keras_bn.model import layers_below
from keras_bn.ops.layouts import ragged_as_padded


def observed_call(layer: keras.Layer, observe: Callable[[tf.Tensor, Any], None]) -> Callable[..., Any]:
    """The layer's `call`, with `observe(inputs, mask)` before it; ragged inputs as padded ones with a mask."""
    call = layer.call
    signature = inspect.signature(call)

    def observe_and_call(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        inputs, mask = next(iter(bound.arguments.values())), bound.arguments.get("mask")
        if isinstance(inputs, tf.RaggedTensor):
            inputs, mask, _ = ragged_as_padded(inputs)
        observe(inputs, mask)
        return call(*args, **kwargs)

    return observe_and_call


@contextlib.contextmanager
def calls_replaced(replacements: dict[keras.Layer, Callable[..., Any]]) -> Iterator[None]:
    """Runs `replacements[layer]` wherever `layer.call` would run, and takes it back at the end, also after an error.

    Args:
        replacements: for a layer, the function with the signature of its `call`.
    """
    # Straight into `__dict__`: neither Keras nor TensorFlow shall track what is there for a while only.
    before = {layer: layer.__dict__.get("call") for layer in replacements}
    try:
        for layer, replacement in replacements.items():
            layer.__dict__["call"] = replacement
        yield
    finally:
        for layer, call in before.items():
            if call is None:
                layer.__dict__.pop("call", None)
            else:
                layer.__dict__["call"] = call


@contextlib.contextmanager
def inference_mode(model: keras.Layer) -> Iterator[None]:
    """Every layer below `model` runs with `training=False`, also where its author passed `training=True` or nothing."""
    layers = layers_below(model)
    ours = [layer for layer in layers if isinstance(layer, BatchNormalization)]
    chosen = [layer.statistics for layer in ours]
    try:
        for layer in ours:
            layer.statistics = "moving"
        calls = {layer: _own_call(layer) for layer in layers}
        with calls_replaced({layer: _without_training(call) for layer, call in calls.items() if _takes_training(call)}):
            yield
    finally:
        for layer, statistics in zip(ours, chosen, strict=True):
            layer.statistics = statistics


def _own_call(layer: keras.Layer) -> Callable[..., Any]:
    """The layer's `call` without what `use_statistics` has put before that of a stock normalization."""
    if hasattr(layer.__dict__.get("call"), "statistics"):
        return type(layer).call.__get__(layer)
    return layer.call


def _takes_training(call: Callable[..., Any]) -> bool:
    return "training" in inspect.signature(call).parameters


def _without_training(call: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(call)

    @functools.wraps(call)
    def call_for_inference(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.arguments["training"] = False
        return call(*bound.args, **bound.kwargs)

    return call_for_inference
