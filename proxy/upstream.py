"""Upstream: connections to instances, kept alive and used again. Reads with httptools; decides nothing about requests.

One connection serves one relay at a time. Its life:

    DIALLING -> BUSY -> IDLE -> BUSY -> ... -> CLOSED

A connection that was used before and dies before a byte of the answer came was closed by the instance while idle: the
same request is sent on a fresh one, once, unseen by the relay. Bytes nobody asked for (a second answer, data on an idle
connection) are a breach of the protocol: nothing of the segment they came in is passed on.
"""

import asyncio
from collections.abc import Callable
from enum import IntEnum
from typing import cast

import httptools

from proxy.heads import InstanceHead
from proxy.relay import Failure, Relay
from proxy.services import Address
from proxy.settings import ProxySettings

_INTERIM = 200  # statuses below are not the answer yet


class Phase(IntEnum):
    """Where a connection is in its life."""

    DIALLING = 0
    BUSY = 1
    IDLE = 2
    CLOSED = 3


_DIALLING, _BUSY, _IDLE, _CLOSED = Phase  # looking a member up takes longer than comparing it


class Connection(asyncio.Protocol):
    """One connection to one instance; to a relay, its ``Link``."""

    __slots__ = (
        "_address",
        "_clock",
        "_complete",
        "_dial",
        "_fresh",
        "_head",
        "_headers",
        "_keep_alive",
        "_known_headers",
        "_length_at",
        "_length_name",
        "_message",
        "_parser",
        "_pieces",
        "_pool",
        "_relay",
        "_silent",
        "_status",
        "_surplus",
        "_told",
        "_transport",
        "_until_eof",
        "idle_since_s",
        "on_body",
        "phase",
    )

    def __init__(self, pool: "ConnectionPool", address: Address) -> None:
        self._pool = pool
        self._clock = pool.clock
        self._address = address
        self._transport: asyncio.Transport | None = None
        self._pieces: list[bytes] = []  # of the body, from one segment
        self.on_body = self._pieces.append  # for the parser: nothing is interpreted for each
        self._parser = httptools.HttpResponseParser(self)
        self._relay: Relay | None = None
        self._message = b""
        self._dial: asyncio.Task[None] | None = None
        self._fresh = True  # never used before
        self.phase = _DIALLING
        self.idle_since_s = 0.0
        # the head of the last answer, and where its length stood and how it was spelled
        self._known_headers: list[tuple[bytes, bytes]] = []
        self._head = InstanceHead(0, ())
        self._length_at = 0
        self._length_name = b""
        # of the present answer
        self._status = 0
        self._headers: list[tuple[bytes, bytes]] = []
        self._keep_alive = False
        self._complete = False
        self._surplus = False
        self._until_eof = True
        self._silent = True
        self._told = False  # its head, to the relay

    # For the relay

    def abort(self) -> None:
        """Close now; the relay hears nothing more."""
        self._relay = None
        self._close()

    def pause_reading(self) -> None:
        """Stop reading the answer: the instance feels it through TCP."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        """Go on."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    # For the pool

    def carry(self, message: bytes, relay: Relay) -> None:
        """Send a request and give its answer to ``relay``."""
        self._message = message
        self._relay = relay
        if self.phase is _IDLE and self._transport is not None:
            self.phase = _BUSY
            self._expect_answer()
            self._transport.write(message)
        else:
            self._dial = asyncio.get_running_loop().create_task(self._connect())

    @property
    def usable(self) -> bool:
        """Whether it is idle and still open."""
        return self.phase is _IDLE and self._transport is not None and not self._transport.is_closing()

    def close(self) -> None:
        """Close an idle connection."""
        self._close()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The instance accepted."""
        self._transport = cast(asyncio.Transport, transport)
        if self._relay is None:  # given up while dialling
            self._close()
            return
        self._begin()

    def data_received(self, data: bytes) -> None:
        """Bytes of the answer, or of nobody's."""
        relay = self._relay
        if relay is None:
            self._close()
            return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self._fail(Failure.BROKEN)
            return
        if self._surplus:
            self._fail(Failure.BROKEN)
            return
        try:
            if not self._told:
                self._silent = False
                if self._status < _INTERIM:
                    return
                self._told = True
                relay.head(self._read_head())
            pieces = self._pieces
            if pieces:
                payload = pieces.pop()
                if pieces:
                    payload = b"".join((*pieces, payload))
                    pieces.clear()
                relay.body(payload, self._clock())
            if self._complete and self._relay is relay:  # it may have turned away in the middle
                self._release(relay)
        except Exception:  # a fault of ours: no client shall wait for what never comes
            if self._relay is relay:
                self._fail(Failure.BROKEN)
            else:
                relay.broken(Failure.BROKEN, self._clock())
            raise

    def connection_lost(self, exc: Exception | None) -> None:
        """The instance closed, or it was closed here."""
        relay = self._relay
        self._transport = None
        if relay is not None and self._silent and not self._fresh:
            self._start_over()
            return
        self._forget()
        if relay is None:
            return
        self._relay = None
        if self._until_eof and exc is None and self._status >= _INTERIM:
            relay.end(self._clock())
        else:
            relay.broken(Failure.BROKEN, self._clock())

    # httptools

    def on_message_begin(self) -> None:
        """A status line begins: the answer's, or one too many."""
        if self._complete:
            self._surplus = True

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header; trailers are dropped."""
        if not self._status:
            self._headers.append((name, value))

    def on_headers_complete(self) -> None:
        """The head is there; interim ones (1xx) are dropped."""
        if self._complete:
            return
        parser, headers, at = self._parser, self._headers, self._length_at
        status = self._status = parser.get_status_code()
        self._keep_alive = parser.should_keep_alive()  # the parser forgets it with the message's end
        # the length is no part of the head: it differs from answer to answer
        if at >= len(headers) or headers[at][0] != self._length_name:
            at = self._find_length(headers)
        if at < len(headers):
            del headers[at]
            self._until_eof = False
        elif status in (204, 304):
            self._until_eof = False
        else:
            self._until_eof = not any(name.lower() == b"transfer-encoding" for name, _ in headers)

    def on_message_complete(self) -> None:
        """The answer, or an interim one, is complete."""
        if self._status < _INTERIM:
            self._status = 0
            self._headers = []
            self._until_eof = True
        else:
            self._complete = True

    # Inside

    async def _connect(self) -> None:
        loop = asyncio.get_running_loop()
        address = self._address
        try:
            async with asyncio.timeout(self._pool.settings.deadlines.connect_s):
                await loop.create_connection(lambda: self, address.host, address.port)
        except (OSError, TimeoutError):
            self._dial = None
            self._fail(Failure.UNREACHABLE)
        else:
            self._dial = None

    def _find_length(self, headers: list[tuple[bytes, bytes]]) -> int:
        """Where the length of the body stands; beyond the end where it does not."""
        for at, (name, _) in enumerate(headers):
            if len(name) == 14 and name.lower() == b"content-length":
                self._length_at, self._length_name = at, name
                return at
        return len(headers)

    def _begin(self) -> None:
        self.phase = _BUSY
        self._expect_answer()
        assert self._transport is not None
        self._transport.write(self._message)

    def _expect_answer(self) -> None:
        self._status = 0
        self._headers = []
        self._complete = False
        self._surplus = False
        self._until_eof = True
        self._silent = True
        self._told = False

    def _start_over(self) -> None:
        """The connection had gone stale: the same request on a fresh one."""
        self.phase = _DIALLING
        self._fresh = True
        self._parser = httptools.HttpResponseParser(self)
        self._dial = asyncio.get_running_loop().create_task(self._connect())

    def _read_head(self) -> InstanceHead:
        """The head of the answer; mostly it is that of the last one."""
        if self._head.status != self._status or self._known_headers != self._headers:
            self._known_headers = self._headers
            self._head = InstanceHead(self._status, self._headers)
        return self._head

    def _release(self, relay: Relay) -> None:
        """The answer is complete: back to the idle ones where it can be used again."""
        now_s = self._clock()
        transport = self._transport
        self._relay = None
        self._message = b""
        self._fresh = False
        if (
            transport is not None
            and self._keep_alive
            and not transport.is_closing()
            and not transport.get_write_buffer_size()
        ):
            self.phase = _IDLE
            self.idle_since_s = now_s
            self._pool.keep(self._address, self)
        else:
            self._close()
        relay.end(now_s)

    def _fail(self, failure: Failure) -> None:
        relay, self._relay = self._relay, None
        self._close()
        if relay is not None:
            relay.broken(failure, self._clock())

    def _close(self) -> None:
        self._forget()
        if self._dial is not None:
            self._dial.cancel()
        if self._transport is not None:
            self._transport.abort()

    def _forget(self) -> None:
        if self.phase is not _CLOSED:
            self._pool.forget(self._address, self)
            self.phase = _CLOSED


class ConnectionPool:
    """The connections of one gateway process to all instances."""

    def __init__(self, settings: ProxySettings, clock: Callable[[], float]) -> None:
        self.settings = settings
        self.clock = clock
        self._idle: dict[Address, list[Connection]] = {}  # the longest idle first
        self._open: dict[Address, int] = {}

    def send(self, address: Address, message: bytes, relay: Relay) -> Connection | None:
        """Carry a request on an idle connection, else on a new one; None where that would be one too many."""
        idle = self._idle.get(address)
        while idle:
            connection = idle.pop()
            if connection.usable:
                connection.carry(message, relay)
                return connection
        if self._open.get(address, 0) >= self.settings.limits.upstream_connections:
            return None
        self._open[address] = self._open.get(address, 0) + 1
        connection = Connection(self, address)
        connection.carry(message, relay)
        return connection

    def keep(self, address: Address, connection: Connection) -> None:
        """A connection is idle."""
        idle = self._idle.get(address)
        if idle is None:
            idle = self._idle[address] = []
        idle.append(connection)

    def forget(self, address: Address, connection: Connection) -> None:
        """A connection is closed."""
        left = self._open[address] - 1
        idle = self._idle.get(address)
        if connection.phase is _IDLE and idle and connection in idle:
            idle.remove(connection)
        if left:
            self._open[address] = left
        else:
            del self._open[address]
            self._idle.pop(address, None)

    def expire(self, now_s: float) -> None:
        """Close what has been idle for too long."""
        oldest_s = now_s - self.settings.deadlines.upstream_idle_s
        for idle in list(self._idle.values()):
            while idle and idle[0].idle_since_s < oldest_s:
                idle[0].close()

    def close(self) -> None:
        """Close all idle connections."""
        for idle in list(self._idle.values()):
            for connection in list(idle):
                connection.close()

    @property
    def open_connections(self) -> int:
        """How many are open or being opened."""
        return sum(self._open.values())
