"""What forecasts that came due teach: the worth of signs, the reserve, drift."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from solver.load_correction import FARTHEST, Correction, Reserve


def taught(slopes, steps=2000, noise=0.05, forget=0.998, seed=0):
    random = np.random.default_rng(seed)
    correction = Correction([0.0] * len(slopes), 5.0, forget)
    for _ in range(steps):
        signs = random.normal(0.0, 0.2, len(slopes))
        correction.learn(signs, float(signs @ np.asarray(slopes)) + random.normal(0.0, noise))
    return correction


def test_before_it_is_taught_it_says_what_it_was_told_to_believe():
    assert Correction([0.5, 0.0, 0.0], 5.0, 0.998).read(np.array([1.0, -2.0, 3.0])) == 0.5


def test_it_learns_what_signs_are_worth():
    assert taught([0.5, 0.0, -0.3]).weights == pytest.approx([0.5, 0.0, -0.3], abs=0.08)


def test_one_mad_error_moves_it_little():
    correction = taught([0.5, 0.0])
    before = correction.weights.copy()
    correction.learn(np.array([0.2, 0.2]), 50.0)
    assert correction.weights == pytest.approx(before, abs=0.1)


def test_after_long_silence_it_still_learns_calmly():
    correction = taught([0.5, 0.5])
    for _ in range(20_000):
        correction.learn(np.zeros(2), 0.0)
    correction.learn(np.array([0.5, 0.5]), 0.4)
    assert np.isfinite(correction.weights).all()
    assert np.abs(correction.weights).max() < 2.0


def test_drift_is_errors_of_one_sign():
    random = np.random.default_rng(3)
    correction = Correction([0.0], 5.0, 0.998)
    calm = [correction.learn(np.zeros(1), random.normal(0.0, 0.05)) for _ in range(3000)]
    assert sum(calm) == 0
    drifting = [correction.learn(np.zeros(1), 0.4) for _ in range(30)]
    assert any(drifting)


def covered(reserve, excesses):
    hits = []
    for excess in excesses:
        hit = excess <= reserve.factor_log()
        hits.append(hit)
        reserve.learn(excess, hit)
    return np.mean(hits[len(hits) // 5 :])


@pytest.mark.parametrize("quantile", [0.5, 0.9, 0.955])
def test_the_quantile_is_covered_through_changes_of_scale(quantile):
    random = np.random.default_rng(4)
    scale = np.repeat([0.05, 0.2, 0.05, 0.1], 1000)
    assert covered(Reserve(quantile, 0.6, 10.0), random.normal(0.1, scale).clip(0.0)) == pytest.approx(
        quantile, abs=0.025
    )


def test_cold_it_guesses_and_facts_wear_the_guess_off():
    reserve = Reserve(0.955, 0.6, 10.0)
    assert reserve.factor_log() == 0.6
    covered(reserve, [0.05] * 10)
    assert 0.2 < reserve.factor_log() < 0.45
    covered(reserve, [0.05] * 500)
    assert reserve.factor_log() == pytest.approx(0.05, abs=0.08)


@given(st.lists(st.tuples(st.floats(-20, 20), st.booleans()), max_size=100))
def test_a_reserve_is_never_less_than_the_mean(seen):
    reserve = Reserve(0.955, 0.6, 10.0)
    for excess, hit in seen:
        reserve.learn(excess, hit)
        assert 0.0 <= reserve.factor_log() <= FARTHEST
