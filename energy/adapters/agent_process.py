"""The node agent as a process: a Unix socket or TCP port, the GPUs of its scope, its journal, and how it ends.

Started by ``dynamollm agent`` (see deploy/systemd). On SIGTERM or SIGINT it resets every lock before it goes. It tells
systemd when it is ready, and then with every tick, so that one that hangs is killed and its locks are reset.
"""

import os
import signal
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from energy.adapters.agent_http import AgentApp, CallTimes
from energy.adapters.agent_journal import FileJournal
from energy.adapters.nvml import Nvml
from energy.agent import NodeAgent
from energy.leases import LeaseTable

_SOCKET_MODE = stat.S_IRUSR | stat.S_IWUSR | stat.S_IRGRP | stat.S_IWGRP
_TICKS_A_TTL = 4


@dataclass(frozen=True, slots=True)
class AgentOptions:
    """How an agent is started."""

    gpus: tuple[int, ...] | None  # None: all of the node
    journal: Path
    socket_path: Path | None = None  # else TCP
    host: str = "127.0.0.1"
    port: int = 0
    token: str | None = None
    ttl_s: float = 30.0
    dwell_s: float = 1.0
    node: str = ""  # its name in metrics; empty: the host's


def run(options: AgentOptions) -> None:
    """Serve until SIGTERM. Raises ``GpuError``, ``JournalError``, ``OSError`` where it cannot start."""
    times = CallTimes()
    with _agent(options, times) as agent:
        agent.restore_orphans(time.monotonic())
        listener = _listen(options)
        listener.listen()  # who connects from here on is answered once the server is up
        tick_s = min(1.0, options.ttl_s / _TICKS_A_TTL)
        notify = _Notifier(os.environ.get("NOTIFY_SOCKET"))
        app = AgentApp(agent, time.monotonic, times, options.token, tick_s, notify.alive, _end)
        config = uvicorn.Config(
            app, lifespan="on", ws="none", log_level="warning", access_log=False, timeout_graceful_shutdown=1
        )
        print(f"agent of {len(agent.indices)} GPU(s) on {_address(listener)}", flush=True)
        uvicorn.Server(config).run(sockets=[listener])


def restore(options: AgentOptions) -> tuple[list[str], list[str]]:
    """Reset what a dead agent left locked, and end. Returns the UUIDs reset, and those still locked.

    Raises ``GpuError``, ``JournalError``.
    """
    with _agent(options, CallTimes()) as agent:
        restored = agent.restore_orphans(time.monotonic())
        return restored, list(agent.orphans)


@contextmanager
def _agent(options: AgentOptions, times: CallTimes) -> Iterator[NodeAgent]:
    journal = FileJournal(options.journal)
    try:
        with Nvml(times.observe) as nvml:
            leases = LeaseTable(options.ttl_s, options.dwell_s)
            yield NodeAgent(options.node or socket.gethostname(), nvml.gpus(options.gpus), journal, leases)
    finally:
        journal.close()


def _listen(options: AgentOptions) -> socket.socket:
    if options.socket_path is None:
        family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((options.host, options.port))
        return listener
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    options.socket_path.unlink(missing_ok=True)  # of an agent before this one: the journal has one owner
    before = os.umask(0o777 & ~_SOCKET_MODE)
    try:
        listener.bind(str(options.socket_path))
    finally:
        os.umask(before)
    return listener


def _address(listener: socket.socket) -> str:
    if listener.family == socket.AF_UNIX:
        return f"unix:{listener.getsockname()}"
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def _end() -> None:
    """As if told to from outside: locks are reset on the way."""
    os.kill(os.getpid(), signal.SIGTERM)


class _Notifier:
    """Systemd's readiness and watchdog datagrams; silent where nobody listens."""

    def __init__(self, address: str | None) -> None:
        self._socket: socket.socket | None = None
        if address:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
            self._socket.connect("\0" + address[1:] if address.startswith("@") else address)

    def alive(self) -> None:
        """The agent serves and ticks."""
        if self._socket is not None:
            self._socket.send(b"READY=1\nWATCHDOG=1")
