import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator.workload.arrivals import Arrivals, WorkloadError
from simulator.workload.generated import RateCurve, generated, poisson
from simulator.workload.lengths import (
    ClassLengths,
    IndependentLengths,
    RecordedLengths,
    TokenCurve,
    TokenHistogram,
)
from simulator.workload.processes import filled, gamma_gaps, whole_count

FIXED = RecordedLengths(np.array([128], np.int32), np.array([64], np.int32))


def cv(times_s) -> float:
    gaps = np.diff(times_s)
    return float(gaps.std() / gaps.mean())


def test_a_poisson_workload_has_its_rate_and_exponential_gaps():
    workload = poisson(20.0, 1830.0, FIXED, seed=1)
    arrivals = workload.collect()
    assert workload.duration_s == pytest.approx(1830)
    assert workload.expected_requests == pytest.approx(36_600)
    assert len(arrivals) == pytest.approx(36_600, abs=4 * 36_600**0.5)
    assert cv(arrivals.arrival_s) == pytest.approx(1, abs=0.03)
    assert np.all(np.diff(arrivals.arrival_s) >= 0)
    assert arrivals.arrival_s[-1] < 1830
    assert set(arrivals.input_tokens) == {128}


def test_counts_follow_the_curve_slot_by_slot():
    curve = RateCurve(np.array([10.0, 0.0, 40.0]), np.array([100.0, 50.0, 200.0]))
    arrivals = generated("t", curve, FIXED, seed=0).collect()
    counts, _ = np.histogram(arrivals.arrival_s, [0, 100, 150, 350])
    assert curve.expected_requests == 9000
    assert counts[1] == 0
    assert counts[0] == pytest.approx(1000, abs=130)
    assert counts[2] == pytest.approx(8000, abs=360)


def test_a_slot_does_not_depend_on_the_slots_before_it():
    quiet, busy = (RateCurve.even(np.array([rate, 5.0]), 60.0) for rate in (1.0, 90.0))
    tails = [generated("t", curve, FIXED, seed=9).collect() for curve in (quiet, busy)]
    first, second = (tail.arrival_s[tail.arrival_s >= 60] for tail in tails)
    assert np.array_equal(first, second)


def test_bursty_gaps_have_the_wanted_variation_and_the_same_rate():
    curve = RateCurve.even(np.full(20, 10.0), 300.0)
    smooth, bursty = (generated("t", curve, FIXED, 3, gap_cv) for gap_cv in (1.0, 3.0))
    assert len(bursty.collect()) == pytest.approx(60_000, rel=0.02)
    assert cv(bursty.collect().arrival_s) == pytest.approx(3, rel=0.15)
    assert cv(smooth.collect().arrival_s) == pytest.approx(1, rel=0.05)


def test_a_chunk_is_a_slot_so_memory_does_not_grow_with_the_week():
    workload = poisson(50.0, 7 * 86_400.0, FIXED, seed=0)
    assert max(len(chunk) for chunk in itertools.islice(workload.chunks(), 500)) < 60 * 50 * 1.2


@pytest.mark.parametrize(
    "make",
    [
        lambda: RateCurve.even(np.array([]), 1.0),
        lambda: RateCurve.even(np.array([-1.0]), 1.0),
        lambda: RateCurve.even(np.array([1.0]), 0.0),
        lambda: poisson(0.0, 10.0, FIXED, 0),
        lambda: poisson(1.0, -1.0, FIXED, 0),
        lambda: generated("t", RateCurve.even(np.array([1.0]), 1.0), FIXED, 0, gap_cv=0.0),
    ],
)
def test_impossible_curves_are_refused(make):
    with pytest.raises(WorkloadError):
        make()


@given(seed=st.integers(0, 99), count=st.integers(0, 300), shape=st.floats(0.01, 5), slot_s=st.floats(0.1, 1e4))
def test_filled_slots_hold_exactly_their_count_inside_the_slot(seed, count, shape, slot_s):
    times = filled(gamma_gaps(np.random.default_rng(seed), count + 1, shape), slot_s)
    assert len(times) == count
    assert np.all(np.diff(times) >= 0)
    assert count == 0 or (times[0] >= 0 and times[-1] <= slot_s * (1 + 1e-9))


def test_gaps_that_underflow_become_one_burst():
    assert filled(np.zeros(4), 60.0).tolist() == [0, 0, 0]


def test_whole_counts_keep_their_mean():
    rng = np.random.default_rng(0)
    assert {whole_count(rng, 7.0) for _ in range(50)} == {7}
    assert np.mean([whole_count(rng, 2.3) for _ in range(20_000)]) == pytest.approx(2.3, abs=0.02)


def test_a_histogram_draws_its_tokens_with_their_weights():
    histogram = TokenHistogram.of(np.array([0.0, 5.0, 9.0]), np.array([1.0, 0.0, 3.0]))
    drawn = histogram.sample(np.random.default_rng(0), 20_000)
    assert set(drawn) == {1, 9}  # no request has 0 tokens, no draw has weight 0
    assert (drawn == 9).mean() == pytest.approx(0.75, abs=0.01)
    with pytest.raises(WorkloadError):
        TokenHistogram.of(np.array([1.0]), np.array([0.0]))
    with pytest.raises(WorkloadError):
        TokenHistogram.of(np.array([]), np.array([]))


def test_a_curve_is_straight_between_its_points_and_holds_at_its_ends():
    curve = TokenCurve(np.array([10.0, 20.0, 100.0]), np.array([0.2, 0.6, 1.0]))
    drawn = curve.sample(np.random.default_rng(0), 50_000)
    assert drawn.min() == 10
    assert drawn.max() <= 100
    assert (drawn <= 10).mean() == pytest.approx(0.2 + 0.02, abs=0.01)  # and what rounds down to it
    assert (drawn <= 20).mean() == pytest.approx(0.6, abs=0.01)
    assert np.mean(drawn[drawn > 20]) == pytest.approx(60, abs=1)


def test_recorded_pairs_stay_together():
    pairs = RecordedLengths(np.array([1, 2, 3], np.int32), np.array([10, 20, 30], np.int32))
    inputs, outputs = pairs.sample(np.random.default_rng(0), 100)
    assert np.array_equal(outputs, inputs * 10)
    assert set(inputs) == {1, 2, 3}
    with pytest.raises(WorkloadError):
        RecordedLengths(np.array([], np.int32), np.array([], np.int32))


def test_independent_lengths_do_not_go_together():
    histogram = TokenHistogram.of(np.arange(1.0, 100.0), np.ones(99))
    inputs, outputs = IndependentLengths(histogram, histogram).sample(np.random.default_rng(0), 20_000)
    assert abs(np.corrcoef(inputs, outputs)[0, 1]) < 0.02


def test_class_lengths_stay_inside_their_class_and_keep_shares():
    lengths = ClassLengths(
        np.array([3.0, 1.0]),
        np.array([0.0, 0.5, 1.0]),
        np.array([[1.0, 8, 255], [1024, 2000, 9000]]),
        np.array([[1.0, 2, 99], [350, 350, 350]]),
    )
    inputs, outputs = lengths.sample(np.random.default_rng(0), 40_000)
    small = inputs < 256
    assert small.mean() == pytest.approx(0.75, abs=0.01)
    assert inputs[~small].min() >= 1024
    assert inputs.max() <= 9000
    assert set(outputs[~small]) == {350}
    assert outputs[small].max() <= 99
    assert np.median(inputs[small]) == pytest.approx(8, abs=1)


def test_generated_lengths_are_part_of_the_seed():
    curve = RateCurve.even(np.array([50.0]), 60.0)
    histogram = TokenHistogram.of(np.arange(1.0, 500.0), np.ones(499))
    lengths = IndependentLengths(histogram, histogram)
    one, same, other = (generated("t", curve, lengths, seed).collect() for seed in (1, 1, 2))
    assert isinstance(one, Arrivals)
    assert np.array_equal(one.input_tokens, same.input_tokens)
    assert not np.array_equal(one.input_tokens[:100], other.input_tokens[:100])
