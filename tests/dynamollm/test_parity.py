"""One trace through the simulator and through the live cluster: the same decisions, tick by tick.

The live side is all of `dynamollm serve` but its processes: the real gateway, operations and control loop over emulated
instances that step one token at a time, in virtual time. The other is `dynamollm.twin` in the simulator's compiled
loop. Not compared: what docs/live-control.md lists.
"""

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from virtual_cluster import Recorded, Served, serve_virtually

from dynamollm.adapters.configuration import load
from dynamollm.controller_recipe import controller_recipe
from dynamollm.settings import NodeSettings, Settings
from dynamollm.shadow_wiring import ShadowWorld
from dynamollm.twin import twin
from energy.adapters.catalogue import load_profile
from simulator.simulation import Simulation
from simulator.virtual_loop import run
from simulator.workload.arrivals import Arrivals, Workload
from solver.control import Action, Effects, ScaleOut

RATES_RPS = [1.0] * 50 + [7.0] * 50 + [1.5] * 50  # quiet, a surge that wants more instances, quiet again
DURATION_S = float(len(RATES_RPS))


def cluster() -> Settings:
    """The built-in cluster, its nodes named as the simulator's; no start ends and no queue is looked at at a tick."""
    settings = load(None, {})
    nodes = tuple(NodeSettings(f"n{index}", "H100-SXM", 8) for index in range(4))
    driver = replace(settings.driver, startup_s=18.0)
    return replace(settings, nodes=nodes, driver=driver, controller=replace(settings.controller, warm_up_s=30.0))


def surge() -> Arrivals:
    rng = np.random.default_rng(3)
    second = np.repeat(np.arange(len(RATES_RPS)), rng.poisson(RATES_RPS))
    n = len(second)
    inputs = np.clip(rng.lognormal(6.3, 1.0, n), 16, 6000).astype(np.int32)
    outputs = np.clip(rng.lognormal(4.4, 0.8, n), 8, 500).astype(np.int32)
    return Arrivals(np.sort(second + rng.uniform(0.0, 1.0, n)), inputs, outputs)


def simulated(settings: Settings, requests: Arrivals) -> tuple[Simulation, Recorded]:
    recorded = Recorded(controller_recipe(settings)(1))
    setup, controller = twin(settings, load_profile(settings.models[0].profile), recorded)
    simulation = Simulation(setup, Workload("surge", DURATION_S, len(requests), lambda: [requests]), controller, 0)
    simulation.run()
    return simulation, recorded


@pytest.fixture(scope="module")
def both() -> tuple[Served, Simulation, Recorded]:
    settings, requests = cluster(), surge()
    served = run(serve_virtually(settings, requests, DURATION_S, shadowed=True))
    return served, *simulated(settings, requests)


def told(action: Action, now_s: float) -> dict[str, Any]:
    """Every field of an action, moments relative to its tick."""
    values: dict[str, Any] = {"kind": type(action).__name__}
    for field in fields(action):
        value = getattr(action, field.name)
        if field.name in ("deadline_s", "not_before_s"):
            value = round(value - now_s, 3)
        elif field.name == "pool_share":
            value = np.round(value, 6).tolist()
        elif field.name == "create":
            value = [told(order, now_s) for order in value]
        values[field.name] = value
    return values


def decisions(ticks: list[tuple[Any, Effects]], began_s: float) -> list[tuple[float, list[dict[str, Any]]]]:
    return [
        (round(o.now_s - began_s, 3), [told(a, o.now_s) for a in e.actions])
        for o, e in ticks
        if o.now_s < began_s + DURATION_S - 1.0
    ]


def test_the_same_trace_makes_the_same_decisions_tick_by_tick(both):
    served, _, recorded = both
    live = decisions(served.recorded.ticks, served.began_s)
    virtual = decisions(recorded.ticks, 0.0)
    assert [at_s for at_s, _ in live] == [at_s for at_s, _ in virtual]
    for (at_s, ours), (_, theirs) in zip(live, virtual, strict=True):
        assert ours == theirs, f"at {at_s} s"
    kinds = {action["kind"] for _, actions in live for action in actions}
    assert {"Reassign", "ScaleIn", "ScaleOut", "SetFrequency", "Route"} <= kinds
    assert ScaleOut.__name__ in kinds


def test_what_the_controller_is_shown_is_the_same(both):
    served, _, recorded = both
    for (live, _), (virtual, _) in zip(served.recorded.ticks, recorded.ticks, strict=False):
        at_s = virtual.now_s
        if at_s >= DURATION_S - 1.0:
            break
        assert live.demand.window_s == pytest.approx(virtual.demand.window_s), at_s
        assert np.array_equal(live.demand.requests, virtual.demand.requests), at_s
        assert np.array_equal(live.demand.input_tokens, virtual.demand.input_tokens), at_s
        assert np.array_equal(live.demand.queued, virtual.demand.queued), at_s
        ours, theirs = live.cluster.instances, virtual.cluster.instances
        assert ours.ids == theirs.ids, at_s
        for name in ("pool", "node", "tp", "state", "sm_clock_mhz"):
            assert np.array_equal(getattr(ours, name), getattr(theirs, name)), (at_s, name)
        assert np.allclose(ours.class_rate_rps, theirs.class_rate_rps), at_s
        # the live gateway looks at its queue every 50 ms, the simulator also when an instance has come
        assert np.allclose(ours.slo_slack, theirs.slo_slack, atol=0.05 / 0.4, equal_nan=True), at_s


def test_energy_and_attainment_are_the_same(both):
    served, simulation, _ = both
    assert set(served.statuses) == {200}
    ledger = simulation.world.ledger
    assert len(served.outcomes) == ledger.finished.sum() == ledger.arrived.sum()
    assert served.energy_j == pytest.approx(sum(simulation.total_energy_j().values()), rel=0.01)
    attained = np.mean([within_slo(outcome) for outcome in served.outcomes])
    assert attained == pytest.approx(ledger.within_slo.sum() / ledger.arrived.sum(), abs=0.01)
    assert 0.5 < attained < 1.0, "a trace that strains nothing shows little"


def test_live_shadows_agree_with_a_simulation_of_the_whole_trace(both):
    served, settings, requests = both[0], cluster(), surge()
    comparisons = {c.policy: c for c in served.application.counterfactual.comparisons}
    assert set(comparisons) == {"single-pool", "packing"}
    for policy, comparison in comparisons.items():
        assert comparison.seconds > 0.9 * DURATION_S
        setup, controller = ShadowWorld(settings, policy)()
        whole = Simulation(setup, Workload("w", DURATION_S, 1.0, lambda: iter([requests])), controller, 0)
        whole.begin()
        whole.advance(comparison.seconds)
        assert comparison.energy_j == pytest.approx(sum(whole.total_energy_j().values()), rel=0.05), policy
        assert comparison.band_j < 0.02 * comparison.energy_j, "the own shadow meets the meters"
    single = comparisons["single-pool"]
    assert single.saved_j > 0.2 * single.energy_j
    assert single.metered_j == pytest.approx(served.energy_j, rel=0.1)


def within_slo(outcome: Any) -> bool:
    request = outcome.request
    gaps = max(outcome.completion_tokens - 1, 1)
    in_ttft = outcome.first_token_s - request.arrival_s <= request.slo.ttft_s
    return bool(in_ttft and (outcome.ended_s - outcome.first_token_s) / gaps <= request.slo.tbt_s)
