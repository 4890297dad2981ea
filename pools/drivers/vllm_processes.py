"""EngineProcess: one ``vllm serve`` and its children, from spawning, or from when it was found, to the last one's end.

Each stands in a session of its own: Ctrl-C in the terminal reaches the gateway alone, and one signal to its group
reaches the engine processes it has made. Whoever answers for one that it did not start holds a claim on it, which the
kernel takes back when that process ends. Linux only, as the GPUs' drivers are.
"""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Awaitable, Mapping, Sequence
from pathlib import Path

PROC = Path("/proc")
POLL_PERIOD_S = 0.05
GROUP_ENDS_WITHIN_S = 10.0  # a killed process that holds a GPU takes a while
LOG_TAIL_BYTES = 64_000
LOG_TOLD_CHARACTERS = 300


class EngineProcess:
    """One server; use ``spawn``, or ``adopt`` for one that runs already."""

    def __init__(
        self, pid: int, log_path: Path, child: subprocess.Popen[bytes] | None, claim: socket.socket | None
    ) -> None:
        """``child`` where this process has spawned it, ``claim`` where another has."""
        self.pid = pid
        self.log_path = log_path
        self._began = began_ticks(pid)
        self._child = child
        self._claim = claim

    @classmethod
    def spawn(cls, command: Sequence[str], environment: Mapping[str, str], log_path: Path) -> "EngineProcess":
        """Start it, output going to its log. Raises ``OSError`` if there is no such command or log folder."""
        nothing = subprocess.DEVNULL
        with log_path.open("ab") as log:
            child = subprocess.Popen(
                command, env=dict(environment), stdin=nothing, stdout=log, stderr=log, start_new_session=True
            )
        return cls(child.pid, log_path, child, None)

    @classmethod
    def adopt(cls, pid: int, log_path: Path, claim: socket.socket) -> "EngineProcess":
        """Answer for the first process of a session that somebody who is gone has started."""
        return cls(pid, log_path, None, claim)

    @property
    def age_s(self) -> float:
        """How long ago it was started."""
        if not self._began:
            return 0.0
        return time.clock_gettime(time.CLOCK_BOOTTIME) - int(self._began) / os.sysconf("SC_CLK_TCK")

    @property
    def ended(self) -> bool:
        """Whether the server is gone; its engine may not be."""
        if self._child is not None:
            return self._child.poll() is not None
        return not self._began or began_ticks(self.pid) != self._began

    async def wait(self) -> str:
        """Wait until it has ended and nothing of it is left; says how it ended, as people read it."""
        await self._until_ended()
        self.kill()  # an engine whose server is gone serves nobody, and holds a GPU
        await until_group_ends(self.pid)
        self._let_go()
        told = last_error(self.log_path)
        return f"{self._how()}{f': {told}' if told else ''}; log: {self.log_path}"

    def _how(self) -> str:
        status = self._child.returncode if self._child is not None else None
        if status is None:
            return "ended, with a status that only whoever started it is told"
        return f"exited with status {status}" if status >= 0 else f"was killed by {signal.Signals(-status).name}"

    async def _until_ended(self) -> None:
        while not self.ended:  # noqa: ASYNC110 - the end of a process that is no child is told to nobody
            await asyncio.sleep(POLL_PERIOD_S)

    async def end(self, grace_s: float, idle: Awaitable[None]) -> None:
        """Let it finish what it has for at most ``grace_s``, then kill all of it; 0 kills it at once.

        ``idle`` is awaited for what it has to be finished: vLLM takes seconds from its last answer to its end.
        """
        finished = asyncio.ensure_future(idle)
        ended = asyncio.ensure_future(self._until_ended())
        if grace_s > 0 and not self.ended:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGTERM)  # the server alone: its engine goes on until the last request is done
            await asyncio.wait((finished, ended), timeout=grace_s, return_when=asyncio.FIRST_COMPLETED)
        finished.cancel()
        self.kill()
        await ended

    def kill(self) -> None:
        """Kill the server and every process it has made."""
        kill_group(self.pid)

    def leave(self) -> None:
        """Let it run on when this process ends; whoever comes next may adopt it."""
        if self._child is not None:
            self._child.returncode = 0  # or Python warns of a child that nobody waited for
        self._let_go()

    def _let_go(self) -> None:
        if self._claim is not None:
            self._claim.close()


def last_error(log_path: Path) -> str:
    """The last line of a log that names an error with the one below, else its last line; empty if it has none."""
    with log_path.open("rb") as log:
        log.seek(max(0, log_path.stat().st_size - LOG_TAIL_BYTES))
        lines = [line.strip() for line in log.read().decode(errors="replace").splitlines() if line.strip()]
    errors = [number for number, line in enumerate(lines) if "Error" in line or "error:" in line]
    told = lines[errors[-1] : errors[-1] + 2] if errors else lines[-1:]
    return " ".join(told)[:LOG_TOLD_CHARACTERS]


def this_controller() -> str:
    """What the children of this process bear: its id and when it started, since ids are used again."""
    return f"{os.getpid()}:{began_ticks(os.getpid())}"


def claim(pid: int) -> socket.socket | None:
    """Be the one who answers for a process that was found, until what is returned is closed; None if another is.

    A name in the kernel's own space: it is taken by one at a time, and free again however its holder ends.
    """
    held = socket.socket(socket.AF_UNIX)
    try:
        held.bind(f"\0dynamollm-engine-{pid}-{began_ticks(pid)}")
    except OSError:
        held.close()
        return None
    return held


def alive(controller: str) -> bool:
    """Whether that controller, as ``this_controller`` names it, is still there."""
    pid, _, started = controller.partition(":")
    return pid.isdigit() and began_ticks(int(pid)) == started


def began_ticks(pid: int) -> str:
    """When a process was started, in clock ticks since boot; empty if it is not there or only waits to be reaped."""
    fields = _stat(pid)
    return fields[19] if fields and fields[0] != "Z" else ""


async def until_group_ends(group: int) -> None:
    """Wait until nothing of a killed group is left, but not for ever."""
    for _ in range(int(GROUP_ENDS_WITHIN_S / POLL_PERIOD_S)):
        if not _group_lives(group):
            break
        await asyncio.sleep(POLL_PERIOD_S)


def kill_group(group: int) -> None:
    """Kill every process of a group."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


def _group_lives(group: int) -> bool:
    """Whether any process of a group is more than a zombie; not every machine's first process reaps orphans."""
    every = (_stat(int(entry.name)) for entry in PROC.iterdir() if entry.name.isdigit())
    return any(fields[2] == str(group) and fields[0] != "Z" for fields in every if fields)


def _stat(pid: int) -> list[str]:
    """What the kernel tells of a process, from its state on; nothing if it is not there."""
    try:
        stat = (PROC / str(pid) / "stat").read_text()
    except OSError:
        return []
    return stat.rpartition(")")[2].split()  # the name before it may hold anything
