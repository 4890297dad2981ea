"""fit_profile: measurements in, a FittedProfile with its provenance and cross-validated errors out.

Pure; refuses with the reason rather than give a profile that the measurements do not carry.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from energy.cross_validation import CrossErrors, cross_validate_power, cross_validate_times
from energy.fit_power import Activity, PowerFit, activities_of_loops, activities_of_served, fit_power
from energy.fit_times import FEWEST_ROWS_PER_TP, Prior, TimeFit, empirical_prior, fit_times, nominal_prior
from energy.fitted import FittedProfile, Provenance, Source, Validity
from energy.gpus import GPUS, GpuPhysics
from energy.measurements import FitRefusedError, Measurement, ServedPower, one_kind
from energy.models import MODELS

UNKNOWN_GPU_IDLE_SHARE = 0.6  # of the lowest power seen: loaded idle, where it was not measured
UNKNOWN_GPU_BARE_SHARE = 0.6  # of loaded idle
KNOWN_PRECISIONS = ("bf16", "fp8")
HELD_UP = 1.25  # TTFT over that of fewer GPUs from which a row is not the engine's


@dataclass(frozen=True, slots=True)
class FitRequest:
    """What to fit and what the measurements do not say."""

    name: str
    measurements: Sequence[Measurement]
    served_power: Sequence[ServedPower] = ()
    sources: tuple[Source, ...] = ()
    kv_capacity: dict[int, int] = field(default_factory=dict)  # known better than from the memory sizes
    board_w: float | None = None
    idle_w: float | None = None  # loaded and idle at the maximum clock
    needs_power: bool = True  # refuse without power readings
    notes: dict[str, str] = field(default_factory=dict)  # added to the origins
    cross_validate: bool = True


@dataclass(frozen=True, slots=True)
class FitReport:
    """The profile, and row by row how it was found."""

    profile: FittedProfile
    times: TimeFit
    fitted_rows: tuple[Measurement, ...]
    power: PowerFit | None
    activities: tuple[Activity, ...]
    left_out: tuple[str, ...]  # rows not used, with the reason


def fit_profile(request: FitRequest) -> FitReport:
    """Fit one profile. Raises ``FitRefusedError`` with what is missing or mixed."""
    kind = one_kind(request.measurements)
    gpu = _physics(kind, request)
    kv_capacity = _kv_capacity(kind, gpu, request)
    rows, left_out = _usable(request.measurements, kv_capacity)
    prior = _prior(kind, gpu, rows)
    times = fit_times(rows, prior, gpu)
    activities, groups = _activities(request, rows, times, gpu)
    power = None
    if activities or request.needs_power:
        power = fit_power(activities, gpu, fit_idle=_idle_unknown(kind, request))
    errors = {}
    if request.cross_validate:
        by_load = cross_validate_times(rows, prior, gpu, times)
        by_power = cross_validate_power(activities, groups, gpu) if power else float("nan")
        errors = CrossErrors(*by_load, power=by_power).as_dict()
    profile = FittedProfile(
        name=request.name,
        model=kind.model,
        precision=kind.precision,
        engine=kind.engine,
        physics=power.gpu if power else gpu,
        times=times.times,
        kv_capacity={tp: kv_capacity[tp] for tp in times.times},
        sm_clocks_mhz=_clocks(rows, gpu),
        provenance=Provenance(
            origin={**_origin(gpu, rows, power), **request.notes},
            sources=request.sources,
            validity=_validity(rows),
            errors=errors,
        ),
    )
    return FitReport(profile, times, tuple(rows), power, tuple(activities), tuple(left_out))


def _physics(kind: Measurement, request: FitRequest) -> GpuPhysics:
    gpu = GPUS.get(kind.gpu) or _unknown_gpu(kind.gpu, request)
    if request.board_w is not None:
        gpu = replace(gpu, board_w=request.board_w)
    if request.idle_w is not None:
        gpu = replace(gpu, loaded_w=request.idle_w, idle_origin="loaded: measured by who fitted it; bare: as before")
    return gpu


def _unknown_gpu(name: str, request: FitRequest) -> GpuPhysics:
    """A GPU the project has no figures of: limits from the measurements, shape of the clock law as on known GPUs."""
    clocks = [m.sm_clock_mhz for m in request.measurements if m.sm_clock_mhz]
    powers = [m.power_w for m in request.measurements if m.power_w]
    if not clocks:
        raise FitRefusedError(f"unknown GPU {name!r} and no sm_clock_mhz in any row: its clock range is not known")
    if not powers:
        raise FitRefusedError(f"unknown GPU {name!r} and no power column: nothing is known of its power")
    highest = max(clocks)
    board_w = request.board_w or 1.02 * max(powers)
    loaded_w = request.idle_w or UNKNOWN_GPU_IDLE_SHARE * min(powers)
    reference = GPUS["H100-SXM"]
    return replace(
        reference,
        name=name,
        memory_bytes=0.0,
        bandwidth_bytes_per_s=0.0,
        flops_per_s={},
        max_clock_mhz=highest,
        min_clock_mhz=min(clocks),
        board_w=board_w,
        bare_w=UNKNOWN_GPU_BARE_SHARE * loaded_w,
        loaded_w=loaded_w,
        active_w=0.05 * board_w,
        compute_w=0.85 * board_w,
        memory_w=0.33 * board_w,
        knee_mhz=reference.knee_mhz / reference.max_clock_mhz * highest,
        issue_mhz=reference.issue_mhz / reference.max_clock_mhz * highest,
        idle_origin="physical assumption: shares of the lowest power measured",
    )


def _idle_unknown(kind: Measurement, request: FitRequest) -> bool:
    return kind.gpu not in GPUS and request.idle_w is None


def _prior(kind: Measurement, gpu: GpuPhysics, rows: Sequence[Measurement]) -> Prior:
    if kind.model in MODELS and kind.gpu in GPUS and kind.precision in gpu.flops_per_s:
        return nominal_prior(MODELS[kind.model], gpu, kind.precision)
    return empirical_prior(rows)


def _kv_capacity(kind: Measurement, gpu: GpuPhysics, request: FitRequest) -> dict[int, int]:
    """Tokens by TP: as given, else from the memory sizes, else what was seen to run."""
    capacity = {}
    for tp in sorted({m.tp for m in request.measurements}):
        if tp in request.kv_capacity:
            capacity[tp] = request.kv_capacity[tp]
        elif kind.model in MODELS and kind.gpu in GPUS and kind.precision in KNOWN_PRECISIONS:
            capacity[tp] = MODELS[kind.model].kv_capacity_tokens(tp, gpu.memory_bytes, kind.precision)
            if capacity[tp] <= 0:
                raise FitRefusedError(f"{kind.model} in {kind.precision} does not fit {tp} x {gpu.name}")
        else:
            capacity[tp] = int(max(_in_flight_tokens(m) for m in request.measurements if m.tp == tp))
    return capacity


def _in_flight_tokens(m: Measurement) -> float:
    mean_share = 0.5 * (1.0 + m.load.shortest_share)
    return min(m.load.clients, m.load.max_running) * mean_share * (m.load.input_tokens + m.load.output_tokens)


def _usable(measurements: Sequence[Measurement], kv_capacity: dict[int, int]) -> tuple[list[Measurement], list[str]]:
    """Rows that speak of the engine: within its KV cache, and not held up in front of it."""
    fitting, usable, left_out = [], [], []
    rows_of_tp = {tp: sum(m.tp == tp for m in measurements) for tp in kv_capacity}
    for m in measurements:
        if rows_of_tp[m.tp] < FEWEST_ROWS_PER_TP and max(rows_of_tp.values()) >= FEWEST_ROWS_PER_TP:
            left_out.append(f"{m.where}: only {rows_of_tp[m.tp]} rows of TP {m.tp}, too few for a fit")
        elif _in_flight_tokens(m) > kv_capacity[m.tp]:
            left_out.append(f"{m.where}: {_in_flight_tokens(m):.0f} tokens in flight exceed the KV cache")
        else:
            fitting.append(m)
    for m in fitting:
        if _held_up(m, fitting):
            left_out.append(f"{m.where}: first tokens come later than from fewer GPUs: waited outside the engine")
        else:
            usable.append(m)
    return usable, left_out


def _held_up(m: Measurement, measurements: Sequence[Measurement]) -> bool:
    """Whether the same load on fewer GPUs had its first tokens clearly sooner: no engine does that, front ends do."""
    fewer = (o.ttft_s for o in measurements if o.tp < m.tp and o.load == m.load and o.sm_clock_mhz == m.sm_clock_mhz)
    known = [ttft_s for ttft_s in fewer if ttft_s]
    return bool(known and m.ttft_s and m.ttft_s > HELD_UP * min(known))


def _activities(
    request: FitRequest, rows: Sequence[Measurement], times: TimeFit, gpu: GpuPhysics
) -> tuple[list[Activity], list[object]]:
    """Power readings as activities, and the group each is left out with in cross-validation."""
    measured = activities_of_loops(rows, times.times, gpu)
    groups: list[object] = [m.shape for m in rows if m.power_w is not None]
    served = activities_of_served(request.served_power, gpu)
    # 1-2-4-.. classes of batch within one model and TP: neighbours in a sweep go together
    groups += [(s.model, s.tp, round(float(np.log2(s.sequences)))) for s in request.served_power]
    return measured + served, groups


def _clocks(rows: Sequence[Measurement], gpu: GpuPhysics) -> tuple[int, ...]:
    measured = sorted({m.sm_clock_mhz for m in rows if m.sm_clock_mhz})
    if len(measured) > 1:
        return tuple(measured)
    lowest = 800 if gpu.max_clock_mhz > 1600 else 600
    return gpu.clocks_mhz(lowest)


def _validity(rows: Sequence[Measurement]) -> Validity:
    inputs = [m.shape[0] for m in rows]
    outputs = [m.shape[1] for m in rows]
    clients = [m.load.clients for m in rows]
    return Validity((min(inputs), max(inputs)), (min(outputs), max(outputs)), (min(clients), max(clients)))


def _origin(gpu: GpuPhysics, rows: Sequence[Measurement], power: PowerFit | None) -> dict[str, str]:
    clocks = {m.sm_clock_mhz for m in rows if m.sm_clock_mhz}
    swept = len(clocks) > 1
    origin = {
        "load": "fitted to closed-loop measurements",
        "tensor_parallel": "fitted: every TP was measured",
        "sm_clock": f"fitted over {len(clocks)} clocks" if swept else "physical assumption: measured at one clock only",
        "idle_power": gpu.idle_origin,
        "activity_power": "fitted" if power else "physical assumption: no power was measured",
    }
    if power and "knee_mhz" not in power.fitted:
        origin["voltage"] = "physical assumption: flat below the knee, linear above"
    elif power:
        origin["voltage"] = "fitted over the measured clocks"
    return origin
