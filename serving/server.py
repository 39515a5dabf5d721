"""The embedded server put together: repository, prediction service and protocols, started and stopped as one."""

import asyncio
import logging
import signal
import socket
from dataclasses import dataclass, field

import uvloop

from serving.http_protocol import HttpConnection, HttpLimits, HttpService
from serving.model_config import ModelConfig
from serving.model_repository import ModelRepository, State
from serving.prediction_service import PredictionService
from serving.rest_server import RestServer
from serving.servable import LoadOptions, Servable

_log = logging.getLogger(__name__)
_BACKLOG = 1024


@dataclass(frozen=True)
class ServerOptions:
    """How the server runs, beside which models it serves.

    Attributes:
        rest_socket: Bound, not yet listening.
        rest_timeout_seconds: How long an answer over REST may take.
        poll_wait_seconds: How long to wait between looks at the models' folders.
        allow_labels_for_unavailable: Whether a label may name a version that is not loaded.
        drain_seconds: How long requests under way may take once the server is told to stop.
        load: How TensorFlow runs the models.
        limits: What one HTTP connection may cost.
    """

    rest_socket: socket.socket
    rest_timeout_seconds: float = 30.0
    poll_wait_seconds: float = 1.0
    allow_labels_for_unavailable: bool = False
    drain_seconds: float = 30.0
    load: LoadOptions = field(default_factory=LoadOptions)
    limits: HttpLimits = field(default_factory=HttpLimits)


def serve(configs: list[ModelConfig], options: ServerOptions) -> None:
    """Loads the models, serves them until SIGTERM or SIGINT, finishes what is under way.

    Raises:
        ServingError: If a model cannot be served.
        OSError: If the port is taken.
    """
    repository = ModelRepository(
        lambda name, version, path: Servable(path, options.load),
        options.poll_wait_seconds,
        options.allow_labels_for_unavailable,
    )
    repository.start(configs)
    service = PredictionService(repository)
    rest = RestServer(service, options.rest_timeout_seconds)
    try:
        loop = uvloop.new_event_loop()
        loop.run_until_complete(_serve_until_told(rest, repository, options))
        loop.close()
    finally:
        rest.close()
        service.close()
        repository.close()


async def _serve_until_told(rest: RestServer, repository: ModelRepository, options: ServerOptions) -> None:
    loop = asyncio.get_running_loop()
    told = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told.set)
    http = HttpService(rest.handle, rest.refuse, options.limits)
    server = await loop.create_server(lambda: HttpConnection(http, loop), sock=options.rest_socket, backlog=_BACKLOG)
    _print_summary(repository, options.rest_socket)
    await told.wait()
    _log.info("stopping: no further connections, finishing what is under way")
    http.closing = True
    server.close()
    for connection in list(http.connections):
        connection.shut_down()
    deadline = loop.time() + options.drain_seconds
    while http.connections and loop.time() < deadline:
        await asyncio.sleep(0.02)
    if http.connections:
        _log.warning("%d connections were cut off after %g s", len(http.connections), options.drain_seconds)


def _print_summary(repository: ModelRepository, rest_socket: socket.socket) -> None:
    host, port = rest_socket.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    for name in repository.names():
        versions = [str(number) for number, state, _ in repository.status(name) if state is State.AVAILABLE]
        print(f"Serving {name}, version {', '.join(versions)}")
    print(f"REST at http://{shown}:{port}")
    print("Ready", flush=True)
