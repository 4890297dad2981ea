"""VirtualTimeLoop: an asyncio event loop on which waiting takes no time.

When every task waits for a timer, the loop's clock jumps to the next one instead of sleeping, so an hour of back-offs
and ticks runs in milliseconds and in the same order every time. Sockets and threads still work, in real time: the
clock jumps only where nothing is ready and no thread of the loop is at work. A kernel may take its time to carry bytes
over TCP, even to itself, and the clock would jump meanwhile; so a connection to a server of the same loop is a pair of
sockets, whose bytes are there at once. For tests and for the parity of live control with the simulator; never serves.
"""

import asyncio
import selectors
import socket
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

THREAD_PATIENCE_S = 5.0  # how long a thread is waited for, in real time; one that works longer sees the clock jump


class _JumpingSelector(selectors.DefaultSelector):
    """A selector that, where it would sleep for a timer, asks for the clock to be moved instead."""

    def __init__(self) -> None:
        super().__init__()
        self.jumped_s = 0.0
        self.threads = 0  # at work for the loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Return ready descriptors; without any, jump over ``timeout``. None blocks: only a thread can go on."""
        if timeout is None:
            return super().select(None)
        ready = super().select(THREAD_PATIENCE_S if self.threads and timeout > 0 else 0)
        if not ready and timeout > 0:
            self.jumped_s += timeout
        return ready


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """An event loop whose ``time()`` starts at ``start_s`` and moves only by jumps."""

    def __init__(self, start_s: float = 0.0) -> None:
        self._start_s = start_s
        self._jumping = _JumpingSelector()
        self._served: dict[int, tuple[asyncio.Server, Callable[[], asyncio.BaseProtocol]]] = {}  # by port
        super().__init__(self._jumping)

    def time(self) -> float:
        """Virtual seconds."""
        return self._start_s + self._jumping.jumped_s

    def run_in_executor(self, executor: Any, function: Callable[..., Any], *arguments: Any) -> asyncio.Future[Any]:  # type: ignore[override]
        """As any loop; the clock stands still until the thread has ended."""
        self._jumping.threads += 1
        future = super().run_in_executor(executor, function, *arguments)
        future.add_done_callback(self._thread_ended)
        return future

    def _thread_ended(self, future: asyncio.Future[Any]) -> None:
        self._jumping.threads -= 1

    async def create_server(
        self, protocol_factory: Callable[[], asyncio.BaseProtocol], *arguments: Any, **options: Any
    ) -> asyncio.Server:
        """As any loop; remembered by port."""
        server = await super().create_server(protocol_factory, *arguments, **options)
        for listener in server.sockets:
            if listener.family in (socket.AF_INET, socket.AF_INET6):
                self._served[listener.getsockname()[1]] = server, protocol_factory
        return server

    async def create_connection(
        self,
        protocol_factory: Callable[[], asyncio.BaseProtocol],
        host: str | None = None,
        port: int | None = None,
        **options: Any,
    ) -> Any:
        """As any loop; to a server of its own, over a pair of sockets. Raises ``OSError``."""
        server, accept = self._served.get(port or 0, (None, None))
        if server is None or accept is None or not server.is_serving():
            return await super().create_connection(protocol_factory, host, port, **options)  # type: ignore[arg-type]
        near, far = socket.socketpair()
        near.setblocking(False)
        far.setblocking(False)
        await self.connect_accepted_socket(accept, far)
        return await super().create_connection(protocol_factory, sock=near)


def run(main: Coroutine[Any, Any, T], start_s: float = 0.0) -> T:
    """Run a coroutine to its end in virtual time, as ``asyncio.run`` does in real time."""
    with asyncio.Runner(loop_factory=lambda: VirtualTimeLoop(start_s)) as runner:
        return runner.run(main)
