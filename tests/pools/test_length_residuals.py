"""Residuals: quantiles of what was seen, leaning on what lies under it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pools.length_residuals import CELLS, LOWEST, PER_OCTAVE, Residuals, prior_of

PRIOR = prior_of(1.5)


def seen(distances, growth=1.0, under=PRIOR):
    residuals = Residuals()
    for octaves in distances:
        residuals.add(octaves, 1.0, growth)
    residuals.refresh(under)
    return residuals


def test_the_prior_is_normal():
    assert sum(PRIOR) == pytest.approx(1.0)
    cold = seen([])
    for share, octaves in ((0.5, 0.0), (0.8413, 1.5), (0.1587, -1.5)):
        assert cold.quantile(share) == pytest.approx(octaves, abs=0.05)
        assert cold.below(octaves) == pytest.approx(share, abs=0.01)


def test_quantiles_are_those_of_what_was_seen():
    distances = np.random.default_rng(0).normal(0.7, 0.4, 5000)
    residuals = seen(distances)
    for share in (0.1, 0.5, 0.9):
        assert residuals.quantile(share) == pytest.approx(np.quantile(distances, share), abs=0.05)


def test_while_it_has_seen_little_it_leans():
    under = seen([3.0] * 10_000).refresh(PRIOR)
    assert seen([-3.0] * 3, under=under).quantile(0.5) > 2.5
    assert seen([-3.0] * 3000, under=under).quantile(0.5) < -2.5


def test_what_is_old_fades():
    growth = 2.0 ** (1.0 / 100)
    distances = [-2.0] * 5000 + [2.0] * 500
    assert seen(distances, growth).quantile(0.5) > 1.5
    assert seen(distances).quantile(0.5) < -1.5


@given(
    st.lists(st.tuples(st.floats(-1e9, 1e9), st.floats(0, 1)), max_size=60),
    st.floats(-1, 2),
    st.floats(-1, 2),
    st.floats(-1e9, 1e9),
)
def test_quantiles_rise_and_stay_in_range(distances, low, high, octaves):
    residuals = Residuals()
    for distance, weight in distances:
        residuals.add(distance, weight, 1.5)
    shares = residuals.refresh(PRIOR)
    assert sum(shares) == pytest.approx(1.0)
    low, high = sorted((low, high))
    assert LOWEST / PER_OCTAVE <= residuals.quantile(low) <= residuals.quantile(high)
    assert residuals.quantile(high) <= (LOWEST + CELLS) / PER_OCTAVE
    assert -1e-9 <= residuals.below(octaves) <= 1.0 + 1e-9


def test_a_table_is_made_anew_only_when_enough_is_new():
    residuals = seen([0.0] * 1600)
    before = residuals.quantile(0.9)
    for _ in range(99):
        residuals.add(5.0, 1.0, 1.0)
    residuals.refresh(PRIOR)
    assert residuals.quantile(0.97) == pytest.approx(residuals.quantile(0.97))
    for _ in range(200):
        residuals.add(5.0, 1.0, 1.0)
    residuals.refresh(PRIOR)
    assert residuals.quantile(0.9) > before + 2.0
