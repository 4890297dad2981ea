"""Residuals: how far answers were from what was expected of them, so that an expectation becomes a distribution.

Distances are in octaves, log2 of (length + 1): an error is a factor. Answers of about the same expectation are kept
together (a bin), bins lean on wider bins while they have seen little, and the widest on a normal distribution.
"""

import math
from bisect import bisect_left
from itertools import accumulate, pairwise
from statistics import NormalDist

PER_OCTAVE = 4
LOWEST = -12 * PER_OCTAVE  # the nearest cell to zero; answers farther off are counted in the outermost ones
CELLS = 24 * PER_OCTAVE
LEAN = 30.0  # answers that weigh as much as all that the wider bin knows
_LAST = CELLS - 1e-9  # a place in the last cell
_READ_AGAIN = 16  # a table is made anew when a sixteenth of what a bin has seen is new


def prior_of(sigma_octaves: float) -> list[float]:
    """Shares of the cells, sum 1, before anything was seen. ``sigma_octaves`` > 0."""
    normal = NormalDist(0.0, sigma_octaves)
    cumulative = [0.0, *(normal.cdf((LOWEST + k) / PER_OCTAVE) for k in range(1, CELLS)), 1.0]
    return [after - before for before, after in pairwise(cumulative)]


class Residuals:
    """The distances seen in one bin; newer ones weigh more."""

    __slots__ = ("_cumulative", "_quantiles", "_shares", "_unread", "count", "gain", "weights")

    def __init__(self, weights: list[float] | None = None, count: int = 0) -> None:
        self.weights = weights if weights is not None else [0.0] * CELLS
        self.count = count
        self.gain = 1.0  # weight of the next answer; grows instead of all others fading
        self._unread = 1
        self._shares: list[float] = []
        self._cumulative: list[float] = []

    def add(self, octaves: float, weight: float, growth: float) -> None:
        """Take in a distance; ``growth`` is by how much the next weighs more."""
        cell = min(max(math.floor(octaves * PER_OCTAVE) - LOWEST, 0), CELLS - 1)
        self.weights[cell] += self.gain * weight
        self.count += 1
        self._unread += 1
        self.gain *= growth
        if self.gain > 1e6:
            self.weights = [w / self.gain for w in self.weights]
            self.gain = 1.0

    def refresh(self, under: list[float]) -> list[float]:
        """Make the table anew, leaning on ``under``, if it is time to; the shares of the cells, sum 1."""
        if self._unread * _READ_AGAIN > self.count or not self._shares:
            scale = 1.0 / (sum(self.weights) / self.gain + LEAN)
            own, lean = scale / self.gain, scale * LEAN
            self._shares = [own * w + lean * u for w, u in zip(self.weights, under, strict=True)]
            self._cumulative = list(accumulate(self._shares, initial=0.0))
            self._unread = 0
        return self._shares

    def quantile(self, share: float) -> float:
        """The distance that ``share`` of the answers stay below. After ``refresh``."""
        cumulative = self._cumulative
        wanted = min(max(share, 0.0), 1.0) * cumulative[-1]
        cell = min(max(bisect_left(cumulative, wanted) - 1, 0), CELLS - 1)
        inside = self._shares[cell]
        part = (wanted - cumulative[cell]) / inside if inside > 0.0 else 0.0
        return (LOWEST + cell + min(max(part, 0.0), 1.0)) / PER_OCTAVE

    def below(self, octaves: float) -> float:
        """The share of answers that stay below a distance. After ``refresh``."""
        place = octaves * PER_OCTAVE - LOWEST
        if place < 0.0:
            place = 0.0
        elif place >= CELLS:
            place = _LAST
        cell = int(place)
        return self._cumulative[cell] + (place - cell) * self._shares[cell]
