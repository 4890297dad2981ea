from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from small_problems import random_problem

from solver.decomposition import parts_of, solve_in_parts
from solver.formulation import formulate
from solver.milp import SolveLimits, run, solve
from solver.problem import NodeRoom, PlanProblem, SolveStatus


def side_by_side(problems, nodes, **room):
    """One problem of several that share nothing but nodes."""
    first = problems[0]
    demands, groups = len(first.rate_rps), len(first.group_pool)
    count = len(problems)
    work = np.full((demands * count, groups * count), np.inf)
    for m, p in enumerate(problems):
        work[demands * m : demands * (m + 1), groups * m : groups * (m + 1)] = p.work

    def joined(of, step=0):
        return np.concatenate([of(p) + m * step for m, p in enumerate(problems)])

    shapes = replace(
        first.shapes,
        **{
            name: joined(lambda p, name=name: getattr(p.shapes, name))
            for name in ("tp", "ready", "parked", "start_w", "stop_w", "wake_w", "parked_w")
        },
    )
    return PlanProblem(
        demand_names=tuple(f"{m}/{name}" for m in range(count) for name in first.demand_names),
        pool_names=tuple(f"{m}/{name}" for m in range(count) for name in first.pool_names),
        rate_rps=joined(lambda p: p.rate_rps),
        reserve_rps=joined(lambda p: p.reserve_rps),
        standby_rps=joined(lambda p: p.standby_rps),
        work=work,
        group_pool=joined(lambda p: p.group_pool, 2),
        group_shape=joined(lambda p: p.group_shape, 3),
        group_peak=joined(lambda p: p.group_peak),
        point_group=joined(lambda p: p.point_group, groups),
        point_capacity=joined(lambda p: p.point_capacity),
        point_power_w=joined(lambda p: p.point_power_w),
        group_idle_w=joined(lambda p: p.group_idle_w),
        shapes=shapes,
        room=replace(NodeRoom.whole(nodes, 8, groups * count), **room),
        min_ready=np.zeros(2 * count),
    )


def problem_of(seed, models, nodes, **room):
    return side_by_side([random_problem(seed + 1000 * m) for m in range(models)], nodes, **room)


def test_models_are_the_parts_and_nodes_couple_them():
    problem = problem_of(1, 3, 6, free_gpu_w=70.0)
    formulation = formulate(problem)
    parts = parts_of(formulation.program)
    assert parts.count == 3
    names = {formulation.program.row_name(int(r))[0] for r in np.flatnonzero(parts.row < 0)}
    assert names == {"nodes"}
    on = parts.column[formulation.layout.nodes_on.slice]
    assert np.all(on == -1)


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([2, 3]), st.sampled_from([0.0, 70.0]))
def test_the_bound_of_the_parts_is_never_above_the_optimum_nor_their_plan_below_it(seed, models, free_gpu_w):
    problem = problem_of(seed, models, 2 * models, free_gpu_w=free_gpu_w)
    program = formulate(problem).program
    joint = run(program, SolveLimits(gap=1e-5))
    apart = solve_in_parts(program, parts_of(program), 1e-4, 500)
    if apart is None:
        return  # the parts do not fit the nodes together: the joint problem decides
    assert joint.x is not None
    assert apart.mip_dual_bound <= joint.fun * (1 + 1e-6)
    assert apart.fun >= joint.fun * (1 - 2e-5)
    assert np.all(program.matrix @ apart.x <= program.row_upper + 1e-5)


def test_many_models_are_solved_to_the_gap():
    problem = problem_of(5, 6, 20, free_gpu_w=70.0)
    solution = solve(problem, SolveLimits(gap=0.02))
    assert solution.status is SolveStatus.OPTIMAL
    assert solution.gap <= 0.02
    assert np.allclose(solution.share.sum(axis=1), 1.0)


def test_where_the_nodes_are_too_few_it_is_still_named():
    solution = solve(problem_of(5, 4, 0))
    assert solution.status is SolveStatus.INFEASIBLE
    assert "nodes[TP" in solution.reason
