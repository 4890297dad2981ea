"""Arrival processes: how many requests fall into a slot of time, and where in it. Pure, given a generator."""

import numpy as np

from simulator.workload.arrivals import FloatColumn


def poisson_slot(rng: np.random.Generator, rate_rps: float, slot_s: float) -> FloatColumn:
    """Arrival times in [0, slot_s) of a Poisson process at a constant rate, sorted; shape (n,), n random."""
    count = int(rng.poisson(rate_rps * slot_s))
    return np.sort(rng.random(count)) * slot_s


def gamma_gaps(rng: np.random.Generator, count: int, shape: float) -> FloatColumn:
    """``count`` gaps of a gamma renewal process (coefficient of variation 1/sqrt(shape)), in any unit."""
    return rng.gamma(shape, size=count)


def weibull_gaps(rng: np.random.Generator, count: int, shape: float) -> FloatColumn:
    """``count`` gaps of a Weibull renewal process, in any unit."""
    return rng.weibull(shape, size=count)


def filled(gaps: FloatColumn, slot_s: float) -> FloatColumn:
    """Times of ``len(gaps) - 1`` arrivals whose gaps, stretched alike, fill exactly one slot.

    A renewal process restarted in each slot brings too many requests where gaps vary much (its first gap is drawn
    like the others, though a slot begins inside a long one). Fixing the count and stretching the gaps keeps the rate
    curve exact and the burstiness as it is.
    """
    total = gaps.sum()
    if not total > 0:  # every gap underflowed: one burst at the start of the slot
        return np.zeros(len(gaps) - 1)
    times_s: FloatColumn = np.cumsum(gaps[:-1]) * (slot_s / total)
    return times_s


def whole_count(rng: np.random.Generator, expected: float) -> int:
    """``expected`` rounded up or down at random, so that its mean stays; whole numbers stay as they are."""
    floor = int(expected + 1e-9)
    fraction = max(expected - floor, 0.0)
    return floor + int(fraction > 1e-9 and rng.random() < fraction)
