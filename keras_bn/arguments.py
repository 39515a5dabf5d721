"""Checks of arguments: each returns the value in its plain form, or says what is allowed."""

from __future__ import annotations

import math
import numbers
import os
from collections.abc import Mapping, Sequence
from typing import TypeGuard

import keras
import numpy as np
import tensorflow as tf

from keras_bn.names import shown

RENORM_LIMITS = ("rmax", "rmin", "dmax")


def is_schedule(value: object) -> TypeGuard[keras.optimizers.schedules.LearningRateSchedule]:
    return isinstance(value, keras.optimizers.schedules.LearningRateSchedule)


def axes(axis):
    axes = list(axis) if isinstance(axis, (list, tuple)) else [axis]
    if not axes or not all(isinstance(one, numbers.Integral) and not isinstance(one, bool) for one in axes):
        raise TypeError(f"`axis` must be an int or a list of ints, at least one. Received: axis={shown(axis)}.")
    if len(set(axes)) < len(axes):
        raise ValueError(f"`axis` must name each axis once. Received: axis={shown(axis)}.")
    return [int(one) for one in axes]


def momentum(momentum):
    if isinstance(momentum, dict):
        momentum = keras.saving.deserialize_keras_object(momentum)
    if momentum is None or is_schedule(momentum):
        return momentum
    return number("momentum", momentum, 0.0, 1.0, ", or None, or a LearningRateSchedule")


def number(name, value, low, high=math.inf, alternative=""):
    allowed = f"a number in [{low:g}, {high:g}]" if high < math.inf else f"a number not below {low:g}"
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"`{name}` must be {allowed}{alternative}. Received: {name}={shown(value)}.")
    if not low <= value <= high or value == math.inf:
        raise ValueError(f"`{name}` must be {allowed}{alternative}. Received: {name}={shown(value)}.")
    return float(value)


def optional_number(name, value, low, high=math.inf):
    return None if value is None else number(name, value, low, high, ", or None")


def whole_number(name, value, low=1, alternative=""):
    allowed = f"`{name}` must be {'a positive integer' if low == 1 else f'an integer from {low}'}{alternative}."
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{allowed} Received: {name}={shown(value)}.")
    if value < low:
        raise ValueError(f"{allowed} Received: {name}={shown(value)}.")
    return int(value)


def flag(name, value):
    if not isinstance(value, bool | np.bool_ | numbers.Integral) or value not in (0, 1):
        raise TypeError(f"`{name}` must be True or False. Received: {name}={shown(value)}.")
    return bool(value)


def names(name, value):
    """A list of names, or None; one at least, and each a string."""
    if value is None:
        return None
    allowed = f"`{name}` must be a list of names, one at least, or None."
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        raise TypeError(f"{allowed} Received: {name}={shown(value)}.")
    if not value or not all(isinstance(one, str) for one in value):
        raise ValueError(f"{allowed} Received: {name}={shown(value)}.")
    return list(value)


def path(name, value):
    if not isinstance(value, str | os.PathLike) or not isinstance(os.fspath(value), str) or not os.fspath(value):
        raise TypeError(f"`{name}` must be a path, as a string or `pathlib.Path`. Received: {name}={shown(value)}.")
    if "\0" in os.fspath(value):
        raise ValueError(f"`{name}` must be a path, which has no zero bytes. Received: {name}={shown(value)}.")
    return os.fspath(value)


def floating_dtype(dtype):
    """Of a layer's policy, once it is made."""
    for part in (dtype.compute_dtype, dtype.variable_dtype):
        if not keras.backend.is_float_dtype(part):
            raise ValueError(f"`dtype` must be one of floating point, or a policy of such. Received: dtype={part!r}.")


def shape_of_one_tensor(shape):
    sizes = isinstance(shape, list | tuple | tf.TensorShape) and list(shape)
    if sizes is False or not all(size is None or isinstance(size, numbers.Integral) for size in sizes):
        raise TypeError(f"`inputs` must be one tensor, of rank 2 or more. Received: inputs of shape {shown(shape)}.")
    if len(sizes) < 2:
        raise ValueError(f"`inputs` must be of rank 2 or more. Received: inputs of shape {tuple(sizes)}.")


def real(x):
    if x.dtype.is_complex or not (x.dtype.is_integer or x.dtype.is_bool):
        raise TypeError(f"`inputs` must be real numbers or booleans. Received: inputs of dtype {x.dtype.name}.")
    return x


def training(value):
    """Of what is no Python bool and is known: a number 0 or 1, a boolean of NumPy, or an eager tensor."""
    known = np.asarray(value, object) if isinstance(value, list | tuple) else np.asarray(value)
    if known.shape != () or known.dtype.kind not in "biuf" or known not in (0, 1):
        raise TypeError(
            f"`training` must be True or False, or a scalar boolean tensor. Received: training={shown(value)}."
        )
    return bool(known)


def synchronized(value):
    if isinstance(value, bool | np.bool_):
        return bool(value)
    allowed = "`synchronized` must be True or False, or a number of replicas above 1."
    if not isinstance(value, numbers.Integral):
        raise TypeError(f"{allowed} Received: synchronized={shown(value)}.")
    if value < 2:
        raise ValueError(f"{allowed} Received: synchronized={value}.")
    return int(value)


def choice(name, value, choices):
    if not isinstance(value, str | numbers.Integral) or value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}. Received: {name}={shown(value)}.")
    return value


def group_size(size):
    if size is None:
        return None
    if isinstance(size, bool) or not isinstance(size, numbers.Integral):
        raise TypeError(
            f"`virtual_batch_size` must be an int above 0, or None. Received: virtual_batch_size={shown(size)}."
        )
    if size < 1:
        raise ValueError(f"`virtual_batch_size` must be an int above 0, or None. Received: virtual_batch_size={size}.")
    return int(size)


def clipping(clipping):
    if clipping is None or clipping == "warmup":
        return clipping or {}
    if not isinstance(clipping, Mapping):
        raise TypeError(
            "`renorm_clipping` must be a dictionary with some of the keys 'rmax', 'rmin', 'dmax', or 'warmup', or "
            f"None. Received: renorm_clipping={shown(clipping)}."
        )
    unknown = sorted(set(clipping) - set(RENORM_LIMITS))
    if unknown:
        raise ValueError(
            f"`renorm_clipping` may have the keys {', '.join(map(repr, RENORM_LIMITS))}. Received invalid "
            f"keys: {', '.join(map(repr, unknown))}."
        )
    limits = {
        name: keras.saving.deserialize_keras_object(limit) if isinstance(limit, dict) else limit
        for name, limit in clipping.items()
        if limit is not None
    }
    fixed = {name: limit for name, limit in limits.items() if not is_schedule(limit)}
    for name, limit in fixed.items():
        if isinstance(limit, bool) or not isinstance(limit, numbers.Real):
            raise TypeError(
                f"`{name}` in `renorm_clipping` must be a number or a LearningRateSchedule. "
                f"Received: {name}={shown(limit)}."
            )
        if math.isnan(limit):
            raise ValueError(f"`{name}` in `renorm_clipping` must be a number. Received: {name}={shown(limit)}.")
    if "rmax" in fixed and "rmin" in fixed and fixed["rmax"] < fixed["rmin"]:
        raise ValueError(
            "In `renorm_clipping`, rmax should be greater than rmin. "
            f"Received: rmax={fixed['rmax']}, rmin={fixed['rmin']}."
        )
    if fixed.get("rmax", 1) <= 0:
        raise ValueError(f"`rmax` in `renorm_clipping` must be positive. Received: rmax={fixed['rmax']!r}.")
    if fixed.get("dmax", 0) < 0:
        raise ValueError(f"In `renorm_clipping`, dmax should be non-negative. Received: dmax={fixed['dmax']}.")
    return limits
