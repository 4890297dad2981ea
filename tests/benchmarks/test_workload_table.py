import numpy as np
import pytest

from benchmarks.workload_table import describe, main, table
from simulator.workload.arrivals import Arrivals, WorkloadError, recorded


def test_a_workload_is_described_by_its_own_numbers():
    times = np.concatenate((np.linspace(0, 59, 60), np.linspace(60, 119.9, 120)))
    arrivals = Arrivals(times, np.full(180, 100, np.int32), np.repeat([50, 400], 90).astype(np.int32))
    found = describe("t", recorded("t", arrivals, 120.0))
    assert (found.requests, found.hours, found.mean_rps) == (180, pytest.approx(1 / 30), 1.5)
    assert found.peak_minute_rps == 2
    assert (found.input_mean, found.output_mean) == (100, 225)
    assert found.shares_percent[0] == found.shares_percent[2] == 50
    assert "| t | 180 | 0.03 | 1.50 | 2.0 |" in table([found])


def test_a_sample_is_told_at_the_full_rate_and_without_its_burstiness():
    arrivals = Arrivals(np.arange(60.0), np.full(60, 100, np.int32), np.full(60, 5, np.int32))
    found = describe("t", recorded("t", arrivals, 60.0), sample_rate_scale=0.1)
    assert found.requests == pytest.approx(600)
    assert found.mean_rps == pytest.approx(10)
    assert "| - |" in table([found])


def test_nothing_cannot_be_described():
    with pytest.raises(WorkloadError, match="too few"):
        describe("t", recorded("t", Arrivals.of((0.0,), (1,), (1,))))


def test_the_program_prints_what_it_can_and_says_what_it_cannot(capsys):
    main(["poisson-low", "no-such-trace"])
    out, err = capsys.readouterr()
    assert out.count("\n") == 3
    assert "| poisson-low |" in out
    assert "no-such-trace" in err
