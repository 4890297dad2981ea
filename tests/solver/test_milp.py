from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_problems import best_by_trying, fits, random_problem

from solver.greedy import solve_greedy
from solver.milp import SolveLimits, evaluate, lower_bound, solve
from solver.problem import NodeRoom, ProblemError, SolveStatus

EXACT = SolveLimits(gap=1e-6)
seeds = st.integers(0, 2**31)


def ample(problem):
    """The problem on so many GPUs that it can be met."""
    return replace(problem, room=NodeRoom.whole(8, 8, len(problem.group_pool)))


@settings(max_examples=60, deadline=None)
@given(seeds, st.sampled_from([(4, 2), (3, 3), (4,), (2, 2, 1)]), st.booleans())
def test_the_milp_finds_what_trying_everything_finds(seed, nodes, budget):
    problem = random_problem(seed, nodes, budget)
    best = best_by_trying(problem)
    solution = solve(problem, EXACT)
    if best is None:
        assert solution.status is SolveStatus.INFEASIBLE
    else:
        assert solution.status is SolveStatus.OPTIMAL
        assert solution.objective_w == pytest.approx(best, rel=1e-5)


@settings(max_examples=60, deadline=None)
@given(seeds, st.booleans())
def test_greedy_is_never_better_and_its_plan_holds(seed, integral):
    problem = replace(ample(random_problem(seed)), integral_points=integral)
    greedy, best = solve_greedy(problem), solve(problem, EXACT)
    assert greedy.status is SolveStatus.FEASIBLE
    assert greedy.objective_w >= best.objective_w * (1 - 1e-6)


@settings(max_examples=60, deadline=None)
@given(seeds, st.booleans())
def test_a_plan_meets_every_limit_it_was_given(seed, integral):
    problem = replace(ample(random_problem(seed)), integral_points=integral, min_ready=np.array([1.0, 2.0]))
    s = solve(problem)
    work = np.where(np.isfinite(problem.work), problem.work, 0.0)
    taken = np.bincount(problem.point_group, s.points * problem.point_capacity, 4)
    assert np.allclose(s.share.sum(axis=1), 1.0)
    assert np.all(s.share[~np.isfinite(problem.work)] == 0.0)
    assert np.all(((problem.rate_rps[:, None] * s.share) * work).sum(axis=0) <= taken + 1e-6)
    assert np.all(((problem.reserve_rps[:, None] * s.share) * work).sum(axis=0) <= s.ready * problem.group_peak + 1e-6)
    assert np.all(np.bincount(problem.point_group, s.points, 4) <= s.ready + 1e-6)  # the others idle
    assert np.bincount(problem.group_pool, s.ready)[1] >= 2
    assert fits(np.repeat(problem.group_tp, s.ready.astype(int)).tolist(), problem.room.free.tolist())
    assert np.all(s.ready == np.rint(s.ready))


@settings(max_examples=40, deadline=None)
@given(seeds)
def test_the_relaxed_clairvoyant_is_a_lower_bound(seed):
    problem = ample(random_problem(seed))
    bound = lower_bound(problem)
    assert bound.found
    time_shared = solve(replace(problem, integral_points=False), EXACT)
    whole = solve(problem, EXACT)
    assert bound.power_w <= time_shared.objective_w * (1 + 1e-9)
    assert time_shared.objective_w <= whole.objective_w * (1 + 1e-6)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from([1, 2, 4, 8]), max_size=9),
    st.lists(st.integers(0, 8), min_size=1, max_size=4),
)
def test_the_node_rows_say_exactly_what_packing_into_nodes_says(sizes, free):
    """The formulation's claim: TPs that divide one another need one row each, not a variable for each node."""
    by_rows = all(
        sum(size // s for size in sizes if size >= s) <= sum(room // s for room in free) for s in (1, 2, 4, 8)
    )
    assert by_rows == fits(sizes, free)


def demanding(problem, *rate):
    """The problem with these rates and no more in reserve."""
    rate = np.array(rate)
    return replace(problem, rate_rps=rate, reserve_rps=rate, standby_rps=rate)


def test_whole_instances_do_not_straddle_nodes():
    problem = demanding(random_problem(1, nodes=(3, 3, 3, 3)), 0.0, 0.5)
    problem = replace(problem, work=np.array([[1.0] * 4, [np.inf] * 3 + [1.0]]))
    solution = solve(problem)
    assert solution.status is SolveStatus.INFEASIBLE  # 12 GPUs are free, but no four of one node
    assert "nodes[TP4]: 1 instances short" in solution.reason


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda p: replace(p, room=NodeRoom.whole(0, 8, 4)), "nodes[TP"),
        (lambda p: replace(p, power_budget_w=10.0), "power: "),
        (lambda p: replace(p, work=np.array([[1.0] * 4, [np.inf] * 4])), "demand[L]: no group may serve it"),
        (lambda p: replace(p, pool_names=("s", "l", "x"), min_ready=np.array([0.0, 0.0, 1.0])), "min_ready[x]: 1 "),
    ],
)
def test_an_infeasible_problem_names_the_row_that_cannot_be_met(change, named):
    solution = solve(change(ample(random_problem(3))))
    assert solution.status is SolveStatus.INFEASIBLE
    assert not solution.found
    assert named in solution.reason


def test_demand_may_be_left_unserved_at_a_price():
    problem = demanding(random_problem(5, nodes=(2,)), 4.0, 4.0)
    assert solve(problem).status is SolveStatus.INFEASIBLE
    solution = solve(replace(problem, unserved_w_per_rps=1e5))
    assert solution.found
    assert np.allclose(solution.share.sum(axis=1) + solution.unserved, 1.0)
    assert 0.0 < solution.unserved.max() <= 1.0


def test_changing_costs_what_it_costs_so_a_plan_stays_unless_it_pays():
    problem = replace(ample(random_problem(11, changes=False)), integral_points=False)
    best = solve(problem, EXACT)
    now = np.bincount(problem.group_shape, best.ready, 3)
    shapes = replace(problem.shapes, ready=now, start_w=np.full(3, 1e4), stop_w=np.full(3, 1e4))
    later = replace(demanding(problem, *problem.rate_rps * 0.5), shapes=shapes)
    assert np.array_equal(np.bincount(problem.group_shape, solve(later, EXACT).ready, 3), now)
    cheap = replace(later, shapes=replace(shapes, start_w=np.zeros(3), stop_w=np.zeros(3)))
    assert solve(cheap, EXACT).power_w < solve(later, EXACT).power_w


def test_a_reshard_is_taken_where_it_is_cheaper_than_stop_and_start():
    problem = ample(random_problem(2, changes=False))
    only_tp4 = np.array([[np.inf] * 3 + [1.0], [np.inf] * 3 + [1.0]])
    shapes = replace(
        problem.shapes,
        ready=np.array([0.0, 6.0, 0.0]),
        start_w=np.full(3, 1000.0),
        stop_w=problem.shapes.tp * 50.0,
        reshard_from=np.array([1]),
        reshard_to=np.array([2]),
        reshard_w_per_gpu=np.array([5.0]),
    )
    solution = solve(replace(problem, work=only_tp4, shapes=shapes), EXACT)
    made = solution.ready[3]
    assert made >= 1
    paid = solution.objective_w - solution.power_w
    assert paid == pytest.approx(made * 4 * 5.0 + (6 - 2 * made) * 100.0)


def test_standby_is_met_by_parked_instances_where_sleeping_is_cheaper():
    problem = ample(random_problem(4, changes=False))
    problem = replace(problem, standby_rps=problem.reserve_rps * 3)
    awake = solve(problem, EXACT)
    asleep = solve(replace(problem, shapes=replace(problem.shapes, parked_w=problem.shapes.tp * 30.0)), EXACT)
    assert awake.parked.sum() == 0
    assert asleep.parked.sum() >= 1
    assert asleep.power_w < awake.power_w
    capacity = (asleep.ready + asleep.parked) * problem.group_peak
    work = np.where(np.isfinite(problem.work), problem.work, 0.0)
    assert np.all((problem.standby_rps[:, None] * asleep.share * work).sum(axis=0) <= capacity + 1e-6)


def instances_power_w(problem, solution):
    idle = solution.ready - np.bincount(problem.point_group, solution.points, len(solution.ready))
    return solution.points @ problem.point_power_w + idle @ problem.group_idle_w


def test_free_gpus_and_nodes_draw_power_unless_the_node_is_empty_and_off():
    problem = replace(ample(random_problem(6, changes=False)), integral_points=False)
    room = NodeRoom(problem.room.gpus, problem.room.free, problem.room.pinned, free_gpu_w=70.0, node_w=300.0)
    bare = solve(problem, EXACT)
    off = solve(replace(problem, room=room), EXACT)
    always = solve(replace(problem, room=replace(room, empty_nodes_off=False)), EXACT)
    used = off.ready @ problem.group_tp
    nodes = np.ceil(used / 8)
    instances_w = instances_power_w(problem, off)
    assert off.power_w == pytest.approx(instances_w + nodes * 300.0 + (8 * nodes - used) * 70.0)
    assert bare.power_w < off.power_w < always.power_w
    used = always.ready @ problem.group_tp
    assert always.power_w == pytest.approx(instances_power_w(problem, always) + 8 * 300.0 + (64 - used) * 70.0)


def test_pinned_instances_stay_and_count_as_capacity_not_as_room():
    problem = replace(random_problem(8, changes=False), integral_points=False)
    gpus = np.array([8, 8])
    pinned = np.array([0, 0, 0, 1])
    room = NodeRoom(gpus, np.array([4, 8]), pinned)
    solution = solve(replace(problem, room=room))
    assert solution.ready[3] >= 1
    full = replace(problem, room=replace(room, free=np.zeros(2, dtype=np.int64)))
    alone = solve(replace(full, unserved_w_per_rps=1e5))
    assert alone.ready.tolist() == [0, 0, 0, 1]


def test_a_limit_hit_is_a_value_with_its_gap():
    problem = demanding(random_problem(0, nodes=(8,) * 12, changes=False), 9.7, 13.3)
    solution = solve(problem, SolveLimits(gap=0.0, branch_nodes=1))
    assert solution.status in (SolveStatus.FEASIBLE, SolveStatus.NONE, SolveStatus.OPTIMAL)
    if solution.status is SolveStatus.FEASIBLE:
        assert solution.gap > 0.0


def test_evaluate_prices_a_plan_as_the_solver_does_and_refuses_one_that_breaks_a_row():
    problem = ample(random_problem(9))
    s = solve(problem, EXACT)
    assert evaluate(problem, s.ready, s.parked, s.points, s.share).objective_w == pytest.approx(s.objective_w)
    assert not evaluate(problem, s.ready, s.parked, s.points * 0.5, s.share).found


def test_the_same_problem_gives_the_same_plan():
    problem = ample(random_problem(10))
    first, second = solve(problem), solve(problem)
    assert np.array_equal(first.points, second.points)
    assert np.array_equal(first.share, second.share)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: replace(p, rate_rps=np.ones(3)), "rate_rps has shape"),
        (lambda p: replace(p, reserve_rps=p.rate_rps * 0.5), "demand must rise"),
        (lambda p: replace(p, shapes=replace(p.shapes, tp=np.array([1, 2, 3]))), "TPs must divide one another"),
    ],
)
def test_a_problem_that_contradicts_itself_is_refused(change, message):
    with pytest.raises(ProblemError, match=message):
        change(random_problem(0))


def test_a_pool_keeps_within_the_gpus_given_to_it():
    problem = ample(random_problem(12, changes=False))
    free = solve(problem, EXACT)
    own = replace(problem, pool_gpus=(np.array([3.0, 0.0]), np.array([3.0, np.inf])))
    bound = solve(own, EXACT)
    assert np.bincount(problem.group_pool, bound.ready * problem.group_tp)[0] == 3
    assert bound.objective_w >= free.objective_w
    none = replace(problem, pool_gpus=(np.zeros(2), np.zeros(2)))
    assert "pool_gpus[l]: " in solve(none, EXACT).reason


def test_nodes_are_not_switched_for_less_than_switching_costs():
    problem = replace(ample(random_problem(6, changes=False)), integral_points=False)
    room = replace(problem.room, free_gpu_w=70.0, on=5, switch_w=2000.0)
    stay = solve(replace(problem, room=room), EXACT)
    cheap = solve(replace(problem, room=replace(room, switch_w=10.0)), EXACT)
    used_gpus = cheap.ready @ problem.group_tp
    assert used_gpus < 16
    assert cheap.objective_w - cheap.power_w == pytest.approx(10.0 * (5 - np.ceil(used_gpus / 8)))
    assert stay.objective_w == pytest.approx(stay.power_w)  # all five stay on, their free GPUs draw


def test_reserve_is_bought_while_it_is_worth_its_price_and_not_beyond():
    problem = replace(ample(random_problem(7, changes=False)), integral_points=False)
    problem = replace(problem, reserve_rps=problem.rate_rps * 9.0, standby_rps=problem.rate_rps * 9.0)
    must = solve(problem, EXACT)
    dear = solve(replace(problem, reserve_w_per_gpu=1e4), EXACT)
    free = solve(replace(problem, reserve_w_per_gpu=0.0), EXACT)
    assert dear.objective_w == pytest.approx(must.objective_w, rel=1e-4)
    assert free.power_w < must.power_w
    assert free.ready.sum() < must.ready.sum()
