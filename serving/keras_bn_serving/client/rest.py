"""What a client sends and reads over REST: each operation yields calls and is sent their replies."""

import asyncio
import base64
import contextlib
import json
import math
import re
import time
from collections.abc import Generator, Iterator, Mapping
from typing import Any, NamedTuple
from urllib.parse import quote

import httpx
import numpy as np
import orjson

from keras_bn_serving.client.inputs import fitting, is_numeric, type_of
from keras_bn_serving.client.types import ModelVersion, Remembered, Target
from keras_bn_serving.errors import Code, DeadlineExceededError, InvalidArgumentError, UnavailableError, error_of

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
Operation = Generator["Call", "Reply", Any]


class Call(NamedTuple):
    """One HTTP request to be sent."""

    method: str
    path: str
    body: bytes | None = None


class Reply(NamedTuple):
    """One HTTP response."""

    status: int
    body: bytes


class RestProtocol:
    """The operations; each yields calls, is sent their replies, and returns its result."""

    def __init__(self) -> None:
        # JSON carries no element types. They are asked for, and once more after a while: another version may have come.
        self._signatures = Remembered[str, dict[str, Any]]()

    def predict(self, target: Target, inputs: Any, signature_name: str) -> Operation:
        """Asks for a prediction in column format; returns an array, or several by name."""
        place = _place(target)
        known = self._signatures.find(place) is not None
        signature = yield from self._signature(place, target, signature_name)
        try:
            body = _predict_body(inputs, signature, signature_name)
        except InvalidArgumentError:
            if not known:
                raise
            # Another version may have come since, of other types.
            self._signatures.forget(place)
            signature = yield from self._signature(place, target, signature_name)
            body = _predict_body(inputs, signature, signature_name)
        names = signature.get("outputs", {})
        reply = yield Call("POST", f"{place}:predict", body)
        outputs = _member(reply, "outputs")
        if len(names) != 1 and not (isinstance(outputs, dict) and outputs.keys() == names.keys()):
            # Another version has come since.
            self._signatures.forget(place)
            names = (yield from self._signature(place, target, signature_name)).get("outputs", {})
        if len(names) == 1:
            return _array(outputs, next(iter(names.values()))["dtype"])
        return {name: _array(value, names[name]["dtype"]) for name, value in outputs.items()}

    def classify(self, target: Target, examples: Any, context: Any, signature_name: str) -> Operation:
        """Asks for a classification; returns a list of labels with scores for every example."""
        body = _examples_body(examples, context, signature_name)
        reply = yield Call("POST", f"{_place(target)}:classify", body)
        return [[(label, float(score)) for label, score in classes] for classes in _member(reply, "results")]

    def regress(self, target: Target, examples: Any, context: Any, signature_name: str) -> Operation:
        """Asks for a regression; returns an array."""
        body = _examples_body(examples, context, signature_name)
        reply = yield Call("POST", f"{_place(target)}:regress", body)
        return np.array(_member(reply, "results"), np.float32)

    def status(self, target: Target) -> Operation:
        """Asks for a model's versions; returns them newest first."""
        reply = yield Call("GET", _place(target))
        return [
            ModelVersion(
                int(each["version"]),
                each["state"],
                Code[each["status"]["error_code"]],
                each["status"]["error_message"],
            )
            for each in _member(reply, "model_version_status")
        ]

    def metadata(self, target: Target) -> Operation:
        """Asks for a model's signatures; returns them by name."""
        reply = yield Call("GET", f"{_place(target)}/metadata")
        return _member(reply, "metadata")["signature_def"]["signature_def"]

    def _signature(self, place: str, target: Target, signature_name: str) -> Generator[Call, Reply, dict[str, Any]]:
        signatures = self._signatures.find(place)
        if signatures is None:
            signatures = yield from self.metadata(target)
            self._signatures.keep(place, signatures)
        return signatures.get(signature_name or "serving_default", {})


class RestTransport:
    """Sends calls and waits for them.

    Args:
        url: Of the server.
        http: What sends them; one of our own, which looks at no environment variables, where left out.
    """

    def __init__(self, url: str, http: httpx.Client | None = None):
        self._url = url
        self._own = http is None
        self._http = httpx.Client(trust_env=False) if http is None else http

    def send(self, call: Call, seconds: float) -> Reply:
        """Sends one call; all of it may take `seconds`."""
        clock = _Clock(seconds)
        with (
            _translated(self._url, call),
            self._http.stream(
                call.method, self._url + call.path, content=call.body, timeout=seconds,
                extensions={"trace": clock.look},
            ) as response,
        ):  # fmt: skip
            body = b"".join(map(clock.checked, response.iter_bytes()))
        return check(Reply(response.status_code, body))

    def close(self) -> None:
        """Closes the connections, where they are our own."""
        if self._own:
            self._http.close()


class AsyncRestTransport:
    """Sends calls and lets others go on meanwhile.

    Args:
        url: As for `RestTransport`.
        http: As for `RestTransport`.
    """

    def __init__(self, url: str, http: httpx.AsyncClient | None = None):
        self._url = url
        self._own = http is None
        self._http = httpx.AsyncClient(trust_env=False) if http is None else http

    async def send(self, call: Call, seconds: float) -> Reply:
        """Sends one call; all of it may take `seconds`."""
        request = self._http.request(call.method, self._url + call.path, content=call.body, timeout=seconds)
        with _translated(self._url, call):
            response = await asyncio.wait_for(request, seconds)
        return check(Reply(response.status_code, response.content))

    async def close(self) -> None:
        """Closes the connections, where they are our own."""
        if self._own:
            await self._http.aclose()


class _Clock:
    """Gives every part of a call what is left of the time for the whole: httpx would give each part all of it."""

    def __init__(self, seconds: float):
        self._deadline = time.monotonic() + seconds

    def look(self, event: str, info: Mapping[str, Any]) -> None:
        """Is told of every part before it begins."""
        request = info.get("request")
        if event.endswith(".started") and request is not None:
            request.extensions["timeout"] = dict.fromkeys(("connect", "read", "write", "pool"), self._left())

    def checked(self, piece: bytes) -> bytes:
        """Returns a piece of the answer that has come in time."""
        self._left()
        return piece

    def _left(self) -> float:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise httpx.ReadTimeout("the time for the whole call is over")
        return left


@contextlib.contextmanager
def _translated(url: str, call: Call) -> Iterator[None]:
    try:
        yield
    except (httpx.TimeoutException, asyncio.TimeoutError) as error:
        raise DeadlineExceededError(f"{call.method} {url}{call.path}: no answer in time.") from error
    except httpx.TransportError as error:
        reason = str(error).rstrip(".") or type(error).__name__
        raise UnavailableError(
            f"{call.method} {url}{call.path}: {reason}. Is a server there, and is this its port for REST?"
        ) from error


def _place(target: Target) -> str:
    path = _BASE_PATH + quote(target.model_name, safe="")
    if target.version is not None:
        return f"{path}/versions/{target.version}"
    return path if target.label is None else f"{path}/labels/{quote(target.label, safe='')}"


def _predict_body(inputs: Any, signature: Mapping[str, Any], signature_name: str) -> bytes:
    infos = signature.get("inputs", {})

    def value_of(name: str, value: Any) -> Any:
        dtype = type_of(infos[name]) if name in infos else None
        try:
            array = value if isinstance(value, np.ndarray) else np.asarray(value)
        except ValueError:
            # Lists of unequal lengths, or objects of JSON among them: the server says what is wrong.
            return _jsonable(value)
        if not is_numeric(array):
            return _jsonable(value)
        if array.dtype.kind == "c":
            raise ValueError(
                f"`inputs` must not be complex: JSON has no such numbers. Received: for {name!r}, {array.dtype}."
            )
        return _jsonable(fitting(name, array, dtype))

    if isinstance(inputs, Mapping):
        # Over REST a server passes over what it has no input for; over gRPC it refuses it.
        if infos and not inputs.keys() <= infos.keys():
            raise InvalidArgumentError(
                f"`inputs` must have names of {sorted(infos)}. Received: {sorted(map(str, inputs))}."
            )
        given = {name: value_of(name, value) for name, value in inputs.items()}
    else:
        given = value_of(next(iter(infos)) if len(infos) == 1 else "", inputs)
    return _dumps({"signature_name": signature_name, "inputs": given} if signature_name else {"inputs": given})


def _examples_body(examples: Any, context: Any, signature_name: str) -> bytes:
    body: dict[str, Any] = {"signature_name": signature_name} if signature_name else {}
    if context is not None:
        body["context"] = {name: _jsonable(value) for name, value in context.items()}
    body["examples"] = [{name: _jsonable(value) for name, value in example.items()} for example in examples]
    return _dumps(body)


def check(reply: Reply) -> Reply:
    """Returns a reply that is a result.

    Raises:
        ServingError: With the code and message of a reply that is an error.
    """
    if reply.status == 200:
        return reply
    raise error_of(_CODES.get(reply.status, Code.UNKNOWN), str(_member(reply, "error")))


def _member(reply: Reply, name: str) -> Any:
    """Returns what a server of models answers under `name`.

    Raises:
        ServingError: When it is not there: something else answers, or the path is none of the server's own.
    """
    try:
        return _loads(reply.body)[name]
    except (ValueError, KeyError, TypeError) as error:
        page = re.search(rb"<title>(.*?)</title>", reply.body, re.IGNORECASE | re.DOTALL)
        said = page[1] if page else reply.body[:200]
        words = " ".join(said.decode(errors="replace").split())
        message = f"HTTP status {reply.status} from what is no server of models{words and f': {words}'}"
        raise error_of(_CODES.get(reply.status, Code.UNKNOWN), message) from error


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
    try:
        return orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)
    except TypeError as error:
        raise ValueError(f"`inputs` must be numbers, truth values, strings or bytes. Received: {error}.") from error


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
