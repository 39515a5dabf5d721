"""TensorProto messages to arrays and back, encoded as TensorFlow Serving does it."""

import functools
import itertools
import math
import operator
from typing import Any, NamedTuple

import numpy as np

from keras_bn_serving.codec.data_types import NUMBERS, STRING, number_of, numpy_type
from keras_bn_serving.errors import InvalidArgumentError, UnimplementedError

# A few bytes may stand for an array of any size whose values are all the same.
_MOST_REPEATED = 64 * 1024 * 1024
_MOST_DIMENSIONS = 64
# Fields whose packed form on the wire is the array's memory: values of a fixed size, and booleans, a byte each.
_WIRE_TYPES = {"float_val": "<f4", "double_val": "<f8", "scomplex_val": "<c8", "dcomplex_val": "<c16", "bool_val": "?"}
_LENGTH_DELIMITED = 2


class _Encoding(NamedTuple):
    """How the values of one element type stand in a message.

    Attributes:
        field: The repeated field, or the field of bytes, that holds them.
        value: What an element of the field is.
        stored: What an element is cut down to: integers wrap.
        element: What the array holds; the same bytes as `stored`.
    """

    field: str
    value: np.dtype
    stored: np.dtype
    element: np.dtype


def to_array(message: Any, name: str) -> np.ndarray:
    """Returns the array of a message, whichever way it is encoded; strings as an array of `bytes` objects.

    Fewer values than the shape holds: the last one fills the rest, zero (or the empty string) where there is none.
    More: the first ones count.

    Args:
        message: A `TensorProto`, of whichever class.
        name: Of the tensor, for the error.

    Raises:
        InvalidArgumentError: If type, shape and contents do not fit each other.
    """
    shape = tuple(dim.size for dim in message.tensor_shape.dim)
    size = math.prod(shape)
    encoding = _encodings().get(message.dtype)
    repeats = not message.tensor_content
    if (
        (encoding is None and message.dtype != STRING)
        or len(shape) > _MOST_DIMENSIONS
        or min(shape, default=0) < 0
        or (repeats and size > _MOST_REPEATED)
    ):
        raise _problem(name)
    if size == 0:  # Then TensorFlow looks at no contents.
        return _reshaped(np.empty(0, object if encoding is None else encoding.element), shape, name)
    if encoding is None:
        strings = list(message.string_val[:size]) if repeats else _strings(message.tensor_content, size, name)
        array = np.empty(size, object)
        array[:] = strings + (strings[-1:] or [b""]) * (size - len(strings))
        return _reshaped(array, shape, name)
    if repeats:
        return _filled(_values(message, encoding), size).view(encoding.element).reshape(shape)
    if len(message.tensor_content) != size * encoding.element.itemsize:
        raise _problem(name)
    if encoding.element == np.bool_ and message.tensor_content.translate(None, b"\x00\x01"):
        raise _problem(name)
    return np.frombuffer(message.tensor_content, encoding.element).reshape(shape)


def write_array(message: Any, array: np.ndarray) -> None:
    """Writes an array into an empty `TensorProto`, its values in the field of its type."""
    message.tensor_shape.SetInParent()
    for size in array.shape:
        message.tensor_shape.dim.add(size=size)
    message.dtype = number_of(array.dtype)
    if message.dtype == STRING:
        message.string_val.extend(array.ravel().tolist())
        return
    encoding = _encodings()[message.dtype]
    if array.size == 0:
        return
    if encoding.field in _WIRE_TYPES:
        # Number by number this takes two hundred times as long.
        number = message.DESCRIPTOR.fields_by_name[encoding.field].number
        message.MergeFromString(_packed(number, array.astype(_WIRE_TYPES[encoding.field]).tobytes()))
    elif encoding.field == "float8_val":
        message.float8_val = array.tobytes()
    else:
        stored = np.ascontiguousarray(array).ravel().view(encoding.stored)
        getattr(message, encoding.field).extend(stored.tolist())


def _reshaped(array: np.ndarray, shape: tuple[int, ...], name: str) -> np.ndarray:
    try:
        return array.reshape(shape)
    except (ValueError, OverflowError) as error:
        # TensorFlow takes it where the zero comes before the sizes are more than 63 bits.
        if any(product >= 2**63 for product in itertools.accumulate(shape, operator.mul)):
            raise _problem(name) from error
        sizes = ",".join(map(str, shape))
        raise InvalidArgumentError(
            f"`{name}` has no entries, and its sizes are more than an array can have. Received: shape [{sizes}]."
        ) from error


def element_type(type_name: str) -> np.dtype:
    """Returns NumPy's type for TensorFlow's name of one: `float`, `half`, `string`, ...

    Raises:
        UnimplementedError: If values of that type cannot be sent.
    """
    data_type = NUMBERS[type_name]
    if data_type == STRING:
        return np.dtype(object)
    if data_type not in _encodings():
        raise UnimplementedError(f"Values of type {type_name} cannot be sent.")
    return _encodings()[data_type].element


def _values(message: Any, encoding: _Encoding) -> np.ndarray:
    field = getattr(message, encoding.field)
    if isinstance(field, bytes):
        return np.frombuffer(field, encoding.value)
    values = np.array(field, encoding.value)
    if encoding.stored.kind == "c":
        # Real and imaginary parts in turn; one that is left over counts for nothing.
        return values[: len(values) // 2 * 2].view(encoding.stored)
    return values.astype(encoding.stored)


def _filled(values: np.ndarray, size: int) -> np.ndarray:
    array = np.zeros(size, values.dtype)
    array[: len(values)] = values[:size]
    if len(values):
        array[len(values) :] = values[-1]
    return array


def _strings(content: bytes, size: int, name: str) -> list[bytes]:
    """Reads strings written one after the other, all of their lengths before them."""
    lengths = []
    position = 0
    for _ in range(size):
        length, position = _varint(content, position, name)
        lengths.append(length)
    if sum(lengths) != len(content) - position:
        raise _problem(name)
    strings = []
    for length in lengths:
        strings.append(content[position : position + length])
        position += length
    return strings


def _varint(content: bytes, position: int, name: str) -> tuple[int, int]:
    """Reads a number of up to five bytes, seven bits each, and returns it with the place after it."""
    number = 0
    for shift in range(0, 35, 7):
        if position >= len(content):
            break
        byte = content[position]
        position += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number & 0xFFFFFFFF, position
    raise _problem(name)


def _packed(number: int, values: bytes) -> bytes:
    head = bytearray([number << 3 | _LENGTH_DELIMITED])
    length = len(values)
    while length > 0x7F:
        head.append(length & 0x7F | 0x80)
        length >>= 7
    head.append(length)
    return bytes(head) + values


def _problem(name: str) -> InvalidArgumentError:
    return InvalidArgumentError(f"tensor parsing error: {name}")


@functools.cache
def _encodings() -> dict[int, _Encoding]:
    fields = {
        "float_val": ("f4", {"float": "f4"}),
        "double_val": ("f8", {"double": "f8"}),
        "int_val": (
            "i4",
            {
                **{"int8": "i1", "int16": "i2", "int32": "i4", "uint8": "u1", "uint16": "u2", "int4": "i1"},
                **{"uint4": "u1", "qint8": "i1", "quint8": "u1", "qint16": "i2", "quint16": "u2", "qint32": "i4"},
            },
        ),
        "int64_val": ("i8", {"int64": "i8"}),
        "uint32_val": ("u4", {"uint32": "u4"}),
        "uint64_val": ("u8", {"uint64": "u8"}),
        "bool_val": ("?", {"bool": "?"}),
        "half_val": ("i4", {"half": "u2", "bfloat16": "u2"}),
        "scomplex_val": ("f4", {"complex64": "c8"}),
        "dcomplex_val": ("f8", {"complex128": "c16"}),
        "float8_val": (
            "u1",
            dict.fromkeys(
                ("float8_e5m2", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e4m3b11fnuz", "float8_e5m2fnuz"), "u1"
            ),
        ),
    }
    return {
        NUMBERS[name]: _Encoding(field, np.dtype(value), np.dtype(stored), numpy_type(name))
        for field, (value, types) in fields.items()
        for name, stored in types.items()
    }
