"""Orphans: engines whose controller is gone, found by what their own environment says of them.

So no file of them can be stale or half-written, and a process that came by its number later is never taken for one.
Each orphan that is told is claimed: of two gateways that start at once, one gets it. What becomes of it is the driver's
to decide.
"""

import contextlib
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pools.drivers.vllm_launch import CONTROLLER, MARK, RECORD, EngineRecord, read_record
from pools.drivers.vllm_processes import PROC, EngineProcess, alive, began_ticks, claim, kill_group, until_group_ends


@dataclass(frozen=True, slots=True)
class Orphan:
    """One engine, claimed: ``adopt`` or ``end`` it."""

    group: int
    name: str
    record: EngineRecord | None  # None: its server is gone, or does not say what it was started as
    held: socket.socket

    def adopt(self, log_path: Path) -> EngineProcess:
        """Answer for it from now on."""
        return EngineProcess.adopt(self.group, log_path, self.held)

    async def end(self) -> None:
        """Kill all of it; returns when its GPUs are free.

        At once: whoever waited for its answers waited at the gateway, which is gone too.
        """
        kill_group(self.group)
        await until_group_ends(self.group)
        self.held.close()


def find_orphans() -> list[Orphan]:
    """Every engine whose controller is gone and whom nobody has adopted, by name. Others' processes are left alone."""
    groups: dict[int, dict[str, str]] = {}
    for entry in PROC.iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # not ours to read, or gone
                variables = _environment(entry)
                if MARK in variables and CONTROLLER in variables and not alive(variables[CONTROLLER]):
                    groups[os.getpgid(int(entry.name))] = variables  # any of them tells, for the first may be gone
    found = [
        Orphan(group, variables[MARK], _record(group, variables), held)
        for group, variables in groups.items()
        if (held := claim(group)) is not None
    ]
    return sorted(found, key=lambda orphan: orphan.name)


def _record(group: int, variables: Mapping[str, str]) -> EngineRecord | None:
    return read_record(variables.get(RECORD, "")) if began_ticks(group) else None


def _environment(process: Path) -> dict[str, str]:
    text = (process / "environ").read_bytes().decode(errors="replace")
    return dict(part.split("=", 1) for part in text.split("\0") if "=" in part)
