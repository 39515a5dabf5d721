"""The embedded server put together: repository, prediction service and protocols, started and stopped as one."""

import asyncio
import gc
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import grpc
import uvloop

from keras_bn_serving.config.models import ModelConfig
from keras_bn_serving.engine.batching import Batcher
from keras_bn_serving.engine.grouping import BatchingOptions
from keras_bn_serving.engine.loading import Loader
from keras_bn_serving.engine.machine import usable_memory
from keras_bn_serving.engine.memory import Memory
from keras_bn_serving.engine.metrics import Metrics
from keras_bn_serving.engine.recurring import Recurring
from keras_bn_serving.engine.repository import ModelRepository
from keras_bn_serving.engine.service import PredictionService
from keras_bn_serving.engine.versions import State
from keras_bn_serving.errors import NotFoundError, ServingError, UnavailableError
from keras_bn_serving.rest.application import Application, RestLimits
from keras_bn_serving.rest.hosting import HttpServer
from keras_bn_serving.rest.server import RestOptions, RestServer
from keras_bn_serving.rpc.server import GrpcServer
from keras_bn_serving.rpc.services import GrpcServices

_log = logging.getLogger(__name__)
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_LOOK_SECONDS = 0.1


@dataclass(frozen=True)
class ServerOptions:
    """How the server runs, beside which models it serves.

    Attributes:
        rest_socket: Bound, not yet listening; `None` for no REST.
        grpc_addresses: Where gRPC answers: `host:port` with 0 for a free port, or `unix:path`; none for no gRPC.
        grpc_credentials: For encrypted gRPC.
        timeout_seconds: How long an answer over REST may take.
        poll_wait_seconds: How long to wait between looks at the models' folders.
        read_configs: Reads the models again, where they stand in a file.
        config_poll_wait_seconds: How long to wait between looks at that file; 0 looks once.
        allow_labels_for_unavailable: Whether a label may name a version that is not loaded.
        wait_for_models: Whether to wait, before it answers anything, until every model has a version.
        manage_models: Whether callers of gRPC may change what is served.
        drain_seconds: How long all that is under way, over either protocol, may take once the server is told to stop.
        request_memory: How many bytes all requests together may hold.
        batching: How to group requests; `None` never groups.
        loader: How versions are loaded.
        rest: What the REST server offers beside the protocol.
        limits: What one REST request may cost.
    """

    rest_socket: socket.socket | None
    grpc_addresses: tuple[str, ...] = ()
    grpc_credentials: grpc.ServerCredentials | None = None
    timeout_seconds: float = 30.0
    poll_wait_seconds: float = 1.0
    read_configs: Callable[[], list[ModelConfig]] | None = None
    config_poll_wait_seconds: float = 0.0
    allow_labels_for_unavailable: bool = False
    wait_for_models: bool = True
    manage_models: bool = False
    drain_seconds: float = 30.0
    request_memory: int = field(default_factory=lambda: usable_memory() // 2)
    batching: BatchingOptions | None = field(default_factory=BatchingOptions)
    loader: Loader = field(default_factory=Loader)
    rest: RestOptions = field(default_factory=RestOptions)
    limits: RestLimits = field(default_factory=RestLimits)


def serve(configs: list[ModelConfig], options: ServerOptions) -> None:
    """Loads the models, serves them until SIGTERM or SIGINT, finishes what is under way.

    Has to be called in the main thread. If it is told to stop while the models load, the process ends at once.

    Raises:
        ServingError: If a model cannot be served, or a port is taken.
    """
    metrics = Metrics()
    memory = Memory(options.request_memory)
    repository = ModelRepository(
        replace(options.loader, on_warm_up=metrics.warmed_up),
        options.poll_wait_seconds,
        options.allow_labels_for_unavailable,
        metrics.background_failure,
    )
    batcher = Batcher(
        options.batching,
        on_run=lambda servable, rows, waited, ran: metrics.ran(servable.name, rows, waited, ran),
        on_group=lambda servable, rows: metrics.ran_together(servable.name, rows),
    )
    service = PredictionService(repository, batcher)

    def read_metrics() -> bytes:
        states = [(name, version, state) for name in repository.names() for version, state, _ in repository.known(name)]
        return metrics.text(batcher.waiting(), memory.held, states)

    loop = uvloop.new_event_loop()
    rest = RestServer(service, metrics, memory, read_metrics, options.rest, options.timeout_seconds, loop)
    services = GrpcServices(service, metrics, memory, loop, options.manage_models)
    follower = _follower(configs, repository, options, metrics)
    told = threading.Event()
    # Where it is process 1 of a container, what has no handler is not even heard.
    before = {number: signal.signal(number, lambda *_: told.set()) for number in _SIGNALS}
    until: float | None = None
    try:
        _load_models(repository, configs, options, told)
        if follower is not None:
            follower.start()
        # What is loaded stays: looking through TensorFlow's millions of objects for garbage stops every request.
        gc.collect()
        gc.freeze()
        application = Application(rest, memory, options.limits)
        until = loop.run_until_complete(_serve_until_told(application, services, service, options, told))
    finally:
        until = time.monotonic() + options.drain_seconds if until is None else until
        for number, handler in before.items():
            signal.signal(number, handler)
        options.loader.stopping.set()
        if follower is not None:
            follower.stop(0)
        loop.close()
        rest.close()
        services.close()
        batcher.close(max(0.0, until - time.monotonic()))
        repository.close(max(0.0, until - time.monotonic()))


def _load_models(
    repository: ModelRepository, configs: list[ModelConfig], options: ServerOptions, told: threading.Event
) -> None:
    """Loads on a thread of its own: TensorFlow would keep this one from hearing signals."""
    errors: list[BaseException] = []

    def load() -> None:
        missing = ""
        while not told.is_set():
            try:
                repository.start(configs)
            except NotFoundError as error:
                if options.wait_for_models:
                    if error.message != missing:
                        _log.warning("waiting: %s (--wait_for_models=false gives up instead)", error.message)
                    missing = error.message
                    told.wait(options.poll_wait_seconds or 1.0)
                    continue
                errors.append(error)
            except BaseException as error:
                errors.append(error)
            return

    thread = threading.Thread(target=load, name="load-models", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(_LOOK_SECONDS)
        if told.is_set():
            print("Stopped while the models were loading", flush=True)
            # Python would wait for TensorFlow, which cannot be interrupted. Nothing is under way.
            os._exit(0)
    if errors:
        raise errors[0]


async def _serve_until_told(
    application: Application,
    services: GrpcServices,
    service: PredictionService,
    options: ServerOptions,
    told_before: threading.Event,
) -> float:
    """Returns the time, of `time.monotonic`, by which all has to end."""
    loop = asyncio.get_running_loop()
    told = asyncio.Event()
    for number in _SIGNALS:
        loop.add_signal_handler(number, told.set)
    if told_before.is_set():
        told.set()
    grpc_server = _make_grpc_server(services, service, options)
    http_server = None if options.rest_socket is None else HttpServer(application, options.rest_socket)
    _print_summary(service.repository, options, grpc_server.ports)
    await grpc_server.start()
    if http_server is not None:
        await http_server.start()
    print("Ready", flush=True)
    await told.wait()
    until = time.monotonic() + options.drain_seconds
    _log.info("stopping: no further connections, finishing what is under way")
    stopping = [grpc_server.stop(options.drain_seconds)]
    if http_server is not None:
        stopping.append(http_server.stop(options.drain_seconds))
    await asyncio.gather(*stopping)
    return until


def _make_grpc_server(services: GrpcServices, service: PredictionService, options: ServerOptions) -> GrpcServer:
    try:
        return GrpcServer(services, service, options.grpc_addresses, options.grpc_credentials)
    except RuntimeError as error:
        raise UnavailableError(f"Cannot listen for gRPC on {' and '.join(options.grpc_addresses)}.") from error


def _follower(
    configs: list[ModelConfig], repository: ModelRepository, options: ServerOptions, metrics: Metrics
) -> Recurring | None:
    """What takes over the models' configuration when its file changes, and tries again what was refused."""
    read_configs, wait = options.read_configs, options.config_poll_wait_seconds
    if read_configs is None or not wait:
        return None
    known, refusal = configs, ""

    def follow() -> None:
        nonlocal known, refusal
        try:
            found = read_configs()
            if found != known:
                repository.reconfigure(found, again=False)
                known = found
            refusal = ""
        except ServingError as error:
            if error.message != refusal:  # Once, and not at every look.
                _log.error("the models' configuration has not been taken over: %s", error.message)
            refusal = error.message

    return Recurring("model-configs", wait, follow, metrics.background_failure)


def _print_summary(repository: ModelRepository, options: ServerOptions, ports: Iterable[int]) -> None:
    for name in repository.names():
        versions = [str(number) for number, state, _ in repository.status(name) if state is State.AVAILABLE]
        print(f"Serving {name}, version {', '.join(versions)}")
    if options.rest_socket is not None:
        host, port = options.rest_socket.getsockname()[:2]
        print(f"REST at http://{f'[{host}]' if ':' in host else host}:{port}")
    scheme = "grpc" if options.grpc_credentials is None else "grpcs"
    for address, chosen in zip(options.grpc_addresses, ports, strict=True):
        place = address if address.startswith("unix:") else f"{scheme}://{address.rpartition(':')[0]}:{chosen}"
        print(f"gRPC at {place}")
