"""VirtualTimeLoop: an asyncio event loop on which waiting takes no time.

When every task waits for a timer, the loop's clock jumps to the next one instead of sleeping, so an hour of back-offs
and ticks runs in milliseconds and in the same order every time. Sockets and threads still work, in real time: the
clock jumps only where nothing is ready. For tests and for the parity of live control with the simulator; never serves.
"""

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class _JumpingSelector(selectors.DefaultSelector):
    """A selector that, where it would sleep for a timer, asks for the clock to be moved instead."""

    def __init__(self) -> None:
        super().__init__()
        self.jumped_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Return ready descriptors; without any, jump over ``timeout``. None blocks: only a thread can go on."""
        if timeout is None:
            return super().select(None)
        ready = super().select(0)
        if not ready and timeout > 0:
            self.jumped_s += timeout
        return ready


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """An event loop whose ``time()`` starts at ``start_s`` and moves only by jumps."""

    def __init__(self, start_s: float = 0.0) -> None:
        self._start_s = start_s
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)

    def time(self) -> float:
        """Virtual seconds."""
        return self._start_s + self._jumping.jumped_s


def run(main: Coroutine[Any, Any, T], start_s: float = 0.0) -> T:
    """Run a coroutine to its end in virtual time, as ``asyncio.run`` does in real time."""
    with asyncio.Runner(loop_factory=lambda: VirtualTimeLoop(start_s)) as runner:
        return runner.run(main)
