"""solve_greedy(problem) -> PlanSolution: the fallback where the MILP gives none; one pass, no search. Pure.

Demands, the largest first, each go whole to the group that needs the least extra power for them: spare capacity of
instances already planned costs next to nothing, which is how small classes end up in larger pools (fragmentation).
"""

import numpy as np

from solver.control import BoolArray, FloatArray
from solver.milp import SolveLimits, evaluate
from solver.problem import PlanProblem, PlanSolution, SolveStatus


def solve_greedy(problem: PlanProblem, limits: SolveLimits | None = None) -> PlanSolution:
    """A plan that holds, with no bound on how far it is from the best; INFEASIBLE where it finds none."""
    del limits  # one pass has nothing to limit
    best_w, best_j = _best_points(problem)
    for price in (best_w, problem.group_tp.astype(np.float64)):
        plan = _fill(problem, price, best_w * best_j)
        if plan is None:
            break
        ready, share, load = plan
        points = _place_points(problem, ready, load)
        solution = evaluate(problem, ready, np.zeros_like(ready), points, share)
        if solution.found:
            return solution
    return PlanSolution(SolveStatus.INFEASIBLE, reason="greedy: no plan by least power nor by fewest GPUs")


def _best_points(problem: PlanProblem) -> tuple[FloatArray, FloatArray]:
    """(G,) power of the point with the least energy per request, and its inverse capacity; inf for a group of none."""
    groups = len(problem.group_pool)
    energy = problem.point_power_w / problem.point_capacity
    order = np.lexsort((energy, problem.point_group))
    first = order[np.unique(problem.point_group[order], return_index=True)[1]]
    power_w, inverse = np.full(groups, np.inf), np.full(groups, np.inf)
    power_w[problem.point_group[first]] = problem.point_power_w[first]
    inverse[problem.point_group[first]] = 1.0 / problem.point_capacity[first]
    return power_w, inverse


def _fill(
    problem: PlanProblem, price: FloatArray, per_request: FloatArray
) -> tuple[FloatArray, FloatArray, FloatArray] | None:
    """READY instances (G,), share (K, G) and load (G,); None where a demand has no group."""
    ready = np.maximum(problem.room.pinned.astype(np.float64), _least_ready(problem, price))
    load, standby = np.zeros(len(ready)), np.zeros(len(ready))
    share = np.zeros_like(problem.work)
    highest = np.zeros(len(ready))
    np.maximum.at(highest, problem.point_group, problem.point_capacity)
    usable: BoolArray = np.isfinite(problem.work) & (highest > 0.0) & (problem.group_peak > 0.0)
    size = np.min(np.where(usable, problem.work * per_request, np.inf), axis=1) * problem.standby_rps
    for k in np.argsort(-size, kind="stable"):
        groups = np.flatnonzero(usable[k])
        if not len(groups):
            return None
        more_load = load[groups] + problem.rate_rps[k] * problem.work[k, groups]
        more_standby = standby[groups] + problem.standby_rps[k] * problem.work[k, groups]
        needed = np.maximum(
            np.ceil(more_load / highest[groups] - 1e-9), np.ceil(more_standby / problem.group_peak[groups] - 1e-9)
        )
        extra = np.maximum(needed - ready[groups], 0.0)
        cost = extra * price[groups] + 1e-6 * problem.work[k, groups] * price[groups]
        best = int(np.argmin(cost))
        g = groups[best]
        share[k, g] = 1.0
        load[g], standby[g], ready[g] = more_load[best], more_standby[best], max(ready[g], needed[best])
    return ready, share, load


def _least_ready(problem: PlanProblem, price: FloatArray) -> FloatArray:
    """(G,) instances that keep every pool at its least number, in its cheapest group."""
    ready = np.zeros(len(problem.group_pool))
    for pool in np.flatnonzero(problem.min_ready > 0):
        groups = np.flatnonzero(problem.group_pool == pool)
        ready[groups[np.argmin(price[groups])]] = problem.min_ready[pool]
    return ready


def _place_points(problem: PlanProblem, ready: FloatArray, load: FloatArray) -> FloatArray:
    """(J,) all instances of a group at the cheapest point that carries an equal part of its load."""
    part = np.divide(load, ready, out=np.zeros_like(load), where=ready > 0)
    enough = problem.point_capacity >= part[problem.point_group] * (1.0 - 1e-9)
    power_w = np.where(enough, problem.point_power_w, np.inf)
    order = np.lexsort((power_w, problem.point_group))
    first = order[np.unique(problem.point_group[order], return_index=True)[1]]
    points = np.zeros(len(power_w))
    points[first] = ready[problem.point_group[first]]
    return points
