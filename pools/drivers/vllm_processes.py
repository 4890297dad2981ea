"""EngineProcess: one ``vllm serve`` and its children, from spawning to the last one's end; and the search for orphans.

Each stands in a session of its own: Ctrl-C in the terminal reaches the gateway alone, and one signal to its group
reaches the engine processes it has made. What a killed controller leaves behind is found by its environment, so that no
file can be stale. Linux only, as the GPUs' drivers are.
"""

import asyncio
import contextlib
import os
import signal
from asyncio.subprocess import DEVNULL, Process
from collections.abc import Awaitable, Mapping, Sequence
from pathlib import Path

from pools.drivers.vllm_launch import CONTROLLER, MARK

PROC = Path("/proc")
POLL_PERIOD_S = 0.02
GROUP_ENDS_WITHIN_S = 10.0  # a killed process that holds a GPU takes a while
LOG_TAIL_BYTES = 64_000
LOG_TOLD_CHARACTERS = 300


class EngineProcess:
    """One started server; use ``spawn``."""

    def __init__(self, process: Process, log_path: Path) -> None:
        self._process = process
        self.pid = process.pid
        self.log_path = log_path

    @classmethod
    async def spawn(cls, command: Sequence[str], environment: Mapping[str, str], log_path: Path) -> "EngineProcess":
        """Start it, output going to its log. Raises ``OSError`` if there is no such command or log folder."""
        with log_path.open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                *command, env=dict(environment), stdin=DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        return cls(process, log_path)

    async def wait(self) -> str:
        """Wait until it has ended and nothing of it is left; says how it ended, as people read it."""
        status = await self._process.wait()
        self.kill()  # an engine whose server is gone serves nobody, and holds a GPU
        for _ in range(int(GROUP_ENDS_WITHIN_S / POLL_PERIOD_S)):
            if not _group_lives(self.pid):
                break
            await asyncio.sleep(POLL_PERIOD_S)
        how = f"exited with status {status}" if status >= 0 else f"was killed by {signal.Signals(-status).name}"
        told = last_error(self.log_path)
        return f"{how}{f': {told}' if told else ''}; log: {self.log_path}"

    async def end(self, grace_s: float, idle: Awaitable[None]) -> None:
        """Let it finish what it has for at most ``grace_s``, then kill all of it; 0 kills it at once.

        ``idle`` is awaited for what it has to be finished: vLLM takes seconds from its last answer to its end.
        """
        finished = asyncio.ensure_future(idle)
        ended = asyncio.ensure_future(self._process.wait())
        if grace_s > 0 and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.terminate()  # the server alone: its engine goes on until the last request is done
            await asyncio.wait((finished, ended), timeout=grace_s, return_when=asyncio.FIRST_COMPLETED)
        finished.cancel()
        self.kill()
        await ended

    def kill(self) -> None:
        """Kill the server and every process it has made."""
        _signal_group(self.pid, signal.SIGKILL)


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
    return f"{os.getpid()}:{_started_ticks(os.getpid())}"


def end_orphans() -> list[str]:
    """Kill every engine whose controller is gone; returns their instances' names. Others' processes are left alone.

    At once: whoever waited for their answers waited at the gateway, which is gone too.
    """
    orphans = {group: name for group, name, controller in _marked_groups() if not _alive(controller)}
    for group in orphans:
        _signal_group(group, signal.SIGKILL)
    return sorted(set(orphans.values()))


def _marked_groups() -> list[tuple[int, str, str]]:
    """Process groups begun by drivers: id, instance, controller. Any process tells, for the first may be gone."""
    found = []
    for entry in PROC.iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # not ours to read, or gone
                text = (entry / "environ").read_bytes().decode(errors="replace")
                variables = dict(part.split("=", 1) for part in text.split("\0") if "=" in part)
                if MARK in variables and CONTROLLER in variables:
                    found.append((os.getpgid(int(entry.name)), variables[MARK], variables[CONTROLLER]))
    return found


def _alive(controller: str) -> bool:
    pid, _, started = controller.partition(":")
    return pid.isdigit() and _started_ticks(int(pid)) == started


def _started_ticks(pid: int) -> str:
    """When a process was started, in clock ticks since boot; empty if it is not there or only waits to be reaped."""
    fields = _stat(pid)
    return fields[19] if fields and fields[0] != "Z" else ""


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


def _signal_group(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)
