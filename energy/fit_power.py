"""Fits a GPU's activity powers: what it draws over idle while kernels run, per arithmetic rate and memory traffic.

Mean power is linear in three shares of time (kernels running, arithmetic, memory traffic). The shares come from the
fitted engine in the measured loop, or from the measured batch and step time where an engine reports its own. Such an
engine spends much of its step outside matrices and attention (sampling, unfused element-wise kernels): what it draws
then, and the prompt lengths its data set does not give, are nuisances of that data set and not part of the GPU.
Unknown logarithms are held near the GPU's published figures; a sweep over three or more clocks moves the clock law too.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from energy.fit_times import loop_of, nominal_prior
from energy.fitted import StepTimes
from energy.gpus import GpuPhysics
from energy.measurements import FitRefusedError, Measurement, ServedPower
from energy.models import model_architecture

Floats = NDArray[np.float64]

FEWEST_POWER_ROWS = 4
CLOCKS_FOR_LAW = 3  # distinct clocks from which the clock law is fitted, not assumed
RESIDUAL_SCALE = 0.05
PRIOR_WEIGHT = 0.1
PROMPT_TOKENS, PROMPT_SIGMA = 300.0, 0.8  # of served data sets that do not give their prompts
REST_W, REST_SIGMA = 50.0, 1.0  # drawn outside matrices and attention by a served engine
_SIGMA = {
    "active_w": 0.4,
    "compute_w": 0.1,
    "memory_w": 0.1,
    "loaded_w": 0.1,
    "knee_mhz": 0.15,
    "floor_voltage": 0.15,
    "memory_clock_share": 0.4,
}
_ALWAYS = ("active_w", "compute_w", "memory_w")
_LAW = ("knee_mhz", "floor_voltage", "memory_clock_share")


@dataclass(frozen=True, slots=True)
class Activity:
    """Shares of time of one power reading; arithmetic and memory traffic overlap, so they may add to over 1."""

    where: str
    sm_clock_mhz: float
    kernels: float
    compute: float
    memory: float
    power_w: float
    served: bool = False  # the engine's own step time: nuisances apply
    compute_per_prompt_token: float = 0.0  # added to ``compute`` for each token of a prompt of unknown length


@dataclass(frozen=True, slots=True)
class Nuisances:
    """What served data sets do not tell."""

    prompt_tokens: float = PROMPT_TOKENS
    rest_w: float = REST_W


@dataclass(frozen=True, slots=True)
class PowerFit:
    """The GPU with fitted powers, and how far every reading is from it (model over measured, minus 1)."""

    gpu: GpuPhysics
    nuisances: Nuisances
    errors: Floats
    fitted: tuple[str, ...]  # fields of GpuPhysics that were fitted


def activities_of_loops(
    measurements: Sequence[Measurement], times: dict[int, StepTimes], gpu: GpuPhysics
) -> list[Activity]:
    """Activity of each measurement that has a power, from the fitted engine."""
    activities = []
    for m in measurements:
        if m.power_w is not None:
            loop = loop_of(times, m, gpu)
            clock = float(m.sm_clock_mhz or gpu.max_clock_mhz)
            activities.append(
                Activity(m.where, clock, loop.kernels_share, loop.compute_share, loop.memory_share, m.power_w)
            )
    return activities


def activities_of_served(served: Sequence[ServedPower], gpu: GpuPhysics) -> list[Activity]:
    """Activity from measured batch and step time, at nominal efficiencies; kernels are taken to run all the time."""
    activities = []
    for s in served:
        compute_s, _, weights_s, kv_s = nominal_prior(model_architecture(s.model), gpu, s.precision).centre[:4]
        steps_per_s = 1.0 / s.step_s
        tokens_per_s = s.sequences * steps_per_s
        kv_tokens = s.sequences * (PROMPT_TOKENS + 0.5 * s.output_tokens)
        activities.append(
            Activity(
                where=s.where,
                sm_clock_mhz=float(gpu.max_clock_mhz),
                kernels=1.0,
                compute=tokens_per_s * compute_s / s.tp,
                memory=steps_per_s * (weights_s + kv_tokens * kv_s) / s.tp,
                power_w=s.power_w,
                served=True,
                compute_per_prompt_token=tokens_per_s / s.output_tokens * compute_s / s.tp,
            )
        )
    return activities


def mean_power_w(gpu: GpuPhysics, activity: Activity, nuisances: Nuisances) -> float:
    """Power of one GPU at this activity, never above the board limit."""
    clock = activity.sm_clock_mhz
    scale = gpu.dynamic_scale(clock)
    compute = min(1.0, activity.compute + nuisances.prompt_tokens * activity.compute_per_prompt_token)
    rest = max(0.0, 1.0 - compute - activity.memory) if activity.served else 0.0
    power_w = (
        gpu.idle_w(clock)
        + scale * (gpu.active_w * activity.kernels + gpu.compute_w * compute + nuisances.rest_w * rest)
        + gpu.memory_w * gpu.memory_power_scale(clock) * activity.memory
    )
    return min(power_w, gpu.board_w)


def power_errors(gpu: GpuPhysics, activities: Sequence[Activity], nuisances: Nuisances) -> Floats:
    """Relative error of each reading."""
    return np.array([mean_power_w(gpu, each, nuisances) / each.power_w - 1.0 for each in activities])


def fit_power(activities: Sequence[Activity], gpu: GpuPhysics, fit_idle: bool = False) -> PowerFit:
    """Fit the activity powers of ``gpu``, whose own values are the prior. Raises ``FitRefusedError``."""
    if len(activities) < FEWEST_POWER_ROWS:
        raise FitRefusedError(
            f"no power column, or too few rows with one: {len(activities)} of {FEWEST_POWER_ROWS} needed"
        )
    clocks = {each.sm_clock_mhz for each in activities}
    names = _ALWAYS + (("loaded_w",) if fit_idle else ()) + (_LAW if len(clocks) >= CLOCKS_FOR_LAW else ())
    centre = np.log([*(getattr(gpu, name) for name in names), PROMPT_TOKENS, REST_W])
    sigma = np.array([*(_SIGMA[name] for name in names), PROMPT_SIGMA, REST_SIGMA])

    def split(unknowns: Floats) -> tuple[GpuPhysics, Nuisances]:
        values = np.exp(unknowns)
        physics = with_values(gpu, dict(zip(names, values[:-2], strict=True)))
        return physics, Nuisances(float(values[-2]), float(values[-1]))

    def residuals(unknowns: Floats) -> Floats:
        physics, nuisances = split(unknowns)
        errors = power_errors(physics, activities, nuisances)
        return np.concatenate([np.log1p(errors), PRIOR_WEIGHT * (unknowns - centre) / sigma])

    found = least_squares(residuals, centre, loss="soft_l1", f_scale=RESIDUAL_SCALE)
    physics, nuisances = split(found.x)
    return PowerFit(physics, nuisances, power_errors(physics, activities, nuisances), names)


def with_values(gpu: GpuPhysics, values: dict[str, float]) -> GpuPhysics:
    """The GPU with these fields, kept physical: shares and voltages at most 1, the knee below the maximum clock."""
    kept = {name: float(value) for name, value in values.items()}
    for name in ("floor_voltage", "memory_clock_share"):
        if name in kept:
            kept[name] = min(kept[name], 1.0)
    if "knee_mhz" in kept:
        kept["knee_mhz"] = min(kept["knee_mhz"], 0.98 * gpu.max_clock_mhz)
    return replace(gpu, **kept)  # type: ignore[arg-type]  # only float fields are ever named
