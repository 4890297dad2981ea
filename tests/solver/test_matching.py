"""match: every instance is dealt with once, the plan is met, and as little as can be is changed."""

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tables import cluster, nine_pools

from pools.instances import InstanceState
from solver.control import STATE_CODE
from solver.matching import match
from solver.placing import Occupancy, cheapest_clearing

POOLS = nine_pools()
MODELS = (0,) * 9
TWO_MODELS = (0, 0, 0, 0, 0, 1, 1, 1, 1)
STATES = (InstanceState.READY, InstanceState.STARTING, InstanceState.PARKED, InstanceState.DRAINING)
LIVE = {STATE_CODE[s] for s in STATES[:3]}


@st.composite
def clusters(draw, nodes=4):
    """Instances that fit their nodes, in any state."""
    free, rows = [8] * nodes, []
    for number in range(draw(st.integers(0, 12))):
        tp = draw(st.sampled_from((2, 4, 8)))
        node = draw(st.integers(0, nodes - 1))
        if free[node] < tp:
            continue
        free[node] -= tp
        state = draw(st.sampled_from(STATES))
        pool, running = draw(st.integers(0, 8)), draw(st.integers(0, 5))
        rows.append({"id": f"i{number}", "pool": pool, "node": node, "tp": tp, "state": state, "running": running})
    usable = draw(st.lists(st.booleans(), min_size=nodes, max_size=nodes))
    return cluster(rows, POOLS, nodes=nodes, usable=usable)


targets = st.dictionaries(st.tuples(st.integers(0, 8), st.sampled_from((2, 4, 8))), st.integers(0, 3), max_size=5)
models = st.sampled_from((MODELS, TWO_MODELS))


@settings(max_examples=80, deadline=None)
@given(clusters(), targets, targets, models)
def test_every_instance_is_dealt_with_once_and_the_plan_is_met(state, ready, parked, pool_model):
    result = match(state, pool_model, ready, parked)
    views = state.instances
    dealt = [*result.stay, *result.stop, *result.park, *(i for i, _ in result.reassign), *(i for i, _ in result.wake)]
    assert len(dealt) == len(set(dealt))
    for i in dealt:
        assert int(views.state[i]) in LIVE  # what drains or has failed is left alone
    # what serves afterwards, with what must be started, is what was planned
    serving = Counter((int(views.pool[i]), int(views.tp[i])) for i in result.stay)
    serving += Counter((pool, int(views.tp[i])) for i, pool in (*result.reassign, *result.wake))
    serving += Counter(result.missing)
    assert serving == Counter({key: count for key, count in ready.items() if count})
    for i, pool in (*result.reassign, *result.wake):
        assert pool_model[views.pool[i]] == pool_model[pool]  # another model is another process


@settings(max_examples=80, deadline=None)
@given(clusters(), targets, models)
def test_nothing_is_stopped_and_started_of_one_kind(state, ready, pool_model):
    """An instance that may stay stays: of one model and TP, either some go or some are missing, never both."""
    result = match(state, pool_model, ready, {})
    views = state.instances
    usable = state.node_usable[views.node]
    stopped = {
        (pool_model[views.pool[i]], int(views.tp[i]))
        for i in result.stop
        if usable[i] and views.state[i] != STATE_CODE[InstanceState.PARKED]
    }
    missing = {(pool_model[pool], tp) for pool, tp in result.missing}
    assert not stopped & missing


@settings(max_examples=50, deadline=None)
@given(clusters(), targets)
def test_matching_again_after_it_was_done_changes_nothing(state, ready):
    views = state.instances
    first = match(state, MODELS, ready, {})
    pool_of = {**{i: int(views.pool[i]) for i in first.stay}, **dict(first.reassign), **dict(first.wake)}
    rows = [
        {"id": views.ids[i], "pool": pool, "node": int(views.node[i]), "tp": int(views.tp[i])}
        for i, pool in sorted(pool_of.items())
    ]
    again = match(cluster(rows, POOLS, nodes=4), MODELS, ready, {})
    assert (again.stop, again.reassign, again.wake, again.park) == ([], [], [], [])
    assert Counter(again.missing) == Counter(first.missing)


@settings(max_examples=50, deadline=None)
@given(clusters(), targets)
def test_what_stands_on_a_lost_node_is_never_kept(state, ready):
    result = match(state, MODELS, ready, {})
    kept = [*result.stay, *(i for i, _ in (*result.reassign, *result.wake)), *result.park]
    assert all(state.node_usable[state.instances.node[i]] for i in kept)


@settings(max_examples=50, deadline=None)
@given(clusters(), targets, targets)
def test_sleepers_are_woken_before_anything_is_started(state, ready, parked):
    result = match(state, MODELS, ready, parked)
    views = state.instances
    asleep = {
        int(views.tp[i])
        for i in np.flatnonzero((views.state == STATE_CODE[InstanceState.PARKED]) & state.node_usable[views.node])
        if i not in {i for i, _ in result.wake}
    }
    assert not asleep & {tp for _, tp in result.missing}


def occupancies(draw, nodes=4):
    total = np.full(nodes, 8, dtype=np.int64)
    free = np.array([draw(st.integers(0, 8)) for _ in range(nodes)], dtype=np.int64)
    freeing = np.array([draw(st.integers(0, int(8 - f))) for f in free], dtype=np.int64)
    return Occupancy(total, free, freeing, np.array([draw(st.booleans()) for _ in range(nodes)]))


class TestPlacing:
    @given(st.data(), st.sampled_from((1, 2, 4, 8)), st.booleans())
    def test_the_fullest_usable_node_with_room(self, data, gpus, wait):
        where = occupancies(data.draw)
        room = where.free + where.freeing * wait
        fits = [n for n in range(4) if where.usable[n] and room[n] >= gpus]
        node = where.best_node(gpus, wait)
        assert (node is None) == (not fits)
        if node is not None:
            assert node in fits
            assert room[node] == min(room[n] for n in fits)

    @given(st.data(), st.sampled_from((1, 2, 4, 8)))
    def test_placing_takes_what_is_free_first_and_counts_the_rest(self, data, gpus):
        where = occupancies(data.draw)
        node = where.best_node(gpus, wait=True)
        if node is None:
            return
        free, before = int(where.free[node]), int(where.free[node] + where.freeing[node])
        assert where.place(node, gpus) == max(0, gpus - free)
        assert int(where.free[node] + where.freeing[node]) == before - gpus
        assert where.free[node] >= 0
        assert where.freeing[node] >= 0

    def test_who_leaves_makes_room_for_one_that_waits(self):
        state = cluster([{"id": "a", "tp": 8, "node": 0}, {"id": "b", "tp": 4, "node": 1}], POOLS)
        where = Occupancy.of(state, np.array([True, False]))
        assert where.best_node(8, wait=False) is None
        assert where.best_node(8, wait=True) == 0
        assert where.place(0, 8) == 8
        assert where.best_node(8, wait=True) is None
        where.leave(1, 4)
        assert where.best_node(8, wait=True) == 1

    @given(st.data(), st.sampled_from((2, 4, 8)))
    def test_the_cheapest_clearing_clears_and_no_other_node_takes_less(self, data, gpus):
        where = occupancies(data.draw)
        movable = {}
        for node in range(4):
            held = 8 - int(where.free[node]) - int(where.freeing[node])
            sizes = []
            while held >= 2 and data.draw(st.booleans()):
                size = data.draw(st.sampled_from([s for s in (2, 4, 8) if s <= held]))
                sizes.append((10 * node + len(sizes), size))
                held -= size
            movable[node] = sizes
        clearing = cheapest_clearing(where, gpus, movable)

        def missing(node):
            return gpus - int(where.free[node]) - int(where.freeing[node])

        can = [n for n in range(4) if where.usable[n] and 0 < missing(n) <= sum(size for _, size in movable[n])]
        assert (clearing is None) == (not can)
        if clearing is not None:
            sizes = dict(movable[clearing.node])
            moved = sum(sizes[i] for i in clearing.instances)
            assert moved >= missing(clearing.node)
            assert clearing.node in can
