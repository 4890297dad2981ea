"""AttachDriver: instances that somebody else started. It routes to them; it neither starts nor stops a process.

``start`` takes the next free URL of the pool; the instance is READY when its server has produced a token (a server that
sleeps or drains answers /health as well as one that serves), and is asked again until then. One that refuses the
request, as a server of another model does, is FAILED with its answer. It has no way to set a clock or to put an engine
to sleep, and says so.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace

import httpx

from pools.drivers.broadcast import EventBroadcast
from pools.drivers.port import DriverError, InstanceEvent, InstanceSpec, StartRefusedError, UnknownInstanceError
from pools.drivers.vllm_http import VllmServer
from pools.instances import Instance, InstanceState


class AttachDriver:
    """See ``InstanceDriver``. ``urls``: base URLs by pool name."""

    def __init__(self, urls: Mapping[str, Sequence[str]], transport: httpx.AsyncBaseTransport | None = None) -> None:
        self._free = {pool: list(pool_urls) for pool, pool_urls in urls.items()}
        self._instances: dict[str, Instance] = {}
        self._broadcast = EventBroadcast()
        self._probes: dict[str, asyncio.Task[None]] = {}
        self._transport = transport

    async def start(self, spec: InstanceSpec) -> Instance:
        """See ``InstanceDriver``; ``StartRefusedError`` when the pool has no URL left."""
        if spec.id in self._instances:
            raise DriverError(f"instance {spec.id} runs already")
        urls = self._free.get(spec.pool, [])
        if not urls:
            raise StartRefusedError(f"instance {spec.id}: pool {spec.pool} has no further URL; add one to driver.urls")
        instance = Instance(
            spec.id, spec.pool, spec.shape, urls.pop(0), InstanceState.STARTING, spec.sm_clock_mhz, spec.gpus
        )
        self._put(instance)
        self._probes[spec.id] = asyncio.create_task(self._until_it_serves(instance))
        return instance

    async def _until_it_serves(self, instance: Instance) -> None:
        server = VllmServer(instance.url, instance.shape.model, self._transport)
        try:
            await server.until_first_token()
        except DriverError as error:
            self._forget(instance, InstanceState.FAILED, str(error))
        else:
            self._put(replace(instance, state=InstanceState.READY))
        finally:
            await server.close()

    async def stop(self, instance_id: str, grace_s: float) -> None:
        """See ``InstanceDriver``; the server runs on, only this gateway forgets it."""
        if (instance := self._instances.get(instance_id)) is None:
            return
        self._probes[instance_id].cancel()
        await asyncio.wait((self._probes[instance_id],))
        self._forget(instance, InstanceState.STOPPED)

    def _forget(self, instance: Instance, state: InstanceState, reason: str = "") -> None:
        """Its URL is free again."""
        if self._instances.pop(instance.id, None) is not None:
            del self._probes[instance.id]
            self._free[instance.pool].append(instance.url)
            self._broadcast.publish(InstanceEvent(instance.id, state, reason))

    async def list(self) -> tuple[Instance, ...]:
        """See ``InstanceDriver``."""
        return tuple(self._instances[instance_id] for instance_id in sorted(self._instances))

    def lost_nodes(self) -> frozenset[str]:
        """None: whose nodes they are is not known here."""
        return frozenset()

    async def set_sm_clock(self, instance_id: str, sm_clock_mhz: int) -> int:
        """Always ``DriverError``: whoever started the server owns its GPUs' clocks."""
        self._get(instance_id)
        raise DriverError(f"instance {instance_id} is attached: its clocks are not this gateway's to set")

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
        """Forget every instance; their servers run on."""
        for instance_id in tuple(self._instances):
            await self.stop(instance_id, 0.0)
        self._broadcast.close()

    def _get(self, instance_id: str) -> Instance:
        try:
            return self._instances[instance_id]
        except KeyError:
            raise UnknownInstanceError(f"there is no instance {instance_id}") from None

    def _put(self, instance: Instance) -> None:
        self._instances[instance.id] = instance
        self._broadcast.publish(InstanceEvent(instance.id, instance.state))
