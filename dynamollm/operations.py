"""Operations: carries a controller's actions out on the running cluster without harming a request.

Every action names the state that shall hold, so doing one twice does nothing the second time. Actions on one instance
are done in the order they were given, others side by side; clocks have an order of their own, so that they follow at
once while an instance drains. An action of a plan older than the newest seen is refused;
one that is not done by its deadline is abandoned, with the reason kept for people to read. Drivers may fail: what they
refuse is tried again until the deadline.

A drain takes an instance out of routing first, then waits for what it has, then stops it: no request is cut. A re-shard
starts the new instances first where GPUs are free for them, and drains the old ones first where they are not. While a
start is ordered the router knows that its pool has one coming: requests wait, where they would be refused.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from dynamollm.deployment import Deployment
from dynamollm.placement import NoRoomError
from pools.classes import RequestClass
from pools.drivers.port import DriverError, InstanceDriver, InstanceEvent, InstanceSpec
from pools.instances import Instance, InstanceState
from solver.control import Action, Escalate, Park, Reassign, Reshard, Route, ScaleIn, ScaleOut, SetFrequency, Wake

log = logging.getLogger("dynamollm.operations")

POLL_S = 0.25  # how often a wait looks whether what it waits for has come
KEPT_RECORDS = 500


class Outcome(Enum):
    """How an action ended."""

    DONE = "done"
    STALE = "stale"  # a newer plan had been seen
    ABANDONED = "abandoned"  # not done by its deadline


@dataclass(frozen=True, slots=True)
class OperationRecord:
    """One action that has ended, for people to read."""

    action: Action
    outcome: Outcome
    began_s: float
    ended_s: float
    reason: str = ""


class Cluster(Protocol):
    """What the runner offers: starting instances it then watches, and publishing what has changed."""

    async def start_instance(self, spec: InstanceSpec) -> None:
        """Start an instance. Raises ``DriverError``; its GPUs are then free again."""

    def take_in(self, event: InstanceEvent) -> None:
        """Take in a change of state."""

    def publish(self) -> None:
        """Show the router how the cluster is now."""

    def in_flight(self, instance_id: str) -> int:
        """Requests this gateway has sent to an instance and not seen end."""


class _Abandoned(Exception):
    """The deadline came first; the message says what was still missing."""


class Operations:
    """Give it actions with ``apply``; it needs a running event loop."""

    def __init__(
        self, deployment: Deployment, driver: InstanceDriver, cluster: Cluster, clock: Callable[[], float]
    ) -> None:
        self.records: deque[OperationRecord] = deque(maxlen=KEPT_RECORDS)
        self.counts: dict[tuple[str, Outcome], int] = {}
        self._deployment = deployment
        self._driver = driver
        self._cluster = cluster
        self._clock = clock
        self.newest = (0, 0)  # (epoch, version) of the newest plan seen
        self._last_of: dict[str, asyncio.Task[None]] = {}
        self._running: set[asyncio.Task[None]] = set()

    def apply(self, actions: Iterable[Action]) -> None:
        """Begin to carry out actions; returns at once."""
        starts: list[tuple[str, str]] = []
        for action in actions:
            now_s = self._clock()
            if action.plan < self.newest:
                self._record(action, Outcome.STALE, now_s, f"plan {action.plan}, newest seen {self.newest}")
                continue
            self.newest = action.plan
            touched = _touched(action)
            before = [self._last_of[i] for i in touched if i in self._last_of]
            task = asyncio.create_task(self._carry_out(action, before, now_s))
            self._running.add(task)
            task.add_done_callback(self._running.discard)
            self._last_of.update(dict.fromkeys(touched, task))
            starts += _starts(action)
        if self._deployment.expect(starts):
            self._cluster.publish()

    @property
    def busy(self) -> int:
        """Actions under way."""
        return len(self._running)

    async def settled(self) -> None:
        """Wait until nothing is under way."""
        while self._running:
            await asyncio.wait(tuple(self._running))

    async def close(self) -> None:
        """Give up what is under way, as it stands."""
        running = tuple(self._running)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    async def _carry_out(self, action: Action, before: list[asyncio.Task[None]], began_s: float) -> None:
        try:
            if before:
                await asyncio.wait(before)
            await self._until(lambda: self._clock() >= action.not_before_s, action, "its turn")
            if action.plan < self.newest and not isinstance(action, Escalate):
                self._record(action, Outcome.STALE, began_s, f"overtaken by plan {self.newest}")
                return
            await self._retried(action)
        except _Abandoned as error:
            log.warning("%s abandoned: %s", type(action).__name__, error)
            self._record(action, Outcome.ABANDONED, began_s, str(error))
        else:
            self._record(action, Outcome.DONE, began_s)
        finally:
            if self._deployment.expect_no_more(_starts(action)):
                self._cluster.publish()

    async def _retried(self, action: Action) -> None:
        """Do it; where the driver or the GPUs say no, again until the deadline."""
        while True:
            try:
                await self._do(action)
            except (DriverError, NoRoomError) as error:
                if self._clock() + POLL_S >= action.deadline_s:
                    raise _Abandoned(str(error)) from error
                await asyncio.sleep(POLL_S)
            else:
                return

    def _do(self, action: Action) -> Awaitable[None]:
        match action:
            case ScaleOut():
                return self._scale_out(action)
            case ScaleIn():
                return self._scale_in(action.instance_id, action)
            case Reshard():
                return self._reshard(action)
            case Reassign():
                return self._reassign(action)
            case SetFrequency():
                return self._set_clock(action.instance_id, action.sm_clock_mhz)
            case Park():
                return self._park(action)
            case Wake():
                return self._wake(action)
            case Route():
                return self._route(action)
            case Escalate():
                return self._escalate(action)

    # --- each action -------------------------------------------------------------------------------------------------

    async def _scale_out(self, action: ScaleOut) -> None:
        if action.instance_id not in self._deployment.instances:
            await self._start(action)
        await self._until(
            lambda: self._state(action.instance_id) is not InstanceState.STARTING, action, "the instance to be ready"
        )
        if self._state(action.instance_id) is not InstanceState.READY:
            raise DriverError(f"instance {action.instance_id} did not come up")

    async def _start(self, order: ScaleOut) -> None:
        spec = self._deployment.specify(order.pool, order.tp, order.sm_clock_mhz, order.node, order.instance_id)
        await self._cluster.start_instance(spec)

    async def _scale_in(self, instance_id: str, action: Action) -> None:
        if instance_id not in self._deployment.instances:
            return
        await self._drain(instance_id, action)
        await self._driver.stop(instance_id, grace_s=max(action.deadline_s - self._clock(), 0.0))
        self._cluster.take_in(InstanceEvent(instance_id, InstanceState.STOPPED))

    async def _drain(self, instance_id: str, action: Action) -> None:
        """Route nothing new to it and wait for what it has; if that takes too long, it goes on serving."""
        self._cluster.take_in(InstanceEvent(instance_id, InstanceState.DRAINING))
        try:
            await self._until(lambda: self._cluster.in_flight(instance_id) == 0, action, "its requests to finish")
        except _Abandoned:
            self._cluster.take_in(InstanceEvent(instance_id, InstanceState.READY, "its drain was abandoned"))
            raise

    async def _reshard(self, action: Reshard) -> None:
        waiting = [order for order in action.create if order.instance_id not in self._deployment.instances]
        for order in tuple(waiting):
            try:
                await self._start(order)
            except NoRoomError:
                continue  # on the GPUs of those that retire
            waiting.remove(order)
        if len(waiting) < len(action.create):  # some capacity comes up first: shift to it, then drain
            await self._until(lambda: not self._starting(action.create), action, "the new instances to be ready")
        await asyncio.gather(*(self._scale_in(instance_id, action) for instance_id in action.retire))
        for order in waiting:
            await self._start(order)
        await self._until(lambda: not self._starting(action.create), action, "the new instances to be ready")

    def _starting(self, orders: Iterable[ScaleOut]) -> bool:
        return any(self._state(order.instance_id) is InstanceState.STARTING for order in orders)

    async def _reassign(self, action: Reassign) -> None:
        # the plan's new instances may not be there yet: the last one that serves a class stays until they are
        await self._until(lambda: self._leaves_a_home(action), action, "another instance for its pool's class")
        self._deployment.set_pool(action.instance_id, action.pool)
        self._cluster.publish()

    def _leaves_a_home(self, action: Reassign) -> bool:
        """Whether requests of the pool that an instance leaves still have a READY instance to go to."""
        pools = {pool.name: pool for pool in self._deployment.settings.pools}
        moving = self._deployment.instances.get(action.instance_id)
        if moving is None or moving.state is not InstanceState.READY:
            return True
        left = pools[moving.pool]
        for instance in self._deployment.instances.values():
            pool = pools[action.pool if instance is moving else instance.pool]
            dominates = RequestClass[pool.request_class].dominates(RequestClass[left.request_class])
            if instance.state is InstanceState.READY and pool.model == left.model and dominates:
                return True
        return False

    async def _set_clock(self, instance_id: str, sm_clock_mhz: int) -> None:
        deployment = self._deployment
        if instance_id not in deployment.instances or deployment.ordered_sm_clock_mhz(instance_id) == sm_clock_mhz:
            return
        in_force_mhz = await self._driver.set_sm_clock(instance_id, sm_clock_mhz)
        deployment.set_sm_clock(instance_id, sm_clock_mhz, in_force_mhz)
        self._cluster.publish()

    async def _park(self, action: Park) -> None:
        if self._state(action.instance_id) not in (InstanceState.READY, InstanceState.DRAINING):
            return
        await self._drain(action.instance_id, action)
        await self._driver.park(action.instance_id)
        self._cluster.take_in(InstanceEvent(action.instance_id, InstanceState.PARKED))

    async def _wake(self, action: Wake) -> None:
        if self._state(action.instance_id) is not InstanceState.PARKED:
            return
        # the clock first: a request admitted at the parked clock would miss its SLO
        in_force_mhz = await self._driver.set_sm_clock(action.instance_id, action.sm_clock_mhz)
        await self._driver.wake(action.instance_id)
        self._deployment.set_sm_clock(action.instance_id, action.sm_clock_mhz, in_force_mhz)
        self._cluster.take_in(InstanceEvent(action.instance_id, InstanceState.READY))

    async def _route(self, action: Route) -> None:
        self._deployment.set_shares(action.pools, action.pool_share)
        self._cluster.publish()

    async def _escalate(self, action: Escalate) -> None:
        """The gateway's queue is always in deadline order, re-steers and squashes by itself: nothing to set."""

    # --- waiting and recording ---------------------------------------------------------------------------------------

    def _state(self, instance_id: str) -> InstanceState | None:
        instance: Instance | None = self._deployment.instances.get(instance_id)
        return instance.state if instance else None

    async def _until(self, holds: Callable[[], bool], action: Action, what: str) -> None:
        while not holds():
            if self._clock() >= action.deadline_s:
                raise _Abandoned(f"waited for {what} until the deadline")
            await asyncio.sleep(POLL_S)

    def _record(self, action: Action, outcome: Outcome, began_s: float, reason: str = "") -> None:
        self.records.append(OperationRecord(action, outcome, began_s, self._clock(), reason))
        key = (type(action).__name__, outcome)
        self.counts[key] = self.counts.get(key, 0) + 1


def _starts(action: Action) -> list[tuple[str, str]]:
    """The instances that an action is to start, each with its pool."""
    match action:
        case ScaleOut():
            return [(action.instance_id, action.pool)]
        case Reshard():
            return [(order.instance_id, order.pool) for order in action.create]
        case _:
            return []


def _touched(action: Action) -> tuple[str, ...]:
    """What an action must have to itself: instances, the routes, a clock."""
    match action:
        case Reshard():
            return (*action.retire, *(order.instance_id for order in action.create))
        case Route():
            return ("",)  # routes follow one another
        case SetFrequency():
            return (f"{action.instance_id} clock",)  # one that drains may yet need another
        case _:
            return (action.instance_id,)
