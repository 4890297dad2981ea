"""A node agent as a process of its own, for tests."""

import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from nvml_stub import StubMachine


def agent_command(machine: StubMachine, folder: Path, *arguments: str) -> list[str]:
    return [
        *(sys.executable, "-c", "from dynamollm.cli import main; main()", "agent", "--gpus", "all"),
        *("--journal", str(folder / "journal.json"), *arguments),
    ]


@contextmanager
def started(command: Sequence[str], machine: StubMachine) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process, and the address it says it is at; killed at the end if it still runs."""
    process = subprocess.Popen(command, env=machine.environment, stdout=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        assert " on " in line, f"the agent did not start: {line!r}"
        yield process, line.split(" on ")[1].strip()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def wait_until(condition, within_s: float) -> float:
    """Seconds until the condition held; fails after ``within_s``. Other processes' progress has no event to await."""
    began_s = time.monotonic()
    while not condition():
        assert time.monotonic() - began_s < within_s, f"not within {within_s} s"
        time.sleep(0.01)
    return time.monotonic() - began_s
