"""Virtual time against the step model, and the pretend cluster: delays, drains, energy of every GPU, determinism."""

import math
from dataclasses import dataclass

import numpy as np
import pytest

from energy.profile import GpuState, StepCoefficients
from pools.classes import RequestClass
from pools.queue import QueueLimits
from pools.scoring import Weights
from simulator.batching import EngineLimits
from simulator.delays import Delays
from simulator.engine import Engine
from simulator.prediction import TrueLengths
from simulator.setup import PoolSetup, SimulationSetup
from simulator.simulation import Simulation, simulate
from simulator.workload.arrivals import Arrivals, recorded
from solver.control import (
    Effects,
    Level,
    Park,
    Reshard,
    Route,
    ScaleIn,
    ScaleOut,
    SetFrequency,
    Tick,
    Wake,
)

BASE = {
    "overhead_s": 0.002,
    "host_s_per_seq": 1e-5,
    "compute_s_per_token": 4e-4,
    "attention_s_per_token2": 4e-9,
    "weights_s": 0.08,
    "kv_s_per_token": 8e-7,
    "communication_s": 0.001,
    "communication_s_per_token": 1e-6,
    "sharpness": 4.0,
    "idle_w": 110.0,
    "active_w": 20.0,
    "compute_w": 400.0,
    "memory_w": 150.0,
    "max_w": 700.0,
}
STATE_W = {GpuState.OFF: 0.0, GpuState.BARE: 70.0, GpuState.LOADED: 110.0, GpuState.PARKED: 80.0}


@dataclass(frozen=True)
class PretendProfile:
    """A profile of few numbers: time falls with TP, power and speed with the clock."""

    kv_tokens_per_gpu: int = 50_000
    name: str = "pretend"
    model: str = "pretend/model"
    gpu: str = "PRETEND"
    tensor_parallel: tuple[int, ...] = (2, 4, 8)
    sm_clocks_mhz: tuple[int, ...] = (1000, 2000)

    def step(self, tp, sm_clock_mhz):
        slower = 2000 / sm_clock_mhz
        values = dict(BASE)
        values["compute_s_per_token"] *= slower / tp
        values["attention_s_per_token2"] *= slower / tp
        values["weights_s"] /= tp
        values["kv_s_per_token"] /= tp
        values["compute_w"] /= slower**2
        return StepCoefficients(**values)

    def kv_capacity_tokens(self, tp):
        return self.kv_tokens_per_gpu * tp

    def idle_power_w(self, state, sm_clock_mhz):
        return STATE_W[state]


class Script:
    """A controller that does what it is told when: {time: actions}. Remembers what it was shown."""

    def __init__(self, orders):
        self.orders = dict(sorted(orders.items()))
        self.seen = []

    def first_tick(self, now_s):
        return Tick(0.0, Level.JOINT)

    def on_tick(self, tick, observation):
        self.seen.append(observation)
        actions = tuple(self.orders.get(tick.at_s, ()))
        later = [at_s for at_s in self.orders if at_s > tick.at_s]
        return Effects(actions, Tick(min(later, default=1e12), Level.JOINT))


def start(name, node=0, tp=8, clock=2000, pool="all", deadline_s=1e9):
    return ScaleOut(deadline_s=deadline_s, instance_id=name, pool=pool, tp=tp, sm_clock_mhz=clock, node=f"n{node}")


def setup_of(nodes=1, pools=(("all", RequestClass.LL),), profile=None, **more):
    return SimulationSetup(
        profile=profile or PretendProfile(),
        nodes=nodes,
        pools=tuple(PoolSetup(*pool) for pool in pools),
        **more,
    )


def requests(n, rate_rps, seed=1, longest_output=300, longest_input=3000):
    rng = np.random.default_rng(seed)
    return Arrivals(
        np.cumsum(rng.exponential(1 / rate_rps, n)),
        rng.integers(1, longest_input, n).astype(np.int32),
        rng.integers(1, longest_output, n).astype(np.int32),
    )


class WithoutGatewayQueue(Simulation):
    """The gateway thinks every instance boundless, so that requests queue in the engine, as in the step model."""

    def _follow_changes(self):
        super()._follow_changes()
        self.world.costs.max_seqs[:] = 1e9
        self.world.costs.kv_capacity_tokens[:] = 1e12
        self.world.load.free_tokens[:] = 1e12


def run(setup, arrivals, orders, seed=0, duration_s=None, kind=Simulation):
    controller = Script(orders)
    workload = recorded("made", arrivals, duration_s)
    simulation = kind(setup, workload, controller, seed)
    simulation.run()
    return simulation, controller


def stepped(profile, tp, arrivals, limits, until_s):
    """The same requests through the step model: TTFT of each, end of each, joules of the instance until ``until_s``."""
    coefficients = profile.step(tp, 2000)
    engine = Engine(limits._replace(kv_blocks=profile.kv_capacity_tokens(tp) // 16), coefficients)
    first_s, end_s = {}, {}
    now_s = energy_j = 0.0
    n = len(arrivals)
    sent = 0
    while len(end_s) < n:
        while sent < n and arrivals.arrival_s[sent] <= now_s:
            engine.submit(sent, int(arrivals.input_tokens[sent]), int(arrivals.output_tokens[sent]), now_s)
            sent += 1
        step = engine.start_step(now_s)
        if step is None:
            idle_s = arrivals.arrival_s[sent] - now_s
            energy_j += idle_s * coefficients.idle_w * tp
            now_s = float(arrivals.arrival_s[sent])
            continue
        now_s += step.duration_s
        energy_j += step.duration_s * step.power_w * tp
        result = engine.finish_step()
        for i in result.emitted:
            first_s.setdefault(i, now_s)
        for i in result.finished:
            end_s[i] = now_s
    energy_j += (until_s - now_s) * coefficients.idle_w * tp
    ttft_s = np.array([first_s[i] - arrivals.arrival_s[i] for i in range(n)])
    return ttft_s, np.array([end_s[i] for i in range(n)]), energy_j


@pytest.mark.parametrize(
    ("rate_rps", "kv_tokens_per_gpu", "max_num_seqs"),
    [
        pytest.param(0.5, 50_000, 256, id="light"),
        pytest.param(6.0, 50_000, 256, id="heavy"),
        pytest.param(6.0, 4_000, 256, id="short of KV cache"),
        pytest.param(6.0, 50_000, 8, id="short of places"),
    ],
)
def test_jumping_is_exact_to_the_step_model_within_one_percent(rate_rps, kv_tokens_per_gpu, max_num_seqs):
    arrivals = requests(300, rate_rps)
    profile = PretendProfile(kv_tokens_per_gpu)
    limits = EngineLimits(0, max_num_seqs)
    # spread 0 and boundless margins: all go to the one engine at once, as in the step model
    setup = setup_of(profile=profile, limits=limits, weights=Weights(0.0, 1e12))
    simulation, _ = run(setup, arrivals, {0.0: [start("a")]}, kind=WithoutGatewayQueue)
    ledger = simulation.world.ledger
    ttft_s, end_s, energy_j = stepped(profile, 8, arrivals, limits, simulation.now_s)

    assert int(ledger.finished.sum()) == 300
    assert sum(simulation.total_energy_j().values()) == pytest.approx(energy_j, rel=0.01)
    counts = ledger.ttft.sum(axis=0)
    jumped = np.repeat([1e-4 * 1.01**b for b in range(len(counts))], counts)
    assert np.sort(ttft_s) == pytest.approx(jumped, rel=0.02)  # buckets are 1 % wide
    tpot = (end_s - ttft_s - arrivals.arrival_s)[arrivals.output_tokens > 1]
    tpot /= (arrivals.output_tokens - 1)[arrivals.output_tokens > 1]
    jumped = np.repeat([1e-4 * 1.01**b for b in range(len(counts))], ledger.tpot.sum(axis=0))
    assert np.sort(tpot) == pytest.approx(jumped, rel=0.02)
    assert int(ledger.tbt.sum()) == int((arrivals.output_tokens - 1).sum())


def test_every_request_is_accounted_for_and_energy_covers_idling():
    setup = setup_of(nodes=2, queue=setup_of().queue)
    simulation, _ = run(
        setup, requests(500, 20.0), {0.0: [start("a"), start("b", 1)], 5.0: [ScaleIn(deadline_s=1e9, instance_id="b")]}
    )
    ledger = simulation.world.ledger
    assert int(ledger.arrived.sum()) == 500 == int(ledger.finished.sum()) + int(ledger.rejected.sum())
    assert int(ledger.input_tokens.sum()) == int(requests(500, 20.0).input_tokens.sum())
    total_j = sum(simulation.total_energy_j().values())
    assert total_j >= 8 * 110.0 * simulation.now_s
    assert all(joules >= 0 for joules in simulation.total_energy_j().values())


def test_one_seed_gives_one_result():
    def once(seed):
        setup = setup_of(nodes=2, prediction=TrueLengths(accuracy=0.7))
        simulation, _ = run(setup, requests(300, 10.0), {0.0: [start("a"), start("b", 1)]}, seed)
        return simulation.total_energy_j(), simulation.world.ledger.window_output.tolist()

    assert once(1) == once(1)
    assert once(1) != once(2)


def test_a_start_takes_its_time_and_its_energy():
    delays = Delays(node_on_s=100.0, start_s=20.0)
    arrivals = Arrivals.of([1.0], [100], [10])
    setup = setup_of(delays=delays, queue=QueueLimits(ttl_s=500.0))
    simulation, _ = run(setup, arrivals, {0.0: [], 10.0: [start("a")]}, duration_s=200.0)
    energy = simulation.total_energy_j()
    assert energy["boot"] == pytest.approx(120.0 * 8 * 110.0)
    assert simulation.world.ledger.ttft.sum() == 1
    assert simulation.world.ledger.within_ttft.sum() == 0  # it waited for the start


def test_a_draining_instance_finishes_what_it_has_and_gets_nothing_new():
    arrivals = Arrivals.of([0.0, 2.0], [100, 100], [400, 5])
    simulation, controller = run(
        setup_of(nodes=2),
        arrivals,
        {
            0.0: [start("a")],
            1.0: [ScaleIn(deadline_s=1e9, instance_id="a"), start("b", 1)],
            1.5: [],
        },
        duration_s=500.0,
    )
    assert controller.seen[-1].cluster.instances.state.tolist().count(2) == 1  # DRAINING
    assert int(simulation.world.ledger.finished.sum()) == 1 + (int(simulation.world.ledger.rejected.sum()) == 0)
    assert list(simulation.cluster.instances) == ["b"]
    assert simulation.cluster.free.tolist() == [8, 0]


def test_a_start_waits_for_room_until_its_deadline():
    orders = {
        0.0: [start("a")],
        1.0: [start("late", deadline_s=2.0), start("b"), ScaleIn(deadline_s=1e9, instance_id="a")],
    }
    arrivals = Arrivals.of([0.5], [100], [400])
    simulation, _ = run(setup_of(delays=Delays(start_s=3.0)), arrivals, orders, duration_s=60.0)
    assert list(simulation.cluster.instances) == ["b"]
    assert simulation.cluster.changes.refused == 1


def test_a_parked_instance_draws_less_and_wakes():
    orders = {
        0.0: [start("a")],
        10.0: [Park(deadline_s=1e9, instance_id="a", sm_clock_mhz=1000)],
        110.0: [Wake(deadline_s=1e9, instance_id="a", sm_clock_mhz=2000)],
    }
    arrivals = Arrivals.of([150.0], [100], [10])
    simulation, _ = run(setup_of(delays=Delays(wake_s=5.0)), arrivals, orders, duration_s=200.0)
    energy = simulation.total_energy_j()
    assert energy["parked"] == pytest.approx(100.0 * 8 * 80.0)
    assert energy["transition"] == pytest.approx(5.0 * 8 * 110.0)
    assert simulation.world.ledger.within_slo.sum() == 1


def test_a_reshard_changes_the_instances_on_the_same_gpus():
    order = Reshard(
        deadline_s=1e9,
        retire=("a",),
        create=(start("b", tp=4), start("c", tp=4)),
    )
    simulation, _ = run(
        setup_of(delays=Delays(reshard_s=30.0)),
        Arrivals.of([60.0], [100], [10]),
        {0.0: [start("a")], 10.0: [order]},
        duration_s=100.0,
    )
    assert sorted(simulation.cluster.instances) == ["b", "c"]
    assert simulation.total_energy_j()["transition"] == pytest.approx(30.0 * 8 * 110.0)


def test_a_clock_change_slows_steps_from_the_next_step_on():
    arrivals = Arrivals.of([0.0], [2000], [200])

    def ttft_after(orders):
        simulation, _ = run(setup_of(delays=Delays(clock_s=0.05)), arrivals, orders, duration_s=60.0)
        return simulation

    fast = ttft_after({0.0: [start("a")]})
    slow = ttft_after({0.0: [start("a", clock=1000)]})
    changed = ttft_after({0.0: [start("a")], 0.001: [SetFrequency(deadline_s=1e9, instance_id="a", sm_clock_mhz=1000)]})
    prefill = [s.total_energy_j()["prefill"] for s in (fast, slow, changed)]
    assert prefill[0] == pytest.approx(prefill[2])  # its prompt was being read already
    assert prefill[0] != pytest.approx(prefill[1])
    decode = [s.total_energy_j()["decode"] for s in (fast, slow, changed)]
    assert decode[1] == pytest.approx(decode[2], rel=0.02)
    assert changed.cluster.instances["a"].sm_clock_mhz == 1000


def test_free_gpus_of_a_node_that_is_on_draw_power_and_a_whole_free_node_is_off():
    simulation, _ = run(setup_of(nodes=2), Arrivals.of([1.0], [10], [2]), {0.0: [start("a", tp=2)]}, duration_s=100.0)
    assert simulation.total_energy_j()["free"] == pytest.approx(6 * 70.0 * 100.0, rel=0.01)
    assert simulation.cluster.gpu_s == pytest.approx(8 * 100.0, rel=0.02)
    all_on = setup_of(nodes=2, empty_nodes_off=False)
    simulation, _ = run(all_on, Arrivals.of([1.0], [10], [2]), {0.0: [start("a", tp=2)]}, duration_s=100.0)
    assert simulation.total_energy_j()["free"] == pytest.approx(14 * 70.0 * 100.0, rel=0.01)


def test_classes_go_to_their_pool_and_to_a_dominating_one_where_it_has_none():
    pools = (("short", RequestClass.SS), ("long", RequestClass.LL))
    arrivals = Arrivals.of([1.0, 2.0, 3.0], [100, 100, 2000], [10, 500, 500])
    orders = {
        0.0: [start("s", 0, pool="short"), start("l", 1, pool="long")],
        10.0: [],
    }
    _, controller = run(setup_of(nodes=2, pools=pools), arrivals, orders, duration_s=20.0)
    last = controller.seen[-1].cluster.instances
    given = dict(zip(last.ids, (last.class_rate_rps * 10.0).round().astype(int).tolist(), strict=True))
    assert given["s"][RequestClass.SS] == 1
    assert given["l"][RequestClass.SL] == 1
    assert given["l"][RequestClass.LL] == 1


def test_a_plan_s_shares_split_a_class_between_pools():
    pools = (("a", RequestClass.LL), ("b", RequestClass.LL))
    share = np.zeros((9, 2))
    share[:] = (0.25, 0.75)
    route = Route(deadline_s=1e9, pools=("a", "b"), pool_share=share)
    arrivals = Arrivals.of(np.arange(1, 41) * 2.0, [100] * 40, [5] * 40)
    orders = {0.0: [start("x", 0, pool="a"), start("y", 1, pool="b"), route], 90.0: []}
    _, controller = run(setup_of(nodes=2, pools=pools), arrivals, orders, duration_s=100.0)
    last = controller.seen[-1].cluster.instances
    given = dict(zip(last.ids, (last.class_rate_rps.sum(axis=1) * 90.0).round().tolist(), strict=True))
    assert given == {"x": 10.0, "y": 30.0}


def test_a_controller_is_shown_demand_load_slack_and_power():
    arrivals = requests(200, 20.0)
    orders = {0.0: [start("a")], 5.0: [], 9.0: []}
    _, controller = run(setup_of(), arrivals, orders)
    first, second, third = controller.seen
    assert first.demand.requests.sum() == 200  # primed with what is to come
    assert second.demand.window_s == pytest.approx(5.0)
    assert second.demand.requests.sum() == int((arrivals.arrival_s <= 5.0).sum())
    assert third.demand.requests.sum() == int(((arrivals.arrival_s > 5.0) & (arrivals.arrival_s <= 9.0)).sum())
    views = second.cluster.instances
    assert views.running[0] > 0
    assert views.context_tokens[0] > 0
    assert 110.0 * 8 < views.power_w[0] < 700.0 * 8
    assert math.isfinite(views.slo_slack[0])


def test_mispredicted_lengths_are_routed_by_the_prediction_and_judged_by_the_truth():
    arrivals = Arrivals.of(np.arange(1, 201) * 0.5, [100] * 200, [10] * 200)
    setup = setup_of(prediction=TrueLengths(accuracy=0.6))
    simulation, controller = run(setup, arrivals, {0.0: [start("a")], 110.0: []}, duration_s=120.0)
    assert simulation.world.ledger.finished[RequestClass.SS] == 200
    routed = controller.seen[-1].demand.requests
    assert 20 < routed[RequestClass.SM] < 140
    assert routed[RequestClass.SS] + routed[RequestClass.SM] == 200


def test_the_result_says_what_is_documented():
    arrivals = requests(100, 5.0)
    result = simulate(
        setup_of(sample_s=5.0),
        recorded("made", arrivals),
        Script({0.0: [start("a")]}),
        "scripted",
        grid_g_per_kwh=lambda at_s: 500.0,
        gpu_usd_per_hour=2.0,
    )
    report = result.as_json()
    assert report["policy"] == "scripted"
    assert report["requests"] == 100 == report["finished"]
    assert report["co2_g"] == pytest.approx(report["energy_wh"] / 1000 * 500, rel=0.01)
    assert report["cost_usd"] == pytest.approx(report["gpu_hours"] * 2.0)
    assert (result.series.power_w * np.diff(result.series.at_s, prepend=0.0)).sum() == pytest.approx(result.energy_j)
    assert set(report["ttft_p99_s"]) <= {c.name for c in RequestClass} | {"all"}
    assert report["reconfigurations"] == 1


def test_ten_thousand_gpus_of_small_instances_are_all_there_and_all_reshard():
    nodes, smalls = 1250, 4
    names = [[f"{node}-{k}" for k in range(smalls)] for node in range(nodes)]
    begun = [start(name, node, tp=2) for node in range(nodes) for name in names[node]]
    reshards = [
        Reshard(deadline_s=1e9, retire=tuple(names[node]), create=(start(f"{node}-whole", node),))
        for node in range(nodes)
    ]
    arrivals = requests(20_000, rate_rps=500.0, longest_output=30)
    simulation, controller = run(
        setup_of(nodes, delays=Delays(reshard_s=5.0)), arrivals, {0.0: begun, 20.0: reshards, 35.0: []}, duration_s=60.0
    )
    before, after = (controller.seen[k].cluster.instances for k in (1, 2))
    assert (len(before), set(before.tp)) == (nodes * smalls, {2})
    assert (len(after), set(after.tp)) == (nodes, {8})
    assert int(simulation.world.ledger.finished.sum()) == 20_000
    assert simulation.cluster.changes.reshard == nodes
