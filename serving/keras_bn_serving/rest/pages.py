"""The page for a person: its files, and what it shows of a version beside the signatures."""

import base64
import re
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import orjson

from keras_bn_serving.engine.assets import read_card, read_examples
from keras_bn_serving.engine.background import GoOn
from keras_bn_serving.engine.service import ModelSpec, PredictionService
from keras_bn_serving.rest.messages import Request, Response

_FOLDER = Path(__file__).parent / "page"
_TYPES = {".html": "text/html; charset=utf-8", ".css": "text/css", ".js": "text/javascript"}
_HEADERS = (
    ("Content-Security-Policy", "default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'none'"),
    ("X-Content-Type-Options", "nosniff"),
    ("Cache-Control", "no-cache"),
)
_VERSION = re.compile(r"/page/models/([^/:]+)/versions/(\d{1,19})")
# Of the card of a version: what a person is shown.
_SHOWN = ("accuracy", "created", "labels", "parameters")
PREFIX = "/page/"


class Page:
    """Answers what the page asks for, beside the list of the models.

    Args:
        service: What knows the models.
    """

    def __init__(self, service: PredictionService):
        self._service = service
        self._files = {f"{PREFIX}{file.name}": file for file in _FOLDER.iterdir() if file.suffix in _TYPES}
        self._files["/"] = self._files.pop(f"{PREFIX}index.html")

    def answer(self, request: Request, path: str) -> Response | Callable[[GoOn], Response] | None:
        """Returns the answer, or what makes it and takes its time, or `None` where the page has no such part."""
        if path in self._files and (path != "/" or is_front(request, path)):
            file = self._files[path]
            return Response(HTTPStatus.OK, file.read_bytes(), _TYPES[file.suffix], _HEADERS)
        version = _VERSION.fullmatch(path)
        if version is not None:
            spec = ModelSpec(unquote(version[1]), int(version[2]))
            return lambda go_on: self._describe(spec)
        return None

    def _describe(self, spec: ModelSpec) -> Response:
        """Answers with the card of a version and examples of what it takes."""
        with self._service.lease(spec) as lease:
            card = read_card(lease.servable.path) or {}
            examples = read_examples(lease.servable.path, lease.servable.signatures)
        answer = {
            "card": {name: card[name] for name in _SHOWN if card.get(name) is not None},
            "examples": {
                signature: [
                    {name: _in_json(array[row]) for name, array in inputs.items()}
                    for row in range(len(next(iter(inputs.values()))))
                ]
                for signature, inputs in examples.items()
            },
        }
        return Response(HTTPStatus.OK, orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY))


def is_front(request: Request, path: str) -> bool:
    """Returns whether a request is for the page itself: TensorFlow Serving has none, and tells programs so."""
    return path == "/" and b"text/html" in request.headers.get(b"accept", b"")


def _in_json(value: Any) -> Any:
    if isinstance(value, bytes):
        return {"b64": base64.b64encode(value).decode()}
    if isinstance(value, np.ndarray):
        return [_in_json(each) for each in value] if value.dtype == object else np.ascontiguousarray(value)
    return value
