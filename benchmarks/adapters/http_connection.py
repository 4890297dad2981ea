"""Connection: one HTTP connection of a replay, read with httptools; one exchange at a time. Knows no request."""

import asyncio
from typing import cast

import httptools

from benchmarks.replay import Clock
from benchmarks.replay_stream import StreamReader, status_reason

_ERROR_BODY_BYTES = 16_384


class Connection(asyncio.Protocol):
    """One connection; carries one exchange at a time."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._parser = httptools.HttpResponseParser(self)
        self._now_s = 0.0
        self.transport: asyncio.Transport | None = None
        self.used = False
        self.idle_since_s = 0.0
        self.reusable = False
        self._lost = False
        self._ended: asyncio.Future[None] | None = None
        self._begin()

    def _begin(self) -> None:
        self.reader = StreamReader()
        self.status = 0
        self.any_byte = False
        self.complete = False
        self.dropped_reason: str | None = None
        self.energy_mj: float | None = None
        self.error_body = b""
        self.broken: str | None = None

    async def exchange(self, message: bytes) -> None:
        """Write the message; return when the answer is whole or the connection is lost."""
        assert self.transport is not None
        self._begin()
        if self._lost:  # closed between being opened and being used
            return
        self._ended = asyncio.get_running_loop().create_future()
        self.transport.write(message)
        await self._ended

    def close(self) -> None:
        """Drop the connection and what is on it."""
        self.reusable = False
        if self.transport is not None:
            self.transport.abort()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """It is open."""
        self.transport = cast(asyncio.Transport, transport)
        self.reusable = True

    def data_received(self, data: bytes) -> None:
        """Parse; what is in it came now."""
        self.any_byte = True
        self._now_s = self._clock.now_s()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self.broken = f"not HTTP: {error}"
            self.close()
            self._finish()

    def connection_lost(self, exc: Exception | None) -> None:
        """It is closed, by either side."""
        self.reusable = False
        self._lost = True
        self._finish()

    def _finish(self) -> None:
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(None)

    # httptools

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header or a trailer."""
        lowered = name.lower()
        if lowered == b"x-dynamollm-energy-mj":
            try:
                self.energy_mj = float(value)
            except ValueError:
                self.energy_mj = None
        elif lowered == b"x-llm-d-request-dropped-reason":
            self.dropped_reason = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        """The status is known."""
        self.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        """A piece of the answer, without its framing."""
        if self.status == 200:
            self.reader.feed(body, self._now_s)
        elif len(self.error_body) < _ERROR_BODY_BYTES:
            self.error_body += body

    def on_message_complete(self) -> None:
        """The answer is whole."""
        if self.status < 200:  # interim answers
            return
        self.complete = True
        self.used = True
        self.reusable = self.reusable and self._parser.should_keep_alive()
        self._finish()

    # what became of it

    def failure(self) -> str | None:
        """Why the exchange did not end well; None if it did."""
        if self.broken is not None:
            return self.broken
        if self.status and self.status != 200:
            return status_reason(self.status, self.error_body, self.dropped_reason)
        if self.reader.failure is not None:
            return self.reader.failure
        if not self.any_byte:
            return "connection closed without an answer"
        if not self.complete:
            return "connection closed in the middle of the answer"
        if not self.reader.done:
            return "the stream ended without [DONE]"
        return None
