"""The layouts in which the operations see a tensor, and the way back from each."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import tensorflow as tf

Restore = Callable[[tf.Tensor], tf.Tensor]


def as_rows(x: tf.Tensor, axes: Sequence[int]) -> tuple[tf.Tensor, Restore]:
    """`x` as a matrix with the channels in columns, shape `(M, C)`, and the way back.

    Args:
        x: Tensor of rank 2 or more.
        axes: The channel axes, not negative, ascending.
    """
    rank = len(x.shape)
    if rank == 2 and axes[0] == 1:
        return x, lambda y: y
    others = [axis for axis in range(rank) if axis not in axes]
    if others == list(range(len(others))):
        return tf.reshape(x, [-1, channel_count(x, axes)]), _reshape_like(x)
    if has_planes(x, axes):
        # As few axes as possible: TensorFlow transposes three of them up to three times as fast as five.
        planes, restore_planes = as_planes(x, axes)
        examples, channels, values = sizes_of(planes)

        def restore(y):
            return restore_planes(tf.transpose(tf.reshape(y, [examples, values, channels]), [0, 2, 1]))

        return tf.reshape(tf.transpose(planes, [0, 2, 1]), [-1, channels]), restore
    order = [*others, *axes]
    back = [order.index(axis) for axis in range(rank)]
    rows, restore = as_rows(tf.transpose(x, order), range(len(others), rank))
    return rows, lambda y: tf.transpose(restore(y), back)


def as_planes(x: tf.Tensor, axes: Sequence[int]) -> tuple[tf.Tensor, Restore]:
    """`x`, which must have planes, as examples of channels of values, shape `(N, C, S)`, and the way back."""
    sizes = sizes_of(x)
    parts = sizes[: axes[0]], sizes[axes[0] : axes[-1] + 1], sizes[axes[-1] + 1 :]
    return tf.reshape(x, [math.prod(part) for part in parts]), _reshape_like(x)


def has_planes(x: tf.Tensor, axes: Sequence[int]) -> bool:
    """Whether the values of a channel of an example are neighbours: the channel axes stand together, and not last."""
    return axes[-1] != len(x.shape) - 1 and are_neighbours(axes)


def are_neighbours(axes: Sequence[int]) -> bool:
    """Whether the channel axes stand together."""
    return axes[-1] - axes[0] + 1 == len(axes)


def ragged_as_values(x: tf.RaggedTensor) -> tuple[tf.Tensor, Restore]:
    """The values that are there, of the rank of `x` with sizes 1 before them, and the way back."""
    values = x.flat_values
    ones = [1] * (len(x.shape) - len(values.shape))
    return tf.reshape(values, [*ones, *sizes_of(values)]), _as_ragged(x)


def ragged_as_padded(x: tf.RaggedTensor) -> tuple[tf.Tensor, tf.Tensor, Restore]:
    """`x` filled up with zeros, which values are there, and the way back."""
    there = tf.ones_like(x, tf.bool).to_tensor()
    back = _as_ragged(x)
    return tf.ensure_shape(x.to_tensor(), x.shape), there, lambda y: back(tf.boolean_mask(y, there))


def _as_ragged(x: tf.RaggedTensor) -> Callable[[tf.Tensor], tf.RaggedTensor]:
    return lambda values: x.with_flat_values(tf.reshape(values, tf.shape(x.flat_values)))


def along(axes: Sequence[int], values: tf.Tensor, x: tf.Tensor) -> tf.Tensor:
    """`values`, shape `(C,)`, so that it broadcasts along `axes` of `x`."""
    if tuple(axes) == (len(x.shape) - 1,):
        return values
    return tf.reshape(values, [size if axis in axes else 1 for axis, size in enumerate(x.shape)])


def channel_count(x: tf.Tensor, axes: Sequence[int]) -> int:
    """How many channels there are: C, the product of the sizes of `axes`."""
    return math.prod(x.shape[axis] for axis in axes)


def value_count(x: tf.Tensor, reduced: Sequence[int], dtype: tf.DType) -> tf.Tensor | float:
    """How many values there are along the axes `reduced`: a Python number where the shape is known."""
    if all(x.shape[axis] is not None for axis in reduced):
        return float(math.prod(x.shape[axis] for axis in reduced))
    return tf.cast(tf.reduce_prod(tf.gather(tf.shape(x), reduced)), dtype)


def sizes_of(x: tf.Tensor) -> list[int | tf.Tensor]:
    """The sizes of `x`: numbers where they are known."""
    return [tf.shape(x)[axis] if size is None else size for axis, size in enumerate(x.shape)]


def _reshape_like(x: tf.Tensor) -> Restore:
    """Reshapes to the shape of `x`, without asking for it at run time where one size at most is unknown."""
    static = [-1 if size is None else size for size in x.shape]
    if static.count(-1) <= 1 and 0 not in static:
        return lambda y: tf.reshape(y, static)
    return lambda y: tf.ensure_shape(tf.reshape(y, tf.shape(x)), x.shape)
