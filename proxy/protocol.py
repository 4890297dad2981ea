"""GatewayProtocol: a client's connection. uvicorn's own protocol, but relayed requests never become ASGI.

POST /v1/chat/completions and /v1/completions are read whole and given to a ``Relay``; everything else goes to the
FastAPI application as uvicorn would do it. Both share one connection, in any order, pipelined or not.

Guards for what the parser lets through: late or large heads and bodies, no or several Host, absolute-form targets,
upgrades, trailers, a parse error in the middle of somebody's answer.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from enum import IntEnum
from typing import TYPE_CHECKING, Any, cast

import httptools
import msgspec
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from proxy import errors, wire
from proxy.errors import ApiError
from proxy.fields import READERS
from proxy.heads import ClientHead
from proxy.relay import Relay

if TYPE_CHECKING:
    from proxy.gateway import Gateway


class Reading(IntEnum):
    """What the connection waits for."""

    HEAD_OR_END = 0  # nothing begun
    HEAD = 1
    BODY = 2
    NOTHING = 3  # a whole request is there


_HEAD_OR_END, _HEAD, _BODY, _NOTHING = Reading  # looking a member up takes longer than comparing it


class _NoEvent:
    def set(self) -> None:
        """Nobody waits."""


class _NoTrailers(list[Any]):
    """What is put here is gone."""

    def append(self, header: Any) -> None:
        """Drop it."""


class Route(msgspec.Struct, frozen=True):
    """What became of a request's line and head: a connection mostly sends the same again."""

    url: bytes
    method: bytes
    http_1_0: bool
    head: ClientHead
    path: bytes | None  # the relayed path; None: the application's
    refusal: ApiError | None


_NO_EVENT = _NoEvent()
_NO_ROUTE = Route(b"", b"", False, ClientHead((), (0.0, 0.0)), None, None)


class Exchange(msgspec.Struct, eq=False):
    """One relayed request and its answer: the relay's ``ClientPort``; to uvicorn, what its cycle is."""

    protocol: "GatewayProtocol"
    path: bytes
    head: ClientHead
    chunked: bool
    keep_alive: bool
    write: Callable[[bytes], None]
    body: list[bytes] = []
    arrived: bool = False  # the whole body is here
    relay: Relay | None = None
    response_complete: bool = False
    # uvicorn sets these on what it holds as a cycle
    disconnected: bool = False
    message_event: _NoEvent = _NO_EVENT

    def finish(self) -> None:
        """The answer is complete."""
        self.protocol.finished(self)

    def abort(self) -> None:
        """Cut the connection: the answer is not complete."""
        self.protocol.transport.abort()


class GatewayProtocol(HttpToolsProtocol):
    """See the module's docstring. ``gateway`` is set by the class that ``Gateway.protocol`` makes."""

    gateway: "Gateway"
    pipeline: deque[tuple[Any, Any]]
    cycle: Any

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client connected."""
        super().connection_made(cast(asyncio.Transport, transport))
        self._active: Any = None  # what is being answered: an Exchange or a cycle of uvicorn's
        self._advancing = False
        self._incoming: Exchange | None = None  # what is being read, where it is to be relayed
        self._complete: Exchange | None = None
        self._refusal: ApiError | None = None
        self._head_bytes = 0
        self._body_bytes = 0
        self._limits = self.gateway.services.settings.limits
        self._route = _NO_ROUTE  # of the last request, and with it:
        self._known_headers = [(b"", b"")]  # no request's
        self._length_at = 0  # where among its headers its length stood, and how it was spelled
        self._length_name = b""
        self._reading = _HEAD_OR_END
        self._since_s = self.gateway.now_s
        self._stalled_since_s: float | None = None
        self.gateway.connected(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone: so is what it asked for."""
        self.gateway.disconnected(self)
        active, self._active = self._active, None
        if active is not None:
            active.disconnected = True
            active.message_event.set()
        if isinstance(active, Exchange) and active.relay is not None:
            active.relay.client_gone(self.gateway.services.clock())
            active.relay = None
        self.pipeline.clear()
        super().connection_lost(exc)
        self.cycle = None

    def data_received(self, data: bytes) -> None:
        """Bytes of requests: parse them, then start what is whole."""
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            pass  # refused by its head
        except httptools.HttpParserError as error:
            self._refusal = self._refusal or errors.bad_request(f"Invalid HTTP request: {error}")
        if self._refusal is not None:
            self._refuse(self._refusal)
            return
        if self._reading <= _HEAD:  # still: a head that is complete has been measured
            self._head_bytes += len(data)
            if self._head_bytes > self._limits.head_bytes:
                self._refuse(errors.head_too_large(self._limits.head_bytes))
                return
        complete = self._complete
        if complete is not None:
            self._complete = None
            self._begin(complete)

    def pause_writing(self) -> None:
        """The client reads too slowly."""
        super().pause_writing()
        self._stalled_since_s = self.gateway.now_s
        if isinstance(self._active, Exchange) and self._active.relay is not None:
            self._active.relay.pause()

    def resume_writing(self) -> None:
        """The client has caught up."""
        super().resume_writing()
        self._stalled_since_s = None
        if isinstance(self._active, Exchange) and self._active.relay is not None:
            self._active.relay.resume()

    def shutdown(self) -> None:
        """Stop after the present answer; uvicorn calls it when it is told to stop."""
        self.gateway.drain()
        if self._active is None:
            self.transport.close()
        else:
            self._active.keep_alive = False
            self.pipeline.clear()

    # httptools

    def on_message_begin(self) -> None:
        """A request line begins."""
        self.url = b""
        self.headers = []
        self._reading = _HEAD
        self._since_s = self.gateway.now_s

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header."""
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        """The head is there: relay the request, hand it over, or refuse it."""
        self._reading = _BODY
        self._head_bytes = self._body_bytes = 0
        headers, parser, at = self.headers, self.parser, self._length_at
        # the length is no part of the head: it differs from request to request
        if at >= len(headers) or headers[at][0] != self._length_name:
            at = self._find_length(headers)
        length = headers.pop(at) if at < len(headers) else None
        route, url, method = self._route, self.url, parser.get_method()
        http_1_0 = parser.get_http_version() == "1.0"
        if (
            headers != self._known_headers
            or url != route.url
            or method != route.method
            or http_1_0 is not route.http_1_0
        ):
            route = self._find_route(url, method, http_1_0, headers)
        refusal = route.refusal
        if length is not None and int(length[1]) > self._limits.body_bytes:  # the parser has seen that it is a number
            refusal = refusal or errors.body_too_large(self._limits.body_bytes)
        if refusal is not None:
            self._refusal = self._refusal or refusal
        elif route.path is None:
            self._incoming = None
            self._hand_over(length)
        else:
            keep_alive = not http_1_0 and parser.should_keep_alive()
            exchange = Exchange(self, route.path, route.head, not http_1_0, keep_alive, self.transport.write)
            self.cycle = self._incoming = exchange
            if self._active is None:
                self._active = exchange
                if route.head.expects_continue:
                    self.transport.write(wire.CONTINUE)
            else:
                self._put_behind(exchange)
        if length is None:
            self.headers = _NoTrailers()

    def on_body(self, body: bytes) -> None:
        """Some of a body."""
        exchange = self._incoming
        if self._refusal is not None:
            return
        self._body_bytes += len(body)
        if self._body_bytes > self._limits.body_bytes:
            self._refusal = errors.body_too_large(self._limits.body_bytes)
        elif exchange is not None:
            exchange.body.append(body)
        else:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """A request is whole."""
        self._reading = _NOTHING
        exchange = self._incoming
        if self._refusal is not None:
            return
        if exchange is None:
            super().on_message_complete()
            return
        self._incoming = None
        exchange.arrived = True
        if exchange is self._active:
            self._complete = exchange

    # uvicorn

    def on_response_complete(self) -> None:
        """The application has answered: the next pipelined request, or wait for one."""
        self._next()

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        self._active = cycle
        if not isinstance(cycle, Exchange):
            super()._start_asgi_task(cycle, app)
            return
        if cycle.arrived:
            self._begin(cycle)
        elif cycle.head.expects_continue:
            self.transport.write(wire.CONTINUE)

    # Inside

    def _find_length(self, headers: list[tuple[bytes, bytes]]) -> int:
        """Where the length of the body stands; beyond the end where it does not."""
        for at, (name, _) in enumerate(headers):
            if len(name) == 14 and name.lower() == b"content-length":
                self._length_at, self._length_name = at, name
                return at
        return len(headers)

    def _find_route(self, url: bytes, method: bytes, http_1_0: bool, headers: list[tuple[bytes, bytes]]) -> Route:
        """Read a request's line and head that are not those of the last one."""
        head = self._route.head if headers == self._known_headers else self.gateway.read_head(headers)
        if self.parser.should_upgrade():
            refusal: ApiError | None = errors.bad_request("Protocol upgrades are not supported here")
        else:
            refusal = head.refusal(url, http_1_0, self._limits.head_bytes)
        path = url.partition(b"?")[0]
        relayed = path in READERS and method == b"POST"
        self._known_headers = headers
        self._route = Route(url, method, http_1_0, head, path if relayed else None, refusal)
        return self._route

    def _put_behind(self, exchange: Exchange) -> None:
        """Another request is being answered: this one waits, and after some the client, too."""
        self.pipeline.appendleft((exchange, self.app))
        limit = self._limits.pipelined_requests
        if len(self.pipeline) >= limit:
            self.flow.pause_reading()
        if len(self.pipeline) > 16 * limit:  # all in what was read before the pause
            self._refusal = errors.bad_request("Too many pipelined requests")

    def _hand_over(self, length: tuple[bytes, bytes] | None) -> None:
        """Give the request to uvicorn's own path, as if it had read the head itself."""
        url, headers = self.url, self.headers
        super().on_message_begin()
        self.url = url
        self.headers += [(name.lower(), value) for name, value in headers]
        if length is not None:
            self.headers.append((b"content-length", length[1]))
        self.expect_100_continue = self._route.head.expects_continue
        if self.cycle is not None and self._active is None:
            self.cycle = None
        super().on_headers_complete()

    def _begin(self, exchange: Exchange) -> None:
        pieces, exchange.body = exchange.body, []
        self.gateway.begin(exchange, pieces[0] if len(pieces) == 1 else b"".join(pieces))

    def finished(self, exchange: Exchange) -> None:
        """An exchange is answered."""
        exchange.response_complete = True
        exchange.relay = None  # they hold each other: let both go now, not when the collector comes
        if exchange is not self._active:
            return
        if not exchange.keep_alive:
            self._active = None
            self.transport.close()
            return
        self._next()

    def _next(self) -> None:
        self.server_state.total_requests += 1
        self._active = None
        if self._reading is _NOTHING:
            self._reading = _HEAD_OR_END
            self._since_s = self.gateway.now_s
        if self.flow.read_paused and not self.transport.is_closing():
            self.flow.resume_reading()
        if self.pipeline and not self._advancing:  # else called from within the loop of ``_advance``
            self._advance()

    def _advance(self) -> None:
        self._advancing = True
        try:
            while self.pipeline and self._active is None and not self.transport.is_closing():
                self._start_asgi_task(*self.pipeline.pop())
        finally:
            self._advancing = False

    def _refuse(self, error: ApiError) -> None:
        """Tell and close; in the middle of an answer there is nobody to tell."""
        self._refusal = None
        self.gateway.services.metrics.refused.add((str(error.status),))
        active = self._active
        if active is not None and not (isinstance(active, Exchange) and active.relay is None):
            self.transport.abort()
            return
        self._active = None
        self.transport.write(wire.error_answer(error, b"", keep_alive=False))
        self.transport.close()

    def check_deadlines(self, now_s: float) -> None:
        """Called now and then by the gateway."""
        deadlines = self.gateway.services.settings.deadlines
        active = self._active
        if self._stalled_since_s is not None and now_s - self._stalled_since_s > deadlines.stalled_client_s:
            self.transport.abort()
        elif isinstance(active, Exchange) and active.relay is not None:
            active.relay.check_deadlines(now_s)
        elif self._reading is _HEAD and now_s - self._since_s > deadlines.head_s:
            self._refuse(errors.slow_client("head", deadlines.head_s))
        elif self._reading is _BODY and now_s - self._since_s > deadlines.head_s + deadlines.body_s:
            self._refuse(errors.slow_client("body", deadlines.body_s))
        elif active is None and now_s - self._since_s > deadlines.keep_alive_s:
            self.transport.close()

    def stop(self, now_s: float) -> None:
        """The grace is over: end what is still running."""
        active = self._active
        if isinstance(active, Exchange) and active.relay is not None:
            active.keep_alive = False
            active.relay.shutdown(now_s)
        else:
            self.transport.close()
