"""Several gateways compared with one: every request accounted for, the same each time, and it tells them apart."""

import json

import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks.several_gateways import Mode, World, compare, main, modes, poisson
from energy.adapters.catalogue import load_profile

PROFILE = "llama-3.1-70b-fp8-h100"


@pytest.fixture(scope="module")
def profile():
    return load_profile(PROFILE)


def test_every_request_ends_and_nothing_is_left_on_the_instances(profile):
    arrivals = poisson(10.0, 4.0, seed=1)
    for mode in modes(3):
        world = World(mode, profile, 4, 4, seed=1)
        outcome = world.run(arrivals)
        ended = sum(flight.end_s == flight.end_s for flight in world.flights.values())
        assert ended + outcome.rejected == outcome.requests == len(arrivals), mode
        assert all(engine.running == engine.waiting == 0 for engine in world.engines)
        assert all(not router.fleet.flights for router in world.routers)
        assert outcome.ttft_p50_s > 0.0


def test_it_is_the_same_each_time(profile):
    arrivals = poisson(10.0, 3.0, seed=2)
    mode = Mode("hear each other", 3, 0.25)
    assert compare(profile, [mode], arrivals, 4, 4, 5) == compare(profile, [mode], arrivals, 4, 4, 5)


def test_one_gateway_hears_nothing_new(profile):
    arrivals = poisson(10.0, 3.0, seed=3)
    alone, hearing = compare(profile, [Mode("one", 1, None), Mode("one", 1, 0.05)], arrivals, 4, 4, 0)
    assert (alone.ttft_p99_s, alone.energy_j) == (hearing.ttft_p99_s, hearing.energy_j)


def test_gateways_that_hear_nothing_keep_fewer_slos_than_those_that_hear(profile):
    arrivals = poisson(20.0, 8.0, seed=4)
    hearing, deaf = compare(profile, [Mode("h", 4, 0.05), Mode("n", 4, None)], arrivals, 16, 4, 0)
    assert hearing.within_slo > deaf.within_slo


def test_arrivals_come_at_the_rate_asked_for():
    arrivals = poisson(50.0, 20.0, seed=0)
    assert len(arrivals) == 1000
    assert float(arrivals.arrival_s[-1]) == pytest.approx(20.0, rel=0.15)
    assert np.all(np.diff(arrivals.arrival_s) > 0)


def test_the_command_prints_a_table_and_writes_it(tmp_path):
    file = tmp_path / "results" / "several.json"
    arguments = ["--rate", "10", "--duration", "2", "--instances", "4", "--gateways", "2", "--json", str(file)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert result.output.count("| 10 | 2 |") == 6
    assert len(json.loads(file.read_text())) == 7
