"""The layouts in which the kernels see a tensor, and the way back from each."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import tensorflow as tf

Restore = Callable[[tf.Tensor], tf.Tensor]


def as_rows(x: tf.Tensor, axes: Sequence[int], shape: Sequence[int | tf.Tensor] = (-1,)) -> tuple[tf.Tensor, Restore]:
    """`x` as a matrix of channels in columns, and the way back.

    Args:
        x: Tensor of rank 2 or more.
        axes: The channel axes, not negative, ascending.
        shape: Of the rows, where they are more than one axis.
    """
    rank = len(x.shape)
    if rank == 2 and axes[0] == 1 and len(shape) == 1:
        return x, lambda y: y
    others = [axis for axis in range(rank) if axis not in axes]
    if others == list(range(len(others))):
        return _reshaped(x, [*shape, math.prod(x.shape[axis] for axis in axes)]), _reshape_like(x)
    if has_planes(x, axes):
        # As few axes as possible: TensorFlow transposes three of them up to three times as fast as five.
        planes, restore_planes = as_planes(x, axes)
        examples, channels, pixels = sizes_of(planes)

        def restore(y):
            return restore_planes(_swapped(_reshaped(y, [examples, pixels, channels])))

        return _reshaped(_swapped(planes), [*shape, channels]), restore
    order = [*others, *axes]
    back = [order.index(axis) for axis in range(rank)]
    rows, restore = as_rows(tf.transpose(x, order), range(len(others), rank), shape)
    return rows, lambda y: tf.transpose(restore(y), back)


def as_image(x: tf.Tensor, axes: Sequence[int], flat: bool, channels_last: bool) -> tuple[tf.Tensor, str, Restore]:
    """`x` as a rank-4 tensor that the fused kernel takes, its data format, and the way back.

    Args:
        x: Tensor of rank 2 or more.
        axes: The channel axes, not negative, ascending.
        flat: Whether an image with the channels last becomes a batch of single pixels.
        channels_last: Whether the channels must be last: elsewhere they are brought there.
    """
    rank = len(x.shape)
    if rank == 4 and tuple(axes) == (3,) and not flat:
        return x, "NHWC", lambda y: y
    if has_planes(x, axes) and not channels_last:
        # Reshaped also where it is an NCHW image already: TensorFlow's graph rewriter merges an NHWC convolution with
        # an NCHW normalization that directly follows, as if the channels were last, and answers wrong.
        planes, restore = as_planes(x, axes)
        return planes[..., None], "NCHW", restore
    pixels = [x.shape[axis] for axis in range(rank) if axis not in axes][1:]
    # A size that is not known makes it single pixels, and so does an image of none, which cannot be reshaped.
    height = 1 if flat or None in pixels else max(1, math.prod(pixels))
    image, restore = as_rows(x, axes, [-1, height, 1])
    return image, "NHWC", restore


def as_planes(x: tf.Tensor, axes: Sequence[int]) -> tuple[tf.Tensor, Restore]:
    """`x`, which must have planes, as examples of channels of values, shape `(N, C, S)`, and the way back."""

    sizes = sizes_of(x)
    parts = sizes[: axes[0]], sizes[axes[0] : axes[-1] + 1], sizes[axes[-1] + 1 :]
    return _reshaped(x, [math.prod(part) for part in parts]), _reshape_like(x)


def has_planes(x: tf.Tensor, axes: Sequence[int]) -> bool:
    """Whether the values of a channel of an example are neighbours: the channel axes stand together, and not last."""
    return axes[-1] != len(x.shape) - 1 and axes[-1] - axes[0] + 1 == len(axes)


def along(axes: Sequence[int], values: tf.Tensor, x: tf.Tensor) -> tf.Tensor:
    """`values`, shape `(C,)`, so that it broadcasts along `axes` of `x`."""
    if tuple(axes) == (len(x.shape) - 1,):
        return values
    return _reshaped(values, [size if axis in axes else 1 for axis, size in enumerate(x.shape)])


def _reshaped(x: tf.Tensor, shape: Sequence[int | tf.Tensor]) -> tf.Tensor:
    # A list takes TensorFlow twice as long to convert, which is what an eager call waits for.
    return tf.reshape(x, np.array(shape) if all(isinstance(size, int) for size in shape) else shape)


def _swapped(x: tf.Tensor) -> tf.Tensor:
    """`x` with the last two of its three axes exchanged."""
    if x.dtype != tf.float16:
        return tf.transpose(x, [0, 2, 1])

    @tf.custom_gradient
    def swap(x):
        # TensorFlow moves the bits up to 2.6 times as fast where they are called bfloat16 (measured).
        return tf.bitcast(tf.transpose(tf.bitcast(x, tf.bfloat16), [0, 2, 1]), tf.float16), _swapped

    return swap(x)


def sizes_of(x: tf.Tensor) -> list[int | tf.Tensor]:
    """The sizes of `x`: numbers where they are known."""
    return [tf.shape(x)[axis] if size is None else size for axis, size in enumerate(x.shape)]


def _reshape_like(x: tf.Tensor) -> Restore:
    """Reshapes to the shape of `x`, without asking for it at run time where one size at most is unknown."""
    static = [-1 if size is None else size for size in x.shape]
    if static.count(-1) <= 1 and 0 not in static:
        return lambda y: _reshaped(y, static)
    return lambda y: tf.ensure_shape(tf.reshape(y, tf.shape(x)), x.shape)
