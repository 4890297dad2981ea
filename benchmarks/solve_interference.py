"""Whether a request notices a solve: P99 of requests passed through the gateway with and without a plan being solved.

``python -m benchmarks.solve_interference [--rounds 15] [--gpus 1000] [--store]``

The real gateway (`dynamollm serve`, nine pools, 32 instances, engines that answer at once) is asked in windows, in turn
alone and while a process as the controller's own, at the controller's priority, solves plans for 1,000 GPUs one after
the other: much more often than any controller does. Alternating windows meet the same machine, so each pair gives a
ratio of their P99s; what counts is the median of the pairs.
"""

import json
import multiprocessing
import os
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from benchmarks.adapters.gateway_processes import Running, built, engines, gateways, measure
from benchmarks.gateway_overhead import Scenario, machine
from benchmarks.solver_scaling import Case, time_case
from energy.adapters.capacity_file import load_capacity

RESULTS = Path(__file__).resolve().parent / "results"
PROFILE = "llama-3.1-70b-fp8-h100"
FIRST_PORT, ENGINE_PORTS = 21150, (21151, 21152)
CONTROLLER_PRIORITY = 10  # of dynamollm/adapters/controller_process.py
TARGET = 0.05
WINDOW = Scenario("plain-300", connections=8, requests=4000, prompt_bytes=300)


def solve_for_ever(gpus: int, solved: Any) -> None:
    """Solve plans of this size, one after the other; counts them."""
    os.nice(CONTROLLER_PRIORITY)
    table = load_capacity(PROFILE)
    for seed in range(10**9):
        time_case(Case(gpus), table, 1, seed)
        with solved.get_lock():
            solved.value += 1


@contextmanager
def solving(gpus: int) -> Iterator[Any]:
    """Plans are solved meanwhile; the count of them, already at work."""
    context = multiprocessing.get_context("spawn")
    solved = context.Value("q", 0)
    process = context.Process(target=solve_for_ever, args=(gpus, solved), daemon=True)
    process.start()
    try:
        while solved.value == 0 and process.is_alive():
            process.join(0.05)
        yield solved
    finally:
        process.kill()
        process.join()


def p99_ms(load: Path, gateway: Running) -> float:
    """Of one window. Raises ``RuntimeError`` if a request failed."""
    told = json.loads(measure(load, gateway.port, WINDOW.arguments(1.0)))
    if told["good"] != told["requests"]:
        raise RuntimeError(f"{told['requests'] - told['good']} of {told['requests']} requests failed")
    return float(told["latency_us"]["p99"]) / 1000.0


def summary(alone_ms: list[float], solving_ms: list[float], solves: int) -> dict[str, Any]:
    """Medians, and the median ratio of the pairs."""
    ratios = [b / a for a, b in zip(alone_ms, solving_ms, strict=True)]
    return {
        "rounds": len(ratios),
        "requests_a_window": WINDOW.requests,
        "solves_meanwhile": solves,
        "p99_alone_ms": statistics.median(alone_ms),
        "p99_while_solving_ms": statistics.median(solving_ms),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "met": abs(statistics.median(ratios) - 1.0) <= TARGET,
    }


@click.command()
@click.option("--rounds", type=click.IntRange(1), default=15, show_default=True)
@click.option("--gpus", type=click.IntRange(8), default=1000, show_default=True, help="Of the plans that are solved.")
@click.option("--store", is_flag=True, help="Write benchmarks/results/solve_interference.json.")
def main(rounds: int, gpus: int, store: bool) -> None:
    """Measure by turns alone and while plans are solved."""
    alone_ms, solving_ms, solves = [], [], 0
    with (
        tempfile.TemporaryDirectory() as folder,
        built(Path(folder)) as (engine, load),
        engines(engine, ENGINE_PORTS),
        gateways(["dynamollm"], FIRST_PORT, ENGINE_PORTS) as running,
    ):
        gateway = running[0]
        p99_ms(load, gateway)  # warm
        for number in range(rounds):
            alone_ms.append(p99_ms(load, gateway))
            with solving(gpus) as solved:
                before = solved.value
                solving_ms.append(p99_ms(load, gateway))
                solves += solved.value - before
            click.echo(f"round {number + 1}: {alone_ms[-1]:.2f} ms alone, {solving_ms[-1]:.2f} ms while solving")
    result = {**summary(alone_ms, solving_ms, solves), "gpus": gpus, "machine": machine(), "load": os.getloadavg()[0]}
    click.echo(json.dumps({k: v for k, v in result.items() if k not in ("ratios", "machine")}, indent=1))
    if store:
        temporary = RESULTS / "solve_interference.tmp"
        temporary.write_text(json.dumps(result, indent=1) + "\n")
        os.replace(temporary, RESULTS / "solve_interference.json")


if __name__ == "__main__":
    main()
