"""The REST API as an ASGI application: bodies come in whole, bounded and decompressed, answers go out."""

import asyncio
import math
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

# An extension of ASGI's scope: `target`, the request's as it came, and `abort`, which cuts its connection.
EXTENSION = "keras_bn.connection"
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
        read_seconds: How long a body may take to arrive, and a client to take the next MiB of an answer.
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
        until: When the client has to have done what is waited for, its body or to take an answer; infinite: nothing is.
        looking: Whether its client may leave unnoticed otherwise: nothing is sent or received.
        late: Whether it was cancelled for its time.
        gone: Whether it was cancelled for its client.
        waiting: What waits for its client to leave.
    """

    __slots__ = ("gone", "late", "looking", "receive", "task", "until", "waiting")

    def __init__(self, receive: _Receive, task: "asyncio.Task[Any] | None", until: float):
        self.receive, self.task, self.until = receive, task, until
        self.looking, self.late, self.gone = False, False, False
        self.waiting: asyncio.Task[None] | None = None

    def look(self) -> None:
        """From now on the client is waited for no more, but may leave."""
        self.until, self.looking = math.inf, True

    def wait(self, until: float) -> None:
        """From now on the client is waited for."""
        self.until, self.looking = until, False
        self.end()

    def end(self) -> None:
        """Whether the client leaves is of no interest any longer."""
        if self.waiting is not None:
            self.waiting.cancel()
            self.waiting = None

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
    """Looks after requests that take long: cancels those whose client does not do its part in time, or has left.

    One timer for all of them, every tenth of a second: most have their answer before that.
    """

    def __init__(self, seconds: float):
        self._seconds = seconds
        self._watched: set[_Watch] = set()
        self._timer: asyncio.TimerHandle | None = None

    def begin(self, receive: _Receive) -> _Watch:
        """Looks after the request that the current task answers, whose body is still to come."""
        loop = asyncio.get_running_loop()
        watch = _Watch(receive, asyncio.current_task(loop), loop.time() + self._seconds)
        self._watched.add(watch)
        if self._timer is None:
            self._timer = loop.call_later(_LOOK_SECONDS, self._look, loop)
        return watch

    def wait(self, watch: _Watch) -> None:
        """The client is to take what is sent to it now."""
        watch.wait(asyncio.get_running_loop().time() + self._seconds)

    def end(self, watch: _Watch) -> None:
        """Looks after a request no longer."""
        self._watched.discard(watch)
        watch.end()

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = loop.call_later(_LOOK_SECONDS, self._look, loop) if self._watched else None
        for watch in self._watched:
            if loop.time() > watch.until:
                watch.until, watch.late = math.inf, True
                watch.cancel()
            elif watch.looking and watch.waiting is None:
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
        try:
            with self._memory.share() as share:
                response = await self._respond(scope, Request(scope["method"], target, headers, b"", share), watch)
                if response is not None:
                    await self._answer(scope, response, send, request_id, watch)
        finally:
            self._watcher.end(watch)

    async def _respond(self, scope: _Scope, request: Request, watch: _Watch) -> Response | None:
        """The answer to a request whose body is still to come; None where nobody waits for it any longer."""
        try:
            body = await self._read(scope, request.headers, watch.receive, request.share)
            watch.look()
            return await self._server.handle(request._replace(body=body))
        except _Refused as refusal:
            return self._server.refuse(refusal.status, refusal.reason)
        except UnavailableError as error:
            return self._server.refuse(HTTPStatus.SERVICE_UNAVAILABLE, error.message)
        except ResourceExhaustedError as error:
            return self._server.refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, error.message)
        except _Gone:
            return None
        except asyncio.CancelledError:
            if watch.gone:
                return None
            if not watch.late:
                raise
            return self._server.refuse(HTTPStatus.REQUEST_TIMEOUT, "The request did not arrive in time.")

    async def _answer(self, scope: _Scope, response: Response, send: _Send, request_id: str, watch: _Watch) -> None:
        """Sends an answer piece by piece: a client that takes it slowly keeps the rest here, where it is counted."""
        watch.late = False
        headers = [
            (b"content-type", response.content_type.encode()),
            (b"content-length", str(len(response.body)).encode()),
            (_ID_HEADER, request_id.encode()),
            *((name.lower().encode(), value.encode()) for name, value in response.headers),
        ]
        body = b"" if scope["method"] == "HEAD" else response.body
        last = max(len(body) - 1, 0) // _PIECE_BYTES * _PIECE_BYTES
        self._watcher.wait(watch)
        try:
            await send({"type": "http.response.start", "status": int(response.status), "headers": headers})
            for start in range(0, last, _PIECE_BYTES):
                piece = body[start : start + _PIECE_BYTES]
                await send({"type": "http.response.body", "body": piece, "more_body": True})
                self._watcher.wait(watch)
            await send({"type": "http.response.body", "body": body[last:] if last else body})
        except asyncio.CancelledError:
            if watch.late:
                await _extension(scope)["abort"]()
            elif not watch.gone:
                raise

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
    told = _extension(scope)
    query = scope["query_string"]
    target = told["target"] if told else scope["raw_path"] + (b"?" + query if query else b"")
    return target.decode("latin-1")


def _extension(scope: _Scope) -> Mapping[str, Any]:
    return scope.get("extensions", {}).get(EXTENSION, {})
