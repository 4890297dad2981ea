"""ShadowProcess: the shadow simulations in a process of their own, begun with the first request, last in priority.

Compiling and simulating take seconds of a core; nobody waits for them. What simulates is imported there alone.
"""

import asyncio
import multiprocessing
import signal
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING

from dynamollm.counterfactual import ShadowLostError
from simulator.workload.arrivals import Arrivals
from solver.adapters.background import end, step_back

if TYPE_CHECKING:
    from simulator.shadow import Shadows, World

_shadows: "list[Shadows]" = []  # of this process, once it is one


class ShadowProcess:
    """See ``AsyncShadows``; ``close`` it. ``worlds`` must be importable by name (they are pickled)."""

    def __init__(self, worlds: "Mapping[str, World]") -> None:
        self._worlds = dict(worlds)
        self._pool: ProcessPoolExecutor | None = None

    async def follow(self, requests: Arrivals, until_s: float) -> dict[str, float]:
        """Begin the process if need be, and ask it. Raises ``ShadowLostError``."""
        if self._pool is None:
            self._pool = ProcessPoolExecutor(
                1, multiprocessing.get_context("spawn"), initializer=_begin, initargs=(self._worlds,)
            )
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, _follow, requests, until_s)
        except (BrokenProcessPool, ValueError) as error:
            raise ShadowLostError(str(error)) from error

    async def close(self) -> None:
        """End the process."""
        pool, self._pool = self._pool, None
        if pool is not None:
            await asyncio.to_thread(end, pool)


def _begin(worlds: "Mapping[str, World]") -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the gateway's to handle
    step_back()
    from simulator.shadow import Shadows

    _shadows.append(Shadows(worlds))


def _follow(requests: Arrivals, until_s: float) -> dict[str, float]:
    return _shadows[0].follow(requests, until_s)
