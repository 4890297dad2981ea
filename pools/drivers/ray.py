"""RayDriver: an InstanceDriver on a Ray cluster. Its instances may outlive it; a later driver takes them over.

Each instance is a STRICT_PACK placement group of one bundle a GPU, on the node the plan names, and inside it a detached
supervisor actor that owns the engine process (``ray_supervisor``). How many GPUs of which node is the plan's; which of
the node's GPUs is Ray's, so that others may use the cluster too: a specification's slots are counted, not addressed.
Clocks are set by a node agent's actor (``ray_agent``), on leases. A node that dies is told by ``lost_nodes``, and its
instances are FAILED.

Never places, retries or replaces by itself: that is the plan's and the runner's business.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from ray.exceptions import ActorUnavailableError, RayError, RayTaskError

from energy.gpu import GpuAgentError, GpuReading
from pools.drivers.broadcast import EventBroadcast
from pools.drivers.checks import check_room, model_of
from pools.drivers.port import (
    DriverError,
    GpuBusyError,
    InstanceEvent,
    InstanceSpec,
    StartRefusedError,
    UnknownGpuError,
    UnknownInstanceError,
)
from pools.drivers.ray_agent import ActorNode, AgentSetup
from pools.drivers.ray_cluster import RayCluster, bind
from pools.drivers.ray_supervisor import Supervised, SupervisorSetup
from pools.drivers.vllm_clocks import GpuClocks, NodeGpus
from pools.drivers.vllm_launch import VllmLaunch, VllmModel
from pools.instances import GpuSlot, Instance, InstanceState

log = logging.getLogger("dynamollm.ray")

NODES_PERIOD_S = 1.0
GRANT_TIMEOUT_S = 30.0
UNAVAILABLE_RETRY_S = 1.0
GONE = (InstanceState.FAILED, InstanceState.STOPPED)


@dataclass(frozen=True, slots=True)
class RayOptions:
    """What the operator decides."""

    log_dir: Path
    start_timeout_s: float = 1800.0
    leave_running: bool = True  # on close
    autoscale: bool = False  # nodes that are not there can be had: Ray's autoscaler is asked for them
    holder: str = "dynamollm-gateway"  # of clock leases


@dataclass(slots=True)
class _Running:
    """One instance and what belongs to it."""

    instance: Instance
    actor: Any
    node_id: str
    devices: tuple[GpuSlot, ...]  # as Ray gave them
    sm_clock_awake_mhz: int = 0
    stopping: asyncio.Task[None] | None = None
    following: asyncio.Task[None] | None = None
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)  # parking, waking and clocks wait for each other


class RayDriver:
    """See ``InstanceDriver``. Use it within one event loop; ``close`` it."""

    def __init__(
        self,
        cluster: RayCluster,
        nodes: Mapping[str, int],
        models: Mapping[str, VllmModel],
        launch: VllmLaunch,
        options: RayOptions,
        agents: Callable[[str], AgentSetup] | Mapping[str, NodeGpus],
    ) -> None:
        """``nodes``: GPUs by name; ``models``: by served name.

        ``agents``: how the agent of a node is made as an actor, or who reaches the clocks of which nodes.
        """
        self._cluster = cluster
        self._nodes = dict(nodes)
        self._models = dict(models)
        self._launch = launch
        self._options = options
        self._agents: dict[str, Any] = {}  # actor by Ray node id
        if callable(agents):
            finders = {node: partial(self._agent, agents(node)) for node in nodes}
            agents = {node: ActorNode(node, find, options.holder) for node, find in finders.items()}
        self._clocks = GpuClocks(agents)
        self._specs: dict[str, InstanceSpec] = {}  # of all that hold GPUs, those being started among them
        self._running: dict[str, _Running] = {}
        self._bound: dict[str, str] = {}  # Ray node id by configured name
        self._seen = asyncio.Condition()
        self._hinted: list[int] = []
        self._broadcast = EventBroadcast()
        self._connecting = asyncio.Lock()
        self._watching: asyncio.Task[None] | None = None
        self._closed = False

    # --- the cluster -------------------------------------------------------------------------------------------------

    async def _connect(self) -> None:
        """Once: find the nodes, and take over what runs. Raises ``DriverError``."""
        async with self._connecting:
            if self._closed:
                raise DriverError("the driver is closed")
            if self._watching is not None:
                return
            await asyncio.to_thread(self._cluster.connect)
            found = await asyncio.to_thread(self._cluster.supervised)
            self._bound = {told.spec.gpus[0].node: told.node_id for told, _ in found}
            await self._look()
            for told, actor in found:
                await self._adopt(told, actor)
            self._watching = asyncio.get_running_loop().create_task(self._watch())

    async def _adopt(self, told: Supervised, actor: Any) -> None:
        spec = told.spec
        if told.instance.state in GONE:
            await asyncio.to_thread(self._cluster.release, spec.id)
            return
        devices = tuple(GpuSlot(spec.gpus[0].node, device) for device in told.devices)
        running = _Running(told.instance, actor, told.node_id, devices, told.instance.sm_clock_mhz)
        self._specs[spec.id], self._running[spec.id] = spec, running
        if self._clocks.reaches(devices[0].node):
            with contextlib.suppress(DriverError):  # it runs at default clocks until it is set anew
                await self._relock(running)
        running.following = asyncio.get_running_loop().create_task(self._follow(running, told.news))

    async def _relock(self, running: _Running) -> None:
        clock_mhz = running.sm_clock_awake_mhz
        if running.instance.state is InstanceState.PARKED:
            clock_mhz = await self._clocks.lowest(running.devices)
        running.instance = replace(running.instance, sm_clock_mhz=await self._clocks.lock(running.devices, clock_mhz))

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(NODES_PERIOD_S)
            try:
                await self._look()
            except RayError as error:
                log.warning("cannot ask Ray for its nodes: %s", error)

    async def _look(self) -> None:
        """See which nodes are there; instances of those that are not have failed."""
        alive = await asyncio.to_thread(self._cluster.nodes)
        ids = {node.id for node in alive}
        for name, node_id in self._bound.items():
            if node_id not in ids:
                log.warning("node %s is lost", name)
        # a node without a namesake stands first for a name that somebody waits for
        asked = {spec.gpus[0].node for spec in self._specs.values()}
        nodes = {name: self._nodes[name] for name in sorted(self._nodes, key=lambda name: name not in asked)}
        async with self._seen:
            self._bound = bind(nodes, alive, self._bound)
            self._seen.notify_all()
        for running in tuple(self._running.values()):
            if running.node_id not in ids and running.stopping is None:
                await self._forget(running, InstanceState.FAILED, f"node {running.devices[0].node} is lost")

    def lost_nodes(self) -> frozenset[str]:
        """See ``InstanceDriver``; where an autoscaler brings nodes up, none is."""
        if self._options.autoscale or self._watching is None:
            return frozenset()
        return frozenset(self._nodes.keys() - self._bound.keys())

    async def _hint(self) -> None:
        """Ask the autoscaler for the nodes that hold instances or are to hold some, and for no other."""
        if not self._options.autoscale:
            return
        wanted = [self._nodes[name] for name in sorted({spec.gpus[0].node for spec in self._specs.values()})]
        if wanted != self._hinted:
            self._hinted = wanted
            await asyncio.to_thread(self._cluster.hint, wanted)

    def _agent(self, setup: AgentSetup) -> Any:
        """The agent's actor of a configured node (in a thread). Raises ``GpuAgentError``."""
        node_id = self._bound.get(setup.node)
        if node_id is None:
            raise GpuAgentError(f"node {setup.node} is not in the Ray cluster now")
        if node_id not in self._agents:
            self._agents[node_id] = self._cluster.agent(node_id, setup)
        return self._agents[node_id]

    # --- starting ----------------------------------------------------------------------------------------------------

    async def start(self, spec: InstanceSpec) -> Instance:
        """See ``InstanceDriver``; returns once the process is spawned, which may wait for an autoscaled node."""
        await self._connect()
        check_room(spec, self._specs.values(), self._nodes)
        model = model_of(spec, self._models)
        self._specs[spec.id] = spec
        try:
            await self._hint()
            running = await self._bring_up(spec, model)
        except BaseException:
            del self._specs[spec.id]
            await asyncio.to_thread(self._cluster.release, spec.id)
            await self._hint()
            raise
        self._running[spec.id] = running
        self._broadcast.publish(InstanceEvent(spec.id, InstanceState.STARTING))
        running.following = asyncio.get_running_loop().create_task(self._follow(running, 0))
        return running.instance

    async def _bring_up(self, spec: InstanceSpec, model: VllmModel) -> _Running:
        node_id = await self._node_id(spec)
        group = await asyncio.to_thread(self._cluster.reserve, spec.id, spec.shape.tp, node_id)
        indices = await asyncio.to_thread(self._cluster.granted, group, GRANT_TIMEOUT_S)
        if indices is None:
            raise GpuBusyError(
                f"instance {spec.id}: Ray has no {spec.shape.tp} free GPUs on {spec.gpus[0].node} after "
                f"{GRANT_TIMEOUT_S:g} s: another job of this Ray cluster holds some"
            )
        devices = tuple(GpuSlot(spec.gpus[0].node, index) for index in indices)
        clock_mhz = spec.sm_clock_mhz
        if self._clocks.reaches(devices[0].node):
            clock_mhz = await self._clocks.lock(devices, clock_mhz)
        setup = SupervisorSetup(
            replace(spec, sm_clock_mhz=clock_mhz),
            indices,
            model,
            self._launch,
            self._options.log_dir,
            self._options.start_timeout_s,
        )
        actor = await asyncio.to_thread(self._cluster.supervise, group, setup)
        told: Supervised = await _answer(actor.start.remote())
        return _Running(told.instance, actor, told.node_id, devices)

    async def _node_id(self, spec: InstanceSpec) -> str:
        node = spec.gpus[0].node
        if node not in self._bound and not self._options.autoscale:
            raise UnknownGpuError(f"instance {spec.id}: node {node} is not in the Ray cluster now")
        try:
            async with asyncio.timeout(self._options.start_timeout_s), self._seen:
                await self._seen.wait_for(lambda: node in self._bound)
        except TimeoutError:
            limit_s = self._options.start_timeout_s
            raise StartRefusedError(f"instance {spec.id}: no node came up for {node} within {limit_s:g} s") from None
        return self._bound[node]

    # --- watching ----------------------------------------------------------------------------------------------------

    async def _follow(self, running: _Running, seen: int) -> None:
        """Take in what its supervisor tells, until one of them is gone."""
        while True:
            try:
                events: list[InstanceEvent] = await running.actor.news.remote(seen)
            except ActorUnavailableError:
                await asyncio.sleep(UNAVAILABLE_RETRY_S)  # a lost node is seen elsewhere
                continue
            except RayError as error:
                if running.stopping is None:
                    reason = f"its supervisor is gone: {str(error).splitlines()[0]}"
                    await self._forget(running, InstanceState.FAILED, reason)
                return
            seen += len(events)
            for event in events:
                if event.state is InstanceState.READY and running.instance.state is InstanceState.STARTING:
                    self._enter(running, InstanceState.READY)
                elif event.state in GONE and running.stopping is None:
                    await self._forget(running, event.state, event.reason)
                    return

    async def _forget(self, running: _Running, state: InstanceState, reason: str = "") -> None:
        """It is gone: its clocks and GPUs are free before anybody hears of it."""
        instance = running.instance
        if self._running.pop(instance.id, None) is None:
            return  # two have noticed
        if running.following is not None and running.following is not asyncio.current_task():
            running.following.cancel()
        if state is InstanceState.STOPPED or running.node_id in self._bound.values():
            await self._clocks.reset(running.devices)
        await asyncio.to_thread(self._cluster.release, instance.id)
        del self._specs[instance.id]
        await self._hint()
        self._broadcast.publish(InstanceEvent(instance.id, state, reason))

    # --- changing ----------------------------------------------------------------------------------------------------

    async def stop(self, instance_id: str, grace_s: float) -> None:
        """See ``InstanceDriver``."""
        await self._connect()
        running = self._running.get(instance_id)
        if running is None:
            return
        if running.stopping is None:
            running.stopping = asyncio.get_running_loop().create_task(self._stop(running, grace_s))
        await asyncio.shield(running.stopping)

    async def _stop(self, running: _Running, grace_s: float) -> None:
        self._enter(running, InstanceState.DRAINING)
        with contextlib.suppress(RayError):  # whatever is gone needs no stopping
            await running.actor.stop.remote(grace_s)
        await self._forget(running, InstanceState.STOPPED)

    async def list(self) -> tuple[Instance, ...]:
        """See ``InstanceDriver``."""
        await self._connect()
        return tuple(self._running[instance_id].instance for instance_id in sorted(self._running))

    async def set_sm_clock(self, instance_id: str, sm_clock_mhz: int) -> int:
        """See ``InstanceDriver``; of a parked instance it sets the clock it will wake to."""
        running = self._get(instance_id)
        async with running.turn:
            if running.instance.state is InstanceState.PARKED:
                clock_mhz = await self._clocks.snapped(running.devices, sm_clock_mhz)
                running.sm_clock_awake_mhz = clock_mhz
            else:
                clock_mhz = await self._lock(running, sm_clock_mhz)
            running.actor.note_clock.remote(clock_mhz)
            return clock_mhz

    async def _lock(self, running: _Running, sm_clock_mhz: int) -> int:
        clock_mhz = await self._clocks.lock(running.devices, sm_clock_mhz)
        running.instance = replace(running.instance, sm_clock_mhz=clock_mhz)
        return clock_mhz

    async def park(self, instance_id: str) -> None:
        """See ``InstanceDriver``; running requests finish first."""
        running = self._get(instance_id)
        async with running.turn:
            if running.instance.state is InstanceState.PARKED:
                return
            await _answer(running.actor.park.remote())
            running.sm_clock_awake_mhz = running.instance.sm_clock_mhz
            if self._clocks.reaches(running.devices[0].node):
                await self._lock(running, await self._clocks.lowest(running.devices))
            self._enter(running, InstanceState.PARKED)

    async def wake(self, instance_id: str) -> None:
        """See ``InstanceDriver``."""
        running = self._get(instance_id)
        async with running.turn:
            if running.instance.state is not InstanceState.PARKED:
                return
            if self._clocks.reaches(running.devices[0].node):
                await self._lock(running, running.sm_clock_awake_mhz)  # first, for loading weights is work
            await _answer(running.actor.wake.remote())
            self._enter(running, InstanceState.READY)

    def events(self) -> AsyncIterator[InstanceEvent]:
        """See ``InstanceDriver``."""
        return self._broadcast.listen()

    async def close(self) -> None:
        """See ``InstanceDriver``; with ``leave_running`` the instances run on, for the next driver to take over."""
        if self._closed:
            return
        leave = self._options.leave_running
        if not leave and self._watching is not None:
            await asyncio.gather(*(self.stop(instance_id, 0.0) for instance_id in tuple(self._running)))
        self._closed = True
        following = [running.following for running in self._running.values()]
        for task in (*following, self._watching):
            if task is not None:
                task.cancel()
        if self._watching is not None:
            await self._clocks.close(reset=not leave)
            if not leave:
                await asyncio.to_thread(self._cluster.end_agents)
            await asyncio.to_thread(self._cluster.disconnect)
        self._broadcast.close()

    @property
    def metered_nodes(self) -> frozenset[str]:
        """The nodes whose GPUs can be read."""
        return self._clocks.nodes

    async def read_gpus(self) -> Sequence[GpuReading]:
        """What every GPU reads now, each under the slot that stands for it. Raises ``OSError`` if none can be read."""
        slots: dict[GpuSlot, GpuSlot] = {}
        for running in self._running.values():
            slots.update(zip(running.devices, running.instance.gpus, strict=True))
        read = [(GpuSlot(reading.node, reading.index), reading) for reading in await self._clocks.read()]
        free = {device for device, _ in read} - set(slots.values())  # slots that no instance holds
        for device, _ in read:
            if device not in slots:
                slots[device] = min((slot for slot in free if slot.node == device.node), key=lambda s: s.index)
                free.discard(slots[device])
        return [replace(reading, index=slots[device].index) for device, reading in read]

    def _get(self, instance_id: str) -> _Running:
        try:
            return self._running[instance_id]
        except KeyError:
            raise UnknownInstanceError(f"there is no instance {instance_id}") from None

    def _enter(self, running: _Running, state: InstanceState) -> None:
        running.instance = replace(running.instance, state=state)
        self._broadcast.publish(InstanceEvent(running.instance.id, state))


async def _answer(call: Any) -> Any:
    """What an actor answers. Raises the ``DriverError`` it raised, or one that says that it is gone."""
    try:
        return await call
    except RayTaskError as error:
        cause = error.cause
        raise (cause if isinstance(cause, DriverError) else DriverError(str(error))) from None
    except RayError as error:
        raise DriverError(f"its supervisor is gone: {str(error).splitlines()[0]}") from None
