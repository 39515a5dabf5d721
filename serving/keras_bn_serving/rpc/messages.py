"""The messages of TensorFlow Serving's gRPC services, from what the server knows and back."""

from typing import Any

import numpy as np
from tensorflow_serving.apis import classification_pb2, model_pb2, regression_pb2

from keras_bn_serving.engine.examples import Classes
from keras_bn_serving.engine.repository import Lease
from keras_bn_serving.engine.service import ModelSpec
from keras_bn_serving.errors import InvalidArgumentError

_MOST_BYTES = 1024
_CUT = "...TRUNCATED"


def check_model_spec(request: Any) -> None:
    """Raises an InvalidArgumentError unless the request says anything of a model."""
    if not request.HasField("model_spec"):
        raise InvalidArgumentError("Missing ModelSpec")


def model_spec(spec: model_pb2.ModelSpec) -> ModelSpec:
    """Which model a request asks for."""
    choice = spec.WhichOneof("version_choice")
    return ModelSpec(
        spec.name,
        spec.version.value if choice == "version" else None,
        spec.version_label if choice == "version_label" else None,
    )


def details(message: str) -> str:
    """Returns an error's message as it goes over gRPC: cut where it is long."""
    data = message.encode(errors="surrogateescape")
    return data[:_MOST_BYTES].decode(errors="replace") + (_CUT if len(data) > _MOST_BYTES else "")


def answered_by(lease: Lease, signature_name: str) -> model_pb2.ModelSpec:
    """Which version and signature has answered."""
    spec = model_pb2.ModelSpec(name=lease.model_name, signature_name=signature_name)
    spec.version.value = lease.version
    return spec


def classification(classes: Classes) -> classification_pb2.ClassificationResult:
    """For each example its labels with their scores."""
    result = classification_pb2.ClassificationResult()
    labels, scores = classes
    shape = scores.shape if scores is not None else labels.shape if labels is not None else (0, 0)
    for row in range(shape[0]):
        one = result.classifications.add()
        for column in range(shape[1]):
            one.classes.add(
                label="" if labels is None else labels[row, column],
                score=0.0 if scores is None else float(scores[row, column]),
            )
    return result


def regression(numbers: np.ndarray) -> regression_pb2.RegressionResult:
    """For each example its number."""
    return regression_pb2.RegressionResult(
        regressions=[regression_pb2.Regression(value=value) for value in numbers.tolist()]
    )
