"""Shadows fed as requests become known end where a simulation of the whole trace does."""

import numpy as np
import pytest

from energy.adapters.capacity_file import load_capacity
from energy.adapters.catalogue import load_profile
from pools.classes import RequestClass
from simulator.running import RunningCluster, RunningInstance
from simulator.setup import PoolSetup, SimulationSetup
from simulator.shadow import Shadows
from simulator.simulation import Simulation
from simulator.workload.arrivals import Arrivals, Workload
from solver.controllers import ControlSettings, PlanningController
from solver.policies import policies

PROFILE = load_profile("llama-3.1-70b-fp8-h100")
DURATION_S = 240.0


def world(policy: str | None):
    setup = SimulationSetup(PROFILE, 2, (PoolSetup("all", RequestClass.LL),), empty_nodes_off=False)
    controller = None
    if policy is not None:
        packing = policies(8, PROFILE.sm_clocks_mhz[-1])[policy]
        table = {PROFILE.model: load_capacity(PROFILE.name)}
        controller = PlanningController(packing, table, packing.pools(PROFILE.model), ControlSettings(history_s=30.0))
    full = [RunningInstance(f"i{n}", "all", 8, PROFILE.sm_clocks_mhz[-1], f"n{n}") for n in range(2)]
    return setup, RunningCluster(full, controller, 5.0)


@pytest.fixture(scope="module")
def requests() -> Arrivals:
    rng = np.random.default_rng(5)
    n = 700
    at_s = np.sort(rng.uniform(0.0, DURATION_S, n))
    inputs, outputs = rng.lognormal(6.0, 1.0, n).clip(10, 5000), rng.lognormal(4.5, 0.8, n).clip(2, 600)
    return Arrivals(at_s, inputs.astype(np.int32), outputs.astype(np.int32))


@pytest.mark.parametrize("policy", [None, "packing"])
def test_piece_by_piece_is_as_at_once(policy, requests):
    setup, controller = world(policy)
    at_once = Simulation(setup, Workload("w", DURATION_S, 700.0, lambda: iter([requests])), controller, 0)
    at_once.begin()
    at_once.advance(DURATION_S)
    expected_j = sum(at_once.total_energy_j().values())

    shadows = Shadows({"it": lambda: world(policy)})
    known_s, energy_j = 0.0, []
    for until_s in np.cumsum(np.random.default_rng(6).uniform(0.5, 25.0, 30)).clip(max=DURATION_S):
        rows = (requests.arrival_s > known_s) & (requests.arrival_s <= until_s)
        energy_j.append(shadows.follow(requests.at(rows), float(until_s))["it"])
        known_s = until_s
    assert known_s == DURATION_S
    assert energy_j == sorted(energy_j)
    assert energy_j[-1] == pytest.approx(expected_j, rel=1e-6)


def test_what_is_told_too_late_is_refused(requests):
    shadows = Shadows({"it": lambda: world(None)})
    shadows.follow(requests.at(slice(0)), 100.0)
    with pytest.raises(ValueError, match=r"comes after 100\.0 s were simulated"):
        shadows.follow(requests, 200.0)


def test_an_idle_cluster_draws_its_idle_power():
    shadows = Shadows({"it": lambda: world(None)})
    nothing = Arrivals.of((), (), ())
    first_j, second_j = (shadows.follow(nothing, until_s)["it"] for until_s in (50.0, 100.0))
    assert second_j == pytest.approx(2.0 * first_j)
    assert first_j > 0.0
