"""EnginePump: the engine model in real time, one timer for each step.

A step begins where the one before ended, however late the event loop woke up, so lateness does not add up and a
sequence's mean TBT is the profile's; steps that are overdue are made up for at once, and their tokens leave together,
as a busy vLLM server's do. Only a loop that lags by more than ``MAX_LAG_S`` loses time; ``lost_s`` says how much.
"""

import asyncio
from collections.abc import Callable, Sequence

from simulator.emulator.gpus import PowerMeter
from simulator.engine import Engine, Step

MAX_LAG_S = 0.5
EARLY_S = 0.6e-3  # uvloop rounds timers to milliseconds: one that comes early is taken, not waited out


class EnginePump:
    """Drives one engine. ``on_step`` hears of each step's begin, ``on_tokens`` of its end, ``flush`` when caught up."""

    def __init__(
        self,
        engine: Engine,
        meter: PowerMeter,
        on_step: Callable[[Step, float], None],
        on_tokens: Callable[[Sequence[int], Sequence[int], float], None],
        flush: Callable[[], None],
    ) -> None:
        self.engine = engine
        self.meter = meter
        self.slow_factor = 1.0  # injected fault: every step takes this many times longer
        self.lost_s = 0.0
        self._on_step = on_step
        self._on_tokens = on_tokens
        self._flush = flush
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._end_s = 0.0
        self._held = False

    @property
    def stepping(self) -> bool:
        """Whether a step is under way."""
        return self._timer is not None

    def hold(self, held: bool) -> None:
        """Stop stepping after the present step (asleep, paused, hung), or go on."""
        self._held = held
        self.kick()

    def kick(self) -> None:
        """There may be work."""
        if self._timer is None and self._begin(self._loop.time()):
            self._timer = self._loop.call_at(self._end_s, self._wake)

    def stop(self) -> None:
        """Never step again; the step under way ends here."""
        self._held = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            self.meter.cut(self._loop.time())

    def _begin(self, at_s: float) -> bool:
        if self._held:
            return False
        step = self.engine.start_step(at_s)
        if step is None:
            return False
        duration_s = step.duration_s * self.slow_factor
        self._end_s = at_s + duration_s
        self.meter.step(at_s, duration_s, step.power_w)
        self._on_step(step, at_s)
        return True

    def _wake(self) -> None:
        """The step's time has come, and perhaps that of the next ones."""
        self._timer = None
        now_s = self._loop.time()
        going_on = True
        while going_on and self._end_s <= now_s + EARLY_S:
            result = self.engine.finish_step()
            self._on_tokens(result.emitted, result.finished, self._end_s)
            at_s = self._end_s
            if now_s - at_s > MAX_LAG_S:
                self.lost_s += now_s - at_s
                at_s = now_s
            going_on = self._begin(at_s)
        if going_on:
            self._timer = self._loop.call_at(self._end_s, self._wake)
        self._flush()
