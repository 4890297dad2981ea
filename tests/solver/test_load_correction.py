"""What forecasts that came due teach: the worth of signs, the reserve, drift."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from solver.load_correction import FARTHEST, UNRESTS, Blend, Correction, Reserve


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


def blended(readings, series, belief=(0.0, 0.0)):
    """Mean absolute errors of a blend, and of each fixed reading, on (signs, change) of the second half of a series."""
    fixed = np.asarray(readings, dtype=float)
    blend = Blend(Correction(belief, 5.0, 0.998), fixed)
    errors = []
    for signs, change in series:
        errors.append([abs(blend.read(signs) - change), *np.abs(fixed @ signs - change)])
        blend.learn(signs, change)
    return np.mean(errors[len(errors) // 2 :], axis=0), blend


READINGS = [[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]


def signs_and_changes(random, slopes, steps=1500, noise=0.03):
    for _ in range(steps):
        signs = random.normal(0.0, 0.2, 2)
        yield signs, float(signs @ np.asarray(slopes)) + random.normal(0.0, noise)


@pytest.mark.parametrize("slopes", [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (0.5, -0.7)])
def test_a_blend_is_about_as_good_as_the_best_reading_whichever_that_is(slopes):
    errors, _ = blended(READINGS, signs_and_changes(np.random.default_rng(1), slopes))
    assert errors[0] < 1.1 * errors[1:].min()


def test_a_blend_follows_when_another_reading_becomes_the_best():
    random = np.random.default_rng(2)
    series = [*signs_and_changes(random, (1.0, 0.0)), *signs_and_changes(random, (0.0, 0.0), 400)]
    _, blend = blended(READINGS, series)
    assert abs(blend.read(np.array([0.3, 0.0]))) < 0.1


@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5), st.floats(-20, 20)), max_size=60))
def test_a_blend_lies_between_its_readings(seen):
    correction = Correction((0.0, 0.0), 5.0, 0.998)
    blend = Blend(correction, np.asarray(READINGS))
    for first, second, change in seen:
        signs = np.array([first, second])
        readings = [0.0, first, second, correction.read(signs)]
        assert min(readings) - 1e-9 <= blend.read(signs) <= max(readings) + 1e-9
        blend.learn(signs, change)
    assert blend.weights.sum() == pytest.approx(1.0)
    assert (blend.weights >= 0.0).all()


def restless(random, steps):
    """Hours of calm and of unrest, which shows in the second of the signs and nowhere else."""
    for step in range(steps):
        wild = step // 60 % 2
        unrest = np.array([random.normal(0.0, 0.3), 1.5 * wild + random.normal(0.0, 0.2), random.normal(0.0, 0.3)])
        yield unrest, abs(random.normal(0.0, 0.2 if wild else 0.05))


def kept_ready(seen, told):
    """(peaks covered, mean factor) of the calm and of the wild half, once it has learned."""
    reserve, rows = Reserve(0.955, 0.6, 10.0), []
    for step, (unrest, excess) in enumerate(seen):
        signs = unrest if told else np.zeros(UNRESTS)
        factor = reserve.factor_log(signs)
        rows.append((step // 60 % 2, excess <= factor, factor))
        reserve.learn(excess, bool(excess <= factor), signs)
    halves = np.array(rows[len(rows) // 3 :])
    return [halves[halves[:, 0] == wild, 1:].mean(axis=0) for wild in (0, 1)]


def test_unrest_that_can_be_seen_is_provided_for_when_it_is_there_and_not_else():
    seen = list(restless(np.random.default_rng(5), 3000))
    (calm_covered, calm), (wild_covered, wild) = kept_ready(seen, told=True)
    (blind_calm_covered, blind_calm), (blind_wild_covered, _) = kept_ready(seen, told=False)
    assert 0.5 * (calm_covered + wild_covered) == pytest.approx(0.955, abs=0.02)
    assert calm_covered - wild_covered < 0.7 * (blind_calm_covered - blind_wild_covered)
    assert wild > 2.5 * calm
    assert calm < 0.7 * blind_calm


def test_unrest_that_means_nothing_changes_nothing():
    random = np.random.default_rng(6)
    reserve = Reserve(0.955, 0.6, 10.0)
    for _ in range(2000):
        excess, unrest = abs(random.normal(0.0, 0.1)), random.normal(0.0, 0.5, UNRESTS)
        reserve.learn(excess, bool(excess <= reserve.factor_log(unrest)), unrest)
    factors = [reserve.factor_log(random.normal(0.0, 0.5, UNRESTS)) for _ in range(200)]
    assert np.std(factors) < 0.2 * np.mean(factors)


@given(st.lists(st.tuples(st.floats(-20, 20), st.floats(-50, 50), st.booleans()), max_size=60))
def test_no_unrest_however_mad_makes_a_factor_that_is_none(seen):
    reserve = Reserve(0.955, 0.6, 10.0)
    for excess, unrest, hit in seen:
        signs = np.array([unrest, 0.0, -unrest])
        assert 0.0 <= reserve.factor_log(signs) <= FARTHEST
        reserve.learn(excess, hit, signs)
