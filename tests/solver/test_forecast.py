import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from solver.control import Demand
from solver.forecast import DAY_S, Forecast, ForecastSettings, KnownForecaster, SlotForecaster


def window(requests, window_s=5.0):
    zero = np.zeros(len(requests))
    return Demand(window_s, np.asarray(requests, dtype=float), zero, zero, zero)


def run(forecaster, rate_of, until_s, window_s=60.0, seed=0, ask_s=None):
    """Feed Poisson arrivals of the rate; returns the forecasts made on the way."""
    rng = np.random.default_rng(seed)
    made = []
    for step in range(1, int(until_s / window_s) + 1):
        now_s = step * window_s
        rate = np.asarray(rate_of(now_s - 0.5 * window_s), dtype=float)
        forecaster.observe(now_s, window(rng.poisson(rate * window_s), window_s))
        if ask_s:
            made.append((now_s, forecaster.forecast(now_s, ask_s)))
    return made


def test_without_history_it_expects_what_came_lately():
    forecaster = SlotForecaster(2)
    assert forecaster.forecast(0.0, 300.0).mean_rps.tolist() == [0.0, 0.0]
    run(forecaster, lambda t: [2.0, 8.0], 600.0, window_s=5.0)
    forecast = forecaster.forecast(600.0, 300.0)
    assert forecast.mean_rps == pytest.approx([2.0, 8.0], rel=0.2)
    assert np.all(forecast.reserve_rps > forecast.mean_rps)


def test_the_first_minute_is_not_taken_for_a_ramp_from_zero():
    forecaster = SlotForecaster(1)
    forecaster.observe(5.0, window([50.0]))
    assert forecaster.forecast(5.0, 300.0).mean_rps == pytest.approx([10.0])


def test_the_same_time_of_other_days_shapes_what_comes():
    def daily(t):
        return [10.0 if (t % DAY_S) < DAY_S / 2 else 20.0]

    forecaster = SlotForecaster(1)
    run(forecaster, daily, 2.5 * DAY_S - 60.0, window_s=60.0)
    now_s = 2.5 * DAY_S - 60.0  # the rate is about to double, as on the days before
    assert forecaster.forecast(now_s, 300.0).mean_rps == pytest.approx([20.0], rel=0.15)


def test_the_reserve_learns_from_bursts_it_did_not_foresee():
    def bursty(t):
        return [30.0 if t % 600.0 < 60.0 else 10.0]

    calm, nervous = SlotForecaster(1), SlotForecaster(1)
    run(calm, lambda t: [10.0], 8 * 3600.0, ask_s=300.0)
    run(nervous, bursty, 8 * 3600.0, ask_s=300.0)
    margins = [float(f.reserve_rps[0] / f.mean_rps[0]) for f in (x.forecast(28_800.0, 300.0) for x in (calm, nervous))]
    assert margins[1] > 1.5
    assert margins[0] < 1.35


def test_the_reserve_covers_nearly_every_minute_of_a_steady_stream():
    forecaster = SlotForecaster(1)
    made = run(forecaster, lambda t: [10.0], 12 * 3600.0, ask_s=60.0, seed=3)
    rng = np.random.default_rng(4)
    minutes = rng.poisson(10.0 * 60.0, len(made)) / 60.0
    missed = np.mean([minute > f.reserve_rps[0] for minute, (_, f) in zip(minutes, made, strict=True)])
    assert missed <= 0.05


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(0.0, 900.0), st.integers(0, 1_000_000)), max_size=40))
def test_any_series_with_gaps_gives_a_forecast_that_is_a_rate(windows):
    forecaster = SlotForecaster(1, ForecastSettings(slot_s=60.0))
    now_s = 0.0
    for gap_s, requests in windows:
        now_s += gap_s
        forecaster.observe(now_s, window([requests], gap_s))
        forecast = forecaster.forecast(now_s, 120.0)
        assert np.all(np.isfinite(forecast.reserve_rps))
        assert np.all(forecast.mean_rps >= 0.0)
        assert np.all(forecast.reserve_rps >= forecast.mean_rps)


def test_known_demand_is_told_as_it_is():
    forecaster = KnownForecaster(lambda now_s, horizon_s: Forecast(np.array([now_s]), np.array([now_s + horizon_s])))
    forecaster.observe(1.0, window([5.0]))
    assert forecaster.forecast(7.0, 3.0).reserve_rps.tolist() == [10.0]
