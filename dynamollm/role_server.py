"""What a role's process runs beside its HTTP server, and how both end: together, at the first signal or failure."""

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Coroutine, Iterator
from typing import Any

import uvicorn


class RoleServer(uvicorn.Server):
    """A uvicorn server that leaves the signals to us: it would re-raise them before the rest has ended."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM end the server gracefully; a second one at once."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal)
        yield

    def _on_signal(self) -> None:
        self.force_exit = self.should_exit
        self.should_exit = True


def end_with_stdin(server: uvicorn.Server) -> None:
    """End the server when standard input does: whoever held the other end is gone. Within a running loop."""
    loop = asyncio.get_running_loop()

    def read() -> None:
        with contextlib.suppress(BlockingIOError):
            if not os.read(sys.stdin.fileno(), 4096):
                loop.remove_reader(sys.stdin.fileno())
                server.should_exit = True

    loop.add_reader(sys.stdin.fileno(), read)


async def serve_beside(
    server: RoleServer, sockets: list[socket.socket], *beside: Coroutine[Any, Any, None], watch_stdin: bool = False
) -> None:
    """Serve until told to end, or until the first of ``beside`` ends; raises what that raised."""
    if watch_stdin:
        end_with_stdin(server)
    tasks = [asyncio.create_task(each) for each in beside]
    serving = asyncio.create_task(server.serve(sockets=sockets))
    await asyncio.wait((serving, tasks[0]), return_when=asyncio.FIRST_COMPLETED)
    server.should_exit = True
    await serving
    for task in tasks:
        task.cancel()
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(result, Exception):
            raise result
