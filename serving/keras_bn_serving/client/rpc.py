"""What a client sends and reads over gRPC."""

import contextlib
import functools
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any, NamedTuple

import grpc
import numpy as np
from google.protobuf import json_format

from keras_bn_serving.client.inputs import fitting, is_numeric, type_of
from keras_bn_serving.client.messages import message, state_name
from keras_bn_serving.client.types import ModelVersion, Remembered, Target
from keras_bn_serving.codec.tensor_proto import to_array, write_array
from keras_bn_serving.errors import Code, InvalidArgumentError, error_of

_SERVICES = {
    **dict.fromkeys(("Predict", "Classify", "Regress", "GetModelMetadata"), "PredictionService"),
    "GetModelStatus": "ModelService",
}
_UNLIMITED = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


class Rpc(NamedTuple):
    """One call to be made."""

    method: str
    request: Any
    response: str


Operation = Generator[Rpc, Any, Any]


class GrpcProtocol:
    """The operations; each yields calls, is sent their responses, and returns its result."""

    def __init__(self) -> None:
        self._input_types = Remembered[tuple[Target, str], dict[str, Any]]()

    def predict(self, target: Target, inputs: Any, signature_name: str) -> Operation:
        """Asks for a prediction; returns an array, or several by name."""
        known = self._input_types.find((target, signature_name)) is not None
        try:
            response = yield (yield from self._request(target, inputs, signature_name))
        except InvalidArgumentError:
            if not known:
                raise
            # Another version may have come since, of other types.
            self._input_types.forget((target, signature_name))
            response = yield (yield from self._request(target, inputs, signature_name))
        outputs = {name: to_array(tensor, name) for name, tensor in response.outputs.items()}
        return next(iter(outputs.values())) if len(outputs) == 1 else outputs

    def _request(self, target: Target, inputs: Any, signature_name: str) -> Generator[Rpc, Any, Rpc]:
        types = yield from self._types(target, signature_name)
        if not isinstance(inputs, Mapping):
            if not types:
                raise InvalidArgumentError(
                    f"Signature {signature_name!r} of {target.model_name} is not there, or empty."
                )
            if len(types) != 1:
                raise ValueError(f"`inputs` must be a mapping with the names {sorted(types)}. Received: one array.")
            inputs = {next(iter(types)): inputs}
        request = message("PredictRequest")(model_spec=_spec(target, signature_name))
        for name, value in inputs.items():
            write_array(request.inputs[name], _tensor(name, value, types.get(name)))
        return Rpc("Predict", request, "PredictResponse")

    def classify(self, target: Target, examples: Any, context: Any, signature_name: str) -> Operation:
        """Asks for a classification; returns a list of labels with scores for every example."""
        request = message("ClassificationRequest")(
            model_spec=_spec(target, signature_name), input=_input(examples, context)
        )
        response = yield Rpc("Classify", request, "ClassificationResponse")
        return [[(one.label, one.score) for one in each.classes] for each in response.result.classifications]

    def regress(self, target: Target, examples: Any, context: Any, signature_name: str) -> Operation:
        """Asks for a regression; returns an array."""
        request = message("RegressionRequest")(
            model_spec=_spec(target, signature_name), input=_input(examples, context)
        )
        response = yield Rpc("Regress", request, "RegressionResponse")
        return np.array([each.value for each in response.result.regressions], np.float32)

    def status(self, target: Target) -> Operation:
        """Asks for a model's versions; returns them newest first."""
        request = message("GetModelStatusRequest")(model_spec=_spec(target, ""))
        response = yield Rpc("GetModelStatus", request, "GetModelStatusResponse")
        return [
            ModelVersion(each.version, state_name(each.state), Code(each.status.error_code), each.status.error_message)
            for each in response.model_version_status
        ]

    def metadata(self, target: Target) -> Operation:
        """Asks for a model's signatures; returns them by name, as REST gives them."""
        request = message("GetModelMetadataRequest")(model_spec=_spec(target, ""), metadata_field=["signature_def"])
        response = yield Rpc("GetModelMetadata", request, "GetModelMetadataResponse")
        definitions = message("SignatureDefMap").FromString(response.metadata["signature_def"].value)
        return json_format.MessageToDict(
            definitions, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
        )["signature_def"]

    def _types(self, target: Target, signature_name: str) -> Generator[Rpc, Any, dict[str, Any]]:
        key = (target, signature_name)
        types = self._input_types.find(key)
        if types is None:
            signatures = yield from self.metadata(target)
            inputs = signatures.get(signature_name or "serving_default", {}).get("inputs", {})
            types = {name: type_of(info) for name, info in inputs.items()}
            self._input_types.keep(key, types)
        return types


class GrpcTransport:
    """Makes calls and waits for them."""

    def __init__(self, target: str, credentials: grpc.ChannelCredentials | None):
        self._channel = (
            grpc.insecure_channel(target, _UNLIMITED)
            if credentials is None
            else grpc.secure_channel(target, credentials, _UNLIMITED)
        )
        self._methods = _methods(self._channel)

    def send(self, call: Rpc, seconds: float) -> Any:
        with _translated():
            return self._methods(call)(call.request, timeout=seconds)

    def close(self) -> None:
        self._channel.close()


class AsyncGrpcTransport:
    """Makes calls and lets others go on meanwhile."""

    def __init__(self, target: str, credentials: grpc.ChannelCredentials | None):
        self._channel = (
            grpc.aio.insecure_channel(target, _UNLIMITED)
            if credentials is None
            else grpc.aio.secure_channel(target, credentials, _UNLIMITED)
        )
        self._methods = _methods(self._channel)

    async def send(self, call: Rpc, seconds: float) -> Any:
        with _translated():
            return await self._methods(call)(call.request, timeout=seconds)

    async def close(self) -> None:
        await self._channel.close()


def _methods(channel: Any) -> Callable[[Rpc], Any]:
    @functools.cache
    def method(name: str, response: str) -> Any:
        return channel.unary_unary(
            f"/tensorflow.serving.{_SERVICES[name]}/{name}",
            request_serializer=lambda request: request.SerializeToString(),
            response_deserializer=message(response).FromString,
        )

    return lambda call: method(call.method, call.response)


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except grpc.RpcError as error:
        message = error.details() or ""
        if message.startswith("failed to connect"):
            message = f"{message}. Is a server there, and is this its port for gRPC?"
        raise error_of(Code(error.code().value[0]), message) from error


def _spec(target: Target, signature_name: str) -> Any:
    spec = message("ModelSpec")(name=target.model_name, signature_name=signature_name)
    if target.version is not None:
        spec.version.value = target.version
    if target.label is not None:
        spec.version_label = target.label
    return spec


def _tensor(name: str, value: Any, dtype: np.dtype | None) -> np.ndarray:
    strings = dtype is not None and dtype.hasobject
    try:
        array = value if isinstance(value, np.ndarray) else np.asarray(value, object if strings else None)
    except ValueError as error:
        raise ValueError(
            f"`inputs` must be an array, or lists of equal lengths. Received: for {name!r}, {error}"
        ) from None
    if is_numeric(array):
        return fitting(name, array, dtype)
    texts = [each.encode() if isinstance(each, str) else each for each in array.ravel().tolist()]
    if not all(isinstance(text, bytes) for text in texts):
        raise ValueError(
            f"`inputs` must be numbers, truth values, strings or bytes. Received: for {name!r}, {array.dtype}, "
            f"{value!r:.100}"
        )
    array = np.empty(array.shape, object)
    array.flat[:] = texts
    return array


def _input(examples: Any, context: Any) -> Any:
    given = message("Input")()
    if context is None:
        given.example_list.examples.extend(map(_example, examples))
    else:
        given.example_list_with_context.context.CopyFrom(_example(context))
        given.example_list_with_context.examples.extend(map(_example, examples))
    return given


def _example(features: Mapping[str, Any]) -> Any:
    example = message("Example")()
    for name, value in features.items():
        array = np.atleast_1d(np.asarray(value, object if isinstance(value, (str, bytes)) else None))
        feature = example.features.feature[name]
        if array.dtype.kind == "f":
            feature.float_list.value.extend(array.tolist())
        elif array.dtype.kind in "iub":
            feature.int64_list.value.extend(array.astype(np.int64).tolist())
        else:
            feature.bytes_list.value.extend(each.encode() if isinstance(each, str) else each for each in array.tolist())
    return example
