"""The REST API as an ASGI application: bodies come in whole, bounded and decompressed, answers go out."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from keras_bn_serving import request_ids
from keras_bn_serving.engine.memory import Memory, Share
from keras_bn_serving.errors import ResourceExhaustedError, UnavailableError
from keras_bn_serving.rest.inflating import Inflater
from keras_bn_serving.rest.messages import Request, Response
from keras_bn_serving.rest.predictions import SMALL_BYTES
from keras_bn_serving.rest.server import RestServer
from keras_bn_serving.sizes import size_text

# An extension of ASGI's scope: the request's target as it came.
TARGET = "keras_bn.target"
_ID_HEADER = request_ids.HEADER.encode()
_LOOK_SECONDS = 0.1
# Of a byte of a body: its piece, and the whole that is made of the pieces; of a small one, all that becomes of it.
_BODY_COST = 2
_WHOLE_COST = 12
_PIECE_BYTES = 1024 * 1024
_Scope = Mapping[str, Any]
_Receive = Callable[[], Awaitable[Mapping[str, Any]]]
_Send = Callable[[dict[str, Any]], Awaitable[None]]


@dataclass(frozen=True)
class RestLimits:
    """What one request may cost.

    Attributes:
        body_bytes: A body as it comes over the wire.
        inflated_bytes: A body after decompression.
        read_seconds: How long a body may take to arrive.
    """

    body_bytes: int = 256 * 1024 * 1024
    inflated_bytes: int = 100 * 1024 * 1024
    read_seconds: float = 30.0


class _Refused(Exception):
    def __init__(self, status: HTTPStatus, reason: str = ""):
        super().__init__(reason)
        self.status = status
        self.reason = reason


class _Gone(Exception):
    """The client has left before its request was whole."""


class _Watch:
    """A request under way, and why it was cancelled.

    Attributes:
        receive: Tells whether its client has left.
        task: What answers it.
        read_until: When its body has to be there.
        reading: Whether its body is still to come.
        late: Whether it was cancelled for its body.
        gone: Whether it was cancelled for its client.
        waiting: What waits for its client to leave.
    """

    __slots__ = ("gone", "late", "read_until", "reading", "receive", "task", "waiting")

    def __init__(self, receive: _Receive, task: "asyncio.Task[Any] | None", read_until: float):
        self.receive, self.task, self.read_until = receive, task, read_until
        self.reading, self.late, self.gone = True, False, False
        self.waiting: asyncio.Task[None] | None = None

    async def wait_until_gone(self) -> None:
        """Cancels the request once its client has left."""
        while (await self.receive())["type"] != "http.disconnect":
            continue
        self.gone = True
        self.cancel()

    def cancel(self) -> None:
        """Cancels the request."""
        if self.task is not None:
            self.task.cancel()


class _Watcher:
    """Looks after requests that take long: cancels those whose body does not come in time, or whose client has left.

    One timer for all of them, every tenth of a second: most have their answer before that.
    """

    def __init__(self, read_seconds: float):
        self._read_seconds = read_seconds
        self._watched: set[_Watch] = set()
        self._timer: asyncio.TimerHandle | None = None

    def begin(self, receive: _Receive) -> _Watch:
        """Looks after the request that the current task answers."""
        loop = asyncio.get_running_loop()
        watch = _Watch(receive, asyncio.current_task(loop), loop.time() + self._read_seconds)
        self._watched.add(watch)
        if self._timer is None:
            self._timer = loop.call_later(_LOOK_SECONDS, self._look, loop)
        return watch

    def end(self, watch: _Watch) -> None:
        """Looks after a request no longer."""
        self._watched.discard(watch)
        if watch.waiting is not None:
            watch.waiting.cancel()

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = loop.call_later(_LOOK_SECONDS, self._look, loop) if self._watched else None
        for watch in self._watched:
            if watch.reading and loop.time() > watch.read_until:
                watch.late = True
                watch.cancel()
            elif not watch.reading and watch.waiting is None:
                watch.waiting = loop.create_task(watch.wait_until_gone())


class Application:
    """An ASGI application.

    Args:
        server: What answers whole requests.
        memory: What all requests may hold.
        limits: What one request may cost.
    """

    def __init__(self, server: RestServer, memory: Memory, limits: RestLimits):
        self._server = server
        self._memory = memory
        self._limits = limits
        self._watcher = _Watcher(limits.read_seconds)

    async def __call__(self, scope: _Scope, receive: _Receive, send: _Send) -> None:
        """Answers one request; of other kinds of scopes it takes none."""
        if scope["type"] != "http":
            raise ValueError(f"no application for {scope['type']}")
        headers = dict(scope["headers"])
        target = _target(scope)
        request_id = request_ids.begin(headers.get(_ID_HEADER, b"").decode("latin-1"))
        watch = self._watcher.begin(receive)
        with self._memory.share() as share:
            try:
                body = await self._read(scope, headers, receive, share)
                watch.reading = False
                response = await self._server.handle(Request(scope["method"], target, headers, body, share))
            except _Refused as refusal:
                response = self._server.refuse(refusal.status, refusal.reason)
            except UnavailableError as error:
                response = self._server.refuse(HTTPStatus.SERVICE_UNAVAILABLE, error.message)
            except ResourceExhaustedError as error:
                response = self._server.refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, error.message)
            except _Gone:
                return
            except asyncio.CancelledError:
                if watch.gone:
                    return
                if not watch.late:
                    raise
                response = self._server.refuse(HTTPStatus.REQUEST_TIMEOUT, "The request did not arrive in time.")
            finally:
                self._watcher.end(watch)
            await _answer(response, send, scope["method"] == "HEAD", request_id)

    async def _read(self, scope: _Scope, headers: Mapping[bytes, bytes], receive: _Receive, share: Share) -> bytes:
        length = headers.get(b"content-length", b"")
        if not length and b"transfer-encoding" not in headers:
            return b""
        if length.isdigit() and int(length) > self._limits.body_bytes:
            raise self._too_large()
        expected = headers.get(b"expect", b"").lower()
        if expected not in (b"", b"100-continue") and scope["http_version"] != "1.0":
            raise _Refused(HTTPStatus.EXPECTATION_FAILED)
        inflater = Inflater(self._limits.inflated_bytes) if b"gzip" in headers.get(b"content-encoding", b"") else None
        return await self._read_pieces(receive, inflater, share)

    async def _read_pieces(self, receive: _Receive, inflater: Inflater | None, share: Share) -> bytes:
        pieces: list[bytes] = []
        received = 0
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise _Gone
            piece = message.get("body", b"")
            more = message.get("more_body", False)
            received += len(piece)
            if received > self._limits.body_bytes:
                raise self._too_large()
            pieces.append(piece if inflater is None else inflater.feed(piece))
            share.hold(share.held + (_WHOLE_COST if received <= SMALL_BYTES else _BODY_COST) * len(pieces[-1]))
        # As with TensorFlow Serving, what claims to be gzip and is not is as good as nothing.
        return b"".join(pieces) if inflater is None or inflater.whole else b""

    def _too_large(self) -> _Refused:
        limit = self._limits.body_bytes
        return _Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"A body may take {size_text(limit)}.")


def _target(scope: _Scope) -> str:
    """Returns what a request asks for: as it came, where the server tells, else put together again."""
    told = scope.get("extensions", {}).get(TARGET)
    query = scope["query_string"]
    target = told["target"] if told else scope["raw_path"] + (b"?" + query if query else b"")
    return target.decode("latin-1")


async def _answer(response: Response, send: _Send, head_only: bool, request_id: str) -> None:
    headers = [
        (b"content-type", response.content_type.encode()),
        (b"content-length", str(len(response.body)).encode()),
        (_ID_HEADER, request_id.encode()),
        *((name.lower().encode(), value.encode()) for name, value in response.headers),
    ]
    await send({"type": "http.response.start", "status": int(response.status), "headers": headers})
    body = b"" if head_only else response.body
    # Piece by piece: a client that reads slowly keeps the rest here, where it is counted.
    last = max(len(body) - 1, 0) // _PIECE_BYTES * _PIECE_BYTES
    for start in range(0, last, _PIECE_BYTES):
        await send({"type": "http.response.body", "body": body[start : start + _PIECE_BYTES], "more_body": True})
    await send({"type": "http.response.body", "body": body[last:] if last else body})
