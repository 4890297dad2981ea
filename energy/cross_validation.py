"""Cross-validation of fits: leave out a whole (input, output) shape, a whole concurrency or a whole TP, and predict it.

Leaving out single rows would flatter: neighbouring rows of one sweep say almost the same.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from energy.fit_power import Activity, fit_power, power_errors
from energy.fit_times import Prior, TimeFit, errors_of, fit_times
from energy.gpus import GpuPhysics
from energy.measurements import FitRefusedError, Measurement

Floats = NDArray[np.float64]
_Row = TypeVar("_Row")

FEWEST_FOLDS = 2


@dataclass(frozen=True, slots=True)
class CrossErrors:
    """Median absolute relative errors of rows that the fit had not seen; NaN where there was nothing to leave out."""

    ttft_by_shape: float
    tpot_by_shape: float
    ttft_by_concurrency: float
    tpot_by_concurrency: float
    power: float

    def as_dict(self) -> dict[str, float]:
        """Those that are known, by name."""
        named = {name: getattr(self, name) for name in self.__slots__}
        return {name: round(float(value), 4) for name, value in named.items() if np.isfinite(value)}


def cross_validate_times(
    measurements: Sequence[Measurement], prior: Prior, gpu: GpuPhysics, whole: TimeFit
) -> tuple[float, float, float, float]:
    """Medians (TTFT by shape, TPOT by shape, TTFT by concurrency, TPOT by concurrency)."""
    by_shape = _left_out_times(measurements, lambda m: m.shape, prior, gpu, whole)
    by_clients = _left_out_times(measurements, lambda m: m.load.clients, prior, gpu, whole)
    return (*by_shape, *by_clients)


def cross_validate_power(
    activities: Sequence[Activity], groups: Sequence[Hashable], gpu: GpuPhysics, fit_idle: bool = False
) -> float:
    """Median absolute relative power error of readings left out by group."""
    errors: list[float] = []
    numbered = list(zip(activities, groups, strict=True))
    for kept, left_out in _folds(numbered, lambda pair: pair[1]):
        try:
            fit = fit_power([activity for activity, _ in kept], gpu, fit_idle)
        except FitRefusedError:
            continue
        errors.extend(power_errors(fit.gpu, [activity for activity, _ in left_out], fit.nuisances))
    return _median(np.array(errors))


def _left_out_times(
    measurements: Sequence[Measurement],
    group: Callable[[Measurement], Hashable],
    prior: Prior,
    gpu: GpuPhysics,
    whole: TimeFit,
) -> tuple[float, float]:
    ttft: list[Floats] = []
    tpot: list[Floats] = []
    tps = set(whole.times)
    for kept, left_out in _folds(measurements, group):
        if {m.tp for m in kept} != tps:
            continue  # a TP would have no rows at all
        try:
            fit = fit_times(kept, prior, gpu, whole.unknowns)
        except FitRefusedError:
            continue
        ttft_errors, tpot_errors = errors_of(fit.times, left_out, gpu)
        ttft.append(ttft_errors)
        tpot.append(tpot_errors)
    return _median(np.concatenate(ttft or [np.empty(0)])), _median(np.concatenate(tpot or [np.empty(0)]))


def _folds(rows: Sequence[_Row], group: Callable[[_Row], Hashable]) -> list[tuple[list[_Row], list[_Row]]]:
    """(kept, left out) for each group of at least two."""
    names = list(dict.fromkeys(group(row) for row in rows))
    if len(names) < FEWEST_FOLDS:
        return []
    return [
        ([row for row in rows if group(row) != name], [row for row in rows if group(row) == name]) for name in names
    ]


def _median(errors: Floats) -> float:
    known = errors[np.isfinite(errors)]
    return float(np.median(np.abs(known))) if known.size else float("nan")
