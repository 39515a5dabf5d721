"""Stock Keras normalizations to ours and back, and weights from PyTorch and legacy tf_keras."""

import inspect
import json
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_bn.layer import BatchNormalization
from keras_bn.model import batch_norms_below, layers_below, set_statistics

_STOCK = {"module": "keras.layers", "class_name": "BatchNormalization", "registered_name": None}
_OURS = {
    "module": BatchNormalization.__module__,
    "class_name": "BatchNormalization",
    "registered_name": "keras_bn>BatchNormalization",
}
# Says how to compute, not what.
_HARMLESS = {"kernel"}


def convert(model: keras.Model) -> keras.Model:
    """A copy of `model` in which every stock Keras batch normalization is a `keras_bn.BatchNormalization`.

    Nested models and wrappers are gone into; weights, compilation and the state of the optimizer are taken along.

    Args:
        model: built, and such that Keras can save and load it.

    Returns:
        The new model. `model` is left as it is.

    Raises:
        TypeError: when `model` is no Keras model.
        ValueError: when `model` is not built, or makes normalizations in its own code, where no configuration reaches.
    """
    return _rewritten(model, keras.layers.BatchNormalization, _to_ours)


def revert(model: keras.Model) -> keras.Model:
    """A copy of `model` in which every `keras_bn.BatchNormalization` is a stock Keras one; the opposite of `convert`.

    Args:
        model: built, and such that Keras can save and load it.

    Returns:
        The new model. `model` is left as it is.

    Raises:
        TypeError: when `model` is no Keras model.
        ValueError: when `model` is not built, makes normalizations in its own code, or a layer has an option that
            stock Keras does not know.
    """
    return _rewritten(model, BatchNormalization, _to_stock)


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
        ValueError: when an entry is missing or does not fit, or `layer.epsilon` is another.
    """
    dot = f"{prefix}." if prefix and not prefix.endswith(".") else prefix
    entries = {name: state_dict.get(dot + name) for name in ("weight", "bias", "running_mean", "running_var")}
    if entries["running_mean"] is None or entries["running_var"] is None:
        known = sorted(name.removesuffix("running_mean") for name in state_dict if name.endswith("running_mean"))
        raise ValueError(
            f"`prefix` must be that of a batch norm with running statistics, one of {known}. "
            f"Received: prefix={prefix!r}."
        )
    values = {name: None if value is None else _array(value) for name, value in entries.items()}
    _load(layer, values["weight"], values["bias"], values["running_mean"], values["running_var"], epsilon)


def load_tf_keras_weights(layer: keras.layers.BatchNormalization, legacy_layer: Any) -> None:
    """Takes over the weights of a built legacy `tf_keras.layers.BatchNormalization`.

    Args:
        layer: ours or stock, built with as many channels and the same epsilon.
        legacy_layer: of tf_keras.

    Raises:
        ValueError: when one is not built, or they do not fit.
    """
    if not getattr(legacy_layer, "built", False) or not hasattr(legacy_layer, "moving_variance"):
        raise ValueError(
            f"`legacy_layer` must be a batch normalization that is built. Received: legacy_layer={legacy_layer!r}."
        )
    gamma = None if legacy_layer.gamma is None else _array(legacy_layer.gamma)
    beta = None if legacy_layer.beta is None else _array(legacy_layer.beta)
    mean, variance = _array(legacy_layer.moving_mean), _array(legacy_layer.moving_variance)
    _load(layer, gamma, beta, mean, variance, legacy_layer.epsilon)


def _rewritten(model: keras.Model, old_class: Any, rewrite: Callable[[dict[str, Any]], None]) -> keras.Model:
    if not isinstance(model, keras.Model):
        raise TypeError(f"`model` must be a `keras.Model`. Received: model={model!r} of type {type(model).__name__}.")
    if not model.built:
        raise ValueError(
            "`model` must be built: give it an `Input`, or call it once on a batch of data. "
            f"Received: model={model.name!r}, which is not built."
        )
    custom = {type(layer).__name__: type(layer) for layer in layers_below(model) if not _is_builtin(layer)}
    with tempfile.TemporaryDirectory() as folder:
        before, after = Path(folder) / "before.keras", Path(folder) / "after.keras"
        model.save(before)
        with zipfile.ZipFile(before) as source, zipfile.ZipFile(after, "w") as target:
            for entry in source.infolist():
                with source.open(entry) as reader, target.open(entry.filename, "w", force_zip64=True) as writer:
                    if entry.filename == "config.json":
                        writer.write(json.dumps(_rewrite_all(json.load(reader), rewrite)).encode())
                    else:
                        shutil.copyfileobj(reader, writer)
        # Not `safe_mode`: nothing here comes from elsewhere, and the model's own functions are wanted.
        rewritten: Any = keras.models.load_model(after, custom_objects=custom, safe_mode=False)
    left = [layer.name for layer in batch_norms_below(rewritten) if type(layer) is old_class]
    if left:
        raise ValueError(
            "`model` must have its normalizations in its configuration; one that makes them in its own code has to be "
            f"changed there. Received: model={model.name!r} of type {type(model).__name__}, which makes {left}."
        )
    return rewritten


def _rewrite_all(config: Any, rewrite: Callable[[dict[str, Any]], None]) -> Any:
    if isinstance(config, dict):
        if config.get("class_name") == "BatchNormalization" and "config" in config:
            rewrite(config)
        for value in config.values():
            _rewrite_all(value, rewrite)
    elif isinstance(config, list):
        for value in config:
            _rewrite_all(value, rewrite)
    return config


def _to_ours(config: dict[str, Any]) -> None:
    if config.get("module") == _STOCK["module"]:
        config.update(_OURS)


def _to_stock(config: dict[str, Any]) -> None:
    if config.get("registered_name") != _OURS["registered_name"]:
        return
    settings = config["config"]
    known = {*inspect.signature(keras.layers.BatchNormalization.__init__).parameters, "name", "trainable", "dtype"}
    unknown = {name: value for name, value in settings.items() if name not in known | _HARMLESS}
    for name, kind in (("momentum", float), ("axis", int)):
        if not isinstance(settings[name], kind):
            unknown[name] = settings[name]
    limits = settings.get("renorm_clipping") or {}
    if isinstance(limits, str) or any(isinstance(limit, dict) for limit in limits.values()):
        unknown["renorm_clipping"] = limits
    if unknown:
        raise ValueError(
            "`model` must have only options that stock Keras knows, to become stock. "
            f"Received: layer {settings.get('name')!r} with {unknown}."
        )
    config["config"] = {name: value for name, value in settings.items() if name in known}
    config.update(_STOCK)


def _is_builtin(layer: keras.Layer) -> bool:
    return type(layer).__module__.split(".")[0] == "keras" or isinstance(layer, BatchNormalization)


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
