"""The gRPC server: the services, their health, model by model, and their descriptions."""

import asyncio
import logging
from collections.abc import Iterable

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from keras_bn_serving.engine.service import PredictionService
from keras_bn_serving.engine.versions import State
from keras_bn_serving.rpc.descriptions import described_services
from keras_bn_serving.rpc.services import GrpcServices

_log = logging.getLogger(__name__)
_MOST_MESSAGE_BYTES = 256 * 1024 * 1024
_MOST_CALLS = 1000
_HEALTH_SECONDS = 0.5


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
