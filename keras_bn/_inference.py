"""Makes every layer of a model run in inference mode for a while, whatever its author wrote."""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import keras


def layers_below(model: keras.Layer) -> list[keras.Layer]:
    """Every layer below `model` once: nested models, wrapped and shared layers included, `model` itself first."""
    return list(model._flatten_layers())


def batch_norms_below(model: keras.Layer) -> list[keras.layers.BatchNormalization]:
    """Every batch normalization below `model` once, ours and stock Keras's."""
    return [layer for layer in layers_below(model) if isinstance(layer, keras.layers.BatchNormalization)]


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
    with calls_replaced(
        {layer: _without_training(layer.call) for layer in layers_below(model) if _takes_training(layer.call)}
    ):
        yield


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
