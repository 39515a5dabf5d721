"""Configuration in text protos, read with protobuf's own parser."""

import os
import re
from collections.abc import Container
from typing import TypeVar

from google.protobuf import text_format
from google.protobuf.message import Message
from tensorflow_serving.config import model_server_config_pb2

from keras_bn_serving.config.models import ModelConfig, VersionPolicy
from keras_bn_serving.config.text_protos import MonitoringConfig
from keras_bn_serving.errors import InvalidArgumentError, NotFoundError

_Message = TypeVar("_Message", bound=Message)
_METRICS_PATH = "/monitoring/prometheus/metrics"
_PLATFORM = "tensorflow"
_SCHEME = re.compile(r"[a-zA-Z][0-9a-zA-Z.]*://")


def read_model_configs(path: str) -> list[ModelConfig]:
    """Reads the models to serve from a `ModelServerConfig` in a file.

    Raises:
        NotFoundError: If the file cannot be read.
        InvalidArgumentError: If it says something that cannot be served.
    """
    return model_configs(read_message(path, model_server_config_pb2.ModelServerConfig()), path)


def model_configs(
    message: model_server_config_pb2.ModelServerConfig, source: str, served: Container[str] = ()
) -> list[ModelConfig]:
    """Turns a `ModelServerConfig` into what the repository understands, checked in TensorFlow Serving's order.

    Args:
        message: What to serve.
        source: Where it comes from, for errors.
        served: Names of models that are served already.
    """
    if message.WhichOneof("config") != "model_config_list":
        raise InvalidArgumentError(f"{source}: `model_config_list` is required. Received: none.")
    listed = message.model_config_list.config
    names: set[str] = set()
    for one in listed:
        if one.name in names:
            raise InvalidArgumentError(f"Illegal to list model {one.name} multiple times in config list")
        names.add(one.name)
    for one in listed:
        if not os.path.isabs(one.base_path) and not _SCHEME.match(one.base_path):
            raise InvalidArgumentError(
                f"Expected model {one.name} to have an absolute path or URI; got base_path()={one.base_path}"
            )
    for one in listed:
        if one.name in served and _platform(one) != _PLATFORM:
            raise InvalidArgumentError(
                f"Illegal to change a model's platform. For model {one.name} platform was {_PLATFORM} and new "
                f"platform requested is {_platform(one)}"
            )
    configs = []
    for one in listed:
        if _platform(one) != _PLATFORM:
            raise InvalidArgumentError(f"Model {one.name} requests unsupported platform {_platform(one)}")
        choice = one.model_version_policy
        kind = choice.WhichOneof("policy_choice")
        policy = VersionPolicy(
            latest=choice.latest.num_versions or 1,
            all=kind == "all",
            specific=tuple(choice.specific.versions) if kind == "specific" else None,
        )
        configs.append(ModelConfig(one.name, one.base_path, policy, dict(one.version_labels)))
    return configs


def _platform(config: model_server_config_pb2.ModelConfig) -> str:
    platform = config.model_platform
    if config.model_type != model_server_config_pb2.MODEL_TYPE_UNSPECIFIED:
        if platform:
            raise InvalidArgumentError(
                "Illegal setting both ModelServerConfig::model_type (deprecated) and "
                f"ModelServerConfig::model_platform, model name is {config.name}"
            )
        if config.model_type != model_server_config_pb2.TENSORFLOW:
            raise InvalidArgumentError(f"ModelServerConfig::model_type choice {config.model_type} not supported.")
        return _PLATFORM
    if not platform:
        raise InvalidArgumentError(
            "Illegal setting neither ModelServerConfig::model_type (deprecated) nor "
            f"ModelServerConfig::model_platform, model name is {config.name}"
        )
    return platform


def read_metrics_path(path: str) -> str:
    """Returns where the metrics are served, from a `MonitoringConfig`; empty where no file is named or they are off.

    Raises:
        ServingError: If the file cannot be read, or its path is none.
    """
    config = read_message(path, MonitoringConfig()).prometheus_config if path else None
    if config is None or not config.enable:
        return ""
    if config.path and not config.path.startswith("/"):
        raise InvalidArgumentError(f"{path}: `path` must begin with a slash. Received: {config.path!r}.")
    return config.path or _METRICS_PATH


def read_message(path: str, message: _Message) -> _Message:
    """Reads a text proto from a file into `message`.

    Raises:
        NotFoundError: If the file cannot be read.
        InvalidArgumentError: If its text is not of that kind; says where.
    """
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
        raise NotFoundError(f"Cannot read {path}: {reason}.") from error
    try:
        return text_format.Parse(text, message)
    except text_format.ParseError as error:
        raise InvalidArgumentError(f"{path} is not a {message.DESCRIPTOR.name}: {error}") from error
