"""ClockChooser: every 5 s, the SM clocks at which a pool's instances carry its load within the SLO at the least power.

The load of a pool is what its instances were given lately, each class counted in shares of what an instance could carry
of it alone. The router spreads load by what instances do at their present clocks, so a clock chosen from the load of
one instance would feed on itself: more clock, more load, more clock. Hence clocks are chosen for a pool together: all
begin at the knee, the clock of the least energy a request, and are raised, the cheapest gain in capacity first, until
the load fits. Lower clocks would save next to nothing, for below the knee of its voltage a GPU's work costs the same at
every clock, and they make requests late, which is answered above the knee, where work is dear. Lowering needs room to
spare. What waits in the gateway found no instance with room: it is to be served by the next tick beside what arrives,
so clocks rise before anybody is late.

The table knows classes alone. Mixed ones get on better or worse than their shares add up, so each pool's capacity is
corrected by a factor learnt from the share of its requests that are late: down while it nears the 1 % that a P99
allows, slowly up while it is well below. How slow the slowest request was says nothing here, for a router that packs
uses the budgets up on purpose; and one late request says little of an instance: only one that keeps missing is raised
by itself. A few array operations for each pool and TP; see benchmarks/solver_scaling.py for the time.
Source: DynamoLLM section IV, instance controller (drop clocks that break the SLO, take the least-energy one).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from energy.capacity import CapacityTable
from pools.instances import InstanceState
from pools.view import PoolView
from solver.control import STATE_CODE, FloatArray, InstanceViews, IntArray

READY = STATE_CODE[InstanceState.READY]
LEAST_LOAD = 1e-9  # of an instance; what a decayed memory of traffic comes to counts as none


@dataclass(frozen=True, slots=True)
class ClockSettings:
    """How careful to be with clocks."""

    memory_s: float = 20.0  # time constant of the load
    ceiling: float = 0.97  # of the SLO capacity; beyond it clocks go up
    target: float = 0.9  # what a change of clocks makes room for
    miss_memory_s: float = 20.0  # time constant of how often the SLO is missed
    tight: float = 0.4  # share of ticks with a miss above which an instance goes one step beyond its pool's
    broken: float = 0.7  # above which it goes to the top
    late_memory_s: float = 60.0  # time constant of the share of late requests
    late_share: float = 0.006  # of a pool's requests, above which its capacity is taken to be lower
    most_late_share: float = 0.03  # of one look's requests: a moment in which all come late tells no more than that
    spare_share: float = 0.003  # below which it is taken to be higher
    learn_up: float = 0.002  # of the capacity factor, each tick: latency has a cliff, capacity comes in minutes
    learn_down: float = 0.04  # for each time that the share is beyond ``late_share``, at most twice
    factor_limits: tuple[float, float] = (0.7, 1.3)


@dataclass(frozen=True, slots=True, eq=False)
class ClockChoice:
    """What each instance should run at, and why."""

    sm_clock_mhz: IntArray  # (I,)
    capacity_factor: FloatArray  # (P,) learnt: capacity of the pool by that of its classes alone
    pool_load: FloatArray  # (P,) share of the SLO capacity of the pool at those clocks; inf: it has no instance
    missed: FloatArray  # (I,) how often its worst request was late lately, 0..1


class ClockChooser:
    """Remembers the load of pools and the misses of instances."""

    def __init__(
        self,
        tables: Mapping[str, CapacityTable],
        pools: Sequence[PoolView],
        settings: ClockSettings | None = None,
        sm_clocks_mhz: tuple[int, ...] | None = None,
    ) -> None:
        """``sm_clocks_mhz`` are those that may be chosen; by default all of the tables. With one it only learns."""
        self._settings = settings or ClockSettings()
        arrays = {model: _ModelArrays(table, sm_clocks_mhz) for model, table in tables.items()}
        self._arrays = [arrays[pool.model] for pool in pools]
        self._members = [[p for p, pool in enumerate(pools) if pool.model == model] for model in tables]
        self._load_rps = np.zeros((len(pools), 9))
        self._weight = np.zeros(len(pools))
        self._factor = np.ones(len(pools))
        self._requests = np.zeros(len(pools))
        self._late = np.zeros(len(pools))
        self._stressed = np.zeros(len(pools), dtype=np.bool_)
        self._ids: tuple[str, ...] = ()
        self._missed = np.zeros(0)

    def choose(self, window_s: float, instances: InstanceViews, queued: FloatArray) -> ClockChoice:
        """The clock of every instance; those not READY keep theirs.

        ``queued`` (9 x models,): requests that wait in the gateway, as in ``Demand``.
        """
        self._follow(instances, window_s)
        waiting_rps = self._waiting_rps(queued, window_s)
        clock = instances.sm_clock_mhz.copy()
        pool_load = np.zeros(len(self._arrays))
        ready = instances.state == READY
        for p, arrays in enumerate(self._arrays):
            mine = np.flatnonzero(ready & (instances.pool == p))
            rate = self._load_rps[p] / max(float(self._weight[p]), 1e-9) + waiting_rps[p]
            if len(mine):
                seen = mine[~np.isnan(instances.slo_slack[mine])]
                given = float(instances.class_rate_rps[seen].sum()) * window_s
                self._learn(p, window_s, given, float(instances.late_rps[seen].sum()) * window_s)
                clock[mine], pool_load[p] = self._of_pool(arrays, mine, instances, rate / self._factor[p])
                self._stressed[p] = pool_load[p] > 0.7 * self._settings.target
            elif rate.any():
                pool_load[p] = np.inf
        return ClockChoice(clock, self._factor.copy(), pool_load, self._missed)

    def _waiting_rps(self, queued: FloatArray, window_s: float) -> FloatArray:
        """(P, 9) what clears the gateway's queue in a window like the last; each pool takes its share of a class."""
        rates = np.zeros_like(self._load_rps)
        if not queued.any() or window_s <= 0.0:
            return rates
        for m, members in enumerate(self._members):
            given = self._load_rps[members]
            total = given.sum(axis=0)
            share = np.divide(given, total, out=np.zeros_like(given), where=total > 0.0)
            rates[members] = share * queued[9 * m : 9 * (m + 1)] / window_s
        return rates

    def _learn(self, pool: int, window_s: float, requests: float, late: float) -> None:
        """Correct a pool's capacity by the share of late requests."""
        settings = self._settings
        if requests == 0.0:
            return
        keep = float(np.exp(-window_s / settings.late_memory_s))
        self._requests[pool] = self._requests[pool] * keep + requests
        self._late[pool] = self._late[pool] * keep + min(late, settings.most_late_share * requests)
        share = self._late[pool] / max(self._requests[pool], 1.0)
        if share > settings.late_share:
            self._factor[pool] *= 1.0 - settings.learn_down * min(share / settings.late_share - 1.0, 2.0)
        elif share < settings.spare_share and self._stressed[pool]:
            self._factor[pool] += settings.learn_up
        self._factor[pool] = min(max(self._factor[pool], settings.factor_limits[0]), settings.factor_limits[1])

    def _follow(self, instances: InstanceViews, window_s: float) -> None:
        """Take in what was given to whom, and carry loads and misses over to the instances there are now."""
        settings = self._settings
        if instances.ids != self._ids:
            before = {name: i for i, name in enumerate(self._ids)}
            at = np.array([before.get(name, len(before)) for name in instances.ids], dtype=np.int64)
            self._missed = np.append(self._missed, 0.0)[at]
            self._ids = instances.ids
        keep = float(np.exp(-window_s / settings.memory_s))
        seen = np.zeros_like(self._load_rps)
        np.add.at(seen, instances.pool, instances.class_rate_rps)
        self._load_rps = self._load_rps * keep + seen * (1.0 - keep)
        self._weight = self._weight * keep + (1.0 - keep)
        keep = float(np.exp(-window_s / settings.miss_memory_s))
        self._missed = self._missed * keep + (instances.slo_slack < 0.0) * (1.0 - keep)  # nan, none seen: no miss

    def _of_pool(
        self, arrays: "_ModelArrays", mine: IntArray, instances: InstanceViews, rate: FloatArray
    ) -> tuple[IntArray, float]:
        """Clocks of a pool's instances, and its load at them."""
        settings = self._settings
        tp = arrays.tp_at(instances.tp[mine])
        now = arrays.clock_at(instances.sm_clock_mhz[mine])
        kinds = np.unique(tp)
        fit, power_w = arrays.carried(kinds, rate)  # (k, C) share of the pool's load one instance carries; its power
        kind = np.searchsorted(kinds, tp)
        step = now
        wanted = _raise(fit, power_w, kind, now, 1.0 / settings.target)
        cheaper = power_w[kind, wanted].sum() < power_w[kind, now].sum()
        if fit[kind, now].sum() * settings.ceiling < 1.0 or cheaper:
            step = wanted
        missed, top = self._missed[mine], fit.shape[1] - 1
        step = np.where(missed > settings.tight, np.minimum(step + 1, top), step)
        step = np.where(missed > settings.broken, top, step)
        carried = float(fit[kind, wanted].sum())
        return arrays.clocks[step], 1.0 / carried if carried > 0.0 else np.inf


def _raise(fit: FloatArray, power_w: FloatArray, kind: IntArray, now: IntArray, enough: float) -> IntArray:
    """(n,) clock positions: from the lowest, the cheapest gains first, until the sum of ``fit`` is enough.

    Gains are taken along the lower convex hull of each kind, so the cheapest first is the least power, but for the last
    instance raised. Among like instances those at a high clock now go up first: fewer changes.
    """
    lowest = power_w.argmin(axis=1)
    reached: IntArray = lowest[kind]
    carried = float(fit[kind, reached].sum())
    if carried >= enough:
        return reached
    gains = [gain for k in range(len(fit)) for gain in _gains(fit[k].tolist(), power_w[k].tolist(), int(lowest[k]), k)]
    eager = np.argsort(-now, kind="stable")
    members = [eager[kind[eager] == k] for k in range(len(fit))]
    for _, k, end, gain in sorted(gains):
        if carried >= enough:
            break
        raised = min(int(np.ceil((enough - carried) / gain)), len(members[k]))
        reached[members[k][:raised]] = end
        carried += raised * gain
    return reached


def _gains(fit: list[float], power_w: list[float], lowest: int, kind: int) -> list[tuple[float, int, int, float]]:
    """(watts per share, kind, clock reached, share gained) along the lower convex hull; a few numbers, so no arrays."""
    gains, at = [], lowest
    while at < len(fit) - 1:
        slopes = [
            ((power_w[c] - power_w[at]) / (fit[c] - fit[at]), kind, c, fit[c] - fit[at])
            for c in range(at + 1, len(fit))
            if fit[c] > fit[at]
        ]
        if not slopes:
            break
        best = min(slopes)
        gains.append(best)
        at = best[2]
    return gains


class _ModelArrays:
    """A capacity table as the chooser reads it. Axes: T, C, K = 9."""

    def __init__(self, table: CapacityTable, sm_clocks_mhz: tuple[int, ...] | None) -> None:
        knee_mhz = table.sm_clocks_mhz[_knee(table)]
        at = [
            i
            for i, clock in enumerate(table.sm_clocks_mhz)
            if (clock >= knee_mhz if sm_clocks_mhz is None else clock in sm_clocks_mhz)
        ]
        self.tps = np.asarray(table.tps)
        self.clocks = np.asarray(table.sm_clocks_mhz, dtype=np.int64)[at]
        with np.errstate(divide="ignore"):
            # a class that an instance cannot serve within its SLO at a clock: any of it fills the instance
            self.per_request = np.where(table.max_rate > 0.0, 1.0 / table.max_rate, 1e6)[:, at]
        self.full_w = table.power[:, at][..., -1]  # (T, C, K)
        self.idle_w = table.power[:, at][:, :, 0, 0]  # (T, C)

    def tp_at(self, tp: IntArray) -> IntArray:
        """Positions of TPs."""
        return np.asarray(np.searchsorted(self.tps, tp), dtype=np.int64)

    def clock_at(self, sm_clock_mhz: IntArray) -> IntArray:
        """Positions of clocks; one between two of the table counts as the lower."""
        at = np.searchsorted(self.clocks, sm_clock_mhz, side="right") - 1
        return np.asarray(np.clip(at, 0, len(self.clocks) - 1), dtype=np.int64)

    def carried(self, tp: IntArray, rate_rps: FloatArray) -> tuple[FloatArray, FloatArray]:
        """(k, C) share of this load one instance of each TP carries at each clock, and its power when full of it."""
        shares = self.per_request[tp] * rate_rps  # (k, C, 9)
        load = shares.sum(axis=2)
        if load.min(initial=np.inf) < LEAST_LOAD:
            return np.full(load.shape, 1.0 / LEAST_LOAD), self.idle_w[tp]
        return 1.0 / load, np.einsum("kcj,kcj->kc", shares, self.full_w[tp]) / load


def _knee(table: CapacityTable) -> int:
    """Position of the clock at which requests take the least energy: the median over TPs and classes."""
    with np.errstate(divide="ignore"):
        energy_j = np.where(table.max_rate > 0.0, table.power[..., -1] / table.max_rate, np.inf)
    served = np.isfinite(energy_j).any(axis=1)
    return int(np.median(energy_j.argmin(axis=1)[served])) if served.any() else 0
