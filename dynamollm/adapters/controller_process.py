"""ControllerProcess: a controller in a process of its own, so that no solve holds up the gateway's event loop.

The process is started anew when it is gone; ``make(epoch)`` then makes a fresh controller with the next epoch, so that
actions of the lost one are stale.
"""

import asyncio
import multiprocessing
import signal
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from dynamollm.control_loop import ControllerLostError
from solver.control import Controller, Effects, Observation, Tick

T = TypeVar("T")

_controller: list[Controller] = []  # of this process, once it is one


class ControllerProcess:
    """See ``AsyncController``; ``close`` it. ``make`` must be importable by name (it is pickled)."""

    def __init__(self, make: Callable[[int], Controller]) -> None:
        self._make = make
        self._epoch = 0
        self._pool: ProcessPoolExecutor | None = None

    async def first_tick(self, now_s: float) -> Tick:
        """Start a controller and ask it. Raises ``ControllerLostError``."""
        await self.close()
        self._epoch += 1
        self._pool = ProcessPoolExecutor(
            1, multiprocessing.get_context("spawn"), initializer=_begin, initargs=(self._make, self._epoch)
        )
        return await self._call(_first_tick, now_s)

    async def on_tick(self, tick: Tick, observation: Observation) -> Effects:
        """Ask it to decide. Raises ``ControllerLostError``."""
        return await self._call(_on_tick, tick, observation)

    async def _call(self, function: Callable[..., T], *arguments: object) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)
        except BrokenProcessPool as error:
            raise ControllerLostError(str(error)) from error

    async def close(self) -> None:
        """End the process."""
        pool, self._pool = self._pool, None
        if pool is not None:
            await asyncio.to_thread(pool.shutdown, wait=True, cancel_futures=True)


def _begin(make: Callable[[int], Controller], epoch: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the gateway's to handle
    _controller.append(make(epoch))


def _first_tick(now_s: float) -> Tick:
    return _controller[0].first_tick(now_s)


def _on_tick(tick: Tick, observation: Observation) -> Effects:
    return _controller[0].on_tick(tick, observation)
