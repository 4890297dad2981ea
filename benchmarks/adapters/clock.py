"""The real clock of a replay: the one place where it reads time."""

import asyncio
import time


class MonotonicClock:
    """Seconds of the machine's high-resolution monotonic clock."""

    def now_s(self) -> float:
        """Seconds since any fixed moment."""
        return time.perf_counter()

    async def sleep_until(self, due_s: float) -> None:
        """Return at ``due_s`` or soon after; at once, after letting others run, if it has passed."""
        await asyncio.sleep(max(due_s - time.perf_counter(), 0.0))
