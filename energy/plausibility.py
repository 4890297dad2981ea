"""findings: what a profile gives that no GPU does. Empty for a profile that may be trusted to be physical."""

from collections.abc import Iterator

from energy.gpus import GPUS
from energy.profile import EnergyProfile, GpuState, StepCoefficients, step_power_w, step_time_s

# a pure prefill and two decode batches: (prefill tokens, attention, decoding sequences, context)
_BATCHES = (
    (2048.0, 2048.0**2 / 2, 0.0, 0.0),
    (0.0, 0.0, 1.0, 1000.0),
    (0.0, 0.0, 64.0, 64_000.0),
    (512.0, 512.0**2 / 2, 32.0, 32_000.0),
)
_SLACK = 1.0 + 1e-9


def findings(profile: EnergyProfile) -> list[str]:
    """One sentence for each thing that is not physical."""
    impossible = list(_coefficients(profile))
    if impossible:  # nothing can be computed with them
        return impossible
    return [
        *_clock_axis(profile),
        *_tensor_parallel_axis(profile),
        *_idle_states(profile),
        *_board(profile),
    ]


def _coefficients(profile: EnergyProfile) -> Iterator[str]:
    for tp in profile.tensor_parallel:
        for clock in profile.sm_clocks_mhz:
            c = profile.step(tp, clock)
            for name in StepCoefficients._fields:
                value = getattr(c, name)
                if not 0.0 <= value < float("inf"):
                    yield f"TP{tp} at {clock} MHz: {name} is {value}, it must be 0 or more and finite"
            if c.sharpness < 1.0:
                yield f"TP{tp} at {clock} MHz: sharpness is {c.sharpness}, it must be 1 or more"
            if c.weights_s == 0.0 or c.compute_s_per_token == 0.0:
                yield f"TP{tp} at {clock} MHz: weights_s and compute_s_per_token must be above 0"
        if profile.kv_capacity_tokens(tp) <= 0:
            yield f"TP{tp}: no KV cache beside the weights ({profile.kv_capacity_tokens(tp)} tokens)"


def _clock_axis(profile: EnergyProfile) -> Iterator[str]:
    for tp in profile.tensor_parallel:
        for slow, fast in zip(profile.sm_clocks_mhz, profile.sm_clocks_mhz[1:], strict=False):
            a, b = profile.step(tp, slow), profile.step(tp, fast)
            if any(step_time_s(b, *batch) > step_time_s(a, *batch) * _SLACK for batch in _BATCHES):
                yield f"TP{tp}: a step takes longer at {fast} than at {slow} MHz"
            if any(step_power_w(b, *batch) * _SLACK < step_power_w(a, *batch) for batch in _BATCHES):
                yield f"TP{tp}: a step draws less at {fast} than at {slow} MHz"


def _tensor_parallel_axis(profile: EnergyProfile) -> Iterator[str]:
    clock = profile.sm_clocks_mhz[-1]
    for few, many in zip(profile.tensor_parallel, profile.tensor_parallel[1:], strict=False):
        times = [step_time_s(profile.step(tp, clock), *_BATCHES[0]) for tp in (few, many)]
        if times[1] > times[0]:
            slower, quicker = f"TP{many} ({times[1]:.3f} s)", f"TP{few} ({times[0]:.3f} s)"
            yield f"a prefill of 2048 tokens takes longer on {slower} than on {quicker}"


def _idle_states(profile: EnergyProfile) -> Iterator[str]:
    clock = profile.sm_clocks_mhz[-1]
    states = (GpuState.OFF, GpuState.BARE, GpuState.PARKED, GpuState.LOADED)
    powers = [profile.idle_power_w(state, clock) for state in states]
    if powers != sorted(powers):
        told = ", ".join(f"{state.value} {power:.0f} W" for state, power in zip(states, powers, strict=True))
        yield f"idle power must rise from off over bare and parked to loaded, not {told}"


def _board(profile: EnergyProfile) -> Iterator[str]:
    gpu = GPUS.get(profile.gpu)
    c = profile.step(profile.tensor_parallel[0], profile.sm_clocks_mhz[-1])
    if gpu and c.max_w > gpu.board_w * _SLACK:
        yield f"the power limit of {c.max_w:.0f} W is above the {gpu.board_w:.0f} W of {gpu.name}"
    if c.idle_w >= c.max_w:
        yield f"idle power {c.idle_w:.0f} W is not below the limit of {c.max_w:.0f} W"
