"""Stock Keras normalizations to ours and back, and weights from PyTorch and legacy tf_keras."""

import inspect
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from keras_bn import arguments
from keras_bn.cloning import clone
from keras_bn.examples import warn_of_rows
from keras_bn.folding.proof import Tolerance, agree_in_float64, check_repeats, errors_between
from keras_bn.folding.trials import proof_batches
from keras_bn.layer import BatchNormalization
from keras_bn.model import check_model, check_weights_finite, graph_of, set_statistics
from keras_bn.names import shown
from keras_bn.warning import warn

_STOCK = {"module": "keras.layers", "class_name": "BatchNormalization", "registered_name": None}
_OURS = {
    "module": BatchNormalization.__module__,
    "class_name": "BatchNormalization",
    "registered_name": "keras_bn>BatchNormalization",
}
# Says how to compute, not what.
_HARMLESS = {"kernel"}
_TRAINING_OPTIONS = (
    "momentum",
    "renorm",
    "renorm_clipping",
    "renorm_momentum",
    "synchronized",
    "virtual_batch_size",
    "unbiased_variance",
    "zero_debias",
    "kernel",
    "beta_regularizer",
    "gamma_regularizer",
    "beta_constraint",
    "gamma_constraint",
)


def convert(model: keras.Model, check: Any = None, **options: Any) -> Any:
    """A copy of `model` in which every stock Keras batch normalization is a `keras_bn.BatchNormalization`.

    Nested models and wrappers are gone into; weights, compilation and the state of the optimizer are taken along. A
    functional or sequential model whose class has an `__init__` of its own becomes a plain one, without the methods of
    that class; compilation is taken along unless `compile` is the author's own. The copy is proved: both run on
    `check`, or on random inputs where it is not given, for a subclassed model of the shapes that it was called with, in
    inference mode; where none fit a subclassed model, a warning says that nothing was proved. Until it is through, do
    not use the model in another thread.

    Args:
        model: built, of layers that can be made from their configuration.
        check: inputs, as `model` takes them, to prove the copy on. Has to be given where random numbers are not fit for
            the model.
        **options: how the new layers train: arguments of `keras_bn.BatchNormalization` such as `synchronized=True`,
            `virtual_batch_size=32` or `momentum=None`. Layers that are ours already stay as they are.

    Returns:
        The new model. `model` is left as it is.

    Raises:
        TypeError: when `model` is no Keras model.
        ValueError: when `model` is not built, has a layer that cannot be made anew, makes normalizations in its own
            code, where no configuration reaches, or takes no random inputs; or when an option is none of training,
            or there is no layer that it would be for.

    Example:

    ```python
    keras_bn.convert(model, synchronized=True)
    ```
    """
    check_model(model, built=True)
    unknown = sorted(set(options) - set(_TRAINING_OPTIONS))
    if unknown:
        raise ValueError(f"`options` must be of {', '.join(_TRAINING_OPTIONS)}. Received: {', '.join(unknown)}.")
    BatchNormalization(**options)  # Says at once what is wrong with them.

    converted = 0

    def rewrite(config: dict[str, Any], alone: bool) -> list[keras.Layer]:
        nonlocal converted
        if config.get("module") == _STOCK["module"]:
            config.update(_OURS)
            config["config"].update(options)
            converted += 1
        return []

    copy = clone(model, keras.layers.BatchNormalization, rewrite)
    if options and not converted:
        raise ValueError(
            f"`options` must be for stock normalizations that become ours, and {model.name!r} has none. Received: "
            f"{', '.join(options)}. `keras_bn.revert` makes those that are ours stock again; then convert."
        )
    return _proved(model, copy, check)


def revert(model: keras.Model, check: Any = None) -> Any:
    """A copy of `model` in which every `keras_bn.BatchNormalization` is a stock Keras one; the opposite of `convert`.

    An `activation` becomes a layer of its own after the normalization.

    Args:
        model: as for `convert`.
        check: as for `convert`.

    Returns:
        The new model. `model` is left as it is.

    Raises:
        TypeError: when `model` is no Keras model.
        ValueError: as for `convert`, or when a layer has an option that stock Keras does not know, such as groups of
            replicas, `synchronized=8`.
    """
    check_model(model, built=True)
    return _proved(model, clone(model, BatchNormalization, _to_stock), check)


def load_torch_weights(
    layer: keras.layers.BatchNormalization, state_dict: Mapping[str, Any], prefix: str = "", epsilon: float = 1e-5
) -> None:
    """Takes over a PyTorch `BatchNorm1d`, `2d` or `3d` from its entries in a `state_dict`.

    gamma = weight, beta = bias, moving_mean = running_mean, moving_variance = running_var (unbiased in PyTorch)

    Momentum is not a weight: Keras's is 1 - PyTorch's.

    Args:
        layer: ours or stock, built with as many channels.
        state_dict: of a module; tensors or arrays.
        prefix: in front of `running_mean`, like `"layer1.0.bn1"`.
        epsilon: of the PyTorch module, whose default is 1e-5; `layer` has to have the same.

    Raises:
        TypeError: when an argument is of the wrong type.
        ValueError: when an entry is missing or does not fit, or `layer.epsilon` is another.
    """
    _check_layer(layer)
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            "`state_dict` must be a mapping of names to tensors or arrays. "
            f"Received: state_dict={shown(state_dict)} of type {type(state_dict).__name__}."
        )
    if not isinstance(prefix, str):
        raise TypeError(f"`prefix` must be a string. Received: prefix={shown(prefix)}.")
    epsilon = arguments.number("epsilon", epsilon, 0.0)
    dot = f"{prefix}." if prefix and not prefix.endswith(".") else prefix
    entries = {name: state_dict.get(dot + name) for name in ("weight", "bias", "running_mean", "running_var")}
    if entries["running_mean"] is None or entries["running_var"] is None:
        known = sorted(
            name.removesuffix("running_mean") for name in map(str, state_dict) if name.endswith("running_mean")
        )
        if not known:
            raise ValueError(
                "`state_dict` must hold the running statistics of a batch norm, an entry that ends in running_mean. "
                f"Received: entries {list(map(str, state_dict))[:5]}."
            )
        raise ValueError(
            f"`prefix` must be that of a batch norm with running statistics, one of {known}. "
            f"Received: prefix={shown(prefix)}."
        )
    values = {name: None if value is None else _entry(dot + name, value) for name, value in entries.items()}
    _load(layer, values["weight"], values["bias"], values["running_mean"], values["running_var"], epsilon)


def load_tf_keras_weights(layer: keras.layers.BatchNormalization, legacy_layer: Any) -> None:
    """Takes over the weights of a built legacy `tf_keras.layers.BatchNormalization`.

    Args:
        layer: ours or stock, built with as many channels and the same epsilon.
        legacy_layer: of tf_keras.

    Raises:
        TypeError: when `layer` is no batch normalization.
        ValueError: when one is not built, or they do not fit.
    """
    _check_layer(layer)
    if not getattr(legacy_layer, "built", False) or not hasattr(legacy_layer, "moving_variance"):
        raise ValueError(
            f"`legacy_layer` must be a batch normalization that is built. Received: legacy_layer={shown(legacy_layer)}."
        )
    gamma = None if legacy_layer.gamma is None else _array(legacy_layer.gamma)
    beta = None if legacy_layer.beta is None else _array(legacy_layer.beta)
    mean, variance = _array(legacy_layer.moving_mean), _array(legacy_layer.moving_variance)
    _load(layer, gamma, beta, mean, variance, legacy_layer.epsilon)


def _proved(model: keras.Model, new: Any, check: Any) -> Any:
    try:
        batches, allowed = proof_batches(model, check), Tolerance(model)
    except ValueError as error:
        if check is not None or graph_of(model) is not None:
            raise
        # What a subclassed model takes is a guess: its dtypes are not known, nor shapes of several arguments.
        warn(
            "`check` should be given, a batch of what the model takes: the copy of a subclassed model "
            f"was not proved to compute the same, as no random inputs fit: {error}"
        )
        return new
    try:
        errors, not_finite = errors_between(model, new, batches)
    except ValueError:
        # Nothing finite comes out of it: is it the inputs or the model?
        check_weights_finite(model)
        raise
    if not allowed.allows(errors.relative, batches):
        check_repeats(model, batches)
        if not agree_in_float64(model, new, batches, allowed.value):
            raise ValueError(
                "`model` must have layers that are what their configuration says; the copy of it computes something "
                f"else. Received: model={model.name!r}, relative error {errors.relative:.3g} (allowed: "
                f"{allowed.value:g})."
            )
        warn(
            "`model` and its copy compute the same in float64, and round differently: outputs differ by "
            f"{errors.relative:.3g} relative. Keras's own normalization loses digits where a mean is many standard "
            "deviations from zero."
        )
    if check is not None:
        warn_of_rows("check", not_finite)
    return new


def _to_stock(config: dict[str, Any], alone: bool) -> list[keras.Layer]:
    if config.get("registered_name") != _OURS["registered_name"]:
        return []
    following = []
    if alone and "activation" in config["config"]:
        settings = config["config"]
        activation = keras.activations.get(settings.pop("activation"))
        name = f"{settings['name']}_activation"
        following = [keras.layers.Activation(activation, name=name, dtype=settings["dtype"])]
    settings = config["config"]
    known = {*inspect.signature(keras.layers.BatchNormalization.__init__).parameters, "name", "trainable", "dtype"}
    unknown = {name: value for name, value in settings.items() if name not in known | _HARMLESS}
    for name, kind in (("momentum", float), ("axis", int)):
        if not isinstance(settings[name], kind):
            unknown[name] = settings[name]
    limits = settings.get("renorm_clipping") or {}
    if isinstance(limits, str) or any(isinstance(limit, dict) for limit in limits.values()):
        unknown["renorm_clipping"] = limits
    if not isinstance(settings.get("synchronized", False), bool):
        # To stock Keras any number is True, and it would merge all replicas.
        raise ValueError(
            "`model` must have `synchronized=True` or `synchronized=False` to become stock, which knows no groups of "
            "replicas; set `layer.synchronized` to one of them first: inference is the same. "
            f"Received: layer {settings.get('name')!r} with synchronized={settings['synchronized']!r}."
        )
    if unknown:
        raise ValueError(
            "`model` must have only options that stock Keras knows, to become stock. "
            f"Received: layer {settings.get('name')!r} with {unknown}."
        )
    config["config"] = {name: value for name, value in settings.items() if name in known}
    config.update(_STOCK)
    return following


def _check_layer(layer: Any) -> None:
    if not isinstance(layer, keras.layers.BatchNormalization):
        raise TypeError(
            "`layer` must be a batch normalization, ours or stock. "
            f"Received: layer={shown(layer)} of type {type(layer).__name__}."
        )


def _entry(name: str, value: Any) -> np.ndarray:
    try:
        return _array(value)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"`state_dict` must hold tensors or arrays of numbers. Received: {name!r} of type {type(value).__name__}."
        ) from error


def _load(layer: Any, gamma: Any, beta: Any, mean: Any, variance: Any, epsilon: float) -> None:
    if not layer.built:
        raise ValueError(f"`layer` must be built, so that it has weights. Received: layer={layer.name!r}, not built.")
    if not np.isclose(layer.epsilon, epsilon, rtol=1e-6, atol=0):
        raise ValueError(
            f"`layer` must be made with epsilon={epsilon:g}, that of the other layer. "
            f"Received: layer={layer.name!r} with epsilon={layer.epsilon:g}."
        )
    size = int(np.prod(layer.moving_mean.shape))
    for name, value in (("weight", gamma), ("bias", beta), ("mean", mean), ("variance", variance)):
        if value is not None and value.size != size:
            raise ValueError(
                f"`layer` must have as many channels as the other. Received: layer={layer.name!r} with {size}, "
                f"and {value.size} values of {name}."
            )
        if value is not None and not (np.all(np.isfinite(value)) and (name != "variance" or value.min(initial=0) >= 0)):
            raise ValueError(
                f"The weights to take over must be finite, and variances not negative. Received: a {name} that is not, "
                f"for layer={layer.name!r}."
            )
    for name, wanted, value in (("scale", layer.scale, gamma), ("center", layer.center, beta)):
        if value is not None and not wanted:
            raise ValueError(f"`layer` must be made with {name}=True. Received: layer={layer.name!r} without.")
    shape = layer.moving_mean.shape
    if layer.scale:
        layer.gamma.assign(np.ones(shape) if gamma is None else gamma.reshape(shape))
    if layer.center:
        layer.beta.assign(np.zeros(shape) if beta is None else beta.reshape(shape))
    set_statistics(layer, mean.reshape(shape), variance.reshape(shape))


def _array(value: Any) -> np.ndarray:
    """Of a PyTorch tensor (also on another device, also with gradient), a variable, or an array."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
    return np.asarray(value.numpy() if hasattr(value, "numpy") else value, "float64")
