import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from solver.control import Demand
from solver.forecast import Forecast, KnownForecaster, SlotForecaster
from solver.load_history import LoadHistory
from solver.load_promises import ForecastSettings

DAY_S = 86_400.0


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


def daily(t):
    """From 10 to 40 requests/s and back, in two hours each."""
    return [10.0 + 30.0 * float(np.clip(np.sin(t / DAY_S * 2.0 * np.pi) * 2.0 + 0.5, 0.0, 1.0))]


def morning_error(forecaster, day):
    """Mean relative error half an hour ahead while the rate rises, on a day that has just begun 4 hours before noon."""
    begin_s = (day - 1.0 / 6.0) * DAY_S
    made = run(forecaster, lambda t: daily(t + begin_s), 6 * 3600.0, window_s=300.0, ask_s=1800.0)
    truth = [np.mean([daily(begin_s + at + s)[0] for s in range(0, 1800, 60)]) for at, _ in made]
    return float(np.mean([abs(f.mean_rps[0] / t - 1.0) for (_, f), t in zip(made, truth, strict=True)]))


def test_the_same_time_of_other_days_shapes_what_comes():
    kept = LoadHistory()
    run(SlotForecaster(1, history=kept), daily, 5.0 * DAY_S, window_s=300.0)
    offset_s = (7.0 - 1.0 / 6.0) * DAY_S
    restored = LoadHistory(unix_offset_s=offset_s)
    restored.restore(kept.snapshot())
    assert morning_error(SlotForecaster(1, history=restored), 7) < 0.75 * morning_error(SlotForecaster(1), 7)


def test_templates_that_mislead_are_not_followed():
    """Every day has its steps at other hours: what the days before did says nothing of this one."""

    def fickle(t):
        day = int(t // DAY_S)
        return [10.0 if ((t + day * 19_000.0) % DAY_S) < DAY_S / 2 else 20.0]

    made = run(SlotForecaster(1), fickle, 5 * DAY_S, window_s=300.0, ask_s=300.0)
    errors = [abs(f.mean_rps[0] / fickle(at + 150.0)[0] - 1.0) for at, f in made[2 * 288 :]]
    assert np.mean(errors) < 0.08


def test_a_gap_is_survived():
    forecaster = SlotForecaster(1)
    run(forecaster, lambda t: [10.0], 3 * 3600.0, ask_s=300.0)
    forecaster.observe(10 * 3600.0, window([40.0 * 5.0]))  # nobody looked for seven hours, and it is another load
    forecast = forecaster.forecast(10 * 3600.0, 300.0)
    assert forecast.mean_rps == pytest.approx([40.0], rel=0.3)
    assert forecast.reserve_rps[0] < 80.0  # the seven hours were no error of a forecast


def test_a_burst_is_seen_and_met_before_it_is_understood():
    forecaster = SlotForecaster(1)
    run(forecaster, lambda t: [10.0], 4 * 3600.0, ask_s=300.0)
    calm = forecaster.forecast(14_400.0, 300.0)
    assert not forecaster.burst
    forecaster.observe(14_460.0, window([60.0 * 40.0], 60.0))
    burst = forecaster.forecast(14_460.0, 300.0)
    assert forecaster.burst
    assert burst.reserve_rps[0] > 40.0 > 2 * calm.reserve_rps[0]


def test_a_drift_is_noticed():
    forecaster = SlotForecaster(1)
    rng = np.random.default_rng(1)

    def steady_then_growing(t):
        return [10.0 if t < DAY_S else 10.0 * np.exp((t - DAY_S) / 1800.0)]

    for step in range(1, 1440 + 120):
        now_s = step * 60.0
        forecaster.observe(now_s, window(rng.poisson(np.array(steady_then_growing(now_s)) * 60.0), 60.0))
        forecaster.forecast(now_s, 300.0)
        if step == 1440:
            before = forecaster.drifts
    assert before <= 2
    assert forecaster.drifts > before


def test_groups_have_reserves_of_their_own():
    """One class is steady, the other bursts: apart, only the second is provided for generously."""

    def both(t):
        return [10.0, 10.0 if t % 1800.0 > 120.0 else 25.0]

    forecaster = SlotForecaster(2, groups=np.array([0, 1]))
    run(forecaster, both, 12 * 3600.0, ask_s=300.0)
    forecast = forecaster.forecast(12 * 3600.0, 300.0)
    factor = forecast.reserve_rps / forecast.mean_rps
    assert factor[0] < 1.5 < factor[1]


@pytest.mark.parametrize("quantile", [0.8, 0.955])
def test_as_many_peaks_are_covered_as_was_asked_for(quantile):
    """A noisy day and night; the busiest minute of five, of a stream that is not Poisson."""
    rng = np.random.default_rng(2)
    forecaster, over, asked = SlotForecaster(1, ForecastSettings(quantile=quantile)), 0, 0
    for slot in range(6 * 288):
        now_s, rate = slot * 300.0, 20.0 + 10.0 * np.sin(slot / 288.0 * 2.0 * np.pi)
        reserve = forecaster.forecast(now_s, 300.0).reserve_rps[0]
        minutes = rng.poisson(rate * 60.0 * rng.gamma(20.0, 0.05, 5))
        if slot > 288:
            asked += 1
            over += minutes.max() / 60.0 > reserve
        for k, requests in enumerate(minutes):
            forecaster.observe(now_s + 60.0 * (k + 1), window([requests], 60.0))
    assert over / asked == pytest.approx(1.0 - quantile, abs=0.02)


def test_a_class_of_two_requests_a_minute_is_covered_as_often_as_any():
    """Where a minute may well be empty, ratios say little: the reserve still has to hold."""
    rng = np.random.default_rng(7)
    forecaster, over = SlotForecaster(2, groups=np.array([0, 1])), []
    for slot in range(5 * 288):
        reserve = forecaster.forecast(slot * 300.0, 300.0).reserve_rps[1]
        minutes = rng.poisson([600.0, 2.0], (5, 2))
        over.append(minutes[:, 1].max() / 60.0 > reserve)
        for k, requests in enumerate(minutes):
            forecaster.observe(slot * 300.0 + 60.0 * (k + 1), window(requests, 60.0))
    assert np.mean(over[288:]) == pytest.approx(0.045, abs=0.02)


def test_in_a_restless_hour_more_is_kept_ready_than_in_a_calm_one():
    """Minutes of the same mean, every other six hours far noisier."""
    rng, forecaster, factors = np.random.default_rng(8), SlotForecaster(1), {True: [], False: []}
    for slot in range(5 * 288):
        wild = slot // 72 % 2 == 1
        forecast = forecaster.forecast(slot * 300.0, 300.0)
        if slot > 288 and slot % 72 > 6:
            factors[wild].append(forecast.reserve_rps[0] / forecast.mean_rps[0])
        noise = rng.gamma(20.0, 0.05, 5) if wild else np.ones(5)
        for k, requests in enumerate(rng.poisson(1800.0 * noise)):
            forecaster.observe(slot * 300.0 + 60.0 * (k + 1), window([requests], 60.0))
    assert np.mean(factors[False]) < 1.15 < 1.3 < np.mean(factors[True])


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
    forecaster = SlotForecaster(1)
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
