"""ControlLoop: calls the controller at its ticks and hands what it decides to the operations.

The controller is pure and may think for a second: it runs elsewhere (``solver.adapters.controller_process``), never on
the gateway's event loop. If it dies it is started again, with a higher epoch, and plans from what it then sees; until
then the cluster stays as it is and the gateway serves on.
"""

import asyncio
import logging
from collections import Counter, deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from proxy.metrics import Histogram
from solver.control import Action, ControllerLostError, Diagnostic, Effects, Level, Observation, Tick

log = logging.getLogger("dynamollm.control")

KEPT_DECISIONS = 200
TICK_BUCKETS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
RESTART_S = 1.0
HELD_S = 0.1
FIRST_LOOK_S = 5.0  # an instance period: a look at no time at all shows nothing


class AsyncController(Protocol):
    """A ``solver.control.Controller`` somewhere else."""

    async def first_tick(self, now_s: float) -> Tick:
        """When to call it first. Raises ``ControllerLostError``."""

    async def on_tick(self, tick: Tick, observation: Observation) -> Effects:
        """Decide. Raises ``ControllerLostError``."""

    async def close(self) -> None:
        """Let go of what it runs in."""


class StaticController:
    """Keeps the cluster as it is configured: looks every 5 s, for status, and decides nothing."""

    PERIOD_S = 5.0

    async def first_tick(self, now_s: float) -> Tick:
        """Now."""
        return Tick(now_s, Level.INSTANCE)

    async def on_tick(self, tick: Tick, observation: Observation) -> Effects:
        """Nothing."""
        return Effects((), Tick(observation.now_s + self.PERIOD_S, Level.INSTANCE))

    async def close(self) -> None:
        """Nothing to close."""


@dataclass(frozen=True, slots=True)
class TickRecord:
    """One tick that decided something, for `dynamollm explain`."""

    at_s: float
    took_s: float  # from the observation to the answer
    actions: tuple[Action, ...]
    diagnostics: tuple[Diagnostic, ...]


class ControlLoop:
    """``run`` it as a task."""

    def __init__(
        self,
        controller: AsyncController,
        observe: Callable[[float], Observation],
        apply: Callable[[Iterable[Action]], None],
        clock: Callable[[], float],
        first_look_s: float = FIRST_LOOK_S,
        in_command: Callable[[], bool] = lambda: True,
    ) -> None:
        """``first_look_s``: how long to count before the first tick.

        ``in_command``: whether this is the one that decides now; while it is not, the plan is held.
        """
        self._in_command = in_command
        self.decisions: deque[TickRecord] = deque(maxlen=KEPT_DECISIONS)
        self.ticks = 0
        self.tick_s = Histogram("dynamollm_control_tick_seconds", "Observation to answer", (), TICK_BUCKETS_S)
        self.topics: Counter[str] = Counter()  # of what was explained
        self.plan_numbers: dict[str, float] = {}  # as last explained
        self.observation: Observation | None = None  # the last one
        self._controller = controller
        self._observe = observe
        self._apply = apply
        self._clock = clock
        self._first_look_s = first_look_s
        self._switched = asyncio.Event()

    async def run(self) -> None:
        """Tick until cancelled."""
        self._observe(self._clock())  # what is counted begins now: before, the cluster was coming up
        await asyncio.sleep(self._first_look_s)
        while True:
            controller = self._controller
            self._switched.clear()
            try:
                await self._tick_on(controller)
                await controller.close()
            except ControllerLostError as error:
                log.warning("the controller was lost (%s); starting it again", error)
                await asyncio.sleep(RESTART_S)

    def switch(self, controller: AsyncController) -> None:
        """Let another controller decide from now on; what the present one still answers is dropped."""
        self._controller = controller
        self._switched.set()

    async def close(self) -> None:
        """Close the controller."""
        await self._controller.close()

    async def _sleep_until(self, at_s: float) -> None:
        """Wait for a moment, or for another controller."""
        if (left_s := at_s - self._clock()) > 0.0:
            with suppress(TimeoutError):
                async with asyncio.timeout(left_s):
                    await self._switched.wait()

    async def _tick_on(self, controller: AsyncController) -> None:
        tick = await controller.first_tick(self._clock())
        while True:
            await self._sleep_until(tick.at_s)
            while not self._in_command():  # noqa: ASYNC110 - a lease runs out by itself: nobody could set an event
                await asyncio.sleep(HELD_S)
            if self._switched.is_set():
                return
            now_s = self._clock()
            self.observation = self._observe(now_s)
            effects = await controller.on_tick(tick, self.observation)
            if self._switched.is_set():
                return
            self._note(TickRecord(now_s, self._clock() - now_s, effects.actions, effects.diagnostics))
            if self._in_command():
                self._apply(effects.actions)
            tick = effects.next_tick

    def _note(self, record: TickRecord) -> None:
        self.ticks += 1
        self.tick_s.observe((), record.took_s)
        for diagnostic in record.diagnostics:
            self.topics[diagnostic.topic] += 1
            if diagnostic.topic == "plan":
                self.plan_numbers |= diagnostic.numbers
        if record.actions or record.diagnostics:
            self.decisions.append(record)
