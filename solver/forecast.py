"""Forecasts of demand: how much of each class is to be expected, and how much to be ready for. Pure.

``SlotForecaster`` starts from the rate of the last five minutes and corrects it by signs of change: the last minute,
the minutes before, and what the same time of other weeks says is coming (``solver.load_history``). How far each sign is
to be believed, and how much more to be ready for, it learns from its own forecasts as they come due
(``solver.load_correction``), so a sign that has no worth is not followed. It works from the first minute, without any
history, and over gaps. Source: DynamoLLM section IV, load predictor.
"""

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from solver.control import Demand, FloatArray, IntArray
from solver.load_correction import Correction, Reserve
from solver.load_history import SLOT_S, LoadHistory

_SHORTEST_S = 1e-3  # a window shorter than this says nothing of a rate
_SMALLEST_RPS = 1.0 / 60.0  # one request a minute: below, ratios of rates mean nothing
_MINUTE_S = 60.0
_BELIEF = (0.0, 0.0, 0.0, 0.5, 0.0)  # of the signs, before errors teach otherwise: half of what templates say
_HORIZONS = 8  # different ones that are learned for; beyond, the nearest known


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

    share_memory_s: float = 300.0  # time constant of how demand parts among classes
    quantile: float = 0.955  # of past forecasts whose busiest minute the reserve covers
    least_reserve: float = 0.8
    """Share of the mean to be ready for until errors are known. Most of it costs little: raised clocks meet it."""
    guess_weight: float = 10.0  # how many observed errors that guess counts for
    stiffness: float = 5.0
    forget: float = 0.998
    longest_swing: float = 3.0  # the rate changes by this factor over a horizon at most
    burst_sigmas: float = 4.0  # a last minute this far beyond what the last five promise is a burst


class SlotForecaster:
    """A ``Forecaster`` that learns."""

    def __init__(
        self,
        demands: int,
        settings: ForecastSettings | None = None,
        history: LoadHistory | None = None,
        groups: IntArray | None = None,
    ) -> None:
        """``groups`` (K,): which demands share capacity, numbered from 0: their peaks are reserved for together."""
        self._settings = settings or ForecastSettings()
        self._history = history or LoadHistory()
        self._groups = np.zeros(demands, dtype=np.int64) if groups is None else groups
        self._recent = _Recent()
        self._parts = np.zeros(demands)
        self._weight = 0.0
        self._long: float | None = None  # logarithm of the rate, slower
        self._level: float | None = None  # of the rate over its template
        self._models: dict[int, _Horizon] = {}
        self.burst = False
        """Whether the last minute was far above the last five."""
        self.drifts = 0
        """How often the series has drifted from what was learned of it."""

    def observe(self, now_s: float, demand: Demand) -> None:
        """Take in what arrived in the window that ends now."""
        if demand.window_s < _SHORTEST_S:
            return
        keep = math.exp(-demand.window_s / self._settings.share_memory_s)
        self._parts = self._parts * keep + (demand.requests / demand.window_s) * (1.0 - keep)
        self._weight = self._weight * keep + (1.0 - keep)
        self._recent.add(now_s, demand.window_s, float(demand.requests.sum()))
        by_group = self._by_group(demand.requests)
        for model in self._models.values():
            self.drifts += model.observe(now_s, demand.window_s, by_group)
        closed = self._history.observe(now_s, demand)
        if closed is not None:
            self._follow(*closed)

    def forecast(self, now_s: float, horizon_s: float) -> Forecast:
        """What to expect from now until ``horizon_s`` later."""
        if self._weight == 0.0:
            nothing = np.zeros_like(self._parts)
            return Forecast(nothing, nothing)
        middle_rps = self._recent.rate_rps(0.0, SLOT_S)
        model = self._model(horizon_s)
        signs = self._signs(now_s, horizon_s, _log(middle_rps))
        swing = math.log(self._settings.longest_swing)
        change = min(max(model.correction.read(signs), -swing), swing)
        total_rps = max(math.exp(_log(middle_rps) + change) - _SMALLEST_RPS, 0.0)
        minute_rps = self._recent.rate_rps(0.0, _MINUTE_S)
        random_rps = math.sqrt(max(middle_rps, _SMALLEST_RPS) / _MINUTE_S)
        self.burst = minute_rps > middle_rps + self._settings.burst_sigmas * random_rps
        parts_rps = float(self._parts.sum())
        shares = self._parts / parts_rps if parts_rps > 0.0 else self._parts
        mean = total_rps * shares
        reserve = mean * np.exp(model.factors_log())[self._groups]
        model.promise(now_s, signs, middle_rps, self._by_group(mean), self._by_group(reserve))
        if self.burst:  # it may go on: be ready for at least what there is
            reserve = np.maximum(reserve, shares * (minute_rps + 2.0 * random_rps))
        return Forecast(mean, reserve)

    def _by_group(self, rates: FloatArray) -> FloatArray:
        return np.bincount(self._groups, weights=rates).astype(np.float64)

    def _signs(self, now_s: float, horizon_s: float, middle: float) -> FloatArray:
        """What may tell of a change, as logarithms of ratios to the rate of the last five minutes; 0 = says nothing."""
        recent, slot = self._recent, self._history.slot_of(now_s)
        before = recent.rate_rps(SLOT_S, 2.0 * SLOT_S)
        slots = range(slot, slot + max(1, math.ceil(horizon_s / SLOT_S)))
        ahead = [rate for rate in map(self._history.template, slots) if rate is not None]
        then = self._history.template(slot - 1)
        shift = level = 0.0
        if ahead and then is not None:
            coming = _log(sum(ahead) / len(ahead))
            shift = coming - _log(then)
            level = coming + self._level - middle if self._level is not None else 0.0
        return np.array(
            [
                _log(recent.rate_rps(0.0, _MINUTE_S)) - middle,
                _log(before) - middle if recent.span_s >= 2.0 * SLOT_S else 0.0,
                self._long - middle if self._long is not None else 0.0,
                shift,
                level,
            ]
        )

    def _follow(self, slot: int, rate_rps: float) -> None:
        """A slot is over."""
        rate = _log(rate_rps)
        self._long = rate if self._long is None else self._long + 0.3 * (rate - self._long)
        template = self._history.template(slot)
        if template is not None:
            level = rate - _log(template)
            self._level = level if self._level is None else self._level + 0.1 * (level - self._level)

    def _model(self, horizon_s: float) -> "_Horizon":
        """What was learned for this horizon, to the minute."""
        minutes = max(1, round(horizon_s / _MINUTE_S))
        if minutes not in self._models:
            if len(self._models) >= _HORIZONS:
                minutes = min(self._models, key=lambda known: abs(known - minutes))
            else:
                groups = int(self._groups.max(initial=0)) + 1
                self._models[minutes] = _Horizon(minutes * _MINUTE_S, groups, self._settings)
        return self._models[minutes]


class _Recent:
    """Windows of the last ten minutes."""

    __slots__ = ("_now_s", "_windows", "span_s")

    def __init__(self) -> None:
        self._windows: deque[tuple[float, float, float]] = deque()  # begin, end, requests
        self._now_s = 0.0
        self.span_s = 0.0

    def add(self, now_s: float, window_s: float, requests: float) -> None:
        """Take in a window; after a gap, or backwards, it begins anew."""
        windows = self._windows
        if windows and abs(windows[-1][1] - (now_s - window_s)) > SLOT_S:
            windows.clear()
        windows.append((now_s - window_s, now_s, requests))
        while windows[0][1] <= now_s - 2.0 * SLOT_S:
            windows.popleft()
        self._now_s = now_s
        self.span_s = now_s - windows[0][0]

    def rate_rps(self, newest_s: float, oldest_s: float) -> float:
        """Requests/s between these ages; of all there is where that is too little."""
        first, last = self._now_s - oldest_s, self._now_s - newest_s
        requests = span_s = 0.0
        for begin, end, count in self._windows:
            inside_s = min(end, last) - max(begin, first)
            if inside_s > 0.0:
                requests += count * inside_s / (end - begin)
                span_s += inside_s
        return requests / span_s if span_s > 0.0 else 0.0


class _Horizon:
    """Forecasts of one horizon that are not due yet, and what those before taught."""

    def __init__(self, horizon_s: float, groups: int, settings: ForecastSettings) -> None:
        self.correction = Correction(_BELIEF, settings.stiffness, settings.forget)
        guess = math.log1p(settings.least_reserve)
        self.reserves = [Reserve(settings.quantile, guess, settings.guess_weight) for _ in range(groups)]
        self._horizon_s = horizon_s
        self._promises: deque[_Promise] = deque()

    def factors_log(self) -> list[float]:
        """Of each group."""
        met = [promise for promise in self._promises if promise.peak_rps.any()]
        return [
            reserve.factor_log([p.excess_log(group) for p in met if p.mean_rps[group] > _SMALLEST_RPS])
            for group, reserve in enumerate(self.reserves)
        ]

    def promise(
        self, now_s: float, signs: FloatArray, middle_rps: float, mean_rps: FloatArray, reserve_rps: FloatArray
    ) -> None:
        """Remember a forecast, one a minute."""
        if not self._promises or now_s >= self._promises[-1].made_s + _MINUTE_S:
            self._promises.append(_Promise(now_s, signs, middle_rps, mean_rps, reserve_rps))

    def observe(self, now_s: float, window_s: float, requests: FloatArray) -> int:
        """Compare what comes; how many of the forecasts that came due tell of a drift."""
        drifts = 0
        for promise in self._promises:
            promise.add(window_s, requests)
        while self._promises and self._promises[0].made_s + self._horizon_s <= now_s + 1e-6:
            drifts += self._judge(self._promises.popleft())
        return drifts

    def _judge(self, promise: "_Promise") -> bool:
        if promise.span_s < 0.5 * self._horizon_s or promise.span_s > 1.5 * self._horizon_s + _MINUTE_S:
            return False  # a gap: nobody knows what came
        came_rps = promise.requests / promise.span_s
        for group, reserve in enumerate(self.reserves):
            if promise.mean_rps[group] > _SMALLEST_RPS:
                covered = bool(promise.peak_rps[group] <= promise.reserve_rps[group])
                reserve.learn(promise.excess_log(group), covered)
        return self.correction.learn(promise.signs, _log(came_rps) - _log(promise.middle_rps))


class _Promise:
    """A forecast made, and what came since."""

    __slots__ = (
        "_minute",
        "_minute_s",
        "made_s",
        "mean_rps",
        "middle_rps",
        "peak_rps",
        "requests",
        "reserve_rps",
        "signs",
        "span_s",
    )

    def __init__(
        self, made_s: float, signs: FloatArray, middle_rps: float, mean_rps: FloatArray, reserve_rps: FloatArray
    ) -> None:
        self.made_s, self.signs, self.middle_rps = made_s, signs, middle_rps
        self.mean_rps, self.reserve_rps = mean_rps, reserve_rps
        self.peak_rps = np.zeros_like(mean_rps)
        self.requests = self.span_s = 0.0
        self._minute, self._minute_s = np.zeros_like(mean_rps), 0.0

    def excess_log(self, group: int) -> float:
        """How far the busiest minute went beyond the mean forecast."""
        return _log(float(self.peak_rps[group])) - _log(float(self.mean_rps[group]))

    def add(self, window_s: float, requests: FloatArray) -> None:
        """Take in a window."""
        self.requests += float(requests.sum())
        self.span_s += window_s
        self._minute = self._minute + requests
        self._minute_s += window_s
        if self._minute_s >= _MINUTE_S - 1e-6:
            self.peak_rps = np.maximum(self.peak_rps, self._minute / self._minute_s)
            self._minute, self._minute_s = np.zeros_like(self._minute), 0.0


def _log(rate_rps: float) -> float:
    return math.log(rate_rps + _SMALLEST_RPS)


class KnownForecaster:
    """Tells what somebody else knows: perfect knowledge in experiments, or a provision that never changes."""

    def __init__(self, known: Callable[[float, float], Forecast]) -> None:
        self._known = known

    def observe(self, now_s: float, demand: Demand) -> None:
        """Nothing to learn."""

    def forecast(self, now_s: float, horizon_s: float) -> Forecast:
        """What is known of the time from ``now_s`` until ``horizon_s`` later."""
        return self._known(now_s, horizon_s)
