"""ControllerProcess: a controller in a process of its own, so that no solve holds up the gateway's event loop.

The process is started anew when it is gone; ``make(epoch)`` then makes a fresh controller with the next epoch, so that
actions of the lost one are stale.
"""

import asyncio
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from solver.adapters.background import end, step_back
from solver.control import Controller, ControllerLostError, Effects, Observation, Tick

T = TypeVar("T")
LOADING_PRIORITY = 10  # loading takes seconds of a core: below the gateway, and yet soon done

_controller: list[Controller] = []  # of this process, once it is one


class ControllerProcess:
    """A controller that is awaited; ``close`` it. ``make`` must be importable by name (it is pickled)."""

    def __init__(self, make: Callable[[int], Controller], first_epoch: int = 1) -> None:
        self._make = make
        self._epoch = first_epoch - 1
        self._pool: ProcessPoolExecutor | None = None
        self._used = False

    def begin(self, make: Callable[[int], Controller], first_epoch: int) -> None:
        """Make controllers in this way from now on, in epochs from this one on; ``first_tick`` makes the first."""
        self._make = make
        self._epoch = first_epoch - 1

    async def warm(self) -> None:
        """Start the process and have it load what making a controller needs, so that ``first_tick`` need not."""
        if self._pool is None:
            self._pool, self._used = self._new_pool(), False
            await self._call(_begin, self._make, 0)

    async def first_tick(self, now_s: float) -> Tick:
        """Start a controller and ask it. Raises ``ControllerLostError``."""
        if self._used:
            await self.close()
        if self._pool is None:
            self._pool = self._new_pool()
        self._used = True
        self._epoch += 1
        await self._call(_begin, self._make, self._epoch)
        return await self._call(_first_tick, now_s)

    @staticmethod
    def _new_pool() -> ProcessPoolExecutor:
        return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=_prepare)

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
        self._used = False
        if pool is not None:
            await asyncio.to_thread(end, pool)


def _prepare() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the gateway's to handle
    os.nice(LOADING_PRIORITY)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A parent that is killed cannot end this process, and would leave it waiting for ever."""
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)


def _begin(make: Callable[[int], Controller], epoch: int) -> None:
    _controller[:] = [make(epoch)]
    step_back()  # from now on it solves, and a solve waits for requests


def _first_tick(now_s: float) -> Tick:
    return _controller[0].first_tick(now_s)


def _on_tick(tick: Tick, observation: Observation) -> Effects:
    return _controller[0].on_tick(tick, observation)
