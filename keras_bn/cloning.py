"""A copy of a Keras model in which batch normalizations are other ones, with weights, compilation and optimizer."""

import contextlib
import inspect
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import keras

from keras_bn.configuration import own_objects_known
from keras_bn.examples import reason
from keras_bn.model import compile_arguments, graph_of, layers_below, new_input_layers, nodes_of, optimized_variables
from keras_bn.state import copy_state, copy_vocabularies

# Changes the configuration of a normalization in place, and gives the layers that have to follow it. `alone` says
# whether any can follow: inside a wrapper there is no place for them.
Rewrite = Callable[[dict[str, Any], bool], list[keras.Layer]]


def clone(model: keras.Model, old_class: type[keras.layers.BatchNormalization], rewrite: Rewrite) -> Any:
    """The copy, on variables of its own.

    Functional and sequential models are built anew, call by call, nested ones and all layers that are shared once;
    other layers, wrappers and subclassed models are made from their configuration.

    Args:
        model: built.
        old_class: which normalizations are changed; a subclass is left as it is.
        rewrite: their configurations.

    Raises:
        ValueError: when a layer cannot be made from its configuration.
    """
    copies: dict[int, list[Any]] = {}
    graphs: list[tuple[Any, Any]] = []
    leaves: list[tuple[Any, Any]] = []

    def copy(op: Any) -> list[Any]:
        """What is called in the place of `op`."""
        if id(op) not in copies:
            if graph_of(op) is not None:
                copies[id(op)] = [_copy_graph(op, copy)]
                graphs.append((op, copies[id(op)][0]))
            elif isinstance(op, keras.Layer):
                copies[id(op)] = _copy_leaf(op, old_class, rewrite)
                leaves.append((op, copies[id(op)][0]))
            else:
                copies[id(op)] = [op]
        return copies[id(op)]

    new = copy(model)[0]
    pairs = [pair for old_leaf, new_leaf in leaves for pair in copy_state(old_leaf, new_leaf)]
    # Outermost first: what is set of a model is set of all below it.
    within = [two for leaf in leaves for two in zip(*map(layers_below, leaf), strict=True)]
    for old_layer, new_layer in [*reversed(graphs), *within]:
        new_layer.trainable = old_layer.trainable
    _compile(model, new, {id(old): new for old, new in pairs})
    return new


def _copy_graph(model: Any, copy: Callable[[Any], list[Any]]) -> keras.Model:
    """Of its own class where that has the constructor of Keras's, else a plain one."""
    plain = all("__init__" not in vars(c) for c in type(model).__mro__ if not c.__module__.startswith("keras."))
    inputs = new_input_layers(model)
    if isinstance(model, keras.Sequential):
        layers = [op for layer in model.layers for op in copy(layer)]
        return (type(model) if plain else keras.Sequential)([*inputs, *layers], name=model.name)
    known = {id(tensor): layer.output for tensor, layer in zip(model.inputs, inputs, strict=True)}
    for node in nodes_of(model):
        args, kwargs = node.arguments.fill_in(known)
        first, *more = copy(node.operation)
        result = first(*args, **kwargs)
        for op in more:
            result = op(result)
        known.update({id(old): new for old, new in zip(node.outputs, keras.tree.flatten(result), strict=True)})
    return (type(model) if plain else keras.Model)(
        keras.tree.pack_sequence_as(model.input, [layer.output for layer in inputs]),
        keras.tree.pack_sequence_as(model.output, [known[id(tensor)] for tensor in model.outputs]),
        name=model.name,
    )


def _copy_leaf(layer: keras.Layer, old_class: Any, rewrite: Rewrite) -> list[keras.Layer]:
    is_norm = type(layer) is old_class
    with own_objects_known(layer) as custom:
        with _from_configuration(layer):
            config = keras.saving.serialize_keras_object(layer)
        config.pop("compile_config", None)
        following = _rewrite_all(config, rewrite, is_norm) if is_norm or _norms_below(layer, old_class) else []
        with _from_configuration(layer), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Model .* had a build config")  # It may be built below, or is refused.
            # Not `safe_mode`: nothing here comes from elsewhere, and the model's own functions are wanted.
            made: Any = keras.saving.deserialize_keras_object(config, custom_objects=custom, safe_mode=False)
            if type(made).build is keras.Model.build:  # Some layers cannot be called without their vocabulary.
                copy_vocabularies(layer, made)
                made.build_from_config(layer.get_build_config())
    left = [norm.name for norm in _norms_below(made, old_class)]
    if left:
        raise ValueError(
            "`model` must have its normalizations in its configuration; one that makes them in its own code has to be "
            f"changed there. Received: {layer.name!r} of type {type(layer).__name__}, which makes {left}."
        )
    return [made, *following]


@contextlib.contextmanager
def _from_configuration(layer: keras.Layer) -> Iterator[None]:
    try:
        yield
    except (TypeError, NotImplementedError) as error:
        cause: Exception = error
        while isinstance(cause.__context__, Exception):  # Keras puts whole configurations around what was wrong.
            cause = cause.__context__
        raise ValueError(
            "`model` must have layers that can be made from their configuration; `get_config` has to return what the "
            "constructor takes, and functions and classes in it be registered with "
            "`keras.saving.register_keras_serializable`. "
            f"Received: layer {layer.name!r} of type {type(layer).__name__}, which cannot: {reason(cause)}"
        ) from error


def _norms_below(layer: keras.Layer, old_class: Any) -> list[keras.Layer]:
    return [one for one in layers_below(layer) if type(one) is old_class]


def _rewrite_all(config: Any, rewrite: Rewrite, alone: bool) -> list[keras.Layer]:
    following: list[keras.Layer] = []
    if isinstance(config, dict):
        if config.get("class_name") == "BatchNormalization" and "config" in config:
            following += rewrite(config, alone)
        for value in config.values():
            following += _rewrite_all(value, rewrite, False)
    elif isinstance(config, list):
        for value in config:
            following += _rewrite_all(value, rewrite, False)
    return following


def _compile(model: Any, new: Any, variables: dict[int, Any]) -> None:
    settings = compile_arguments(model)
    if settings is None:
        return
    optimizer = settings["optimizer"] = _from_own_config(model.optimizer)
    for name in ("metrics", "weighted_metrics"):  # They count; a loss has no state.
        settings[name] = keras.tree.map_structure(
            lambda one: _from_own_config(one) if isinstance(one, keras.Metric) else one, settings[name]
        )
    new.compile(**settings)
    if model.optimizer.built:
        optimizer.build([variables[id(variable)] for variable in optimized_variables(model.optimizer)])
        for source, target in zip(model.optimizer.variables, optimizer.variables, strict=True):
            target.assign(source)


def _from_own_config(one: Any) -> Any:
    custom = {type(one).__name__: type(one)}
    if inspect.isfunction(getattr(one, "_fn", None)):  # Of a metric made of a function.
        custom[one._fn.__name__] = one._fn
    inner = getattr(one, "inner_optimizer", None)
    if inner is not None:
        custom[type(inner).__name__] = type(inner)
    with keras.saving.custom_object_scope(custom):
        return type(one).from_config(one.get_config())
