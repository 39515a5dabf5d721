"""Clients that send or take their part slowly, or not at all, hold neither a connection nor memory for ever."""

import asyncio
import socket
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any

import pytest
from keras_bn_serving.engine.memory import Memory
from keras_bn_serving.rest import hosting
from keras_bn_serving.rest.application import Application, RestLimits
from keras_bn_serving.rest.messages import Request, Response

SECONDS = 0.5
ANSWER = b"x" * (32 * 1024 * 1024)
Ask = Callable[[int, Memory], Awaitable[Any]]


class Generous:
    """In the place of a RestServer: every answer is large."""

    async def handle(self, request: Request) -> Response:
        request.share.hold(len(ANSWER))
        return Response(200, ANSWER)

    def refuse(self, status: HTTPStatus, reason: str) -> Response:
        return Response(status, reason.encode(), "text/plain")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[[Ask], Any]:
    """Runs what asks a server that gives a client half a second, and a second more to read what is left."""
    monkeypatch.setattr(hosting, "_REST_SECONDS", 2 * SECONDS)

    async def serve(ask: Ask) -> Any:
        memory = Memory(10 * len(ANSWER))
        application = Application(Generous(), memory, RestLimits(read_seconds=SECONDS))  # type: ignore[arg-type]
        listening = socket.create_server(("127.0.0.1", 0))
        listening.setblocking(False)
        server = hosting.HttpServer(application, listening)
        await server.start()
        try:
            return await asyncio.wait_for(ask(listening.getsockname()[1], memory), 30)
        finally:
            await server.stop(5)

    return lambda ask: asyncio.run(serve(ask))


async def connected(port: int, sent: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**16)
    writer.write(sent)
    return reader, writer


@pytest.mark.parametrize(
    ("length", "status"), [(1000, b"408 Request Timeout"), (10**12, b"413 Request Entity Too Large")]
)
@pytest.mark.parametrize("drips", [True, False])
def test_a_body_that_does_not_come_ends_the_connection(run, length: int, status: bytes, drips: bool):
    async def ask(port: int, memory: Memory) -> bytes:
        reader, writer = await connected(port, b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % length)

        async def drip() -> None:
            while drips:
                writer.write(b" ")
                await asyncio.sleep(0.1)

        dripping = asyncio.ensure_future(drip())
        answer = await reader.read()
        dripping.cancel()
        return answer

    assert run(ask).startswith(b"HTTP/1.1 " + status)


def test_an_answer_that_nobody_reads_is_given_up_and_its_memory_is_free_again(run):
    async def ask(port: int, memory: Memory) -> None:
        clients = [await connected(port, b"GET / HTTP/1.1\r\nHost: a\r\n\r\n") for _ in range(5)]
        while not memory.held:
            await asyncio.sleep(0.01)
        while memory.held:
            await asyncio.sleep(0.01)
        for reader, writer in clients:
            with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
                await reader.readexactly(len(ANSWER))
            writer.close()

    run(ask)


def test_a_client_that_takes_its_time_gets_all_of_its_answer(run):
    async def ask(port: int, memory: Memory) -> int:
        reader, _ = await connected(port, b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        taken = 0
        while piece := await reader.read(2**16):
            taken += len(piece)
            # Longer than the limit altogether, and shorter for each MiB.
            await asyncio.sleep(0.004)
        return taken

    assert run(ask) > len(ANSWER)
