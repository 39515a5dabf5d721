"""What the server offers over HTTP beside TensorFlow Serving's protocol: health, metrics, OpenAPI and a page."""

import json
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from keras_bn_serving.codec.answer import encode_error
from keras_bn_serving.codec.tensor_spec import TensorSpec
from keras_bn_serving.engine.background import GoOn
from keras_bn_serving.engine.metrics import CONTENT_TYPE
from keras_bn_serving.engine.service import ModelSpec, PredictionService
from keras_bn_serving.engine.versions import State
from keras_bn_serving.errors import NotFoundError
from keras_bn_serving.rest import openapi
from keras_bn_serving.rest.messages import Request, Response
from keras_bn_serving.rest.pages import PREFIX, Page, is_front

_OPENAPI = "/openapi.json"


class Extras:
    """Answers the paths outside `/v1/`.

    Args:
        service: What knows the models.
        read_metrics: Returns what has been counted.
        metrics_path: Where the metrics are; empty for nowhere.
        page: Whether there is a page for a person.
    """

    def __init__(
        self, service: PredictionService, read_metrics: Callable[[], bytes], metrics_path: str, page: bool = True
    ):
        self._service = service
        self._read_metrics = read_metrics
        self._metrics_path = metrics_path
        self._page = Page(service) if page else None

    def is_for_browsers(self, request: Request) -> bool:
        """Returns whether a request is for the page, or for the other list of all models that programs do not need."""
        path = request.target.split("?")[0]
        return path == _OPENAPI or (self._page is not None and (path.startswith(PREFIX) or is_front(request, path)))

    def answer(self, request: Request) -> Response | Callable[[GoOn], Response] | None:
        """Returns the answer to a request, or what makes it and takes its time, or `None` if it is none of ours."""
        if request.method not in ("GET", "HEAD"):
            return None
        path = request.target.split("?")[0]
        if path == self._metrics_path:
            return Response(HTTPStatus.OK, self._read_metrics(), CONTENT_TYPE)
        if path == "/healthz":
            return _json({"status": "alive"})
        if path == "/readyz":
            return self._readiness()
        if path == _OPENAPI:
            return _json(openapi.describe(self._service))
        if self._page is None:
            return None
        return self.models() if path == f"{PREFIX}models" else self._page.answer(request, path)

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
        try:
            lease = self._service.lease(ModelSpec(name, number))
        except NotFoundError:  # It has left since it was looked for.
            return {}
        with lease:
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
