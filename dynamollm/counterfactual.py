"""Counterfactual: what other policies would have used for the very requests that came, and so what was saved.

Every request is noted as it ends; once all that came before some moment have ended (or are taken to be as long as was
predicted, where that takes too long), the shadow simulations go on to that moment (``simulator/shadow.py``, in a
process of their own at the lowest priority). What they used until then is compared with what the meters counted.

How far the engine model is to be trusted is measured, not assumed: one of the shadows is the very cluster that serves
(``OWN``), and by what share it misses the meters, by that share the others may be wrong. Never on a request's path.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from pools.request import Request
from proxy.outcome import Outcome
from simulator.workload.arrivals import Arrivals

log = logging.getLogger("dynamollm.counterfactual")

OWN = "configured"
PERIOD_S = 10.0
LONGEST_WAIT_S = 120.0  # for a request to end before it is taken to be as long as predicted
LEAST_BAND = 0.01  # of a shadow's energy: no shorter comparison shows less
MOST_KEPT = 1_000_000  # requests and meter readings that wait for the shadows


class ShadowLostError(Exception):
    """The process that simulates the shadows is gone."""


class AsyncShadows(Protocol):
    """``simulator.shadow.Shadows`` somewhere else."""

    async def follow(self, requests: Arrivals, until_s: float) -> dict[str, float]:
        """As ``Shadows.follow``. Raises ``ShadowLostError``."""

    async def close(self) -> None:
        """Let go of what it runs in."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """What one policy would have used since the comparison began, beside what was used."""

    policy: str
    energy_j: float
    band_j: float  # that much more or less
    metered_j: float
    seconds: float  # since it began

    @property
    def saved_j(self) -> float:
        """What was not used; below 0, what was used more."""
        return self.energy_j - self.metered_j


class Counterfactual:
    """``run`` it as a task, once the cluster is up."""

    def __init__(
        self,
        shadows: AsyncShadows,
        metered_j: Callable[[], float],
        clock: Callable[[], float],
        period_s: float = PERIOD_S,
    ) -> None:
        """``metered_j``: what all GPUs have drawn since some moment."""
        self.comparisons: tuple[Comparison, ...] = ()
        self._shadows = shadows
        self._metered_j = metered_j
        self._clock = clock
        self._period_s = period_s
        self._began_s, self._began_j = float("inf"), 0.0
        self._followed_s = 0.0
        self._open: dict[str, Request] = {}  # came and did not end, in order of arrival
        self._known: list[tuple[float, int, int]] = []  # arrival, input and output tokens
        self._meter: deque[tuple[float, float]] = deque(maxlen=MOST_KEPT)

    # --- told on the way: cheap -------------------------------------------------------------------------------------

    def on_arrival(self, request: Request) -> None:
        """A request came to the router."""
        self._open[request.id] = request

    def on_outcome(self, outcome: Outcome) -> None:
        """A request ended; one that an engine refused for what it asked would have been refused by any."""
        request = self._open.pop(outcome.request.id, None)
        if request is None or (400 <= outcome.status < 500 and outcome.status not in (429, 499)):
            return
        self._know(request, outcome.completion_tokens, outcome.prompt_tokens)

    def _know(self, request: Request, output_tokens: int | None = None, input_tokens: int | None = None) -> None:
        at_s = request.arrival_s - self._began_s
        if at_s >= self._followed_s and len(self._known) < MOST_KEPT:
            outputs = round(request.output_tokens) if output_tokens is None else output_tokens
            inputs = request.input_tokens if input_tokens is None else input_tokens
            self._known.append((at_s, max(inputs, 1), max(outputs, 1)))

    # --- beside traffic ---------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Follow until cancelled; if the shadows are lost, what they said last stays."""
        self._began_s = self._clock()
        self._open.clear()
        self._began_j = self._metered_j()
        self._meter.append((0.0, self._began_j))
        try:
            while True:
                await asyncio.sleep(self._period_s)
                await self.once()
        except ShadowLostError as error:
            log.warning("no counterfactual from now on: %s", error)
        finally:
            await self._shadows.close()

    async def once(self) -> None:
        """Go on to where all is known. Nothing is begun before the first request. Raises ``ShadowLostError``."""
        now_s = self._clock() - self._began_s
        self._meter.append((now_s, self._metered_j()))
        until_s = self._known_until_s(now_s)
        if until_s <= self._followed_s or (not self._known and not self.comparisons):
            return
        ripe = sorted(row for row in self._known if row[0] <= until_s)
        self._known = [row for row in self._known if row[0] > until_s]
        self._followed_s = until_s
        columns = zip(*ripe, strict=True) if ripe else ((), (), ())
        energy_j = await self._shadows.follow(Arrivals.of(*columns), until_s)
        self.comparisons = compared(energy_j, self._metered_until_j(until_s), until_s)

    def _known_until_s(self, now_s: float) -> float:
        """Up to where every request has ended or has been waited for long enough."""
        while self._open:
            oldest = next(iter(self._open.values()))
            at_s = oldest.arrival_s - self._began_s
            if at_s > now_s - LONGEST_WAIT_S:
                return at_s - 1e-6
            self._know(self._open.pop(oldest.id))
        return now_s

    def _metered_until_j(self, until_s: float) -> float:
        """What was drawn from the beginning to that moment, between two readings in proportion to time."""
        at_s, drawn_j = np.array(self._meter).T
        while len(self._meter) > 2 and self._meter[1][0] <= until_s:
            self._meter.popleft()
        return float(np.interp(until_s, at_s, drawn_j)) - self._began_j


def compared(energy_j: Mapping[str, float], metered_j: float, seconds: float) -> tuple[Comparison, ...]:
    """Each policy beside the meters, with the share by which the cluster's own shadow misses them as its error."""
    own_j = energy_j.get(OWN, metered_j)
    error = max(abs(own_j / metered_j - 1.0), LEAST_BAND) if metered_j > 0.0 else 1.0
    return tuple(
        Comparison(policy, used_j, error * used_j, metered_j, seconds)
        for policy, used_j in energy_j.items()
        if policy != OWN
    )
