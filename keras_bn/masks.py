"""What a mask weighs each value of a tensor with: checked, and laid beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from keras_bn.names import shown


def aligned_weights(mask: Any, x: tf.Tensor, axes: Sequence[int]) -> tf.Tensor:
    """`mask` with the rank of `x`: its axes are the first of `x`, as Keras's masks' are, else all but the channel axes.

    Args:
        mask: Weights, or True and False, of a shape that is that of `x` in one of these ways; sizes may be 1.
        x: What is weighted.
        axes: The channel axes of `x`, not negative, ascending.

    Raises:
        TypeError: `mask` is neither numbers nor booleans.
        ValueError: The shape of `mask` fits in none of these ways, or a weight that is known is negative or not finite.
    """
    mask = _weights(mask)
    rank = len(x.shape)
    if _broadcasts(mask.shape, x.shape[: len(mask.shape)]):
        return tf.reshape(mask, tf.concat([tf.shape(mask), [1] * (rank - len(mask.shape))], 0))
    if _broadcasts(mask.shape, [size for axis, size in enumerate(x.shape) if axis not in axes]):
        for axis in axes:
            mask = tf.expand_dims(mask, axis)
        return mask
    raise ValueError(
        "`mask` must have the first axes of the inputs, as Keras's masks do, or all but the channel axes "
        f"{list(axes)}; sizes may be 1. Received: mask of shape {tuple(mask.shape)} for inputs of shape "
        f"{tuple(x.shape)}."
    )


def _weights(mask: Any) -> tf.Tensor:
    """`mask` as a tensor of weights, looked at where its values are known."""
    allowed = "`mask` must be booleans, or numbers that are finite and not below 0."
    try:
        weights = tf.convert_to_tensor(mask)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{allowed} Received: mask={shown(mask)}.") from error
    if not (weights.dtype.is_floating or weights.dtype.is_integer or weights.dtype.is_bool):
        raise TypeError(f"{allowed} Received: mask of dtype {weights.dtype.name}.")
    known = None if weights.dtype.is_bool else tf.get_static_value(weights)
    if known is not None and known.size:
        least, most = (float(bound) for bound in (np.min(known), np.max(known)))  # NaN where there is one.
        if not 0 <= least <= most < np.inf:
            raise ValueError(f"{allowed} Received: mask with values from {least:g} to {most:g}.")
    return weights


def _broadcasts(shape: Sequence[int | None], target: Sequence[int | None]) -> bool:
    if len(shape) != len(target):
        return False
    return all(size in (1, None) or goal is None or size == goal for size, goal in zip(shape, target, strict=True))
