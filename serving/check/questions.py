"""What a server of the pretrained network is asked, what its answers have to be, and how those of two compare."""

import base64
import concurrent.futures
import contextlib
import functools
import http.client
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import grpc
import numpy as np
import tensorflow as tf
from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

from . import MODEL, ROOT, CheckError, malformed
from .server import Server, wait_until

_PREFIX = f"/v1/models/{MODEL}"
_ROWS = (1, 2, 7, 16, 32, 64)
_TOO_MANY = 65
_CLIENTS = 32
_SECONDS = 60
_SEED = 21
_MALFORMED = 5000
# Rows that are run together, or by another TensorFlow, are added up in another order.
_TOLERANCE = 1e-4
_REFUSALS = ("OK", "INVALID_ARGUMENT")
_ANY_LENGTH = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
_PICTURES = [path.read_bytes() for path in sorted((ROOT / "models/pretrained/examples").glob("*.png"))]


class Answer(NamedTuple):
    """What came back: a status of HTTP or a code of gRPC, and its contents."""

    status: Any
    content: Any


class Asked(NamedTuple):
    """A question in words, its answer, and what is wrong with that; an empty word where nothing is."""

    question: str
    answer: Answer
    problem: str = ""


Signatures = dict[str, dict[str, Any]]


def signatures(server: Server) -> Signatures:
    """The inputs of every signature, as the server's metadata has them."""
    answer = _rest(server, "GET", f"{_PREFIX}/metadata")
    if answer.status != 200:
        raise CheckError(f"metadata: {answer.status} {answer.content}")
    described = answer.content["metadata"]["signature_def"]["signature_def"]
    return {name: each["inputs"] for name, each in sorted(described.items()) if not name.startswith("__")}


def ask_rest_rows(server: Server) -> Iterator[Asked]:
    """Every signature answers 1 to 64 rows over REST, and refuses 65."""
    for name, inputs in signatures(server).items():
        for rows in (*_ROWS, _TOO_MANY):
            columns = {key: _jsonable(array) for key, array in _arrays(inputs, rows).items()}
            by_row = [{key: values[row] for key, values in columns.items()} for row in range(rows)]
            for key, value in (("instances", by_row), ("inputs", columns)):
                answer = _post(server, "predict", {"signature_name": name, key: value})
                yield _judged(f"REST {name}, {rows} rows as {key}", answer, 200 if rows != _TOO_MANY else 400)


def ask_grpc_rows(server: Server) -> Iterator[Asked]:
    """Every signature answers 1 to 64 rows over gRPC, and refuses 65."""
    with _stub(server) as stub:
        for name, inputs in signatures(server).items():
            for rows in (*_ROWS, _TOO_MANY):
                arrays = _arrays(inputs, rows)
                request = predict_pb2.PredictRequest(
                    inputs={key: tf.make_tensor_proto(array) for key, array in arrays.items()}
                )
                request.model_spec.name, request.model_spec.signature_name = MODEL, name
                answer = _predict(server, stub, request)
                yield _judged(f"gRPC {name}, {rows} rows", answer, "OK" if rows != _TOO_MANY else "INVALID_ARGUMENT")


def ask_at_once(server: Server) -> Iterator[Asked]:
    """One row of each of 32 clients at once gets the answer that it gets alone."""
    for name, inputs in signatures(server).items():
        columns = {key: _jsonable(array) for key, array in _arrays(inputs, _CLIENTS).items()}
        bodies = [
            {"signature_name": name, "inputs": {key: values[row : row + 1] for key, values in columns.items()}}
            for row in range(_CLIENTS)
        ]
        ask = functools.partial(_post, server, "predict")
        alone = [ask(body) for body in bodies]
        with concurrent.futures.ThreadPoolExecutor(_CLIENTS) as clients:
            together = list(clients.map(ask, bodies))
        for row in range(_CLIENTS):
            asked = _judged(f"REST {name}, row {row} alone", alone[row], 200)
            if not _equal(alone[row], together[row]):
                asked = asked._replace(problem=f"with {_CLIENTS} clients at once: {_short(together[row])}")
            yield asked


def ask_others(server: Server) -> Iterator[Asked]:
    """Status and metadata are answered; classify and regress, for which no signature is made, are refused."""
    for path, status in (("", 200), ("/versions/1", 200), ("/versions/9", 404), ("/metadata", 200)):
        yield _judged(f"GET {_PREFIX}{path}", _rest(server, "GET", f"{_PREFIX}{path}"), status)
    for name in signatures(server):
        for verb in ("classify", "regress"):
            answer = _post(server, verb, {"signature_name": name, "examples": [{"x": 1.0}]})
            yield _judged(f"REST {verb} {name}", answer, 400)


def ask_metrics(server: Server) -> Iterator[Asked]:
    """The metrics page counts what was asked."""
    page = _rest(server, "GET", "/monitoring/prometheus/metrics").content
    counted = f':tensorflow:serving:request_count{{model_name="{MODEL}",status="OK"}}'
    yield Asked("metrics", Answer(200, counted in page), "" if counted in page else f"no {counted} in {page[:500]}")


def ask_malformed_rest(server: Server) -> Iterator[Asked]:
    """5,000 malformed bodies a signature are refused over REST, and end no server."""
    connection = http.client.HTTPConnection("127.0.0.1", server.rest_port, timeout=_SECONDS)
    with contextlib.closing(connection):
        for name, inputs in signatures(server).items():
            for number, wrong in _malformed(name, inputs):
                answer = _rest(server, "POST", f"{_PREFIX}:predict", wrong.body, connection)
                question = f"REST {name}, malformed {number}, {wrong.kind} {dict(wrong.shapes)}: {wrong.body[:200]!r}"
                yield Asked(question, answer, _not_refused(answer, answer.status // 100, (2, 4), wrong, inputs))


def ask_malformed_grpc(server: Server) -> Iterator[Asked]:
    """5,000 malformed requests a signature are refused over gRPC, and end no server."""
    with _stub(server) as stub:
        for name, inputs in signatures(server).items():
            for number, wrong in _malformed(name, inputs):
                wrong.request.model_spec.name = MODEL
                answer = _predict(server, stub, wrong.request)
                question = f"gRPC {name}, malformed {number}, {wrong.kind} {dict(wrong.shapes)}"
                yield Asked(question, answer, _not_refused(answer, answer.status, _REFUSALS, wrong, inputs))


# What may end a server comes last.
GROUPS: tuple[Callable[[Server], Iterator[Asked]], ...] = (
    ask_rest_rows,
    ask_grpc_rows,
    ask_at_once,
    ask_others,
    ask_metrics,
    ask_malformed_rest,
    ask_malformed_grpc,
)


def differences(ours: Iterable[Asked], theirs: Iterable[Asked]) -> Iterator[str]:
    """Where two servers answer the same questions differently."""
    for one, other in zip(ours, theirs, strict=True):
        if not _equal(one.answer, other.answer):
            yield f"{one.question}: embedded {_short(one.answer)}, real {_short(other.answer)}"


def _short(answer: Answer) -> str:
    return f"{answer.status} {str(answer.content)[:300]}"


def _judged(question: str, answer: Answer, status: Any) -> Asked:
    return Asked(question, answer, "" if answer.status == status else f"it is answered {_short(answer)}, not {status}")


def _post(server: Server, verb: str, body: Any) -> Answer:
    return _rest(server, "POST", f"{_PREFIX}:{verb}", json.dumps(body))


def _rest(
    server: Server,
    method: str,
    path: str,
    body: str | bytes | None = None,
    connection: http.client.HTTPConnection | None = None,
) -> Answer:
    """Asks over a connection that stays, or over one of its own."""
    if connection is None:
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", server.rest_port, timeout=_SECONDS)) as own:
            return _rest(server, method, path, body, own)
    try:
        connection.request(method, path, body)
        response = connection.getresponse()
        text = response.read().decode()
    except (OSError, http.client.HTTPException) as error:
        raise CheckError(f"no answer to {path} with {str(body)[:200]}: {error!r}; {_last_words(server)}") from error
    is_json = response.headers.get("Content-Type", "").startswith("application/json")
    return Answer(response.status, json.loads(text) if is_json else text)


def _last_words(server: Server) -> str:
    """Whether a server has ended, and of what."""
    if not wait_until(lambda: server.process.ended, 3):
        return "the server still runs"
    fatal = [line for line in server.process.log.splitlines() if re.match(r"F\d{4} |.*Check failed", line)]
    return f"the server has ended: {' '.join(fatal) or server.process.log[-500:]}"


@contextlib.contextmanager
def _stub(server: Server) -> Iterator[Any]:
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}", _ANY_LENGTH) as channel:
        yield prediction_service_pb2_grpc.PredictionServiceStub(channel)


def _predict(server: Server, stub: Any, request: predict_pb2.PredictRequest) -> Answer:
    try:
        response = stub.Predict(request, timeout=_SECONDS)
    except grpc.RpcError as error:
        if error.code() is grpc.StatusCode.UNAVAILABLE and server.process.ended:
            raise CheckError(f"no answer to Predict: {error.details()}; {_last_words(server)}") from error
        return Answer(error.code().name, {"error": error.details()})
    outputs = {
        # Which field holds the values belongs to the answer: clients read one of them.
        key: [sorted(field.name for field, _ in tensor.ListFields()), _plain(tf.make_ndarray(tensor))]
        for key, tensor in response.outputs.items()
    }
    return Answer("OK", outputs)


def _plain(array: np.ndarray) -> Any:
    return [value.decode("latin-1") for value in array.ravel()] if array.dtype == object else array.tolist()


def _arrays(inputs: dict[str, Any], rows: int) -> dict[str, np.ndarray]:
    """Input of a signature: noise, the same one whoever asks; the pretrained network's example pictures for strings."""
    random = np.random.default_rng(rows)
    arrays: dict[str, np.ndarray] = {}
    for name, described in inputs.items():
        shape = [int(dim["size"]) for dim in described["tensor_shape"]["dim"]][1:]
        if described["dtype"] == "DT_STRING":
            arrays[name] = np.array([_PICTURES[row % len(_PICTURES)] for row in range(rows)], object)
        else:
            dtype = tf.as_dtype(described["dtype"].removeprefix("DT_").lower()).as_numpy_dtype
            arrays[name] = random.integers(0, 256, (rows, *shape)).astype(dtype)
    return arrays


def _jsonable(array: np.ndarray) -> Any:
    if array.dtype == object:
        return [{"b64": base64.b64encode(value).decode()} for value in array]
    return array.tolist()


def _malformed(name: str, inputs: dict[str, Any]) -> Iterator[tuple[int, malformed.Malformed]]:
    """Numbered malformed requests but those without rows: with batching, TensorFlow Serving never answers one of these,
    and the thread that has it waits for ever.
    """
    for number, wrong in enumerate(malformed.malformed(name, inputs, _SEED, _MALFORMED)):
        columns = json.loads(wrong.body).get("inputs")
        listed = columns.values() if isinstance(columns, dict) else [columns]
        dims = [tensor.tensor_shape.dim for tensor in wrong.request.inputs.values()]
        if [] not in listed and not any(dim and dim[0].size == 0 for dim in dims):
            yield number, wrong


def _not_refused(
    answer: Answer, kind: Any, allowed: tuple[Any, Any], wrong: malformed.Malformed, inputs: dict[str, Any]
) -> str:
    """What is wrong with the answer to a malformed request; what is malformed by chance may be right by chance."""
    fits = all(_fits(shape, inputs[name]) for name, shape in wrong.shapes.items())
    if kind not in allowed or (kind == allowed[0] and not fits):
        return f"it is answered {_short(answer)}"
    return ""


def _fits(shape: Sequence[int], described: dict[str, Any]) -> bool:
    sizes = [int(dim["size"]) for dim in described["tensor_shape"].get("dim", ())]
    return len(shape) == len(sizes) and all(size in (-1, length) for size, length in zip(sizes, shape, strict=True))


class _Refused(NamedTuple):
    """What is said of the shape of an input; the expected one only where the server gets as far as that."""

    received: str
    expected: str | None = None


def _equal(one: Answer, other: Answer) -> bool:
    if one.status != other.status:
        return False
    ours, theirs = _comparable(one.content), _comparable(other.content)
    if isinstance(ours, _Refused) and isinstance(theirs, _Refused) and None in (ours.expected, theirs.expected):
        return ours.received == theirs.received
    return _same(ours, theirs)


def _comparable(content: Any) -> Any:
    """Contents without what may be worded differently: the nodes that an error of TensorFlow's own names, and a refused
    shape, which the embedded server tells in words of its own before anything runs.
    """
    if not isinstance(content, dict) or not isinstance(content.get("error"), str):
        return content
    text = re.sub(r"\s*\[\[.*|\n\s*", " ", content["error"]).strip()
    for words in (
        r"Input `.*` must have the shape (?P<expected>\S+)\. Received: shape (?P<received>\S+)\.",
        r"`.*` has no entries, and .* Received: shape (?P<received>\S+)\.",
        r"Shape of tensor \S+ (?P<received>\S+) is not compatible with .* shape (?P<expected>\S+)\.",
    ):
        if refused := re.match(words, text):
            return _Refused(**refused.groupdict())
    return text


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return bool(np.isclose(one, other, rtol=_TOLERANCE, atol=_TOLERANCE, equal_nan=True))
    return type(one) is type(other) and one == other
