"""TensorFlow Serving's REST protocol: routes, bodies and HTTP statuses on top of the prediction service."""

import asyncio
import logging
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from urllib.parse import unquote_to_bytes

from google.protobuf import json_format
from tensorflow_serving.apis import get_model_metadata_pb2, get_model_status_pb2

from serving.errors import Code, InvalidArgumentError, ServingError
from serving.http_protocol import Request, Response
from serving.json_answer import encode_error, encode_predict
from serving.json_tensor import PredictInput, decode_predict
from serving.model_repository import Lease
from serving.prediction_service import ModelSpec, PredictionService

_log = logging.getLogger(__name__)

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
_LARGEST_VERSION = 2**63 - 1
# Below this a body is read at once; a larger one would keep the other connections waiting.
_READ_AT_ONCE_BYTES = 64 * 1024
_NOT_FOUND_PAGE = b"<HTML><HEAD>\n<TITLE>404 Not Found</TITLE>\n</HEAD><BODY>\n<H1>Not Found</H1>\n</BODY></HTML>\n"


class _Overflow(Exception):
    """A version number that no integer of 64 bits holds; TensorFlow Serving answers it with nothing."""


class RestServer:
    """Answers HTTP requests.

    Args:
        service: What answers.
        timeout_seconds: How long an answer may take.
    """

    def __init__(self, service: PredictionService, timeout_seconds: float = 30.0):
        self._service = service
        self._timeout_seconds = timeout_seconds
        self._readers = ThreadPoolExecutor(1, thread_name_prefix="read")

    async def handle(self, request: Request) -> Response:
        """Answers one request, whatever happens."""
        try:
            return await asyncio.wait_for(self._route(request), self._timeout_seconds)
        except ServingError as error:
            return Response(HTTP_STATUS[error.code], encode_error(error.message))
        except _Overflow:
            return Response(HTTPStatus.BAD_REQUEST, b"")
        except asyncio.TimeoutError:
            return Response(HTTP_STATUS[Code.DEADLINE_EXCEEDED], encode_error("The request took too long."))
        except Exception:
            _log.exception("%s %s failed", request.method, request.target)
            return Response(HTTP_STATUS[Code.INTERNAL], encode_error("Internal error"))

    def refuse(self, status: int, reason: str) -> Response:
        """Makes the answer for a request that cannot be read."""
        return Response(status, encode_error(reason))

    def close(self) -> None:
        """Frees the threads."""
        self._readers.shutdown()

    async def _route(self, request: Request) -> Response:
        if request.method == "OPTIONS":
            return Response(HTTPStatus.BAD_REQUEST, b"", "text/html; charset=ISO-8859-1")
        if not request.target.startswith("/v1/"):
            return Response(HTTPStatus.NOT_FOUND, _NOT_FOUND_PAGE, "text/html")
        if request.method == "POST":
            found = _RUN.fullmatch(request.target)
            # The pattern ignores case, what it is dispatched by does not.
            if found and found[4] == "predict":
                return await self._predict(_model_spec(*found.groups()[:3]), request.body)
        if request.method == "GET":
            found = _LOOK.fullmatch(request.target)
            if found and found[1] is None:
                raise InvalidArgumentError("Missing model name in request.")
            if found:
                spec = _model_spec(*found.groups()[:3])
                return self._metadata(spec) if found[4] == "metadata" else self._status(spec)
        raise InvalidArgumentError(f"Malformed request: {request.method} {request.target}")

    async def _predict(self, spec: ModelSpec, body: bytes) -> Response:
        taken: list[Lease] = []

        def read() -> PredictInput:
            return decode_predict(body, self._taking(spec, taken))

        try:
            if len(body) <= _READ_AT_ONCE_BYTES:
                understood = read()
            else:
                understood = await asyncio.get_running_loop().run_in_executor(self._readers, read)
            future = self._service.predict(taken[0], understood.signature_name, understood.inputs)
        except BaseException:
            for lease in taken:
                lease.release()
            raise
        outputs = await asyncio.wrap_future(future)
        return Response(HTTPStatus.OK, encode_predict(outputs, understood.row_format))

    def _taking(self, spec: ModelSpec, taken: list[Lease]) -> Callable:
        def find_inputs(signature_name: str):
            if not taken:
                taken.append(self._service.lease(spec))
            return self._service.input_specs(taken[0], signature_name)

        return find_inputs

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


def _model_spec(name: str, version: str | None, label: str | None) -> ModelSpec:
    if version is not None and int(version) > _LARGEST_VERSION:
        raise _Overflow
    return ModelSpec(
        _unquote(name), None if version is None else int(version), None if label is None else _unquote(label)
    )


def _unquote(text: str) -> str:
    return unquote_to_bytes(text).decode(errors="surrogateescape")


def _message_to_json(message) -> str:
    return json_format.MessageToJson(
        message, preserving_proto_field_name=True, indent=1, always_print_fields_with_no_presence=True
    )
