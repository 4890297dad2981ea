"""AttachDriver: instances that somebody else started. It routes to them; it neither starts nor stops a process.

Servers are listed: ``start`` takes the next free URL of the pool. Or they stand in a file, which is followed while it
changes: those added are found, those removed are withdrawn, there is nothing to start. An instance is READY when its
server has produced a token (a server that sleeps or drains answers /health as well as one that serves), and is asked
again until then. One that refuses the request, as a server of another model does, is FAILED with its answer; one of a
file is asked again later. Clocks are set where the file tells a server's GPUs and their node has an agent. It has no
way to put an engine to sleep, and says so.
"""

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace

import httpx

from energy.gpu import GpuReading
from pools.drivers.attached import AttachedFile, AttachedServer
from pools.drivers.broadcast import EventBroadcast
from pools.drivers.port import DriverError, InstanceEvent, InstanceSpec, StartRefusedError, UnknownInstanceError
from pools.drivers.vllm_clocks import GpuClocks
from pools.drivers.vllm_http import VllmServer
from pools.instances import Instance, InstanceState

log = logging.getLogger("dynamollm.attach")

FILE_PERIOD_S = 1.0  # how often it is looked whether the file has changed
REFUSED_PERIOD_S = 30.0  # how long a server of the file that refuses requests is left alone


class AttachDriver:
    """See ``InstanceDriver``. ``urls``: base URLs by pool name; or a ``file`` of servers, and their ``clocks``."""

    def __init__(
        self,
        urls: Mapping[str, Sequence[str]],
        transport: httpx.AsyncBaseTransport | None = None,
        clocks: GpuClocks | None = None,
        file: AttachedFile | None = None,
    ) -> None:
        self._free = {pool: list(pool_urls) for pool, pool_urls in urls.items()}
        self._clocks = clocks or GpuClocks({})
        self._file = file
        self._following: asyncio.Task[None] | None = None
        self._looking = asyncio.Lock()  # one look at a time, however slow the file's disk is
        self._found: dict[str, AttachedServer] = {}  # by instance; those withdrawn are among them until they are let go
        self._unlocked: set[str] = set()  # instances whose clock could not be set
        self._numbers = itertools.count(1)
        self._instances: dict[str, Instance] = {}
        self._broadcast = EventBroadcast()
        self._probes: dict[str, asyncio.Task[None]] = {}
        self._transport = transport

    async def start(self, spec: InstanceSpec) -> Instance:
        """See ``InstanceDriver``; ``StartRefusedError`` when the pool has no URL left, and always with a file."""
        if self._file is not None:
            raise StartRefusedError(f"instance {spec.id}: servers are those of {self._file.path}; add one there")
        if spec.id in self._instances:
            raise DriverError(f"instance {spec.id} runs already")
        urls = self._free.get(spec.pool, [])
        if not urls:
            raise StartRefusedError(f"instance {spec.id}: pool {spec.pool} has no further URL; add one to driver.urls")
        instance = Instance(
            spec.id, spec.pool, spec.shape, urls.pop(0), InstanceState.STARTING, spec.sm_clock_mhz, spec.gpus
        )
        self._put(instance)
        self._probe(instance)
        return instance

    def _probe(self, instance: Instance) -> None:
        self._probes[instance.id] = asyncio.create_task(self._until_it_serves(instance))

    async def _until_it_serves(self, instance: Instance) -> None:
        server = VllmServer(instance.url, instance.shape.model, self._transport)
        try:
            while True:
                try:
                    await server.until_first_token()
                except DriverError as error:
                    if instance.id not in self._found:
                        await self._forget(instance, InstanceState.FAILED, str(error))
                        return
                    log.warning("instance %s: %s; asked again in %g s", instance.id, error, REFUSED_PERIOD_S)
                    await asyncio.sleep(REFUSED_PERIOD_S)
                else:
                    self._put(replace(self._instances[instance.id], state=InstanceState.READY))
                    return
        finally:
            await server.close()

    # --- a file of servers -------------------------------------------------------------------------------------------

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(FILE_PERIOD_S)
            await self._look()
            for instance_id in tuple(self._unlocked):
                if instance_id in self._found:  # not let go while another's clock was set
                    await self._lock(instance_id)

    async def _look(self) -> None:
        """Take in what has changed in the file; of a server told otherwise, the old one goes and a new one comes."""
        assert self._file is not None
        async with self._looking:
            servers = await asyncio.to_thread(self._file.changed)
            if servers is None:
                return
            present = {server: i for i, server in self._found.items() if self._state(i) is not InstanceState.DRAINING}
            for server in present.keys() - set(servers):
                self._withdraw(present[server])
            for server in servers:
                if server not in present:
                    await self._find(server)

    async def _find(self, server: AttachedServer) -> None:
        name = f"{server.pool.lower()}-{next(self._numbers)}"
        instance = Instance(
            name, server.pool, server.shape, server.url, InstanceState.STARTING, server.sm_clock_mhz, server.gpus
        )
        self._instances[name] = instance
        self._found[name] = server
        if self._reaches(name):
            await self._lock(name)
        instance = self._instances[name]
        self._broadcast.publish(InstanceEvent(name, instance.state, found=instance))
        self._probe(instance)

    async def _lock(self, instance_id: str) -> None:
        """At the clock of its pool; it serves meanwhile if that cannot be set, and is tried again."""
        try:
            await self.set_sm_clock(instance_id, self._found[instance_id].sm_clock_mhz)
        except DriverError as error:
            if instance_id not in self._unlocked:
                log.warning("instance %s: its clock is not set, and is tried again: %s", instance_id, error)
            self._unlocked.add(instance_id)

    def _withdraw(self, instance_id: str) -> None:
        assert self._file is not None
        self._probes[instance_id].cancel()
        instance = self._instances[instance_id] = replace(self._instances[instance_id], state=InstanceState.DRAINING)
        self._broadcast.publish(
            InstanceEvent(instance_id, instance.state, f"{self._file.path} has it no more", withdrawn=True)
        )

    def _state(self, instance_id: str) -> InstanceState:
        return self._instances[instance_id].state

    def _reaches(self, instance_id: str) -> bool:
        """Whether the file tells its GPUs and somebody sets their clocks."""
        server = self._found.get(instance_id)
        return server is not None and server.gpus != () and self._clocks.reaches(server.gpus[0].node)

    async def stop(self, instance_id: str, grace_s: float) -> None:
        """See ``InstanceDriver``; the server runs on, only this gateway forgets it."""
        if (instance := self._instances.get(instance_id)) is None:
            return
        if (probe := self._probes.pop(instance_id, None)) is not None:
            probe.cancel()
            await asyncio.wait((probe,))
        await self._forget(instance, InstanceState.STOPPED)

    async def _forget(self, instance: Instance, state: InstanceState, reason: str = "") -> None:
        """Its URL is free again; the locks on its GPUs are taken off, unless another stands there by now."""
        if self._instances.pop(instance.id, None) is None:
            return
        self._probes.pop(instance.id, None)
        self._unlocked.discard(instance.id)
        if self._found.pop(instance.id, None) is None:
            self._free[instance.pool].append(instance.url)
        else:
            held = {gpu for server in self._found.values() for gpu in server.gpus}
            await self._clocks.reset([gpu for gpu in instance.gpus if gpu not in held])
        self._broadcast.publish(InstanceEvent(instance.id, state, reason))

    async def list(self) -> tuple[Instance, ...]:
        """See ``InstanceDriver``; the first call reads the file and begins to follow it."""
        if self._file is not None and self._following is None:
            self._following = asyncio.create_task(self._follow())
            await self._look()
        return tuple(self._instances[instance_id] for instance_id in sorted(self._instances))

    def lost_nodes(self) -> frozenset[str]:
        """None: whose nodes they are is not known here."""
        return frozenset()

    async def set_sm_clock(self, instance_id: str, sm_clock_mhz: int) -> int:
        """See ``InstanceDriver``; ``DriverError`` where nobody told its GPUs, or their node has no agent."""
        instance = self._get(instance_id)
        if not self._reaches(instance_id):
            raise DriverError(
                f"instance {instance_id} is attached: its clocks are not this gateway's to set; "
                "tell its node and gpus in driver.urls_file, and the node's agent in driver.vllm.agents"
            )
        clock_mhz = await self._clocks.lock(instance.gpus, sm_clock_mhz)
        self._unlocked.discard(instance_id)
        if (instance := self._instances.get(instance_id, instance)).id in self._instances:
            self._instances[instance_id] = replace(instance, sm_clock_mhz=clock_mhz)
        return clock_mhz

    @property
    def metered_nodes(self) -> frozenset[str]:
        """The nodes whose GPUs can be read."""
        return self._clocks.nodes

    async def read_gpus(self) -> Sequence[GpuReading]:
        """What every GPU it reaches reads now. Raises ``OSError`` if none can be read."""
        return await self._clocks.read()

    async def park(self, instance_id: str) -> None:
        """Always ``DriverError``: whoever started the server decides whether it sleeps."""
        self._get(instance_id)
        raise DriverError(f"instance {instance_id} is attached: it cannot be parked from here")

    async def wake(self, instance_id: str) -> None:
        """Nothing to undo: it is never parked."""
        self._get(instance_id)

    def events(self) -> AsyncIterator[InstanceEvent]:
        """See ``InstanceDriver``."""
        return self._broadcast.listen()

    async def close(self) -> None:
        """Forget every instance and take the locks off; their servers run on."""
        if self._following is not None:
            self._following.cancel()
        for instance_id in tuple(self._instances):
            await self.stop(instance_id, 0.0)
        await self._clocks.close()
        self._broadcast.close()

    def _get(self, instance_id: str) -> Instance:
        try:
            return self._instances[instance_id]
        except KeyError:
            raise UnknownInstanceError(f"there is no instance {instance_id}") from None

    def _put(self, instance: Instance) -> None:
        self._instances[instance.id] = instance
        self._broadcast.publish(InstanceEvent(instance.id, instance.state))
