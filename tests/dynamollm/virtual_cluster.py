"""A whole `dynamollm serve` in one process on the virtual-time loop: real FastAPI application and relay, real sockets,
emulated instances, the operations and control loop as they are; and clients that replay requests through it."""

import asyncio
import contextlib
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import uvicorn

from dynamollm.admin import admin_routes
from dynamollm.controller_recipe import controller_recipe
from dynamollm.counterfactual import OWN
from dynamollm.settings import Settings
from dynamollm.shadow_wiring import BASELINES, ShadowWorld
from dynamollm.wiring import Application, build
from pools.classes import ClassCuts
from pools.drivers.emulator import EmulatedMachine, EmulatedModel, EmulatorDriver
from proxy.fields import RequestFields
from proxy.gateway import TICK_S
from proxy.outcome import Outcome
from proxy.serve import gateway_config, listen
from simulator.emulator.adapters.process import EmulatorProcess, NodeOptions, ProcessOptions
from simulator.prediction import TrueLengths
from simulator.shadow import Shadows
from simulator.workload.arrivals import Arrivals
from solver.control import Controller, Effects, Observation, Tick


@dataclass(slots=True)
class Recorded:
    """A controller and all it was shown and said."""

    inner: Controller
    ticks: list[tuple[Observation, Effects]] = field(default_factory=list)

    def first_tick(self, now_s: float) -> Tick:
        return self.inner.first_tick(now_s)

    def on_tick(self, tick: Tick, observation: Observation) -> Effects:
        effects = self.inner.on_tick(tick, observation)
        self.ticks.append((observation, effects))
        return effects


class Inline:
    """A controller called where the loop runs: an answer takes no time."""

    def __init__(self, controller: Controller) -> None:
        self._controller = controller

    async def first_tick(self, now_s: float) -> Tick:
        return self._controller.first_tick(now_s)

    async def on_tick(self, tick: Tick, observation: Observation) -> Effects:
        return self._controller.on_tick(tick, observation)

    async def close(self) -> None:
        pass


class InProcess:
    """An emulator in this very process and event loop."""

    def __init__(self, process: EmulatorProcess) -> None:
        self.control_url = process.control_url
        self.agent_urls = process.agent_urls
        self._process = process

    async def end(self) -> int:
        await self._process.close()
        return 0


async def in_process(machines: Sequence[EmulatedMachine]) -> InProcess:
    process = EmulatorProcess(ProcessOptions([NodeOptions(m.name, m.gpu, m.gpus) for m in machines]))
    await process.listen()
    return InProcess(process)


class Foretold:
    """The length predictor of the simulator: it knows the size of an answer, and plans with the mean of that size."""

    def __init__(self, cuts: ClassCuts) -> None:
        self._foretell = TrueLengths().begin(cuts, np.random.default_rng(0))

    def output_tokens(self, fields: RequestFields, model: str, input_tokens: int, tenant: str) -> float:
        assert fields.cap_tokens is not None
        _, tokens = self._foretell(Arrivals.of([0.0], [input_tokens], [fields.cap_tokens]))
        return float(tokens[0])


def driver_of(settings: Settings) -> EmulatorDriver:
    machines = [EmulatedMachine(node.name, node.gpu, node.gpus) for node in settings.nodes]
    models = {model.name: EmulatedModel(model.profile, model.tokenizer_file) for model in settings.models}
    return EmulatorDriver(machines, models, startup_s=settings.driver.startup_s, spawn=in_process)


class InlineShadows:
    """Shadow simulations in this very process: they take no time."""

    def __init__(self, settings: Settings) -> None:
        self._shadows = Shadows({name: ShadowWorld(settings, name) for name in (OWN, *BASELINES)})

    async def follow(self, requests: Arrivals, until_s: float) -> dict[str, float]:
        return self._shadows.follow(requests, until_s)

    async def close(self) -> None:
        pass


@dataclass(slots=True)
class Served:
    """What became of it."""

    application: Application
    began_s: float  # when the controller began to watch, and the first request could have come
    recorded: Recorded | None
    outcomes: list[Outcome]
    statuses: list[int]
    energy_j: float = 0.0


async def serve_virtually(settings: Settings, requests: Arrivals, until_s: float, shadowed: bool = False) -> Served:
    """Serve these requests, ``until_s`` seconds and until the last is answered; on the virtual-time loop."""
    clock = asyncio.get_running_loop().time
    recorded = controller = None
    if settings.controller.policy != "static":
        recorded = Recorded(controller_recipe(settings)(1))
        controller = Inline(recorded)
    application = build(settings, clock, driver_of(settings), controller, InlineShadows(settings) if shadowed else None)
    outcomes: list[Outcome] = []
    services = dataclasses.replace(
        application.services,
        lengths=Foretold(settings.slo.cuts),
        observers=(*application.services.observers, outcomes.append),
    )
    served = Served(application, 0.0, recorded, outcomes, [])
    server = uvicorn.Server(gateway_config(services, 5.0, admin_routes(lambda: application)))
    server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign]
    listener = listen("127.0.0.1", 0)
    port = listener.getsockname()[1]
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    running = asyncio.create_task(application.runner.run())
    await application.runner.settled()
    assert application.metering is not None
    await application.metering.once()
    # where the gateway's own clock ticks, so that queues are looked at as in the simulator
    await asyncio.sleep(TICK_S - clock() % TICK_S)
    began_j = await counted_j(application)
    served.began_s = clock()
    tasks = [running, asyncio.create_task(application.metering.run()), asyncio.create_task(application.control.run())]
    if shadowed:
        assert application.counterfactual is not None
        tasks.append(asyncio.create_task(application.counterfactual.run()))
    try:
        await asyncio.gather(replay(port, requests, served), asyncio.sleep(until_s))
        served.energy_j = await counted_j(application) - began_j
    finally:
        server.should_exit = True
        await serving
        for task in reversed(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await application.operations.close()
        await application.probe.close()
    return served


async def counted_j(application: Application) -> float:
    """What all counters of the emulated GPUs say, now."""
    assert application.metering is not None
    readings = await application.metering._meter.read()
    return sum(reading.energy_j or 0.0 for reading in readings)


async def replay(port: int, requests: Arrivals, served: Served) -> None:
    """Every request at its time, on a connection of its own."""
    rows = zip(requests.arrival_s, requests.input_tokens, requests.output_tokens, strict=True)
    model = served.application.settings.models[0].name
    async with asyncio.TaskGroup() as tasks:
        for at_s, inputs, outputs in rows:
            tasks.create_task(_ask(port, model, served, float(at_s), int(inputs), int(outputs)))


async def _ask(port: int, model: str, served: Served, at_s: float, inputs: int, outputs: int) -> None:
    clock = asyncio.get_running_loop().time
    await asyncio.sleep(served.began_s + at_s - clock())
    body = json.dumps(
        {"model": model, "prompt": [1] * inputs, "max_tokens": outputs, "ignore_eos": True, "stream": True}
    ).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nconnection: close\r\n"
        b"content-length: %d\r\n\r\n%b" % (len(body), body)
    )
    answer = await reader.read()
    writer.close()
    served.statuses.append(int(answer[9:12]))
