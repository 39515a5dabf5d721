"""What a client sends and reads over REST: each operation yields calls and is sent their replies."""

import base64
import json
import math
from collections.abc import Generator, Mapping
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
import orjson

from serving.errors import Code, ServingError

_CODES = {
    400: Code.INVALID_ARGUMENT,
    401: Code.UNAUTHENTICATED,
    403: Code.PERMISSION_DENIED,
    404: Code.NOT_FOUND,
    408: Code.DEADLINE_EXCEEDED,
    409: Code.ALREADY_EXISTS,
    413: Code.RESOURCE_EXHAUSTED,
    429: Code.RESOURCE_EXHAUSTED,
    499: Code.CANCELLED,
    501: Code.UNIMPLEMENTED,
    502: Code.UNAVAILABLE,
    503: Code.UNAVAILABLE,
    504: Code.DEADLINE_EXCEEDED,
}
_BASE_PATH = "/v1/models/"


class Call(NamedTuple):
    """One HTTP request to be sent."""

    method: str
    path: str
    body: bytes | None = None


class Reply(NamedTuple):
    """One HTTP response."""

    status: int
    body: bytes


class ModelVersion(NamedTuple):
    """One version of a model as the server reports it."""

    version: int
    state: str
    error_code: Code
    error_message: str


Operation = Generator[Call, Reply, Any]


class OutputTypes:
    """Element types of inputs and outputs, asked for once a model: JSON does not carry them."""

    def __init__(self) -> None:
        self._signatures: dict[str, dict[str, Any]] = {}

    def signature(self, place: str, name: str, fresh: bool = False) -> Generator[Call, Reply, dict[str, Any]]:
        if fresh or place not in self._signatures:
            self._signatures[place] = yield from metadata(place)
        return self._signatures[place].get(name or "serving_default", {})


def where(model_name: str, version: int | None, label: str | None) -> str:
    """Returns the path of a model or one of its versions."""
    if version is not None and label is not None:
        raise ValueError(f"Give `version` or `label`, not both. Received: version={version}, label={label!r}.")
    path = _BASE_PATH + quote(model_name, safe="")
    if version is not None:
        return f"{path}/versions/{version}"
    return path if label is None else f"{path}/labels/{quote(label, safe='')}"


def predict(types: OutputTypes, place: str, inputs: Any, signature_name: str) -> Operation:
    """Asks for a prediction in column format; returns an array, or several by name."""
    body: dict[str, Any] = {"signature_name": signature_name} if signature_name else {}
    if isinstance(inputs, Mapping):
        body["inputs"] = {name: _jsonable(value) for name, value in inputs.items()}
    else:
        body["inputs"] = _jsonable(inputs)
    reply = yield Call("POST", f"{place}:predict", _dumps(body))
    outputs = _loads(reply.body)["outputs"]
    signature = yield from types.signature(place, signature_name)
    names = signature.get("outputs", {})
    if len(names) != 1 and not (isinstance(outputs, dict) and outputs.keys() == names.keys()):
        signature = yield from types.signature(place, signature_name, fresh=True)
        names = signature.get("outputs", {})
    if len(names) == 1:
        return _array(outputs, next(iter(names.values()))["dtype"])
    return {name: _array(value, names[name]["dtype"]) for name, value in outputs.items()}


def status(place: str) -> Operation:
    """Asks for a model's versions; returns them newest first."""
    reply = yield Call("GET", place)
    return [
        ModelVersion(
            int(each["version"]),
            each["state"],
            Code[each["status"]["error_code"]],
            each["status"]["error_message"],
        )
        for each in _loads(reply.body)["model_version_status"]
    ]


def metadata(place: str) -> Operation:
    """Asks for a model's signatures; returns them by name."""
    reply = yield Call("GET", f"{place}/metadata")
    return _loads(reply.body)["metadata"]["signature_def"]["signature_def"]


def check(reply: Reply) -> Reply:
    """Returns a reply that is a result.

    Raises:
        ServingError: With the code and message of a reply that is an error.
    """
    if reply.status == 200:
        return reply
    try:
        message = str(_loads(reply.body)["error"])
    except (ValueError, KeyError, TypeError):
        message = reply.body[:200].decode(errors="replace") or f"HTTP status {reply.status}"
    raise ServingError(message, _CODES.get(reply.status, Code.UNKNOWN))


def _jsonable(value: Any) -> Any:
    """Returns `value` as what JSON can hold: numeric arrays as they are, bytes as base64 objects."""
    if isinstance(value, bytes):
        return {"b64": base64.b64encode(value).decode()}
    array = value if isinstance(value, np.ndarray) else None
    if array is None and isinstance(value, (list, tuple)):
        return [_jsonable(item) for item in value]
    if array is None:
        return _jsonable(np.asarray(value)) if hasattr(value, "__array__") and not np.isscalar(value) else value
    if array.dtype.kind in "OSU":
        return _jsonable(array.tolist())
    if array.dtype == np.float16 or array.dtype.name == "bfloat16":
        return np.ascontiguousarray(array, np.float32)
    return np.ascontiguousarray(array)


def _dumps(body: dict[str, Any]) -> bytes:
    if any(_has_nonfinite(value) for value in _arrays(body)):
        return json.dumps(body, default=lambda value: value.tolist()).encode()
    return orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)


def _arrays(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [each for member in value.values() for each in _arrays(member)]
    if isinstance(value, list):
        return [each for item in value for each in _arrays(item)]
    return [value] if isinstance(value, (np.ndarray, float)) else []


def _has_nonfinite(value: Any) -> bool:
    if isinstance(value, float):
        return not math.isfinite(value)
    return value.dtype.kind == "f" and not np.isfinite(value).all()


def _loads(body: bytes) -> Any:
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        # NaN, Infinity and bytes that are no UTF-8, which the protocol writes bare, are not JSON.
        return json.loads(body.decode(errors="surrogateescape"))


def _array(value: Any, data_type: str) -> np.ndarray:
    dtype = _DTYPES.get(data_type)
    if dtype is not None:
        return np.array(value, dtype)
    return _from_strings(value)


_INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
_DTYPES: dict[str, Any] = {
    "DT_FLOAT": np.float32,
    "DT_DOUBLE": np.float64,
    "DT_HALF": np.float16,
    "DT_BOOL": np.bool_,
    **{f"DT_{name.upper()}": np.dtype(name) for name in _INTEGERS},
}


def _from_strings(value: Any) -> np.ndarray:
    """Makes an array of bytes objects of strings and base64 objects."""

    def to_bytes(item: Any) -> Any:
        if isinstance(item, list):
            return [to_bytes(each) for each in item]
        if isinstance(item, dict):
            return base64.b64decode(item["b64"])
        return item.encode(errors="surrogateescape") if isinstance(item, str) else item

    return np.array(to_bytes(value), object)
