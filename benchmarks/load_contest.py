"""Load forecasters against each other: asked at the beginning of every epoch what its mean and busiest minute will be.

All but the product's get the same learned reserve as it has (``solver.load_correction.Reserve``), which is told the
same of the load's unrest, so that means are compared and not margins. Forecasts know the minutes before, nothing else;
the first days teach and do not count.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pools.classes import ClassCuts
from simulator.workload.arrivals import Workload
from solver.control import Demand
from solver.forecast import SlotForecaster
from solver.load_correction import Reserve
from solver.load_history import DAY, SLOT_S, LoadHistory
from solver.load_promises import ForecastSettings
from solver.recent_load import SMALLEST_RPS, log_rate

MINUTE_S = 60.0
PER_SLOT = 5
TAUGHT_DAYS = 4
LEVELS = (0.5, 0.9, 0.955)
BOUND = "true mean"  # no forecaster, but what is left to a reserve where the mean is known


@dataclass(frozen=True, slots=True)
class LoadRow:
    """How one did; shares of 1. ``pinball`` is of the busiest minute at 0.955, over the mean rate."""

    name: str
    error: float  # mean absolute relative error of the mean
    under: float  # epochs whose busiest minute was beyond the reserve
    over: float  # mean of reserve over busiest minute, less 1
    pinball: float


def minutes_of(workload: Workload) -> Any:
    """(minutes, 9) requests of each class."""
    cuts = ClassCuts()
    count = int(workload.duration_s // MINUTE_S)
    out = np.zeros((count, 9))
    for chunk in workload.chunks():
        input_size = np.searchsorted(cuts.input_tokens, chunk.input_tokens, side="right")
        size = 3 * input_size + np.searchsorted(cuts.output_tokens, chunk.output_tokens, side="right")
        minute = np.minimum((chunk.arrival_s // MINUTE_S).astype(np.int64), count - 1)
        np.add.at(out, (minute, size), 1.0)
    return out[: count // PER_SLOT * PER_SLOT]


def contest(minutes: Any, starts_unix_s: float, horizon_s: float = SLOT_S, winters: bool = True) -> list[LoadRow]:
    """All of them on all classes together. Epochs of this length, one begins every five minutes."""
    unrest, forecasts = product(minutes, starts_unix_s, horizon_s)
    epochs = epochs_of(minutes, horizon_s)
    rows = rivals(minutes, starts_unix_s, horizon_s, unrest, winters)
    return [*rows, _row("product", forecasts[:, 0].sum(axis=1), forecasts[:, 1].sum(axis=1), epochs)]


def by_class(minutes: Any, starts_unix_s: float, groups: Any) -> list[dict[str, Any]]:
    """The product's, each group of classes with a reserve of its own, and what the best rival would have left."""
    unrest, forecasts = product(minutes, starts_unix_s, SLOT_S, groups)
    rows = []
    for group in range(int(groups.max()) + 1):
        inside = groups == group
        epochs = epochs_of(minutes[:, inside], SLOT_S)
        if epochs.mean() * MINUTE_S >= 1.0:
            mean, reserve = forecasts[:, 0, inside].sum(axis=1), forecasts[:, 1, inside].sum(axis=1)
            row = asdict(_row(str(group), mean, reserve, epochs))
            rows.append(row | best_of(rivals(minutes[:, inside], starts_unix_s, SLOT_S, unrest, winters=False)))
    return rows


def best_of(rows: Sequence[LoadRow]) -> dict[str, Any]:
    """The rival of the least pinball loss, and what a true mean would have left."""
    best = min((row for row in rows if row.name not in (BOUND, "product")), key=lambda row: row.pinball)
    bound = next(row for row in rows if row.name == BOUND)
    return {"best": best.name, "best_over": best.over, "best_pinball": best.pinball, "bound_over": bound.over}


def rivals(minutes: Any, starts_unix_s: float, horizon_s: float, unrest: Any, winters: bool) -> list[LoadRow]:
    """What simpler forecasters say of the series as a whole; the last knows the mean."""
    epochs, slots = epochs_of(minutes, horizon_s), epochs_of(minutes, SLOT_S)
    count, steps = len(epochs), round(horizon_s / SLOT_S)
    rates = slots.mean(axis=1)
    means = {
        "last value": _shifted(rates),
        "last minute": _shifted(slots[:, -1]),
        "EWMA 0.3": _ewma(rates, 0.3),
        "EWMA 0.6": _ewma(rates, 0.6),
        "template alone": _templates(rates, starts_unix_s, steps),
    }
    seasonal = _holt_winters(rates, steps) if winters else None
    if seasonal is not None:
        means["Holt-Winters"] = seasonal
    means[BOUND] = epochs.mean(axis=1)
    return [
        _row(name, mean[:count], _reserved(mean[:count], epochs, unrest[:count], steps), epochs)
        for name, mean in means.items()
    ]


def epochs_of(minutes: Any, horizon_s: float) -> Any:
    """(epochs, minutes) requests/s of all classes; an epoch begins every five minutes."""
    total, count = minutes.sum(axis=1) / MINUTE_S, round(horizon_s / MINUTE_S)
    return np.lib.stride_tricks.sliding_window_view(total, count)[::PER_SLOT]


def product(
    minutes: Any, starts_unix_s: float, horizon_s: float, groups: Any = None, quantile: float | None = None
) -> tuple[Any, Any]:
    """What the product's forecaster sees of unrest, and states at the beginning of every epoch.

    (epochs, 3), and (epochs, 2, 9): mean and reserve.
    """
    settings = ForecastSettings() if quantile is None else ForecastSettings(quantile=quantile)
    forecaster = SlotForecaster(9, settings, LoadHistory(starts_unix_s), groups)
    nothing, count = np.zeros(9), len(epochs_of(minutes, horizon_s))
    unrest, out = np.zeros((count, 3)), np.zeros((count, 2, 9))
    for minute, requests in enumerate(minutes):
        epoch = minute // PER_SLOT
        if minute % PER_SLOT == 0 and 0 < epoch < count:
            unrest[epoch] = forecaster.look(minute * MINUTE_S, horizon_s)[0].unrest
            forecast = forecaster.forecast(minute * MINUTE_S, horizon_s)
            out[epoch] = forecast.mean_rps, forecast.reserve_rps
        forecaster.observe((minute + 1) * MINUTE_S, Demand(MINUTE_S, requests, nothing, nothing, nothing))
    return unrest, out


def pinballs(minutes: Any, starts_unix_s: float) -> dict[float, float]:
    """Pinball loss of the busiest minute at several quantiles, over the mean rate."""
    epochs, losses = epochs_of(minutes, SLOT_S), {}
    for level in LEVELS:
        _, forecasts = product(minutes, starts_unix_s, SLOT_S, quantile=level)
        losses[level] = _pinball(epochs, forecasts[:, 1].sum(axis=1), level)
    return losses


def as_rows(rows: Sequence[LoadRow]) -> list[dict[str, Any]]:
    """For a file."""
    return [asdict(row) for row in rows]


def _row(name: str, mean: Any, reserve: Any, slots: Any) -> LoadRow:
    scored = slice(TAUGHT_DAYS * DAY, None)
    peak, true = slots.max(axis=1)[scored], slots.mean(axis=1)[scored]
    seen = peak > 0.0
    return LoadRow(
        name,
        float(np.abs(mean[scored][seen] / true[seen] - 1.0).mean()),
        float((peak > reserve[scored]).mean()),
        float((reserve[scored][seen] / peak[seen] - 1.0).mean()),
        _pinball(slots, reserve, 0.955),
    )


def _pinball(slots: Any, reserve: Any, level: float) -> float:
    scored = slice(TAUGHT_DAYS * DAY, None)
    short = slots.max(axis=1)[scored] - reserve[scored]
    return float(np.where(short > 0.0, level * short, (level - 1.0) * short).mean() / slots[scored].mean())


def _reserved(mean: Any, epochs: Any, unrest: Any, steps: int) -> Any:
    """The product's reserve on somebody's mean; it learns from an epoch when that is over, ``steps`` epochs later."""
    settings = ForecastSettings()
    reserve = Reserve(settings.quantile, math.log1p(settings.least_reserve), settings.guess_weight)
    out, peaks = np.zeros(len(mean)), epochs.max(axis=1)
    for i in range(len(mean)):
        if (due := i - steps) >= 0 and mean[due] > 0.0:
            excess = log_rate(float(peaks[due])) - log_rate(float(mean[due]))
            reserve.learn(excess, bool(peaks[due] <= out[due]), unrest[due])
        out[i] = max((mean[i] + SMALLEST_RPS) * math.exp(reserve.factor_log(unrest[i])) - SMALLEST_RPS, mean[i])
    return out


def _shifted(values: Any) -> Any:
    return np.concatenate((values[:1], values[:-1]))


def _ewma(values: Any, share: float) -> Any:
    out, level = np.zeros(len(values)), values[0]
    for i, value in enumerate(values):
        out[i] = level
        level += share * (value - level)
    return out


def _templates(rates: Any, starts_unix_s: float, steps: int) -> Any:
    """What the history alone says; the last value while it says nothing."""
    history, out, last = LoadHistory(starts_unix_s), np.zeros(len(rates)), float(rates[0])
    zero = np.zeros(1)
    for i, rate in enumerate(rates):
        slot = history.slot_of(i * SLOT_S + 1.0)
        known = [told for n in range(steps) if (told := history.template(slot + n)) is not None]
        out[i] = sum(known) / len(known) if known else last
        last = float(rate)
        history.observe((i + 1) * SLOT_S, Demand(SLOT_S, np.array([rate * SLOT_S]), zero, zero, zero))
    return out


def _holt_winters(rates: Any, steps: int) -> Any:
    """statsmodels': fitted to the logarithms of the days that teach, then run; None without it."""
    try:
        from statsmodels.tsa.holtwinters import ExponentialSmoothing
    except ImportError:
        return None
    logs = np.log(np.maximum(rates, 1e-3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of optimisers that stop at a bound
        fitted = ExponentialSmoothing(
            logs[: TAUGHT_DAYS * DAY], trend="add", damped_trend=True, seasonal="add", seasonal_periods=DAY
        ).fit()
    p = fitted.params
    alpha, beta, gamma = p["smoothing_level"], p["smoothing_trend"], p["smoothing_seasonal"]
    phi, level, trend = p["damping_trend"], p["initial_level"], p["initial_trend"]
    seasons, out = list(p["initial_seasons"]), np.zeros(len(logs))
    for i, value in enumerate(logs):
        season, drift = seasons[i % DAY], phi * trend
        drifts = np.cumsum(phi ** np.arange(1, steps + 1)) * trend
        out[i] = np.exp(level + drifts + [seasons[(i + n) % DAY] for n in range(steps)]).mean()
        new_level = alpha * (value - season) + (1 - alpha) * (level + drift)
        seasons[i % DAY] = gamma * (value - level - drift) + (1 - gamma) * season
        trend = beta * (new_level - level) + (1 - beta) * drift
        level = new_level
    return out
