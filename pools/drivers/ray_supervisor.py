"""The supervisor of one instance: a detached Ray actor that owns its engine process, on the node of its GPUs.

Inside it is the very driver that starts engines on one machine (``pools.drivers.vllm``), with one instance, so that
spawning, readiness by the first token, draining, sleeping and the ending of process groups are the same code. It stays
when the driver that made it is gone; who comes next asks what it runs. It sets no clock: leases are the node agent's,
and end with the driver's silence, not with this actor's.
"""

import asyncio
import contextlib
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import ray

from pools.drivers.port import InstanceEvent, InstanceSpec
from pools.drivers.vllm import VllmDriver
from pools.drivers.vllm_clocks import GpuClocks
from pools.drivers.vllm_launch import VllmLaunch, VllmModel
from pools.instances import GpuSlot, Instance

NEWS_WITHIN_S = 20.0
# an engine must not outlive its supervisor: the kernel sees to it where the command is there
_DIES_WITH_PARENT = ("setpriv", "--pdeathsig", "KILL", "--")


@dataclass(frozen=True, slots=True)
class SupervisorSetup:
    """What to run. Picklable."""

    spec: InstanceSpec
    devices: tuple[int, ...]  # the GPUs that Ray gave, in place of the specification's slots
    model: VllmModel
    launch: VllmLaunch
    log_dir: Path
    start_timeout_s: float


@dataclass(frozen=True, slots=True)
class Supervised:
    """What a supervisor runs."""

    spec: InstanceSpec
    devices: tuple[int, ...]
    node_id: str  # Ray's
    instance: Instance  # its GPUs are the specification's slots
    news: int  # events so far


class Supervisor:
    """The actor. Ended with ``ray.kill`` once ``stop`` has returned."""

    def __init__(self, setup: SupervisorSetup) -> None:
        self._setup = setup
        # the node's cluster address, where every gateway reaches it
        launch = replace(setup.launch, host=ray.util.get_node_ip_address())
        if shutil.which(_DIES_WITH_PARENT[0]):
            launch = replace(launch, command=(*_DIES_WITH_PARENT, *launch.command))
        node = setup.spec.gpus[0].node
        self._driver = VllmDriver(
            {node: max(setup.devices) + 1},
            {setup.spec.shape.model: setup.model},
            launch,
            GpuClocks({}),
            setup.log_dir,
            setup.start_timeout_s,
            adopts=False,  # a supervisor answers for one engine; its own
        )
        self._events: list[InstanceEvent] = []
        self._heard = asyncio.Condition()
        self._sm_clock_mhz = setup.spec.sm_clock_mhz
        self._instance: Instance
        self._listening: asyncio.Task[None]

    async def start(self) -> Supervised:
        """Spawn the process. Raises ``DriverError``."""
        self._listening = asyncio.get_running_loop().create_task(self._listen())
        await asyncio.sleep(0)  # it listens before the first event
        spec = self._setup.spec
        gpus = tuple(GpuSlot(spec.gpus[0].node, device) for device in self._setup.devices)
        self._instance = await self._driver.start(replace(spec, gpus=gpus))
        return await self.describe()

    async def _listen(self) -> None:
        async for event in self._driver.events():
            async with self._heard:
                self._instance = replace(self._instance, state=event.state)
                self._events.append(event)
                self._heard.notify_all()

    async def describe(self) -> Supervised:
        """What it runs, as it is now."""
        instance = replace(self._instance, gpus=self._setup.spec.gpus, sm_clock_mhz=self._sm_clock_mhz)
        node_id = ray.get_runtime_context().get_node_id()
        return Supervised(self._setup.spec, self._setup.devices, node_id, instance, len(self._events))

    async def note_clock(self, sm_clock_mhz: int) -> None:
        """Remember the clock its GPUs are locked at (of a sleeping engine: will wake to), for who adopts it."""
        self._sm_clock_mhz = sm_clock_mhz

    async def news(self, seen: int) -> list[InstanceEvent]:
        """Events after the first ``seen``; waits a while for the next one, and may return none."""
        async with self._heard:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(NEWS_WITHIN_S):
                    await self._heard.wait_for(lambda: len(self._events) > seen)
            return self._events[seen:]

    async def stop(self, grace_s: float) -> None:
        """Drain and end the process; returns when nothing of it is left."""
        await self._driver.stop(self._setup.spec.id, grace_s)

    async def park(self) -> None:
        """Put the engine to sleep. Raises ``DriverError``."""
        await self._driver.park(self._setup.spec.id)

    async def wake(self) -> None:
        """Wake it. Raises ``DriverError``."""
        await self._driver.wake(self._setup.spec.id)
