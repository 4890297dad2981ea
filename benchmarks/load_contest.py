"""Load forecasters against each other: asked at the beginning of every epoch what its mean and busiest minute will be.

All but the product's get the same learned reserve as it has (``solver.load_correction.Reserve``), so that means are
compared and not margins. Forecasts know the minutes before, nothing else; the first days teach and do not count.
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


def contest(minutes: Any, starts_unix_s: float) -> list[LoadRow]:
    """All of them on all classes together, five minutes ahead."""
    slots = minutes.sum(axis=1).reshape(-1, PER_SLOT) / MINUTE_S
    templates = _templates(slots.mean(axis=1), starts_unix_s)
    means = {
        "last value": _shifted(slots.mean(axis=1)),
        "last minute": _shifted(slots[:, -1]),
        "EWMA 0.3": _ewma(slots.mean(axis=1), 0.3),
        "EWMA 0.6": _ewma(slots.mean(axis=1), 0.6),
        "template alone": templates,
    }
    winters = _holt_winters(slots.mean(axis=1))
    if winters is not None:
        means["Holt-Winters"] = winters
    means[BOUND] = slots.mean(axis=1)
    rows = [_row(name, mean, _reserved(mean, slots), slots) for name, mean in means.items()]
    forecasts = product(minutes, starts_unix_s, SLOT_S)
    return [*rows, _row("product", forecasts[:, 0].sum(axis=1), forecasts[:, 1].sum(axis=1), slots)]


def by_class(minutes: Any, starts_unix_s: float, groups: Any) -> list[LoadRow]:
    """The product's, each group of classes with a reserve of its own."""
    forecasts = product(minutes, starts_unix_s, SLOT_S, groups)
    rows = []
    for group in range(int(groups.max()) + 1):
        inside = groups == group
        slots = minutes[:, inside].sum(axis=1).reshape(-1, PER_SLOT) / MINUTE_S
        if slots.mean() * MINUTE_S >= 1.0:
            mean, reserve = forecasts[:, 0, inside].sum(axis=1), forecasts[:, 1, inside].sum(axis=1)
            rows.append(_row(str(group), mean, reserve, slots))
    return rows


def product(
    minutes: Any, starts_unix_s: float, horizon_s: float, groups: Any = None, quantile: float | None = None
) -> Any:
    """(slots, 2, 9) mean and reserve that the product's forecaster states at the beginning of every slot."""
    settings = ForecastSettings() if quantile is None else ForecastSettings(quantile=quantile)
    forecaster = SlotForecaster(9, settings, LoadHistory(starts_unix_s), groups)
    nothing, out = np.zeros(9), np.zeros((len(minutes) // PER_SLOT, 2, 9))
    for minute, requests in enumerate(minutes):
        if minute % PER_SLOT == 0:
            forecast = forecaster.forecast(minute * MINUTE_S, horizon_s)
            out[minute // PER_SLOT] = forecast.mean_rps, forecast.reserve_rps
        forecaster.observe((minute + 1) * MINUTE_S, Demand(MINUTE_S, requests, nothing, nothing, nothing))
    return out


def ahead(minutes: Any, starts_unix_s: float, horizon_s: float) -> LoadRow:
    """The product's over a longer epoch: the mean and the busiest minute of all of it."""
    forecasts = product(minutes, starts_unix_s, horizon_s)
    count = round(horizon_s / MINUTE_S)
    total = minutes.sum(axis=1) / MINUTE_S
    begins = range(0, len(total) - count + 1, PER_SLOT)
    epochs = np.array([total[begin : begin + count] for begin in begins])
    sums = forecasts[: len(epochs)].sum(axis=2)
    return _row(f"{horizon_s / 60:.0f} min", sums[:, 0], sums[:, 1], epochs)


def pinballs(minutes: Any, starts_unix_s: float) -> dict[float, float]:
    """Pinball loss of the busiest minute at several quantiles, over the mean rate."""
    slots = minutes.sum(axis=1).reshape(-1, PER_SLOT) / MINUTE_S
    losses = {}
    for level in LEVELS:
        reserve = product(minutes, starts_unix_s, SLOT_S, quantile=level)[:, 1].sum(axis=1)
        losses[level] = _pinball(slots, reserve, level)
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


def _reserved(mean: Any, slots: Any) -> Any:
    settings = ForecastSettings()
    reserve = Reserve(settings.quantile, math.log1p(settings.least_reserve), settings.guess_weight)
    out = np.zeros(len(mean))
    for i, peak in enumerate(slots.max(axis=1)):
        out[i] = mean[i] * math.exp(reserve.factor_log())
        if mean[i] > 0.0 and peak > 0.0:
            reserve.learn(math.log(peak / mean[i]), bool(peak <= out[i]))
    return out


def _shifted(values: Any) -> Any:
    return np.concatenate((values[:1], values[:-1]))


def _ewma(values: Any, share: float) -> Any:
    out, level = np.zeros(len(values)), values[0]
    for i, value in enumerate(values):
        out[i] = level
        level += share * (value - level)
    return out


def _templates(rates: Any, starts_unix_s: float) -> Any:
    """What the history alone says; the last value while it says nothing."""
    history, out, last = LoadHistory(starts_unix_s), np.zeros(len(rates)), float(rates[0])
    zero = np.zeros(1)
    for i, rate in enumerate(rates):
        template = history.template(history.slot_of(i * SLOT_S + 1.0))
        out[i] = last if template is None else template
        last = float(rate)
        history.observe((i + 1) * SLOT_S, Demand(SLOT_S, np.array([rate * SLOT_S]), zero, zero, zero))
    return out


def _holt_winters(rates: Any) -> Any:
    """statsmodels': fitted to the logarithms of the days that teach, then run one step ahead; None without it."""
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
        out[i] = math.exp(level + drift + season)
        new_level = alpha * (value - season) + (1 - alpha) * (level + drift)
        seasons[i % DAY] = gamma * (value - level - drift) + (1 - gamma) * season
        trend = beta * (new_level - level) + (1 - beta) * drift
        level = new_level
    return out
