"""One sweep over real sockets: set the clock, send the load, read the energy counter, write the row; again.

The CSV is written whole after every load. A sweep that is stopped goes on where it was: loads whose row is there are
not measured again.
"""

import asyncio
import csv
import io
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.adapters.clock import MonotonicClock
from benchmarks.adapters.http_streams import HttpStreams, Target
from benchmarks.adapters.target_facts import energy_counter_j, probe_prompts
from benchmarks.profile_measure import COLUMNS, KEY, ClosedLoop, Kind, Load, poisson, row_of
from benchmarks.replay import Outcome, Replay
from benchmarks.replay_body import RequestBodies
from energy.adapters.catalogue import write_whole
from energy.profile import ProfileError
from pools.drivers.vllm_clocks import GpuClocks
from pools.instances import GpuSlot


@dataclass(frozen=True, slots=True)
class SweepOrder:
    """What to measure, where, and into which file."""

    target: Target
    served_model: str
    kind: Kind
    loads: Sequence[Load]
    output: Path
    chat: bool = False  # completions have no template around the prompt
    open_s: float = 60.0  # how long an open loop sends
    seed: int = 0
    timeout_s: float = 600.0
    gpu_telemetry: str | None = None  # metrics with the energy of the instance's GPUs and no others
    gpus: tuple[GpuSlot, ...] = ()  # of the instance, where its clocks are to be set


async def run_sweep(order: SweepOrder, clocks: GpuClocks, on_load: Callable[[Load, int], None]) -> int:
    """Measure what the output does not hold yet; returns how many loads that were.

    ``on_load`` is told each load that is done and how many requests it had. Raises ``TargetError``, ``DriverError`` for
    a clock that cannot be set, ``LoadFailedError``, and ``ProfileError`` if the output holds something else.
    """
    rows = read_rows(order.output)
    known = {tuple(row[column] for column in KEY) for row in rows}
    clock = MonotonicClock()
    bodies = await probe_prompts(order.target, order.served_model, order.chat, clock)
    measured = 0
    try:
        for load in order.loads:
            if load.key() not in known:
                rows.append(await _measure(order, load, bodies, clocks, clock))
                write_rows(order.output, rows)
                measured += 1
            on_load(load, load.requests(order.open_s))
    finally:
        await clocks.reset(order.gpus)
    return measured


async def _measure(
    order: SweepOrder, load: Load, bodies: RequestBodies, clocks: GpuClocks, clock: MonotonicClock
) -> dict[str, str]:
    if order.gpus:
        await clocks.lock(order.gpus, load.sm_clock_mhz)
    streams = HttpStreams(order.target, bodies.path, bodies.render, clock, order.timeout_s)
    outcomes: list[Outcome] = []
    before_j, began_s = await _energy_j(order), time.monotonic()
    try:
        if load.concurrency:
            await ClosedLoop(load, streams, clock, outcomes.append).run()
        else:
            arrivals = poisson(load, order.open_s, order.seed)
            await Replay(arrivals, streams, clock, lambda _, outcome: outcomes.append(outcome)).run()
    finally:
        streams.close()
    power_w = None
    if before_j is not None and (after_j := await _energy_j(order)) is not None:
        power_w = (after_j - before_j) / (time.monotonic() - began_s) / order.kind.tp
    return row_of(order.kind, load, outcomes, power_w)


async def _energy_j(order: SweepOrder) -> float | None:
    return None if order.gpu_telemetry is None else await energy_counter_j(order.gpu_telemetry)


def read_rows(path: Path) -> list[dict[str, str]]:
    """Rows of an earlier run; none if there is no file. Raises ``ProfileError`` if it is something else's."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    reader = csv.DictReader(io.StringIO(text))
    if tuple(reader.fieldnames or ()) != COLUMNS:
        raise ProfileError(f"{path}: not written by `dynamollm profile measure`; choose another file")
    return list(reader)


def write_rows(path: Path, rows: Sequence[dict[str, str]]) -> None:
    """Write all rows; the file appears whole or not at all."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, text.getvalue().encode("utf-8"))


def run(order: SweepOrder, clocks: GpuClocks, on_load: Callable[[Load, int], None]) -> int:
    """``run_sweep`` in an event loop of its own; the clocks are closed."""

    async def whole() -> int:
        try:
            return await run_sweep(order, clocks, on_load)
        finally:
            await clocks.close()

    return asyncio.run(whole())
