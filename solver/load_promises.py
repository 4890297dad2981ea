"""Promises: forecasts of one horizon that are not due yet, and what those before have taught. Pure."""

import math
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from solver.control import FloatArray
from solver.load_correction import Blend, Correction, Reserve
from solver.recent_load import MINUTE_S, SMALLEST_RPS, log_rate

_SELDOM_RPS = 0.1 * SMALLEST_RPS  # what is expected less often teaches no reserve


@dataclass(frozen=True, slots=True)
class ForecastSettings:
    """How much to remember and how careful to be."""

    share_memory_s: float = 300.0  # time constant of how demand parts among classes
    quantile: float = 0.955  # of past forecasts whose busiest minute the reserve covers
    least_reserve: float = 0.8
    """Share of the mean to be ready for until errors are known. Most of it costs little: raised clocks meet it."""
    guess_weight: float = 10.0  # how many observed errors that guess counts for
    stiffness: float = 5.0
    forget: float = 0.998
    longest_swing: float = 3.0  # the rate changes by this factor over a horizon at most
    burst_sigmas: float = 4.0  # a last minute this far beyond what the last five promise is a burst


class Moment(NamedTuple):
    """What could be seen when a forecast was made."""

    middle_rps: float  # of the last five minutes
    signs: FloatArray  # of change
    unrest: FloatArray  # how much the load jumps about


class Promises:
    """``promise`` what is forecast, ``observe`` what comes; ``blend`` and ``reserves_rps`` get better by it."""

    def __init__(
        self, horizon_s: float, groups: int, belief: FloatArray, fixed: FloatArray, settings: ForecastSettings
    ) -> None:
        """``belief`` (signs,) in what they are worth at first; ``fixed`` (readings, signs) are other readings."""
        self.blend = Blend(Correction(belief, settings.stiffness, settings.forget), fixed)
        guess = math.log1p(settings.least_reserve)
        self._reserves = [Reserve(settings.quantile, guess, settings.guess_weight) for _ in range(groups)]
        self._horizon_s = horizon_s
        self._promises: deque[_Promise] = deque()

    def reserves_rps(self, mean_rps: FloatArray, unrest: FloatArray) -> FloatArray:
        """(groups,) what is seldom exceeded by the busiest minute of each group."""
        met = [promise for promise in self._promises if promise.peak_rps.any()]
        factors = [
            reserve.factor_log(unrest, [p.excess_log(group) for p in met if p.mean_rps[group] > _SELDOM_RPS])
            for group, reserve in enumerate(self._reserves)
        ]
        return (mean_rps + SMALLEST_RPS) * np.exp(factors) - SMALLEST_RPS

    def promise(self, now_s: float, moment: Moment, mean_rps: FloatArray, reserve_rps: FloatArray) -> None:
        """Remember a forecast, one a minute."""
        if not self._promises or now_s >= self._promises[-1].made_s + MINUTE_S:
            self._promises.append(_Promise(now_s, moment, mean_rps, reserve_rps))

    def observe(self, now_s: float, window_s: float, requests: FloatArray) -> int:
        """Compare what comes; how many of the forecasts that came due tell of a drift."""
        drifts = 0
        for promise in self._promises:
            promise.add(window_s, requests)
        while self._promises and self._promises[0].made_s + self._horizon_s <= now_s + 1e-6:
            drifts += self._judge(self._promises.popleft())
        return drifts

    def _judge(self, promise: "_Promise") -> bool:
        if promise.span_s < 0.5 * self._horizon_s or promise.span_s > 1.5 * self._horizon_s + MINUTE_S:
            return False  # a gap: nobody knows what came
        moment = promise.moment
        for group, reserve in enumerate(self._reserves):
            if promise.mean_rps[group] > _SELDOM_RPS:
                covered = bool(promise.peak_rps[group] <= promise.reserve_rps[group])
                reserve.learn(promise.excess_log(group), covered, moment.unrest)
        came_rps = promise.requests / promise.span_s
        return self.blend.learn(moment.signs, log_rate(came_rps) - log_rate(moment.middle_rps))


class _Promise:
    """A forecast made, and what came since."""

    __slots__ = (
        "_minute",
        "_minute_s",
        "made_s",
        "mean_rps",
        "moment",
        "peak_rps",
        "requests",
        "reserve_rps",
        "span_s",
    )

    def __init__(self, made_s: float, moment: Moment, mean_rps: FloatArray, reserve_rps: FloatArray) -> None:
        self.made_s, self.moment = made_s, moment
        self.mean_rps, self.reserve_rps = mean_rps, reserve_rps
        self.peak_rps = np.zeros_like(mean_rps)
        self.requests = self.span_s = 0.0
        self._minute, self._minute_s = np.zeros_like(mean_rps), 0.0

    def excess_log(self, group: int) -> float:
        """How far the busiest minute went beyond the mean forecast."""
        return log_rate(float(self.peak_rps[group])) - log_rate(float(self.mean_rps[group]))

    def add(self, window_s: float, requests: FloatArray) -> None:
        """Take in a window."""
        self.requests += float(requests.sum())
        self.span_s += window_s
        self._minute = self._minute + requests
        self._minute_s += window_s
        if self._minute_s >= MINUTE_S - 1e-6:
            self.peak_rps = np.maximum(self.peak_rps, self._minute / self._minute_s)
            self._minute, self._minute_s = np.zeros_like(self._minute), 0.0
