"""CapacityTable: what one instance carries within the SLO, and what it draws, for each TP, SM clock and request class.

The planner builds its columns from it and the controllers look clocks up in it, so every query is vectorised. The
numbers come from the engine model under Poisson arrivals (``simulator.capacity``), not from means: P99 is P99.
Pure values; read and written in ``energy/adapters``. Source: DynamoLLM section IV (profiles over load x TP x clock).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from energy.profile import ProfileRangeError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class ClassLoad:
    """One request class as the table was built for it: what arrives and what it is promised at P99."""

    label: str
    input_tokens: float  # mean
    output_tokens: float  # mean
    ttft_slo_s: float
    tbt_slo_s: float  # of a request's mean time between tokens


class LeastEnergy(NamedTuple):
    """The (TP, clock) that carries a rate within the SLO on one instance at the least power; 0 and inf if none does."""

    tp: Ints
    sm_clock_mhz: Ints
    power_w: Floats  # whole instance


@dataclass(frozen=True, slots=True)
class CapacityTable:
    """Capacity and cost of one instance. Axes: T = ``tps``, C = ``sm_clocks_mhz``, K = ``classes``, L = ``loads``.

    ``max_rate`` (T, C, K) is the highest rate within the SLO in requests/s, 0 where even a lone request misses it.
    The other arrays (T, C, K, L) hold at ``loads[l] * max_rate``; where ``max_rate`` is 0 only the idle power stands.
    Every query takes scalars or arrays that broadcast; ``request_class`` is the position in ``classes``.
    """

    profile: str
    fingerprint: str  # of the profile and the builder's arguments
    tps: tuple[int, ...]
    sm_clocks_mhz: tuple[int, ...]
    classes: tuple[ClassLoad, ...]
    loads: tuple[float, ...]  # share of max_rate, ascending, from 0 to 1
    max_rate: Floats
    ttft_p50: Floats
    ttft_p99: Floats
    tbt_p50: Floats
    tbt_p99: Floats
    gap_p99: Floats  # of single gaps between tokens, all requests pooled
    power: Floats  # whole instance

    def __post_init__(self) -> None:
        cells = (len(self.tps), len(self.sm_clocks_mhz), len(self.classes))
        if self.max_rate.shape != cells:
            raise ValueError(f"max_rate has shape {self.max_rate.shape}, the axes are {cells}")
        for name in ("ttft_p50", "ttft_p99", "tbt_p50", "tbt_p99", "gap_p99", "power"):
            if getattr(self, name).shape != (*cells, len(self.loads)):
                raise ValueError(f"{name} has shape {getattr(self, name).shape}, not {(*cells, len(self.loads))}")
        if self.loads[0] != 0.0 or self.loads[-1] != 1.0:
            raise ValueError(f"loads go from 0 to 1, not {self.loads}")

    def max_rate_rps(self, tp: ArrayLike, sm_clock_mhz: ArrayLike, request_class: ArrayLike) -> Floats:
        """Highest rate of one instance within the SLO. Raises ``ProfileRangeError`` off the table's axes."""
        return np.asarray(self.max_rate[self._cell(tp, sm_clock_mhz, request_class)])

    def power_w(self, tp: ArrayLike, sm_clock_mhz: ArrayLike, request_class: ArrayLike, rate_rps: ArrayLike) -> Floats:
        """Mean power of the whole instance at this rate, in watts; inf beyond its highest rate."""
        return self._at(self.power, tp, sm_clock_mhz, request_class, rate_rps)

    def ttft_p99_s(
        self, tp: ArrayLike, sm_clock_mhz: ArrayLike, request_class: ArrayLike, rate_rps: ArrayLike
    ) -> Floats:
        """P99 time to first token at this rate; inf beyond the highest rate."""
        return self._at(self.ttft_p99, tp, sm_clock_mhz, request_class, rate_rps)

    def tbt_p99_s(
        self, tp: ArrayLike, sm_clock_mhz: ArrayLike, request_class: ArrayLike, rate_rps: ArrayLike
    ) -> Floats:
        """P99 over requests of their mean time between tokens at this rate; inf beyond the highest rate."""
        return self._at(self.tbt_p99, tp, sm_clock_mhz, request_class, rate_rps)

    def energy_j_per_request(
        self, tp: ArrayLike, sm_clock_mhz: ArrayLike, request_class: ArrayLike, rate_rps: ArrayLike
    ) -> Floats:
        """Energy of one request when this rate runs through the instance: its idle power is shared among them."""
        rate = np.asarray(rate_rps, dtype=np.float64)
        with np.errstate(divide="ignore"):
            return self.power_w(tp, sm_clock_mhz, request_class, rate) / rate

    def least_energy_point(self, request_class: ArrayLike, rate_rps: ArrayLike) -> LeastEnergy:
        """The (TP, clock) of one instance that carries this rate within the SLO at the least power."""
        return self._least(range(len(self.tps)), request_class, rate_rps)

    def least_energy_clock(self, tp: int, request_class: ArrayLike, rate_rps: ArrayLike) -> LeastEnergy:
        """The clock at which an instance of this TP carries the rate within the SLO at the least power."""
        return self._least([int(self._position("TP", self.tps, tp))], request_class, rate_rps)

    def _least(self, tp_positions: Iterable[int], request_class: ArrayLike, rate_rps: ArrayLike) -> LeastEnergy:
        """Every (TP, clock) tried, class by class: what a lookup costs is one interpolation a cell."""
        asked, asked_rps = np.broadcast_arrays(np.asarray(request_class, np.int64), np.asarray(rate_rps, np.float64))
        classes = self._known_classes(asked).ravel()
        order = np.argsort(classes, kind="stable")
        rates = asked_rps.ravel()[order]
        bounds = np.searchsorted(classes[order], np.arange(len(self.classes) + 1))
        power_w = np.full(rates.shape, np.inf)
        point = np.full(rates.shape, -1)
        cells = [(t, i) for t in tp_positions for i in range(len(self.sm_clocks_mhz))]
        for k in np.unique(classes):
            part = slice(bounds[k], bounds[k + 1])
            for number, (t, i) in enumerate(cells):
                at_cell = self._power_of_cell(t, i, int(k), rates[part])
                better = at_cell < power_w[part]
                power_w[part] = np.where(better, at_cell, power_w[part])
                point[part] = np.where(better, number, point[part])
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        tps = np.array([*(self.tps[t] for t, _ in cells), 0])  # -1 picks the last: none
        clocks = np.array([*(self.sm_clocks_mhz[i] for _, i in cells), 0])
        shape, chosen = asked.shape, point[back]
        return LeastEnergy(tps[chosen].reshape(shape), clocks[chosen].reshape(shape), power_w[back].reshape(shape))

    def _power_of_cell(self, t: int, i: int, k: int, rates: Floats) -> Floats:
        highest = self.max_rate[t, i, k]
        if highest == 0.0:
            return np.where(rates == 0.0, self.power[t, i, k, 0], np.inf)
        return np.asarray(np.interp(rates, np.asarray(self.loads) * highest, self.power[t, i, k], right=np.inf))

    def _cell(self, tp: ArrayLike, sm_clock_mhz: ArrayLike, request_class: ArrayLike) -> tuple[Ints, Ints, Ints]:
        tp_at, clock_at = self._position("TP", self.tps, tp), self._position("MHz", self.sm_clocks_mhz, sm_clock_mhz)
        return tp_at, clock_at, self._known_classes(request_class)

    def _known_classes(self, request_class: ArrayLike) -> Ints:
        classes = np.asarray(request_class, dtype=np.int64)
        if classes.size and not (classes.min() >= 0 and classes.max() < len(self.classes)):
            raise ProfileRangeError(f"capacity table of {self.profile}: no class at position {request_class!r}")
        return classes

    def _position(self, what: str, axis: tuple[int, ...], values: ArrayLike) -> Ints:
        wanted = np.asarray(values)
        held = np.asarray(axis)
        found = np.minimum(np.searchsorted(held, wanted), len(axis) - 1)
        if not np.array_equal(held[found], wanted):
            raise ProfileRangeError(f"capacity table of {self.profile} holds for {what} {axis}, not {values!r}")
        return np.asarray(found, dtype=np.int64)

    def _at(
        self, values: Floats, tp: ArrayLike, sm_clock_mhz: ArrayLike, request_class: ArrayLike, rate_rps: ArrayLike
    ) -> Floats:
        """Interpolate ``values`` over load, linearly; inf where the rate is beyond the highest."""
        cell = self._cell(tp, sm_clock_mhz, request_class)
        rate = np.asarray(rate_rps, dtype=np.float64)
        highest = self.max_rate[cell]
        loads = np.asarray(self.loads)
        with np.errstate(divide="ignore", invalid="ignore"):
            load = np.where(rate > 0, rate / highest, 0.0)
        feasible = load <= 1.0
        load = np.where(feasible, load, 0.0)
        upper = np.clip(np.searchsorted(loads, load, side="right"), 1, len(loads) - 1)
        lower = upper - 1
        share = (load - loads[lower]) / (loads[upper] - loads[lower])
        at_lower = values[(*cell, lower)]
        return np.asarray(np.where(feasible, at_lower + share * (values[(*cell, upper)] - at_lower), np.inf))
