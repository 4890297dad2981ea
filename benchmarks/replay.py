"""Open-loop replay of a workload: every request is sent when it is due, whether or not earlier ones were answered.

The loop knows a clock and an endpoint, both given: over real sockets in ``dynamollm replay``, in virtual time in the
tests. Each request ends as exactly one ``Outcome`` in the tally; how many were sent late, and by how much, is part of
the result, because a late client measures itself and not the target.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from simulator.workload.arrivals import Arrivals

INTERRUPTED = "interrupted"


@dataclass(frozen=True, slots=True)
class ReplayRequest:
    """One request to be sent."""

    number: int  # position in the workload, from 0
    due_s: float  # on the replay's clock
    input_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one request. Times are on the replay's clock; ``failure`` is a reason, None if it finished."""

    sent_s: float
    end_s: float
    failure: str | None = None
    first_s: float | None = None  # first event of the stream
    token_s: tuple[float, ...] = ()  # every event that carries text
    prompt_tokens: int | None = None  # as the target counted
    completion_tokens: int | None = None
    energy_j: float | None = None  # as the target reported

    @property
    def ttft_s(self) -> float | None:
        """Time to first token; None if none came."""
        return None if self.first_s is None else self.first_s - self.sent_s

    @property
    def mean_tbt_s(self) -> float | None:
        """Mean time between its output tokens, by the target's count of them; None below two."""
        tokens = self.completion_tokens or len(self.token_s)
        if tokens < 2 or len(self.token_s) < 2:
            return None
        return (self.token_s[-1] - self.token_s[0]) / (tokens - 1)


class Clock(Protocol):
    """Where the replay gets its time."""

    def now_s(self) -> float:
        """Seconds since any fixed moment, never falling."""

    async def sleep_until(self, due_s: float) -> None:
        """Return at ``due_s`` or as soon after as possible."""


class Endpoint(Protocol):
    """What answers."""

    async def complete(self, request: ReplayRequest) -> Outcome:
        """Send the request, read the whole answer. A failure is an Outcome; only cancellation is raised."""


@dataclass(slots=True)
class Replay:
    """One run: ``arrivals`` sent to ``endpoint``, at ``speedup`` times the trace's pace.

    ``record`` is called once for each request that was sent. ``run`` ends when all are answered or ``stop`` is set;
    what is then still open is cancelled and recorded as interrupted.
    """

    arrivals: Arrivals
    endpoint: Endpoint
    clock: Clock
    record: Callable[[ReplayRequest, Outcome], None]
    speedup: float = 1.0
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    sent: int = 0
    open_streams: set[asyncio.Task[None]] = field(default_factory=set)

    async def run(self) -> None:
        """Send everything and wait for the answers."""
        sending = asyncio.create_task(self._send_and_drain())
        stopped = asyncio.create_task(self.stop.wait())
        try:
            await asyncio.wait((sending, stopped), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (sending, stopped, *self.open_streams):
                task.cancel()
            await asyncio.gather(sending, stopped, *self.open_streams, return_exceptions=True)
        if not sending.cancelled() and (error := sending.exception()) is not None:
            raise error

    async def _send_and_drain(self) -> None:
        began_s = self.clock.now_s()
        rows = zip(
            self.arrivals.arrival_s.tolist(),
            self.arrivals.input_tokens.tolist(),
            self.arrivals.output_tokens.tolist(),
            strict=True,
        )
        for number, (arrival_s, input_tokens, output_tokens) in enumerate(rows):
            due_s = began_s + arrival_s / self.speedup
            # also when already late: a burst must not keep the answers from being read
            await self.clock.sleep_until(due_s)
            request = ReplayRequest(number, due_s, input_tokens, output_tokens)
            task = asyncio.create_task(self._one(request))
            self.sent += 1
            self.open_streams.add(task)
            task.add_done_callback(self.open_streams.discard)
        while self.open_streams:
            await asyncio.wait(tuple(self.open_streams))

    async def _one(self, request: ReplayRequest) -> None:
        try:
            outcome = await self.endpoint.complete(request)
        except asyncio.CancelledError:
            now_s = self.clock.now_s()
            self.record(request, Outcome(now_s, now_s, INTERRUPTED))
            raise
        self.record(request, outcome)
