"""Fragmentation, escalation, policies and the clairvoyant bound."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tables import CLOCKS, TPS, cluster, nine_pools, one_pool, table, views

from pools.classes import REQUEST_CLASSES, RequestClass
from solver.candidates import Knobs, candidates
from solver.clairvoyant import clairvoyant_w
from solver.control import Escalation, Plan
from solver.escalation import EscalationLadder, EscalationSettings
from solver.forecast import Forecast
from solver.fragmentation import fragment
from solver.planner import Planner, Restriction
from solver.policies import POLICY_NAMES, policies

NINE = candidates({"m": table()}, nine_pools(), Knobs())


def problem_of(planner, pools, forecast):
    state = cluster([], pools, nodes=8)
    return planner.problem(state, forecast, forecast.reserve_rps, Restriction(), np.ones(len(pools)))


@settings(max_examples=80, deadline=None)
@given(st.lists(st.floats(0.0, 40.0), min_size=9, max_size=9))
def test_whole_instances_stay_and_remainders_go_to_pools_that_dominate(rates):
    rates = np.array(rates)
    parts = fragment(NINE, rates)
    assert np.allclose(parts.share.sum(axis=1), 1.0)
    for k in REQUEST_CLASSES:
        for p in np.flatnonzero(parts.share[k]):
            assert NINE.pools[p].request_class.dominates(k)
    assert np.all(parts.gpus == parts.instances * 8)
    capacity = {
        int(p): parts.instances[p] * NINE.group_peak[g]
        for g, p in enumerate(NINE.group_pool)
        if NINE.group_shape[g] == 2
    }
    for g, p in enumerate(NINE.group_pool):
        if NINE.group_shape[g] == 2:
            work = np.where(np.isfinite(NINE.work[:, g]), NINE.work[:, g], 0.0)
            assert rates @ (parts.share[:, p] * work) <= capacity[int(p)] + 1e-6
            used = parts.share[:, p] > 0
            if p != RequestClass.LL and not np.any(parts.share[used, p] == 1.0):
                # a pool whose classes go on elsewhere holds only what it fills
                assert rates @ (parts.share[:, p] * work) >= capacity[int(p)] - 1e-6


def test_only_the_pool_with_nowhere_to_go_rounds_up():
    rates = np.zeros(9)
    rates[RequestClass.LL] = 0.1
    rates[RequestClass.SS] = 0.1
    parts = fragment(NINE, rates)
    assert parts.instances[RequestClass.LL] == 1
    assert parts.instances.sum() == 1
    assert parts.share[RequestClass.SS, RequestClass.LL] == 1.0


def test_measures_are_taken_one_by_one_and_forgotten_when_all_is_well():
    ladder = EscalationLadder(EscalationSettings(squash=True))
    trouble = views([{"id": "a", "slack": -0.1, "waiting": 3.0}, {"id": "b", "slack": 0.5}])
    top = np.array([True, True])
    taken = [[e.measure for e in ladder.climb(5.0 * n, trouble, top)] for n in range(4)]
    assert taken == [[Escalation.REORDER], [Escalation.RESTEER], [Escalation.SQUASH], [Escalation.SQUASH]]
    assert ladder.climb(20.0, views([{"id": "a", "slack": 0.2}]), np.array([True])) == []
    assert ladder.climb(25.0, trouble, top)[0].measure is Escalation.REORDER


def test_an_instance_whose_clock_can_still_rise_does_not_escalate():
    trouble = views([{"id": "a", "slack": -0.1, "waiting": 3.0}])
    assert EscalationLadder().climb(0.0, trouble, np.array([False])) == []


def test_policies_differ_only_in_knobs_levels_and_pools():
    known = policies(TPS[-1], CLOCKS[-1])
    assert tuple(known) == POLICY_NAMES
    assert [n for n, p in known.items() if p.static] == ["single-pool", "multi-pool", "scale-shard", "scale-freq"]
    assert [pool.name for pool in known["single-pool"].pools("m")] == ["all"]
    assert len(known["multi-pool"].pools("m")) == 9
    assert known["packing"].knobs.sm_clocks_mhz == (1980,)
    for policy in known.values():
        assert any(p.request_class is RequestClass.LL for p in policy.pools("m"))  # every class has a pool


def test_the_clairvoyant_is_below_every_plan():
    rate = np.full(9, 0.6)
    every = candidates({"m": table()}, one_pool(), Knobs(headroom=0.0))
    (bound_w,) = clairvoyant_w(every, 8, 8, [rate])
    for name, policy in policies(TPS[-1], CLOCKS[-1]).items():
        pools = policy.pools("m")
        planner = Planner(candidates({"m": table()}, pools, policy.knobs))
        problem = planner.problem(
            cluster([], pools, nodes=8), Forecast(rate, rate), rate, Restriction(), np.ones(len(pools))
        )
        planned = planner.plan(problem)
        assert planned.solution.found, name
        assert bound_w <= planned.solution.power_w


def test_the_clairvoyant_says_when_no_cluster_is_enough():
    every = candidates({"m": table()}, one_pool(), Knobs(headroom=0.0))
    (bound_w,) = clairvoyant_w(every, 1, 8, [np.full(9, 1e4)])
    assert np.isnan(bound_w)


def test_a_plan_names_the_clocks_of_whole_instances():
    planner = Planner(NINE)
    rate = np.full(9, 1.0)
    problem = planner.problem(
        cluster([], nine_pools(), nodes=8), Forecast(rate, rate * 1.5), rate, Restriction(), np.ones(9)
    )
    planned = planner.plan(problem)
    plan = planner.as_plan(planned, 1, 7, 100.0, 60.0)
    counted = {}
    for group in plan.groups:
        assert group.sm_clock_mhz in CLOCKS
        key = (group.pool, group.tp)
        counted[key] = counted.get(key, 0) + group.count
    ready = {
        (NINE.pools[NINE.group_pool[g]].name, int(NINE.shape_tp[NINE.group_shape[g]])): int(n)
        for g, n in enumerate(planned.solution.ready)
        if n
    }
    assert counted == ready
    assert np.allclose(plan.pool_share.sum(axis=1), 1.0)
    assert plan.stamp == (1, 7)
    assert plan.gpus() == sum(tp * n for (_, tp), n in ready.items())


def test_a_newer_plan_supersedes_and_a_newer_leader_always_does():
    def stamped(epoch, version):
        return Plan(epoch, version, 0.0, 60.0, (), (), np.zeros((0, 0)))

    assert stamped(1, 2).supersedes(stamped(1, 1))
    assert stamped(2, 1).supersedes(stamped(1, 9))
    assert not stamped(1, 1).supersedes(stamped(1, 1))
    assert stamped(1, 1).supersedes(None)


@pytest.mark.parametrize("bad", [(), (3,)])
def test_knobs_off_the_table_are_refused(bad):
    with pytest.raises(ValueError, match="holds for SM clock"):
        candidates({"m": table()}, one_pool(), Knobs(sm_clocks_mhz=bad))
