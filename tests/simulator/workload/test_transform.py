import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator.workload.arrivals import Arrivals, Workload, WorkloadError, recorded
from simulator.workload.transform import JITTER_S, limited, scaled, window


def chunked(arrivals: Arrivals, size: int) -> Workload:
    """A workload in chunks of ``size`` rows, to meet chunk borders often."""

    def begin():
        for start in range(0, len(arrivals), size):
            yield arrivals.at(slice(start, start + size))

    return Workload("t", float(arrivals.arrival_s[-1]), float(len(arrivals)), begin, starts_unix_s=1000.0)


def random_arrivals(seed: int, count: int, span_s: float) -> Arrivals:
    rng = np.random.default_rng(seed)
    times = np.sort(rng.random(count)) * span_s
    return Arrivals(times, rng.integers(1, 999, count).astype(np.int32), np.arange(count, dtype=np.int32) + 1)


@given(
    seed=st.integers(0, 99),
    size=st.integers(1, 50),
    start=st.floats(0, 0.99),
    length=st.floats(0.01, 2),
)
def test_a_window_is_what_a_mask_over_everything_gives(seed, size, start, length):
    arrivals = random_arrivals(seed, 120, 60.0)
    workload = chunked(arrivals, size)
    start_s, length_s = start * workload.duration_s, length * workload.duration_s
    cut = window(workload, start_s, length_s)
    end_s = start_s + length_s
    expected = (arrivals.arrival_s >= start_s) & ((arrivals.arrival_s < end_s) | (end_s >= workload.duration_s))
    assert np.array_equal(cut.collect().output_tokens, arrivals.output_tokens[expected])
    assert np.allclose(cut.collect().arrival_s, arrivals.arrival_s[expected] - start_s)
    assert cut.duration_s == pytest.approx(min(length_s, workload.duration_s - start_s))
    if start_s:
        assert cut.starts_unix_s == 1000 + start_s


@pytest.mark.parametrize(("start_s", "duration_s"), [(-1, 5), (60, 5), (0, 0), (0, -3)])
def test_an_empty_window_is_refused(start_s, duration_s):
    with pytest.raises(WorkloadError, match="window"):
        window(chunked(random_arrivals(0, 10, 60.0), 4), start_s, duration_s)


def test_a_window_of_everything_is_the_workload_itself():
    workload = recorded("t", random_arrivals(0, 10, 60.0))
    assert window(workload) is workload


@pytest.mark.parametrize("size", [1, 7, 200])
def test_a_limit_keeps_the_first(size):
    arrivals = random_arrivals(1, 50, 60.0)
    assert limited(chunked(arrivals, size), 13).collect().output_tokens.tolist() == list(range(1, 14))
    assert limited(chunked(arrivals, size), 999).expected_requests == 50
    with pytest.raises(WorkloadError, match="limit"):
        limited(chunked(arrivals, size), 0)


def test_thinning_keeps_the_share_and_changes_no_row():
    arrivals = random_arrivals(2, 20_000, 3600.0)
    thin = scaled(chunked(arrivals, 999), 0.3, seed=4)
    kept = thin.collect()
    assert len(kept) == pytest.approx(6000, rel=0.05)
    rows = kept.output_tokens - 1
    assert np.array_equal(kept.arrival_s, arrivals.arrival_s[rows])
    assert np.array_equal(kept.input_tokens, arrivals.input_tokens[rows])
    assert "probability 0.3" in thin.assumptions[0]


@pytest.mark.parametrize("factor", [2.0, 2.5, 5.25])
def test_superposition_repeats_every_row_close_to_its_time(factor):
    arrivals = random_arrivals(3, 4000, 3600.0)
    thick = scaled(chunked(arrivals, 333), factor, seed=4)
    got = thick.collect()
    assert len(got) == pytest.approx(4000 * factor, rel=0.02)
    assert np.all(np.diff(got.arrival_s) >= 0)
    assert got.arrival_s[-1] <= thick.duration_s
    delay = got.arrival_s - arrivals.arrival_s[got.output_tokens - 1]
    assert delay.min() == 0
    assert 0.9 * JITTER_S < delay.max() <= JITTER_S
    copies = np.bincount(got.output_tokens)[1:]
    assert copies.min() == int(factor)
    assert copies.max() == int(np.ceil(factor))


def test_superposition_meets_gaps_longer_than_its_delay():
    arrivals = Arrivals.of((0.0, 1.0, 500.0, 501.0), (1, 2, 3, 4), (1, 2, 3, 4))
    for size in (1, 2, 3):
        got = scaled(chunked(arrivals, size), 3.0, seed=0).collect()
        assert len(got) == 12
        assert np.all(np.diff(got.arrival_s) >= 0)


@pytest.mark.parametrize("factor", [0.5, 3.3])
def test_scaling_is_the_same_for_the_same_seed_only(factor):
    workload = chunked(random_arrivals(5, 3000, 600.0), 500)
    first, again, other = (scaled(workload, factor, seed).collect().arrival_s for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_scaling_by_one_changes_nothing_and_by_nothing_is_refused():
    workload = recorded("t", random_arrivals(0, 10, 60.0))
    assert scaled(workload, 1.0, 0) is workload
    for factor in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(WorkloadError, match="rate scale"):
            scaled(workload, factor, 0)
