"""A load at ten times its pace is the load: forecasts of it are those of life, told by the clock."""

from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from solver.control import Demand
from solver.forecast import SlotForecaster
from solver.load_history import DAY, LoadHistory
from solver.pace import PacedForecaster, paced
from solver.policies import Periods

WINDOW_S = 5.0
counts = st.lists(st.lists(st.integers(0, 300), min_size=2, max_size=2), min_size=1, max_size=80)


def window(requests, window_s):
    came = np.asarray(requests, dtype=float)
    return Demand(window_s, came, came * 100.0, came * 20.0, np.array([1.0, 2.0]))


@settings(max_examples=60, deadline=None)
@given(counts, st.sampled_from([2.0, 5.0, 10.0]), st.floats(5.0, 300.0))
def test_a_forecast_at_a_pace_is_that_of_the_same_load_stretched_to_life(requests, pace, horizon_s):
    """Windows of a hundred requests/s at ten times the pace are windows ten times as long of a hundred requests/s."""
    quick = PacedForecaster(SlotForecaster(2), pace)
    life = SlotForecaster(2)
    for number, came in enumerate(requests, 1):
        quick.observe(number * WINDOW_S, window(came, WINDOW_S))
        life.observe(number * WINDOW_S * pace, window(np.multiply(came, pace), WINDOW_S * pace))
        ours = quick.forecast(number * WINDOW_S, horizon_s)
        theirs = life.forecast(number * WINDOW_S * pace, horizon_s * pace)
        assert np.array_equal(ours.mean_rps, theirs.mean_rps)
        assert np.array_equal(ours.reserve_rps, theirs.reserve_rps)


def test_at_the_pace_of_life_nothing_changes():
    quick, life = PacedForecaster(SlotForecaster(1), 1.0), SlotForecaster(1)
    for number in range(1, 200):
        demand = window([number % 17], WINDOW_S)
        quick.observe(number * WINDOW_S, demand)
        life.observe(number * WINDOW_S, demand)
    ours, theirs = quick.forecast(1000.0, 120.0), life.forecast(1000.0, 120.0)
    assert (ours.mean_rps, ours.reserve_rps) == (theirs.mean_rps, theirs.reserve_rps)


def fed(forecaster, rate_of, until_s):
    rng = np.random.default_rng(0)
    for number in range(1, round(until_s / WINDOW_S) + 1):
        now_s = number * WINDOW_S
        forecaster.observe(now_s, window([rng.poisson(rate_of(now_s) * WINDOW_S)], WINDOW_S))
    return float(forecaster.forecast(until_s, 12.0).mean_rps[0])


def test_a_peak_that_was_over_a_minute_ago_is_forgotten_at_ten_times_the_pace_alone():
    """The rate falls from 80 to 40: by the clock, the last five minutes still hold the peak."""

    def falling(at_s):
        return 80.0 if at_s < 240.0 else 40.0

    assert fed(PacedForecaster(SlotForecaster(1), 10.0), falling, 300.0) == pytest.approx(40.0, rel=0.1)
    assert fed(SlotForecaster(1), falling, 300.0) > 55.0


def test_history_is_of_the_loads_time():
    """After 2.4 hours at ten times its pace a day has passed, and the next one is known by it."""
    passed, known = 2.4 * 3600.0 + 60.0, {}
    for pace in (1.0, 10.0):
        history = LoadHistory()
        fed(PacedForecaster(SlotForecaster(1, history=history), pace), lambda at_s: 30.0, passed)
        known[pace] = history.template(DAY + DAY // 2)  # noon
    assert known[1.0] is None
    assert known[10.0] == pytest.approx(30.0, rel=0.1)


def test_plans_come_sooner_and_clocks_do_not():
    quick = paced(Periods(), 10.0)
    assert (quick.joint_s, quick.pool_s, quick.cluster_s) == (12.0, 30.0, 180.0)
    assert quick.instance_s == Periods().instance_s
    assert paced(Periods(), 1.0) == Periods()
    assert {f.name for f in fields(Periods)} == {"instance_s", "pool_s", "cluster_s", "joint_s"}, "a new one? pace it"
