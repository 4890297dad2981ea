"""The last ten minutes, at any fineness of windows."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from solver.recent_load import KEPT_MINUTES, MINUTE_S, SMALLEST_RPS, RecentLoad, log_rate


def filled(windows):
    """After windows of (seconds, requests), one after the other."""
    recent, now_s = RecentLoad(), 0.0
    for window_s, requests in windows:
        now_s += window_s
        recent.add(now_s, window_s, requests)
    return recent


def test_windows_of_five_seconds_and_of_a_minute_say_the_same():
    counts = np.random.default_rng(1).poisson(10.0, (15, 12))
    fine = filled([(5.0, n) for n in counts.ravel()]).minutes()
    coarse = filled([(60.0, n) for n in counts.sum(axis=1)]).minutes()
    assert fine[0] == pytest.approx(coarse[0])
    assert fine[0] == pytest.approx(counts.sum(axis=1)[:-11:-1])
    assert fine[1] == pytest.approx(np.full(KEPT_MINUTES, MINUTE_S))


def test_a_window_longer_than_a_minute_is_spread_over_its_minutes():
    requests, seen_s = filled([(300.0, 600.0)]).minutes()
    assert requests.tolist() == pytest.approx([120.0] * 5 + [0.0] * 5)
    assert seen_s.tolist() == pytest.approx([60.0] * 5 + [0.0] * 5)


def test_time_that_nobody_saw_counts_for_nothing():
    recent = RecentLoad()
    recent.add(60.0, 60.0, 60.0)
    recent.add(180.0, 60.0, 120.0)  # a minute is missing
    requests, seen_s = recent.minutes()
    assert requests[:4].tolist() == pytest.approx([120.0, 0.0, 60.0, 0.0])
    assert seen_s[:4].tolist() == pytest.approx([60.0, 0.0, 60.0, 0.0])


@pytest.mark.parametrize("later_s", [3600.0, -3600.0])
def test_after_a_gap_or_backwards_it_begins_anew(later_s):
    recent = filled([(60.0, 60.0)] * 70)
    now_s = 70 * 60.0 + later_s
    recent.add(now_s, 5.0, 50.0)
    assert recent.span_s == 5.0
    requests, seen_s = recent.minutes()
    assert (requests.sum(), seen_s.sum()) == (50.0, 5.0)


@given(st.lists(st.tuples(st.floats(0.01, 900.0), st.integers(0, 10**6)), min_size=1, max_size=40))
def test_what_is_told_was_seen(windows):
    requests, seen_s = filled(windows).minutes()
    total_s = sum(window_s for window_s, _ in windows)
    assert seen_s.sum() == pytest.approx(min(total_s, KEPT_MINUTES * MINUTE_S))
    assert np.isfinite(requests).all()
    assert (requests >= 0.0).all()
    assert requests.sum() <= sum(n for _, n in windows) * (1.0 + 1e-9)


def test_little_and_nothing_are_the_same():
    assert log_rate(0.0) == pytest.approx(np.log(SMALLEST_RPS))
    assert log_rate(0.001) - log_rate(0.0) < 0.1
    assert log_rate(20.0) - log_rate(10.0) == pytest.approx(np.log(2.0), abs=0.01)
