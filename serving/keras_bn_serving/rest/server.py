"""TensorFlow Serving's REST protocol: routes, bodies and HTTP statuses on top of the prediction service."""

import asyncio
import json
import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http import HTTPStatus
from urllib.parse import unquote_to_bytes

from google.protobuf import json_format
from tensorflow_serving.apis import get_model_metadata_pb2, get_model_status_pb2

from keras_bn_serving import request_ids
from keras_bn_serving.codec.answer import encode_error
from keras_bn_serving.engine.background import Background
from keras_bn_serving.engine.memory import Memory
from keras_bn_serving.engine.metrics import Metrics
from keras_bn_serving.engine.service import ModelSpec, PredictionService
from keras_bn_serving.errors import (
    NO_MEMORY,
    Code,
    InvalidArgumentError,
    ServingError,
)
from keras_bn_serving.rest import hosts
from keras_bn_serving.rest.extras import Extras
from keras_bn_serving.rest.messages import Request, Response, html_error, path_of
from keras_bn_serving.rest.predictions import Predictions

_log = logging.getLogger(__name__)
_request_log = logging.getLogger("keras_bn_serving.requests")

HTTP_STATUS = {
    Code.OK: 200,
    Code.CANCELLED: 499,
    Code.UNKNOWN: 500,
    Code.INVALID_ARGUMENT: 400,
    Code.DEADLINE_EXCEEDED: 504,
    Code.NOT_FOUND: 404,
    Code.ALREADY_EXISTS: 409,
    Code.PERMISSION_DENIED: 403,
    Code.RESOURCE_EXHAUSTED: 429,
    Code.FAILED_PRECONDITION: 400,
    Code.ABORTED: 409,
    Code.OUT_OF_RANGE: 400,
    Code.UNIMPLEMENTED: 501,
    Code.INTERNAL: 500,
    Code.UNAVAILABLE: 503,
    Code.DATA_LOSS: 500,
    Code.UNAUTHENTICATED: 401,
}
_WHERE = r"/v1/models/([^/:]+)(?:(?:/versions/(\d+))|(?:/labels/([^/:]+)))?"
_RUN = re.compile(_WHERE + r":(classify|regress|predict)", re.IGNORECASE)
_LOOK = re.compile(
    r"/v1/models(?:/([^/:]+))?(?:(?:/versions/(\d+))|(?:/labels/([^/:]+)))?(?:/(metadata))?", re.IGNORECASE
)
_PROTOCOL = re.compile("/v1/", re.IGNORECASE)
_LARGEST_VERSION = 2**63 - 1
_CORS = (
    ("Access-Control-Allow-Origin", "*"),
    ("Access-Control-Allow-Methods", "POST, GET"),
    ("Access-Control-Allow-Headers", "Content-Type"),
)
_METHODS = ("GET", "POST", "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH")


class _Overflow(Exception):
    """A version number that no integer of 64 bits holds; TensorFlow Serving answers it with nothing."""


@dataclass(frozen=True)
class RestOptions:
    """What the REST server does beside the protocol.

    Attributes:
        cors: Whether pages of other origins may ask.
        list_models: Whether `GET /v1/models` lists the models, where TensorFlow Serving refuses it.
        metrics_path: Where Prometheus finds the metrics; empty for nowhere.
        num_threads: Threads that read bodies and write answers, where either takes long.
        log_requests: Whether to write a line of JSON to the log for every request.
        page: Whether there is a page for a person.
        allowed_hosts: By which names browsers may ask.
    """

    cors: bool = False
    list_models: bool = False
    metrics_path: str = ""
    num_threads: int = 4
    log_requests: bool = False
    page: bool = True
    allowed_hosts: hosts.AllowedHosts = field(default_factory=hosts.AllowedHosts)


class RestServer:
    """Answers HTTP requests.

    Args:
        service: What answers.
        metrics: What counts.
        memory: What requests may hold.
        read_metrics: Returns what has been counted, as text.
        options: What to do beside the protocol.
        timeout_seconds: How long an answer may take.
        loop: Where `handle` runs.
    """

    def __init__(
        self,
        service: PredictionService,
        metrics: Metrics,
        memory: Memory,
        read_metrics: Callable[[], bytes],
        options: RestOptions,
        timeout_seconds: float,
        loop: asyncio.AbstractEventLoop,
    ):
        self._service = service
        self._metrics = metrics
        self._options = options
        self._timeout_seconds = timeout_seconds
        self._extras = Extras(service, read_metrics, options.metrics_path, options.page)
        self._background = Background(options.num_threads, "rest")
        self._predictions = Predictions(service, memory, self._background, timeout_seconds, loop)

    async def handle(self, request: Request) -> Response:
        """Answers one request, whatever happens."""
        started = time.perf_counter()
        path = path_of(request.target)
        if request.method not in _METHODS:
            return html_error(HTTPStatus.NOT_IMPLEMENTED)
        if path is None:
            return html_error(HTTPStatus.BAD_REQUEST)
        target = request.target
        request = request._replace(target=path)
        run = _RUN.fullmatch(request.target) if request.method == "POST" else None
        look = _LOOK.fullmatch(request.target) if request.method == "GET" else None
        try:
            self._check_host(request, target)
            response, code = await self._route(request, run, look), Code.OK
        except ServingError as error:
            response, code = Response(HTTP_STATUS[error.code], await self._predictions.error(error.message)), error.code
        except _Overflow:
            response, code = Response(HTTPStatus.BAD_REQUEST, b""), Code.INVALID_ARGUMENT
        except (TimeoutError, asyncio.TimeoutError):
            code = Code.DEADLINE_EXCEEDED
            response = Response(HTTP_STATUS[code], encode_error("The request took too long."))
        except MemoryError:
            code = Code.RESOURCE_EXHAUSTED
            response = Response(HTTP_STATUS[code], encode_error(NO_MEMORY))
        except Exception:
            _log.exception("%s %s failed", request.method, request.target)
            code = Code.INTERNAL
            response = Response(HTTP_STATUS[code], encode_error("Internal error"))
        seconds = time.perf_counter() - started
        if _PROTOCOL.match(request.target):
            self._count(run or look, code, seconds)
        if self._options.log_requests:
            _request_log.info(
                json.dumps(
                    {
                        "request_id": request_ids.current(),
                        "method": request.method,
                        "path": request.target,
                        "status": int(response.status),
                        "milliseconds": round(seconds * 1000, 3),
                        "request_bytes": len(request.body),
                        "response_bytes": len(response.body),
                    }
                )
            )
        return response._replace(headers=(*response.headers, *_CORS)) if self._options.cors else response

    def refuse(self, status: int, reason: str) -> Response:
        """Makes the answer for a request that cannot be read."""
        return Response(status, encode_error(reason)) if reason else html_error(HTTPStatus(status))

    def close(self) -> None:
        """Frees the threads."""
        self._background.close()

    def _check_host(self, request: Request, target: str) -> None:
        """Refuses what a page under a name of its own asks; programs may use any name, as with TensorFlow Serving."""
        # Where any page may ask, it needs no name for it. That an answer may come says nothing yet.
        asks = hosts.is_of_browser(request.headers) and not self._options.cors and request.method != "OPTIONS"
        if asks or self._extras.is_for_browsers(request):
            self._options.allowed_hosts.check(hosts.asked_for(request.headers, target))

    async def _route(self, request: Request, run: re.Match[str] | None, look: re.Match[str] | None) -> Response:
        if not _PROTOCOL.match(request.target):
            ours = self._extras.answer(request)
            if callable(ours):
                _, done = self._background.start(ours, self._timeout_seconds)
                ours = await done
            return ours or html_error(HTTPStatus.NOT_FOUND)
        if request.method == "OPTIONS":
            # A browser that asks before it sends: whether the answer lets it is said by other headers.
            known = re.search(rb"https?://", request.headers.get(b"origin", b""))
            return Response(HTTPStatus.OK if known else HTTPStatus.BAD_REQUEST, b"", "text/html; charset=ISO-8859-1")
        found = run or look
        spec = _model_spec(*found.groups()[:3]) if found is not None else None
        # The pattern ignores case, what it is dispatched by does not.
        if run is not None and spec is not None and run[4] in ("predict", "classify", "regress"):
            if run[4] == "predict":
                return await self._predictions.predict(spec, request)
            return await self._predictions.examine(spec, request, run[4])
        if look is not None and spec is not None:
            if look[1] is None and self._options.list_models and not any(look.groups()):
                return self._extras.models()
            if look[1] is None:
                raise InvalidArgumentError("Missing model name in request.")
            return self._metadata(spec) if look[4] == "metadata" else self._status(spec)
        raise InvalidArgumentError(f"Malformed request: {request.method} {request.target}")

    def _count(self, asked: re.Match[str] | None, code: Code, seconds: float) -> None:
        # As TensorFlow Serving has it: whatever name is asked for, and for a look no word for what was called.
        name = _unquote(asked[1] or "") if asked else ""
        api = asked[4] if asked is not None and asked.re is _RUN else ""
        self._metrics.request(name.encode(errors="replace").decode(), api, "REST", code.name, seconds)

    def _status(self, spec: ModelSpec) -> Response:
        answer = get_model_status_pb2.GetModelStatusResponse()
        for version, state, error in self._service.status(spec):
            one = answer.model_version_status.add(version=version, state=int(state))
            one.status.error_code = 0 if error is None else int(error.code)
            one.status.error_message = "" if error is None else error.message
        return Response(HTTPStatus.OK, (_message_to_json(answer) + "\n").encode())

    def _metadata(self, spec: ModelSpec) -> Response:
        with self._service.lease(spec) as lease:
            answer = get_model_metadata_pb2.GetModelMetadataResponse()
            answer.model_spec.name = lease.model_name
            answer.model_spec.version.value = lease.version
            definitions = get_model_metadata_pb2.SignatureDefMap(
                signature_def=dict(lease.servable.meta_graph.signature_def)
            )
        text = (
            f'{{\n"model_spec":{_message_to_json(answer.model_spec)}\n,\n'
            f'"metadata": {{"signature_def": {_message_to_json(definitions)}\n}}\n}}\n'
        )
        return Response(HTTPStatus.OK, text.encode())


def _model_spec(name: str | None, version: str | None, label: str | None) -> ModelSpec:
    if version is not None and int(version) > _LARGEST_VERSION:
        raise _Overflow
    return ModelSpec(
        _unquote(name or ""), None if version is None else int(version), None if label is None else _unquote(label)
    )


def _unquote(text: str) -> str:
    return unquote_to_bytes(text).decode(errors="surrogateescape") if "%" in text else text


def _message_to_json(message) -> str:
    return json_format.MessageToJson(
        message,
        preserving_proto_field_name=True,
        indent=1,
        always_print_fields_with_no_presence=True,
        ensure_ascii=False,
    )
