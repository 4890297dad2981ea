"""RecentLoad: what came in the last ten minutes, at any fineness of windows. Pure."""

import math
from collections import deque

import numpy as np

from solver.control import FloatArray

MINUTE_S = 60.0
KEPT_MINUTES = 10
GAP_S = 300.0  # after which it begins anew
SMALLEST_RPS = 1.0 / 60.0  # one request a minute: below, ratios of rates mean nothing


class RecentLoad:
    """``add`` windows as they end; ``minutes_rps`` is what came in each of the last minutes."""

    __slots__ = ("_now_s", "_windows", "span_s")

    def __init__(self) -> None:
        self._windows: deque[tuple[float, float, float]] = deque()  # begin, end, requests
        self._now_s = 0.0
        self.span_s = 0.0

    def add(self, now_s: float, window_s: float, requests: float) -> None:
        """Take in a window; after a gap, or backwards, it begins anew."""
        windows = self._windows
        if windows and abs(windows[-1][1] - (now_s - window_s)) > GAP_S:
            windows.clear()
        windows.append((now_s - window_s, now_s, requests))
        while windows[0][1] <= now_s - KEPT_MINUTES * MINUTE_S:
            windows.popleft()
        self._now_s = now_s
        self.span_s = now_s - windows[0][0]

    def minutes(self) -> tuple[FloatArray, FloatArray]:
        """(10,) requests and seconds that were seen of each of the last minutes, the newest first."""
        begin, end, requests = np.array(self._windows).T
        oldest = self._now_s - MINUTE_S * np.arange(1.0, KEPT_MINUTES + 1.0)[:, None]
        inside_s = np.minimum(end, oldest + MINUTE_S) - np.maximum(begin, oldest)  # (10, windows)
        inside_s = np.maximum(inside_s, 0.0)
        return inside_s @ (requests / (end - begin)), inside_s.sum(axis=1)


def log_rate(rate_rps: float) -> float:
    """The logarithm of a rate, where little and nothing are the same."""
    return math.log(rate_rps + SMALLEST_RPS)
