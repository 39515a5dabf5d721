"""What can be asked, described as OpenAPI: a path for every model, a body for every signature."""

from http import HTTPStatus
from importlib import metadata
from typing import Any

from keras_bn_serving.codec.numbers import FLOATS, INTEGERS
from keras_bn_serving.codec.tensor_spec import TensorSpec
from keras_bn_serving.engine.service import ModelSpec, PredictionService
from keras_bn_serving.engine.signatures import Signature
from keras_bn_serving.engine.versions import State

_LOOK_STATUSES = (400, 404, 503)
_RUN_STATUSES = (*_LOOK_STATUSES, 408, 409, 413, 429, 500, 501, 504)
_ERROR = {"$ref": "#/components/schemas/Error"}
# As TensorFlow Serving writes them: not-a-number and the infinities stand in JSON as they are called.
_NUMBER = {"type": "number"}


def describe(service: PredictionService) -> dict[str, Any]:
    """Returns the description of what is served at this moment."""
    paths: dict[str, Any] = {
        "/healthz": {"get": _operation("Whether the server is alive", "health", {"type": "object"}, ())},
        "/readyz": {"get": _operation("Whether every model has a version", "readiness", {"type": "object"}, (503,))},
    }
    for name in service.repository.names():
        path = f"/v1/models/{name}"
        paths[path] = {"get": _operation(f"Versions of {name} and their states", f"{name}.status", _STATUS)}
        paths[f"{path}/metadata"] = {"get": _operation(f"Signatures of {name}", f"{name}.metadata", _METADATA)}
        available = [number for number, state, _ in service.repository.known(name) if state is State.AVAILABLE]
        if available:
            with service.lease(ModelSpec(name, available[0])) as lease:
                asked = [each for each in lease.servable.signatures.values() if _is_spoken(each)]
                bodies = [_body(each) for each in asked]
            if not bodies:
                continue
            operation = _operation(f"A prediction by {name}", f"{name}.predict", _ANSWER, _RUN_STATUSES)
            operation["requestBody"] = {
                "required": True,
                "content": {"application/json": {"schema": {"oneOf": bodies}}},
            }
            paths[f"{path}:predict"] = {"post": operation}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Model server", "version": metadata.version("keras-bn")},
        "paths": paths,
        "components": {
            "schemas": {"Error": {"type": "object", "required": ["error"], "properties": {"error": {"type": "string"}}}}
        },
    }


_STATUS = {
    "type": "object",
    "required": ["model_version_status"],
    "properties": {
        "model_version_status": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["version", "state", "status"],
                "properties": {
                    "version": {"type": "string"},
                    "state": {"enum": [state.name for state in State]},
                    "status": {"type": "object"},
                },
            },
        }
    },
}
_METADATA = {
    "type": "object",
    "required": ["model_spec", "metadata"],
    "properties": {"model_spec": {"type": "object"}, "metadata": {"type": "object"}},
}
# In rows, or in columns, as it was asked.
_ANSWER = {"type": "object", "oneOf": [{"required": ["predictions"]}, {"required": ["outputs"]}]}


def _operation(
    summary: str, operation_id: str, schema: dict[str, Any], statuses: tuple[int, ...] = _LOOK_STATUSES
) -> dict[str, Any]:
    return {
        "summary": summary,
        "operationId": operation_id,
        "responses": {
            "200": {"description": "The answer", "content": {"application/json": {"schema": schema}}},
            **{
                str(status): {
                    "description": HTTPStatus(status).phrase,
                    "content": {"application/json": {"schema": _ERROR}},
                }
                for status in statuses
            },
        },
    }


def _is_spoken(signature: Signature) -> bool:
    """Whether JSON can carry all inputs: TensorFlow Serving reads no half, uint16 or complex numbers from it."""
    spoken = {*FLOATS, *INTEGERS, "bool", "string"}
    return bool(signature.inputs) and all(spec.dtype in spoken for spec in signature.inputs.values())


def _body(signature: Signature) -> dict[str, Any]:
    inputs = {name: _schema(spec) for name, spec in signature.inputs.items()}
    named = {"type": "object", "required": sorted(inputs), "properties": inputs}
    default = signature.name == "serving_default"
    return {
        "type": "object",
        "title": signature.name,
        "required": ["inputs"] if default else ["inputs", "signature_name"],
        "properties": {"signature_name": {"const": signature.name}, "inputs": named},
    }


def _schema(spec: TensorSpec) -> dict[str, Any]:
    if spec.dtype == "string":
        bytes_value = {"type": "object", "required": ["b64"], "properties": {"b64": {"type": "string"}}}
        schema: dict[str, Any] = {"oneOf": [{"type": "string"}, bytes_value]}
    elif spec.dtype == "bool":
        schema = {"type": "boolean"}
    else:
        schema = _NUMBER if spec.dtype in ("float", "double") else {"type": "integer", **_bounds(spec.dtype)}
    for size in reversed(spec.shape or ()):
        schema = {"type": "array", "items": schema, **({} if size < 0 else {"minItems": size, "maxItems": size})}
    return schema


def _bounds(dtype: str) -> dict[str, int]:
    bits = int("".join(character for character in dtype if character.isdigit()) or 64)
    unsigned = dtype.startswith(("u", "q_u", "quint"))
    low, high = (0, 2**bits - 1) if unsigned else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return {"minimum": low, "maximum": high}
