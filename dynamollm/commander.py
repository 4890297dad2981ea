"""Commander: one controller process. It stands by, watching the same load as the leader, or leads for a term.

A term is everything that commands a cluster (``Term``), made anew: it takes over the instances that run, publishes them
under its epoch and plans from what is known of the load. While the store is away the plan is held: nothing is decided,
the instances and the gateways serve on. A term ends when another leads; what runs goes on in that one's hands.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Generic, Protocol, TypeVar

from dynamollm.collected import Collected
from dynamollm.kept_load import KeptLoad
from dynamollm.leadership import Candidate
from dynamollm.load_history import LoadHistory
from dynamollm.reports import CONTROLLERS, GATEWAYS, ControllerReport, GatewayReport, document, read
from dynamollm.store import Store
from solver.control import Observation

log = logging.getLogger("dynamollm.commander")

LISTEN_S = 0.25
TELL_S = 0.5
REPORT_TTL_S = 3.0
WATCH_S = 5.0
RETRY_S = 1.0


class Term(Protocol):
    """A cluster in command (``dynamollm.wiring.ControllerTerm``)."""

    async def run(self) -> None:
        """Command until cancelled; then let go of everything."""

    @property
    def booked(self) -> dict[str, int]:
        """The last batch of each gateway in the ledger."""


T = TypeVar("T", bound=Term)


class Commander(Generic[T]):
    """``run`` it as a task."""

    def __init__(
        self,
        store: Store,
        candidate: Candidate,
        collected: Collected,
        history: LoadHistory,
        demands: int,
        watch: Callable[[float], Observation],
        begin: Callable[[int], Awaitable[T]],
        warm: Callable[[], Awaitable[None]] | None,
        clock: Callable[[], float],
        unix_offset_s: float,
    ) -> None:
        """``begin`` makes the term of an epoch; ``watch`` observes the load while standing by.

        ``warm`` readies what a term needs and takes long to start; before the first term and between terms.
        """
        self.term: T | None = None
        self._warm = warm
        self.url = ""  # where this process answers
        self.candidate = candidate
        self.store = store
        self._collected = collected
        self._history = history
        self._kept = KeptLoad(store, history, demands)
        self._watch_load = watch
        self._begin = begin
        self._clock = clock
        self._offset_s = unix_offset_s

    @property
    def name(self) -> str:
        """Of this candidate."""
        return self.candidate.holder

    async def run(self) -> None:
        """Stand by and lead, until cancelled; then the lease is given up."""
        await self._kept.restore()
        await self._get_ready()
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._every(LISTEN_S, self.listen))
                tasks.create_task(self._every(TELL_S, self._tell))
                tasks.create_task(self._every(WATCH_S, self._watch))
                tasks.create_task(self._lead())
        finally:
            await self.candidate.release()

    async def _get_ready(self) -> None:
        if self._warm is not None:
            await self._warm()

    async def _every(self, period_s: float, step: Callable[[], Awaitable[None]]) -> None:
        while True:
            try:
                await step()
            except (OSError, ValueError) as error:
                log.debug("%s: %s", self.name, error)  # said by the candidate, once
            await asyncio.sleep(period_s)

    async def listen(self) -> None:
        """Hear the gateways. Raises ``OSError`` where they cannot be heard."""
        try:
            plain = await self.store.reports(GATEWAYS)
        except OSError:
            self._collected.lost()
            raise
        self._collected.take({name: read(each, GatewayReport) for name, each in plain.items()})
        self.candidate.saw(self._collected.highest_epoch)

    async def _tell(self) -> None:
        leads = self.candidate.leads
        report = ControllerReport(
            self.url, self.candidate.epoch if leads else 0, self.term.booked if self.term and leads else {}
        )
        await self.store.report(CONTROLLERS, self.name, document(report), REPORT_TTL_S)

    async def _watch(self) -> None:
        """Standing by, follow the load; leading, write down what the control loop has observed."""
        if self.term is None:
            now_s = self._clock()
            if self._collected.heard:
                self._history.add(now_s + self._offset_s, self._watch_load(now_s).demand)
            self._history.forget_unwritten()
        else:
            await self._kept.save()

    async def _lead(self) -> None:
        """Renew the lease, and have a term for as long as it is ours."""
        running: asyncio.Task[None] | None = None
        epoch = 0
        try:
            while True:
                now_epoch = await self.candidate.renew()
                if running is not None and (running.done() or now_epoch != epoch):
                    await self._end(running)
                    running, epoch = None, 0
                if running is None and now_epoch:
                    epoch = now_epoch
                    log.warning("%s leads, epoch %d", self.name, epoch)
                    self.term = await self._begin(epoch)
                    running = asyncio.create_task(self.term.run())
                await asyncio.sleep(self.candidate.period_s)
        finally:
            if running is not None:
                running.cancel()
                await asyncio.gather(running, return_exceptions=True)

    async def _end(self, running: asyncio.Task[None]) -> None:
        """End a term; one that failed by itself gives the lease up, for another to try."""
        self.term = None
        failed = running.done()
        running.cancel()
        (result,) = await asyncio.gather(running, return_exceptions=True)
        if failed:
            log.error("%s cannot command: %r", self.name, result)
            await self.candidate.release()
            await asyncio.sleep(RETRY_S)
        await self._get_ready()
