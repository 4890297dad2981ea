"""One emulator process: its nodes, their agents, its control endpoint, and how it ends.

It says where it listens in one line of JSON on standard output. It ends on SIGTERM or SIGINT (running requests get
``shutdown_timeout_s``) and, with ``watch_stdin``, as soon as its standard input closes: whoever started it holds the
other end of that pipe, so it cannot outlive them, however they die.
"""

import asyncio
import json
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import uvloop

from energy.gpus import gpu_physics
from simulator.emulator.adapters.control import Control
from simulator.emulator.adapters.http import HttpServer
from simulator.emulator.adapters.node_agent import NodeAgent
from simulator.emulator.gpus import make_node


@dataclass(frozen=True, slots=True)
class NodeOptions:
    """One emulated machine; its agent listens on ``agent_port`` (0: any)."""

    name: str
    gpu: str = "H100-SXM"
    gpus: int = 8
    agent_port: int = 0


@dataclass(frozen=True, slots=True)
class ProcessOptions:
    """How one emulator process is started."""

    nodes: Sequence[NodeOptions]
    host: str = "127.0.0.1"
    control_port: int = 0
    shutdown_timeout_s: float = 0.0
    watch_stdin: bool = False


class EmulatorProcess:
    """Control endpoint and node agents, listening; to be used within an event loop."""

    def __init__(self, options: ProcessOptions) -> None:
        self._options = options
        now_s = asyncio.get_running_loop().time()
        self._nodes = {n.name: make_node(n.name, n.gpus, gpu_physics(n.gpu), now_s) for n in options.nodes}
        self._servers: list[HttpServer] = []
        self.agent_urls: dict[str, str] = {}
        for node in options.nodes:
            agent = NodeAgent(self._nodes[node.name])
            self.agent_urls[node.name] = self._bind(HttpServer(agent.handle), node.agent_port)
        self.control = Control(self._nodes, self.agent_urls, options.host)
        # the stream of events is idle for long; nobody else keeps a connection open
        self.control_url = self._bind(HttpServer(self.control.handle), options.control_port)

    def _bind(self, server: HttpServer, port: int) -> str:
        host = self._options.host
        self._servers.append(server)
        return f"http://{f'[{host}]' if ':' in host else host}:{server.bind(host, port)}"

    async def listen(self) -> None:
        """Open the ports."""
        for server in self._servers:
            await server.listen()

    async def close(self, grace_s: float = 0.0) -> None:
        """Stop the instances, then close the ports."""
        await self.control.close(grace_s)
        for server in self._servers:
            server.close()


async def serve(options: ProcessOptions) -> None:
    """Run until told to end."""
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    if options.watch_stdin:
        # at once, and without asking anybody: the parent is gone
        loop.add_reader(sys.stdin.fileno(), _end_if_parent_is_gone)
    process = EmulatorProcess(options)
    await process.listen()
    print(json.dumps({"control_url": process.control_url, "agent_urls": process.agent_urls}), flush=True)
    await ended.wait()
    await process.close(options.shutdown_timeout_s)


def _end_if_parent_is_gone() -> None:
    with suppress(BlockingIOError):
        if os.read(sys.stdin.fileno(), 4096) == b"":
            os._exit(0)


def run(options: ProcessOptions) -> None:
    """Run in this process until told to end."""
    uvloop.run(serve(options))
