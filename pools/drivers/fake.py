"""FakeDriver: an InstanceDriver in memory, for tests and dry runs. Starts no process and opens no socket.

Instances are READY at once, or when ``finish_start`` is called if ``manual_start`` is set; ``crash`` makes one fail.
"""

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace

from pools.drivers.broadcast import EventBroadcast
from pools.drivers.port import (
    DriverError,
    GpuBusyError,
    InstanceEvent,
    InstanceSpec,
    StartRefusedError,
    UnknownGpuError,
    UnknownInstanceError,
)
from pools.instances import GpuSlot, Instance, InstanceState


class FakeDriver:
    """``nodes``: GPUs by node name; ``sm_clocks_mhz``: supported clocks, ascending; the first is where it parks."""

    def __init__(
        self,
        nodes: Mapping[str, int],
        sm_clocks_mhz: Sequence[int],
        models: frozenset[str] | None = None,
        manual_start: bool = False,
    ) -> None:
        self._nodes = dict(nodes)
        self._clocks_mhz = tuple(sm_clocks_mhz)
        self._models = models
        self._manual_start = manual_start
        self._instances: dict[str, Instance] = {}
        self._clock_before_park_mhz: dict[str, int] = {}
        self._lost: set[str] = set()
        self._broadcast = EventBroadcast()

    async def start(self, spec: InstanceSpec) -> Instance:
        """See ``InstanceDriver``; ``StartRefusedError`` for a model that is not among ``models``."""
        if spec.id in self._instances:
            raise DriverError(f"instance {spec.id} runs already")
        if self._models is not None and spec.shape.model not in self._models:
            raise StartRefusedError(f"instance {spec.id}: model {spec.shape.model!r} is not one of {set(self._models)}")
        held = {gpu: other.id for other in self._instances.values() for gpu in other.gpus}
        for gpu in spec.gpus:
            if gpu.node in self._lost or gpu.index not in range(self._nodes.get(gpu.node, 0)):
                raise UnknownGpuError(f"instance {spec.id}: there is no GPU {gpu.index} on node {gpu.node!r}")
            if gpu in held:
                raise GpuBusyError(f"instance {spec.id}: GPU {gpu.index} of {gpu.node} is held by {held[gpu]}")
        instance = Instance(
            id=spec.id,
            pool=spec.pool,
            shape=spec.shape,
            url=f"http://{spec.id}.fake.invalid:8000",
            state=InstanceState.STARTING,
            sm_clock_mhz=self._snap(spec.sm_clock_mhz),
            gpus=spec.gpus,
        )
        self._put(instance, InstanceState.STARTING)
        if not self._manual_start:
            self.finish_start(spec.id)
        return instance

    def finish_start(self, instance_id: str) -> None:
        """Weights are loaded: STARTING becomes READY."""
        self._put(self._get(instance_id), InstanceState.READY)

    def crash(self, instance_id: str, reason: str = "crashed") -> None:
        """The engine dies by itself: FAILED, and its GPUs are free."""
        del self._instances[self._get(instance_id).id]
        self._broadcast.publish(InstanceEvent(instance_id, InstanceState.FAILED, reason))

    def lose_node(self, node: str) -> None:
        """A machine dies: its instances are FAILED, its GPUs cannot be had until ``regain_node``."""
        self._lost.add(node)
        for instance in [i for i in self._instances.values() if i.gpus[0].node == node]:
            self.crash(instance.id, f"node {node} is lost")

    def regain_node(self, node: str) -> None:
        """The machine is back, empty."""
        self._lost.discard(node)

    async def stop(self, instance_id: str, grace_s: float) -> None:
        """See ``InstanceDriver``; nothing runs here, so there is nothing to wait for."""
        if instance_id in self._instances:
            self._put(self._instances[instance_id], InstanceState.DRAINING)
            del self._instances[instance_id]
            self._broadcast.publish(InstanceEvent(instance_id, InstanceState.STOPPED))

    async def list(self) -> tuple[Instance, ...]:
        """See ``InstanceDriver``."""
        return tuple(self._instances[instance_id] for instance_id in sorted(self._instances))

    def lost_nodes(self) -> frozenset[str]:
        """See ``InstanceDriver``."""
        return frozenset(self._lost)

    async def set_sm_clock(self, instance_id: str, sm_clock_mhz: int) -> int:
        """See ``InstanceDriver``; of a parked instance it sets the clock it will wake to."""
        instance = self._get(instance_id)
        clock_mhz = self._snap(sm_clock_mhz)
        if instance.state is InstanceState.PARKED:
            self._clock_before_park_mhz[instance_id] = clock_mhz
        else:
            self._instances[instance_id] = replace(instance, sm_clock_mhz=clock_mhz)
        return clock_mhz

    async def park(self, instance_id: str) -> None:
        """See ``InstanceDriver``."""
        instance = self._get(instance_id)
        if instance.state is not InstanceState.PARKED:
            self._clock_before_park_mhz[instance_id] = instance.sm_clock_mhz
            self._put(replace(instance, sm_clock_mhz=self._clocks_mhz[0]), InstanceState.PARKED)

    async def wake(self, instance_id: str) -> None:
        """See ``InstanceDriver``."""
        instance = self._get(instance_id)
        if instance.state is InstanceState.PARKED:
            clock_mhz = self._clock_before_park_mhz.pop(instance_id)
            self._put(replace(instance, sm_clock_mhz=clock_mhz), InstanceState.READY)

    def events(self) -> AsyncIterator[InstanceEvent]:
        """See ``InstanceDriver``."""
        return self._broadcast.listen()

    async def close(self) -> None:
        """See ``InstanceDriver``."""
        for instance_id in tuple(self._instances):
            await self.stop(instance_id, 0.0)
        self._broadcast.close()

    def free_gpus(self) -> tuple[GpuSlot, ...]:
        """GPUs that no instance holds."""
        held = {gpu for instance in self._instances.values() for gpu in instance.gpus}
        every = (GpuSlot(node, index) for node, count in self._nodes.items() for index in range(count))
        return tuple(gpu for gpu in every if gpu not in held)

    def _snap(self, sm_clock_mhz: int) -> int:
        return min(self._clocks_mhz, key=lambda clock_mhz: abs(clock_mhz - sm_clock_mhz))

    def _get(self, instance_id: str) -> Instance:
        try:
            return self._instances[instance_id]
        except KeyError:
            raise UnknownInstanceError(f"there is no instance {instance_id}") from None

    def _put(self, instance: Instance, state: InstanceState) -> None:
        self._instances[instance.id] = replace(instance, state=state)
        self._broadcast.publish(InstanceEvent(instance.id, state))
