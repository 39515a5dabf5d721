"""What it takes to prove that two models compute the same: inputs to try and the largest difference."""

from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from keras_bn.model import inference_mode


class Errors(NamedTuple):
    """Largest differences over all outputs; NaN where only one of the two is finite.

    Attributes:
        absolute: largest difference of two values.
        relative: largest difference in an output tensor, divided by the largest magnitude in it.
    """

    absolute: float
    relative: float


def random_inputs(structure: Any, of_pixels: bool, argument: str, batch: int = 3, seed: int = 0) -> Any:
    """One batch: standard normal numbers, or `of_pixels` from 0 to 255; 0 or 1 for integers other than uint8 pixels.

    Args:
        structure: of things with a shape and a dtype; sizes that are free become 64.
        of_pixels: which numbers.
        argument: where a person can give inputs instead.
        batch: how many examples.
        seed: of the numbers.

    Raises:
        ValueError: for inputs that are strings.
    """
    rng = np.random.default_rng(seed)

    def draw(leaf: Any) -> tf.Tensor:
        shape = (batch, *(64 if size is None else size for size in leaf.shape[1:]))
        dtype = tf.as_dtype(leaf.dtype)
        if dtype == tf.string:
            raise ValueError(f"`{argument}` must be given for a model that takes strings. Received: {argument}=None.")
        if not dtype.is_floating:
            return tf.cast(rng.integers(0, 256 if dtype == tf.uint8 else 2, shape), dtype)
        return tf.cast(rng.uniform(0, 255, shape) if of_pixels else rng.normal(size=shape), dtype)

    return keras.tree.map_structure(draw, structure)


def largest_errors(expected: Any, got: Any) -> Errors:
    """Compares outputs of the same structure.

    absolute = max(|expected - got|), relative = max over tensors of max(|expected - got|) / max(|expected|)

    Args:
        expected, got: tensors in the same structure; compared in float64.
    """
    absolute, relative = [0.0], [0.0]
    for a, b in zip(keras.tree.flatten(expected), keras.tree.flatten(got), strict=True):
        a, b = (np.asarray(v).astype("float64") for v in (a, b))
        same = (a == b) | (np.isnan(a) & np.isnan(b))
        difference = np.where(same, 0.0, np.abs(np.where(same, 0.0, a) - np.where(same, 0.0, b)))
        error = np.max(difference, initial=0.0)
        largest = np.max(np.abs(a[np.isfinite(a)]), initial=0.0)
        absolute.append(float(error))
        relative.append(float(error / largest if largest > 0 else error))
    return Errors(float(np.max(absolute)), float(np.max(relative)))


def errors_between(model: keras.Model, other: keras.Model, batches: list[Any]) -> Errors:
    """The largest over all batches, both models in inference mode; `other` counts relative to `model`."""
    errors = []
    for inputs in batches:
        with inference_mode(model), inference_mode(other):
            errors.append(largest_errors(model(inputs, training=False), other(inputs, training=False)))
    return Errors(*np.max(errors, axis=0).tolist())
