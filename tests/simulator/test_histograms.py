"""Latency histograms: no quantile is off by more than a bucket of 1 %."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator.histograms import BUCKETS, bucket_of, quantile_s, upper_s


@given(st.floats(1e-4, 3000.0))
def test_a_latency_lies_within_a_percent_below_its_bucket_s_bound(value_s):
    bound_s = upper_s(bucket_of(value_s))
    assert value_s <= bound_s * (1 + 1e-9)
    assert bound_s <= value_s * 1.0101


@given(st.lists(st.floats(1e-4, 100.0), min_size=1, max_size=200), st.sampled_from([0.5, 0.9, 0.99]))
def test_quantiles_are_those_of_the_values(values, q):
    counts = np.zeros(BUCKETS, dtype=np.int64)
    for value in values:
        counts[bucket_of(value)] += 1
    exact = float(np.quantile(values, q, method="inverted_cdf"))
    assert quantile_s(counts, q) == pytest.approx(exact, rel=0.011)


def test_the_very_long_and_the_very_short_are_counted():
    assert bucket_of(1e9) == BUCKETS - 1
    assert bucket_of(0.0) == 0
    assert np.isnan(quantile_s(np.zeros(BUCKETS, dtype=np.int64), 0.5))
