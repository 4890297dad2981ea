"""Cross-validation leaves whole groups out, and says nothing where there is nothing to leave out."""

import math
from dataclasses import replace

import numpy as np
import pytest
from test_fit import TRUE_GPU, TRUE_TIMES, sweep

from energy.cross_validation import CrossErrors, cross_validate_power, cross_validate_times
from energy.fit_power import Activity, Nuisances, mean_power_w
from energy.fit_times import empirical_prior, errors_of, fit_times


def cross(rows):
    prior = empirical_prior(rows)
    return cross_validate_times(rows, prior, TRUE_GPU, fit_times(rows, prior, TRUE_GPU))


class TestTimes:
    def test_errors_of_a_noisy_truth_are_about_the_noise(self):
        ttft_shape, tpot_shape, ttft_clients, tpot_clients = cross(sweep(noise=0.02, clocks=(1600,)))
        assert 0.0 < tpot_shape < 0.08
        assert 0.0 < tpot_clients < 0.08
        assert 0.0 < ttft_shape < 0.2
        assert 0.0 < ttft_clients < 0.2

    def test_one_shape_and_one_concurrency_leave_nothing_out(self):
        rows = [m for m in sweep(noise=0.0) if m.shape == (512, 256) and m.load.clients == 4 and m.tp == 1]
        prior = empirical_prior(rows)
        whole = fit_times([*rows, *rows], prior, TRUE_GPU)  # one kind of load, but rows enough to fit
        assert all(math.isnan(e) for e in cross_validate_times(rows, prior, TRUE_GPU, whole))

    def test_a_group_without_which_a_tp_has_no_rows_is_passed_over(self):
        """TP2 was only measured with one shape: leaving that out would leave TP2 out."""
        rows = [m for m in sweep(clocks=(1600,)) if m.tp == 1 or m.shape == (512, 256)]
        rows += [replace(m, load=m.load._replace(rounds=m.load.rounds)) for m in rows if m.tp == 2]
        ttft_shape, tpot_shape, *_ = cross(rows)
        assert math.isfinite(ttft_shape)
        assert math.isfinite(tpot_shape)

    def test_the_true_engine_has_no_errors(self):
        ttft, tpot = errors_of(TRUE_TIMES, sweep(noise=0.0), TRUE_GPU)
        assert np.abs(ttft).max() < 1e-9
        assert np.abs(tpot).max() < 1e-9


def activities(noise=0.0, seed=3):
    rng = np.random.default_rng(seed)
    found = []
    for clock in (800, 1200, 1600):
        for kernels, compute, memory in ((0.9, 0.8, 0.2), (0.8, 0.1, 0.7), (0.5, 0.3, 0.3), (0.95, 0.05, 0.9)):
            blank = Activity("a test", clock, kernels, compute, memory, 0.0)
            power_w = mean_power_w(TRUE_GPU, blank, Nuisances()) * float(np.exp(noise * rng.standard_normal()))
            found.append(replace(blank, power_w=power_w))
    return found


class TestPower:
    def test_left_out_clocks_are_predicted(self):
        found = activities(noise=0.02)
        error = cross_validate_power(found, [a.sm_clock_mhz for a in found], TRUE_GPU)
        assert 0.0 < error < 0.1

    def test_one_group_leaves_nothing_out(self):
        found = activities()
        assert math.isnan(cross_validate_power(found, ["all"] * len(found), TRUE_GPU))

    def test_groups_must_match_the_readings(self):
        with pytest.raises(ValueError, match="argument 2 is shorter"):
            cross_validate_power(activities(), ["a"], TRUE_GPU)


def test_only_what_is_known_is_told():
    errors = CrossErrors(0.12345, float("nan"), 0.2, float("nan"), 0.05)
    assert errors.as_dict() == {"ttft_by_shape": 0.1235, "ttft_by_concurrency": 0.2, "power": 0.05}
