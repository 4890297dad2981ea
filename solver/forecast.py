"""Forecasts of demand: how much of each class is to be expected, and how much to be ready for. Pure.

``SlotForecaster`` starts from the rate of the last five minutes and corrects it by signs of change: the last minute,
the minutes before, and what the same time of other weeks says is coming (``solver.load_history``). How far each sign is
to be believed, and how much more to be ready for, it learns from its own forecasts as they come due
(``solver.load_correction``), so a sign that has no worth is not followed. It works from the first minute, without any
history, and over gaps. Source: DynamoLLM section IV, load predictor.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from solver.control import Demand, FloatArray, IntArray
from solver.load_history import SLOT_S, LoadHistory
from solver.load_promises import ForecastSettings, Moment, Promises
from solver.recent_load import MINUTE_S, SMALLEST_RPS, RecentLoad, log_rate

_SHORTEST_S = 1e-3  # a window shorter than this says nothing of a rate
_BELIEF = np.array([0.0, 0.0, 0.0, 0.5, 0.0])  # of the signs, before errors teach otherwise: half the template's change
_READINGS = np.array(  # of the signs, that need no learning
    [
        [0.0, 0.0, 0.0, 0.0, 0.0],  # as in the last five minutes
        [1.0, 0.0, 0.0, 0.0, 0.0],  # as in the last minute
        [0.0, 0.0, 0.5, 0.0, 0.0],  # half way to a slower mean
        [0.0, 0.0, 1.0, 0.0, 0.0],  # that slower mean
        [0.0, 0.0, 0.0, 1.0, 0.0],  # the template's change from here
        [0.0, 0.0, 0.0, 0.0, 1.0],  # the template at its level of late
    ]
)
_HORIZONS = 8  # different ones that are learned for; beyond, the nearest known
_STEP = 0.05  # logarithm: unrest is measured against it
_LEAST_STEP = 0.01


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
        self._recent = RecentLoad()
        self._parts = np.zeros(demands)
        self._weight = 0.0
        self._long: float | None = None  # logarithm of the rate, slower
        self._level: float | None = None  # of the rate over its template
        self._last: tuple[int, float] | None = None  # slot that closed, and the logarithm of its rate
        self._step = _STEP  # from slot to slot of late, mean absolute logarithm
        self._promises: dict[int, Promises] = {}
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
        for promises in self._promises.values():
            self.drifts += promises.observe(now_s, demand.window_s, by_group)
        closed = self._history.observe(now_s, demand)
        if closed is not None:
            self._follow(*closed)

    def forecast(self, now_s: float, horizon_s: float) -> Forecast:
        """What to expect from now until ``horizon_s`` later."""
        if self._weight == 0.0:
            nothing = np.zeros_like(self._parts)
            return Forecast(nothing, nothing)
        moment, minute_rps = self.look(now_s, horizon_s)
        promises = self._promises_of(horizon_s)
        swing = math.log(self._settings.longest_swing)
        change = min(max(promises.blend.read(moment.signs), -swing), swing)
        total_rps = max(math.exp(log_rate(moment.middle_rps) + change) - SMALLEST_RPS, 0.0)
        random_rps = math.sqrt(max(moment.middle_rps, SMALLEST_RPS) / MINUTE_S)
        self.burst = minute_rps > moment.middle_rps + self._settings.burst_sigmas * random_rps
        parts_rps = float(self._parts.sum())
        shares = self._parts / parts_rps if parts_rps > 0.0 else self._parts
        mean = total_rps * shares
        of_groups = self._by_group(mean)
        reserves = np.maximum(promises.reserves_rps(of_groups, moment.unrest), of_groups)
        promises.promise(now_s, moment, of_groups, reserves)
        factors = np.divide(reserves, of_groups, out=np.ones_like(reserves), where=of_groups > 0.0)
        reserve = mean * factors[self._groups]
        if self.burst:  # it may go on: be ready for at least what there is
            reserve = np.maximum(reserve, shares * (minute_rps + 2.0 * random_rps))
        return Forecast(mean, reserve)

    def _by_group(self, rates: FloatArray) -> FloatArray:
        return np.bincount(self._groups, weights=rates).astype(np.float64)

    def look(self, now_s: float, horizon_s: float) -> tuple[Moment, float]:
        """What can be seen now, once anything was observed, and the rate of the last minute."""
        requests, seen_s = self._recent.minutes()
        of_slot = round(SLOT_S / MINUTE_S)
        middle_rps = _rate(requests[:of_slot], seen_s[:of_slot])
        minute_rps = _rate(requests[:1], seen_s[:1])
        before = slower = middle = log_rate(middle_rps)
        if self._recent.span_s >= 2.0 * SLOT_S:  # else there was a gap, and what was before says nothing
            before = log_rate(_rate(requests[of_slot:], seen_s[of_slot:]))
            slower = middle if self._long is None else self._long
        shift, level = self._templates(now_s, horizon_s, middle)
        signs = np.array([log_rate(minute_rps) - middle, before - middle, slower - middle, shift, level])
        minutes = [log_rate(n / s) for n, s in zip(requests[:of_slot], seen_s[:of_slot], strict=True) if s > 0.0]
        steps = (float(np.std(minutes)), abs(before - middle), self._step)
        return Moment(middle_rps, signs, np.log((np.array(steps) + _LEAST_STEP) / _STEP)), minute_rps

    def _templates(self, now_s: float, horizon_s: float, middle: float) -> tuple[float, float]:
        """What the same time of other weeks says: the change from here on, and how far here is from its level."""
        slot = self._history.slot_of(now_s)
        slots = range(slot, slot + max(1, math.ceil(horizon_s / SLOT_S)))
        ahead = [rate for rate in map(self._history.template, slots) if rate is not None]
        then = self._history.template(slot - 1)
        if not ahead or then is None:
            return 0.0, 0.0
        coming = log_rate(sum(ahead) / len(ahead))
        return coming - log_rate(then), coming + self._level - middle if self._level is not None else 0.0

    def _follow(self, slot: int, rate_rps: float) -> None:
        """A slot is over."""
        rate = log_rate(rate_rps)
        before, self._last = self._last, (slot, rate)
        if self._long is None or before is None or before[0] != slot - 1:
            self._long = rate
        else:
            self._long += 0.3 * (rate - self._long)
            self._step += 0.15 * (abs(rate - before[1]) - self._step)
        template = self._history.template(slot)
        if template is not None:
            level = rate - log_rate(template)
            self._level = level if self._level is None else self._level + 0.1 * (level - self._level)

    def _promises_of(self, horizon_s: float) -> Promises:
        """What was learned for this horizon, to the minute."""
        minutes = max(1, round(horizon_s / MINUTE_S))
        if minutes not in self._promises:
            if len(self._promises) >= _HORIZONS:
                minutes = min(self._promises, key=lambda known: abs(known - minutes))
            else:
                groups = int(self._groups.max(initial=0)) + 1
                self._promises[minutes] = Promises(minutes * MINUTE_S, groups, _BELIEF, _READINGS, self._settings)
        return self._promises[minutes]


def _rate(requests: FloatArray, seen_s: FloatArray) -> float:
    span_s = float(seen_s.sum())
    return float(requests.sum()) / span_s if span_s > 0.0 else 0.0


class KnownForecaster:
    """Tells what somebody else knows: perfect knowledge in experiments, or a provision that never changes."""

    def __init__(self, known: Callable[[float, float], Forecast]) -> None:
        self._known = known

    def observe(self, now_s: float, demand: Demand) -> None:
        """Nothing to learn."""

    def forecast(self, now_s: float, horizon_s: float) -> Forecast:
        """What is known of the time from ``now_s`` until ``horizon_s`` later."""
        return self._known(now_s, horizon_s)
