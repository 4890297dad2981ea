"""What forecasts that came due teach: how to read the signs of what is coming, and how much more to be ready for.

``Correction`` is an online least-squares regression with forgetting, of bounded influence. ``Reserve`` follows a
quantile of how far the busiest minute went beyond the mean that was forecast. Both live on logarithms of rates. Pure.
"""

from collections import deque
from collections.abc import Sequence

import numpy as np

from solver.control import FloatArray

KEPT = 500  # errors remembered


class Correction:
    """Linear in its signs."""

    def __init__(self, belief: Sequence[float], stiffness: float, forget: float) -> None:
        """``belief``: the weights before anything is learned. ``stiffness``: squared signs it counts for.

        ``forget``: what is kept of the learned from one forecast to the next, < 1.
        """
        self._forget = forget
        self._stiffness = stiffness
        self.weights: FloatArray = np.array(belief, dtype=np.float64)
        self._spread: FloatArray = np.eye(len(belief)) / stiffness
        self.error = 0.05  # of late, mean absolute
        self._drift = np.zeros(2)

    def read(self, signs: FloatArray) -> float:
        """By how much the logarithm of the rate will have changed."""
        return float(self.weights @ signs)

    def learn(self, signs: FloatArray, change: float) -> bool:
        """Take in a change that came; whether the series has drifted: errors of one sign, one after the other."""
        error = change - self.read(signs)
        bound = 4.0 * self.error
        spread = self._spread @ signs
        gain = spread / (self._forget + float(signs @ spread))
        self.weights = self.weights + gain * min(max(error, -bound), bound)
        self._spread = (self._spread - np.outer(gain, spread)) / self._forget
        if float(np.trace(self._spread)) > 10.0 * len(signs) / self._stiffness:  # long without a sign: forget no more
            self._spread = np.eye(len(signs)) / self._stiffness
        drifted = self._drifted(error)
        self.error = max(self.error + 0.05 * (abs(error) - self.error), 1e-3)
        return drifted

    def _drifted(self, error: float) -> bool:
        """Page's test in both directions; after an alarm what was learned weighs little."""
        step = error / self.error
        self._drift = np.maximum(self._drift + np.array([step, -step]) - DRIFT_SLACK, 0.0)
        if self._drift.max() < DRIFT_ALARM:
            return False
        self._drift[:] = 0.0
        self._spread = np.eye(len(self.weights)) / self._stiffness
        return True


DRIFT_SLACK = 1.0  # mean absolute errors of one sign that are nothing yet
DRIFT_ALARM = 25.0


class Reserve:
    """How far peaks go beyond forecast means, as a factor."""

    def __init__(self, quantile: float, guess: float, guess_weight: float) -> None:
        """Cold, ``guess`` is the logarithm of the factor, and counts for ``guess_weight`` errors."""
        self._quantile = quantile
        self._guess, self._guess_weight = guess, guess_weight
        self._middle, self._scale = 0.0, guess
        self._seen: deque[float] = deque(maxlen=KEPT)  # in scales from the middle
        self._shift = 0.0

    def factor_log(self, so_far: Sequence[float] = ()) -> float:
        """The logarithm of the factor that covers the quantile, from 0 to ``FARTHEST``.

        ``so_far``: what forecasts that are not due yet have met; while few have come due, that tells more than a guess.
        """
        seen = np.asarray(self._seen)
        learnt = 0.0
        if len(seen):
            learnt = self._middle + self._scale * float(np.quantile(seen, self._quantile)) + self._shift
        n = len(seen)
        if n < FEW and len(so_far):
            met = min(float(np.quantile(np.asarray(so_far), self._quantile)), FARTHEST)
            learnt = (n * learnt + len(so_far) * met) / (n + len(so_far))
            n += len(so_far)
        factor_log = (self._guess_weight * self._guess + n * learnt) / (self._guess_weight + n)
        return min(max(factor_log, 0.0), FARTHEST)

    def learn(self, excess_log: float, covered: bool) -> None:
        """Take in by how much the busiest minute differed from the mean forecast, and whether it was covered."""
        excess_log = min(max(excess_log, -FARTHEST), FARTHEST)
        if not self._seen:
            self._middle = excess_log
        self._seen.append((excess_log - self._middle) / self._scale)
        self._middle += FOLLOW * (excess_log - self._middle)
        self._scale = max(self._scale + FOLLOW * (abs(excess_log - self._middle) - self._scale), 1e-3)
        self._shift += SHIFT * ((0.0 if covered else 1.0) - (1.0 - self._quantile))
        self._shift = min(max(self._shift, -0.5), 0.5)


FEW = 60  # forecasts that came due
FOLLOW = 0.05
FARTHEST = 3.0  # logarithm of a factor beyond which nothing is provided for
SHIFT = 0.01  # logarithm the reserve grows by for a peak it did not cover
