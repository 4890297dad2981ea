"""Scenarios: what policies are told of lengths and loads."""

import numpy as np
import pytest

from pools.classes import ClassSlos, RequestClass
from simulator.experiment import known_loads
from simulator.workload.arrivals import Arrivals, recorded


def test_known_loads_are_those_of_the_workload():
    """One short request a second for five minutes, then three a second for one minute."""
    arrivals = Arrivals.of([*range(300), *(300 + k / 3 for k in range(180))], [100] * 480, [10] * 480)
    known = known_loads(recorded("made", arrivals), ClassSlos())
    calm, soon, after = known(60.0, 60.0), known(240.0, 60.0), known(10_000.0, 60.0)
    assert calm.mean_rps[RequestClass.SS] == pytest.approx(1.0)
    assert calm.reserve_rps[RequestClass.SS] == pytest.approx(1.0)
    assert soon.mean_rps[RequestClass.SS] == pytest.approx(2.0)
    assert soon.reserve_rps[RequestClass.SS] == pytest.approx(3.0)
    assert (after.reserve_rps == known(300.0, 59.0).reserve_rps).all()  # beyond the end: its last minute
    assert calm.mean_rps.sum() == calm.mean_rps[RequestClass.SS]
    assert (np.asarray(soon.reserve_rps) >= soon.mean_rps).all()
