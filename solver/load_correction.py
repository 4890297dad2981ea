"""What forecasts that came due teach: how to read the signs of what is coming, and how much more to be ready for.

``Correction`` is an online least-squares regression with forgetting, of bounded influence. ``Blend`` weighs it against
simpler readings of the same signs by how well each has done of late. ``Reserve`` follows a quantile of how far the
busiest minute went beyond the mean that was forecast, in units of what the unrest of the moment lets expect. All live
on logarithms of rates. Pure.
"""

import math
from collections import deque
from collections.abc import Sequence

import numpy as np

from solver.control import FloatArray

KEPT = 500  # errors remembered
UNRESTS = 3  # kinds of unrest
CALM: FloatArray = np.zeros(UNRESTS)


class Correction:
    """Linear in its signs."""

    def __init__(self, belief: Sequence[float] | FloatArray, stiffness: float, forget: float) -> None:
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


class Blend:
    """A mean of several readings of the same signs, weighed by what each has erred of late: nearly the best of them.

    Exponentially weighted forecasters with forgetting (Cesa-Bianchi and Lugosi 2006, section 2.2): the learned
    ``Correction``, and readings that never change.
    """

    def __init__(self, correction: Correction, fixed: FloatArray) -> None:
        """``fixed`` (readings, signs): the weights of each reading that never changes."""
        self._correction = correction
        self._fixed = fixed
        self._losses = np.array([*([HANDICAP] * len(fixed)), 0.0])  # of late, in usual ones; the last: the correction's
        self._usual = 0.05

    def read(self, signs: FloatArray) -> float:
        """By how much the logarithm of the rate will have changed."""
        return float(self.weights @ self._readings(signs))

    @property
    def weights(self) -> FloatArray:
        """(readings + 1,) of each, the correction's last; they sum to 1."""
        pace = math.sqrt(8.0 * math.log(len(self._losses)) * (1.0 - BLEND_KEEP))
        raw: FloatArray = np.exp(-pace * (self._losses - self._losses.min()))
        weights: FloatArray = raw / raw.sum()
        return weights

    def learn(self, signs: FloatArray, change: float) -> bool:
        """Take in a change that came; whether the series has drifted."""
        errors = np.abs(self._readings(signs) - change)
        self._losses = BLEND_KEEP * self._losses + np.minimum(errors / (4.0 * self._usual), 1.0)
        self._usual = max(self._usual + 0.05 * (float(errors.min()) - self._usual), 1e-3)
        return self._correction.learn(signs, change)

    def _readings(self, signs: FloatArray) -> FloatArray:
        return np.append(self._fixed @ signs, self._correction.read(signs))


HANDICAP = 10.0  # losses by which those that cannot learn begin behind
BLEND_KEEP = 0.99  # of what is known of a reading, from one forecast to the next


class Reserve:
    """How far peaks go beyond forecast means, as a factor.

    Excesses are measured in a scale that ``unrest`` (3,) tells: logarithms of how much the load has jumped about
    lately. What each kind is worth is learned; the quantile is that of excesses in their scales.
    """

    def __init__(self, quantile: float, guess: float, guess_weight: float) -> None:
        """Cold, ``guess`` is the logarithm of the factor, and counts for ``guess_weight`` errors."""
        self._quantile = quantile
        self._guess, self._guess_weight = guess, guess_weight
        self._usual = guess  # excess of late, mean absolute
        self._scale = Correction(SCALE_BELIEF, UNREST_STIFFNESS, UNREST_FORGET)
        self._seen: deque[float] = deque(maxlen=KEPT)  # excesses in their scales
        self._shift = 0.0

    def factor_log(self, unrest: FloatArray = CALM, so_far: Sequence[float] = ()) -> float:
        """The logarithm of the factor that covers the quantile, from 0 to ``FARTHEST``.

        ``so_far``: what forecasts that are not due yet have met; while few have come due, that tells more than a guess.
        """
        n, learnt = len(self._seen), 0.0
        if n:
            scale = self._scale_of(self._signs(unrest))
            seen = np.fromiter(self._seen, np.float64, n)
            learnt = scale * (_quantile(seen, self._quantile) + self._shift)
        if n < FEW and len(so_far):
            met = min(_quantile(np.asarray(so_far), self._quantile), FARTHEST)
            learnt = (n * learnt + len(so_far) * met) / (n + len(so_far))
            n += len(so_far)
        factor_log = (self._guess_weight * self._guess + n * learnt) / (self._guess_weight + n)
        return min(max(factor_log, 0.0), FARTHEST)

    def learn(self, excess_log: float, covered: bool, unrest: FloatArray = CALM) -> None:
        """Take in by how much the busiest minute differed from the mean forecast, and whether it was covered.

        ``unrest`` is that of the moment the forecast was made in.
        """
        excess_log = min(max(excess_log, -FARTHEST), FARTHEST)
        signs = self._signs(unrest)
        self._seen.append(excess_log / self._scale_of(signs))
        if excess_log > 0.0:
            self._scale.learn(signs, math.log(excess_log + LEAST_SCALE))
        known = len(self._seen)
        follow = max(FOLLOW, 1.0 / (1.0 + known))
        self._usual = max(self._usual + follow * (max(excess_log, 0.0) - self._usual), LEAST_SCALE)
        self._shift += SHIFT * known / KEPT * ((0.0 if covered else 1.0) - (1.0 - self._quantile))
        self._shift = min(max(self._shift, -2.0), 2.0)

    def _signs(self, unrest: FloatArray) -> FloatArray:
        return np.array((1.0, math.log(self._usual), *unrest))

    def _scale_of(self, signs: FloatArray) -> float:
        """What the unrest lets expect; the fewer excesses are known, the nearer to what they were of late."""
        usual, told = float(signs[1]), min(max(self._scale.read(signs), math.log(LEAST_SCALE)), 1.0)
        return math.exp(usual + (told - usual) * len(self._seen) / KEPT)


def _quantile(values: FloatArray, share: float) -> float:
    """The value that lies above a share of all, interpolated; a fifth of the time that numpy's takes."""
    place = share * (len(values) - 1)
    below = int(place)
    above = min(below + 1, len(values) - 1)
    parted = np.partition(values, (below, above))
    return float(parted[below] + (place - below) * (parted[above] - parted[below]))


FEW = 60  # forecasts that came due
FOLLOW = 0.05
FARTHEST = 3.0  # logarithm of a factor beyond which nothing is provided for
LEAST_SCALE = 0.005  # of excesses: less is nothing
SHIFT = 0.1  # scales the reserve grows by for a peak it did not cover
SCALE_BELIEF = (-1.5, 0.5, 0.2, 0.2, 0.1)
UNREST_STIFFNESS = 5.0
UNREST_FORGET = 0.9995
