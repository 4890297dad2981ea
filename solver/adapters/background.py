"""Stepping back: this process computes only while nobody who serves wants the core. It never asks for anything back.

Niceness is not enough. It is a share: a request that comes while a solve has the core waits until the solve's slice is
over, milliseconds, and then has the larger part. ``SCHED_IDLE`` (Linux) gives the core up at once. It does so among the
processes of a group: those of a container or a systemd service, and elsewhere, where the kernel groups sessions
(``sched_autogroup_enabled``), those of one session. Hence a process that steps back stays in the session of whoever
began it. It is not starved: it has a hundredth or so of cores that are wanted without a pause, and all that is left of
others. What was measured stands in docs/live-control.md.
"""

import os
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress

LOWEST_PRIORITY = 19


def step_back() -> None:
    """Let everybody else go first, from now on and for the threads begun from now on; by niceness where that is all."""
    os.nice(LOWEST_PRIORITY)
    if hasattr(os, "SCHED_IDLE"):
        with suppress(PermissionError):  # a container may forbid it
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def end(pool: ProcessPoolExecutor) -> None:
    """End a pool's processes at once and let go of it; blocks until they are gone.

    Who has stepped back may be long about what it is at, and nobody wants it any more.
    """
    for process in list((pool._processes or {}).values()):
        process.kill()
    pool.shutdown(wait=True, cancel_futures=True)
