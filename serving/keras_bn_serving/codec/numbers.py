"""Bodies that hold one regular list of numbers: straight into NumPy, without a Python object a number."""

import contextlib
import functools
import math
import re
import threading
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import simdjson

from keras_bn_serving.codec.tensor_spec import TensorSpec

MAX_RANK = 32
FLOATS: dict[str, type[np.floating[Any]]] = {"float": np.float32, "double": np.float64}
_INT32 = range(-(2**31), 2**31)
INTEGERS: dict[str, tuple[range, type[np.generic]]] = {
    "int8": (_INT32, np.int8),
    "int16": (_INT32, np.int16),
    "int32": (_INT32, np.int32),
    "uint8": (_INT32, np.uint8),
    "int64": (range(-(2**63), 2**63), np.int64),
    "uint32": (range(2**32), np.uint32),
    "uint64": (range(2**64), np.uint64),
}

_SPACE = rb"[ \t\r\n]*"
_NAME = rb'"([\w .:/-]*)"'
_SIGNATURE = rb'"signature_name"' + _SPACE + b":" + _SPACE + _NAME
_HEAD = re.compile(
    _SPACE + rb"\{" + _SPACE + b"(?:" + _SIGNATURE + _SPACE + b"," + _SPACE + rb')?"(instances|inputs)"' + _SPACE
    + b":" + _SPACE + rb"(?:\{" + _SPACE + _NAME + _SPACE + b":" + _SPACE + rb")?(?=\[)"
)  # fmt: skip
_TAIL = re.compile(
    _SPACE + rb"(\}?)" + _SPACE + b"(?:," + _SPACE + _SIGNATURE + _SPACE + b")?" + _SPACE + rb"\}" + _SPACE
)
_NUMBERS_AND_SPACE = b"0123456789+-.eE \t\r\n"
# A tail of any length made of spaces would cost quadratic time.
_LONGEST_TAIL = 1000
_LARGEST_KNOWN_BYTES = 256 * 1024
_TINY = {4: np.finfo(np.float32).tiny, 8: np.finfo(np.float64).tiny}
_parsers = threading.local()


class PlainNumbers(NamedTuple):
    """A body that holds one regular nested list of numbers and nothing else that matters.

    Attributes:
        signature_name: As it came, empty where none was named.
        row_format: Whether the list came as `instances`.
        input_name: The name given to the list, if one was.
        numbers: All numbers in order: int64 where every one is written as an integer that fits, else float64.
        shape: The shape of the list.
    """

    signature_name: str
    row_format: bool
    input_name: str | None
    numbers: np.ndarray
    shape: tuple[int, ...]

    def as_array(self, specs: Mapping[str, TensorSpec]) -> np.ndarray | None:
        """Returns the input's array, or `None` where this body needs the long way: for its dtype, or for an error."""
        if len(specs) != 1 or self.input_name not in (None, *specs):
            return None
        dtype = next(iter(specs.values())).dtype
        # A double takes the long way: RapidJSON's doubles may differ from the nearest ones in the last digit.
        if dtype == "float":
            return to_float32(self.numbers.astype(np.float64, copy=False)).reshape(self.shape)
        if dtype not in INTEGERS or self.numbers.dtype != np.int64:
            return None
        allowed, target = INTEGERS[dtype]
        if int(self.numbers.min()) not in allowed or int(self.numbers.max()) not in allowed:
            return None
        return self.numbers.astype(target).reshape(self.shape)


def plain_numbers(body: bytes) -> PlainNumbers | None:
    """Reads a body of one regular list of numbers; `None` for any other body, right or wrong."""
    head = _HEAD.match(body)
    end = body.rfind(b"]") + 1
    if head is None or end <= head.end() or len(body) - end > _LONGEST_TAIL:
        return None
    tail = _TAIL.fullmatch(body, end)
    row_format = head[2] == b"instances"
    named = head[3] is not None
    if (
        tail is None
        or bool(tail[1]) != named
        or (named and row_format)
        or (head[1] is not None and tail[2] is not None)
    ):
        return None
    text = body[head.end() : end]
    shape = _known_or_regular_shape(text.translate(None, _NUMBERS_AND_SPACE))
    numbers = None if shape is None else _parse_numbers(text)
    if shape is None or numbers is None or numbers.size != math.prod(shape):
        return None
    name = head[1] if head[1] is not None else tail[2]
    return PlainNumbers(
        "" if name is None else name.decode(), row_format, head[3].decode() if named else None, numbers, shape
    )


def _parse_numbers(text: bytes) -> np.ndarray | None:
    if len(text) > _LARGEST_KNOWN_BYTES:
        parser = simdjson.Parser()  # One keeps the room that it took for its largest text.
    else:
        if not hasattr(_parsers, "parser"):
            _parsers.parser = simdjson.Parser()
        parser = _parsers.parser
    try:
        array: Any = parser.parse(text)
        # A number with a point is no integer; without one, an exponent or the size may still make it none.
        if b"." not in text:
            with contextlib.suppress(TypeError, ValueError):
                return np.frombuffer(array.as_buffer(of_type="i"), np.int64)
        return np.frombuffer(array.as_buffer(of_type="d"), np.float64)
    except (TypeError, ValueError, RuntimeError):
        # Whatever the matter is, the long way has the protocol's words for it.
        return None


def _known_or_regular_shape(skeleton: bytes) -> tuple[int, ...] | None:
    return _known_shape(skeleton) if len(skeleton) <= _LARGEST_KNOWN_BYTES else _regular_shape(skeleton)


def _regular_shape(skeleton: bytes) -> tuple[int, ...] | None:
    """Reads the shape off a list's brackets and commas; `None` where they are not those of a regular nesting."""
    rank = len(skeleton) - len(skeleton.lstrip(b"["))
    if not 0 < rank <= MAX_RANK:
        return None
    first = skeleton.find(b"]")
    shape = [first - rank + 1]
    block = b"[" + b"," * (shape[0] - 1) + b"]"
    for level in range(2, rank + 1):
        # The first place where `level` brackets close in a row ends the first list of that level.
        length = skeleton.find(b"]" * level) + level - (rank - level)
        count, rest = divmod(length - 1, len(block) + 1)
        if rest or count < 1:
            return None
        shape.append(count)
        block = b"[" + b",".join([block] * count) + b"]"
    return tuple(reversed(shape)) if block == skeleton else None


# A model is asked with the same shape again and again.
_known_shape = functools.lru_cache(maxsize=16)(_regular_shape)


def to_float32(doubles: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore", under="ignore"):
        floats = doubles.astype(np.float32)
    flush(floats)
    return floats


def flush(numbers: np.ndarray) -> None:
    """Makes subnormal numbers zeros of their sign, in place, as TensorFlow's threads do in whatever they compute."""
    subnormal = np.abs(numbers) < _TINY[numbers.dtype.itemsize]
    if subnormal.any():
        np.copyto(numbers, np.copysign(0.0, numbers), where=subnormal, casting="same_kind")
