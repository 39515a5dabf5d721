"""TensorFlow Serving's gRPC services on top of the prediction service."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from google.protobuf import any_pb2
from google.protobuf.message import DecodeError
from tensorflow_serving.apis import (
    classification_pb2,
    get_model_metadata_pb2,
    get_model_status_pb2,
    inference_pb2,
    model_management_pb2,
    model_pb2,
    predict_pb2,
    regression_pb2,
)

from keras_bn_serving import request_ids
from keras_bn_serving.codec.tensor_proto import write_array
from keras_bn_serving.config.files import model_configs
from keras_bn_serving.engine.arrivals import Arrivals
from keras_bn_serving.engine.background import Background
from keras_bn_serving.engine.batching import Task
from keras_bn_serving.engine.examples import CLASSIFY
from keras_bn_serving.engine.memory import BusyError, Memory, Share, size_of
from keras_bn_serving.engine.metrics import Metrics
from keras_bn_serving.engine.repository import Lease
from keras_bn_serving.engine.servable import DEFAULT_SIGNATURE
from keras_bn_serving.engine.service import ModelSpec, PredictionService
from keras_bn_serving.errors import (
    NO_MEMORY,
    Code,
    InvalidArgumentError,
    PermissionDeniedError,
    ServingError,
)
from keras_bn_serving.rpc.messages import (
    answered_by,
    check_model_spec,
    classification,
    details,
    model_spec,
    regression,
)
from keras_bn_serving.rpc.requests import check_tasks, decode_inputs

_log = logging.getLogger(__name__)
_STATUS = {code.value[0]: code for code in grpc.StatusCode}
_SIGNATURE_FIELD = "signature_def"
# A message takes about as much again when it is read, and its arrays as much once more.
_MESSAGE_COST = 3
# Larger ones are read and written on another thread.
_AT_ONCE_BYTES = 256 * 1024
_NUM_THREADS = 4
_COUNTED = ("Predict", "Classify", "Regress")


# Answers a request; is given the share of memory that the call holds.
_Behaviour = Callable[[Any, Share], Awaitable[Any]]


class GrpcServices:
    """TensorFlow Serving's services. Every call is a task of the event loop; one that is cancelled lets go of all.

    Args:
        service: What answers.
        metrics: What counts.
        memory: What requests may hold.
        loop: Where the calls run.
        manage_models: Whether callers may change what is served.
    """

    def __init__(
        self,
        service: PredictionService,
        metrics: Metrics,
        memory: Memory,
        loop: asyncio.AbstractEventLoop,
        manage_models: bool = False,
    ):
        self._service = service
        self._metrics = metrics
        self._memory = memory
        self._loop = loop
        self._manage_models = manage_models
        self._arrivals = Arrivals(loop)
        self._background = Background(_NUM_THREADS, "grpc")
        # Loading a model takes as long as it takes; predictions do not wait for it.
        self._management = Background(1, "grpc-manage")

    def handlers(self) -> list[grpc.GenericRpcHandler]:
        """Returns what a gRPC server hands calls to."""
        prediction: dict[str, tuple[Any, _Behaviour]] = {
            "Predict": (predict_pb2.PredictRequest, self._predict),
            "Classify": (classification_pb2.ClassificationRequest, self._classify),
            "Regress": (regression_pb2.RegressionRequest, self._regress),
            "MultiInference": (inference_pb2.MultiInferenceRequest, self._multi_inference),
            "GetModelMetadata": (get_model_metadata_pb2.GetModelMetadataRequest, self._metadata),
        }
        models: dict[str, tuple[Any, _Behaviour]] = {
            "GetModelStatus": (get_model_status_pb2.GetModelStatusRequest, self._status),
            "HandleReloadConfigRequest": (model_management_pb2.ReloadConfigRequest, self._reload),
        }
        return [
            grpc.method_handlers_generic_handler(
                f"tensorflow.serving.{name}",
                {
                    method: grpc.unary_unary_rpc_method_handler(self._handler(method, kind, behaviour))
                    for method, (kind, behaviour) in methods.items()
                },
            )
            for name, methods in (("PredictionService", prediction), ("ModelService", models))
        ]

    def close(self) -> None:
        """Frees the threads."""
        self._background.close()
        self._management.close()

    def _handler(self, method: str, kind: Any, behaviour: _Behaviour) -> Callable[[bytes, Any], Awaitable[bytes]]:
        async def handle(data: bytes, context: grpc.aio.ServicerContext) -> bytes:
            started = time.perf_counter()
            name, message, code = "", "", Code.OK
            given = [value for key, value in context.invocation_metadata() or () if key == request_ids.HEADER]
            request_id = request_ids.begin(str(given[-1]) if given else "")
            context.set_trailing_metadata(((request_ids.HEADER, request_id),))
            try:
                with self._memory.share() as share:
                    share.hold(_MESSAGE_COST * len(data))
                    request = await self._either(len(data), lambda: kind.FromString(data))
                    name = request.model_spec.name if method in _COUNTED else ""
                    response = await behaviour(request, share)
                    return await self._either(response.ByteSize(), response.SerializeToString)
            except BusyError as error:
                message, code = error.message, Code.RESOURCE_EXHAUSTED
            except ServingError as error:
                message, code = error.message, error.code
            except DecodeError:
                message, code = "The request is not a message of its kind.", Code.INTERNAL
            except MemoryError:
                message, code = NO_MEMORY, Code.RESOURCE_EXHAUSTED
            except asyncio.CancelledError:
                code = Code.CANCELLED
                raise
            except Exception:
                _log.exception("a gRPC call failed")
                message, code = "Internal error", Code.INTERNAL
            finally:
                if method in _COUNTED:
                    self._metrics.request(name, method, "GRPC", code.name, time.perf_counter() - started)
            await context.abort(_STATUS[int(code)], details(message))
            raise AssertionError("gRPC goes on after an abort")

        return handle

    async def _either(self, size: int, work: Callable[[], Any]) -> Any:
        """Does what grows with a message on another thread where the message is large."""
        if size <= _AT_ONCE_BYTES:
            return work()
        _, done = self._background.start(lambda _: work())
        return await done

    def _lease(self, spec: model_pb2.ModelSpec) -> Lease:
        if not spec.name:
            raise InvalidArgumentError("ModelSpec has no name specified.")
        return self._service.lease(model_spec(spec))

    async def _run(self, lease: Lease, start: Callable[[Callable[[Any], None]], Task]) -> Any:
        try:
            arrival = self._arrivals.expect()
            task = start(arrival.finish)
        except BaseException:
            lease.release()
            raise
        # A deadline is the caller's to set, and gRPC's to watch: it cancels this.
        return await arrival.result(None, task.cancel)

    async def _predict(self, request: predict_pb2.PredictRequest, share: Share) -> predict_pb2.PredictResponse:
        check_model_spec(request)
        lease = self._lease(request.model_spec)
        name = request.model_spec.signature_name
        try:
            signature = lease.servable.signature(name)
            definition = lease.servable.meta_graph.signature_def[signature.name]
            inputs = await self._either(request.ByteSize(), lambda: decode_inputs(definition, request))
            share.hold(share.held + size_of(inputs))
        except BaseException:
            lease.release()
            raise
        outputs = await self._run(
            lease,
            lambda finish: self._service.predict(
                lease, name, inputs, finish, request.output_filter, self._loop.call_soon
            ),
        )
        size = size_of(outputs)
        share.hold(share.held + _MESSAGE_COST * size)

        def encode() -> predict_pb2.PredictResponse:
            response = predict_pb2.PredictResponse(model_spec=answered_by(lease, name or DEFAULT_SIGNATURE))
            for key, value in outputs.items():
                write_array(response.outputs[key], value)
            return response

        return await self._either(size, encode)

    async def _classify(
        self, request: classification_pb2.ClassificationRequest, share: Share
    ) -> classification_pb2.ClassificationResponse:
        check_model_spec(request)
        lease = self._lease(request.model_spec)
        name = request.model_spec.signature_name
        classes = await self._run(lease, lambda finish: self._service.classify(lease, name, request.input, finish))
        return classification_pb2.ClassificationResponse(
            model_spec=answered_by(lease, name or DEFAULT_SIGNATURE), result=classification(classes)
        )

    async def _regress(
        self, request: regression_pb2.RegressionRequest, share: Share
    ) -> regression_pb2.RegressionResponse:
        check_model_spec(request)
        lease = self._lease(request.model_spec)
        name = request.model_spec.signature_name
        numbers = await self._run(lease, lambda finish: self._service.regress(lease, name, request.input, finish))
        return regression_pb2.RegressionResponse(
            model_spec=answered_by(lease, name or DEFAULT_SIGNATURE), result=regression(numbers)
        )

    async def _multi_inference(
        self, request: inference_pb2.MultiInferenceRequest, share: Share
    ) -> inference_pb2.MultiInferenceResponse:
        if not request.tasks or not request.tasks[0].HasField("model_spec"):
            raise InvalidArgumentError("ModelSpec has no name specified.")
        response = inference_pb2.MultiInferenceResponse()
        # Whatever version the other tasks name, the first one's answers all.
        with self._lease(request.tasks[0].model_spec) as first:
            check_tasks(request.tasks, first)
            for task in request.tasks:
                lease = self._service.lease(ModelSpec(first.model_name, first.version))
                signature = task.model_spec.signature_name or DEFAULT_SIGNATURE
                result = response.results.add(model_spec=answered_by(lease, signature))
                run = self._service.classify if task.method_name == CLASSIFY else self._service.regress

                def start(finish: Any, run: Any = run, lease: Lease = lease, signature: str = signature) -> Task:
                    return run(lease, signature, request.input, finish)

                answer = await self._run(lease, start)
                if task.method_name == CLASSIFY:
                    result.classification_result.CopyFrom(classification(answer))
                else:
                    result.regression_result.CopyFrom(regression(answer))
        return response

    async def _metadata(
        self, request: get_model_metadata_pb2.GetModelMetadataRequest, share: Share
    ) -> get_model_metadata_pb2.GetModelMetadataResponse:
        check_model_spec(request)
        if not request.metadata_field:
            raise InvalidArgumentError("GetModelMetadataRequest must specify at least one metadata_field")
        for field in request.metadata_field:
            if field != _SIGNATURE_FIELD:
                raise InvalidArgumentError(f"Metadata field {field} is not supported")
        with self._lease(request.model_spec) as lease:
            definitions = get_model_metadata_pb2.SignatureDefMap(
                signature_def=dict(lease.servable.meta_graph.signature_def)
            )
            packed = any_pb2.Any()
            packed.Pack(definitions)
            return get_model_metadata_pb2.GetModelMetadataResponse(
                model_spec=answered_by(lease, ""), metadata={_SIGNATURE_FIELD: packed}
            )

    async def _status(
        self, request: get_model_status_pb2.GetModelStatusRequest, share: Share
    ) -> get_model_status_pb2.GetModelStatusResponse:
        check_model_spec(request)
        response = get_model_status_pb2.GetModelStatusResponse()
        for version, state, error in self._service.status(model_spec(request.model_spec)):
            one = response.model_version_status.add(version=version, state=int(state))
            one.status.error_code = int(error.code) if error else 0
            one.status.error_message = error.message if error else ""
        return response

    async def _reload(
        self, request: model_management_pb2.ReloadConfigRequest, share: Share
    ) -> model_management_pb2.ReloadConfigResponse:
        if not self._manage_models:
            raise PermissionDeniedError(
                "What is served cannot be changed over the network; start the server with --enable_model_management."
            )
        if request.config.WhichOneof("config") != "model_config_list":
            raise InvalidArgumentError(
                "ServerModelConfig type not supported by HandleReloadConfigRequest. Only ModelConfigList is currently "
                "supported"
            )
        repository = self._service.repository
        configs = model_configs(request.config, "ReloadConfigRequest", served=repository.names())
        _, reconfigured = self._management.start(lambda _: repository.reconfigure(configs))
        await reconfigured
        response = model_management_pb2.ReloadConfigResponse()
        # The status is there even where it says nothing but OK.
        response.status.SetInParent()
        return response
