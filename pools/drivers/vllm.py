"""VllmDriver: an InstanceDriver whose instances are real ``vllm serve`` processes on this machine.

An instance is READY when it has produced tokens; /health is never asked. One whose process ends by itself is FAILED,
with the last error of its log; replacing it, and waiting before that, is the runner's business. A drain is SIGTERM:
vLLM finishes what it has, and whoever stops it has told the router already. Parked engines sleep (weights in host
memory) on GPUs at their lowest clock. Engines of a controller that was killed are ended before the first start.
"""

import asyncio
import logging
import os
import socket
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from energy.gpu import GpuReading
from pools.drivers.broadcast import EventBroadcast
from pools.drivers.checks import check_room, model_of
from pools.drivers.port import (
    DriverError,
    InstanceEvent,
    InstanceSpec,
    StartRefusedError,
    UnknownInstanceError,
)
from pools.drivers.vllm_clocks import GpuClocks
from pools.drivers.vllm_http import VllmServer
from pools.drivers.vllm_launch import VllmLaunch, VllmModel, command_line, environment
from pools.drivers.vllm_processes import EngineProcess, end_orphans, this_controller
from pools.instances import Instance, InstanceState

log = logging.getLogger("dynamollm.vllm")


@dataclass(slots=True)
class _Running:
    """One instance and what belongs to it."""

    instance: Instance
    server: VllmServer
    process: EngineProcess
    watching: asyncio.Task[None] | None = None
    sm_clock_awake_mhz: int = 0
    stopping: bool = False
    reason: str = ""  # why it was killed, where it was not stopped
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)  # parking and waking wait for each other


class VllmDriver:
    """See ``InstanceDriver``. Use it within one event loop; ``close`` it."""

    def __init__(
        self,
        nodes: Mapping[str, int],
        models: Mapping[str, VllmModel],
        launch: VllmLaunch,
        clocks: GpuClocks,
        log_dir: Path,
        start_timeout_s: float = 1800.0,
    ) -> None:
        """``nodes``: GPUs by node name; ``models``: by served name. Each instance writes ``log_dir/ID.log``."""
        self._nodes = dict(nodes)
        self._models = dict(models)
        self._launch = launch
        self._clocks = clocks
        self._log_dir = log_dir
        self._start_timeout_s = start_timeout_s
        self._specs: dict[str, InstanceSpec] = {}  # of all that hold GPUs, those being spawned among them
        self._running: dict[str, _Running] = {}
        self._broadcast = EventBroadcast()
        self._orphans_ended = False

    async def start(self, spec: InstanceSpec) -> Instance:
        """See ``InstanceDriver``."""
        model = self._check(spec)
        self._specs[spec.id] = spec
        try:
            if not self._orphans_ended:  # before the first engine needs the GPUs that orphans hold
                self._orphans_ended = True
                for name in end_orphans():
                    log.warning("instance %s of a controller that is gone was ended", name)
            running = await self._spawn(spec, model)
        except BaseException:
            del self._specs[spec.id]
            await self._clocks.reset(spec.gpus)
            raise
        self._running[spec.id] = running
        self._enter(running, InstanceState.STARTING)
        running.watching = asyncio.get_running_loop().create_task(self._watch(running))
        return running.instance

    def _check(self, spec: InstanceSpec) -> VllmModel:
        check_room(spec, self._specs.values(), self._nodes)
        return model_of(spec, self._models)

    async def _spawn(self, spec: InstanceSpec, model: VllmModel) -> _Running:
        clock_mhz = spec.sm_clock_mhz
        if self._clocks.reaches(spec.gpus[0].node):
            clock_mhz = await self._clocks.lock(spec.gpus, clock_mhz)
        port = _free_port(self._launch.host)
        url = f"http://{self._launch.host}:{port}"
        words = command_line(self._launch, model, spec, port)
        variables = environment(self._launch, model, spec, this_controller(), os.environ)
        self._log_dir.mkdir(parents=True, exist_ok=True)
        try:
            process = await EngineProcess.spawn(words, variables, self._log_dir / f"{spec.id}.log")
        except OSError as error:
            raise StartRefusedError(
                f"instance {spec.id}: cannot execute {words[0]!r}: {error.strerror}; is it installed?"
            ) from None
        instance = Instance(spec.id, spec.pool, spec.shape, url, InstanceState.STARTING, clock_mhz, spec.gpus)
        return _Running(instance, VllmServer(url, spec.shape.model), process)

    # --- watching ----------------------------------------------------------------------------------------------------

    async def _watch(self, running: _Running) -> None:
        """From spawning to the end of its process."""
        becoming_ready = asyncio.create_task(self._become_ready(running))
        try:
            how = await running.process.wait()
        finally:
            becoming_ready.cancel()
            await running.server.close()
        if not running.stopping:
            await self._forget(running, InstanceState.FAILED, f"{running.reason}{how}")

    async def _become_ready(self, running: _Running) -> None:
        try:
            async with asyncio.timeout(self._start_timeout_s):
                await running.server.until_first_token()
        except TimeoutError:
            running.reason = f"no token within {self._start_timeout_s:g} s; "
        except DriverError as error:
            running.reason = f"{error}; "
        else:
            if running.instance.state is InstanceState.STARTING:
                self._enter(running, InstanceState.READY)
            return
        running.process.kill()

    async def _forget(self, running: _Running, state: InstanceState, reason: str = "") -> None:
        """Its process is gone: its clocks and GPUs are free before anybody hears of it."""
        instance = running.instance
        await self._clocks.reset(instance.gpus)
        del self._running[instance.id]
        del self._specs[instance.id]
        self._broadcast.publish(InstanceEvent(instance.id, state, reason))

    # --- changing ----------------------------------------------------------------------------------------------------

    async def stop(self, instance_id: str, grace_s: float) -> None:
        """See ``InstanceDriver``."""
        running = self._running.get(instance_id)
        if running is None:
            return
        assert running.watching is not None
        if running.stopping:
            await asyncio.wait([running.watching])
            return
        running.stopping = True
        serves = running.instance.state is InstanceState.READY
        self._enter(running, InstanceState.DRAINING)
        await running.process.end(grace_s if serves else 0.0, running.server.until_idle())
        await asyncio.wait([running.watching])
        if instance_id in self._running:  # else it ended by itself a moment before
            await self._forget(running, InstanceState.STOPPED)

    async def list(self) -> tuple[Instance, ...]:
        """See ``InstanceDriver``."""
        return tuple(self._running[instance_id].instance for instance_id in sorted(self._running))

    def lost_nodes(self) -> frozenset[str]:
        """None: there is this machine alone."""
        return frozenset()

    async def set_sm_clock(self, instance_id: str, sm_clock_mhz: int) -> int:
        """See ``InstanceDriver``; of a parked instance it sets the clock it will wake to."""
        running = self._get(instance_id)
        async with running.turn:
            if running.instance.state is InstanceState.PARKED:
                clock_mhz = await self._clocks.snapped(running.instance.gpus, sm_clock_mhz)
                running.sm_clock_awake_mhz = clock_mhz
                return clock_mhz
            return await self._lock(running, sm_clock_mhz)

    async def _lock(self, running: _Running, sm_clock_mhz: int) -> int:
        clock_mhz = await self._clocks.lock(running.instance.gpus, sm_clock_mhz)
        running.instance = replace(running.instance, sm_clock_mhz=clock_mhz)
        return clock_mhz

    async def park(self, instance_id: str) -> None:
        """See ``InstanceDriver``; running requests finish first. ``DriverError`` where the build cannot sleep."""
        running = self._get(instance_id)
        async with running.turn:
            if running.instance.state is InstanceState.PARKED:
                return
            if running.instance.state is not InstanceState.READY:
                raise DriverError(f"instance {instance_id} is {running.instance.state.value}: only READY ones park")
            await running.server.until_idle()
            await running.server.sleep()
            running.sm_clock_awake_mhz = running.instance.sm_clock_mhz
            if self._clocks.reaches(running.instance.gpus[0].node):
                await self._lock(running, await self._clocks.lowest(running.instance.gpus))
            self._enter(running, InstanceState.PARKED)

    async def wake(self, instance_id: str) -> None:
        """See ``InstanceDriver``."""
        running = self._get(instance_id)
        async with running.turn:
            if running.instance.state is not InstanceState.PARKED:
                return
            if self._clocks.reaches(running.instance.gpus[0].node):
                await self._lock(running, running.sm_clock_awake_mhz)  # first, for loading weights is work
            await running.server.wake()
            self._enter(running, InstanceState.READY)

    @property
    def metered_nodes(self) -> frozenset[str]:
        """The nodes whose GPUs can be read."""
        return self._clocks.nodes

    async def read_gpus(self) -> Sequence[GpuReading]:
        """What every GPU it reaches reads now. Raises ``OSError`` if none can be read."""
        return await self._clocks.read()

    def events(self) -> AsyncIterator[InstanceEvent]:
        """See ``InstanceDriver``."""
        return self._broadcast.listen()

    async def close(self) -> None:
        """See ``InstanceDriver``."""
        await asyncio.gather(*(self.stop(instance_id, 0.0) for instance_id in tuple(self._running)))
        await self._clocks.close()
        self._broadcast.close()

    def _get(self, instance_id: str) -> _Running:
        try:
            return self._running[instance_id]
        except KeyError:
            raise UnknownInstanceError(f"there is no instance {instance_id}") from None

    def _enter(self, running: _Running, state: InstanceState) -> None:
        running.instance = replace(running.instance, state=state)
        self._broadcast.publish(InstanceEvent(running.instance.id, state))


def _free_port(host: str) -> int:
    """A port nobody listens on; another program may take it before the server does, which is then a failed start."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port
