"""Layers made from the configuration of others, with the functions and classes that only those know."""

import contextlib
import inspect
import itertools
import types
from collections.abc import Callable, Iterator
from typing import Any

import keras

from keras_bn.model import layers_below

_numbers = itertools.count()


@contextlib.contextmanager
def own_objects_known(layer: keras.Layer) -> Iterator[dict[str, Any]]:
    """Within it, what is made from the configuration of `layer` has its classes, and the very functions that it has.

    Keras writes a function as its name, by which it knows few of its own and none of anyone else's; a lambda as its
    code, without what that code refers to; and refuses a `functools.partial` or a method. So functions that were given
    to Keras's layers and ours, here and below, stand under names that are known for as long as this lasts.

    Yields:
        All of them by the names that the configuration has, for what takes `custom_objects`.

    Raises:
        ValueError: when two classes, or functions of an author's layer, have one name.
    """
    kept: dict[str, Any] = {}
    before: list[tuple[keras.Layer, str, Any]] = []
    try:
        for one in layers_below(layer):
            for attribute in _attributes_of_arguments(type(one)):
                value = vars(one).get(attribute)
                if _is_unknown_function(value):
                    name = f"keras_bn_function_{next(_numbers)}"
                    kept[name] = value
                    before.append((one, attribute, value))
                    vars(one)[attribute] = _named(name)  # Past Keras's tracking.
        known = {**_custom(layer, set(kept)), **kept}
        with keras.saving.custom_object_scope(known):
            yield known
    finally:
        for one, attribute, value in before:
            vars(one)[attribute] = value


def _attributes_of_arguments(layer_class: type) -> set[str]:
    """Where the constructors of Keras and ours keep what they are given; what an author's class does is not known."""
    if layer_class.__module__.split(".")[0] not in ("keras", "keras_bn"):
        return set()
    constructors = [vars(one)["__init__"] for one in layer_class.__mro__ if "__init__" in vars(one)]
    names = {name for one in constructors if inspect.isfunction(one) for name in inspect.signature(one).parameters}
    return names | {f"_{name}" for name in names}


def _is_unknown_function(value: Any) -> bool:
    if not callable(value) or isinstance(value, type) or hasattr(value, "get_config"):
        return False
    return not (inspect.isfunction(value) and getattr(keras.activations, value.__name__, None) is value)


def _named(name: str) -> Callable[..., Any]:
    """A function that is written under this name, and never called."""

    def stands_in(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("A layer was called while another was made from its configuration, by another thread.")

    return types.FunctionType(stands_in.__code__, stands_in.__globals__, name)


def _custom(layer: keras.Layer, leave_out: set[str]) -> dict[str, Any]:
    """Classes and functions that are not Keras's, by the names under which a configuration has them."""
    custom: dict[str, Any] = {}

    def add(value: Any) -> None:
        known = value if isinstance(value, type | types.FunctionType) else type(value)
        if known.__module__.split(".")[0] in ("keras", "builtins", "tensorflow", "numpy"):
            return
        name = keras.saving.get_registered_name(known)
        if name in leave_out or name == "<lambda>":  # A configuration has its code.
            return
        if custom.setdefault(name, known) is not known:
            raise ValueError(
                "`model` must not have two classes or functions of one name in one layer, unless they are registered "
                f"with `keras.saving.register_keras_serializable`. Received: {name!r} twice in layer {layer.name!r}."
            )

    for one in layers_below(layer):
        add(one)
        for attribute, value in vars(one).items():
            if callable(getattr(keras.Layer, attribute, None)):
                continue  # What Keras puts around `build` and `quantize` of each layer, and we around `call`.
            for part in value if isinstance(value, list | tuple) else [value]:
                if not isinstance(part, keras.Layer | keras.Variable):
                    add(part)
    return custom
