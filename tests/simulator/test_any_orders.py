"""Whatever a controller orders, sensible or not: no request is lost, no GPU held twice, no joule made or lost."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_simulation import STATE_W, PretendProfile, Script, requests, run, setup_of, start

from pools.classes import RequestClass
from pools.queue import QueueLimits
from simulator.delays import Delays
from simulator.simulation import simulate
from simulator.workload.arrivals import recorded
from solver.control import Park, Reassign, Reshard, ScaleIn, ScaleOut, SetFrequency, Wake

NAMES = tuple("abcdef")
POOLS = (("short", RequestClass.MM), ("long", RequestClass.LL))
NODES = 2
LONG_S = 1e9
names = st.sampled_from(NAMES)
clocks = st.sampled_from((1000, 2000))


@st.composite
def scale_outs(draw):
    return ScaleOut(
        deadline_s=draw(st.sampled_from((5.0, LONG_S))),
        instance_id=draw(names),
        pool=draw(st.sampled_from(("short", "long"))),
        tp=draw(st.sampled_from((2, 4, 8))),
        sm_clock_mhz=draw(clocks),
        node=f"n{draw(st.integers(0, NODES - 1))}",
    )


@st.composite
def reshards(draw):
    """Into halves, on the node it is on or (an order that cannot be kept) on another."""
    node = f"n{draw(st.integers(0, NODES - 1))}"
    new = draw(st.lists(names, min_size=1, max_size=2, unique=True))
    create = tuple(
        ScaleOut(deadline_s=LONG_S, instance_id=f"{name}'", pool="long", tp=2, sm_clock_mhz=2000, node=node)
        for name in new
    )
    return Reshard(deadline_s=LONG_S, retire=(draw(names),), create=create)


actions = st.one_of(
    scale_outs(),
    reshards(),
    st.builds(lambda name: ScaleIn(deadline_s=LONG_S, instance_id=name), names),
    st.builds(lambda name, clock: SetFrequency(deadline_s=LONG_S, instance_id=name, sm_clock_mhz=clock), names, clocks),
    st.builds(lambda name, clock: Park(deadline_s=LONG_S, instance_id=name, sm_clock_mhz=clock), names, clocks),
    st.builds(lambda name, clock: Wake(deadline_s=LONG_S, instance_id=name, sm_clock_mhz=clock), names, clocks),
    st.builds(
        lambda name, pool: Reassign(deadline_s=LONG_S, instance_id=name, pool=pool),
        names,
        st.sampled_from(("short", "long")),
    ),
)
orders = st.dictionaries(
    st.integers(1, 40).map(float), st.lists(actions, min_size=1, max_size=4), min_size=1, max_size=8
)
DELAYS = Delays(start_s=3.0, reshard_s=2.0, wake_s=1.0, node_on_s=2.0)


def play(given_orders, arrivals, **more):
    """The orders, with two instances there from the beginning: one for all, one beside it."""
    first = [start("a", node=0, tp=8, pool="long"), start("b", node=1, tp=4, pool="short")]
    setup = setup_of(nodes=NODES, pools=POOLS, delays=DELAYS, queue=QueueLimits(ttl_s=20.0), sample_s=5.0, **more)
    return run(setup, arrivals, {0.0: first, **given_orders, 60.0: []}, duration_s=60.0)


@settings(max_examples=40, deadline=None)
@given(orders, st.integers(0, 1000))
def test_every_request_ends_once_and_every_token_is_made_once(given_orders, seed):
    arrivals = requests(120, 3.0, seed)
    simulation, _ = play(given_orders, arrivals)
    ledger = simulation.world.ledger
    finished, rejected = int(ledger.finished.sum()), int(ledger.rejected.sum())
    assert int(ledger.arrived.sum()) == 120 == finished + rejected
    assert int(ledger.input_tokens.sum()) <= int(arrivals.input_tokens.sum())
    if not rejected:
        assert int(ledger.output_tokens.sum()) == int(arrivals.output_tokens.sum())
    assert int(ledger.within_slo.sum()) <= min(int(ledger.within_ttft.sum()), int(ledger.within_tbt.sum()))


@settings(max_examples=40, deadline=None)
@given(orders)
def test_no_gpu_is_held_twice_and_none_is_forgotten(given_orders):
    simulation, controller = play(given_orders, requests(60, 2.0))
    for seen in controller.seen[1:]:
        views = seen.cluster.instances
        held = np.bincount(views.node, weights=views.tp, minlength=NODES)
        assert (held <= seen.cluster.node_gpus).all()
        assert len(set(views.ids)) == len(views.ids)
    cluster = simulation.cluster
    held = np.zeros(NODES, int)
    for instance in cluster.instances.values():
        held[instance.node] += instance.tp
    assert (held + cluster.free == 8).all()


@settings(max_examples=40, deadline=None)
@given(orders)
def test_energy_lies_between_what_the_gpus_could_and_must_draw(given_orders):
    simulation, _ = play(given_orders, requests(60, 2.0))
    by_kind = simulation.total_energy_j()
    assert all(joules >= 0.0 for joules in by_kind.values())
    profile = PretendProfile()
    most_w = max(profile.step(tp, clock).max_w for tp in (2, 4, 8) for clock in (1000, 2000))
    on_s = simulation.cluster.gpu_s
    least_w = min(watts for state, watts in STATE_W.items() if watts > 0.0)
    assert 0.99 * least_w * on_s <= sum(by_kind.values()) <= most_w * on_s
    assert on_s <= 8 * NODES * simulation.now_s * (1 + 1e-9)


@settings(max_examples=15, deadline=None)
@given(orders, st.integers(0, 3))
def test_the_same_orders_give_the_same_run(given_orders, seed):
    first, second = (play(given_orders, requests(60, 2.0, seed))[0] for _ in range(2))
    assert first.total_energy_j() == second.total_energy_j()
    assert first.now_s == second.now_s
    assert first.world.ledger.ttft.tolist() == second.world.ledger.ttft.tolist()


@settings(max_examples=25, deadline=None)
@given(orders)
def test_the_samples_and_the_kinds_add_up_to_the_whole(given_orders):
    first = [start("a", node=0, tp=8, pool="long"), start("b", node=1, tp=4, pool="short")]
    setup = setup_of(nodes=NODES, pools=POOLS, delays=DELAYS, queue=QueueLimits(ttl_s=20.0), sample_s=5.0)
    workload = recorded("made", requests(40, 2.0), 60.0)
    result = simulate(setup, workload, Script({0.0: first, **given_orders, 60.0: []}), "scripted")
    series = result.series
    assert (series.power_w * np.diff(series.at_s, prepend=0.0)).sum() == pytest.approx(result.energy_j)
    assert result.energy_j == pytest.approx(sum(result.energy_by_kind_j.values()))
    assert result.busy_gpu_s <= result.gpu_s <= 8 * NODES * result.horizon_s * (1 + 1e-9)
    report = result.as_json()
    assert report["finished"] + report["rejected"] == report["requests"] == 40


def test_an_order_done_twice_is_done_once():
    arrivals = requests(60, 2.0)
    once = {5.0: [start("c", node=1, tp=4, pool="long")], 20.0: [ScaleIn(deadline_s=LONG_S, instance_id="b")]}
    twice = {at_s: [*given_orders, *given_orders] for at_s, given_orders in once.items()}
    first, second = (play(given_orders, arrivals)[0] for given_orders in (once, twice))
    assert first.total_energy_j() == second.total_energy_j()
    assert sorted(first.cluster.instances) == sorted(second.cluster.instances) == ["a", "c"]


@pytest.mark.parametrize(
    "order",
    [
        ScaleIn(deadline_s=LONG_S, instance_id="nobody"),
        SetFrequency(deadline_s=LONG_S, instance_id="nobody", sm_clock_mhz=1000),
        Park(deadline_s=LONG_S, instance_id="nobody", sm_clock_mhz=1000),
        Wake(deadline_s=LONG_S, instance_id="nobody", sm_clock_mhz=2000),
        Reassign(deadline_s=LONG_S, instance_id="nobody", pool="long"),
        Wake(deadline_s=LONG_S, instance_id="a", sm_clock_mhz=2000),
    ],
    ids=lambda order: f"{type(order).__name__} {order.instance_id}",
)
def test_an_order_for_what_is_not_there_changes_nothing(order):
    arrivals = requests(60, 2.0)
    without, with_it = (play(given_orders, arrivals)[0] for given_orders in ({10.0: []}, {10.0: [order]}))
    assert with_it.total_energy_j() == without.total_energy_j()
    assert sorted(with_it.cluster.instances) == sorted(without.cluster.instances)
