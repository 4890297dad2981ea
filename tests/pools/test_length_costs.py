"""What a wrong output size costs: from the table, never less than nothing, dearer when it asked for more."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from energy.adapters.capacity_file import load_capacity
from energy.adapters.catalogue import profile_names
from energy.capacity import CapacityTable, ClassLoad
from pools.classes import REQUEST_CLASSES
from pools.length_costs import BROKEN, LengthCosts


def table(joules_by_class, top_factor=1.5, rates=None):
    """One TP, two clocks; at the higher one a request costs ``top_factor`` as much."""
    classes = tuple(ClassLoad(k.name, 100.0, 100.0, 1.0, 0.1) for k in REQUEST_CLASSES)
    max_rate = np.ones((1, 2, 9)) if rates is None else np.broadcast_to(rates, (1, 2, 9)).astype(float)
    power = np.empty((1, 2, 9, 2))
    power[0, 0, :, :] = np.asarray(joules_by_class)[:, None]
    power[0, 1, :, :] = top_factor * np.asarray(joules_by_class)[:, None]
    other = np.zeros((1, 2, 9, 2))
    return CapacityTable(
        "t", "f", (2,), (800, 1980), classes, (0.0, 1.0), max_rate, other, other, other, other, other, power
    )


JOULES = [10.0, 40.0, 100.0, 20.0, 50.0, 110.0, 30.0, 60.0, 120.0]


def test_errors_are_priced_by_hand():
    costs = LengthCosts.of(table(JOULES)).joules[0]  # short inputs: 10, 40, 100 J, at the highest clock half more
    assert costs[0] == pytest.approx((0.0, 20 + BROKEN * 30, 50 + BROKEN * 90))
    assert costs[1] == pytest.approx((30.0, 0.0, 50 + BROKEN * 60))
    assert costs[2] == pytest.approx((90.0, 60.0, 0.0))


def test_a_short_answer_that_costs_more_is_the_dearer_one_to_miss():
    costs = LengthCosts.of(table([100.0, 40.0, 10.0, *JOULES[3:]])).joules[0]
    assert costs[2][0] == pytest.approx(50 + BROKEN * 90)
    assert costs[0][2] == pytest.approx(90.0)


def test_what_nobody_serves_costs_what_the_next_does():
    shorter = LengthCosts.of(table(JOULES, rates=[1, 1, 0, 1, 1, 1, 1, 1, 1])).joules[0]
    assert shorter[0][2] == pytest.approx(shorter[0][1])
    longer = LengthCosts.of(table(JOULES, rates=[0, 1, 1, 1, 1, 1, 1, 1, 1])).joules[0]
    assert longer[2][0] == pytest.approx(longer[2][1])
    nobody = LengthCosts.of(table(JOULES, rates=[0, 0, 0, 1, 1, 1, 1, 1, 1])).joules[0]
    assert not np.any(nobody)


@given(
    st.lists(st.floats(0.1, 1e4), min_size=9, max_size=9),
    st.floats(0.5, 3.0),
    st.lists(st.sampled_from([0.0, 1.0]), min_size=9, max_size=9),
)
def test_no_error_pays(joules, top_factor, rates):
    costs = np.array(LengthCosts.of(table(joules, top_factor, rates)).joules)
    assert np.isfinite(costs).all()
    assert (costs >= 0.0).all()
    assert (np.diagonal(costs, axis1=1, axis2=2) == 0.0).all()
    for i in range(3):
        for a in range(3):
            for b in range(a):  # of two, to miss the one that asks for more is never the cheaper error
                asks_for_a, asks_for_b = joules[3 * i + a], joules[3 * i + b]
                if rates[3 * i + a] and rates[3 * i + b] and asks_for_a != asks_for_b:
                    less, more = (a, b) if asks_for_a < asks_for_b else (b, a)
                    assert costs[i, less, more] >= costs[i, more, less] - 1e-9


def test_behind_a_long_prompt_a_short_answer_may_ask_for_more_than_a_long_one():
    joules = [10.0, 40.0, 100.0, 20.0, 50.0, 110.0, 340.0, 240.0, 150.0]
    costs = LengthCosts.of(table(joules))
    assert costs.joules[2][2] == pytest.approx((170 + BROKEN * 190, 120 + BROKEN * 90, 0.0))
    assert costs.joules[2][0] == pytest.approx((0.0, 100.0, 190.0))
    assert costs.cheapest(2, (0.7, 0.2, 0.1)) == 0


@pytest.mark.parametrize("name", profile_names())
def test_on_shipped_profiles_a_short_guess_is_the_dearer_error_but_behind_long_prompts(name):
    costs = np.array(LengthCosts.of(load_capacity(name)).joules)
    assert (costs[:2, 0, 2] >= costs[:2, 2, 0]).all()
    assert (costs[:2, 0, 1:] > 0.0).all()


def test_the_cheapest_size_depends_on_the_odds():
    costs = LengthCosts()
    assert costs.cheapest(0, (0.8, 0.1, 0.1)) == 0
    assert costs.cheapest(0, (0.45, 0.1, 0.45)) == 1  # the middle is off by one at most
    assert costs.cheapest(2, (0.1, 0.1, 0.8)) == 2
    assert costs.cheapest(1, (1.0, 0.0, 0.0)) == 0


@given(
    st.lists(st.floats(0.1, 1e4), min_size=9, max_size=9),
    st.tuples(st.floats(0, 1), st.floats(0, 1)),
    st.integers(0, 2),
)
def test_the_cheapest_size_is_the_one_of_least_expected_cost_and_of_equals_the_smallest(joules, cuts, input_size):
    low, high = sorted(cuts)
    shares = (low, high - low, 1.0 - high)
    costs = LengthCosts.of(table(joules))
    expected = [sum(cost * share for cost, share in zip(row, shares, strict=True)) for row in costs.joules[input_size]]
    assert costs.cheapest(input_size, shares) == expected.index(min(expected))
    assert LengthCosts().cheapest(input_size, (0.5, 0.0, 0.5)) == 0
