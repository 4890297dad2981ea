import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tables import cluster, nine_pools

from pools.instances import InstanceState
from solver.control import (
    Park,
    Plan,
    PlanGroup,
    Reassign,
    Reshard,
    Route,
    ScaleIn,
    ScaleOut,
    SetFrequency,
    Wake,
)
from solver.diff import DiffSettings, diff
from solver.placing import Occupancy, cheapest_clearing

POOLS = nine_pools()
NAMES = tuple(p.name for p in POOLS)
SS, SM, LL = 0, 1, 8


def plan(*groups, version=1):
    return Plan(1, version, 0.0, 60.0, NAMES, tuple(groups), np.eye(9))


def group(pool, tp, count, clock=1200, parked=False):
    return PlanGroup(NAMES[pool], tp, clock, 0.9, count, parked)


def steps(actions, kind):
    return [a for a in actions if isinstance(a, kind)]


def test_an_empty_cluster_starts_what_is_planned_on_as_few_nodes_as_can_be():
    actions = diff(plan(group(LL, 8, 1), group(SS, 2, 2, clock=800)), cluster([], POOLS, nodes=4), 100.0, POOLS)
    starts = steps(actions, ScaleOut)
    assert [(s.pool, s.tp, s.sm_clock_mhz) for s in starts] == [("LL", 8, 1200), ("SS", 2, 800), ("SS", 2, 800)]
    assert len({s.node for s in starts}) == 2
    assert len({s.instance_id for s in starts}) == 3
    assert all(s.deadline_s > 100.0 and s.plan == (1, 1) for s in starts)
    assert isinstance(actions[-1], Route)


def test_what_is_as_planned_is_left_alone():
    state = cluster([{"id": "a", "pool": LL, "tp": 8}], POOLS)
    assert [type(a) for a in diff(plan(group(LL, 8, 1)), state, 0.0, POOLS)] == [Route]


def test_an_instance_changes_pool_rather_than_being_replaced():
    state = cluster([{"id": "a", "pool": SM, "tp": 2}], POOLS)
    actions = diff(plan(group(LL, 2, 1)), state, 0.0, POOLS)
    assert [(a.instance_id, a.pool) for a in steps(actions, Reassign)] == [("a", "LL")]
    assert not steps(actions, ScaleOut)
    assert not steps(actions, ScaleIn)


def test_surplus_leaves_the_emptiest_node():
    rows = [{"id": f"full{i}", "pool": SS, "tp": 2, "node": 0} for i in range(3)]
    rows.append({"id": "lonely", "pool": SS, "tp": 2, "node": 1})
    actions = diff(plan(group(SS, 2, 3)), cluster(rows, POOLS), 0.0, POOLS)
    assert [a.instance_id for a in steps(actions, ScaleIn)] == ["lonely"]


def test_one_that_starts_is_given_up_before_one_that_serves():
    rows = [
        {"id": "serves", "pool": SS, "tp": 2},
        {"id": "starts", "pool": SS, "tp": 2, "state": InstanceState.STARTING},
    ]
    actions = diff(plan(group(SS, 2, 1)), cluster(rows, POOLS), 0.0, POOLS)
    assert [a.instance_id for a in steps(actions, ScaleIn)] == ["starts"]


def test_nothing_stops_until_what_replaces_it_is_ready():
    rows = [{"id": "old", "pool": LL, "tp": 4, "node": 0}]
    wanted = plan(group(LL, 8, 1))
    first = diff(wanted, cluster(rows, POOLS), 0.0, POOLS)
    assert [s.node for s in steps(first, ScaleOut)] == ["n1"]
    assert not steps(first, ScaleIn)
    rows.append({"id": "LL-1-0", "pool": LL, "tp": 8, "node": 1, "state": InstanceState.STARTING})
    assert not steps(diff(wanted, cluster(rows, POOLS), 5.0, POOLS), ScaleIn)
    rows[1]["state"] = InstanceState.READY
    assert [a.instance_id for a in steps(diff(wanted, cluster(rows, POOLS), 60.0, POOLS), ScaleIn)] == ["old"]


def test_a_start_that_was_ordered_and_does_not_show_yet_is_not_ordered_twice():
    wanted = plan(group(LL, 8, 1))
    state = cluster([], POOLS)
    (order,) = steps(diff(wanted, state, 0.0, POOLS), ScaleOut)
    again = diff(wanted, state, 5.0, POOLS, ordered={order.instance_id: order}, first_serial=1)
    assert not steps(again, ScaleOut)


def test_on_full_nodes_instances_become_others_in_place_and_a_few_at_a_time():
    rows = [{"id": f"i{n}{j}", "pool": LL, "tp": 4, "node": n} for n in range(4) for j in range(2)]
    actions = diff(plan(group(LL, 8, 4)), cluster(rows, POOLS, nodes=4), 0.0, POOLS)
    reshards = steps(actions, Reshard)
    assert len(reshards) == 1  # a quarter of eight instances
    assert len(reshards[0].retire) == 2
    assert [o.tp for o in reshards[0].create] == [8]
    assert not steps(actions, ScaleOut)
    assert not steps(actions, ScaleIn)
    assert reshards[0].transfers == ()  # two copies of all weights lie there: every rank keeps what it needs


def test_the_last_of_a_pool_moves_only_when_another_is_ready_there():
    """A class whose pool is left without an instance would wait for as long as a start takes."""
    rows = [{"id": "old", "pool": LL, "tp": 2, "node": 0}]
    wanted = plan(group(SM, 2, 1), group(LL, 4, 1))
    before = diff(wanted, cluster(rows, POOLS), 0.0, POOLS)
    (order,) = steps(before, ScaleOut)
    assert (order.pool, order.tp) == ("LL", 4)
    assert not steps(before, Reassign)
    rows.append({"id": "new", "pool": LL, "tp": 4, "node": 1, "state": InstanceState.STARTING})
    assert not steps(diff(wanted, cluster(rows, POOLS), 5.0, POOLS), Reassign)
    rows[1]["state"] = InstanceState.READY
    assert [a.instance_id for a in steps(diff(wanted, cluster(rows, POOLS), 60.0, POOLS), Reassign)] == ["old"]


def test_pools_can_swap_their_only_instances_and_one_may_fall_empty_that_the_plan_gives_up():
    rows = [{"id": "a", "pool": SM, "tp": 2, "node": 0}, {"id": "b", "pool": LL, "tp": 4, "node": 0}]
    swapped = diff(plan(group(LL, 2, 1), group(SM, 4, 1)), cluster(rows, POOLS), 0.0, POOLS)
    assert {(a.instance_id, a.pool) for a in steps(swapped, Reassign)} == {("a", "LL"), ("b", "SM")}
    given_up = diff(plan(group(LL, 2, 1), group(LL, 4, 1)), cluster(rows, POOLS), 0.0, POOLS)
    assert [(a.instance_id, a.pool) for a in steps(given_up, Reassign)] == [("a", "LL")]


def test_no_more_instances_make_room_than_must():
    """All of a node's at once would leave nobody to serve while their successors start."""
    rows = [{"id": f"i{j}", "pool": LL, "tp": 4, "node": 0} for j in range(2)]
    wanted = plan(group(LL, 2, 2))
    actions = diff(wanted, cluster(rows, POOLS, nodes=1), 0.0, POOLS)
    (swap,) = steps(actions, Reshard)
    assert len(swap.retire) == 1
    assert [order.tp for order in swap.create] == [2, 2]
    assert not steps(actions, ScaleIn), "the other serves until they are READY"
    (stays,) = {"i0", "i1"} - set(swap.retire)
    successors = [
        {"id": o.instance_id, "pool": LL, "tp": 2, "node": 0, "state": InstanceState.STARTING} for o in swap.create
    ]
    rows = [{"id": stays, "pool": LL, "tp": 4, "node": 0}, *successors]
    assert not steps(diff(wanted, cluster(rows, POOLS, nodes=1), 5.0, POOLS), ScaleIn)
    for row in successors:
        row["state"] = InstanceState.READY
    last = diff(wanted, cluster(rows, POOLS, nodes=1), 60.0, POOLS)
    assert [a.instance_id for a in steps(last, ScaleIn)] == [stays]


def test_a_fragmented_cluster_is_cleared_for_a_large_instance():
    rows = [{"id": f"i{n}", "pool": SS, "tp": 2, "node": n} for n in range(2)]
    actions = diff(plan(group(SS, 2, 2), group(LL, 8, 1)), cluster(rows, POOLS), 0.0, POOLS)
    swap = steps(actions, Reshard)
    assert len(swap) == 1
    moved = steps(actions, ScaleOut)
    assert [(s.pool, s.tp) for s in moved] == [("SS", 2)]
    assert moved[0].node != swap[0].create[0].node


def test_parked_instances_wake_before_new_ones_start():
    rows = [{"id": "asleep", "pool": SS, "tp": 8, "state": InstanceState.PARKED}]
    actions = diff(plan(group(LL, 8, 1, clock=1600)), cluster(rows, POOLS), 0.0, POOLS)
    assert [(a.instance_id, a.pool) for a in steps(actions, Reassign)] == [("asleep", "LL")]
    assert [(a.instance_id, a.sm_clock_mhz) for a in steps(actions, Wake)] == [("asleep", 1600)]
    assert not steps(actions, ScaleOut)


def test_surplus_is_parked_where_the_plan_wants_it_asleep():
    rows = [{"id": f"i{n}", "pool": LL, "tp": 8, "node": n} for n in range(2)]
    actions = diff(plan(group(LL, 8, 1), group(LL, 8, 1, parked=True)), cluster(rows, POOLS), 0.0, POOLS)
    assert len(steps(actions, Park)) == 1
    assert not steps(actions, ScaleIn)


def test_what_lies_on_a_node_that_may_not_be_used_goes_elsewhere():
    rows = [{"id": "a", "pool": LL, "tp": 8, "node": 0}]
    state = cluster(rows, POOLS, usable=[False, True])
    assert [s.node for s in steps(diff(plan(group(LL, 8, 1)), state, 0.0, POOLS), ScaleOut)] == ["n1"]


def test_plans_set_clocks_only_where_no_instance_controller_does():
    rows = [{"id": "a", "pool": LL, "tp": 8, "clock": 1980}, {"id": "b", "pool": LL, "tp": 8, "node": 1, "clock": 1200}]
    wanted = plan(group(LL, 8, 1, clock=1200), group(LL, 8, 1, clock=800))
    state = cluster(rows, POOLS)
    assert not steps(diff(wanted, state, 0.0, POOLS), SetFrequency)
    actions = diff(wanted, state, 0.0, POOLS, DiffSettings(set_clocks=True))
    assert [(a.instance_id, a.sm_clock_mhz) for a in steps(actions, SetFrequency)] == [("a", 800)]


def carry_out(actions, rows, names):
    """A driver in which everything takes no time; returns the rows afterwards."""
    rows = {row["id"]: row for row in rows}
    for action in actions:
        match action:
            case ScaleOut():
                start(action, rows, names)
            case ScaleIn():
                rows.pop(action.instance_id, None)
            case Reassign():
                rows[action.instance_id]["pool"] = NAMES.index(action.pool)
            case Reshard():
                for gone in action.retire:
                    rows.pop(gone, None)
                for order in action.create:
                    start(order, rows, names)
    return list(rows.values())


def start(order, rows, names):
    node = names.index(order.node)
    if sum(r["tp"] for r in rows.values() if r["node"] == node) + order.tp <= 8:
        rows[order.instance_id] = {
            "id": order.instance_id,
            "pool": NAMES.index(order.pool),
            "tp": order.tp,
            "node": node,
        }


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 2**31))
def test_repeated_it_leads_from_any_cluster_to_any_plan_that_fits(seed):
    rng = np.random.default_rng(seed)
    nodes = 4
    rows, free = [], [8] * nodes
    for n in range(12):
        tp, node = int(rng.choice([2, 4, 8])), int(rng.integers(nodes))
        if free[node] >= tp:
            free[node] -= tp
            rows.append({"id": f"i{n}", "pool": int(rng.integers(9)), "tp": tp, "node": node})
    left, wanted = 8 * nodes, []
    for tp in (8, 4, 2):
        count = int(rng.integers(0, left // tp + 1))
        left -= tp * count
        wanted += [group(int(rng.integers(9)), tp, 1) for _ in range(count)]
    target, serial = plan(*wanted), 0
    for _ in range(40):
        state = cluster(rows, POOLS, nodes=nodes)
        used = np.bincount(state.instances.node, state.instances.tp, nodes)
        assert np.all(used <= 8)  # no node ever holds more than it has
        actions = diff(target, state, 0.0, POOLS, first_serial=serial)
        serial += sum(len(a.create) if isinstance(a, Reshard) else isinstance(a, ScaleOut) for a in actions)
        if len(actions) == 1:
            break
        rows = carry_out(actions, rows, list(state.node_names))
    have = sorted((row["pool"], row["tp"]) for row in rows)
    assert have == sorted((NAMES.index(g.pool), g.tp) for g in target.groups)


def test_a_node_is_chosen_to_clear_by_the_gpus_that_must_move():
    occupancy = Occupancy(np.array([8, 8]), np.array([2, 4]), np.array([0, 0]), np.ones(2, dtype=bool))
    movable = {0: [(0, 2), (1, 4)], 1: [(2, 2), (3, 2)]}
    assert cheapest_clearing(occupancy, 8, movable).instances == [2, 3]
    assert cheapest_clearing(occupancy, 16, movable) is None


@pytest.mark.parametrize(("free", "gpus", "best"), [([8, 2, 4], 2, 1), ([8, 2, 4], 4, 2), ([1, 1], 2, None)])
def test_instances_go_to_the_fullest_node_with_room(free, gpus, best):
    n = len(free)
    occupancy = Occupancy(np.full(n, 8), np.array(free), np.zeros(n, dtype=int), np.ones(n, dtype=bool))
    assert occupancy.best_node(gpus, wait=False) == best
