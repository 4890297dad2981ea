"""Builds a CapacityTable: for every TP, SM clock and class, the highest Poisson rate within the SLO, and what it costs.

Each cell is found with the engine model, not from means: requests of the class arrive in a Poisson stream, and the
rate counts as carried while 99 % of them meet both their TTFT and their mean TBT. All rates of a class see the same
random stream, only faster or slower, so the search is on a nearly monotone function and cells compare fairly.
Everything is given: lengths, SLOs, seed; nothing is read.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from energy.capacity import CapacityTable, ClassLoad
from energy.profile import EnergyProfile, StepCoefficients
from pools.classes import REQUEST_CLASSES, ClassSlos
from simulator.alone import gap_quantile_s, serve_alone
from simulator.batching import EngineLimits
from simulator.workload.lengths import ClassLengths

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# dense where power rises steeply (the first sequence keeps the engine busy) and where latency does
LOADS = (0.0, 0.01, 0.03, 0.1, 0.25, 0.4, 0.55, 0.7, 0.8, 0.9, 0.95, 1.0)
ATTAINMENT = 0.99
TOLERANCE = 0.02  # of the highest rate
WARM_UP = 0.1  # share of the requests that only fill the engine
LOWEST_RATE_RPS = 1e-3
REQUESTS = 2000  # of each class, a cell's sample


@dataclass(frozen=True, slots=True)
class ClassTraffic:
    """What arrives of one class: unit-rate arrival times and the lengths and TTFT SLO of each request."""

    label: str
    unit_arrival_s: Floats  # at 1 request/s
    input_tokens: Ints
    output_tokens: Ints
    ttft_slo_s: Floats
    tbt_slo_s: float

    @property
    def load(self) -> ClassLoad:
        """Its means, as the table keeps them."""
        return ClassLoad(
            self.label,
            float(self.input_tokens.mean()),
            float(self.output_tokens.mean()),
            float(np.median(self.ttft_slo_s)),
            self.tbt_slo_s,
        )


def poisson_traffic(
    lengths: ClassLengths, slos: ClassSlos, requests: int = REQUESTS, seed: int = 1
) -> tuple[ClassTraffic, ...]:
    """A Poisson stream of each of the nine classes, its lengths drawn from that class of a trace's mix."""
    return tuple(_stream(lengths, slos, k, requests, seed) for k in range(len(REQUEST_CLASSES)))


def _stream(lengths: ClassLengths, slos: ClassSlos, k: int, requests: int, seed: int) -> ClassTraffic:
    rng = np.random.default_rng((seed, k))
    only = replace(lengths, shares=np.eye(len(REQUEST_CLASSES))[k])
    input_tokens, output_tokens = only.sample(rng, requests)
    request_class = REQUEST_CLASSES[k]
    return ClassTraffic(
        label=request_class.name,
        unit_arrival_s=np.cumsum(rng.exponential(size=requests)),
        input_tokens=input_tokens.astype(np.int64),
        output_tokens=output_tokens.astype(np.int64),
        ttft_slo_s=np.array([slos.slo(request_class, int(tokens)).ttft_s for tokens in input_tokens]),
        tbt_slo_s=slos.tbt_s,
    )


@dataclass(frozen=True, slots=True)
class Observed:
    """What one instance did at one rate."""

    attainment: float
    ttft_p50_s: float
    ttft_p99_s: float
    tbt_p50_s: float
    tbt_p99_s: float
    gap_p99_s: float
    power_w: float  # per GPU


def observe(c: StepCoefficients, limits: EngineLimits, traffic: ClassTraffic, rate_rps: float) -> Observed:
    """Serve the class at this rate on one instance."""
    arrival_s = traffic.unit_arrival_s / rate_rps
    counted_from = int(WARM_UP * len(arrival_s))
    marks = serve_alone(c, limits, arrival_s, traffic.input_tokens, traffic.output_tokens, counted_from)
    counted = slice(counted_from, None)
    ttft_s = (marks.first_s - arrival_s)[counted]
    tbt_s = ((marks.last_s - marks.first_s) / np.maximum(traffic.output_tokens - 1, 1))[counted]
    within = (ttft_s <= traffic.ttft_slo_s[counted]) & (tbt_s <= traffic.tbt_slo_s)
    return Observed(
        attainment=float(within.mean()),
        ttft_p50_s=float(np.quantile(ttft_s, 0.5)),
        ttft_p99_s=float(np.quantile(ttft_s, 0.99)),
        tbt_p50_s=float(np.quantile(tbt_s, 0.5)),
        tbt_p99_s=float(np.quantile(tbt_s, 0.99)),
        gap_p99_s=gap_quantile_s(marks.gaps, 0.99),
        power_w=float((marks.energy_j[1] - marks.energy_j[0]) / (arrival_s[-1] - arrival_s[counted_from])),
    )


def highest_rate_rps(c: StepCoefficients, limits: EngineLimits, traffic: ClassTraffic, above_rps: float = 0.0) -> float:
    """The highest rate at which the class keeps its SLO on one instance; 0 if even a lone request misses it.

    ``above_rps`` is a rate known to be carried (at a lower clock): the search begins there.
    """
    if _longest(traffic) > limits.kv_blocks * limits.block_tokens:
        return 0.0

    def carried(rate_rps: float) -> bool:
        return observe(c, limits, traffic, rate_rps).attainment >= ATTAINMENT

    low = max(above_rps, LOWEST_RATE_RPS)
    if above_rps == 0.0 and not carried(low):
        return 0.0
    growth = 1.2 if above_rps else 2.0
    high = max(growth * low, LOWEST_RATE_RPS)
    while carried(high):
        low, high = high, growth * high
    while high - low > TOLERANCE * high:
        middle = float(np.sqrt(low * high)) if high > 1.5 * low else 0.5 * (low + high)
        if carried(middle):
            low = middle
        else:
            high = middle
    return low


def _longest(traffic: ClassTraffic) -> int:
    return int((traffic.input_tokens + traffic.output_tokens).max())


def engine_limits(profile: EnergyProfile, tp: int) -> EngineLimits:
    """Limits of an engine with this profile's KV cache and vLLM's defaults."""
    block_tokens = EngineLimits(kv_blocks=1).block_tokens
    return EngineLimits(kv_blocks=profile.kv_capacity_tokens(tp) // block_tokens)


def build_capacity(
    profile: EnergyProfile,
    classes: Sequence[ClassTraffic],
    limits_of: Callable[[EnergyProfile, int], EngineLimits] = engine_limits,
    loads: tuple[float, ...] = LOADS,
    progress: Callable[[str], None] = lambda _: None,
) -> CapacityTable:
    """Every cell of the table of ``profile``. Takes about half a second of CPU a cell."""
    tps, clocks = profile.tensor_parallel, profile.sm_clocks_mhz
    shape = (len(tps), len(clocks), len(classes))
    rates = np.zeros(shape)
    fields = {name: np.zeros((*shape, len(loads))) for name in _FIELDS}
    for t, tp in enumerate(tps):
        limits = limits_of(profile, tp)
        for k, traffic in enumerate(classes):
            for i, clock in enumerate(clocks):
                c = profile.step(tp, clock)
                slower = rates[t, i - 1, k] if i else 0.0  # a higher clock never carries less
                rates[t, i, k] = highest_rate_rps(c, limits, traffic, slower)
                fields["power"][t, i, k, :] = tp * c.idle_w
                if rates[t, i, k] > 0:
                    _fill(
                        fields,
                        (t, i, k),
                        tp,
                        [observe(c, limits, traffic, max(u, 1e-3) * rates[t, i, k]) for u in loads],
                    )
                    fields["power"][t, i, k, 0] = tp * c.idle_w
            progress(f"TP{tp} {traffic.label}: {rates[t, -1, k]:.2f} requests/s at {clocks[-1]} MHz")
    return CapacityTable(
        profile=profile.name,
        fingerprint=fingerprint(profile, classes, limits_of, loads),
        tps=tps,
        sm_clocks_mhz=clocks,
        classes=tuple(traffic.load for traffic in classes),
        loads=loads,
        max_rate=rates,
        **fields,
    )


_FIELDS = ("ttft_p50", "ttft_p99", "tbt_p50", "tbt_p99", "gap_p99", "power")


def _fill(fields: dict[str, Floats], cell: tuple[int, int, int], tp: int, seen: list[Observed]) -> None:
    for level, observed in enumerate(seen):
        at = (*cell, level)
        fields["ttft_p50"][at] = observed.ttft_p50_s
        fields["ttft_p99"][at] = observed.ttft_p99_s
        fields["tbt_p50"][at] = observed.tbt_p50_s
        fields["tbt_p99"][at] = observed.tbt_p99_s
        fields["gap_p99"][at] = observed.gap_p99_s
        fields["power"][at] = tp * observed.power_w


def fingerprint(
    profile: EnergyProfile,
    classes: Sequence[ClassTraffic],
    limits_of: Callable[[EnergyProfile, int], EngineLimits] = engine_limits,
    loads: tuple[float, ...] = LOADS,
) -> str:
    """Short digest of all that a table depends on; a table with another one is stale."""
    digest = hashlib.sha256(repr((loads, ATTAINMENT, TOLERANCE, WARM_UP)).encode())
    for tp in profile.tensor_parallel:
        digest.update(repr((tp, tuple(limits_of(profile, tp)))).encode())
        for clock in profile.sm_clocks_mhz:
            digest.update(repr([f"{value:.6g}" for value in profile.step(tp, clock)]).encode())
    for traffic in classes:
        digest.update(repr((traffic.label, traffic.tbt_slo_s)).encode())
        for column in (traffic.unit_arrival_s, traffic.input_tokens, traffic.output_tokens, traffic.ttft_slo_s):
            digest.update(np.round(column, 6).astype(np.float64).tobytes())
    return digest.hexdigest()[:16]
