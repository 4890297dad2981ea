"""EmulatorDriver: an InstanceDriver whose instances are emulated, in processes of their own that it spawns and ends.

The nodes are shared out over a few processes (one instance more is one HTTP call, not one process more), each started
when the first instance on one of its nodes is. A process ends when its standard input closes; the driver holds the
other end, so none outlives it, even if it is killed. Emulators that somebody else runs (``emulators``) are attached to
instead: they and their instances outlive the driver, and the next one to attach takes the instances over.

Knows of the emulator its command line and its control endpoint (``simulator/emulator/adapters/control.py``), and
imports nothing of it.
"""

import asyncio
import contextlib
import json
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import httpx

from pools.drivers.broadcast import EventBroadcast
from pools.drivers.checks import model_of
from pools.drivers.port import (
    DriverError,
    GpuBusyError,
    InstanceEvent,
    InstanceSpec,
    StartRefusedError,
    UnknownGpuError,
    UnknownInstanceError,
)
from pools.instances import GpuSlot, Instance, InstanceShape, InstanceState

SPAWN_TIMEOUT_S = 60.0
CALL_TIMEOUT_S = 30.0
EXIT_TIMEOUT_S = 5.0
GONE = (InstanceState.STOPPED, InstanceState.FAILED)
ERRORS: dict[str, type[DriverError]] = {
    "gpu-busy": GpuBusyError,
    "unknown-gpu": UnknownGpuError,
    "unknown-instance": UnknownInstanceError,
    "refused": StartRefusedError,
}


@dataclass(frozen=True, slots=True)
class EmulatedMachine:
    """One node to emulate: its name, and how many GPUs of which kind it has."""

    name: str
    gpu: str = "H100-SXM"
    gpus: int = 8


@dataclass(frozen=True, slots=True)
class EmulatedModel:
    """What an emulated engine of one model is made of; the limits bear vLLM's names, None is the emulator's default."""

    profile: str  # a shipped EnergyProfile's name, or a path
    tokenizer_file: str | None = None
    max_model_len: int = 131_072
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    max_num_queued_reqs: int | None = None


class SpawnedEmulator(Protocol):
    """An emulator that runs, wherever it does."""

    control_url: str
    agent_urls: dict[str, str]  # of each node's GPU agent, by node name

    async def end(self) -> int:
        """End it, if it has not ended; its exit status."""


Spawn = Callable[[Sequence[EmulatedMachine]], Awaitable[SpawnedEmulator]]


class EmulatorDriver:
    """See ``InstanceDriver``. Use it within one event loop; ``close`` it."""

    def __init__(
        self,
        machines: Iterable[EmulatedMachine],
        models: Mapping[str, EmulatedModel],
        *,
        processes: int = 1,
        startup_s: float = 2.0,
        wake_s: float = 1.0,
        seed: int = 0,
        spawn: Spawn | None = None,
        emulators: Mapping[str, str] | None = None,
    ) -> None:
        """``models``: by served name. Instances take ``startup_s`` to load and ``wake_s`` to wake.

        ``spawn`` runs the emulator of some machines; None: in a process of its own. ``emulators``: control URL by node
        name, of emulators that somebody else runs; all machines are then on them.
        """
        self._machines = {machine.name: machine for machine in machines}
        self._models = dict(models)
        self._startup = {"startup_s": startup_s, "wake_s": wake_s, "seed": seed}
        self._broadcast = EventBroadcast()
        self._specs: dict[str, InstanceSpec] = {}
        self._states: dict[str, InstanceState] = {}  # last one told
        every = list(self._machines.values())
        if emulators:
            shares = [[m for m in every if emulators[m.name] == url] for url in dict.fromkeys(emulators.values())]
            spawns = [attach_to(url) for url in dict.fromkeys(emulators.values())]
        else:
            shares = [every[number::processes] for number in range(processes)]
            spawns = [spawn or spawn_process] * processes
        self._processes = [
            _EmulatorProcess(share, self._on_event, self._on_exit, one, outlives=bool(emulators))
            for share, one in zip(shares, spawns, strict=True)
            if share
        ]
        self._process_of = {machine.name: process for process in self._processes for machine in process.machines}

    async def agent_urls(self) -> dict[str, str]:
        """Base URL of each node's GPU agent (DCGM names at /metrics, zeusd's paths under /gpu), by node name."""
        await asyncio.gather(*(process.ensure_running() for process in self._processes))
        return {name: url for process in self._processes for name, url in process.agent_urls.items()}

    async def start(self, spec: InstanceSpec) -> Instance:
        """See ``InstanceDriver``."""
        if spec.id in self._specs:
            raise DriverError(f"instance {spec.id} runs already")
        node = spec.gpus[0].node
        process = self._process_of.get(node)
        if process is None:
            known = ", ".join(self._machines)
            raise UnknownGpuError(f"instance {spec.id}: there is no node {node!r}; known: {known}")
        model = model_of(spec, self._models)
        if spec.shape.gpu != self._machines[node].gpu:
            raise StartRefusedError(
                f"instance {spec.id} is for {spec.shape.gpu}, node {node} has {self._machines[node].gpu}"
            )
        self._specs[spec.id] = spec
        try:
            described = await process.call("POST", "/instances", self._body(spec, model))
        except BaseException:
            self._forget(spec.id)
            raise
        return self._instance(spec, described)

    def _body(self, spec: InstanceSpec, model: EmulatedModel) -> dict[str, Any]:
        limits = asdict(model)
        profile, tokenizer_file = limits.pop("profile"), limits.pop("tokenizer_file")
        options = {
            "id": spec.id,
            "model": spec.shape.model,
            "tp": spec.shape.tp,
            "node": spec.gpus[0].node,
            "gpus": [gpu.index for gpu in spec.gpus],
            "pool": spec.pool,
            "sm_clock_mhz": spec.sm_clock_mhz,
            **self._startup,
            **{name: value for name, value in limits.items() if value is not None},
        }
        return {"profile": profile, "tokenizer_file": tokenizer_file, "options": options}

    async def stop(self, instance_id: str, grace_s: float) -> None:
        """See ``InstanceDriver``."""
        spec = self._specs.get(instance_id)
        if spec is None:
            return
        with contextlib.suppress(UnknownInstanceError):
            await self._process(spec).call(
                "DELETE", f"/instances/{instance_id}?grace_s={grace_s}", timeout_s=grace_s + CALL_TIMEOUT_S
            )
        self._on_event(InstanceEvent(instance_id, InstanceState.STOPPED))

    async def list(self) -> tuple[Instance, ...]:
        """See ``InstanceDriver``; what runs on attached emulators is taken over."""
        outliving = [process for process in self._processes if process.outlives]
        await asyncio.gather(*(process.ensure_running() for process in outliving))
        for item in await self._described(outliving):
            self._take_over(item)
        described = {item["id"]: item for item in await self._described(self._processes)}  # as it is since then
        return tuple(
            self._instance(spec, described[instance_id])
            for instance_id, spec in sorted(self._specs.items())
            if instance_id in described
        )

    def lost_nodes(self) -> frozenset[str]:
        """None: an emulated node never fails."""
        return frozenset()

    async def _described(self, processes: Sequence["_EmulatorProcess"]) -> Sequence[Any]:
        running = [process for process in processes if process.running]
        answers: Sequence[Any] = await asyncio.gather(*(process.call("GET", "/instances") for process in running))
        return [item for answer in answers for item in answer]

    def _take_over(self, described: Mapping[str, Any]) -> None:
        options = described["options"]
        machine = self._machines.get(options["node"])
        if described["id"] in self._specs or machine is None:
            return
        self._specs[described["id"]] = InstanceSpec(
            described["id"],
            options["pool"],
            InstanceShape(options["model"], machine.gpu, options["tp"]),
            tuple(GpuSlot(machine.name, index) for index in options["gpus"]),
            described["sm_clock_mhz"],
        )

    async def set_sm_clock(self, instance_id: str, sm_clock_mhz: int) -> int:
        """See ``InstanceDriver``; of a parked instance it sets the clock it will wake to."""
        answer = await self._change(instance_id, "clock", {"sm_clock_mhz": sm_clock_mhz})
        return int(answer["sm_clock_mhz"])

    async def park(self, instance_id: str) -> None:
        """See ``InstanceDriver``; running requests finish first."""
        await self._change(instance_id, "park")

    async def wake(self, instance_id: str) -> None:
        """See ``InstanceDriver``."""
        await self._change(instance_id, "wake")

    async def inject(self, instance_id: str, fault: Mapping[str, Any]) -> None:
        """Break an instance on purpose, for tests: the body of the control endpoint's ``faults``."""
        await self._change(instance_id, "faults", dict(fault))

    async def _change(self, instance_id: str, what: str, body: dict[str, Any] | None = None) -> Any:
        spec = self._specs.get(instance_id)
        if spec is None:
            raise UnknownInstanceError(f"there is no instance {instance_id}")
        return await self._process(spec).call("POST", f"/instances/{instance_id}/{what}", body or {})

    def events(self) -> AsyncIterator[InstanceEvent]:
        """See ``InstanceDriver``."""
        return self._broadcast.listen()

    async def close(self) -> None:
        """See ``InstanceDriver``."""
        for instance_id, spec in tuple(self._specs.items()):
            if not self._process(spec).outlives:
                self._on_event(InstanceEvent(instance_id, InstanceState.STOPPED))
        await asyncio.gather(*(process.close() for process in self._processes))
        self._broadcast.close()

    # --- what the processes tell -------------------------------------------------------------------------------------

    def _on_event(self, event: InstanceEvent) -> None:
        """Pass an event on, unless it says what is known or comes after the end."""
        if event.instance_id not in self._specs or self._states.get(event.instance_id) is event.state:
            return
        self._states[event.instance_id] = event.state
        if event.state in GONE:
            self._forget(event.instance_id)
        self._broadcast.publish(event)

    def _on_exit(self, process: "_EmulatorProcess", reason: str) -> None:
        for instance_id, spec in tuple(self._specs.items()):
            if self._process(spec) is process:
                self._on_event(InstanceEvent(instance_id, InstanceState.FAILED, reason))

    def _forget(self, instance_id: str) -> None:
        self._specs.pop(instance_id, None)
        self._states.pop(instance_id, None)

    def _process(self, spec: InstanceSpec) -> "_EmulatorProcess":
        return self._process_of[spec.gpus[0].node]

    @staticmethod
    def _instance(spec: InstanceSpec, described: Mapping[str, Any]) -> Instance:
        return Instance(
            id=spec.id,
            pool=spec.pool,
            shape=spec.shape,
            url=described["url"],
            state=InstanceState(described["state"]),
            sm_clock_mhz=described["sm_clock_mhz"],
            gpus=spec.gpus,
        )


class _EmulatorProcess:
    """One process: spawned when it is needed, again if it has died, ended on ``close``."""

    def __init__(
        self,
        machines: Sequence[EmulatedMachine],
        on_event: Callable[[InstanceEvent], None],
        on_exit: Callable[["_EmulatorProcess", str], None],
        spawn: Spawn,
        outlives: bool,
    ) -> None:
        self.machines = tuple(machines)
        self.outlives = outlives
        self.agent_urls: dict[str, str] = {}
        self._spawn_emulator = spawn
        self._on_event = on_event
        self._on_exit = on_exit
        self._process: SpawnedEmulator | None = None
        self._client: httpx.AsyncClient | None = None
        self._watching: asyncio.Task[None] | None = None
        self._spawning = asyncio.Lock()
        self._closed = False

    @property
    def running(self) -> bool:
        """Whether it has been spawned and has not ended."""
        return self._client is not None

    async def call(self, method: str, path: str, body: object = None, timeout_s: float = CALL_TIMEOUT_S) -> Any:
        """Ask the control endpoint. Raises the ``DriverError`` that its answer names."""
        client = await self.ensure_running()
        try:
            answer = await client.request(method, path, json=body, timeout=timeout_s)
        except httpx.HTTPError as error:
            raise DriverError(f"the emulator of {self._names()} does not answer {method} {path}: {error!r}") from None
        if answer.is_success:
            return answer.json()
        told = answer.json()
        raise ERRORS.get(told["error"], DriverError)(told["message"])

    async def ensure_running(self) -> httpx.AsyncClient:
        """Spawn it if it does not run. Raises ``DriverError`` if it cannot start."""
        async with self._spawning:
            if self._closed:
                raise DriverError("the driver is closed")
            if self._client is None:
                self._client = await self._spawn()
            return self._client

    async def _spawn(self) -> httpx.AsyncClient:
        try:
            process = await self._spawn_emulator(self.machines)
        except ValueError as error:
            raise DriverError(f"the emulator of {self._names()} cannot be used: {error}") from None
        self.agent_urls = process.agent_urls
        self._process = process
        # a connection a call: the emulator closes idle ones whenever it likes, as vLLM does
        limits = httpx.Limits(max_keepalive_connections=0)
        client = httpx.AsyncClient(base_url=process.control_url, limits=limits, trust_env=False)
        listening = asyncio.Event()
        self._watching = asyncio.get_running_loop().create_task(self._watch(process, client, listening))
        await listening.wait()
        return client

    async def _watch(self, process: SpawnedEmulator, client: httpx.AsyncClient, listening: asyncio.Event) -> None:
        """Pass events on until the process ends."""
        try:
            async with client.stream("GET", "/events", timeout=None) as answer:
                listening.set()
                async for line in answer.aiter_lines():
                    told = json.loads(line)
                    self._on_event(InstanceEvent(told["id"], InstanceState(told["state"]), told["reason"]))
        except httpx.HTTPError:
            pass  # it has died; its exit status says how
        finally:
            listening.set()
        status = await process.end()
        self._client = self._process = None
        self.agent_urls = {}
        await client.aclose()
        if not self._closed:
            self._on_exit(self, f"the emulator process of {self._names()} ended with status {status}")

    async def close(self) -> None:
        """End the process."""
        self._closed = True
        if self._process is not None:
            await self._process.end()
        if self._watching is not None:
            if self.outlives:
                self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        if self._client is not None:
            await self._client.aclose()

    def _names(self) -> str:
        return ", ".join(machine.name for machine in self.machines)


class _Process:
    """An emulator in a process of its own."""

    def __init__(self, process: Process, told: Mapping[str, Any]) -> None:
        self.control_url: str = told["control_url"]
        self.agent_urls: dict[str, str] = told["agent_urls"]
        self.pid = process.pid
        self._process = process

    async def end(self) -> int:
        """Close its standard input, which ends it; kill it if it does not listen. Returns its exit status."""
        return await _end(self._process)


class _Attached:
    """An emulator that somebody else runs."""

    def __init__(self, control_url: str, agent_urls: dict[str, str]) -> None:
        self.control_url = control_url
        self.agent_urls = agent_urls

    async def end(self) -> int:
        """Nothing: it goes on."""
        return 0


def attach_to(control_url: str) -> Spawn:
    """What attaches to the emulator at a URL. Raises ``ValueError`` if it does not answer there."""

    async def attach(machines: Sequence[EmulatedMachine]) -> SpawnedEmulator:
        try:
            async with httpx.AsyncClient(timeout=CALL_TIMEOUT_S, trust_env=False) as client:
                nodes = (await client.get(f"{control_url}/nodes")).json()
        except httpx.HTTPError as error:
            raise ValueError(f"{control_url} does not answer: {error!r}") from None
        agent_urls = {node["name"]: node["agent_url"] for node in nodes}
        missing = [machine.name for machine in machines if machine.name not in agent_urls]
        if missing:
            raise ValueError(f"{control_url} emulates {', '.join(agent_urls)}, not {', '.join(missing)}")
        return _Attached(control_url, {machine.name: agent_urls[machine.name] for machine in machines})

    return attach


async def spawn_process(machines: Sequence[EmulatedMachine]) -> SpawnedEmulator:
    """Run the emulator in a process. Raises ``ValueError`` where it does not say where it is."""
    command = _command(machines)
    # a session of its own: Ctrl-C reaches the gateway alone, which drains before it closes this pipe
    process = await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE, start_new_session=True)
    assert process.stdout is not None
    try:
        async with asyncio.timeout(SPAWN_TIMEOUT_S):
            line = await process.stdout.readline()
        return _Process(process, json.loads(line))
    except (TimeoutError, ValueError):
        await _end(process)
        raise ValueError(f"it did not start; `{' '.join(command)}` says why on its standard error") from None


def _command(machines: Sequence[EmulatedMachine]) -> list[str]:
    nodes = [f"--node={m.name}={m.gpus}x{m.gpu}" for m in machines]
    return [sys.executable, "-m", "simulator.emulator", "--watch-stdin", *nodes]


async def _end(process: Process) -> int:
    assert process.stdin is not None
    process.stdin.close()
    try:
        async with asyncio.timeout(EXIT_TIMEOUT_S):
            return await process.wait()
    except TimeoutError:
        process.kill()
        return await process.wait()
