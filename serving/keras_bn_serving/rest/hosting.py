"""Carries the ASGI application: uvicorn, with the limits that it has none for."""

import asyncio
import logging
import re
import socket
from http import HTTPStatus
from typing import Any

import httptools
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from keras_bn_serving.codec.answer import encode_error
from keras_bn_serving.rest.application import EXTENSION, Application
from keras_bn_serving.rest.messages import Response, html_error
from keras_bn_serving.sizes import size_text

_log = logging.getLogger(__name__)
_BACKLOG = 1024
_MOST_CONNECTIONS = 4096
_IDLE_SECONDS = 300
# For what is still to come of a request, and for a client to take what was sent before its connection was closed.
_REST_SECONDS = 30.0
_HEADER_BYTES = 64 * 1024
_AT_ONCE_BYTES = 64 * 1024
_BARE_URL = re.compile(rb"^[a-zA-Z][a-zA-Z0-9+.-]*://[^/?#]+(?![^?#])")
_REQUEST_LINE = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+ \S+ HTTP/1\.[01]\r\n")


class HttpServer:
    """An HTTP server, started and stopped on the running event loop.

    Args:
        application: What answers.
        listening: A bound socket.
    """

    def __init__(self, application: Application, listening: socket.socket):
        self._socket = listening
        self._server = _Server(
            uvicorn.Config(
                application,
                http=_Protocol,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                backlog=_BACKLOG,
                limit_concurrency=_MOST_CONNECTIONS,
                timeout_keep_alive=_IDLE_SECONDS,
            )
        )
        self._serving: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Returns once connections are taken."""
        self._serving = asyncio.ensure_future(self._server.serve([self._socket]))
        while not self._server.started and not self._serving.done():
            await asyncio.sleep(0.005)

    async def stop(self, seconds: float) -> None:
        """Takes no further connections, finishes what is under way, and cuts off what takes longer than `seconds`."""
        if self._serving is None:
            return
        self._server.config.timeout_graceful_shutdown = seconds  # type: ignore[assignment]
        self._server.should_exit = True
        await self._serving
        left = len(self._server.server_state.connections)
        if left:
            _log.warning("%d connections were cut off after %g s", left, seconds)


class _Server(uvicorn.Server):
    """Leaves the signals alone: they are for all of the process."""

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        await self._serve(sockets)


class _TooLarge(Exception):
    """Headers of more bytes than may be."""


class _Transport:
    """A transport that sends what is written in one turn of the loop in one go, after all that is made in that turn.

    Sent at once, head and body go one by one, and each may wake a client, which takes the processor from the making of
    the next answer: with 32 clients on two cores that costs a quarter of the requests.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop):
        self._transport = transport
        self._loop = loop
        self._unsent: list[bytes] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        if not self._unsent:
            self._loop.call_soon(self.flush)
        self._unsent.append(data)
        if len(data) > _AT_ONCE_BYTES:  # Whether more may be written is known only then.
            self.flush()

    def is_closing(self) -> bool:
        return self._transport.is_closing()

    def close(self) -> None:
        self.flush()
        self._transport.close()
        self._cut_where_nothing_is_taken(0)

    def _cut_where_nothing_is_taken(self, before: int) -> None:
        left = self._transport.get_write_buffer_size()
        if left and left == before:
            self._transport.abort()
        elif left:
            self._loop.call_later(_REST_SECONDS, self._cut_where_nothing_is_taken, left)

    def flush(self) -> None:
        unsent, self._unsent = self._unsent, []
        if unsent:
            self._transport.write(b"".join(unsent))


class _Protocol(HttpToolsProtocol):
    """One connection, with what uvicorn leaves out.

    Headers are bounded, in bytes and in time. An offer of another protocol is passed over: the parser would stop before
    the body. A client that is done sending still gets its answers. HTTP/1.0 may keep its connection.
    """

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self._deadline: asyncio.TimerHandle | None = None
        self._header_bytes = 0
        self._in_headers = True
        self._ended = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(_Transport(transport, self.loop))  # type: ignore[arg-type]
        self._await_the_rest_in_time()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def eof_received(self) -> bool:  # type: ignore[override]
        self._ended = True
        self.transport.flush()  # type: ignore[attr-defined]
        # Without the rest of its body, the last request will have no answer.
        return self.cycle is not None and not self.cycle.response_complete and not self.cycle.more_body

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._pass_over(data[upgrade.args[0] :])
        except httptools.HttpParserError as error:
            if isinstance(error.__context__, _TooLarge):
                self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, str(error.__context__))
            elif isinstance(error, httptools.HttpParserInvalidMethodError) and _REQUEST_LINE.match(data):
                self._refuse(HTTPStatus.NOT_IMPLEMENTED)
            else:
                self._refuse(HTTPStatus.BAD_REQUEST, f"Not an HTTP request: {error}")
        self._await_the_rest_in_time()

    def on_message_begin(self) -> None:
        self._header_bytes = 0
        self._in_headers = True
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        # The colon, the blank and the line's end too: many short lines are many bytes.
        self._count(len(name) + len(value) + 4)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_headers = False
        # HTTP/1.0 knows neither the wish nor the answer to it.
        self.expect_100_continue = self.expect_100_continue and self.parser.get_http_version() != "1.0"
        # ASGI's path and query leave out what stands behind a number sign, and whether a question mark was there.
        self.scope["extensions"] = {EXTENSION: {"target": self.url, "abort": self._abort}}
        # uvicorn wants a path, which a whole URL need not have.
        self.url = _BARE_URL.sub(rb"\g<0>/", self.url)
        if not self.parser.should_upgrade():
            super().on_headers_complete()
            if self.parser.get_http_version() == "1.0" and self.parser.should_keep_alive():
                # An old client that asks for it is told that the connection stays.
                self.cycle.keep_alive = True
                self.cycle.default_headers = [*self.cycle.default_headers, (b"connection", b"keep-alive")]

    def on_body(self, body: bytes) -> None:
        if not self.parser.should_upgrade():
            super().on_body(body)

    def on_message_complete(self) -> None:
        if not self.parser.should_upgrade():
            super().on_message_complete()

    def shutdown(self) -> None:
        if self.cycle is not None and not self.cycle.response_started:
            # Older versions of uvicorn close the connection without a word.
            others = [item for item in self.cycle.default_headers if item[0] != b"connection"]
            self.cycle.default_headers = [*others, (b"connection", b"close")]
        super().shutdown()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._ended and not self.pipeline and self.cycle.response_complete:
            self.transport.close()
        self._await_the_rest_in_time()

    def _pass_over(self, rest: bytes) -> None:
        """Reads a request again without its offer of another protocol."""
        method = self.parser.get_method()
        if method == b"CONNECT":
            self._refuse(HTTPStatus.NOT_IMPLEMENTED, "This is no proxy for other protocols.")
            return
        head = b"%s %s HTTP/%s\r\n" % (method, self.url, self.parser.get_http_version().encode())
        headers = b"".join(b"%s: %s\r\n" % item for item in self.headers if item[0] != b"upgrade")
        self.parser = httptools.HttpRequestParser(self)
        self.data_received(head + headers + b"\r\n" + rest)

    def _count(self, size: int) -> None:
        self._header_bytes += size
        if self._header_bytes > _HEADER_BYTES:
            raise _TooLarge(f"Request line and headers may take {size_text(_HEADER_BYTES)}.")

    def _refuse(self, status: HTTPStatus, reason: str = "") -> None:
        """Answers what cannot be read, in words or with a page, and closes.

        An answer under way is then the last one.
        """
        if self.cycle is not None and not self.cycle.response_complete and not self.cycle.more_body:
            self.cycle.keep_alive = False
            return
        answer = Response(status, encode_error(reason)) if reason else html_error(status)
        head = f"HTTP/1.1 {status} {status.phrase}\r\ncontent-type: {answer.content_type}\r\nconnection: close\r\n"
        self.transport.write(f"{head}content-length: {len(answer.body)}\r\n\r\n".encode() + answer.body)
        self.transport.close()

    def _await_the_rest_in_time(self) -> None:
        """Starts the clock where nobody else waits for what is still to come, and stops it where all is there.

        That is where headers have come in part, or none yet, and where an answer was given before the body was whole.
        """
        answered = self.cycle is not None and self.cycle.response_complete and self.cycle.more_body
        if not self._in_headers and not answered:
            self._stop_waiting()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(_REST_SECONDS, self._give_up)

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    async def _abort(self) -> None:
        """Cuts the connection, and returns when it is known to be cut."""
        self.transport.abort()
        while not self.cycle.disconnected:
            await asyncio.sleep(0)

    def _give_up(self) -> None:
        self._deadline = None
        if not self.transport.is_closing():
            self.transport.close()
