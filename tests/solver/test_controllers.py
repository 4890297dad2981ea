from dataclasses import replace

import numpy as np
import pytest
from small_tables import CLOCKS, TPS, cluster, demand, table, views

from pools.classes import RequestClass
from pools.instances import InstanceState
from solver.control import (
    ClusterState,
    Escalate,
    Escalation,
    Level,
    Observation,
    Reassign,
    Reshard,
    Route,
    ScaleIn,
    ScaleOut,
    SetFrequency,
    Tick,
)
from solver.controllers import ControlSettings, PlanningController
from solver.forecast import Forecast, KnownForecaster
from solver.planner import ChangeCosts, ClusterCosts, PlanLimits
from solver.policies import POLICY_NAMES, policies
from solver.problem import PlanSolution, SolveStatus

MIX = np.array([0.14, 0.18, 0.01, 0.05, 0.06, 0.22, 0.14, 0.09, 0.11])
POLICIES = policies(TPS[-1], CLOCKS[-1])


class World:
    """A driver with a cluster that carries orders out after ``start_s``; every instance is given its even part."""

    def __init__(self, policy, nodes=6, start_s=60.0, settings=None, **more):
        self.policy = POLICIES[policy]
        self.pools = self.policy.pools("m")
        self.controller = PlanningController(self.policy, {"m": table()}, self.pools, settings, **more)
        self.names = [p.name for p in self.pools]
        self.nodes, self.start_s = nodes, start_s
        self.rows, self.now_s, self.tick, self.log = {}, 0.0, None, []
        self.share = None

    def state(self, rate):
        for row in self.rows.values():
            if row["state"] is InstanceState.STARTING and row["ready_at"] <= self.now_s:
                row["state"] = InstanceState.READY
        serving = [r for r in self.rows.values() if r["state"] is InstanceState.READY]
        for row in serving:
            row["rate"] = {}
        for k in range(9):
            for p in range(len(self.pools)):
                part = rate[k] * (self.share[k, p] if self.share is not None else 0.0)
                members = [r for r in serving if r["pool"] == p]
                for row in members:
                    row["rate"][k] = part * row["tp"] / sum(r["tp"] for r in members)
        return cluster(list(self.rows.values()), self.pools, nodes=self.nodes, at_s=self.now_s)

    def step(self, rate):
        before_s, first = self.now_s, self.tick is None
        tick = self.controller.first_tick(0.0) if first else self.tick
        self.now_s = tick.at_s
        window_s = 60.0 if first else self.now_s - before_s
        state = self.state(rate)
        effects = self.controller.on_tick(
            tick, Observation(self.now_s, state, demand(np.asarray(rate) * window_s, window_s))
        )
        assert effects.next_tick.at_s > self.now_s
        self.tick = effects.next_tick
        for action in effects.actions:
            self.apply(action, 0.0 if first else self.start_s)
        self.log.append((self.now_s, effects))
        return effects

    def run(self, rate, until_s):
        while self.tick is None or self.tick.at_s <= until_s:
            self.step(rate)
        return self

    def apply(self, action, start_s):
        match action:
            case ScaleOut():
                self.start(action, start_s)
            case ScaleIn():
                self.rows.pop(action.instance_id, None)
            case Reassign():
                self.rows[action.instance_id]["pool"] = self.names.index(action.pool)
            case SetFrequency():
                if action.instance_id in self.rows:
                    self.rows[action.instance_id]["clock"] = action.sm_clock_mhz
            case Reshard():
                for name in action.retire:
                    self.rows.pop(name, None)
                for order in action.create:
                    self.start(order, start_s)
            case Route():
                self.share = action.pool_share

    def start(self, order, start_s):
        node = int(order.node[1:])
        if sum(r["tp"] for r in self.rows.values() if r["node"] == node) + order.tp > 8:
            return
        self.rows[order.instance_id] = {
            "id": order.instance_id,
            "pool": self.names.index(order.pool),
            "tp": order.tp,
            "node": node,
            "clock": order.sm_clock_mhz,
            "state": InstanceState.READY if start_s == 0.0 else InstanceState.STARTING,
            "ready_at": self.now_s + start_s,
        }

    def gpus(self):
        return sum(row["tp"] for row in self.rows.values())

    def actions(self, kind):
        return [(at_s, a) for at_s, effects in self.log for a in effects.actions if isinstance(a, kind)]


def peak(total):
    return Forecast(total * MIX, total * MIX * 1.05)


def world(name, **more):
    provision = {"provision": peak(30.0)} if POLICIES[name].static else {}
    return World(name, **provision, **more)


@pytest.mark.parametrize("name", POLICY_NAMES)
def test_every_policy_serves_every_class_and_settles(name):
    w = world(name, nodes=20).run(20.0 * MIX, 900.0)
    assert w.rows
    served = {w.pools[row["pool"]].request_class for row in w.rows.values()}
    assert np.allclose(w.share.sum(axis=1), 1.0)
    assert RequestClass.LL in served  # which any class may use
    used = np.bincount([r["node"] for r in w.rows.values()], [r["tp"] for r in w.rows.values()])
    assert np.all(used <= 8)
    late = [a for at_s, a in w.actions((ScaleOut, ScaleIn, Reshard)) if at_s > 700.0]
    assert not late  # nothing goes to and fro under a steady load


def test_static_policies_provide_for_the_peak_once():
    w = world("single-pool").run(5.0 * MIX, 600.0)
    assert {row["tp"] for row in w.rows.values()} == {8}
    assert {row["clock"] for row in w.rows.values()} == {1980}
    assert all(at_s == 0.0 for at_s, _ in w.actions(ScaleOut))
    assert not w.actions(SetFrequency)
    with pytest.raises(ValueError, match="pass provision"):
        PlanningController(POLICIES["single-pool"], {"m": table()}, POLICIES["single-pool"].pools("m"))


def test_scale_freq_moves_clocks_and_nothing_else():
    w = world("scale-freq", nodes=20).run(5.0 * MIX, 300.0)
    assert w.actions(SetFrequency)
    assert not [a for at_s, a in w.actions((ScaleOut, ScaleIn, Reshard)) if at_s > 0.0]


def given_instances(tps=(8, 4, 8)):
    """A cluster that somebody else has provided: some instances for each pool, which share its classes evenly."""
    w = World("scale-freq")
    for p in range(len(w.names)):
        for tp in tps:
            instance_id = f"i-{len(w.rows)}"
            w.rows[instance_id] = {"id": instance_id, "pool": p, "tp": tp, "node": 0, "clock": 1980}
            w.rows[instance_id] |= {"state": InstanceState.READY, "ready_at": 0.0}
    w.share = np.eye(9)
    return w


def test_scale_freq_without_a_provision_takes_the_instances_as_they_are():
    w = given_instances().run(2.0 * MIX, 300.0)
    low = np.mean([row["clock"] for row in w.rows.values()])
    w.run(60.0 * MIX, 600.0)
    high = np.mean([row["clock"] for row in w.rows.values()])
    w.run(0.0 * MIX, 900.0)
    assert low < high <= 1980
    assert np.mean([row["clock"] for row in w.rows.values()]) <= low
    assert {type(a) for _, effects in w.log for a in effects.actions} <= {SetFrequency, Escalate}
    assert w.controller.plan is None
    assert any(note.topic == "plan" and "given" in note.why for _, effects in w.log for note in effects.diagnostics)


@pytest.mark.parametrize("name", ["single-pool", "multi-pool", "scale-shard"])
def test_whoever_turns_more_than_clocks_or_nothing_needs_a_peak_to_provide_for(name):
    with pytest.raises(ValueError, match="pass provision"):
        World(name)


def test_scale_shard_keeps_the_gpus_of_each_pool():
    w = world("scale-shard", nodes=20).run(10.0 * MIX, 0.0)
    before, given = w.gpus(), {name: w.controller.plan.gpus(name) for name in w.names}
    assert sum(given.values()) == before
    while w.now_s < 1200.0:
        w.step(25.0 * MIX)
        assert {name: w.controller.plan.gpus(name) for name in w.names} == given
        under_way = any(row["state"] is InstanceState.STARTING for row in w.rows.values())
        changed = any(isinstance(a, (ScaleOut, ScaleIn, Reshard)) for a in w.log[-1][1].actions)
        # the new TP starts where GPUs are free before the old one goes: more, but only while that lasts
        assert w.gpus() == before or under_way or changed
    assert w.actions(ScaleOut)
    assert w.gpus() == before


def test_it_follows_the_load_up_and_down_and_pays_for_no_change_in_between():
    w = world("dynamollm")
    w.run(8.0 * MIX, 300.0)
    low = w.gpus()
    w.run(40.0 * MIX, 600.0)
    high = w.gpus()
    assert high > low
    w.run(8.0 * MIX, 1500.0)
    assert w.gpus() < high


def seen(controller, start_s):
    empty = demand(np.zeros(9))
    controller.on_tick(Tick(0.0, Level.INSTANCE), Observation(0.0, cluster([], controller._pools, 6), empty, start_s))
    return controller._planner.changes, controller._lead_s


def test_starts_cost_what_they_were_seen_to_take_and_plans_look_that_far_ahead():
    settings = ControlSettings(changes=ChangeCosts(start_s=60.0, reshard_s=60.0), lead_s=60.0)
    controller = world("dynamollm", settings=settings).controller
    assert seen(controller, float("nan")) == (settings.changes, 60.0)
    changes, lead_s = seen(controller, 200.0)
    assert (changes.start_s, changes.reshard_s, lead_s) == (200.0, 200.0, 200.0)
    assert changes.drain_s == settings.changes.drain_s
    changes, lead_s = seen(controller, 5.0)
    assert (changes.start_s, lead_s) == (5.0, 5.0)


def test_a_reshard_that_is_no_start_keeps_its_own_time():
    assert ChangeCosts(start_s=60.0, reshard_s=0.1).with_start(90.0) == ChangeCosts(start_s=90.0, reshard_s=0.1)


def test_dear_starts_make_fewer_changes():
    def orders(start_s):
        w = world("dynamollm", settings=ControlSettings(changes=ChangeCosts(dwell_s=60.0), lead_s=60.0))
        rates = [8.0, 12.0, 6.0, 14.0, 7.0, 11.0]
        on_tick = w.controller.on_tick
        w.controller.on_tick = lambda tick, observation: on_tick(tick, replace(observation, start_s=start_s))
        for number, rate in enumerate(rates, 1):
            w.run(rate * MIX, 600.0 * number)
        return len(w.actions(ScaleOut)) + len(w.actions(Reshard))

    assert orders(600.0) < orders(2.0)


def test_a_surge_makes_a_plan_before_its_time():
    w = world("dynamollm").run(5.0 * MIX, 300.0)
    planned_s = [at_s for at_s, e in w.log for d in e.diagnostics if d.topic == "plan"]
    w.run(60.0 * MIX, 340.0)
    surged_s = [at_s for at_s, e in w.log for d in e.diagnostics if d.topic == "plan" and at_s > planned_s[-1]]
    assert surged_s
    assert surged_s[0] - planned_s[-1] < POLICIES["dynamollm"].periods.joint_s


def test_a_crashed_instance_is_replaced_without_a_new_plan():
    w = world("dynamollm").run(10.0 * MIX, 300.0)
    gone = next(iter(w.rows))
    tp = w.rows.pop(gone)["tp"]
    effects = w.step(10.0 * MIX)
    starts = [a for a in effects.actions if isinstance(a, ScaleOut)]
    assert [s.tp for s in starts] == [tp]
    assert starts[0].instance_id != gone


def test_levels_come_at_their_periods():
    w = world("dynamollm-paper", nodes=20).run(10.0 * MIX, 3700.0)
    ticks = [(0.0, w.controller.first_tick(0.0).levels)]
    ticks += [(e.next_tick.at_s, e.next_tick.levels) for _, e in w.log]
    cluster_s = [at_s for at_s, levels in ticks if levels & Level.CLUSTER and at_s <= 3600.0]
    pool_s = [at_s for at_s, levels in ticks if levels & Level.POOL and at_s <= 3600.0]
    assert cluster_s == [0.0, 1800.0, 3600.0]
    assert pool_s == [300.0 * n for n in range(13)]


def test_more_demand_than_the_cluster_can_carry_is_served_as_far_as_it_goes_and_said():
    w = world("dynamollm", nodes=1)
    effects = w.step(200.0 * MIX)
    note = next(d for d in effects.diagnostics if d.topic == "plan")
    assert "cannot carry the forecast (nodes[" in note.why
    assert 0.0 < note.numbers["served"] < 1.0
    assert w.gpus() == 8


def test_where_the_milp_finds_nothing_greedy_does_and_says_so():
    w = world("dynamollm").run(10.0 * MIX, 120.0)
    before = w.controller.plan
    nothing = PlanSolution(SolveStatus.NONE, reason="no plan within 1 branch nodes")
    w.controller._planner._solver = lambda problem, limits: nothing
    w.run(20.0 * MIX, 200.0)
    notes = [d.why for _, e in w.log for d in e.diagnostics if d.topic == "plan"]
    assert any("greedy, because no plan within 1 branch nodes" in why for why in notes)
    assert w.controller.plan.supersedes(before)  # greedy found one


def test_where_nothing_finds_a_plan_the_last_one_stays():
    w = world("dynamollm").run(10.0 * MIX, 120.0)
    before = w.controller.plan
    nowhere = np.full_like(w.controller.candidates.work, np.inf)
    w.controller._planner.candidates = replace(w.controller.candidates, work=nowhere)
    w.run(20.0 * MIX, 200.0)
    assert w.controller.plan is before
    assert any("the last plan stays" in d.why for _, e in w.log for d in e.diagnostics)


def test_every_plan_explains_itself():
    w = world("dynamollm").run(10.0 * MIX, 120.0)
    notes = [d for _, e in w.log for d in e.diagnostics if d.topic == "plan"]
    assert notes[0].why
    for key in ("forecast_rps", "observed_rps", "power_w", "gap", "solve_s"):
        assert np.isfinite(notes[0].numbers[key])


def test_the_same_observations_give_the_same_actions():
    one, two = (world("dynamollm").run(15.0 * MIX, 600.0) for _ in range(2))
    assert [e.actions for _, e in one.log if not any(isinstance(a, Route) for a in e.actions)] == [
        e.actions for _, e in two.log if not any(isinstance(a, Route) for a in e.actions)
    ]


def test_an_instance_in_trouble_at_the_top_climbs_the_ladder():
    w = world("single-pool").run(5.0 * MIX, 60.0)
    rows = [{**row, "slack": -0.5, "waiting": 9.0} for row in w.rows.values()]
    measures = []
    for _ in range(4):
        state = ClusterState(w.now_s, tuple(w.names), ("n0",), np.array([8]), np.ones(1, dtype=bool), views(rows))
        tick = Tick(w.now_s, Level.INSTANCE)
        effects = w.controller.on_tick(tick, Observation(w.now_s, state, demand(np.zeros(9))))
        measures.append({a.measure for a in effects.actions if isinstance(a, Escalate)})
    assert measures[0] == {Escalation.REORDER}
    assert measures[-1] == {Escalation.RESTEER}  # squash only where it is allowed


def test_a_known_forecast_and_a_power_budget_are_kept_to():
    known = KnownForecaster(lambda now_s, horizon_s: peak(20.0))
    free = world("dynamollm", forecaster=known).run(20.0 * MIX, 60.0)
    settings = ControlSettings(
        cluster_costs=ClusterCosts(power_budget_w=0.8 * free.controller.plan.power_w),
        limits=PlanLimits(unserved_w_per_rps=1e5),
    )
    bound = world("dynamollm", forecaster=known, settings=settings).run(20.0 * MIX, 60.0)
    assert bound.controller.plan.power_w <= 0.8 * free.controller.plan.power_w * (1 + 1e-6)


def planned_at(world):
    return [at_s for at_s, effects in world.log if any(d.topic == "plan" for d in effects.diagnostics)]


@pytest.mark.parametrize("policy", ["dynamollm", "dynamollm-paper"])
def test_nothing_is_planned_before_enough_traffic_was_seen(policy):
    world = World(policy, settings=ControlSettings(history_s=120.0))
    world.run(np.zeros(9), 300.0)
    assert planned_at(world) == []
    assert len(world.log) > 50, "it looks every few seconds meanwhile"
    world.run(20.0 * MIX, 500.0)
    first_s = planned_at(world)[0]
    assert 300.0 + 120.0 - 5.0 <= first_s <= 300.0 + 120.0 + 5.0
    assert world.rows


def test_a_cluster_without_traffic_is_planned_for_after_a_cluster_period():
    world = World("dynamollm", settings=ControlSettings(history_s=120.0)).run(np.zeros(9), 2000.0)
    assert planned_at(world)[0] == pytest.approx(1800.0, abs=5.0)


def test_without_history_to_wait_for_the_first_tick_plans():
    world = World("dynamollm").run(20.0 * MIX, 10.0)
    assert planned_at(world)[0] == 0.0


@pytest.mark.parametrize(("away_s", "plans"), [(30.0, True), (86_400.0, False)])
def test_load_recalled_from_before_a_short_break_is_a_warm_up_and_from_a_day_ago_it_is_none(away_s, plans):
    w = World("dynamollm", settings=ControlSettings(history_s=120.0))
    for n in range(60):
        w.controller.recall(5.0 * n - 295.0 - away_s, demand(100.0 * MIX, 5.0))
    w.run(0.0 * MIX, 60.0)
    assert bool(w.actions(ScaleOut)) == plans
