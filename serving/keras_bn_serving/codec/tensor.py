"""JSON requests to arrays, and what is wrong with them, as TensorFlow Serving does it."""

import base64
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from keras_bn_serving.codec import document as json_document
from keras_bn_serving.codec.document import JsonObject
from keras_bn_serving.codec.numbers import FLOATS, INTEGERS, MAX_RANK, flush, plain_numbers, to_float32
from keras_bn_serving.codec.tensor_proto import element_type
from keras_bn_serving.codec.tensor_spec import TensorSpec
from keras_bn_serving.errors import InvalidArgumentError, ServingError, UnimplementedError

Inputs = Mapping[str, TensorSpec]


_BASE64 = re.compile(r"[A-Za-z0-9+/]*([=.]{0,2})")


class PredictInput(NamedTuple):
    """A predict request's body, understood.

    Attributes:
        signature_name: As it came, empty where none was named.
        inputs: The arrays by input name; strings as arrays of `bytes` objects.
        row_format: Whether the body held `instances`, and the answer holds `predictions`.
    """

    signature_name: str
    inputs: dict[str, np.ndarray]
    row_format: bool


def decode_plain(body: bytes, find_inputs: Callable[[str], Inputs]) -> PredictInput | None:
    """Reads the body of a predict request where it is one regular list of numbers; returns `None` for any other.

    Args:
        body: The JSON text.
        find_inputs: Gives the inputs of a signature by its name.

    Raises:
        ServingError: What `find_inputs` raises.
    """
    numbers = plain_numbers(body)
    if numbers is None:
        return None
    specs = find_inputs(numbers.signature_name)
    array = numbers.as_array(specs)
    if array is None:
        return None
    return PredictInput(numbers.signature_name, {next(iter(specs)): array}, numbers.row_format)


def decode_predict(
    body: bytes, find_inputs: Callable[[str], Inputs], go_on: Callable[[], None] = lambda: None
) -> PredictInput:
    """Reads the body of any predict request.

    Args:
        body: The JSON text.
        find_inputs: Gives the inputs of a signature by its name; called once the text has proved to be JSON.
        go_on: Called now and then; what it raises ends the reading.

    Raises:
        ServingError: What `find_inputs` raises, or what is wrong with the body.
    """
    document = decode_object(body, go_on)
    signature_name = decode_signature_name(document)
    specs = find_inputs(signature_name)
    instances, inputs = document.find("instances"), document.find("inputs")
    if instances and inputs:
        raise _malformed(
            document, "Not formatted correctly expecting only one of 'inputs' or 'instances' keys to exist "
        )
    if instances:
        if not isinstance(instances[0], list) or isinstance(instances[0], JsonObject):
            raise _malformed(document, "Expecting 'instances' to be an list/array")
        if not instances[0]:
            raise _malformed(document, "No values in 'instances' array")
        return PredictInput(signature_name, _from_rows(instances[0], specs, go_on), True)
    if inputs:
        return PredictInput(signature_name, _from_columns(inputs[0], specs, go_on), False)
    raise InvalidArgumentError("Missing 'inputs' or 'instances' key")


def decode_object(body: bytes, go_on: Callable[[], None] = lambda: None) -> JsonObject:
    """Parses a request's body, which has to be an object."""
    document = json_document.parse(body, go_on)
    if not isinstance(document, JsonObject):
        raise _malformed(document, "Is not object")
    return document


def decode_signature_name(document: JsonObject) -> str:
    """Returns the request's signature name, empty where it has none."""
    for name in document.find("signature_name"):
        if not isinstance(name, str):
            raise _malformed(document, "not formatted correctly. 'signature_name' key must be a string value.")
        return name
    return ""


def decode_base64(value: JsonObject) -> bytes:
    """Decodes `{"b64": "..."}`: the standard alphabet, white space skipped, padding (= or .) right or left out."""
    text = re.sub(r"[ \t\r\n\v\f]", "", value[0][1])
    found = _BASE64.fullmatch(text)
    payload = text.rstrip("=.")
    missing = -len(payload) % 4
    if found is None or missing == 3 or (found[1] and len(found[1]) != missing):
        raise InvalidArgumentError("Unable to base64 decode")
    return base64.b64decode(payload + "=" * missing)


def is_base64(value: Any) -> bool:
    """Tells whether a value is exactly `{"b64": "..."}`."""
    return isinstance(value, JsonObject) and len(value) == 1 and value[0][0] == "b64" and isinstance(value[0][1], str)


def c_string(name: str) -> str:
    """Returns what TensorFlow Serving makes of a name: it ends where a zero character stands."""
    return name.partition("\0")[0]


def type_name(value: Any) -> str:
    """Returns RapidJSON's name of a value's type."""
    if value is None:
        return "Null"
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, JsonObject):
        return "Object"
    if isinstance(value, list):
        return "Array"
    return "String" if isinstance(value, str) else "Number"


def _from_rows(rows: list[Any], specs: Inputs, go_on: Callable[[], None]) -> dict[str, np.ndarray]:
    if not isinstance(rows[0], JsonObject) and len(specs) > 1:
        raise InvalidArgumentError(
            "instances is a plain list, but expecting list of objects as multiple input tensors required as per "
            "tensorinfo_map"
        )
    if len(specs) == 1:
        ((only, spec),) = specs.items()
        column = _Column(spec.dtype, go_on)
        if column.take_plain(rows):
            return {only: column.array((len(rows),))}
    named = _is_named(rows[0])
    columns: dict[str, _Column] = {}
    for position, row in enumerate(rows):
        if _is_named(row) != named:
            expected, got = ("object", "list") if named else ("value/list", "object")
            raise InvalidArgumentError(f"Expecting {expected} but got {got} at item {position} of input list")
        members = [(c_string(name), value) for name, value in row] if named else [(next(iter(specs)), row)]
        for name, value in members:
            try:
                if name not in specs:
                    raise InvalidArgumentError(f"JSON object: does not have named input: {name}")
                columns.setdefault(name, _Column(specs[name].dtype, go_on)).add_row(value)
            except ServingError as error:
                key = f" key: {name}" if named else ""
                raise InvalidArgumentError(
                    f"Failed to process element: {position}{key} of 'instances' list. Error: {error}"
                ) from error
        if named and {name for name, _ in members} != specs.keys():
            raise InvalidArgumentError(
                f"Failed to process element: {position} of 'instances' list. JSON object: {json_document.dump(row)} "
                f"keys must be equal to: {','.join(sorted(specs))}"
            )
    return {name: column.array((len(rows), *column.shape)) for name, column in columns.items()}


def _from_columns(value: Any, specs: Inputs, go_on: Callable[[], None]) -> dict[str, np.ndarray]:
    if not _is_named(value):
        if len(specs) > 1:
            raise InvalidArgumentError(
                "inputs is a plain value/list, but expecting an object as multiple input tensors required as per "
                "tensorinfo_map"
            )
        value = JsonObject([(next(iter(specs)), value)])
    arrays = {}
    for name, spec in specs.items():
        found = value.find(name)
        if not found:
            raise InvalidArgumentError(f"Missing named input: {name} in 'inputs' object.")
        column = _Column(spec.dtype, go_on)
        column.add_row(found[0])
        arrays[name] = column.array(column.shape)
    return arrays


class _Column:
    """The values of one input, collected row by row."""

    def __init__(self, dtype: str, go_on: Callable[[], None]):
        self.dtype = dtype
        self._go_on = go_on
        self.shape: tuple[int, ...] = ()
        self.values: list[Any] = []
        self._row_size: int | None = None

    def add_row(self, value: Any) -> None:
        shape = _shape_of_first(value)
        if len(shape) >= MAX_RANK:
            raise InvalidArgumentError(f"JSON lists may be nested {MAX_RANK - 1} deep. Received: {len(shape)} levels.")
        before = len(self.values)
        self._fill(value, 0, shape)
        size = len(self.values) - before
        if self._row_size is None:
            self._row_size, self.shape = size, shape
        elif size != self._row_size:
            raise InvalidArgumentError(f"Expecting tensor size: {self._row_size} but got: {size}")
        elif shape != self.shape:
            raise InvalidArgumentError(f"Expecting shape {_shown(self.shape)} but got: {_shown(shape)}")

    def take_plain(self, items: list[Any]) -> bool:
        """Takes a whole list where it holds nothing but values of the right type, at a tenth of the time."""
        kinds = set(map(type, items))
        if self.dtype in FLOATS:
            fits = kinds <= {float, int}
        elif self.dtype in INTEGERS:
            allowed = INTEGERS[self.dtype][0]
            fits = kinds == {int} and min(items) in allowed and max(items) in allowed
        elif self.dtype == "string":
            fits = kinds == {str}
            items = [item.encode(errors="surrogateescape") for item in items] if fits else items
        else:
            fits = self.dtype == "bool" and kinds == {bool}
        if fits:
            self.values.extend(items)
        return fits

    def array(self, shape: tuple[int, ...]) -> np.ndarray:
        # A name written twice in an instance leaves more values than the shape holds: the first ones count.
        values = self.values[: math.prod(shape)]
        if self.dtype in FLOATS:
            doubles = np.array(values, np.float64)
            flush(doubles)
            return (to_float32(doubles) if self.dtype == "float" else doubles).reshape(shape)
        if self.dtype in INTEGERS:
            wide = np.uint64 if self.dtype == "uint64" else np.int64
            return np.array(values, wide).astype(INTEGERS[self.dtype][1]).reshape(shape)
        if self.dtype == "string":
            array = np.empty(len(values), object)
            array[:] = values
            return array.reshape(shape)
        # Of a type that cannot be read there is no value, and an array without values can be made.
        return np.array(values, element_type(self.dtype)).reshape(shape)

    def _fill(self, value: Any, level: int, shape: tuple[int, ...]) -> None:
        if not isinstance(value, list) or isinstance(value, JsonObject):
            if level != len(shape):
                raise InvalidArgumentError(
                    f"JSON Value: {json_document.dump(value)} found at incorrect level: {level + 1} in the JSON DOM. "
                    f"Expected at level: {len(shape)}"
                )
            self.values.append(self._converted(value))
            return
        self._go_on()
        if level >= len(shape):
            raise InvalidArgumentError(f"Encountered list at unexpected level: {level} expected < {len(shape)}")
        if len(value) != shape[level]:
            raise InvalidArgumentError(
                f"Encountered list at unexpected size: {len(value)} at level: {level} expected size: {shape[level]}"
            )
        if level + 1 == len(shape) and self.take_plain(value):
            return
        for item in value:
            self._fill(item, level + 1, shape)

    def _converted(self, value: Any) -> Any:
        dtype, kind = self.dtype, type(value)
        if dtype in FLOATS:
            fits = kind is float or kind is int
        elif dtype in INTEGERS:
            fits = kind is int and value in INTEGERS[dtype][0]
        elif dtype == "bool":
            fits = kind is bool
        elif dtype == "string":
            if kind is str:
                return value.encode(errors="surrogateescape")
            if is_base64(value):
                return decode_base64(value)
            if kind is JsonObject:
                raise _malformed(value, "not formatted correctly for base64 data")
            fits = False
        elif kind is JsonObject:
            fits = False
        else:
            raise UnimplementedError(f"Conversion of JSON Value: {json_document.dump(value)} to type: {dtype}")
        if not fits:
            raise _malformed(value, f"Type: {type_name(value)} is not of expected type: {dtype}")
        return value


def _is_named(value: Any) -> bool:
    return isinstance(value, JsonObject) and not is_base64(value)


def _shape_of_first(value: Any) -> tuple[int, ...]:
    shape = []
    while isinstance(value, list) and not isinstance(value, JsonObject):
        shape.append(len(value))
        if not value:
            break
        value = value[0]
    return tuple(shape)


def _shown(shape: tuple[int, ...]) -> str:
    return "[" + ",".join(map(str, shape)) + "]"


def _malformed(value: Any, problem: str) -> InvalidArgumentError:
    return InvalidArgumentError(f"JSON Value: {json_document.dump(value)} {problem}")
