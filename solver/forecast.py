"""Forecasts of demand: how much of each class is to be expected, and how much to be ready for. Pure.

``SlotForecaster`` is the first of its kind: what came lately, shaped by what the same time of day did before, with a
reserve learnt from its own past errors. It works from the first minute, without any history.
Source: DynamoLLM section IV, load predictor (templates of 300 s slots from the same slots of past weeks).
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from solver.control import Demand, FloatArray

DAY_S = 86_400.0
WEEK_S = 7 * DAY_S
_SHORTEST_S = 1e-3  # a window shorter than this says nothing of a rate


@dataclass(frozen=True, slots=True, eq=False)
class Forecast:
    """Requests/s of every demand over the time ahead."""

    mean_rps: FloatArray  # (K,)
    reserve_rps: FloatArray  # (K,) seldom exceeded by the mean of any minute ahead; >= mean


class Forecaster(Protocol):
    """Anything that tells what comes."""

    def observe(self, now_s: float, demand: Demand) -> None:
        """Take in what arrived in the window that ends now."""

    def forecast(self, now_s: float, horizon_s: float) -> Forecast:
        """What to expect from now until ``horizon_s`` later."""


@dataclass(frozen=True, slots=True)
class ForecastSettings:
    """How much to remember and how careful to be."""

    memory_s: float = 120.0  # time constant of "lately"
    trend_memory_s: float = 600.0  # the trend is how "lately" differs from this long ago
    trend: float = 0.5  # share of the trend that is believed to go on
    slot_s: float = 300.0
    quantile: float = 0.95  # of past errors that the reserve covers
    least_reserve: float = 0.8
    """Share of the mean to be ready for until errors are known. Most of it costs little: raised clocks meet it."""
    guess_weight: float = 10.0  # how many observed errors that guess counts for
    burst_s: float = 60.0  # the reserve covers the random variation of the arrivals within this time
    burst_sigmas: float = 2.0
    kept_errors: int = 500
    longest_swing: float = 2.0  # a template changes the rate by this factor at most


class SlotForecaster:
    """Recent rate x weekly template, with a reserve from its own errors."""

    def __init__(self, demands: int, settings: ForecastSettings | None = None) -> None:
        self._settings = settings or ForecastSettings()
        self._rate_rps = np.zeros(demands)
        self._weight = 0.0
        self._long_rps, self._long_weight = 0.0, 0.0  # all classes together
        self._slot_requests = np.zeros(demands)
        self._slot_span_s = 0.0
        self._slot = -1
        self._slots: dict[int, float] = {}  # slot number since 0 -> requests/s in all
        self._pending: deque[_Promise] = deque()
        self._excess: deque[float] = deque(maxlen=self._settings.kept_errors)

    def observe(self, now_s: float, demand: Demand) -> None:
        """Take in what arrived in the window that ends now."""
        if demand.window_s < _SHORTEST_S:
            return
        keep = float(np.exp(-demand.window_s / self._settings.memory_s))
        seen_rps = demand.requests / demand.window_s
        self._rate_rps = self._rate_rps * keep + seen_rps * (1.0 - keep)
        self._weight = self._weight * keep + (1.0 - keep)
        keep = float(np.exp(-demand.window_s / self._settings.trend_memory_s))
        self._long_rps = self._long_rps * keep + float(seen_rps.sum()) * (1.0 - keep)
        self._long_weight = self._long_weight * keep + (1.0 - keep)
        self._follow_slot(now_s, demand)
        for promise in self._pending:
            promise.add(demand)
        while self._pending and self._pending[0].until_s <= now_s:
            self._excess.append(self._pending.popleft().excess)

    def forecast(self, now_s: float, horizon_s: float) -> Forecast:
        """What to expect from now until ``horizon_s`` later."""
        if self._weight == 0.0:
            nothing = np.zeros_like(self._rate_rps)
            return Forecast(nothing, nothing)
        mean = self._rate_rps / self._weight
        rise = self._rise(float(mean.sum()), horizon_s)
        mean = mean * self._swing(now_s, horizon_s)
        total = float(mean.sum())
        if total > 0.0 and (not self._pending or now_s >= self._pending[-1].made_s + self._settings.burst_s):
            self._pending.append(_Promise(now_s, now_s + horizon_s, total, self._settings.burst_s))
        variation = self._settings.burst_sigmas / np.sqrt(max(total, 1e-6) * self._settings.burst_s)
        return Forecast(mean, mean * (1.0 + rise + self._margin() + variation))

    def _rise(self, recent_rps: float, horizon_s: float) -> float:
        """By what share demand will have risen at the horizon, if the trend of the last minutes goes on; >= 0."""
        settings = self._settings
        if recent_rps <= 0.0:
            return 0.0
        # averages over m and n seconds of a ramp differ by n - m seconds of its slope, and the shorter lags by m
        ramp_rps = (recent_rps - self._long_rps / self._long_weight) / (settings.trend_memory_s - settings.memory_s)
        ahead = settings.trend * ramp_rps * (settings.memory_s + horizon_s) / recent_rps
        return min(max(ahead, 0.0), settings.longest_swing - 1.0)

    def _follow_slot(self, now_s: float, demand: Demand) -> None:
        """Close the slot when its time is over."""
        slot = int((now_s - 0.5 * demand.window_s) // self._settings.slot_s)
        if self._slot != slot:
            if self._slot_span_s >= 0.5 * self._settings.slot_s:
                self._slots[self._slot] = float(self._slot_requests.sum()) / self._slot_span_s
            self._slot, self._slot_span_s = slot, 0.0
            self._slot_requests = np.zeros_like(self._slot_requests)
            oldest = slot - int(4 * WEEK_S / self._settings.slot_s)
            while self._slots and next(iter(self._slots)) < oldest:
                del self._slots[next(iter(self._slots))]
        self._slot_requests = self._slot_requests + demand.requests
        self._slot_span_s += demand.window_s

    def _swing(self, now_s: float, horizon_s: float) -> float:
        """By how much the same slots of other weeks (else of the days before) rose or fell between now and then."""
        settings = self._settings
        now = int(now_s // settings.slot_s)
        ahead = range(now + 1, now + max(1, round(horizon_s / settings.slot_s)) + 1)
        for period_s in (WEEK_S, DAY_S):
            period = int(period_s / settings.slot_s)
            ratios = [
                max(self._slots[slot - n * period] for slot in ahead) / self._slots[now - n * period]
                for n in range(1, 5)
                if self._slots.get(now - n * period, 0.0) > 0.0 and all(s - n * period in self._slots for s in ahead)
            ]
            if ratios:
                return float(np.clip(np.median(ratios), 1.0 / settings.longest_swing, settings.longest_swing))
        return 1.0

    def _margin(self) -> float:
        """Share of the mean to add so that past peaks would mostly have been covered; a guess that facts wear off."""
        settings = self._settings
        seen = [*self._excess, *(p.excess for p in self._pending if p.peak_rps > 0.0)]
        if not seen:
            return settings.least_reserve
        learnt = max(float(np.quantile(np.asarray(seen), settings.quantile)), 0.0)
        return (settings.guess_weight * settings.least_reserve + len(seen) * learnt) / (
            settings.guess_weight + len(seen)
        )


@dataclass(slots=True)
class _Promise:
    """A forecast made, and the busiest burst time seen since."""

    made_s: float
    until_s: float
    total_rps: float
    burst_s: float
    peak_rps: float = 0.0
    requests: float = 0.0
    span_s: float = 0.0

    def add(self, demand: Demand) -> None:
        """Take in a window."""
        self.requests += float(demand.requests.sum())
        self.span_s += demand.window_s
        if self.span_s >= self.burst_s:
            self.peak_rps = max(self.peak_rps, self.requests / self.span_s)
            self.requests = self.span_s = 0.0

    @property
    def excess(self) -> float:
        """How far the busiest minute went beyond the forecast mean and its own random variation, relative."""
        variation = np.sqrt(self.total_rps / self.burst_s)
        return float((self.peak_rps - self.total_rps - variation) / self.total_rps)


class KnownForecaster:
    """Tells what somebody else knows: perfect knowledge in experiments, or a provision that never changes."""

    def __init__(self, known: Callable[[float, float], Forecast]) -> None:
        self._known = known

    def observe(self, now_s: float, demand: Demand) -> None:
        """Nothing to learn."""

    def forecast(self, now_s: float, horizon_s: float) -> Forecast:
        """What is known of the time from ``now_s`` until ``horizon_s`` later."""
        return self._known(now_s, horizon_s)
