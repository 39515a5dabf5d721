"""TensorProto messages to arrays and back."""

import math
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.core.framework import tensor_pb2, tensor_shape_pb2, types_pb2

from keras_bn_serving.errors import InvalidArgumentError

_STRING = types_pb2.DT_STRING
# A few bytes may stand for an array of any size whose values are all the same.
_MOST_REPEATED = 64 * 1024 * 1024


def to_array(message: tensor_pb2.TensorProto, name: str) -> np.ndarray:
    """Returns the array of a message; strings as an array of `bytes` objects.

    Raises:
        InvalidArgumentError: If type, shape and contents do not fit each other.
    """
    shape = tuple(dim.size for dim in message.tensor_shape.dim)
    size = math.prod(shape)
    problem = InvalidArgumentError(f"tensor parsing error: {name}")
    repeats = not message.tensor_content
    if message.tensor_shape.unknown_rank or min(shape, default=0) < 0 or (repeats and size > _MOST_REPEATED):
        raise problem
    try:
        if message.dtype == _STRING:
            values = list(message.string_val)
            array = np.empty(size, object)
            # As for numbers: fewer values than the shape holds, and the last one fills the rest.
            array[:] = (values + values[-1:] * (size - len(values)) if values else [b""] * size)[:size]
            return array.reshape(shape)
        if not repeats:
            return np.frombuffer(message.tensor_content, _dtype(message.dtype)).reshape(shape)
        return np.asarray(tf.make_ndarray(message))
    except (ValueError, TypeError, KeyError) as error:
        raise problem from error


def from_array(array: np.ndarray) -> tensor_pb2.TensorProto:
    """Returns the message of an array."""
    shape = tensor_shape_pb2.TensorShapeProto(
        dim=[tensor_shape_pb2.TensorShapeProto.Dim(size=size) for size in array.shape]
    )
    if array.dtype == object:
        return tensor_pb2.TensorProto(dtype=_STRING, tensor_shape=shape, string_val=array.ravel().tolist())
    data_type = tf.as_dtype(array.dtype).as_datatype_enum
    return tensor_pb2.TensorProto(dtype=data_type, tensor_shape=shape, tensor_content=array.tobytes())


def _dtype(data_type: Any) -> np.dtype:
    return np.dtype(tf.as_dtype(data_type).as_numpy_dtype)
