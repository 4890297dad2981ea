import numpy as np
import pytest

from simulator.workload.arrivals import CHUNK_ROWS, Arrivals, Workload, WorkloadError, recorded


def even(count: int, gap_s: float = 1.0) -> Arrivals:
    return Arrivals(np.arange(count) * gap_s, np.arange(1, count + 1, dtype=np.int32), np.full(count, 7, np.int32))


def test_columns_of_unequal_length_are_refused():
    with pytest.raises(WorkloadError, match="one length"):
        Arrivals(np.zeros(2), np.ones(1, np.int32), np.ones(2, np.int32))


def test_rows_are_picked_moved_and_sorted_together():
    shuffled = Arrivals.of((3.0, 1.0, 2.0), (30, 10, 20), (3, 1, 2))
    ordered = shuffled.sorted().moved(5)
    assert ordered.arrival_s.tolist() == [6, 7, 8]
    assert ordered.input_tokens.tolist() == [10, 20, 30]
    assert ordered.at(np.array([True, False, True])).output_tokens.tolist() == [1, 3]


def test_joining_nothing_is_nothing():
    assert len(Arrivals.joined(())) == 0


def test_a_recorded_workload_streams_the_same_rows_every_time_in_bounded_chunks():
    rows = even(CHUNK_ROWS + 5, 0.5)
    workload = recorded("t", rows)
    for _ in range(2):
        chunks = list(workload.chunks())
        assert [len(chunk) for chunk in chunks] == [CHUNK_ROWS, 5]
        assert np.array_equal(Arrivals.joined(chunks).input_tokens, rows.input_tokens)
    assert workload.duration_s == (CHUNK_ROWS + 4) * 0.5
    assert workload.mean_rate_rps == pytest.approx(2, rel=1e-3)


def test_empty_chunks_are_not_given_out():
    nothing = Arrivals.of((), (), ())
    workload = Workload("t", 2.0, 2.0, lambda: iter((nothing, even(2), nothing)))
    assert [len(chunk) for chunk in workload.chunks()] == [2]


def test_a_workload_of_no_length_has_no_rate():
    assert recorded("t", even(1)).mean_rate_rps == 0
