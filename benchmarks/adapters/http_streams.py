"""HttpStreams: many concurrent streamed completions over keep-alive connections, cheaply.

A protocol class on httptools rather than a general client: per event it costs a few microseconds, so that a thousand
streams do not make the replay itself late. It keeps one rule of its own: a request whose reused connection turns out
closed before any byte of an answer is sent once more on a fresh one.
"""

import asyncio
import ssl
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import urlsplit

from benchmarks.adapters.http_connection import Connection
from benchmarks.replay import Clock, Outcome, ReplayRequest

_IDLE_LIMIT_S = 2.0  # servers close idle connections after 5 s and more


@dataclass(frozen=True, slots=True)
class Target:
    """Where requests go."""

    url: str
    authority: str  # as the host header says it
    host: str
    port: int
    tls: bool
    path: str  # before /v1
    api_key: str | None = None

    @staticmethod
    def of(url: str, api_key: str | None = None) -> "Target":
        """From a base URL, with or without a trailing /v1. Raises ValueError naming what is wrong with it."""
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url!r} is not a URL like http://127.0.0.1:8080")
        tls = parts.scheme == "https"
        path = parts.path.rstrip("/").removesuffix("/v1")
        port = parts.port or (443 if tls else 80)
        authority = parts.netloc.rpartition("@")[2]
        return Target(f"{parts.scheme}://{authority}{path}", authority, parts.hostname, port, tls, path, api_key)

    def message(self, path: str, body: bytes) -> bytes:
        """A whole POST message."""
        key = f"authorization: Bearer {self.api_key}\r\n" if self.api_key else ""
        head = (
            f"POST {self.path}{path} HTTP/1.1\r\nhost: {self.authority}\r\n{key}"
            f"content-type: application/json\r\naccept: text/event-stream\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        return head.encode("latin-1") + body


class HttpStreams:
    """An ``Endpoint`` over real sockets; ``body`` renders the JSON of a request."""

    def __init__(
        self, target: Target, path: str, body: Callable[[ReplayRequest], bytes], clock: Clock, timeout_s: float
    ) -> None:
        self._target = target
        self._path = path
        self._body = body
        self._clock = clock
        self._timeout_s = timeout_s
        self._idle: deque[Connection] = deque()
        self._tls = ssl.create_default_context() if target.tls else None

    async def complete(self, request: ReplayRequest) -> Outcome:
        """Send the request, read the whole stream."""
        message = self._target.message(self._path, self._body(request))
        sent_s = self._clock.now_s()
        connection: Connection | None = None
        failure: str | None
        try:
            async with asyncio.timeout(self._timeout_s):
                connection = await self._connection()
                again = connection.used
                await connection.exchange(message)
                if again and not connection.any_byte:  # closed by the target while it was idle
                    connection.close()
                    connection = await self._fresh()
                    await connection.exchange(message)
            failure = connection.failure()
        except TimeoutError:
            failure = f"no end after {self._timeout_s:g} s"
        except OSError as error:
            failure = f"cannot connect: {error.strerror or error}"
        except asyncio.CancelledError:
            if connection is not None:
                connection.close()
            raise
        end_s = self._clock.now_s()
        if connection is None:
            return Outcome(sent_s, end_s, failure)
        return self._outcome(connection, sent_s, end_s, failure)

    def close(self) -> None:
        """Close the connections that wait for the next request."""
        while self._idle:
            self._idle.pop().close()

    def _outcome(self, connection: Connection, sent_s: float, end_s: float, failure: str | None) -> Outcome:
        if connection.complete and connection.reusable:
            connection.idle_since_s = end_s
            self._idle.append(connection)
        else:
            connection.close()
        reader = connection.reader
        energy_mj = reader.energy_mj if reader.energy_mj is not None else connection.energy_mj
        return Outcome(
            sent_s,
            end_s,
            failure,
            reader.first_s,
            tuple(reader.token_s),
            reader.prompt_tokens,
            reader.completion_tokens,
            None if energy_mj is None else energy_mj / 1000,
        )

    async def _connection(self) -> Connection:
        """The connection used last, if it is still good; else a fresh one."""
        while self._idle:
            connection = self._idle.pop()
            if connection.reusable and self._clock.now_s() - connection.idle_since_s < _IDLE_LIMIT_S:
                return connection
            connection.close()
        return await self._fresh()

    async def _fresh(self) -> Connection:
        _, connection = await asyncio.get_running_loop().create_connection(
            lambda: Connection(self._clock),
            self._target.host,
            self._target.port,
            ssl=self._tls,
        )
        return connection
