"""HTTP/1.1 on asyncio: one protocol object a connection, requests in, responses out, every buffer bounded."""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from http import HTTPStatus

import httptools

from keras_bn_serving.rest.http_messages import Headers, Request, Response, serialize
from keras_bn_serving.rest.inflating import Inflater

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class HttpLimits:
    """What one connection may cost.

    Attributes:
        header_bytes: Request line and headers together.
        body_bytes: A body as it comes over the wire.
        inflated_bytes: A body after decompression.
        buffered_bytes: The bodies of all connections together.
        idle_seconds: How long a connection may stay without a request.
        read_seconds: How long a request may take to arrive.
    """

    header_bytes: int = 64 * 1024
    body_bytes: int = 256 * 1024 * 1024
    inflated_bytes: int = 100 * 1024 * 1024
    buffered_bytes: int = 1024 * 1024 * 1024
    idle_seconds: float = 300.0
    read_seconds: float = 30.0


@dataclass
class HttpService:
    """What all connections of a server share.

    Attributes:
        handle: Answers a request; raises nothing.
        refuse: Makes the answer for a request that cannot be read: a status and why, empty where the status says all.
        limits: What one connection may cost.
        connections: Those open now.
        buffered: Bytes of bodies held now.
        closing: Set once no further request is taken on.
    """

    handle: Callable[[Request], Awaitable[Response]]
    refuse: Callable[[int, str], Response]
    limits: HttpLimits = field(default_factory=HttpLimits)
    connections: set["HttpConnection"] = field(default_factory=set)
    buffered: int = 0
    closing: bool = False
    _unsent: list[tuple[asyncio.Transport, bytes]] = field(default_factory=list)

    def send(self, loop: asyncio.AbstractEventLoop, transport: asyncio.Transport, data: bytes) -> None:
        """Sends an answer once all that are being made in this turn of the loop are there.

        Sent one by one, each may wake its client, and what has just become able to run takes the processor from the
        making of the next.
        """
        if not self._unsent:
            loop.call_soon(self._flush)
        self._unsent.append((transport, data))

    def _flush(self) -> None:
        unsent, self._unsent = self._unsent, []
        for transport, data in unsent:
            transport.write(data)


class _Refused(Exception):
    def __init__(self, status: int, reason: str = ""):
        super().__init__(reason)
        self.status = status
        self.reason = reason


class HttpConnection(asyncio.Protocol):
    """One connection. Requests that come in one go are answered in order, one at a time."""

    def __init__(self, service: HttpService, loop: asyncio.AbstractEventLoop):
        self._service = service
        self._loop = loop
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpRequestParser(self)
        self._waiting: deque[tuple[Request | _Refused, bool, str]] = deque()
        self._task: asyncio.Task[None] | None = None
        self._deadline: float | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._paused = False
        self._can_write = asyncio.Event()
        self._can_write.set()
        self._unreadable = False
        self._ended = False
        self._last = False
        self._held = 0
        self._in_request = False
        self._target = b""
        self._headers: Headers = {}
        self._header_bytes = 0
        self._body: list[bytes] = []
        self._received = 0
        self._inflater: Inflater | None = None

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]
        self._service.connections.add(self)
        self._await(self._service.limits.idle_seconds)

    def connection_lost(self, exc: Exception | None) -> None:
        self._service.connections.discard(self)
        self._hold(-self._held)
        self._transport = None
        self._can_write.set()
        self._deadline = None
        if self._timer is not None:
            self._timer.cancel()
        if self._task is not None:
            self._task.cancel()

    def data_received(self, data: bytes) -> None:
        if self._unreadable:
            return
        if self._task is None and not self._waiting and not self._in_request:
            self._await(self._service.limits.read_seconds)
        self._feed(data)
        self._answer_next()
        if self._task is not None and self._transport is not None and (self._waiting or self._in_request):
            # What comes after this request waits in the kernel, not here.
            self._paused = True
            self._transport.pause_reading()

    def eof_received(self) -> bool:
        # A client that is done sending may still wait for its answers.
        self._ended = True
        return self._task is not None

    def pause_writing(self) -> None:
        self._can_write.clear()

    def resume_writing(self) -> None:
        self._can_write.set()

    # httptools callbacks

    def on_message_begin(self) -> None:
        self._in_request = True
        self._target = b""
        self._headers = {}
        self._header_bytes = 0
        self._body = []
        self._received = 0
        self._inflater = None

    def on_url(self, url: bytes) -> None:
        self._count_header(len(url))
        self._target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count_header(len(name) + len(value))
        self._headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        length = self._headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._service.limits.body_bytes:
            raise self._too_large()
        has_body = b"transfer-encoding" in self._headers or length.strip(b"0") != b""
        expected = self._headers.get(b"expect", b"").lower()
        # HTTP/1.0 knows neither the header nor the answer to it.
        if expected and has_body and self._parser.get_http_version() != "1.0":
            if expected != b"100-continue":
                raise _Refused(HTTPStatus.EXPECTATION_FAILED)
            if self._transport is not None:
                self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if b"gzip" in self._headers.get(b"content-encoding", b""):
            self._inflater = Inflater(self._service.limits.inflated_bytes)

    def on_body(self, body: bytes) -> None:
        self._received += len(body)
        if self._received > self._service.limits.body_bytes:
            raise self._too_large()
        if self._inflater is not None:
            body = self._inflater.feed(body)
        self._hold(len(body))
        if self._service.buffered > self._service.limits.buffered_bytes:
            raise _Refused(HTTPStatus.SERVICE_UNAVAILABLE, "The server holds as much as it can. Try again later.")
        self._body.append(body)

    def on_message_complete(self) -> None:
        self._in_request = False
        # As with TensorFlow Serving, what claims to be gzip and is not is as good as nothing.
        whole = self._inflater is None or self._inflater.whole
        request = Request(
            self._parser.get_method().decode("latin-1"),
            self._target.decode("latin-1"),
            self._headers,
            b"".join(self._body) if whole else b"",
        )
        self._waiting.append((request, self._parser.should_keep_alive(), self._parser.get_http_version()))
        self._body = []

    # Ours

    def shut_down(self) -> None:
        """Closes the connection now if it is idle, else after the answer to the request that has begun to arrive."""
        if self._task is None and not self._in_request and self._transport is not None:
            self._transport.close()

    def _feed(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._ignore_upgrade(data[upgrade.args[0] :])
        except httptools.HttpParserCallbackError as error:
            if not isinstance(error.__context__, _Refused):
                raise
            self._refuse_rest(error.__context__)
        except httptools.HttpParserInvalidURLError:
            self._refuse_rest(_Refused(HTTPStatus.BAD_REQUEST))
        except httptools.HttpParserError as error:
            self._refuse_rest(_Refused(HTTPStatus.BAD_REQUEST, f"Not an HTTP request: {error}"))

    def _ignore_upgrade(self, rest: bytes) -> None:
        """Reads the request again without the wish for another protocol: at that the parser stops before the body."""
        request, _, version = self._waiting.pop()
        if isinstance(request, _Refused) or request.method == "CONNECT":
            self._refuse_rest(_Refused(HTTPStatus.NOT_IMPLEMENTED))
            return
        self._parser = httptools.HttpRequestParser(self)
        head = b"%s %s HTTP/%s\r\n" % (request.method.encode(), self._target, version.encode())
        # What was expected to be continued has been.
        headers = (item for item in request.headers.items() if item[0] not in (b"upgrade", b"expect"))
        self._feed(head + b"".join(b"%s: %s\r\n" % item for item in headers) + b"\r\n" + rest)

    def _hold(self, size: int) -> None:
        self._held += size
        self._service.buffered += size

    def _count_header(self, size: int) -> None:
        self._header_bytes += size
        limit = self._service.limits.header_bytes
        if self._header_bytes > limit:
            raise _Refused(
                HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, f"Request line and headers may take {limit} bytes."
            )

    def _too_large(self) -> _Refused:
        limit = self._service.limits.body_bytes
        return _Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"A body may take {limit} bytes.")

    def _refuse_rest(self, refusal: _Refused) -> None:
        self._unreadable = True
        self._body = []
        self._waiting.append((refusal, False, "1.1"))

    def _answer_next(self) -> None:
        if self._task is not None or not self._waiting or self._transport is None:
            return
        self._await(None)
        self._task = self._loop.create_task(self._answer(*self._waiting.popleft()))
        self._task.add_done_callback(self._answered)

    async def _answer(self, request: Request | _Refused, keep_alive: bool, version: str) -> None:
        if isinstance(request, _Refused):
            response = self._service.refuse(request.status, request.reason)
            head_only = False
        else:
            response = await self._service.handle(request)
            head_only = request.method == "HEAD"
            self._hold(-min(len(request.body), self._held))
        keep_alive = keep_alive and not self._service.closing and (bool(self._waiting) or not self._ended)
        if self._transport is None:
            return
        self._last = not keep_alive
        self._service.send(self._loop, self._transport, serialize(response, keep_alive, version, head_only))
        # A client that does not read its answers gets no further ones.
        self._await(self._service.limits.read_seconds)
        await self._can_write.wait()

    def _answered(self, task: asyncio.Task[None]) -> None:
        self._task = None
        if self._transport is None or self._transport.is_closing():
            return
        if task.cancelled() or task.exception() is not None:
            if not task.cancelled():
                _log.error("a request could not be answered", exc_info=task.exception())
            self._transport.abort()
            return
        # The answer has been sent: that was put on the loop before this.
        if self._last or (self._ended and not self._waiting):
            self._transport.close()
            return
        if self._waiting:
            self._answer_next()
            return
        if self._paused:
            self._paused = False
            self._transport.resume_reading()
        self._await(self._service.limits.read_seconds if self._in_request else self._service.limits.idle_seconds)

    def _await(self, seconds: float | None) -> None:
        """Gives the peer this long to do its next part; `None` stops the clock."""
        self._deadline = None if seconds is None else self._loop.time() + seconds
        # A timer that runs already is left alone where it goes off early enough: setting one costs as much as a header.
        if self._deadline is not None and (self._timer is None or self._timer.when() > self._deadline):
            self._set_timer(self._deadline)

    def _set_timer(self, when: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_at(when, self._look_at_clock)

    def _look_at_clock(self) -> None:
        self._timer = None
        if self._deadline is None:
            return
        if self._loop.time() < self._deadline:
            self._set_timer(self._deadline)
        else:
            self._give_up()

    def _give_up(self) -> None:
        if self._transport is None:
            return
        if self._in_request and self._task is None:
            refusal = self._service.refuse(HTTPStatus.REQUEST_TIMEOUT, "The request did not arrive in time.")
            self._transport.write(serialize(refusal, False, "1.1", False))
            self._transport.close()
        else:
            self._transport.abort()
