"""Calibration: the load at which N servers are needed, and not N - 1."""

import numpy as np
import pytest

from benchmarks.calibration import busiest_stretch, calibrate
from energy.adapters.capacity_file import load_capacity
from energy.adapters.catalogue import load_profile
from simulator.experiment import Scenario
from simulator.workload.arrivals import Arrivals, Workload, recorded
from simulator.workload.transform import scaled


def test_the_found_scale_needs_all_servers():
    rng = np.random.default_rng(5)
    n = 6000
    arrivals = Arrivals(
        np.sort(rng.uniform(0.0, 600.0, n)),
        rng.integers(50, 1500, n).astype(np.int32),
        rng.integers(20, 300, n).astype(np.int32),
    )
    workload = recorded("made", arrivals, 600.0)
    name = "llama-2-70b-h100"
    scenario = Scenario(load_profile(name), load_capacity(name), nodes=2)
    found = calibrate(scenario, lambda scale: scaled(workload, scale, 1), first_guess=0.5)
    assert found.attainment >= 0.99 * found.attainment_alone
    assert found.attainment_with_one_less < 0.99
    assert found.stretch_s == 600.0


def test_a_workload_in_denser_bursts_than_its_thinning_gets_a_lower_scale():
    """At a scale it is generated, not thinned: all arrivals of a second come at its beginning."""
    rng = np.random.default_rng(6)
    at_s = np.sort(rng.uniform(0.0, 600.0, 12_000))
    sizes = rng.integers(50, 1500, len(at_s)).astype(np.int32), rng.integers(20, 300, len(at_s)).astype(np.int32)
    even = recorded("even", Arrivals(at_s, *sizes), 600.0)

    def bursty(scale: float) -> Workload:
        part = scaled(even, scale, 1).collect()
        if scale >= 0.5:  # what the search thins
            return recorded("even", part, 600.0)
        at_s = 10.0 * np.floor(part.arrival_s / 10.0)
        return recorded("bursty", Arrivals(at_s, part.input_tokens, part.output_tokens), 600.0)

    name = "llama-2-70b-h100"
    scenario = Scenario(load_profile(name), load_capacity(name), nodes=2)
    found = calibrate(scenario, bursty, first_guess=0.5)
    evenly = calibrate(scenario, lambda scale: scaled(even, scale, 1), first_guess=0.5)
    assert found.attainment >= 0.99 * found.attainment_alone
    assert found.rate_scale < evenly.rate_scale


def test_of_a_long_workload_the_busiest_two_hours_are_taken():
    at_s = np.concatenate([np.arange(0, 40_000, 60.0), np.arange(40_000, 46_000, 5.0), np.arange(46_000, 80_000, 60.0)])
    n = len(at_s)
    workload = recorded("made", Arrivals(at_s, np.full(n, 9, np.int32), np.full(n, 9, np.int32)), 80_000.0)
    start_s, length_s = busiest_stretch(workload)
    assert length_s == 7200.0
    assert start_s <= 40_000 <= 46_000 <= start_s + length_s + 600.0
    assert start_s == pytest.approx(39_000, abs=1200)
