"""How far what a normalization sees is from what its statistics say it should see."""

import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from keras_bn.model import (
    calls_replaced,
    inference_mode,
    input_moments,
    merge,
    named_batch_norms,
    observed_call,
)
from keras_bn.statistics import Moments


class Distance(NamedTuple):
    """How far one normal distribution is from a reference, per channel.

    Attributes:
        mean_shift: (mean - reference mean) / reference standard deviation.
        variance_ratio: variance / reference variance.
        kl: Kullback-Leibler divergence from the reference, in nats, never negative.
    """

    mean_shift: Any
    variance_ratio: Any
    kl: Any


def distance(mean: Any, variance: Any, reference_mean: Any, reference_variance: Any, epsilon: float) -> Distance:
    """Distance of N(mean, variance) from N(reference_mean, reference_variance), channel by channel.

    v = variance + epsilon, r = reference_variance + epsilon
    mean_shift = (mean - reference_mean) / sqrt(r)
    variance_ratio = v / r
    kl = (v / r + mean_shift**2 - 1 - log(v / r)) / 2

    Epsilon is that of the layer: with it a channel that is constant in both has distance 0, as it has for the layer.

    Args:
        mean, variance, reference_mean, reference_variance: shape `(C,)`; computed in float64.
        epsilon: the layer's, of the unit of a variance.

    Returns:
        A `Distance` of float64 tensors of shape `(C,)`.
    """
    m, v, m0, v0 = map(_in_float64, (mean, variance, reference_mean, reference_variance))
    shift = (m - m0) / tf.sqrt(v0 + epsilon)
    ratio = (v + epsilon) / (v0 + epsilon)
    return Distance(shift, ratio, (ratio + shift**2 - 1 - tf.math.log(ratio)) / 2)


def _in_float64(x: Any) -> tf.Tensor:
    """Straight from Python numbers too, which `tf.cast` takes to float32 first."""
    return tf.cast(x, tf.float64) if hasattr(x, "dtype") else tf.constant(x, tf.float64)


def input_distances(model: keras.Model, inputs: Any) -> dict[str, Distance]:
    """Compares what reaches each normalization for a batch, in inference mode, with its moving statistics.

    Args:
        model: any Keras model.
        inputs: one batch, as `model` takes it; also symbolic, inside a `tf.function`.

    Returns:
        By layer name a `Distance` of float64 tensors of shape `(C,)`, with the biased variance of the batch. A layer
        called several times is measured over all its calls; one that is not called is missing.
    """
    layers = named_batch_norms(model)
    seen: dict[str, list[Moments]] = {}

    def measuring(name: str, layer: keras.layers.BatchNormalization) -> Callable[..., Any]:
        return observed_call(layer, lambda x, mask: seen.setdefault(name, []).append(input_moments(layer, x, mask)))

    with inference_mode(model), calls_replaced({layer: measuring(name, layer) for name, layer in layers.items()}):
        model(inputs, training=False)
    return {name: _from_own_statistics(layers[name], merge(parts)) for name, parts in seen.items()}


def _from_own_statistics(layer: keras.layers.BatchNormalization, moments: Moments) -> Distance:
    variance = tf.math.divide_no_nan(moments.m2, moments.count)
    return distance(moments.mean, variance, layer.moving_mean, layer.moving_variance, layer.epsilon)


def summary(one: Distance) -> Mapping[str, Any]:
    """A layer's distance in three numbers: root mean square shift, the ratio farthest from 1, mean divergence.

    Args:
        one: a `Distance` with tensors of shape `(C,)`.

    Returns:
        Scalars `mean_shift` (standard deviations), `variance_ratio`, `kl` (nats).
    """
    ratio = tf.reshape(one.variance_ratio, [-1])
    return {
        "mean_shift": tf.sqrt(tf.reduce_mean(one.mean_shift**2)),
        "variance_ratio": ratio[tf.argmax(tf.abs(tf.math.log(ratio)))],
        "kl": tf.reduce_mean(one.kl),
    }


def plain(numbers: Mapping[str, Any]) -> dict[str, float]:
    """A `summary` as Python numbers."""
    return {name: float(value) for name, value in numbers.items()}


def drift_of_model(model: keras.Model, inputs: Any) -> list[dict[str, Any]]:
    """The `summary` of each normalization for one batch, as rows for a table or JSON.

    Args:
        model: any Keras model with a batch normalization.
        inputs: one batch, as `model` takes it.

    Raises:
        ValueError: when the model calls no batch normalization.
    """
    distances = input_distances(model, inputs)
    if not distances:
        raise ValueError(f"`model` must have a batch normalization. Received: model={model.name!r}, which has none.")
    return [{"layer": name, **plain(summary(one))} for name, one in distances.items()]


def drift_of_version(folder: str | os.PathLike[str], inputs: Any) -> list[dict[str, Any]]:
    """The same asked of an exported version, by its signature `batch_norm_drift`.

    Args:
        folder: of the version.
        inputs: one batch, as its one input takes it.

    Raises:
        ValueError: when it was exported without that signature.
    """
    signatures = tf.saved_model.load(os.fspath(folder)).signatures
    if "batch_norm_drift" not in signatures:
        raise ValueError(
            "`folder` must be a version with the signature batch_norm_drift (a normalization, and `drift=True`). "
            f"Received: {os.fspath(folder)} with {sorted(signatures)}."
        )
    ask = signatures["batch_norm_drift"]
    ((name, spec),) = ask.structured_input_signature[1].items()
    answer = {key: value.numpy() for key, value in ask(**{name: tf.cast(inputs, spec.dtype)}).items()}
    numbers = ("mean_shift", "variance_ratio", "kl")
    return [
        {"layer": layer.decode(), **{key: float(answer[key][i]) for key in numbers}}
        for i, layer in enumerate(answer["layer"])
    ]
