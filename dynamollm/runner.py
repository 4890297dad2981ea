"""Runner: keeps the running cluster as it should be, and the router's view of it fresh.

The asyncio side of control: starts the configured instances through a driver, takes in its events, replaces what
crashed (with back-off), and asks each engine now and then how loaded it is. What it knows is in ``Deployment``, what it
decides is nothing. Never on a request's path: a slow driver or a dead engine delays no routing decision.
"""

import asyncio
import logging
import math
from collections.abc import Callable
from typing import Protocol

from dynamollm.deployment import Deployment
from dynamollm.placement import NoRoomError
from pools.drivers.port import DriverError, InstanceDriver, InstanceEvent, InstanceSpec
from pools.instances import Instance, InstanceState
from pools.view import ClusterView, EngineLoad

log = logging.getLogger("dynamollm.runner")

SCRAPE_PERIOD_S = 5.0
FIRST_RESTART_S = 1.0
LAST_RESTART_S = 60.0
DRAIN_POLL_S = 0.25  # how often it is looked whether the requests of an instance that is taken away have ended
START_WEIGHT = 0.3  # of the last start in what the next one is expected to take


class RoutedFleet(Protocol):
    """What the runner tells the router."""

    def update(self, view: ClusterView, now_s: float) -> None:
        """Take over a new view."""

    def observe(self, instance_id: str, load: EngineLoad, now_s: float) -> None:
        """Take in what an engine says of its load."""

    def in_flight(self, instance_id: str) -> int:
        """Requests sent to an instance that have not ended."""


class EngineProbe(Protocol):
    """Asks an engine how loaded it is."""

    async def load(self, url: str) -> EngineLoad:
        """Scrape once. Raises ``OSError`` where it cannot."""


class Scraper:
    """Asks every engine in turn how loaded it is, and tells the router; ``run`` it as a task."""

    def __init__(
        self, deployment: Deployment, router: RoutedFleet, probe: EngineProbe, clock: Callable[[], float]
    ) -> None:
        self._deployment = deployment
        self._router = router
        self._probe = probe
        self._clock = clock

    async def run(self) -> None:
        """Spread over the period, so that no two answers are parsed back to back."""
        while True:
            ready = [i for i in self._deployment.instances.values() if i.state is InstanceState.READY]
            for instance in ready:
                await self._scrape_one(instance)
                await asyncio.sleep(SCRAPE_PERIOD_S / len(ready))
            if not ready:
                await asyncio.sleep(SCRAPE_PERIOD_S)

    async def _scrape_one(self, instance: Instance) -> None:
        try:
            load = await self._probe.load(instance.url)
        except OSError as error:
            log.debug("instance %s: no load: %s", instance.id, error)
            return
        self._router.observe(instance.id, load, self._clock())


def restart_delay_s(failures: int) -> float:
    """How long to wait before the next start after this many failures in a row: 1, 2, 4 ... 60 s."""
    return float(min(FIRST_RESTART_S * 2 ** (failures - 1), LAST_RESTART_S))


class Runner:
    """``run`` it as a task; ``settled`` tells when the cluster is up."""

    def __init__(
        self,
        deployment: Deployment,
        driver: InstanceDriver,
        router: RoutedFleet,
        probe: EngineProbe | None,
        clock: Callable[[], float],
        startup_s: float = 120.0,
    ) -> None:
        """``startup_s``: how long a start is expected to take until one has been seen."""
        self._deployment = deployment
        self._driver = driver
        self._router = router
        self._scraper = Scraper(deployment, router, probe, clock) if probe else None
        self._clock = clock
        self.startup_s = startup_s
        self.seen_start_s = math.nan  # how long starts have taken of late, measured; nan until one was seen
        self._started_s: dict[str, float] = {}
        self._specs: dict[str, InstanceSpec] = {}
        self._early: dict[str, InstanceEvent] = {}  # overtook the answer to their start
        self._failures: dict[str, int] = {}  # in a row, by pool
        self._adopted = asyncio.Event()
        self._settled = asyncio.Event()
        self._tasks: asyncio.TaskGroup

    async def run(self) -> None:
        """Bring the cluster up and keep it up, until cancelled; the driver is closed on the way out."""
        try:
            async with asyncio.TaskGroup() as self._tasks:
                events = self._driver.events()
                await self._adopt()
                self._adopted.set()
                if self._scraper is not None:
                    self._tasks.create_task(self._scraper.run())
                starting = [self._tasks.create_task(self._start(spec)) for spec in self._deployment.configured()]
                self._tasks.create_task(self._watch_settling(starting))
                async for event in events:
                    await self._hear(event)
        finally:
            await self._driver.close()

    async def _adopt(self) -> None:
        """Take over what an earlier controller left running; what the settings no longer know is stopped."""
        for instance in await self._driver.list():
            await self._take_over(instance)
        if self._deployment.instances:
            self.publish()

    async def _take_over(self, instance: Instance) -> None:
        if why := self._deployment.adopt(instance):
            log.warning("instance %s runs and is stopped: %s", instance.id, why)
            await self._driver.stop(instance.id, grace_s=0.0)
            return
        log.info("instance %s runs already, %s at %s", instance.id, instance.state.value, instance.url)
        if instance.gpus:  # else nobody knows where to start another in its place
            self._specs[instance.id] = InstanceSpec(
                instance.id, instance.pool, instance.shape, instance.gpus, instance.sm_clock_mhz
            )

    async def _hear(self, event: InstanceEvent) -> None:
        """What the driver tells; what it has come upon is taken over, what is taken away is let go of."""
        if event.found is None:
            self.take_in(event)
        elif event.instance_id not in self._deployment.instances:
            await self._take_over(event.found)
            self.publish()
        if event.withdrawn:
            self._tasks.create_task(self._let_go(event.instance_id))

    async def _let_go(self, instance_id: str) -> None:
        while self.in_flight(instance_id):  # noqa: ASYNC110 - the router tells nobody when it has ended
            await asyncio.sleep(DRAIN_POLL_S)
        await self._driver.stop(instance_id, grace_s=0.0)

    async def adopted(self) -> None:
        """Wait until it is known what ran before."""
        await self._adopted.wait()

    async def settled(self) -> None:
        """Wait until no instance is starting any more: each is READY or has failed at least once."""
        await self._settled.wait()

    async def _watch_settling(self, starting: list[asyncio.Task[None]]) -> None:
        if starting:
            await asyncio.wait(starting)
        self._check_settled()

    def _check_settled(self) -> None:
        states = [instance.state for instance in self._deployment.instances.values()]
        if InstanceState.STARTING not in states and (states or self._failures):
            self._settled.set()

    # --- what operations use (see ``dynamollm.operations.Cluster``) ---------------------------------------------------

    async def start_instance(self, spec: InstanceSpec) -> None:
        """Start an instance and watch it. Raises ``DriverError``; its GPUs are then free again."""
        self._specs[spec.id] = spec
        self._started_s[spec.id] = self._clock()
        self._deployment.begin_start(spec, self._clock() + self.startup_s)
        try:
            instance = await self._driver.start(spec)
        except DriverError:
            del self._specs[spec.id]
            self._deployment.placement.release(spec.gpus)
            raise
        self._deployment.put(instance)
        self.publish()
        if (early := self._early.pop(spec.id, None)) is not None:
            self.take_in(early)

    def take_in(self, event: InstanceEvent) -> None:
        """Take in a change of state; one that failed is replaced."""
        before = self._deployment.instances.get(event.instance_id)
        after = self._deployment.change(event)
        if after is None:
            if event.instance_id in self._specs:
                self._early[event.instance_id] = event
            return
        self.publish()
        if event.state is InstanceState.READY:
            self._failures.pop(after.pool, None)
            if (began_s := self._started_s.pop(after.id, None)) is not None:
                self._learn_start(self._clock() - began_s)
            log.info("instance %s is ready at %s", after.id, after.url)
        elif event.state is InstanceState.STOPPED:
            self._specs.pop(after.id, None)
        elif event.state is InstanceState.FAILED:
            was = before.state.value if before else "unknown"
            log.warning("instance %s failed while %s: %s", after.id, was, event.reason or "no reason given")
            spec = self._specs.pop(after.id)
            if was != InstanceState.DRAINING.value:  # that one was to go anyway
                self._replace_later(spec)
        self._check_settled()

    def _learn_start(self, took_s: float) -> None:
        """Measured, not assumed: what the next start is expected to take, and what controllers are told."""
        if math.isnan(self.seen_start_s):
            self.seen_start_s = took_s
        else:
            self.seen_start_s += START_WEIGHT * (took_s - self.seen_start_s)
        self.startup_s = self.seen_start_s

    def publish(self) -> None:
        """Show the router how the cluster is now."""
        now_s = self._clock()
        self._router.update(self._deployment.routing_view(now_s), now_s)

    def in_flight(self, instance_id: str) -> int:
        """Requests this gateway has sent to an instance and not seen end."""
        return self._router.in_flight(instance_id)

    # --- keeping up --------------------------------------------------------------------------------------------------

    async def _start(self, spec: InstanceSpec) -> None:
        try:
            await self.start_instance(spec)
        except DriverError as error:
            log.error("instance %s cannot start: %s", spec.id, error)
            self._replace_later(spec)

    def _replace_later(self, spec: InstanceSpec) -> None:
        self._failures[spec.pool] = self._failures.get(spec.pool, 0) + 1
        delay_s = restart_delay_s(self._failures[spec.pool])
        log.info("pool %s: a replacement of %s starts in %g s", spec.pool, spec.id, delay_s)
        self._tasks.create_task(self._replace(spec, delay_s))

    async def _replace(self, spec: InstanceSpec, delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        await self._driver.stop(spec.id, grace_s=0.0)  # whatever is left of it holds its GPUs
        try:
            replacement = self._deployment.specify(spec.pool, spec.shape.tp, spec.sm_clock_mhz)
        except NoRoomError as error:
            log.warning("pool %s: no replacement of %s: %s", spec.pool, spec.id, error)
            self._replace_later(spec)
        else:
            await self._start(replacement)
