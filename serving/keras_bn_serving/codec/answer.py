"""Arrays to JSON text, laid out and with numbers written as TensorFlow Serving does it."""

import base64
import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import orjson

from keras_bn_serving.codec import document as json_document
from keras_bn_serving.errors import InvalidArgumentError, ResourceExhaustedError

_INDENT = "    "
_FULL_PRECISION = {np.dtype(np.float32): "%.9g", np.dtype(np.float64): "%.17g"}
# Not uint16, which TensorFlow Serving does not write.
_INTEGERS = set(map(np.dtype, ("int8", "int16", "int32", "int64", "uint8", "uint32", "uint64")))
_TYPE_NAMES = {"float16": "half"}
_BYTES_SUFFIX = "_bytes"
# Each is a Python string of some 60 bytes until all is written, a million in a second: 1 GB, and as long as a caller
# waits. Over gRPC there is no such limit.
_MOST_VALUES = 2**24
# Below this many numbers, Python's own formatting is as fast as NumPy's calls.
_FEW = 64
# Between these, numbers are written without an exponent whether with six digits or with nine.
_SMALLEST_POWER = -4
_POWERS = np.array([10.0**power for power in range(_SMALLEST_POWER, 7)])
_SMALLEST_NORMAL = np.finfo(np.float32).tiny
_SCALES = np.array([10.0**power for power in range(13)])


def encode_error(message: str) -> bytes:
    """Writes the body of an error."""
    return f'{{\n    "error": {json_document.escape(message)}\n}}'.encode(errors="surrogateescape")


def encode_predict(outputs: Mapping[str, np.ndarray], row_format: bool) -> bytes:
    """Writes the body of a predict answer.

    Args:
        outputs: The arrays by output name.
        row_format: Whether to write `predictions`, a row an instance, or `outputs`, whole arrays.

    Raises:
        InvalidArgumentError: If rows are asked for and the outputs are not batches of one size.
        ResourceExhaustedError: If there are more values than can be written.
    """
    if not outputs:
        raise InvalidArgumentError("Cannot convert empty tensor map to JSON")
    count = sum(array.size for array in outputs.values())
    if count > _MOST_VALUES:
        raise ResourceExhaustedError(
            f"The answer has {count} values; in JSON at most {_MOST_VALUES} are written. gRPC takes more."
        )
    return _encode_rows(outputs) if row_format else _encode_columns(outputs)


def encode_classifications(labels: np.ndarray | None, scores: np.ndarray | None) -> bytes:
    """Writes the body of a classify answer: for every example its classes, each a label and a score.

    Args:
        labels: `bytes` objects by example and class; empty ones where `None`.
        scores: Numbers by example and class; zeros where `None`.
    """
    shape = scores.shape if scores is not None else labels.shape if labels is not None else (0, 0)
    texts = ['""'] * (shape[0] * shape[1]) if labels is None else [_text(label) for label in labels.ravel().tolist()]
    numbers = _decimals(np.zeros(shape, np.float32).ravel() if scores is None else scores.ravel())
    pairs = [f"[{text}, {number}]" for text, number in zip(texts, numbers, strict=True)]
    rows = ["[" + ", ".join(group) + "]" for group in _groups(pairs, shape, 1)]
    return _results(rows, "Cannot convert empty ClassificationResults to JSON")


def encode_regressions(values: np.ndarray) -> bytes:
    """Writes the body of a regress answer: one number an example."""
    return _results(_decimals(values), "Cannot convert empty RegressionResults to JSON", closing="]")


def _results(rows: list[str], empty: str, closing: str = f"\n{_INDENT}]") -> bytes:
    if not rows:
        raise InvalidArgumentError(empty)
    return f'{{\n    "results": [{", ".join(rows)}{closing}\n}}'.encode("latin-1")


def _encode_rows(outputs: Mapping[str, np.ndarray]) -> bytes:
    batch_size = -1
    for name, array in outputs.items():
        if array.ndim == 0:
            raise InvalidArgumentError(f"Tensor name: {name} has no shape information ")
        if batch_size not in (-1, len(array)):
            raise InvalidArgumentError(
                f"Tensor name: {name} has inconsistent batch size: {len(array)} expecting: {batch_size}"
            )
        batch_size = len(array)
    indent = _INDENT * (3 if len(outputs) > 1 else 2)
    columns = [_single_line(name, array, indent) for name, array in outputs.items()]
    if batch_size == 0:
        text = "[]"
    elif len(outputs) == 1:
        text = f"[{', '.join(columns[0])}\n{_INDENT}]"
    else:
        names = [_key(name) for name in outputs]
        separator = f",\n{_INDENT * 3}"
        rows = (
            separator.join(f"{name}: {value}" for name, value in zip(names, row, strict=True))
            for row in zip(*columns, strict=True)
        )
        members = f",\n{_INDENT * 2}".join(f"{{\n{_INDENT * 3}{row}\n{_INDENT * 2}}}" for row in rows)
        text = f"[\n{_INDENT * 2}{members}\n{_INDENT}]"
    # The text stands for bytes: a string output may hold any.
    return f'{{\n    "predictions": {text}\n}}'.encode("latin-1")


def _encode_columns(outputs: Mapping[str, np.ndarray]) -> bytes:
    if len(outputs) == 1:
        ((name, array),) = outputs.items()
        text = _indented(name, array, 1)
    else:
        members = (f"{_key(name)}: {_indented(name, array, 2)}" for name, array in outputs.items())
        text = f"{{\n{_INDENT * 2}" + f",\n{_INDENT * 2}".join(members) + f"\n{_INDENT}}}"
    return f'{{\n    "outputs": {text}\n}}'.encode("latin-1")


def _single_line(name: str, array: np.ndarray, indent: str) -> list[str]:
    """Writes every row of `array` with its lists on one line."""
    items = _values(name, array, indent)
    for axis in range(array.ndim - 1, 0, -1):
        items = ["[" + ", ".join(group) + "]" for group in _groups(items, array.shape, axis)]
    return items


def _indented(name: str, array: np.ndarray, level: int) -> str:
    items = _values(name, array, _INDENT * (level + array.ndim))
    for axis in range(array.ndim - 1, -1, -1):
        indent = f"\n{_INDENT * (level + axis)}"
        inner = f",{indent}{_INDENT}"
        items = [
            f"[{indent}{_INDENT}{inner.join(group)}{indent}]" if group else "[]"
            for group in _groups(items, array.shape, axis)
        ]
    return items[0]


def _groups(items: list[str], shape: tuple[int, ...], axis: int) -> list[list[str]]:
    count, size = math.prod(shape[:axis]), shape[axis]
    return [items[start * size : (start + 1) * size] for start in range(count)]


def _values(name: str, array: np.ndarray, indent: str) -> list[str]:
    flat = array.ravel()
    kind = flat.dtype.kind
    if flat.dtype in _FULL_PRECISION:
        return _decimals(flat)
    if flat.dtype in _INTEGERS:
        return list(map(str, flat.tolist()))
    if kind == "b":
        return ["true" if value else "false" for value in flat.tolist()]
    if kind == "O" and name.endswith(_BYTES_SUFFIX):
        inner = f'{{\n{indent}{_INDENT}"b64": "'
        return [f'{inner}{base64.b64encode(value).decode()}"\n{indent}}}' for value in flat.tolist()]
    if kind == "O":
        return [_text(value) for value in flat.tolist()]
    if not flat.size:
        return []
    type_name = _TYPE_NAMES.get(flat.dtype.name, flat.dtype.name)
    raise InvalidArgumentError(f"Failed to write JSON value for tensor type: {type_name}")


def _decimals(flat: np.ndarray) -> list[str]:
    """Writes floats: six digits where they give the number back, else as many as its type may need."""
    if flat.dtype != np.float32:
        return _printed(flat)
    flat = _without_subnormals(flat)
    if len(flat) < _FEW:
        return _printed(flat)
    with np.errstate(invalid="ignore"):  # A signaling NaN becomes a quiet one.
        wide = flat.astype(np.float64)
    size = np.abs(wide)
    plain = (size >= _POWERS[0]) & (size < _POWERS[-1])
    # Digits before the point, and none for what is written otherwise.
    digits = np.where(plain, np.searchsorted(_POWERS, size, side="right") + _SMALLEST_POWER, 0)
    plain |= size == 0
    # Both products are exact: a float32 has 24 bits, and five to the twelfth power 28.
    short = _rounded(wide, _SCALES[6 - digits])
    rounded = np.where(short.astype(np.float32) == flat, short, _rounded(wide, _SCALES[9 - digits]))
    # The shortest text of a double next to a number of at most nine digits has just those.
    texts = orjson.dumps(np.where(plain, rounded, 0.0), option=orjson.OPT_SERIALIZE_NUMPY)[1:-1].decode().split(",")
    others = (~plain).nonzero()[0]
    for position, text in zip(others.tolist(), _printed(flat[others]), strict=True):
        texts[position] = text
    return texts


def _without_subnormals(flat: np.ndarray) -> np.ndarray:
    """Zeros in the place of what a processor takes for zero that flushes them, as TensorFlow Serving tells it to."""
    tiny = (np.abs(flat) < _SMALLEST_NORMAL) & (flat != 0)
    return np.where(tiny, np.copysign(np.float32(0), flat), flat) if tiny.any() else flat


def _rounded(numbers: np.ndarray, scales: np.ndarray) -> np.ndarray:
    return np.rint(numbers * scales) / scales


def _printed(flat: np.ndarray) -> list[str]:
    numbers = flat.tolist()
    texts = ("%g " * len(numbers) % tuple(numbers)).split()
    read: Sequence[float] = list(map(float, texts))
    if flat.dtype == np.float32:
        packing = struct.Struct(f"{len(read)}f")
        read = packing.unpack(packing.pack(*read))
    precise = _FULL_PRECISION[flat.dtype]
    for position, (value, number) in enumerate(zip(read, numbers, strict=True)):
        if value != number:
            texts[position] = precise % number
    return [text if "." in text or "e" in text else _WHOLE.get(text) or text + ".0" for text in texts]


_WHOLE = {"nan": "NaN", "-nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}


def _text(value: Any) -> str:
    return json_document.escape(value.decode("latin-1"))


def _key(name: str) -> str:
    return json_document.escape(name.encode().decode("latin-1"))
