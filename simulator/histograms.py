"""Latency histograms with logarithmic buckets of 1 %: counts in, quantiles out, mergeable by addition."""

import math

import numpy as np
import numpy.typing as npt

LEAST_S = 1e-4
PER_LOG = 1.0 / math.log(1.01)
BUCKETS = 1756  # 0.1 ms .. about 3,900 s; longer ones are counted in the last


def bucket_of(value_s: float) -> int:
    """Index of the bucket a latency falls in."""
    if value_s <= LEAST_S:
        return 0
    return min(int(math.log(value_s / LEAST_S) * PER_LOG) + 1, BUCKETS - 1)


def upper_s(bucket: int) -> float:
    """Upper bound of a bucket in seconds."""
    return LEAST_S * math.exp(bucket / PER_LOG)


def quantile_s(counts: npt.NDArray[np.int64], q: float) -> float:
    """The latency that a share ``q`` of the counted stay at or below, at most 1 % too high; nan if none is counted."""
    total = int(counts.sum())
    if total == 0:
        return math.nan
    rank = max(math.ceil(q * total), 1)
    return upper_s(int(np.searchsorted(np.cumsum(counts), rank)))
