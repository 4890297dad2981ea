"""ControllerTerm: a cluster in command for as long as this process leads. See ``dynamollm.commander.Term``.

It takes over what runs, with the pools and routes of the cluster published last, publishes it under its own epoch,
books what gateways feed to the ledger, and lets the control loop decide. What it books is saved under its epoch too, so
that a leader of before cannot overwrite it.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from dynamollm.collected import Collected
from dynamollm.control_loop import ControlLoop
from dynamollm.deployment import Deployment
from dynamollm.ledger_feed import LedgerTail
from dynamollm.metering import Metering
from dynamollm.operations import Operations
from dynamollm.publishing import PublishedFleet
from dynamollm.reload import Reload
from dynamollm.reports import CLUSTER, LEDGER, PublishedCluster, read, shares_of
from dynamollm.runner import Runner
from dynamollm.settings import Settings
from dynamollm.store import Store
from energy.accounting_ledger import EnergyLedger
from solver.control import Action

log = logging.getLogger("dynamollm.term")

BOOK_S = 0.25
SAVE_S = 5.0
BOOKS = "books"  # the published document of what was booked
ENTRIES = 500


@dataclass(frozen=True, slots=True)
class ControllerTerm:
    """Everything that commands the cluster in one epoch."""

    epoch: int
    settings: Settings
    store: Store
    deployment: Deployment
    runner: Runner
    operations: Operations
    control: ControlLoop
    router: Collected
    published: PublishedFleet
    ledger: EnergyLedger
    tail: LedgerTail
    metering: Metering | None
    clock: Callable[[], float]
    unix_offset_s: float
    reload: Reload
    counterfactual: None = None  # requests are known to the gateways alone

    @property
    def booked(self) -> dict[str, int]:
        """The last batch of each gateway in the ledger."""
        return dict(self.tail.booked)

    async def run(self) -> None:
        """Command until cancelled."""
        try:
            await self._restore_books()
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self.runner.run())
                await self.runner.adopted()
                await self._remember()
                for task in (self.published.run(), self._book(), self._save()):
                    tasks.create_task(task)
                if self.metering is not None:
                    tasks.create_task(self.metering.run())
                if not self.deployment.instances:
                    await self.runner.settled()
                tasks.create_task(self.control.run())
        finally:
            await self.operations.close()
            await self.control.close()

    def order(self, actions: Iterable[Action]) -> None:
        """Carry out what the controller decided, and let gateways know which plan that is."""
        self.operations.apply(actions)
        if self.operations.newest != self.published.plan:
            self.published.plan = self.operations.newest
            self.runner.publish()

    async def _remember(self) -> None:
        """Pools and routes as the leader of before had them."""
        try:
            found = await self.store.published(CLUSTER)
        except OSError as error:
            log.warning("the cluster published last cannot be read: %s", error)
            return
        if found is not None:
            cluster = read(found[1], PublishedCluster)
            for instance in cluster.instances:
                self.deployment.set_pool(instance.id, instance.pool)
            self.deployment.shares = shares_of(cluster.shares)

    # --- the books ---------------------------------------------------------------------------------------------------

    async def _restore_books(self) -> None:
        try:
            found = await self.store.published(BOOKS)
            if found is not None:
                self.tail.restore(found[1])
                self._resume_meters(found[1].get("meters", []))
            await self._read_stream()
        except (OSError, ValueError) as error:
            log.warning("the ledger of before cannot be used, it begins anew: %s", error)

    def _meters(self) -> list[list[str | int | float]]:
        """Where the GPUs' counters stood when all before was booked; Unix seconds."""
        counters = self.metering.settled_counters() if self.metering else {}
        return [[node, index, at_s + self.unix_offset_s, joules] for (node, index), (at_s, joules) in counters.items()]

    def _resume_meters(self, meters: Iterable[tuple[str, int, float, float]]) -> None:
        if self.metering is not None:
            self.metering.resume({(n, i): (at_s - self.unix_offset_s, joules) for n, i, at_s, joules in meters})

    async def _book(self) -> None:
        while True:
            try:
                await self._read_stream()
            except OSError as error:
                log.debug("the ledger's stream cannot be read: %s", error)
            await asyncio.sleep(BOOK_S)

    async def _read_stream(self) -> None:
        while entries := await self.store.entries(LEDGER, self.tail.position, ENTRIES):
            self.tail.take(entries)
            await asyncio.sleep(0)

    async def _save(self) -> None:
        version = 0
        while True:
            version += 1
            try:
                books = {**self.tail.snapshot(), "meters": self._meters()}
                await self.store.publish(BOOKS, books, (self.epoch, version))
            except OSError as error:
                log.debug("the ledger cannot be saved: %s", error)
            await asyncio.sleep(SAVE_S)
