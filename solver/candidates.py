"""Candidates: what instances could be, from capacity tables: the numbers of a plan problem that never change.

For every pool, TP and SM clock the table says what one instance carries within the SLO and what it draws. Points no
plan would use are left out: exactly those that another point of the same group beats, or, where an instance may
divide its time, those above the lower convex hull of power over capacity. Pure.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from energy.capacity import CapacityTable
from pools.classes import REQUEST_CLASSES, RequestClass
from pools.view import PoolView
from solver.control import BoolArray, FloatArray, IntArray

CLASSES = len(REQUEST_CLASSES)
_DOMINATES: BoolArray = np.array([[p.dominates(k) for p in REQUEST_CLASSES] for k in REQUEST_CLASSES])
"""``[class, pool's class]``"""


@dataclass(frozen=True, slots=True)
class Knobs:
    """What a policy may turn. The paper's baselines differ in nothing else but these and how often they are called."""

    tps: tuple[int, ...] | None = None  # None: every TP of the table
    sm_clocks_mhz: tuple[int, ...] | None = None  # None: every clock of the table
    loads: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    """Shares of an instance's SLO capacity a plan may count on. Below the least, power hardly falls any more."""
    headroom: float = 0.1
    """Share of the SLO capacity plans leave free: the table's Poisson streams are smoother than real minutes."""
    dominating: bool = True
    """Whether a class may use pools kept for longer ones; if not, only its own or the nearest there is."""


@dataclass(frozen=True, slots=True, eq=False)
class Candidates:
    """Groups, points and shapes of all pools; axes as in ``solver.problem``."""

    models: tuple[str, ...]
    pools: tuple[PoolView, ...]
    demand_names: tuple[str, ...]  # (K,) model-major, nine classes each
    work: FloatArray  # (K, G)
    group_pool: IntArray  # (G,)
    group_shape: IntArray  # (G,)
    group_peak: FloatArray  # (G,)
    group_low_mhz: IntArray  # (G,) the lowest clock
    group_idle_w: FloatArray  # (G,) one instance without work, at the lowest clock
    point_group: IntArray  # (J,)
    point_capacity: FloatArray  # (J,)
    point_power_w: FloatArray  # (J,)
    point_clock_mhz: IntArray  # (J,)
    point_load: FloatArray  # (J,)
    shape_model: IntArray  # (H,)
    shape_tp: IntArray  # (H,)
    shape_idle_w: FloatArray  # (H,) one loaded and idle instance at the highest clock
    shape_full_w: FloatArray  # (H,) the same at work; what is in a re-shard is missed by that much

    def shape_of(self, model: int, tp: int) -> int:
        """The index of a shape. Raises ``ValueError`` if no candidate has it."""
        found = np.flatnonzero((self.shape_model == model) & (self.shape_tp == tp))
        if not len(found):
            raise ValueError(f"no candidate of model {self.models[model]} has TP{tp}")
        return int(found[0])


def candidates(
    tables: Mapping[str, CapacityTable], pools: Sequence[PoolView], knobs: Knobs, time_shared: bool = True
) -> Candidates:
    """Candidates of every pool from the capacity table of its model.

    ``time_shared``: an instance may divide its time between two points. Raises ``ValueError`` for a pool whose model
    has no table, and for knobs that leave a model nothing.
    """
    models = tuple(tables)
    blocks = []
    for m, model in enumerate(models):
        members = [p for p, pool in enumerate(pools) if pool.model == model]
        blocks.append(_model_block(tables[model], m, [pools[p] for p in members], members, knobs, time_shared))
    unknown = sorted({pool.model for pool in pools} - set(models))
    if unknown:
        raise ValueError(f"no capacity table for {', '.join(unknown)}: build one with `dynamollm profile capacity`")
    return _join(models, tuple(pools), blocks)


@dataclass(frozen=True, slots=True, eq=False)
class _Block:
    """The candidates of one model, its groups and shapes counted from 0."""

    work: FloatArray  # (9, g)
    group_pool: IntArray
    group_shape: IntArray
    group_peak: FloatArray
    group_low_mhz: IntArray
    group_idle_w: FloatArray
    point_group: IntArray
    point_capacity: FloatArray
    point_power_w: FloatArray
    point_clock_mhz: IntArray
    point_load: FloatArray
    shape_model: IntArray
    shape_tp: IntArray
    shape_idle_w: FloatArray
    shape_full_w: FloatArray


def _model_block(
    table: CapacityTable, model: int, pools: Sequence[PoolView], members: Sequence[int], knobs: Knobs, shared: bool
) -> _Block:
    t_axis = _axis(table.tps, knobs.tps, "TP", table)
    c_axis = _axis(table.sm_clocks_mhz, knobs.sm_clocks_mhz, "SM clock", table)
    tps = np.asarray(table.tps)[t_axis]
    clocks = np.asarray(table.sm_clocks_mhz)[c_axis]
    own = np.array([int(pool.request_class) for pool in pools], dtype=np.int64)
    highest = table.max_rate[np.ix_(t_axis, c_axis, np.arange(CLASSES))]  # (T, C, 9)
    loads = np.asarray(knobs.loads) * (1.0 - knobs.headroom)
    rate = highest[:, :, own, None] * loads  # (T, C, p, L)
    power_w = table.power_w(
        tps[:, None, None, None], clocks[None, :, None, None], own[None, None, :, None], rate
    )  # (T, C, p, L)
    pool_at, tp_at = np.divmod(np.arange(len(pools) * len(tps)), len(tps))
    peak = highest[tp_at, :, own[pool_at]].max(axis=1)
    exists = peak > 0.0
    pool_at, tp_at, peak = pool_at[exists], tp_at[exists], peak[exists]

    best_clock = _efficient_clock(highest, power_w, own)[tp_at, pool_at]
    work = _work(table, highest, t_axis, c_axis, own, pool_at, tp_at, best_clock, knobs)
    shape = (len(c_axis), len(loads))
    clock_at, load_at = np.divmod(np.arange(shape[0] * shape[1]), shape[1])
    point_group, points = [], []
    for g, (p, t) in enumerate(zip(pool_at, tp_at, strict=True)):
        kept = _useful(rate[t, :, p, :].ravel(), power_w[t, :, p, :].ravel(), shared)
        point_group.append(np.full(len(kept), g, dtype=np.int64))
        points.append(kept)
    group = np.concatenate(point_group) if points else np.zeros(0, dtype=np.int64)
    kept = np.concatenate(points) if points else np.zeros(0, dtype=np.int64)
    at = (tp_at[group], clock_at[kept], pool_at[group], load_at[kept])
    return _Block(
        work=work,
        group_pool=np.asarray(members, dtype=np.int64)[pool_at],
        group_shape=tp_at,
        group_peak=peak,
        group_low_mhz=np.full(len(pool_at), clocks[0], dtype=np.int64),
        group_idle_w=np.asarray(table.power_w(tps[tp_at], clocks[0], 0, 0.0)),
        point_group=group,
        point_capacity=rate[at],
        point_power_w=power_w[at],
        point_clock_mhz=clocks[clock_at[kept]],
        point_load=loads[load_at[kept]],
        shape_model=np.full(len(tps), model, dtype=np.int64),
        shape_tp=tps.astype(np.int64),
        shape_idle_w=np.asarray(table.power_w(tps, clocks[-1], 0, 0.0)),
        shape_full_w=table.power[t_axis, c_axis[-1], :, -1].max(axis=1),
    )


def _axis(axis: tuple[int, ...], wanted: tuple[int, ...] | None, what: str, table: CapacityTable) -> IntArray:
    """Positions of the wanted values on an axis."""
    if wanted is None:
        return np.arange(len(axis), dtype=np.int64)
    missing = [value for value in wanted if value not in axis]
    if missing or not wanted:
        raise ValueError(f"capacity table of {table.profile} holds for {what} {axis}, not {missing or wanted}")
    return np.array([axis.index(value) for value in sorted(wanted)], dtype=np.int64)


def _efficient_clock(highest: FloatArray, power_w: FloatArray, own: IntArray) -> IntArray:
    """(T, p) position of the clock with the least energy per request at full load."""
    with np.errstate(divide="ignore", invalid="ignore"):
        energy_j = np.where(highest[:, :, own] > 0.0, power_w[..., -1] / highest[:, :, own], np.inf)
    return np.asarray(np.argmin(energy_j, axis=1), dtype=np.int64)


def _work(
    table: CapacityTable,
    highest: FloatArray,
    t_axis: IntArray,
    c_axis: IntArray,
    own: IntArray,
    pool_at: IntArray,
    tp_at: IntArray,
    best_clock: IntArray,
    knobs: Knobs,
) -> FloatArray:
    """(9, g) requests of the pool's own class that one request of each class is worth; inf where it may not go.

    The ratio of highest rates at the group's most efficient clock: where it runs most. A class may share an instance
    with longer inputs only if it still meets its TTFT after waiting for the prefill of one of their longest (P99): at
    any moment an instance at work is likely to be in one. A class that would then have no pool goes to the nearest.
    """
    host = own[pool_at]
    rates = highest[tp_at, best_clock]  # (g, 9)
    light = min(1, len(table.loads) - 1)
    at = (t_axis[tp_at], c_axis[best_clock], slice(None), light)
    slo_s = np.array([c.ttft_slo_s for c in table.classes])
    each = np.arange(len(host))
    alike = np.arange(CLASSES)[None, :] // 3 == host[:, None] // 3  # classes with the host's input size
    prefill_s = np.where(alike, table.ttft_p99[at], 0.0).max(axis=1)
    in_time = table.ttft_p50[at] + prefill_s[:, None] <= slo_s
    nearest = _nearest(own)[:, pool_at].T
    allowed = _DOMINATES[:, host].T & (in_time | alike) & (rates > 0.0)
    if not knobs.dominating:
        allowed &= nearest
    allowed |= ~allowed.any(axis=0) & nearest & (rates > 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(allowed, rates[each, host][:, None] / rates, np.inf).T


def _nearest(own: IntArray) -> BoolArray:
    """(9, p) the pools nearest to each class: fewest steps up in both sizes."""
    steps = np.array(
        [
            [
                (h.input_size - k.input_size) + (h.output_size - k.output_size) if h.dominates(k) else CLASSES
                for h in (RequestClass(int(c)) for c in own)
            ]
            for k in REQUEST_CLASSES
        ]
    )
    return np.asarray(steps == steps.min(axis=1, keepdims=True))


def _useful(capacity: FloatArray, power_w: FloatArray, shared: bool) -> IntArray:
    """Points worth having, by ascending capacity: none is beaten by another, nor by two others taking turns."""
    ids = np.flatnonzero(capacity > 0.0)
    order = ids[np.lexsort((-capacity[ids], power_w[ids]))]
    best = np.maximum.accumulate(capacity[order])
    front = order[np.concatenate([[True], capacity[order][1:] > best[:-1]])] if len(order) else order
    if not shared:
        return np.asarray(front, dtype=np.int64)
    hull: list[int] = []
    for i in front:
        while len(hull) >= 2 and _above(capacity, power_w, hull[-2], hull[-1], int(i)):
            hull.pop()
        hull.append(int(i))
    return np.array(hull, dtype=np.int64)


def _above(capacity: FloatArray, power_w: FloatArray, a: int, b: int, c: int) -> bool:
    """Whether point b lies on or above the line from a to c."""
    return bool(
        (power_w[b] - power_w[a]) * (capacity[c] - capacity[a])
        >= (power_w[c] - power_w[a]) * (capacity[b] - capacity[a])
    )


def _join(models: tuple[str, ...], pools: tuple[PoolView, ...], blocks: Sequence[_Block]) -> Candidates:
    """All models' candidates in one set of axes; a demand has no work in a group of another model."""
    groups = np.cumsum([0, *(len(b.group_pool) for b in blocks)])
    shapes = np.cumsum([0, *(len(b.shape_tp) for b in blocks)])
    work = np.full((CLASSES * len(models), int(groups[-1])), np.inf)
    for m, block in enumerate(blocks):
        work[CLASSES * m : CLASSES * (m + 1), groups[m] : groups[m + 1]] = block.work

    def of(name: str) -> npt.NDArray[np.generic]:
        return np.concatenate([getattr(b, name) for b in blocks])

    def floats(name: str) -> FloatArray:
        return of(name).astype(np.float64)

    def ints(name: str, offsets: IntArray | None = None) -> IntArray:
        values = of(name).astype(np.int64)
        if offsets is None:
            return values
        return values + np.repeat(offsets[:-1], [len(getattr(b, name)) for b in blocks])

    return Candidates(
        models=models,
        pools=pools,
        demand_names=tuple(
            k.name if len(models) == 1 else f"{model}/{k.name}" for model in models for k in RequestClass
        ),
        work=work,
        group_pool=ints("group_pool"),
        group_shape=ints("group_shape", shapes),
        group_peak=floats("group_peak"),
        group_low_mhz=ints("group_low_mhz"),
        group_idle_w=floats("group_idle_w"),
        point_group=ints("point_group", groups),
        point_capacity=floats("point_capacity"),
        point_power_w=floats("point_power_w"),
        point_clock_mhz=ints("point_clock_mhz"),
        point_load=floats("point_load"),
        shape_model=ints("shape_model"),
        shape_tp=ints("shape_tp"),
        shape_idle_w=floats("shape_idle_w"),
        shape_full_w=floats("shape_full_w"),
    )
