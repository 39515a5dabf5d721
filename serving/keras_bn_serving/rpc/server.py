"""TensorFlow Serving's gRPC services, health checking and reflection on top of the prediction service."""

import functools
import logging
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any

import grpc
from google.protobuf import any_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from tensorflow_serving.apis import (
    classification_pb2,
    get_model_metadata_pb2,
    get_model_status_pb2,
    inference_pb2,
    model_management_pb2,
    model_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_service_pb2_grpc,
    regression_pb2,
)

from keras_bn_serving.codec.tensor_proto import from_array
from keras_bn_serving.config.files import model_configs
from keras_bn_serving.engine.arrivals import settle
from keras_bn_serving.engine.batching import Finish, Task
from keras_bn_serving.engine.examples import CLASSIFY, REGRESS, check_classify, check_regress
from keras_bn_serving.engine.metrics import Metrics
from keras_bn_serving.engine.repository import Lease
from keras_bn_serving.engine.servable import DEFAULT_SIGNATURE
from keras_bn_serving.engine.service import ModelSpec, PredictionService
from keras_bn_serving.errors import NO_MEMORY, Code, InvalidArgumentError, ServingError, UnimplementedError
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


class _Servicer:
    """What the services share: how a call ends."""

    def __init__(self, service: PredictionService, metrics: Metrics, timeout_seconds: float):
        self._service = service
        self._metrics = metrics
        self._timeout_seconds = timeout_seconds

    def _answer(self, context: grpc.ServicerContext, make: Callable[[], Any], name: str = "", api: str = "") -> Any:
        started = time.perf_counter()
        message, code = "", Code.OK
        try:
            return make()
        except ServingError as error:
            message, code = error.message, error.code
        except FutureTimeoutError:
            message, code = "The request took too long.", Code.DEADLINE_EXCEEDED
        except MemoryError:
            message, code = NO_MEMORY, Code.RESOURCE_EXHAUSTED
        except Exception:
            _log.exception("a gRPC call failed")
            message, code = "Internal error", Code.INTERNAL
        finally:
            if api:
                self._metrics.request(name, api, "GRPC", code.name, time.perf_counter() - started)
        context.abort(_STATUS[int(code)], details(message))

    def _lease(self, spec: model_pb2.ModelSpec) -> Lease:
        if not spec.name:
            raise InvalidArgumentError("ModelSpec has no name specified.")
        return self._service.lease(model_spec(spec))

    def _await(
        self, context: grpc.ServicerContext, lease: Lease, start: Callable[[Callable[[Any], None]], Task]
    ) -> Any:
        future: Future[Any] = Future()
        try:
            task = start(functools.partial(settle, future))
        except BaseException:
            lease.release()
            raise
        left = context.time_remaining()
        try:
            return future.result(self._timeout_seconds if left is None else min(left, self._timeout_seconds))
        finally:
            task.cancel()


class _PredictionServicer(_Servicer, prediction_service_pb2_grpc.PredictionServiceServicer):
    def Predict(self, request: predict_pb2.PredictRequest, context: grpc.ServicerContext) -> Any:
        return self._answer(context, lambda: self._predict(request, context), request.model_spec.name, "Predict")

    def Classify(self, request: classification_pb2.ClassificationRequest, context: grpc.ServicerContext) -> Any:
        return self._answer(context, lambda: self._classify(request, context), request.model_spec.name, "Classify")

    def Regress(self, request: regression_pb2.RegressionRequest, context: grpc.ServicerContext) -> Any:
        return self._answer(context, lambda: self._regress(request, context), request.model_spec.name, "Regress")

    def MultiInference(self, request: inference_pb2.MultiInferenceRequest, context: grpc.ServicerContext) -> Any:
        return self._answer(context, lambda: self._multi_inference(request, context))

    def GetModelMetadata(
        self, request: get_model_metadata_pb2.GetModelMetadataRequest, context: grpc.ServicerContext
    ) -> Any:
        return self._answer(context, lambda: self._metadata(request))

    def _predict(
        self, request: predict_pb2.PredictRequest, context: grpc.ServicerContext
    ) -> predict_pb2.PredictResponse:
        check_model_spec(request)
        lease = self._lease(request.model_spec)
        name = request.model_spec.signature_name

        def start(finish: Finish) -> Task:
            signature = lease.servable.signature(name)
            inputs = decode_inputs(lease.servable.meta_graph.signature_def[signature.name], request)
            return self._service.predict(lease, name, inputs, finish, request.output_filter)

        outputs = self._await(context, lease, start)
        return predict_pb2.PredictResponse(
            model_spec=answered_by(lease, name or DEFAULT_SIGNATURE),
            outputs={key: from_array(value) for key, value in outputs.items()},
        )

    def _classify(
        self, request: classification_pb2.ClassificationRequest, context: grpc.ServicerContext
    ) -> classification_pb2.ClassificationResponse:
        check_model_spec(request)
        lease = self._lease(request.model_spec)
        name = request.model_spec.signature_name
        classes = self._await(context, lease, lambda finish: self._service.classify(lease, name, request.input, finish))
        return classification_pb2.ClassificationResponse(
            model_spec=answered_by(lease, name or DEFAULT_SIGNATURE), result=classification(classes)
        )

    def _regress(
        self, request: regression_pb2.RegressionRequest, context: grpc.ServicerContext
    ) -> regression_pb2.RegressionResponse:
        check_model_spec(request)
        lease = self._lease(request.model_spec)
        name = request.model_spec.signature_name
        numbers = self._await(context, lease, lambda finish: self._service.regress(lease, name, request.input, finish))
        return regression_pb2.RegressionResponse(
            model_spec=answered_by(lease, name or DEFAULT_SIGNATURE), result=regression(numbers)
        )

    def _multi_inference(
        self, request: inference_pb2.MultiInferenceRequest, context: grpc.ServicerContext
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

                answer = self._await(context, lease, start)
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

    def _metadata(
        self, request: get_model_metadata_pb2.GetModelMetadataRequest
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


class _ModelServicer(_Servicer, model_service_pb2_grpc.ModelServiceServicer):
    def GetModelStatus(self, request: get_model_status_pb2.GetModelStatusRequest, context: grpc.ServicerContext) -> Any:
        return self._answer(context, lambda: self._status(request))

    def HandleReloadConfigRequest(
        self, request: model_management_pb2.ReloadConfigRequest, context: grpc.ServicerContext
    ) -> Any:
        return self._answer(context, lambda: self._reload(request))

    def _status(
        self, request: get_model_status_pb2.GetModelStatusRequest
    ) -> get_model_status_pb2.GetModelStatusResponse:
        check_model_spec(request)
        response = get_model_status_pb2.GetModelStatusResponse()
        for version, state, error in self._service.status(model_spec(request.model_spec)):
            one = response.model_version_status.add(version=version, state=int(state))
            one.status.error_code = int(error.code) if error else 0
            one.status.error_message = error.message if error else ""
        return response

    def _reload(self, request: model_management_pb2.ReloadConfigRequest) -> model_management_pb2.ReloadConfigResponse:
        if request.config.WhichOneof("config") != "model_config_list":
            raise InvalidArgumentError(
                "ServerModelConfig type not supported by HandleReloadConfigRequest. Only ModelConfigList is currently "
                "supported"
            )
        repository = self._service.repository
        repository.reconfigure(model_configs(request.config, "ReloadConfigRequest", served=repository.names()))
        response = model_management_pb2.ReloadConfigResponse()
        # The status is there even where it says nothing but OK.
        response.status.SetInParent()
        return response


def make_server(
    service: PredictionService,
    metrics: Metrics,
    addresses: Iterable[str],
    timeout_seconds: float,
    credentials: grpc.ServerCredentials | None = None,
    num_threads: int = 64,
    message_bytes: int = 256 * 1024 * 1024,
) -> tuple[grpc.Server, list[int]]:
    """Makes a gRPC server that is bound and not started.

    Args:
        service: What answers.
        metrics: What counts.
        addresses: `host:port`, port 0 for a free one, or `unix:path`.
        timeout_seconds: How long an answer may take where the caller sets no deadline.
        credentials: For an encrypted connection.
        num_threads: How many calls to hold at a time.
        message_bytes: How large a request may be.

    Returns:
        The server and the port of each address.

    Raises:
        RuntimeError: If an address cannot be bound.
    """
    server = grpc.server(
        ThreadPoolExecutor(num_threads, thread_name_prefix="grpc"),
        options=[
            ("grpc.max_receive_message_length", message_bytes),
            ("grpc.max_send_message_length", -1),
            ("grpc.so_reuseport", 0),
        ],
    )
    prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(
        _PredictionServicer(service, metrics, timeout_seconds), server
    )
    model_service_pb2_grpc.add_ModelServiceServicer_to_server(_ModelServicer(service, metrics, timeout_seconds), server)
    names = described_services()
    checks = health.HealthServicer()
    for name in ("", *names):
        checks.set(name, health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    reflection.enable_server_reflection([*names, health.SERVICE_NAME, reflection.SERVICE_NAME], server)
    ports = [
        server.add_insecure_port(address) if credentials is None else server.add_secure_port(address, credentials)
        for address in addresses
    ]
    return server, ports
