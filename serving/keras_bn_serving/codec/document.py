"""JSON text to Python values, and back to text for messages, as RapidJSON with TensorFlow Serving's options does it."""

import codecs
import math
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import rapidjson

from keras_bn_serving.codec import grisu
from keras_bn_serving.errors import InvalidArgumentError

MAX_NESTING = 100
_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
_BRACKETS = b"[]{}"
_NOT_BRACKETS = bytes(set(range(256)) - set(_BRACKETS))
_PARSE_ERROR = re.compile(r"Parse error at offset (\d+): (.*)", re.DOTALL)
_TRAILING_TEXT = "The document root must not be followed by other values."
# TensorFlow Serving parses iteratively and does not look at encodings, which changes two of the messages.
_NO_DOCUMENT = re.compile(rb"[ \t\r\n]*(?=[\]},:])")
_OTHER_MESSAGES = {"Invalid encoding in string.": "Invalid escape character in string."}
_DUMP_BYTES = 256
_PIECE_BYTES = 64 * 1024
_SMALLEST_DOUBLE = sys.float_info.min
# Bytes that are no UTF-8 pass through the parser as the last code points of plane 16, which nobody assigns.
_HIDDEN = {0xDC00 + byte: 0x10FF00 + byte for byte in range(0x80, 0x100)}
# So do second halves of surrogate pairs that stand alone, which TensorFlow Serving's RapidJSON takes as three bytes.
_FIRST_LONE = 0x10F800
_SHOWN: dict[int, int | str] = {hidden: surrogate for surrogate, hidden in _HIDDEN.items()} | {
    _FIRST_LONE + half: chr(0xDC00 + half).encode(errors="surrogatepass").decode(errors="surrogateescape")
    for half in range(0x400)
}
# How much longer than what it stands for a hidden character is: a byte, or an escape of six.
_GROWTH = {hidden: -2 if hidden < 0x10FF00 else 3 for hidden in _SHOWN}
_ESCAPE = re.compile(
    rb"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|\\u([dD][c-fC-F][0-9a-fA-F]{2})|\\.", re.DOTALL
)
_STRING_OR_NUMBER = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|-?[0-9][0-9.eE+-]*', re.DOTALL)
_WITH_EXPONENT = re.compile(rb"-?([0-9]{1,308})(?:\.([0-9]+))?[eE]\+?0*([0-9]{1,3})")
_MOST_DIGITS = 17
# The backslash first: the others bring some.
_FREQUENT_ESCAPES = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t", "\b": "\\b", "\f": "\\f"}
_CONTROL = re.compile("[\x00-\x1f]")


class JsonObject(list[tuple[str, Any]]):
    """The members of an object in the order written; of equal names the first counts."""

    def find(self, name: str) -> list[Any]:
        """Returns the value of `name` as the only element of a list, or an empty list."""
        return [value for key, value in self if key == name][:1]


class _Decoder(rapidjson.Decoder):
    def start_object(self) -> JsonObject:
        return JsonObject()


_decode = _Decoder(number_mode=rapidjson.NM_NATIVE | rapidjson.NM_NAN)


class _Pieces:
    """A text that is handed to the parser piece by piece.

    In between other threads get their turn, as the parser lets go of Python's lock only where it calls Python.
    """

    def __init__(self, text: bytes, go_on: Callable[[], None]):
        self._text, self._go_on, self._at = text, go_on, 0

    def read(self, size: int) -> bytes:
        self._go_on()
        start, self._at = self._at, self._at + size
        return self._text[start : self._at]


def parse(body: bytes, go_on: Callable[[], None] = lambda: None) -> Any:
    """Parses a document; whatever follows it is ignored, as is a byte order mark before it.

    Objects come as `JsonObject`. Bytes of strings that are no UTF-8 come as Python's `surrogateescape` has them.

    Args:
        body: The text.
        go_on: Called for every piece that is read; what it raises ends the reading.

    Raises:
        InvalidArgumentError: With RapidJSON's message and the offset in bytes.
    """
    if not body:
        raise InvalidArgumentError("JSON Parse error: The document is empty")
    _check_nesting(body)
    # RapidJSON passes over the first bytes of a mark even where the rest of it is missing.
    mark = next(size for size in (3, 2, 1, 0) if body.startswith(codecs.BOM_UTF8[:size]))
    text = body[mark:]
    try:
        text.decode()
    except UnicodeDecodeError:
        hidden = text.decode(errors="surrogateescape").translate(_HIDDEN).encode()
        return _shown(_parse_first(hidden, mark, go_on))
    return _parse_first(text, mark, go_on)


def dump(value: Any) -> str:
    """Writes a value for an error message: pretty, arrays on one line, nothing more once it is 256 bytes long."""
    pieces: list[str] = []
    size = 0
    for piece in _pieces(value, "", 0):
        if size >= _DUMP_BYTES or piece is None:
            break
        pieces.append(piece)
        size += len(piece.encode(errors="surrogateescape"))
    return "".join(pieces)


def escape(text: str) -> str:
    """Returns a JSON string literal for `text`."""
    for character, escaped in _FREQUENT_ESCAPES.items():
        text = text.replace(character, escaped)
    # A hundred times as fast as `str.translate` where there is little or nothing to be done.
    return '"' + _CONTROL.sub(_numbered, text) + '"'


def _numbered(found: re.Match[str]) -> str:
    return f"\\u{ord(found[0]):04X}"


def flush(number: float) -> float:
    """Returns a zero for a subnormal number: TensorFlow Serving's threads compute with subnormals flushed to zero."""
    return math.copysign(0.0, number) if -_SMALLEST_DOUBLE < number < _SMALLEST_DOUBLE else number


def _check_nesting(body: bytes) -> None:
    if body.count(b"[") + body.count(b"{") <= MAX_NESTING:
        return
    brackets = np.frombuffer(_STRING.sub(b"", body).translate(None, _NOT_BRACKETS), np.uint8)
    opening = (brackets == ord("[")) | (brackets == ord("{"))
    deepest = int(np.cumsum(np.where(opening, np.int32(1), np.int32(-1)), dtype=np.int32).max(initial=0))
    if deepest > MAX_NESTING:
        raise InvalidArgumentError(
            f"JSON Parse error: arrays and objects may be nested {MAX_NESTING} deep. Received: {deepest} levels."
        )


def _parse_first(text: bytes, mark: int, go_on: Callable[[], None]) -> Any:
    try:
        if len(text) <= _PIECE_BYTES:
            return _decode(text)
        pieces: Any = _Pieces(text, go_on)
        return _decode(pieces, chunk_size=_PIECE_BYTES)
    except rapidjson.JSONDecodeError as error:
        found = _PARSE_ERROR.fullmatch(str(error))
        if found is None:
            raise
        offset, message = int(found[1]), found[2]
    older = _OLDER.get(message)
    if older is not None and (understood := older(text)) != text:
        value = _parse_first(understood, mark, go_on)
        return _shown(value) if message == _LONE_HALF else value
    if message == _TRAILING_TEXT:
        return _parse_first(text[:offset], mark, go_on)
    if _NO_DOCUMENT.match(text):
        message = "The document is empty."
    offset -= sum(_GROWTH.get(ord(char), 0) for char in text[:offset].decode(errors="ignore"))
    raise InvalidArgumentError(f"JSON Parse error: {_OTHER_MESSAGES.get(message, message)} at offset: {offset + mark}")


def _hide_lone_halves(text: bytes) -> bytes:
    def hide(found: re.Match[bytes]) -> bytes:
        return chr(_FIRST_LONE + int(found[1], 16) - 0xDC00).encode() if found[1] else found[0]

    return _ESCAPE.sub(hide, text)


def _write_infinities(text: bytes) -> bytes:
    """Writes numbers of 1.8e308 and more as infinities, of the same length, where RapidJSON 1.1 makes such of them."""

    def write(found: re.Match[bytes]) -> bytes:
        number = _WITH_EXPONENT.fullmatch(found[0])
        if number is None or math.isfinite(float(found[0])):
            return found[0]
        whole, fraction = number[1], number[2] or b""
        # The first digit before the point is free, and so are zeros behind it that nothing stands before.
        free = len(fraction) - len(fraction.lstrip(b"0")) if whole == b"0" else 1 - len(whole)
        if int(number[3]) > 308 + min(len(fraction), max(0, _MOST_DIGITS + free)):
            return found[0]
        return (b"-Inf" if found[0].startswith(b"-") else b"Inf").ljust(len(found[0]))

    return _STRING_OR_NUMBER.sub(write, text)


_LONE_HALF = "The surrogate pair in string is invalid."
# What RapidJSON refuses now and took in the version that TensorFlow Serving has, by message, and how it can be taken.
_OLDER: dict[str, Callable[[bytes], bytes]] = {
    _LONE_HALF: _hide_lone_halves,
    "Number too big to be stored in double.": _write_infinities,
}


def _shown(value: Any) -> Any:
    if isinstance(value, str):
        return value.translate(_SHOWN)
    if isinstance(value, JsonObject):
        return JsonObject((_shown(name), _shown(member)) for name, member in value)
    if isinstance(value, list):
        return [_shown(item) for item in value]
    return value


def _pieces(value: Any, before: str, level: int) -> Iterator[str | None]:
    """Yields what RapidJSON's writer writes at a time, with what stands before it; `None` where it gives up."""
    if isinstance(value, JsonObject):
        yield before + "{"
        for position, (name, member) in enumerate(value):
            comma = "," if position else ""
            yield f"{comma}\n{'    ' * (level + 1)}{escape(name)}"
            yield from _pieces(member, ": ", level + 1)
        yield "\n" + "    " * level + "}" if value else "}"
    elif isinstance(value, list):
        yield before + "["
        for position, item in enumerate(value):
            yield from _pieces(item, ", " if position else "", level + 1)
        yield "]"
    elif isinstance(value, float) and not math.isfinite(value):
        yield before
        yield None
    else:
        yield before + _scalar(value)


def _scalar(value: Any) -> str:
    if isinstance(value, str):
        return escape(value)
    if isinstance(value, float):
        return _number(flush(value))
    if isinstance(value, bool):
        return "true" if value else "false"
    return "null" if value is None else str(value)


def _number(number: float) -> str:
    """Writes a double as RapidJSON does: plain from 1e-6 up to 1e21, an exponent without a plus."""
    sign = "-" if math.copysign(1.0, number) < 0 else ""
    if number == 0.0:
        return sign + "0.0"
    digits, exponent = grisu.digits(abs(number))
    point = len(digits) + exponent
    if len(digits) <= point <= 21:
        return f"{sign}{digits.ljust(point, '0')}.0"
    if 0 < point <= 21:
        return f"{sign}{digits[:point]}.{digits[point:]}"
    if -6 < point <= 0:
        return f"{sign}0.{'0' * -point}{digits}"
    rest = f".{digits[1:]}" if len(digits) > 1 else ""
    return f"{sign}{digits[0]}{rest}e{point - 1}"
