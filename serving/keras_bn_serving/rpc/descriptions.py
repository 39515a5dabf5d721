"""The services' descriptions, as reflection hands them out, from any release of tensorflow-serving-api."""

import contextlib
import importlib

from google.protobuf import descriptor_pool

_MODULES = {"PredictionService": "prediction_service_pb2", "ModelService": "model_service_pb2"}


def described_services() -> list[str]:
    """Registers the services with protobuf's pool, from which reflection reads them; their full names."""
    names = []
    for service, module in _MODULES.items():
        # Those of tensorflow-serving-api before 2.21 are made for a protobuf that is gone: they register their
        # description, and fail on the line after it.
        with contextlib.suppress(AttributeError):
            importlib.import_module(f"tensorflow_serving.apis.{module}")
        names.append(descriptor_pool.Default().FindServiceByName(f"tensorflow.serving.{service}").full_name)
    return names
