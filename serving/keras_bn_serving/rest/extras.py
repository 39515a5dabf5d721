"""What the server offers over HTTP beside TensorFlow Serving's protocol: health, metrics, OpenAPI and a page."""

import json
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path
from typing import Any

from keras_bn_serving.codec.answer import encode_error
from keras_bn_serving.codec.tensor_spec import TensorSpec
from keras_bn_serving.engine.metrics import CONTENT_TYPE
from keras_bn_serving.engine.service import ModelSpec, PredictionService
from keras_bn_serving.engine.versions import State
from keras_bn_serving.rest import openapi
from keras_bn_serving.rest.messages import Request, Response

_PAGE_FOLDER = Path(__file__).parent / "page"
_PAGE_TYPES = {".html": "text/html; charset=utf-8", ".css": "text/css", ".js": "text/javascript"}
_PAGE_FILES = {"/": "index.html", "/page/page.css": "page.css", "/page/page.js": "page.js"}
_PAGE_HEADERS = (
    ("Content-Security-Policy", "default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'none'"),
    ("X-Content-Type-Options", "nosniff"),
    ("Cache-Control", "no-cache"),
)


class Extras:
    """Answers the paths outside `/v1/`.

    Args:
        service: What knows the models.
        read_metrics: Returns what has been counted.
        metrics_path: Where the metrics are; empty for nowhere.
    """

    def __init__(self, service: PredictionService, read_metrics: Callable[[], bytes], metrics_path: str):
        self._service = service
        self._read_metrics = read_metrics
        self._metrics_path = metrics_path

    def answer(self, request: Request) -> Response | None:
        """Returns the answer to a request, or `None` if it is none of ours."""
        if request.method not in ("GET", "HEAD"):
            return None
        path = request.target.split("?")[0]
        if path == self._metrics_path:
            return Response(HTTPStatus.OK, self._read_metrics(), CONTENT_TYPE)
        if path == "/healthz":
            return _json({"status": "alive"})
        if path == "/readyz":
            return self._readiness()
        if path == "/openapi.json":
            return _json(openapi.describe(self._service))
        if path == "/page/models":
            return self.models()
        # TensorFlow Serving has no page, and what is not a browser is told so.
        if path in _PAGE_FILES and (path != "/" or b"text/html" in request.headers.get(b"accept", b"")):
            return _page_file(_PAGE_FILES[path])
        return None

    def models(self) -> Response:
        """Returns all models with their versions, labels and signatures."""
        return _json({"models": [self._describe(name) for name in self._service.repository.names()]})

    def _describe(self, name: str) -> dict[str, Any]:
        versions = [
            {
                "version": str(number),
                "state": state.name,
                "error_message": "" if error is None else error.message,
                "signatures": self._signatures(name, number) if state is State.AVAILABLE else {},
            }
            for number, state, error in self._service.repository.known(name)
        ]
        return {"name": name, "labels": dict(self._service.repository.labels(name)), "versions": versions}

    def _signatures(self, name: str, number: int) -> dict[str, Any]:
        with self._service.lease(ModelSpec(name, number)) as lease:
            return {
                key: {
                    "method_name": signature.method_name,
                    "inputs": {each: _describe(spec) for each, spec in signature.inputs.items()},
                    "outputs": {each: _describe(spec) for each, spec in signature.outputs.items()},
                }
                for key, signature in lease.servable.signatures.items()
                if signature.inputs
            }

    def _readiness(self) -> Response:
        repository = self._service.repository
        missing = [
            name
            for name in repository.names()
            if not any(state is State.AVAILABLE for _, state, _ in repository.known(name))
        ]
        if missing:
            return Response(
                HTTPStatus.SERVICE_UNAVAILABLE, encode_error(f"No version is available of: {', '.join(missing)}")
            )
        return _json({"status": "ready"})


def _describe(spec: TensorSpec) -> dict[str, Any]:
    return {"dtype": spec.dtype, "shape": None if spec.shape is None else list(spec.shape)}


def _json(value: Any) -> Response:
    return Response(HTTPStatus.OK, json.dumps(value, indent=1).encode())


def _page_file(name: str) -> Response:
    content = (_PAGE_FOLDER / name).read_bytes()
    return Response(HTTPStatus.OK, content, _PAGE_TYPES[name[name.rindex(".") :]], _PAGE_HEADERS)
