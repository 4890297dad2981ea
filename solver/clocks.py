"""ClockChooser: every 5 s, for each instance, the SM clock that carries its load within the SLO at the least power.

The load of an instance is what it was given lately, as shares of what its class alone could be given at each clock
(shares add up over classes). Raising is immediate; lowering waits until the lower clock would still leave room and the
SLO was met with slack for a while. Vectorised over instances: one call takes some ten microseconds.
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


@dataclass(frozen=True, slots=True)
class ClockSettings:
    """How careful to be with clocks."""

    memory_s: float = 30.0  # time constant of an instance's load
    ceiling: float = 0.85  # of the SLO capacity at the clock chosen
    lower_ceiling: float = 0.75  # what the lower clock may be filled to, to be taken: hysteresis
    tight_slack: float = 0.1  # SLO slack below which the clock goes up whatever the load says
    calm_slack: float = 0.3  # SLO slack above which it may go down
    calm_ticks: int = 3  # ticks in a row, before it goes down


@dataclass(frozen=True, slots=True, eq=False)
class ClockChoice:
    """What each instance should run at, and why."""

    sm_clock_mhz: IntArray  # (I,)
    load: FloatArray  # (I,) share of the SLO capacity at that clock
    raised_for_slack: FloatArray  # (I,) 1 where the SLO, not the load, asked for it


class ClockChooser:
    """Remembers each instance's load and calm by its id."""

    def __init__(
        self,
        tables: Mapping[str, CapacityTable],
        pools: Sequence[PoolView],
        settings: ClockSettings | None = None,
    ) -> None:
        self._settings = settings or ClockSettings()
        self._tables = [_ModelArrays(table) for table in tables.values()]
        models = list(tables)
        self._pool_model: IntArray = np.array([models.index(pool.model) for pool in pools], dtype=np.int64)
        self._ids: tuple[str, ...] = ()
        self._load_rps = np.zeros((0, 9))
        self._calm = np.zeros(0, dtype=np.int64)

    def choose(self, window_s: float, instances: InstanceViews) -> ClockChoice:
        """The clock of every instance; those not READY keep theirs."""
        self._follow(instances, window_s)
        clock = instances.sm_clock_mhz.copy()
        load = np.zeros(len(instances))
        raised = np.zeros(len(instances))
        models = self._pool_model[instances.pool]
        for m, arrays in enumerate(self._tables):
            mine = np.flatnonzero((instances.state == READY) & (models == m))
            if len(mine):
                clock[mine], load[mine], raised[mine] = self._of_model(arrays, mine, instances)
        return ClockChoice(clock, load, raised)

    def _follow(self, instances: InstanceViews, window_s: float) -> None:
        """Carry loads and calm over to the instances there are now."""
        settings = self._settings
        if instances.ids != self._ids:
            before = {name: i for i, name in enumerate(self._ids)}
            at = np.array([before.get(name, -1) for name in instances.ids], dtype=np.int64)
            old_load, old_calm = self._load_rps, self._calm
            self._load_rps = np.where(at[:, None] >= 0, old_load[at], np.nan) if len(old_load) else _unknown(len(at))
            self._calm = np.where(at >= 0, old_calm[at], 0) if len(old_calm) else np.zeros(len(at), dtype=np.int64)
            self._ids = instances.ids
        keep = float(np.exp(-window_s / settings.memory_s))
        seen = instances.class_rate_rps
        known = ~np.isnan(self._load_rps)
        self._load_rps = np.where(known, self._load_rps * keep + seen * (1.0 - keep), seen)
        slack = instances.slo_slack
        calm = np.isnan(slack) | (slack >= settings.calm_slack)
        self._calm = np.where(calm, self._calm + 1, 0)

    def _of_model(
        self, arrays: "_ModelArrays", mine: IntArray, instances: InstanceViews
    ) -> tuple[IntArray, FloatArray, FloatArray]:
        settings = self._settings
        tp = arrays.tp_at(instances.tp[mine])
        now = arrays.clock_at(instances.sm_clock_mhz[mine])
        shares = self._load_rps[mine][:, None, :] * arrays.per_request[tp]  # (n, C, 9)
        load = shares.sum(axis=2)  # (n, C)
        power_w = arrays.power_at(tp, shares.argmax(axis=2), load)
        steps = np.arange(load.shape[1])
        calm = self._calm[mine] >= settings.calm_ticks
        ceiling = np.where(steps < now[:, None], settings.lower_ceiling, settings.ceiling)
        allowed = (load <= ceiling) & (calm[:, None] | (steps >= now[:, None]))
        wanted = np.where(allowed, power_w, np.inf).argmin(axis=1)
        wanted = np.where(allowed.any(axis=1), wanted, load.shape[1] - 1)
        slack = instances.slo_slack[mine]
        tight = slack < settings.tight_slack  # nan: False
        broken = slack < 0.0
        one_up = np.minimum(now + 1, load.shape[1] - 1)
        raised = np.where(tight, np.maximum(wanted, one_up), wanted)
        raised = np.where(broken, load.shape[1] - 1, raised)
        at = np.arange(len(mine))
        return arrays.clocks[raised], load[at, raised], (raised > wanted).astype(np.float64)


def _unknown(count: int) -> FloatArray:
    return np.full((count, 9), np.nan)


class _ModelArrays:
    """A capacity table as the chooser reads it. Axes: T, C, K = 9, L."""

    def __init__(self, table: CapacityTable) -> None:
        self.tps = np.asarray(table.tps)
        self.clocks = np.asarray(table.sm_clocks_mhz, dtype=np.int64)
        self.loads = np.asarray(table.loads)
        with np.errstate(divide="ignore"):
            # a class that an instance cannot serve within its SLO at a clock: any of it fills the instance
            self.per_request = np.where(table.max_rate > 0.0, 1.0 / table.max_rate, 1e6)
        self.power = table.power

    def tp_at(self, tp: IntArray) -> IntArray:
        """Positions of TPs."""
        return np.searchsorted(self.tps, tp)

    def clock_at(self, sm_clock_mhz: IntArray) -> IntArray:
        """Positions of clocks; one between two of the table counts as the lower."""
        return np.clip(np.searchsorted(self.clocks, sm_clock_mhz, side="right") - 1, 0, len(self.clocks) - 1)

    def power_at(self, tp: IntArray, request_class: IntArray, load: FloatArray) -> FloatArray:
        """(n, C) power at these loads of the class that loads it most; beyond full it stays as at full."""
        full = np.clip(load, 0.0, 1.0)
        upper = np.clip(np.searchsorted(self.loads, full, side="right"), 1, len(self.loads) - 1)
        lower = upper - 1
        part = (full - self.loads[lower]) / (self.loads[upper] - self.loads[lower])
        steps = np.arange(load.shape[1])[None, :]
        below = self.power[tp[:, None], steps, request_class, lower]
        above = self.power[tp[:, None], steps, request_class, upper]
        return np.asarray(below + part * (above - below))
