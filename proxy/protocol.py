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


class _NoEvent:
    def set(self) -> None:
        """Nobody waits."""


_NO_EVENT = _NoEvent()


class Exchange:
    """One relayed request and its answer: the relay's ``ClientPort``; to uvicorn, what its cycle is."""

    __slots__ = (
        "_protocol",
        "arrived",
        "body",
        "chunked",
        "disconnected",
        "head",
        "keep_alive",
        "message_event",
        "path",
        "relay",
        "response_complete",
        "write",
    )

    def __init__(self, protocol: "GatewayProtocol", path: bytes, head: ClientHead, http_1_0: bool) -> None:
        self._protocol = protocol
        self.path = path
        self.head = head
        self.body: list[bytes] = []
        self.arrived = False  # the whole body is here
        self.chunked = not http_1_0
        self.keep_alive = not http_1_0 and protocol.parser.should_keep_alive()
        self.relay: Relay | None = None
        self.write: Callable[[bytes], None] = protocol.transport.write
        self.response_complete = False
        # uvicorn sets these on what it holds as a cycle
        self.disconnected = False
        self.message_event = _NO_EVENT

    def finish(self) -> None:
        """The answer is complete."""
        self._protocol.finished(self)

    def abort(self) -> None:
        """Cut the connection: the answer is not complete."""
        self._protocol.transport.abort()


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
        self._complete: Exchange | None = None
        self._refusal: ApiError | None = None
        self._head_bytes = 0
        self._body_bytes = 0
        self._known_headers: list[tuple[bytes, bytes]] = []  # of the last request
        self._known_head = self.gateway.read_head(())
        self._reading = Reading.HEAD_OR_END
        self._since_s = self.gateway.services.clock()
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
        self._unset_keepalive_if_required()
        if self._reading <= Reading.HEAD:
            self._head_bytes += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            pass  # refused by its head
        except httptools.HttpParserError as error:
            self._refusal = self._refusal or errors.bad_request(f"Invalid HTTP request: {error}")
        if self._refusal is not None:
            self._refuse(self._refusal)
            return
        if self._reading <= Reading.HEAD and self._head_bytes > self.gateway.services.settings.limits.head_bytes:
            self._refuse(errors.head_too_large(self.gateway.services.settings.limits.head_bytes))
            return
        complete = self._complete
        if complete is not None:
            self._complete = None
            self._begin(complete)

    def pause_writing(self) -> None:
        """The client reads too slowly."""
        super().pause_writing()
        self._stalled_since_s = self.gateway.services.clock()
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
        self._length_bytes = 0
        self._length_header: tuple[bytes, bytes] | None = None
        self._reading = Reading.HEAD
        self._since_s = self.gateway.services.clock()

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header; trailers are dropped."""
        if self._reading is not Reading.HEAD:
            return
        if len(name) != 14 or name.lower() != b"content-length":
            self.headers.append((name, value))
        else:
            self._length_bytes = int(value)  # the parser has seen that it is a number
            self._length_header = (b"content-length", value)

    def on_headers_complete(self) -> None:
        """The head is there: relay the request, hand it over, or refuse it."""
        self._reading = Reading.BODY
        self._head_bytes = self._body_bytes = 0
        if self.headers != self._known_headers:
            self._known_headers = self.headers
            self._known_head = self.gateway.read_head(self.headers)
        head, limits = self._known_head, self.gateway.services.settings.limits
        http_1_0 = self.parser.get_http_version() == "1.0"
        refusal = head.refusal(self.url, http_1_0, limits.head_bytes)
        if self.parser.should_upgrade():
            refusal = errors.bad_request("Protocol upgrades are not supported here")
        elif self._length_bytes > limits.body_bytes:
            refusal = errors.body_too_large(limits.body_bytes)
        if refusal is not None:
            self._refusal = self._refusal or refusal
            return
        path = self.url if self.url in READERS else self.url.partition(b"?")[0]
        if path in READERS and self.parser.get_method() == b"POST":
            self._accept(Exchange(self, path, head, http_1_0))
        else:
            self._hand_over()

    def on_body(self, body: bytes) -> None:
        """Some of a body."""
        if self._refusal is not None:
            return
        self._body_bytes += len(body)
        if self._body_bytes > self.gateway.services.settings.limits.body_bytes:
            self._refusal = errors.body_too_large(self.gateway.services.settings.limits.body_bytes)
        elif isinstance(self.cycle, Exchange):
            self.cycle.body.append(body)
        else:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """A request is whole."""
        self._reading = Reading.NOTHING
        exchange = self.cycle
        if self._refusal is not None:
            return
        if not isinstance(exchange, Exchange):
            super().on_message_complete()
            return
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
        if cycle.head.expects_continue and not cycle.arrived:
            self.transport.write(wire.CONTINUE)
        if cycle.arrived:
            self._begin(cycle)

    # Inside

    def _accept(self, exchange: Exchange) -> None:
        self.cycle = exchange
        if self._active is None:
            self._start_asgi_task(exchange, self.app)
            return
        self.pipeline.appendleft((exchange, self.app))
        limit = self.gateway.services.settings.limits.pipelined_requests
        if len(self.pipeline) >= limit:
            self.flow.pause_reading()
        if len(self.pipeline) > 16 * limit:  # all in what was read before the pause
            self._refusal = errors.bad_request("Too many pipelined requests")

    def _hand_over(self) -> None:
        """Give the request to uvicorn's own path, as if it had read the head itself."""
        url, headers = self.url, self.headers
        super().on_message_begin()
        self.url = url
        self.headers += [(name.lower(), value) for name, value in headers]
        if self._length_header is not None:
            self.headers.append(self._length_header)
        self.expect_100_continue = self._known_head.expects_continue
        if self.cycle is not None and self._active is None:
            self.cycle = None
        super().on_headers_complete()

    def _begin(self, exchange: Exchange) -> None:
        body = exchange.body[0] if len(exchange.body) == 1 else b"".join(exchange.body)
        exchange.body = []
        self.gateway.begin(exchange, body)

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
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self._reading is Reading.NOTHING:
            self._reading = Reading.HEAD_OR_END
            self._since_s = self.gateway.services.clock()
        if self._advancing:  # called from within the loop below
            return
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
        elif self._reading is Reading.HEAD and now_s - self._since_s > deadlines.head_s:
            self._refuse(errors.slow_client("head", deadlines.head_s))
        elif self._reading is Reading.BODY and now_s - self._since_s > deadlines.head_s + deadlines.body_s:
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
