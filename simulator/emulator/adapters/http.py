"""A small HTTP/1.1 server on httptools: the emulator's hot path is one socket write for each token.

Not for production: no TLS, no limits, trusts its peers. It sees a client go (close, reset, half-close) at once, whether
it is streaming or not, since it never stops reading. An exchange is handed to a synchronous handler, which answers now
or keeps it and answers later. Chosen over ASGI for the cost of a chunk (benchmarks/emulator_timing.py --chunk-cost).
"""

import asyncio
import socket
from collections import deque
from collections.abc import Callable
from email.utils import formatdate
from http import HTTPStatus
from typing import cast

import httptools

JSON = b"application/json"
SSE = b"text/event-stream; charset=utf-8"
TEXT = b"text/plain; version=0.0.4; charset=utf-8"
KEEP_ALIVE_S = 5.0  # vLLM closes an idle connection after this
_REASONS = {status.value: status.phrase.encode() for status in HTTPStatus}


class Exchange:
    """One request and its answer. Answering after the client has gone does nothing."""

    __slots__ = ("_chunked", "_connection", "answered", "body", "headers", "method", "on_gone", "on_writable", "target")

    def __init__(self, connection: "HttpConnection", method: str) -> None:
        self._connection: HttpConnection | None = connection
        self._chunked = True
        self.method = method
        self.target = b""
        self.headers: dict[bytes, bytes] = {}
        self.body = b""
        self.answered = False  # has a status line gone out
        self.on_gone: Callable[[], None] | None = None
        self.on_writable: Callable[[], None] | None = None

    @property
    def path(self) -> str:
        """Path of the target, without its query."""
        return self.target.partition(b"?")[0].decode("latin-1")

    @property
    def query(self) -> str:
        """Query of the target."""
        return self.target.partition(b"?")[2].decode("latin-1")

    @property
    def open(self) -> bool:
        """Whether the client is there and the answer is not complete."""
        return self._connection is not None

    @property
    def writable(self) -> bool:
        """False while the client reads too slowly; ``on_writable`` says when it has caught up."""
        return self._connection is not None and self._connection.writable

    def respond(self, status: int, body: bytes = b"", content_type: bytes = JSON) -> None:
        """Answer at once."""
        if (connection := self._connection) is None:
            return
        kind = b"content-type: %b\r\n" % content_type if body else b""
        content = b"" if self.method == "HEAD" else body
        connection.write(b"%b%bcontent-length: %d\r\n\r\n%b" % (self._head(status), kind, len(body), content))
        self.answered = True
        self._finish()

    def begin_stream(self, content_type: bytes = SSE) -> None:
        """Answer 200 with a body to come."""
        if (connection := self._connection) is None:
            return
        self._chunked = connection.http_version == "1.1"
        framing = b"transfer-encoding: chunked\r\n" if self._chunked else b""
        connection.write(b"%bcontent-type: %b\r\n%b\r\n" % (self._head(200), content_type, framing))
        self.answered = True

    def send(self, content: bytes) -> None:
        """A piece of the streamed body."""
        if self._connection is not None and content:
            self._connection.write(b"%x\r\n%b\r\n" % (len(content), content) if self._chunked else content)

    def end(self, content: bytes = b"") -> None:
        """The last piece of the streamed body."""
        if (connection := self._connection) is None:
            return
        if self._chunked:
            last = b"%x\r\n%b\r\n" % (len(content), content) if content else b""
            connection.write(last + b"0\r\n\r\n")
        else:
            connection.write(content)
            connection.keep_alive = False
        self._finish()

    def abort(self) -> None:
        """Reset the connection."""
        if self._connection is not None:
            self._connection.abort()

    def _head(self, status: int) -> bytes:
        assert self._connection is not None
        request_id = self.headers.get(b"x-request-id")
        line = b"HTTP/1.1 %d %b\r\n" % (status, _REASONS.get(status, b""))
        identity = b"x-request-id: %b\r\n" % request_id if request_id else b""
        closing = b"" if self._connection.keep_alive else b"connection: close\r\n"
        return line + self._connection.common_headers() + identity + closing

    def _finish(self) -> None:
        connection, self._connection = self._connection, None
        self.on_gone = self.on_writable = None
        if connection is not None:
            connection.exchange_done()

    def gone(self) -> None:
        """The client left before the answer was complete."""
        self._connection = None
        notify, self.on_gone = self.on_gone, None
        if notify is not None:
            notify()


Handler = Callable[[Exchange], None]


class HttpConnection(asyncio.Protocol):
    """One client connection; its requests are answered one after the other."""

    def __init__(self, server: "HttpServer") -> None:
        self._server = server
        self._parser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport | None = None
        self._incoming: Exchange | None = None  # being read
        self._current: Exchange | None = None  # being answered
        self._pipelined: deque[tuple[Exchange, str, bool]] = deque()
        self.keep_alive = True
        self.http_version = "1.1"
        self.writable = True
        self.idle_since_s = server.loop.time()

    # what asyncio calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by inheritance
        self._server.connections.add(self)

    def data_received(self, data: bytes) -> None:
        """Read on."""
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserCallbackError as error:  # our own fault, not the client's
            self._server.loop.call_exception_handler({"message": "a request failed", "exception": error})
            self._refuse(500, b"Internal Server Error")
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self._refuse(400, b"Invalid HTTP request received.")

    def eof_received(self) -> None:
        """A half-close counts as gone, as with vLLM; returning None closes the connection."""
        self._gone()

    def connection_lost(self, exc: Exception | None) -> None:
        """Closed or reset."""
        self._transport = None
        self._server.connections.discard(self)
        self._gone()

    def pause_writing(self) -> None:
        """The client reads too slowly."""
        self.writable = False

    def resume_writing(self) -> None:
        """The client has caught up."""
        self.writable = True
        if self._current is not None and self._current.on_writable is not None:
            self._current.on_writable()

    # what httptools calls

    def on_message_begin(self) -> None:
        """A request line begins."""
        self._incoming = Exchange(self, "")

    def on_url(self, url: bytes) -> None:
        """Part of the target."""
        assert self._incoming is not None
        self._incoming.target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header."""
        assert self._incoming is not None
        self._incoming.headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        """Headers are there; the body may wait for our leave."""
        assert self._incoming is not None
        if self._incoming.headers.get(b"expect", b"").lower() == b"100-continue":
            self.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        """Part of the body."""
        assert self._incoming is not None
        self._incoming.body += body

    def on_message_complete(self) -> None:
        """A request is whole: answer it, or let it wait for the one before."""
        exchange, self._incoming = self._incoming, None
        assert exchange is not None
        exchange.method = self._parser.get_method().decode("latin-1")
        version, keep_alive = self._parser.get_http_version(), bool(self._parser.should_keep_alive())
        if self._current is not None:
            self._pipelined.append((exchange, version, keep_alive))
        else:
            self._handle(exchange, version, keep_alive)

    # what exchanges and the server call

    def _handle(self, exchange: Exchange, version: str, keep_alive: bool) -> None:
        self._current, self.http_version, self.keep_alive = exchange, version, keep_alive
        self._server.handler(exchange)

    def write(self, data: bytes) -> None:
        """Send bytes now."""
        if self._transport is not None:
            self._transport.write(data)

    def common_headers(self) -> bytes:
        """Headers of every answer."""
        return self._server.common_headers()

    def exchange_done(self) -> None:
        """The answer is complete: the next request, or the end."""
        self._current = None
        self.idle_since_s = self._server.loop.time()
        if not self.keep_alive or self._server.closing:
            self.close()
        elif self._pipelined:
            self._handle(*self._pipelined.popleft())

    @property
    def idle(self) -> bool:
        """Between requests."""
        return self._current is None and self._incoming is None

    def close(self) -> None:
        """Close when what was written is sent."""
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """Reset: nothing more is sent."""
        if self._transport is not None:
            self._transport.abort()

    def _gone(self) -> None:
        current, self._current = self._current, None
        self._pipelined.clear()
        if current is not None:
            current.gone()

    def _refuse(self, status: int, body: bytes) -> None:
        head = b"HTTP/1.1 %d %b\r\ncontent-length: %d\r\nconnection: close\r\n\r\n"
        self.write(head % (status, _REASONS[status], len(body)) + body)
        self.close()


class HttpServer:
    """One listening port. ``bind`` takes the port, ``listen`` opens it."""

    def __init__(self, handler: Handler, keep_alive_s: float = KEEP_ALIVE_S) -> None:
        self.handler = handler
        self.loop = asyncio.get_running_loop()
        self.connections: set[HttpConnection] = set()
        self.closing = False
        self._keep_alive_s = keep_alive_s
        self._socket: socket.socket | None = None
        self._server: asyncio.Server | None = None
        self._sweep: asyncio.TimerHandle | None = None
        self._headers_until_s = -1.0
        self._headers = b""

    def bind(self, host: str, port: int) -> int:
        """Take a port (0: any free one) without answering on it yet, as vLLM does while it loads; returns the port."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.socket(family, socket.SOCK_STREAM)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind((host, port))
        except OSError:
            listening.close()
            raise
        self._socket = listening
        return int(listening.getsockname()[1])

    async def listen(self) -> None:
        """Answer from now on."""
        assert self._socket is not None
        listening, self._socket = self._socket, None
        self._server = await self.loop.create_server(lambda: HttpConnection(self), sock=listening, backlog=2048)
        self._sweep = self.loop.call_later(self._keep_alive_s / 5, self._close_idle)

    def _close_idle(self) -> None:
        before_s = self.loop.time() - self._keep_alive_s
        for connection in tuple(self.connections):
            if connection.idle and connection.idle_since_s < before_s:
                connection.close()
        self._sweep = self.loop.call_later(self._keep_alive_s / 5, self._close_idle)

    def common_headers(self) -> bytes:
        """Date and server, rendered once a second."""
        now_s = self.loop.time()
        if now_s >= self._headers_until_s:
            self._headers = b"date: %b\r\nserver: uvicorn\r\n" % formatdate(usegmt=True).encode()
            self._headers_until_s = now_s + 1.0
        return self._headers

    def close(self, reset: bool = False) -> None:
        """Give the port back; connections close (``reset``: are reset) once what was written is sent."""
        self.closing = True
        if self._sweep is not None:
            self._sweep.cancel()
        if self._socket is not None:
            self._socket.close()
        if self._server is not None:
            self._server.close()
        for connection in tuple(self.connections):
            if reset:
                connection.abort()
            else:
                connection.close()
