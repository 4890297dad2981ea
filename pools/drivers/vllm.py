"""VllmDriver: an InstanceDriver whose instances are real ``vllm serve`` processes on this machine.

An instance is READY when it has produced tokens; /health is never asked. One whose process ends by itself is FAILED,
with the last error of its log; replacing it, and waiting before that, is the runner's business. A drain is SIGTERM:
vLLM finishes what it has, and whoever stops it has told the router already. Parked engines sleep (weights in host
memory) on GPUs at their lowest clock. Engines of a controller that is gone are adopted where they are what would be
started in their place, READY as soon as they give a token, and ended where they are not.
"""

import asyncio
import contextlib
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
from pools.drivers.vllm_http import TOKEN_TIMEOUT_S, VllmServer
from pools.drivers.vllm_launch import RECORD, VllmLaunch, VllmModel, command_line, environment, record_of
from pools.drivers.vllm_orphans import Orphan, find_orphans
from pools.drivers.vllm_processes import EngineProcess, this_controller
from pools.instances import Instance, InstanceState

log = logging.getLogger("dynamollm.vllm")


@dataclass(slots=True)
class _Running:
    """One instance and what belongs to it."""

    instance: Instance
    server: VllmServer
    process: EngineProcess
    start_timeout_s: float
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
        leave_running: bool = False,
        adopts: bool = True,
    ) -> None:
        """``nodes``: GPUs by node name; ``models``: by served name. Each instance writes ``log_dir/ID.log``.

        ``leave_running``: on close; ``adopts``: else what an earlier controller left is ended, whatever it is.
        """
        self._nodes = dict(nodes)
        self._models = dict(models)
        self._launch = launch
        self._clocks = clocks
        self._log_dir = log_dir
        self._start_timeout_s = start_timeout_s
        self._leave_running = leave_running
        self._adopts = adopts
        self._specs: dict[str, InstanceSpec] = {}  # of all that hold GPUs, those being spawned among them
        self._running: dict[str, _Running] = {}
        self._broadcast = EventBroadcast()
        self._taking_over = asyncio.Lock()
        self._took_over = False

    async def start(self, spec: InstanceSpec) -> Instance:
        """See ``InstanceDriver``."""
        await self._take_over()  # before the first engine needs the GPUs that orphans hold
        model = self._check(spec)
        self._specs[spec.id] = spec
        try:
            running = await self._spawn(spec, model)
        except BaseException:
            del self._specs[spec.id]
            await self._clocks.reset(spec.gpus)
            raise
        self._follow(running)
        self._enter(running, InstanceState.STARTING)
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
        variables[RECORD] = record_of(self._launch, model, spec, port, self._log_path(spec)).text()
        self._log_dir.mkdir(parents=True, exist_ok=True)
        try:
            process = EngineProcess.spawn(words, variables, self._log_path(spec))
        except OSError as error:
            raise StartRefusedError(
                f"instance {spec.id}: cannot execute {words[0]!r}: {error.strerror}; is it installed?"
            ) from None
        instance = Instance(spec.id, spec.pool, spec.shape, url, InstanceState.STARTING, clock_mhz, spec.gpus)
        return _Running(instance, VllmServer(url, spec.shape.model), process, self._start_timeout_s)

    def _log_path(self, spec: InstanceSpec) -> Path:
        return self._log_dir.resolve() / f"{spec.id}.log"

    # --- what an earlier controller left -----------------------------------------------------------------------------

    async def _take_over(self) -> None:
        """Once: adopt or end every engine whose controller is gone."""
        async with self._taking_over:
            if self._took_over:
                return
            for orphan in find_orphans():
                if self._is_others(orphan):
                    orphan.held.close()
                elif why := self._unfit(orphan):
                    log.warning("instance %s of a controller that is gone is ended: %s", orphan.name, why)
                    await orphan.end()
                    if orphan.record is not None:
                        await self._clocks.reset(orphan.record.spec.gpus)
                else:
                    await self._adopt(orphan)
            self._took_over = True

    def _is_others(self, orphan: Orphan) -> bool:
        """Whether another deployment started it, on GPUs that are not this one's: for it to adopt."""
        if (record := orphan.record) is None or Path(record.log_path) == self._log_path(record.spec):
            return False
        return all(gpu.index >= self._nodes.get(gpu.node, 0) for gpu in record.spec.gpus)

    def _unfit(self, orphan: Orphan) -> str:
        """Why it is not what would be started in its place; empty if it is."""
        if not self._adopts:
            return "its successor starts its own"
        if (record := orphan.record) is None:
            return "its server is gone, or does not say what it was started as"
        try:
            model = self._check(record.spec)
        except DriverError as error:
            return str(error)
        now = record_of(self._launch, model, record.spec, record.port, self._log_path(record.spec))
        return "" if now == record else "it was started with other settings, or by another deployment"

    async def _adopt(self, orphan: Orphan) -> None:
        """It is STARTING, as one that was just spawned, until it gives a token; or PARKED, if it sleeps."""
        assert orphan.record is not None
        spec = orphan.record.spec
        self._specs[spec.id] = spec
        process = orphan.adopt(self._log_path(spec))
        url = f"http://{self._launch.host}:{orphan.record.port}"
        server = VllmServer(url, spec.shape.model)
        sleeps = self._launch.can_park and await server.sleeps()
        state = InstanceState.PARKED if sleeps else InstanceState.STARTING
        clock_mhz = spec.sm_clock_mhz
        with contextlib.suppress(DriverError):  # it runs at the clock it has until one is set anew
            clock_mhz = await self._relock(spec, sleeps)
        instance = Instance(spec.id, spec.pool, spec.shape, url, state, clock_mhz, spec.gpus)
        # one that should have been up long ago hangs: it has the time of one question
        limit_s = max(self._start_timeout_s - process.age_s, TOKEN_TIMEOUT_S)
        running = _Running(instance, server, process, limit_s, sm_clock_awake_mhz=spec.sm_clock_mhz)
        self._follow(running)
        log.info("instance %s of a controller that is gone is adopted, %s", spec.id, state.value)

    async def _relock(self, spec: InstanceSpec, sleeps: bool) -> int:
        """Hold the lock that is on its GPUs, or, where that was lost, lock them at the clock of its start."""
        if not self._clocks.reaches(spec.gpus[0].node):
            return spec.sm_clock_mhz
        if sleeps:
            return await self._clocks.lock(spec.gpus, await self._clocks.lowest(spec.gpus))
        return await self._clocks.lock(spec.gpus, await self._clocks.locked(spec.gpus) or spec.sm_clock_mhz)

    # --- watching ----------------------------------------------------------------------------------------------------

    def _follow(self, running: _Running) -> None:
        self._running[running.instance.id] = running
        running.watching = asyncio.get_running_loop().create_task(self._watch(running))

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
        if running.instance.state is InstanceState.PARKED:
            return  # it was adopted asleep
        try:
            async with asyncio.timeout(running.start_timeout_s):
                await running.server.until_first_token()
        except TimeoutError:
            running.reason = f"no token within {running.start_timeout_s:.0f} s; "
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
        await self._take_over()
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
        """See ``InstanceDriver``; with ``leave_running`` the engines run on, for the next driver to adopt."""
        for running in tuple(self._running.values()) if self._leave_running else ():
            if not running.stopping:
                await self._leave(running)
        await asyncio.gather(*(self.stop(instance_id, 0.0) for instance_id in tuple(self._running)))
        await self._clocks.close(reset=not self._leave_running)
        self._broadcast.close()

    async def _leave(self, running: _Running) -> None:
        assert running.watching is not None
        running.watching.cancel()
        await asyncio.wait([running.watching])
        running.process.leave()
        del self._running[running.instance.id]

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
