"""solve(problem) -> PlanSolution: the joint plan by HiGHS. Pure; a node limit, never a clock.

``lower_bound`` is the same program without whole numbers; ``evaluate`` prices a plan somebody else made.
"""

from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult, milp

from solver.control import FloatArray
from solver.decomposition import parts_of, solve_in_parts
from solver.formulation import Formulation, formulate
from solver.infeasible import explain
from solver.problem import PlanProblem, PlanSolution, Shapes, SolveStatus
from solver.rows import LinearProgram

_INFEASIBLE = 2  # scipy.optimize.milp's status
_SMALL = 400  # columns; up to here presolving takes longer than it saves (a third at P99, benchmarks/solver_scaling.py)


@dataclass(frozen=True, slots=True)
class SolveLimits:
    """When to stop. A limit on time would make a plan depend on how busy the machine is."""

    gap: float = 1e-3
    branch_nodes: int = 2000


def solve(problem: PlanProblem, limits: SolveLimits | None = None) -> PlanSolution:
    """The least-energy plan within the gap. Never raises for what the problem says: the status is a value."""
    limits = limits or SolveLimits()
    formulation = formulate(problem)
    program = formulation.program
    parts = parts_of(program)
    result = None
    if parts.count > 1:
        result = solve_in_parts(program, parts, limits.gap, limits.branch_nodes)
    if result is None or result.status != 0:
        result = _better(result, run(program, limits))
    if result.x is not None:
        return read(problem, formulation, result)
    if result.status == _INFEASIBLE:
        return PlanSolution(SolveStatus.INFEASIBLE, reason=explain(problem))
    return PlanSolution(SolveStatus.NONE, reason=f"no plan within {limits.branch_nodes} branch nodes")


def lower_bound(problem: PlanProblem) -> PlanSolution:
    """Least power of a clairvoyant that pays for no change, keeps no reserve and may use fractions of an instance.

    A bound for every plan that serves ``rate_rps`` within the SLO. ``ready`` and ``points`` are fractions here.
    """
    free = replace(
        problem,
        reserve_rps=problem.rate_rps,
        standby_rps=problem.rate_rps,
        group_peak=np.maximum(problem.group_peak, _highest_capacity(problem)),
        shapes=Shapes.free(problem.shapes.tp),
        min_ready=np.zeros_like(problem.min_ready),
    )
    formulation = formulate(free, cuts=False)
    program = replace(formulation.program, integrality=np.zeros_like(formulation.program.integrality))
    result = run(program, SolveLimits())
    if result.x is None:
        return PlanSolution(SolveStatus.INFEASIBLE, reason=explain(free))
    return read(free, formulation, result, whole=False)


def evaluate(
    problem: PlanProblem, ready: FloatArray, parked: FloatArray, points: FloatArray, share: FloatArray
) -> PlanSolution:
    """Price a plan made elsewhere, its changes at their cheapest. INFEASIBLE where it breaks a row."""
    formulation = formulate(problem)
    layout, program = formulation.layout, formulation.program
    lower, upper = program.lower.copy(), program.upper.copy()
    for block, values in (
        (layout.ready, ready),
        (layout.parked, parked[layout.parkable]),
        (layout.points, points),
        (layout.share, share[layout.share_demand, layout.share_group]),
    ):
        lower[block.slice] = upper[block.slice] = values
    result = run(replace(program, lower=lower, upper=upper), SolveLimits())
    if result.x is None:
        return PlanSolution(SolveStatus.INFEASIBLE, reason="the plan breaks a row of the problem")
    return replace(read(problem, formulation, result), status=SolveStatus.FEASIBLE, bound_w=float("nan"))


def _better(parts: OptimizeResult | None, joint: OptimizeResult) -> OptimizeResult:
    """The cheaper of two solutions of one program, with the higher of both bounds."""
    if parts is None or joint.x is None or joint.status == 0:
        return joint if joint.x is not None or parts is None else parts
    best = parts if parts.fun < joint.fun else joint
    best.mip_dual_bound = max(parts.mip_dual_bound, joint.mip_dual_bound)
    return best


def run(program: LinearProgram, limits: SolveLimits) -> OptimizeResult:
    """HiGHS on a program."""
    return milp(
        program.cost,
        integrality=program.integrality,
        bounds=Bounds(program.lower, program.upper),
        constraints=LinearConstraint(program.matrix, program.row_lower, program.row_upper),
        options={
            "mip_rel_gap": limits.gap,
            "node_limit": limits.branch_nodes,
            "presolve": len(program.cost) > _SMALL,
        },
    )


def read(problem: PlanProblem, formulation: Formulation, result: OptimizeResult, whole: bool = True) -> PlanSolution:
    """The plan in a solver's answer; ``whole`` numbers come back a hair beside themselves and are set right."""
    layout, x = formulation.layout, np.asarray(result.x, dtype=np.float64)
    ready = x[layout.ready.slice]
    parked = np.zeros(len(problem.group_pool))
    parked[layout.parkable] = x[layout.parked.slice]
    points = np.maximum(x[layout.points.slice], 0.0)
    if whole:
        ready, parked = np.rint(ready) + 0.0, np.rint(parked) + 0.0  # + 0.0: no negative zero
        points = np.rint(points) if problem.integral_points else points
    share = np.zeros_like(problem.work)
    share[layout.share_demand, layout.share_group] = np.clip(x[layout.share.slice], 0.0, 1.0)
    bound = result.mip_dual_bound if result.mip_dual_bound is not None else result.fun
    return PlanSolution(
        SolveStatus.OPTIMAL if result.status == 0 else SolveStatus.FEASIBLE,
        ready=ready,
        parked=parked,
        points=points,
        share=share,
        unserved=np.clip(x[layout.unserved.slice], 0.0, 1.0),
        objective_w=float(result.fun) + formulation.fixed_w,
        power_w=_power_w(formulation, x),
        bound_w=float(bound) + formulation.fixed_w,
        branch_nodes=int(result.mip_node_count or 0),
    )


def _power_w(formulation: Formulation, x: FloatArray) -> float:
    """Power of instances and nodes, without what changes cost."""
    layout, cost = formulation.layout, formulation.program.cost
    blocks = (layout.points, layout.idle, layout.parked, layout.nodes_on)
    return formulation.fixed_w + float(sum(cost[b.slice] @ x[b.slice] for b in blocks))


def _highest_capacity(problem: PlanProblem) -> FloatArray:
    """(G,) capacity of the best point of each group."""
    highest = np.zeros(len(problem.group_pool))
    np.maximum.at(highest, problem.point_group, problem.point_capacity)
    return highest
