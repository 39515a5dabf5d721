"""TensorFlow Serving's gRPC services, health checking and reflection on top of the prediction service."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from google.protobuf import any_pb2
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
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

from keras_bn_serving.codec.tensor_proto import from_array
from keras_bn_serving.config.files import model_configs
from keras_bn_serving.engine.arrivals import Arrivals
from keras_bn_serving.engine.batching import Task
from keras_bn_serving.engine.examples import CLASSIFY, REGRESS, check_classify, check_regress
from keras_bn_serving.engine.memory import BUSY, Memory, Share, size_of
from keras_bn_serving.engine.metrics import Metrics
from keras_bn_serving.engine.repository import Lease, State
from keras_bn_serving.engine.servable import DEFAULT_SIGNATURE
from keras_bn_serving.engine.service import ModelSpec, PredictionService
from keras_bn_serving.errors import (
    NO_MEMORY,
    Code,
    InvalidArgumentError,
    PermissionDeniedError,
    ServingError,
    UnavailableError,
    UnimplementedError,
)
from keras_bn_serving.rpc.descriptions import described_services
from keras_bn_serving.rpc.messages import (
    answered_by,
    check_model_spec,
    classification,
    details,
    model_spec,
    regression,
)
from keras_bn_serving.rpc.requests import decode_inputs

_log = logging.getLogger(__name__)
_STATUS = {code.value[0]: code for code in grpc.StatusCode}
_SIGNATURE_FIELD = "signature_def"
_MOST_MESSAGE_BYTES = 256 * 1024 * 1024
_MOST_CALLS = 1000
# A message takes about as much again when it is read, and its arrays as much once more.
_MESSAGE_COST = 3
# Larger ones are read and written on another thread.
_AT_ONCE_BYTES = 256 * 1024
_HEALTH_SECONDS = 0.5
_COUNTED = ("Predict", "Classify", "Regress")


# Reads a request, answers it, and says how much memory the arrays of either take.
_Behaviour = Callable[[Any, "_Call"], Awaitable[Any]]


class _Call:
    """One call under way.

    Attributes:
        context: gRPC's.
        share: The memory that it holds.
    """

    def __init__(self, context: grpc.aio.ServicerContext, share: Share):
        self.context = context
        self.share = share


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
        manage_models: bool = True,
    ):
        self._service = service
        self._metrics = metrics
        self._memory = memory
        self._loop = loop
        self._manage_models = manage_models
        self._arrivals = Arrivals(loop)
        self._workers = ThreadPoolExecutor(4, thread_name_prefix="grpc")
        # Loading a model takes as long as it takes; predictions do not wait for it.
        self._managers = ThreadPoolExecutor(1, thread_name_prefix="grpc-manage")

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
        self._workers.shutdown(wait=False, cancel_futures=True)
        self._managers.shutdown(wait=False, cancel_futures=True)

    def _handler(self, method: str, kind: Any, behaviour: _Behaviour) -> Callable[[bytes, Any], Awaitable[bytes]]:
        async def handle(data: bytes, context: grpc.aio.ServicerContext) -> bytes:
            started = time.perf_counter()
            name, message, code = "", "", Code.OK
            try:
                with self._memory.share() as share:
                    share.hold(_MESSAGE_COST * len(data))
                    request = await self._either(len(data), lambda: kind.FromString(data))
                    name = request.model_spec.name if method in _COUNTED else ""
                    response = await behaviour(request, _Call(context, share))
                    return await self._either(response.ByteSize(), response.SerializeToString)
            except ServingError as error:
                message, code = error.message, error.code
                if isinstance(error, UnavailableError) and error.message == BUSY:
                    code = Code.RESOURCE_EXHAUSTED
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
        return await self._loop.run_in_executor(self._workers, work)

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

    async def _predict(self, request: predict_pb2.PredictRequest, call: _Call) -> predict_pb2.PredictResponse:
        check_model_spec(request)
        lease = self._lease(request.model_spec)
        name = request.model_spec.signature_name
        try:
            signature = lease.servable.signature(name)
            definition = lease.servable.meta_graph.signature_def[signature.name]
            inputs = await self._either(request.ByteSize(), lambda: decode_inputs(definition, request))
            call.share.hold(call.share.held + size_of(inputs))
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
        call.share.hold(call.share.held + _MESSAGE_COST * size)

        def encode() -> predict_pb2.PredictResponse:
            return predict_pb2.PredictResponse(
                model_spec=answered_by(lease, name or DEFAULT_SIGNATURE),
                outputs={key: from_array(value) for key, value in outputs.items()},
            )

        return await self._either(size, encode)

    async def _classify(
        self, request: classification_pb2.ClassificationRequest, call: _Call
    ) -> classification_pb2.ClassificationResponse:
        check_model_spec(request)
        lease = self._lease(request.model_spec)
        name = request.model_spec.signature_name
        classes = await self._run(lease, lambda finish: self._service.classify(lease, name, request.input, finish))
        return classification_pb2.ClassificationResponse(
            model_spec=answered_by(lease, name or DEFAULT_SIGNATURE), result=classification(classes)
        )

    async def _regress(
        self, request: regression_pb2.RegressionRequest, call: _Call
    ) -> regression_pb2.RegressionResponse:
        check_model_spec(request)
        lease = self._lease(request.model_spec)
        name = request.model_spec.signature_name
        numbers = await self._run(lease, lambda finish: self._service.regress(lease, name, request.input, finish))
        return regression_pb2.RegressionResponse(
            model_spec=answered_by(lease, name or DEFAULT_SIGNATURE), result=regression(numbers)
        )

    async def _multi_inference(
        self, request: inference_pb2.MultiInferenceRequest, call: _Call
    ) -> inference_pb2.MultiInferenceResponse:
        if not request.tasks or not request.tasks[0].HasField("model_spec"):
            raise InvalidArgumentError("ModelSpec has no name specified.")
        response = inference_pb2.MultiInferenceResponse()
        # Whatever version the other tasks name, the first one's answers all.
        with self._lease(request.tasks[0].model_spec) as first:
            self._check_tasks(request.tasks, first)
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

    def _check_tasks(self, tasks: Iterable[inference_pb2.InferenceTask], lease: Lease) -> None:
        signatures: set[str] = set()
        for task in tasks:
            if not task.model_spec.name:
                raise InvalidArgumentError("Found ModelSpec with an empty model name.")
            if task.model_spec.name != lease.model_name:
                raise InvalidArgumentError("All ModelSpecs in a MultiInferenceRequest must access the same model name.")
            signature = task.model_spec.signature_name or DEFAULT_SIGNATURE
            if signature in signatures:
                raise InvalidArgumentError(f"Duplicate evaluation of signature: {signature}")
            signatures.add(signature)
            if signature not in lease.servable.signatures:
                raise InvalidArgumentError(f"Requested signature not found in model graph: {signature}")
            if task.method_name not in (CLASSIFY, REGRESS):
                raise UnimplementedError(f"Unsupported signature method_name: {task.method_name}")
            check = check_classify if task.method_name == CLASSIFY else check_regress
            check(lease.servable.meta_graph.signature_def[signature])

    async def _metadata(
        self, request: get_model_metadata_pb2.GetModelMetadataRequest, call: _Call
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
        self, request: get_model_status_pb2.GetModelStatusRequest, call: _Call
    ) -> get_model_status_pb2.GetModelStatusResponse:
        check_model_spec(request)
        response = get_model_status_pb2.GetModelStatusResponse()
        for version, state, error in self._service.status(model_spec(request.model_spec)):
            one = response.model_version_status.add(version=version, state=int(state))
            one.status.error_code = int(error.code) if error else 0
            one.status.error_message = error.message if error else ""
        return response

    async def _reload(
        self, request: model_management_pb2.ReloadConfigRequest, call: _Call
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
        await self._loop.run_in_executor(self._managers, repository.reconfigure, configs)
        response = model_management_pb2.ReloadConfigResponse()
        # The status is there even where it says nothing but OK.
        response.status.SetInParent()
        return response


class GrpcServer:
    """A gRPC server of the services, of their health, model by model, and of their descriptions.

    Has to be made on a running event loop.

    Args:
        services: The services.
        service: What knows the models.
        addresses: `host:port`, port 0 for a free one, or `unix:path`.
        credentials: For an encrypted connection.

    Raises:
        RuntimeError: If an address cannot be bound.
    """

    def __init__(
        self,
        services: GrpcServices,
        service: PredictionService,
        addresses: Iterable[str],
        credentials: grpc.ServerCredentials | None = None,
    ):
        self._service = service
        self._server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", _MOST_MESSAGE_BYTES),
                ("grpc.max_send_message_length", -1),
                ("grpc.so_reuseport", 0),
            ],
            maximum_concurrent_rpcs=_MOST_CALLS,
        )
        self._server.add_generic_rpc_handlers(services.handlers())
        names = described_services()
        self._names = ["", *names]
        self._checks = health.aio.HealthServicer()
        self._watching: asyncio.Task[None] | None = None
        health_pb2_grpc.add_HealthServicer_to_server(self._checks, self._server)
        reflection.enable_server_reflection([*names, health.SERVICE_NAME, reflection.SERVICE_NAME], self._server)
        self.ports = [
            self._server.add_insecure_port(address)
            if credentials is None
            else self._server.add_secure_port(address, credentials)
            for address in addresses
        ]

    async def start(self) -> None:
        """Begins to answer."""
        await self._tell_health()
        self._watching = asyncio.ensure_future(self._watch_health())
        await self._server.start()

    async def stop(self, seconds: float) -> None:
        """Says that it is not serving, takes nothing new, and finishes what is under way within `seconds`."""
        if self._watching is not None:
            self._watching.cancel()
        await self._checks.enter_graceful_shutdown()
        await self._server.stop(seconds)

    async def _watch_health(self) -> None:
        while True:
            await asyncio.sleep(_HEALTH_SECONDS)
            try:
                await self._tell_health()
            except Exception:
                _log.exception("health could not be told")

    async def _tell_health(self) -> None:
        repository = self._service.repository
        ready = {
            name: any(state is State.AVAILABLE for _, state, _ in repository.known(name)) for name in repository.names()
        }
        everything = dict.fromkeys(self._names, all(ready.values()))
        for name, well in (everything | ready).items():
            status = health_pb2.HealthCheckResponse
            await self._checks.set(name, status.SERVING if well else status.NOT_SERVING)
