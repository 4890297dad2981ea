"""The joint plan as a mixed-integer linear program. Pure; ``solver.problem`` tells the axes, ``solver.milp`` solves it.

Columns: instances at each point; READY and PARKED instances of each group; the share of each demand that each group
takes; changes of each shape (start, stop, wake, park, drop, re-shard); nodes that are on.

Node rows. TPs that divide one another pack greedily: instances fit the nodes if and only if, for every TP ``s``, those
of TP >= s, counted in units of s, are no more than ``sum_n floor(free_n / s)``. So one row for each TP replaces a
placement variable for each node, exactly.

Source: DynamoLLM section IV gives the objective and the load, GPU and SLO rows; joint pools, nodes, transitions,
standby and power rows are ours.
"""

from dataclasses import dataclass

import numpy as np

from solver.control import BoolArray, FloatArray, IntArray
from solver.problem import PlanProblem
from solver.rows import Block, LinearProgram, ProgramBuilder


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """Where the columns of a problem stand."""

    points: Block  # (J,)
    idle: Block  # (G,) READY and given nothing
    ready: Block  # (G,)
    parked: Block  # one for each of ``parkable``
    share: Block  # one for each finite ``work``
    short: Block  # (G,) capacity missing for the reserve
    unserved: Block  # (K,)
    nodes_on: Block  # empty nodes switched on, by node size
    share_demand: IntArray
    share_group: IntArray
    parkable: IntArray  # groups whose shape can be parked


@dataclass(frozen=True, slots=True, eq=False)
class Formulation:
    """The program, where its columns stand, and the power no decision changes."""

    program: LinearProgram
    layout: Layout
    fixed_w: float


def formulate(problem: PlanProblem, cuts: bool = True) -> Formulation:
    """The program of a problem; ``cuts`` adds rows that whole numbers imply, and that its relaxation does without."""
    builder = ProgramBuilder()
    layout = _columns(builder, problem)
    _demand_rows(builder, problem, layout)
    _capacity_rows(builder, problem, layout)
    if cuts:
        _rounding_rows(builder, problem, layout)
    _shape_rows(builder, problem, layout)
    _node_rows(builder, problem, layout)
    _limit_rows(builder, problem, layout)
    return Formulation(builder.build(), layout, _fixed_w(problem))


def _used_gpu_credit_w(problem: PlanProblem) -> FloatArray:
    """(H,) power that GPUs of one instance would draw without it, while their node is on."""
    return np.asarray(problem.room.free_gpu_w * problem.shapes.tp, dtype=np.float64)


def _always_on(problem: PlanProblem) -> BoolArray:
    """(N,) nodes that are on whatever is decided; where a node draws nothing of its own, that is no decision."""
    room = problem.room
    if room.draws and room.empty_nodes_off:
        return room.free < room.gpus
    return np.ones(len(room.gpus), dtype=np.bool_)


def _switchable(problem: PlanProblem) -> tuple[IntArray, IntArray]:
    """Sizes of the nodes that may be off, and how many there are of each."""
    return np.unique(problem.room.gpus[~_always_on(problem)], return_counts=True)


def _fixed_w(problem: PlanProblem) -> float:
    """Power of the nodes that are always on, as if the GPUs open to the plan were free."""
    room = problem.room
    free = room.free[_always_on(problem)]
    return float(room.node_w * len(free) + room.free_gpu_w * np.sum(free))


def _columns(builder: ProgramBuilder, problem: PlanProblem) -> Layout:
    shapes, groups = problem.shapes, len(problem.group_pool)
    credit_w = _used_gpu_credit_w(problem)[problem.group_shape]
    points = builder.columns(
        len(problem.point_group),
        problem.point_power_w - credit_w[problem.point_group],
        whole=problem.integral_points,
    )
    idle = builder.columns(groups, problem.group_idle_w - credit_w, whole=problem.integral_points)
    # whole points make whole groups; without them the groups are what is whole
    ready = builder.columns(groups, lower=problem.room.pinned, whole=not problem.integral_points)
    parkable = np.flatnonzero(np.isfinite(shapes.parked_w[problem.group_shape]))
    parked_w = shapes.parked_w[problem.group_shape[parkable]] - credit_w[parkable]
    parked = builder.columns(len(parkable), parked_w, whole=True)
    demand, group = np.nonzero(np.isfinite(problem.work))
    share = builder.columns(len(demand), upper=1.0)
    priced = np.isfinite(problem.reserve_w_per_gpu)
    short_w = problem.reserve_w_per_gpu * problem.group_tp / problem.group_peak if priced else 0.0
    short = builder.columns(groups, short_w, upper=np.inf if priced else 0.0)
    may_leave = np.isfinite(problem.unserved_w_per_rps)
    price_w = problem.unserved_w_per_rps * problem.reserve_rps if may_leave else 0.0
    unserved = builder.columns(len(problem.rate_rps), price_w, upper=float(may_leave))
    kinds, nodes = _switchable(problem)
    nodes_on = builder.columns(
        len(kinds), problem.room.node_w + problem.room.free_gpu_w * kinds, upper=nodes, whole=True
    )
    return Layout(points, idle, ready, parked, share, short, unserved, nodes_on, demand, group, parkable)


def _demand_rows(builder: ProgramBuilder, problem: PlanProblem, layout: Layout) -> None:
    """Each demand is served, by groups that may."""
    rows = builder.rows("demand", len(problem.rate_rps), 1.0, 1.0)
    builder.put(rows.start + layout.share_demand, layout.share.index, 1.0)
    builder.put(rows.index, layout.unserved.index, 1.0)


def _capacity_rows(builder: ProgramBuilder, problem: PlanProblem, layout: Layout) -> None:
    """What a group takes fits its points; the reserve fits its highest clock; standby fits that of parked ones too."""
    groups = len(problem.group_pool)
    work = problem.work[layout.share_demand, layout.share_group]
    at = layout.share_group
    link = builder.rows("points", groups, 0.0, 0.0)
    builder.put(link.start + problem.point_group, layout.points.index, 1.0)
    builder.put(link.index, layout.idle.index, 1.0)
    builder.put(link.index, layout.ready.index, -1.0)

    load = builder.rows("load", groups, upper=0.0)
    builder.put(load.start + at, layout.share.index, problem.rate_rps[layout.share_demand] * work)
    builder.put(load.start + problem.point_group, layout.points.index, -problem.point_capacity)

    reserve = builder.rows("reserve", groups, upper=0.0)
    builder.put(reserve.start + at, layout.share.index, problem.reserve_rps[layout.share_demand] * work)
    builder.put(reserve.index, layout.ready.index, -problem.group_peak)
    builder.put(reserve.index, layout.short.index, -1.0)

    if np.any(problem.standby_rps > problem.reserve_rps):
        standby = builder.rows("standby", groups, upper=0.0)
        builder.put(standby.start + at, layout.share.index, problem.standby_rps[layout.share_demand] * work)
        builder.put(standby.index, layout.ready.index, -problem.group_peak)
        builder.put(standby.start + layout.parkable, layout.parked.index, -problem.group_peak[layout.parkable])


def _rounding_rows(builder: ProgramBuilder, problem: PlanProblem, layout: Layout) -> None:
    """What whole numbers imply of the rows of load or reserve: cuts every plan meets and fractions do not.

    A group that takes all of a demand worth d instances holds ceil(d) of them; let ``f = d - floor(d)``. Rounding
    ``n >= d s`` with s in [0, 1] (mixed-integer rounding) gives ``f n - d s >= f ceil(d) - d``; for d < 1: ``n >= s``.
    """
    at, group = layout.share_demand, layout.share_group
    if np.isfinite(problem.reserve_w_per_gpu):
        highest = np.zeros(len(problem.group_pool))
        np.maximum.at(highest, problem.point_group, problem.point_capacity)
        demand, capacity = problem.rate_rps, highest
    else:
        demand, capacity = problem.reserve_rps, problem.group_peak
    need = demand[at] * problem.work[at, group] / capacity[group]
    part = need - np.floor(need)
    cuts = np.flatnonzero((part > 1e-3) & (part < 1.0 - 1e-3))
    need, part = need[cuts], part[cuts]
    rows = builder.rows("rounding", len(cuts), lower=part * np.ceil(need) - need)
    builder.put(rows.index, layout.ready.start + group[cuts], part)
    builder.put(rows.index, layout.share.start + cuts, -need)


def _shape_rows(builder: ProgramBuilder, problem: PlanProblem, layout: Layout) -> None:
    """Instances of a shape are those there now, plus what is started, woken, re-sharded, less what goes."""
    shapes = problem.shapes
    size = len(shapes.tp)
    start = builder.columns(size, shapes.start_w)
    stop = builder.columns(size, shapes.stop_w)
    rows = builder.rows("shape", size, shapes.ready * shapes.tp, shapes.ready * shapes.tp)
    per_group = shapes.tp[problem.group_shape]
    builder.put(rows.start + problem.group_shape, layout.ready.index, per_group)
    builder.put(rows.index, start.index, -shapes.tp)
    builder.put(rows.index, stop.index, shapes.tp)
    reshard = builder.columns(len(shapes.reshard_from), shapes.reshard_w_per_gpu)
    builder.put(rows.start + shapes.reshard_to, reshard.index, -1.0)
    builder.put(rows.start + shapes.reshard_from, reshard.index, 1.0)
    if not len(layout.parkable) and not np.any(shapes.parked):
        return
    wake = builder.columns(size, shapes.wake_w)
    park = builder.columns(size, shapes.stop_w)
    drop = builder.columns(size)
    builder.put(rows.index, wake.index, -shapes.tp)
    builder.put(rows.index, park.index, shapes.tp)
    asleep = builder.rows("parked", size, shapes.parked, shapes.parked)
    builder.put(asleep.start + problem.group_shape[layout.parkable], layout.parked.index, 1.0)
    builder.put(asleep.index, wake.index, 1.0)
    builder.put(asleep.index, park.index, -1.0)
    builder.put(asleep.index, drop.index, 1.0)


def _node_rows(builder: ProgramBuilder, problem: PlanProblem, layout: Layout) -> None:
    """Instances lie in nodes, each in one, in nodes that are on."""
    room = problem.room
    sizes = np.unique(problem.shapes.tp)
    on = _always_on(problem)
    kinds, _ = _switchable(problem)
    fits = np.sum(room.free[on][None, :] // sizes[:, None], axis=1)
    units = np.where(problem.group_tp >= sizes[:, None], problem.group_tp // sizes[:, None], 0)
    rows = builder.rows("nodes", len(sizes), upper=fits + units @ room.pinned)
    at, group = np.nonzero(units)
    builder.put(rows.start + at, layout.ready.start + group, units[at, group])
    at, group = np.nonzero(units[:, layout.parkable])
    builder.put(rows.start + at, layout.parked.start + group, units[at, layout.parkable[group]])
    at, kind = np.nonzero(kinds // sizes[:, None])
    builder.put(rows.start + at, layout.nodes_on.start + kind, -(kinds[kind] // sizes[at]))
    if room.switch_w > 0.0 and len(kinds):
        switched = builder.columns(2, room.switch_w)  # on, off
        row = builder.rows("switched", 1, room.on, room.on)
        builder.put(np.full(len(kinds), row.start), layout.nodes_on.index, 1.0)
        builder.put(np.full(2, row.start), switched.index, np.array([-1.0, 1.0]))


def _limit_rows(builder: ProgramBuilder, problem: PlanProblem, layout: Layout) -> None:
    """A pool keeps its least number of instances and its GPUs; the cluster its power budget."""
    pools = np.flatnonzero(problem.min_ready > 0)
    if len(pools):
        rows = builder.rows("min_ready", len(problem.pool_names), problem.min_ready)
        builder.put(rows.start + problem.group_pool, layout.ready.index, 1.0)
    if problem.pool_gpus is not None:
        least, most = problem.pool_gpus
        rows = builder.rows("pool_gpus", len(problem.pool_names), least, most)
        for block, groups in ((layout.ready, slice(None)), (layout.parked, layout.parkable)):
            builder.put(rows.start + problem.group_pool[groups], block.index, problem.group_tp[groups])
    if np.isfinite(problem.power_budget_w):
        row = builder.rows("power", 1, upper=problem.power_budget_w - _fixed_w(problem))
        for block in (layout.points, layout.idle, layout.parked, layout.nodes_on):
            builder.put(np.full(block.size, row.start), block.index, builder.cost_of(block))
