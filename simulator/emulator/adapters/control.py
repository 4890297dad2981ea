"""The control endpoint of an emulator process: instances come and go, faults are injected, events are told.

``POST /instances`` starts one, ``GET /instances`` lists, ``DELETE /instances/ID?grace_s=`` stops, ``POST
/instances/ID/clock|park|wake|faults`` change one, ``GET /events`` streams every change of state (one JSON object a
line), ``GET /nodes`` and ``POST /nodes/NAME/power`` read and switch machines, ``GET /metrics`` has every GPU under
DCGM's names and the emulator's own lag. Errors are ``{"error": kind, "message": text}``; the kinds are what the driver
raises.
"""

import asyncio
import time
from collections.abc import Coroutine, Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import msgspec

from energy.adapters.catalogue import load_profile
from energy.profile import EnergyProfile, ProfileError
from pools.instances import InstanceState
from simulator.emulator.adapters.api import VllmApi
from simulator.emulator.adapters.http import TEXT, Exchange
from simulator.emulator.adapters.instance import LOOPBACK, EmulatedInstance, Faults, InstanceOptions
from simulator.emulator.adapters.tasks import Spawned
from simulator.emulator.adapters.tokenizer import FileTokenizer
from simulator.emulator.gpus import EmulatedNode, GpuHeldError, NoSuchGpuError
from simulator.emulator.telemetry import dcgm_text
from simulator.emulator.text import FourByteTokenizer, Tokenizer

GONE = (InstanceState.STOPPED, InstanceState.FAILED)


class InstanceRequest(msgspec.Struct, forbid_unknown_fields=True):
    """POST /instances: what to start, and on which profile and tokenizer."""

    options: InstanceOptions
    profile: str  # a shipped name or a path
    tokenizer_file: str | None = None


class ClockRequest(msgspec.Struct, forbid_unknown_fields=True):
    """POST /instances/ID/clock."""

    sm_clock_mhz: int


class PowerRequest(msgspec.Struct, forbid_unknown_fields=True):
    """POST /nodes/NAME/power."""

    on: bool


class FaultRequest(msgspec.Struct, forbid_unknown_fields=True):
    """POST /instances/ID/faults: one that ends the instance, or those that last."""

    crash: bool = False  # the engine dies
    kill: bool = False  # the process dies
    faults: Faults = msgspec.field(default_factory=Faults)


class RefusedError(Exception):
    """An error for the caller: its kind and status."""

    def __init__(self, status: HTTPStatus, kind: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind


class Control:
    """All instances of one process."""

    def __init__(self, nodes: Mapping[str, EmulatedNode], agent_urls: Mapping[str, str], host: str = LOOPBACK) -> None:
        """``host``: where instances listen that are not told where."""
        self._host = host
        self._nodes = nodes
        self._agent_urls = agent_urls
        self._instances: dict[str, EmulatedInstance] = {}
        self._clock_before_park: dict[str, int] = {}
        self._parking: dict[str, asyncio.Lock] = {}  # park and wake wait for each other
        self._profiles: dict[str, EnergyProfile] = {}
        self._tokenizers: dict[str, Tokenizer] = {}
        self._listeners: set[Exchange] = set()
        self._api = VllmApi()
        self._spawned = Spawned()
        self._loop = asyncio.get_running_loop()

    # --- life --------------------------------------------------------------------------------------------------------

    def create(self, request: InstanceRequest) -> EmulatedInstance:
        """Start one instance. Raises ``RefusedError``."""
        options = request.options
        if not options.host:
            options = msgspec.structs.replace(options, host=self._host)
        if options.id in self._instances:
            raise RefusedError(HTTPStatus.CONFLICT, "taken", f"instance {options.id} runs already")
        node = self._nodes.get(options.node)
        if node is None:
            known = ", ".join(self._nodes)
            raise RefusedError(
                HTTPStatus.NOT_FOUND, "unknown-gpu", f"there is no node {options.node!r}; known: {known}"
            )
        try:
            profile = self._profile(request.profile)
            if len(options.gpus) != options.tp or len(set(options.gpus)) != options.tp:
                raise ProfileError(f"instance {options.id}: tp {options.tp} needs {options.tp} different GPUs")
            if node.gpus and profile.gpu != node.gpus[0].physics.name:
                raise ProfileError(f"profile {profile.name} is of {profile.gpu}, node {node.name} is not")
            instance = EmulatedInstance(
                options,
                profile,
                self._tokenizer(request.tokenizer_file),
                node,
                int(time.time()),
                self._on_state,
                self._api.handle,
            )
        except NoSuchGpuError as error:
            raise RefusedError(HTTPStatus.NOT_FOUND, "unknown-gpu", str(error)) from None
        except GpuHeldError as error:
            raise RefusedError(HTTPStatus.CONFLICT, "gpu-busy", str(error)) from None
        except (ProfileError, ValueError) as error:
            raise RefusedError(HTTPStatus.UNPROCESSABLE_ENTITY, "refused", str(error)) from None
        except OSError as error:
            message = f"instance {options.id}: cannot listen on {options.host}:{options.port}: {error.strerror}"
            raise RefusedError(HTTPStatus.CONFLICT, "refused", message) from None
        self._instances[options.id] = instance
        instance.start()
        return instance

    def _profile(self, name: str) -> EnergyProfile:
        if name not in self._profiles:
            self._profiles[name] = load_profile(name)
        return self._profiles[name]

    def _tokenizer(self, file: str | None) -> Tokenizer:
        key = file or ""
        if key not in self._tokenizers:
            self._tokenizers[key] = FileTokenizer(Path(file)) if file else FourByteTokenizer()
        return self._tokenizers[key]

    async def close(self, grace_s: float) -> None:
        """Stop everything, as SIGTERM with ``--shutdown-timeout grace_s`` does."""
        await asyncio.gather(*(instance.stop(grace_s) for instance in tuple(self._instances.values())))
        self._spawned.cancel()
        self._api.close()
        for listener in tuple(self._listeners):
            listener.end()

    def _on_state(self, instance: EmulatedInstance, reason: str) -> None:
        if instance.state in GONE:
            self._instances.pop(instance.id, None)
            self._clock_before_park.pop(instance.id, None)
            self._parking.pop(instance.id, None)
        event = {"id": instance.id, "state": instance.state.value, "reason": reason}
        line = msgspec.json.encode(event) + b"\n"
        for listener in self._listeners:
            listener.send(line)

    # --- routes ------------------------------------------------------------------------------------------------------

    def handle(self, exchange: Exchange) -> None:
        """Answer one request."""
        try:
            self._route(exchange)
        except RefusedError as error:
            _refuse(exchange, error)
        except msgspec.MsgspecError as error:
            _refuse(exchange, RefusedError(HTTPStatus.UNPROCESSABLE_ENTITY, "refused", f"body: {error}"))

    def _route(self, exchange: Exchange) -> None:
        parts = exchange.path.strip("/").split("/")
        match exchange.method, parts:
            case "GET", ["health"]:
                exchange.respond(200)
            case "GET", ["metrics"]:
                exchange.respond(200, self._metrics(), TEXT)
            case "GET", ["events"]:
                self._listen(exchange)
            case "GET", ["nodes"]:
                nodes = [
                    {"name": n, "gpus": len(node.gpus), "agent_url": self._agent_urls[n]}
                    for n, node in self._nodes.items()
                ]
                _answer(exchange, nodes)
            case "POST", ["nodes", name, "power"]:
                self._set_power(exchange, name)
            case "GET", ["instances"]:
                _answer(exchange, [self._described(i) for i in self._instances.values()])
            case "POST", ["instances"]:
                instance = self.create(msgspec.json.decode(exchange.body, type=InstanceRequest))
                _answer(exchange, self._described(instance), HTTPStatus.CREATED)
            case "DELETE", ["instances", instance_id]:
                self._later(exchange, self._get(instance_id).stop(_grace_s(exchange)))
            case "POST", ["instances", instance_id, change]:
                self._change(exchange, self._get(instance_id), change)
            case _:
                raise RefusedError(
                    HTTPStatus.NOT_FOUND, "no-route", f"{exchange.method} {exchange.path} is not known here"
                )

    def _change(self, exchange: Exchange, instance: EmulatedInstance, change: str) -> None:
        if change == "clock":
            clock_mhz = msgspec.json.decode(exchange.body, type=ClockRequest).sm_clock_mhz
            _answer(exchange, {"sm_clock_mhz": self._set_clock(instance, clock_mhz)})
        elif change == "park":
            self._later(exchange, self._park(instance))
        elif change == "wake":
            self._later(exchange, self._wake(instance))
        elif change == "faults":
            self._inject(instance, msgspec.json.decode(exchange.body or b"{}", type=FaultRequest))
            _answer(exchange, {})
        else:
            raise RefusedError(HTTPStatus.NOT_FOUND, "no-route", f"an instance has no {change!r}")

    def _set_clock(self, instance: EmulatedInstance, sm_clock_mhz: int) -> int:
        """Set the clock; of a parked one, the clock it will wake to."""
        if instance.id not in self._clock_before_park:
            return instance.set_sm_clock(sm_clock_mhz)
        clock_mhz = instance.gpus[0].snap(sm_clock_mhz)
        self._clock_before_park[instance.id] = clock_mhz
        return clock_mhz

    async def _park(self, instance: EmulatedInstance) -> None:
        async with self._parking.setdefault(instance.id, asyncio.Lock()):
            if instance.id in self._clock_before_park:
                return
            self._clock_before_park[instance.id] = instance.sm_clock_mhz
            await instance.sleep(1, "wait")
            if instance.state is InstanceState.PARKED:  # not stopped meanwhile: its GPUs may be another's now
                instance.set_sm_clock(instance.gpus[0].physics.min_clock_mhz)

    async def _wake(self, instance: EmulatedInstance) -> None:
        async with self._parking.setdefault(instance.id, asyncio.Lock()):
            clock_mhz = self._clock_before_park.pop(instance.id, None)
            if clock_mhz is not None and instance.state is InstanceState.PARKED:
                instance.set_sm_clock(clock_mhz)  # raised before work can arrive
                await instance.wake()

    def _inject(self, instance: EmulatedInstance, request: FaultRequest) -> None:
        if request.kill:
            instance.kill()
        elif request.crash:
            instance.crash()
        else:
            instance.set_faults(request.faults)

    def _set_power(self, exchange: Exchange, name: str) -> None:
        if name not in self._nodes:
            raise RefusedError(HTTPStatus.NOT_FOUND, "unknown-gpu", f"there is no node {name!r}")
        on = msgspec.json.decode(exchange.body, type=PowerRequest).on
        try:
            self._nodes[name].set_power(on, self._loop.time())
        except GpuHeldError as error:
            raise RefusedError(HTTPStatus.CONFLICT, "gpu-busy", str(error)) from None
        _answer(exchange, {})

    def _listen(self, exchange: Exchange) -> None:
        """Stream events; those that already are come first, so that none is missed."""
        exchange.begin_stream(b"application/x-ndjson")
        exchange.on_gone = lambda: self._listeners.discard(exchange)
        self._listeners.add(exchange)
        for instance in self._instances.values():
            event = {"id": instance.id, "state": instance.state.value, "reason": ""}
            exchange.send(msgspec.json.encode(event) + b"\n")

    def _metrics(self) -> bytes:
        gpus = [gpu for node in self._nodes.values() for gpu in node.gpus]
        lost_s = sum(instance.pump.lost_s for instance in self._instances.values())
        name = "dynamollm_emulator_lost_seconds_total"
        own = f"# HELP {name} Engine time skipped because the process lagged.\n# TYPE {name} counter\n{name} {lost_s}\n"
        return dcgm_text(gpus, self._loop.time()) + own.encode()

    def _get(self, instance_id: str) -> EmulatedInstance:
        try:
            return self._instances[instance_id]
        except KeyError:
            message = f"there is no instance {instance_id}"
            raise RefusedError(HTTPStatus.NOT_FOUND, "unknown-instance", message) from None

    @staticmethod
    def _described(instance: EmulatedInstance) -> dict[str, Any]:
        return {
            "id": instance.id,
            "url": instance.url,
            "state": instance.state.value,
            "sm_clock_mhz": instance.sm_clock_mhz,
            "max_model_len": instance.rules.max_model_len,
            "requests_in_flight": instance.requests_in_flight,
            "options": msgspec.to_builtins(instance.options),
        }

    def _later(self, exchange: Exchange, work: Coroutine[Any, Any, None]) -> None:
        async def finish() -> None:
            await work
            _answer(exchange, {})

        self._spawned.spawn(finish())


def _grace_s(exchange: Exchange) -> float:
    given = parse_qs(exchange.query).get("grace_s", ["0"])[0]
    try:
        return float(given)
    except ValueError:
        message = f"grace_s must be a number of seconds, not {given!r}"
        raise RefusedError(HTTPStatus.UNPROCESSABLE_ENTITY, "refused", message) from None


def _answer(exchange: Exchange, value: object, status: int = HTTPStatus.OK) -> None:
    exchange.respond(status, msgspec.json.encode(value))


def _refuse(exchange: Exchange, error: RefusedError) -> None:
    _answer(exchange, {"error": error.kind, "message": str(error)}, error.status)
