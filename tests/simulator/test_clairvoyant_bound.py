"""No policy, however loose its deadlines, comes below the clairvoyant's bound."""

import numpy as np
import pytest

from energy.adapters.capacity_file import load_capacity
from energy.adapters.catalogue import load_profile
from pools.classes import ClassSlos
from simulator.batching import EngineLimits
from simulator.experiment import Scenario, bounds, prepare
from simulator.prediction import TrueLengths
from simulator.simulation import simulate
from simulator.workload.adapters.published import published
from simulator.workload.arrivals import Arrivals, recorded
from simulator.workload.generated import poisson
from solver.policies import POLICY_NAMES

NAME = "llama-3.1-70b-fp8-h100"
PROFILE, CAPACITY = load_profile(NAME), load_capacity(NAME)


def scenario(**more):
    return Scenario(PROFILE, CAPACITY, 2, prediction=TrueLengths(), limits=EngineLimits(0), **more)


def energy_j(world, policy, workload):
    setup, controller = prepare(world, policy, workload)
    return sum(simulate(setup, workload, controller, policy, 3).energy_by_kind_j.values())


@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_no_policy_is_below_the_bound(policy):
    workload = poisson(12.0, 240.0, published("synthetic-conv").lengths(), 5, "small")
    least_j = bounds(scenario(), workload).least_j
    assert 0.0 < least_j <= energy_j(scenario(), policy, workload)


def test_not_even_a_cluster_that_is_full_all_the_time_and_may_be_as_late_as_it_likes():
    """Everything is there at once and nobody is promised anything: engines run at their fullest batches."""
    rng = np.random.default_rng(4)
    n = 4000
    arrivals = Arrivals.of([0.0] * n, rng.integers(200, 3000, n), rng.integers(50, 400, n))
    workload = recorded("flood", arrivals)
    patient = scenario(slos=ClassSlos(ttft_s=(1e4, 1e4, 1e4), tbt_s=10.0))
    least_j = bounds(patient, workload).least_j
    reached_j = energy_j(patient, "single-pool", workload)
    assert least_j <= reached_j
    assert least_j > 0.25 * reached_j  # and it says something: TP8 at the highest clock needs twice as much and more


def test_relaxed_plans_need_more_than_the_bound():
    workload = poisson(12.0, 240.0, published("synthetic-conv").lengths(), 5, "small")
    found = bounds(scenario(), workload)
    assert found.least_j < found.plan_j
