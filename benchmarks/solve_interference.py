"""Whether a request notices a solve: P99 of requests passed through the gateway with and without a plan being solved.

``python -m benchmarks.solve_interference [--rounds 15] [--gpus 1000] [--every 120] [--core client] [--store]``

The real gateway (`dynamollm serve`, nine pools, 32 instances, engines that answer at once) is asked in windows, in turn
alone and while plans for 1,000 GPUs are solved in the product's own ``ControllerProcess``, begun as `dynamollm serve`
begins it: a child of the gateway's session, stepped back. Engines and load generator are of that session too: they
stand for machines that a solve cannot slow, and between sessions the kernel would have it share a core with them.
Without ``--every`` one solve follows the other, so every request of a window meets one; with it a plan is solved so
often, and a window lasts as long: 120 s is the product's pace. ``--core`` holds the solver on the gateway's core or on
that of engines and load generator: who pays, and where.
Alternating windows meet the same machine, so each pair gives a ratio of their P99s; what counts is the median of them.
"""

import asyncio
import json
import os
import statistics
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import click

from benchmarks.adapters.gateway_processes import (
    CLIENT_CORE,
    GATEWAY_CORE,
    Running,
    built,
    core_number,
    engines,
    gateways,
    measure,
)
from benchmarks.gateway_overhead import Scenario, machine
from benchmarks.solver_scaling import Case, time_case
from energy.adapters.capacity_file import load_capacity
from energy.adapters.catalogue import write_whole
from energy.capacity import CapacityTable
from solver.adapters.controller_process import ControllerProcess
from solver.control import Effects, Level, Observation, Tick

RESULTS = Path(__file__).resolve().parent / "results"
PROFILE = "llama-3.1-70b-fp8-h100"
FIRST_PORT, ENGINE_PORTS = 21150, (21151, 21152)
TARGET = 0.05
WINDOW = Scenario("plain-300", connections=8, requests=4000, prompt_bytes=300)
NOW = Tick(0.0, Level.JOINT)
CORES = {"any": None, "gateway": GATEWAY_CORE, "client": CLIENT_CORE}


class Solving:
    """A ``Controller`` that solves a plan of this size at every tick, and does nothing else."""

    def __init__(self, gpus: int, core: int | None, epoch: int) -> None:
        """``core`` of the machine to stay on; None: any."""
        if core is not None:
            os.sched_setaffinity(0, {core})
        self._case = Case(gpus)
        self._table: CapacityTable = load_capacity(PROFILE)
        self._seed = 0

    def first_tick(self, now_s: float) -> Tick:
        """Now."""
        return Tick(now_s, Level.JOINT)

    def on_tick(self, tick: Tick, observation: Observation | None) -> Effects:
        """Solve the next plan."""
        time_case(self._case, self._table, 1, self._seed)
        self._seed += 1
        return Effects((), tick)


@dataclass(slots=True)
class Solves:
    """What was solved while a window lasted."""

    took_s: list[float] = field(default_factory=list)


@asynccontextmanager
async def solving(process: ControllerProcess, every_s: float) -> AsyncIterator[Solves]:
    """Plans are solved meanwhile, one begun every so many seconds or as the last is done."""
    solves, over = Solves(), asyncio.Event()

    async def solve_for_ever() -> None:
        while not over.is_set():
            began_s = perf_counter()
            await process.on_tick(NOW, None)  # type: ignore[arg-type] # ``Solving`` makes its own problems
            solves.took_s.append(perf_counter() - began_s)
            with suppress(TimeoutError):
                await asyncio.wait_for(over.wait(), max(every_s - solves.took_s[-1], 0.0))

    task = asyncio.create_task(solve_for_ever())
    try:
        yield solves
    finally:
        over.set()
        await task  # what is begun is solved: the next window is to be alone


def p99_ms(load: Path, gateway: Running, window: Scenario) -> float:
    """Of one window. Raises ``RuntimeError`` if a request failed."""
    told = json.loads(measure(load, gateway.port, window.arguments(1.0), own_session=False))
    if told["good"] != told["requests"]:
        raise RuntimeError(f"{told['requests'] - told['good']} of {told['requests']} requests failed")
    return float(told["latency_us"]["p99"]) / 1000.0


def summary(window: Scenario, alone_ms: list[float], solving_ms: list[float], took_s: list[float]) -> dict[str, Any]:
    """Medians, and the median ratio of the pairs."""
    ratios = [b / a for a, b in zip(alone_ms, solving_ms, strict=True)]
    return {
        "rounds": len(ratios),
        "requests_a_window": window.requests,
        "solves_meanwhile": len(took_s),
        "solve_median_s": statistics.median(took_s) if took_s else None,
        "p99_alone_ms": statistics.median(alone_ms),
        "p99_while_solving_ms": statistics.median(solving_ms),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "met": statistics.median(ratios) - 1.0 <= TARGET,
    }


async def measured(load: Path, gateway: Running, rounds: int, make: partial[Solving], every_s: float) -> dict[str, Any]:
    """Windows by turns, in rounds."""
    began_s = perf_counter()
    await asyncio.to_thread(p99_ms, load, gateway, WINDOW)  # warm
    rate_rps = WINDOW.requests / (perf_counter() - began_s)
    window = replace(WINDOW, requests=max(WINDOW.requests, round(rate_rps * every_s)))
    process = ControllerProcess(make)
    alone_ms: list[float] = []
    solving_ms: list[float] = []
    took_s: list[float] = []
    try:
        await process.on_tick(await process.first_tick(0.0), None)  # type: ignore[arg-type] # everything is loaded
        for number in range(rounds):
            alone_ms.append(await asyncio.to_thread(p99_ms, load, gateway, window))
            async with solving(process, every_s) as solves:
                solving_ms.append(await asyncio.to_thread(p99_ms, load, gateway, window))
                took_s += solves.took_s
            click.echo(f"round {number + 1}: {alone_ms[-1]:.2f} ms alone, {solving_ms[-1]:.2f} ms while solving")
    finally:
        await process.close()
    return summary(window, alone_ms, solving_ms, took_s)


@click.command()
@click.option("--rounds", type=click.IntRange(1), default=15, show_default=True)
@click.option("--gpus", type=click.IntRange(8), default=1000, show_default=True, help="Of the plans that are solved.")
@click.option("--every", "every_s", type=click.FloatRange(0.0), default=0.0, help="Seconds between solves [0: none].")
@click.option("--core", type=click.Choice(tuple(CORES)), default="any", help="Where the solver is held.")
@click.option("--store", is_flag=True, help="Write benchmarks/results/solve_interference.json.")
def main(rounds: int, gpus: int, every_s: float, core: str, store: bool) -> None:
    """Measure by turns alone and while plans are solved."""
    held = CORES[core]
    make = partial(Solving, gpus, None if held is None else core_number(held))
    with (
        tempfile.TemporaryDirectory() as folder,
        built(Path(folder)) as (engine, load),
        engines(engine, ENGINE_PORTS, own_session=False),
        gateways(["dynamollm"], FIRST_PORT, ENGINE_PORTS, own_session=False) as running,
    ):
        found = asyncio.run(measured(load, running[0], rounds, make, every_s))
    told = {**found, "gpus": gpus, "every_s": every_s, "core": core, "machine": machine(), "load": os.getloadavg()[0]}
    click.echo(json.dumps({k: v for k, v in told.items() if k not in ("ratios", "machine")}, indent=1))
    if store:
        name = (
            "solve_interference"
            + (f"_every_{every_s:g}s" if every_s else "")
            + (f"_{core}" if held is not None else "")
        )
        write_whole(RESULTS / f"{name}.json", (json.dumps(told, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
