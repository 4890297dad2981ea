"""Calibration: the load at which single-pool needs exactly the paper's number of servers.

The highest rate scale at which N servers in one pool, at the largest TP and the highest clock, still keep 99 % of what
can be kept of the busiest stretch within SLO (prompts too long for any instance's TTFT are late even alone); so N
servers are needed and N - 1 are too few. Found by bisection with the simulator itself, not from capacity tables
(statistical multiplexing is in it), and held against the workload as it is generated at that scale.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from simulator.experiment import Scenario, prepare
from simulator.simulation import simulate
from simulator.workload.arrivals import Workload, recorded
from simulator.workload.transform import scaled, window

ATTAINMENT = 0.99
NEARLY_ALONE = 0.01  # of the first guess: what is late then, no number of servers brings within its SLO
TOLERANCE = 0.01
SEED = 11  # of thinning
STRETCH_S = 7200.0  # of a longer workload, the busiest so long is what servers are provided for


@dataclass(frozen=True, slots=True)
class Calibration:
    """A rate scale, and what N and N - 1 servers make of the busiest stretch at it."""

    rate_scale: float
    nodes: int
    attainment: float
    attainment_with_one_less: float
    stretch_start_s: float
    stretch_s: float
    attainment_alone: float | None = None  # at nearly no load, where it was measured


def calibrate(scenario: Scenario, of_scale: Callable[[float], Workload], first_guess: float = 4.0) -> Calibration:
    """Find the rate scale for ``scenario.nodes``; ``of_scale`` makes the workload at a scale."""
    start_s, stretch_s = busiest_stretch(of_scale(1.0))

    def attained(stretch: Workload, nodes: int) -> float:
        setup, controller = prepare(replace(scenario, nodes=nodes), "single-pool", stretch)
        return simulate(setup, stretch, controller, "single-pool").slo_attainment

    low, high = 0.0, first_guess
    busiest = _stretch(of_scale(high), start_s, stretch_s)
    alone = attained(scaled(busiest, NEARLY_ALONE, SEED), scenario.nodes)
    while attained(busiest, scenario.nodes) >= ATTAINMENT * alone:
        low, high = high, 1.5 * high
        busiest = _stretch(of_scale(high), start_s, stretch_s)
    while high - low > TOLERANCE * high:
        middle = 0.5 * (low + high)
        if attained(scaled(busiest, middle / high, SEED), scenario.nodes) >= ATTAINMENT * alone:
            low = middle
        else:
            busiest = scaled(busiest, middle / high, SEED)
            high = middle
    while True:  # the search thins one draw; the workload at that scale is another, which may come in denser bursts
        scale = float(f"{low:.3g}")
        found = _stretch(of_scale(scale), start_s, stretch_s)
        attainment = attained(found, scenario.nodes)
        if attainment >= ATTAINMENT * alone:
            break
        low *= 1.0 - 2.0 * TOLERANCE
    return Calibration(
        rate_scale=scale,
        nodes=scenario.nodes,
        attainment_alone=alone,
        attainment=attainment,
        attainment_with_one_less=attained(found, scenario.nodes - 1),
        stretch_start_s=start_s,
        stretch_s=stretch_s,
    )


def _stretch(workload: Workload, start_s: float, stretch_s: float) -> Workload:
    """The busiest stretch, held in memory: a generated week is not walked through for every guess."""
    part = window(workload, start_s, stretch_s)
    return recorded(part.name, part.collect(), part.duration_s)


def busiest_stretch(workload: Workload) -> tuple[float, float]:
    """(start, length) of the busiest ``STRETCH_S``, in steps of ten minutes; all of a shorter workload."""
    if workload.duration_s <= 2.0 * STRETCH_S:
        return 0.0, workload.duration_s
    step_s = 600.0
    counts = np.zeros(int(workload.duration_s // step_s) + 1)
    for chunk in workload.chunks():
        counts += np.bincount((chunk.arrival_s // step_s).astype(np.int64), minlength=len(counts))[: len(counts)]
    wide = int(STRETCH_S // step_s)
    sums = np.convolve(counts, np.ones(wide), mode="valid")
    return float(sums.argmax()) * step_s, STRETCH_S
