"""Fits step times to closed-loop measurements: robust least squares through the closed loop itself.

All TPs of a model are fitted together: compute, weights and KV cost go down as 1/TP, host time is shared, each TP has
its own communication. Unknown logarithms are held near a prior, because published data rarely tell host overhead
from all-reduce latency: nominal efficiencies where GPU and model are known, otherwise what the data themselves suggest.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from energy.closed_loop import LoopResult, closed_loop
from energy.fitted import StepTimes, at_clock
from energy.gpus import GpuPhysics
from energy.measurements import FitRefusedError, Measurement
from energy.models import ModelArchitecture

Floats = NDArray[np.float64]

TTFT_WEIGHT = 0.6  # a TTFT carries more of its generator's accidents than a TPOT
RESIDUAL_SCALE = 0.05  # relative error from which the robust loss turns linear
PRIOR_WEIGHT = 0.1
FEWEST_ROWS_PER_TP = 4
# no kernel is quicker than this share of the datasheet's peak: arithmetic, attention, weight and KV traffic
_BEST_SHARES = (0.82, 0.75, 0.93, 0.93)
_USUAL_SHARES = (0.5, 0.4, 0.82, 0.6)
SHARED = 7  # unknowns shared by all TPs; then two for each TP

# sigma of the natural logarithm, in the order of _Unknowns
_KNOWN_SIGMA = (0.4, 0.4, 0.08, 0.4, 0.7, 1.5, 0.7)
_UNKNOWN_SIGMA = (1.0, 1.5, 0.7, 1.5, 1.0, 1.5, 0.7)
_OVERHEAD_S, _HOST_S_PER_SEQ, _SHARPNESS_OVER_1 = 3e-3, 3e-5, 1.0
# all-reduces of a step, at measured latency and bandwidth (vidur, H100 DGX): 160 x 10-35 us, 160 x 5 ns a token
_COMMUNICATION_S, _COMMUNICATION_S_PER_TOKEN = 1.8e-3, 4e-6
_COMMUNICATION_SIGMA = (0.6, 1.0)


@dataclass(frozen=True, slots=True)
class Prior:
    """Where the shared unknowns are expected at TP1, how firmly (sigma of the logarithm), and their lowest values."""

    centre: tuple[float, ...]
    sigma: tuple[float, ...]
    lowest: tuple[float, ...] = ()


def nominal_prior(model: ModelArchitecture, gpu: GpuPhysics, precision: str) -> Prior:
    """From the sizes of a known model and the peaks of a known GPU, at usual efficiencies."""
    ideal = (
        model.flops_per_token / gpu.flops_per_s[precision],
        model.attention_flops_per_token2 / gpu.flops_per_s["bf16"],
        model.weight_bytes(precision) / gpu.bandwidth_bytes_per_s,
        model.kv_bytes_per_token / gpu.bandwidth_bytes_per_s,
    )
    usual = [time / share for time, share in zip(ideal, _USUAL_SHARES, strict=True)]
    best = [time / share for time, share in zip(ideal, _BEST_SHARES, strict=True)]
    return Prior((*usual, _OVERHEAD_S, _HOST_S_PER_SEQ, _SHARPNESS_OVER_1), _KNOWN_SIGMA, tuple(best))


def empirical_prior(measurements: Sequence[Measurement]) -> Prior:
    """From the measurements alone: the quickest tokens are weight traffic, the longest prompts are arithmetic."""
    tpots = [m.tpot_s * m.tp for m in measurements if m.tpot_s]
    prefills = [m.ttft_s * m.tp / m.load.input_tokens for m in measurements if m.ttft_s]
    if not tpots or not prefills:
        raise FitRefusedError("a fit needs rows with a TTFT and rows with a mean time between tokens")
    weights_s, compute_s = 0.6 * min(tpots), 0.6 * min(prefills)
    overhead_s = 0.2 * min(m.tpot_s for m in measurements if m.tpot_s)
    return Prior(
        (compute_s, compute_s / 2e4, weights_s, weights_s / 5e5, overhead_s, _HOST_S_PER_SEQ, _SHARPNESS_OVER_1),
        _UNKNOWN_SIGMA,
    )


@dataclass(frozen=True, slots=True)
class TimeFit:
    """Step times by TP, and how far every row is from them (model over measured, minus 1; NaN = not measured)."""

    times: dict[int, StepTimes]
    unknowns: Floats
    ttft_errors: Floats
    tpot_errors: Floats


def fit_times(
    measurements: Sequence[Measurement], prior: Prior, gpu: GpuPhysics, start: Floats | None = None
) -> TimeFit:
    """Fit all TPs of one kind of measurement. Raises ``FitRefusedError`` if a TP has too few rows."""
    tps = tuple(sorted({m.tp for m in measurements}))
    for tp in tps:
        rows = sum(m.tp == tp for m in measurements)
        if rows < FEWEST_ROWS_PER_TP:
            raise FitRefusedError(f"too few points: {rows} of TP {tp}, a fit needs {FEWEST_ROWS_PER_TP} of each TP")
    centre = np.log([*prior.centre, *(_COMMUNICATION_S, _COMMUNICATION_S_PER_TOKEN) * len(tps)])
    sigma = np.array([*prior.sigma, *_COMMUNICATION_SIGMA * len(tps)])
    lowest = np.full(len(centre), -np.inf)
    lowest[: len(prior.lowest)] = np.log(prior.lowest) if prior.lowest else -np.inf

    def residuals(unknowns: Floats) -> Floats:
        ttft, tpot = errors_of(times_of(unknowns, tps), measurements, gpu)
        measured = np.concatenate([TTFT_WEIGHT * np.log1p(ttft), np.log1p(tpot)])
        return np.concatenate([np.nan_to_num(measured), PRIOR_WEIGHT * (unknowns - centre) / sigma])

    found = least_squares(
        residuals,
        centre if start is None else np.maximum(start, lowest + 1e-6),
        bounds=(lowest, np.inf),
        loss="soft_l1",
        f_scale=RESIDUAL_SCALE,
        x_scale=sigma,
        ftol=1e-4,
        xtol=1e-4,
        max_nfev=60,
    )
    times = times_of(found.x, tps)
    return TimeFit(times, found.x, *errors_of(times, measurements, gpu))


def times_of(unknowns: Floats, tps: Sequence[int]) -> dict[int, StepTimes]:
    """Step times by TP from the fit's unknowns (natural logarithms)."""
    compute, attention, weights, kv, overhead, host, sharpness = (float(v) for v in np.exp(unknowns[:SHARED]))
    times = {}
    for position, tp in enumerate(tps):
        latency, per_token = (float(v) for v in np.exp(unknowns[SHARED + 2 * position : SHARED + 2 * position + 2]))
        times[tp] = StepTimes(
            overhead_s=overhead,
            host_s_per_seq=host,
            compute_s_per_token=compute / tp,
            attention_s_per_token2=attention / tp,
            weights_s=weights / tp,
            kv_s_per_token=kv / tp,
            communication_s=latency if tp > 1 else 0.0,
            communication_s_per_token=per_token if tp > 1 else 0.0,
            sharpness=1.0 + sharpness,
        )
    return times


def errors_of(
    times: dict[int, StepTimes], measurements: Sequence[Measurement], gpu: GpuPhysics
) -> tuple[Floats, Floats]:
    """Relative errors of TTFT and TPOT of each row, NaN where a row has none."""
    ttft, tpot = np.full(len(measurements), np.nan), np.full(len(measurements), np.nan)
    for i, m in enumerate(measurements):
        loop = loop_of(times, m, gpu)
        if m.ttft_s:
            ttft[i] = loop.ttft_s / m.ttft_s - 1.0
        if m.tpot_s:
            tpot[i] = loop.tpot_s / m.tpot_s - 1.0
    return ttft, tpot


def loop_of(times: dict[int, StepTimes], m: Measurement, gpu: GpuPhysics) -> LoopResult:
    """The measured load run through the fitted engine."""
    return closed_loop(at_clock(times[m.tp], gpu, m.sm_clock_mhz or gpu.max_clock_mhz), m.load)
