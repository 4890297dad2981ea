"""Planner: from a forecast and the cluster as it is to a Plan, or to the reason why the last one is kept. Pure.

It makes the plan problem, solves it, and falls back to greedy. Nothing changes unless it is worth more than it costs:
what starting, stopping and re-sharding cost over the time a change lasts is part of the problem (``ChangeCosts``), so
the least objective is itself the hysteresis.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from pools.instances import InstanceState
from solver.candidates import CLASSES, Candidates
from solver.control import STATE_CODE, ClusterState, FloatArray, IntArray, Plan, PlanGroup
from solver.forecast import Forecast
from solver.greedy import solve_greedy
from solver.milp import SolveLimits, solve
from solver.problem import NodeRoom, PlanProblem, PlanSolution, Shapes, SolveStatus

READY = STATE_CODE[InstanceState.READY]
STARTING = STATE_CODE[InstanceState.STARTING]
PARKED = STATE_CODE[InstanceState.PARKED]
_NOTHING = 1.0 - 1e-6  # share left out at which a plan serves nothing of a demand


@dataclass(frozen=True, slots=True)
class ChangeCosts:
    """What changing takes, as measured or configured; the defaults are the simulator's, see simulator.delays."""

    start_s: float = 60.0  # an engine on a node that is on
    node_on_s: float = 360.0  # a node, before its engines can start
    drain_s: float = 20.0
    reshard_s: float = 60.0  # 0.1 where weights move in place over NVLink
    wake_s: float = 5.0
    parked_w_per_gpu: float = float("inf")  # inf: engines cannot sleep
    dwell_s: float = 600.0  # how long a change is expected to last: over this time it must pay

    def with_start(self, start_s: float) -> "ChangeCosts":
        """The same where a start takes this long; a re-shard that is a start takes as long."""
        restarts = self.reshard_s == self.start_s
        return replace(self, start_s=start_s, reshard_s=start_s if restarts else self.reshard_s)


@dataclass(frozen=True, slots=True)
class ClusterCosts:
    """What nodes draw beside their instances."""

    free_gpu_w: float = 0.0  # a GPU without an engine in a node that is on
    node_w: float = 0.0
    empty_nodes_off: bool = True
    power_budget_w: float = float("inf")


@dataclass(frozen=True, slots=True)
class PlanLimits:
    """How hard to solve, and what demand is never forgotten."""

    solve: SolveLimits = field(default_factory=SolveLimits)
    reserve_w_per_gpu: float = 400.0  # price of reserve that is not READY: what a GPU draws at full work and top clock
    unserved_w_per_rps: float = 1e5  # price of demand left out, where there is more than the cluster can serve
    least_rps: float = 0.01  # every class is expected at least this often: no class is ever without a pool


@dataclass(frozen=True, slots=True, eq=False)
class Restriction:
    """What a level above has decided for this plan."""

    pool_gpus: tuple[FloatArray, FloatArray] | None = None  # (P,) least, (P,) most
    allowed: FloatArray | None = None  # (K, P) 0 where a demand may not use a pool


@dataclass(frozen=True, slots=True, eq=False)
class Planned:
    """The outcome of one planning."""

    solution: PlanSolution
    why: str
    served: float = 1.0  # share of the reserve that the plan carries


class Planner:
    """Makes plans for one cluster."""

    def __init__(
        self,
        candidates: Candidates,
        changes: ChangeCosts | None = None,
        cluster_costs: ClusterCosts | None = None,
        limits: PlanLimits | None = None,
        solver: Callable[[PlanProblem, SolveLimits | None], PlanSolution] = solve,
    ) -> None:
        self.candidates = candidates
        self.changes = changes or ChangeCosts()
        self._costs = cluster_costs or ClusterCosts()
        self._limits = limits or PlanLimits()
        self._solver = solver
        models = list(candidates.models)
        self._pool_model: IntArray = np.array([models.index(pool.model) for pool in candidates.pools], dtype=np.int64)
        self._edges = _edges(candidates)

    def problem(
        self,
        cluster: ClusterState,
        forecast: Forecast,
        standby_rps: FloatArray,
        restriction: Restriction,
        capacity_factor: FloatArray,
    ) -> PlanProblem:
        """The plan problem of this moment; ``capacity_factor`` (P,) corrects the table by what pools have shown."""
        c, costs = self.candidates, self._costs
        rate = np.maximum(forecast.mean_rps, self._limits.least_rps)
        reserve = np.maximum(forecast.reserve_rps, rate)
        work = c.work / capacity_factor[c.group_pool]
        if restriction.allowed is not None:
            work = np.where(restriction.allowed[:, c.group_pool] > 0.0, work, np.inf)
        usable = np.where(cluster.node_usable, cluster.node_gpus, 0)
        on = np.zeros(len(usable), dtype=np.bool_)
        on[cluster.instances.node] = True
        boot_w = float(c.shape_idle_w[0] / c.shape_tp[0] * np.mean(cluster.node_gpus))
        room = NodeRoom(
            gpus=usable,
            free=usable,
            pinned=np.zeros(len(c.group_pool), dtype=np.int64),
            free_gpu_w=costs.free_gpu_w,
            node_w=costs.node_w,
            empty_nodes_off=costs.empty_nodes_off,
            on=int(np.count_nonzero(on & cluster.node_usable)),
            switch_w=boot_w * self.changes.node_on_s / self.changes.dwell_s,
        )
        return PlanProblem(
            demand_names=c.demand_names,
            pool_names=tuple(pool.name for pool in c.pools),
            rate_rps=rate,
            reserve_rps=reserve,
            standby_rps=np.maximum(standby_rps, reserve),
            work=work,
            group_pool=c.group_pool,
            group_shape=c.group_shape,
            group_peak=c.group_peak,
            point_group=c.point_group,
            point_capacity=c.point_capacity,
            point_power_w=c.point_power_w,
            group_idle_w=c.group_idle_w,
            shapes=self._shapes(cluster),
            room=room,
            min_ready=np.zeros(len(c.pools)),
            pool_gpus=restriction.pool_gpus,
            power_budget_w=costs.power_budget_w,
            reserve_w_per_gpu=self._limits.reserve_w_per_gpu,
        )

    def plan(self, problem: PlanProblem) -> Planned:
        """Solve; where that fails, serve what can be served; where that fails, greedily."""
        limits = self._limits.solve
        solution, why = self._solver(problem, limits), ""
        if solution.status is SolveStatus.INFEASIBLE:
            why = f"the cluster cannot carry the forecast ({solution.reason}): the most that can be is served"
            solution = self._solver(replace(problem, unserved_w_per_rps=self._limits.unserved_w_per_rps), limits)
        if not solution.found:
            why = f"greedy, because {solution.reason}"
            solution = solve_greedy(problem, limits)
        if not solution.found or np.all(solution.unserved > _NOTHING):
            return Planned(PlanSolution(SolveStatus.NONE), f"the last plan stays: {why}; {solution.reason}", 0.0)
        left_out = float(solution.unserved @ problem.reserve_rps)
        served = 1.0 - left_out / max(float(problem.reserve_rps.sum()), 1e-9)
        return Planned(solution, why or self._changes_in_words(problem, solution), served)

    def as_plan(self, planned: Planned, epoch: int, version: int, now_s: float, horizon_s: float) -> Plan:
        """The plan in the words controllers and drivers use."""
        c, s = self.candidates, planned.solution
        pools = tuple(pool.name for pool in c.pools)
        share = np.zeros((len(s.share), len(pools)))
        np.add.at(share.T, c.group_pool, s.share.T)
        total = share.sum(axis=1, keepdims=True)
        share = np.divide(share, total, out=np.zeros_like(share), where=total > 0)
        groups = [group for g in np.flatnonzero(s.ready > 0) for group in self._groups(int(g), s)]
        for g in np.flatnonzero(s.parked > 0):
            groups.append(PlanGroup(pools[c.group_pool[g]], self._tp(int(g)), 0, 0.0, int(s.parked[g]), parked=True))
        return Plan(epoch, version, now_s, horizon_s, pools, tuple(groups), share, s.power_w, s.gap)

    def _changes_in_words(self, problem: PlanProblem, s: PlanSolution) -> str:
        """What becomes more and what less."""
        shapes = problem.shapes
        planned = np.bincount(problem.group_shape, s.ready, len(shapes.tp))
        change = np.rint(planned - shapes.ready).astype(int)
        if not np.any(change):
            return "the instances there are stay: no change is worth its cost"
        words = [f"{n:+d} TP{tp}" for n, tp in zip(change, shapes.tp, strict=True) if n]
        return f"{', '.join(words)}: {s.power_w:.0f} W, changes cost {s.objective_w - s.power_w:.0f} W"

    def _shapes(self, cluster: ClusterState) -> Shapes:
        """What there is now, by shape, and what changing it costs in watts over the time it must pay in."""
        c, change, views = self.candidates, self.changes, cluster.instances
        model = self._pool_model[views.pool]
        ready, parked = np.zeros(len(c.shape_tp)), np.zeros(len(c.shape_tp))
        usable = cluster.node_usable[views.node]
        for h in range(len(c.shape_tp)):
            mine = (model == c.shape_model[h]) & (views.tp == c.shape_tp[h]) & usable
            ready[h] = np.count_nonzero(mine & np.isin(views.state, (READY, STARTING)))
            parked[h] = np.count_nonzero(mine & (views.state == PARKED))
        start, end = self._edges
        dwell_s = change.dwell_s
        per_second = c.shape_idle_w / dwell_s
        return Shapes(
            tp=c.shape_tp,
            ready=ready,
            parked=parked,
            start_w=per_second * change.start_s,
            stop_w=per_second * (change.drain_s + change.start_s),  # what is stopped is started again one day
            wake_w=per_second * change.wake_s,
            parked_w=np.asarray(change.parked_w_per_gpu * c.shape_tp, dtype=np.float64),
            reshard_from=start,
            reshard_to=end,
            reshard_w_per_gpu=c.shape_full_w[start] / c.shape_tp[start] * (change.reshard_s + change.drain_s) / dwell_s,
        )

    def _groups(self, g: int, s: PlanSolution) -> list[PlanGroup]:
        """Instances of a group by the point each begins at: fractions are rounded towards more capacity."""
        c, name = self.candidates, self.candidates.pools[self.candidates.group_pool[g]].name
        points = np.flatnonzero((c.point_group == g) & (s.points > 1e-6))
        points = points[np.argsort(-c.point_capacity[points])]
        until = np.cumsum(s.points[points])
        working = round(float(until[-1])) if len(points) else 0
        at = points[np.minimum(np.searchsorted(until, np.arange(working) + 1e-6, side="right"), len(points) - 1)]
        kinds, counts = np.unique(at, return_counts=True)
        groups = [
            PlanGroup(name, self._tp(g), int(c.point_clock_mhz[j]), float(c.point_load[j]), int(n))
            for j, n in zip(kinds, counts, strict=True)
        ]
        idle = int(s.ready[g]) - working
        if idle > 0:
            groups.append(PlanGroup(name, self._tp(g), int(c.group_low_mhz[g]), 0.0, idle))
        return groups

    def _tp(self, g: int) -> int:
        return int(self.candidates.shape_tp[self.candidates.group_shape[g]])


def _edges(candidates: Candidates) -> tuple[IntArray, IntArray]:
    """Shapes of one model that can become each other."""
    same = candidates.shape_model[:, None] == candidates.shape_model[None, :]
    np.fill_diagonal(same, val=False)
    start, end = np.nonzero(same)
    return start.astype(np.int64), end.astype(np.int64)


def demand_count(candidates: Candidates) -> int:
    """K, nine classes of every model."""
    return CLASSES * len(candidates.models)
