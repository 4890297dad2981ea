"""Slots of past weeks: templates, bounds, gaps, restarts."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from solver.control import Demand
from solver.load_history import DAY, KEPT, SLOT_S, WEEK, LoadHistory

MONDAY = 4 * DAY  # 5 January 1970
SATURDAY = 2 * DAY


def demand(requests, window_s=SLOT_S):
    zero = np.zeros(1)
    return Demand(window_s, np.array([requests]), zero, zero, zero)


def filled(rate_of, slots, offset_s=0.0):
    """One window a slot."""
    history = LoadHistory(offset_s)
    for slot in slots:
        history.observe((slot + 1) * SLOT_S, demand(rate_of(slot) * SLOT_S))
    return history


def test_a_slot_is_closed_when_the_next_begins():
    history = LoadHistory()
    assert history.observe(100.0, demand(500.0, 100.0)) is None
    assert history.observe(300.0, demand(1000.0, 200.0)) is None
    assert history.observe(400.0, demand(700.0, 100.0)) == (0, 5.0)


def test_half_a_slot_unseen_is_not_kept():
    history = LoadHistory()
    history.observe(300.0, demand(500.0, 100.0))
    assert history.observe(400.0, demand(700.0, 100.0)) is None
    assert history.template(DAY) is None


def test_nothing_is_known_at_first():
    assert LoadHistory().template(12345) is None


def test_the_same_slot_of_past_weeks_counts_before_that_of_days():
    history = filled(lambda slot: 10.0 if slot < DAY else 50.0, range(MONDAY, MONDAY + 6 * DAY))
    assert history.template(MONDAY + WEEK + 100) == pytest.approx(50.0)  # Monday of the next week: weeks know it
    weeks = filled(lambda slot: 1.0 + (slot // DAY) % 7, range(MONDAY, MONDAY + 2 * WEEK))
    for day in range(7):
        slot = MONDAY + 2 * WEEK + day * DAY + 100
        assert weeks.template(slot) == pytest.approx(1.0 + (slot // DAY) % 7)


def test_in_the_first_week_weekdays_stand_for_weekdays():
    def rate(slot):
        return 1.0 if (slot // DAY + 3) % 7 >= 5 else 9.0

    history = filled(rate, range(SATURDAY, SATURDAY + 4 * DAY))  # Saturday to Tuesday
    assert history.template(SATURDAY + 4 * DAY + 50) == pytest.approx(9.0)
    only_weekend = filled(rate, range(SATURDAY, SATURDAY + 2 * DAY - 20))
    assert only_weekend.template(SATURDAY + 2 * DAY + 50) == pytest.approx(1.0)  # better than nothing


def test_one_odd_day_does_not_move_the_median():
    history = filled(lambda slot: 100.0 if slot // DAY == 5 else 10.0, range(MONDAY, MONDAY + 4 * DAY))
    assert history.template(MONDAY + 4 * DAY + 100) == pytest.approx(10.0)


def test_the_clock_starts_anywhere():
    history = filled(lambda slot: 7.0, range(DAY), offset_s=MONDAY * SLOT_S)
    assert history.template(MONDAY + DAY + 5) == pytest.approx(7.0)
    assert history.slot_of(0.0) == MONDAY


def test_memory_is_bounded_and_survives_a_restart():
    history = filled(lambda slot: 1.0 + slot % 7, range(6 * WEEK))
    snapshot = json.loads(json.dumps(history.snapshot()))
    assert len(snapshot["slots"]) <= KEPT
    assert len(json.dumps(snapshot)) < 200_000
    again = LoadHistory()
    again.restore(snapshot)
    for slot in range(6 * WEEK, 6 * WEEK + 50):
        assert again.template(slot) == pytest.approx(history.template(slot))


@pytest.mark.parametrize(
    "snapshot",
    [
        {},
        {"version": 7},
        {"version": 1, "slots": [1], "rates": [-1.0]},
        {"version": 1, "slots": [1], "rates": [float("nan")]},
        {"version": 1, "slots": [1, 2], "rates": [1.0]},
    ],
)
def test_a_wrong_snapshot_is_refused(snapshot):
    history = filled(lambda slot: 3.0, range(DAY))
    with pytest.raises(ValueError, match=r"load history|shorter|zip"):
        history.restore(snapshot)
    assert history.template(DAY + 5) == pytest.approx(3.0)


@given(st.lists(st.tuples(st.floats(-1e5, 1e6), st.floats(1e-3, 1e5), st.integers(0, 10**9)), max_size=50))
def test_any_windows_give_rates(windows):
    history, now_s = LoadHistory(1e9), 0.0
    for step_s, window_s, requests in windows:
        now_s += step_s
        history.observe(now_s, demand(float(requests), window_s))
        rate = history.template(history.slot_of(now_s) + DAY)
        assert rate is None or (np.isfinite(rate) and rate >= 0.0)
