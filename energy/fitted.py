"""FittedProfile: an EnergyProfile from a few coefficients per tensor parallelism and the physics of a GPU.

The coefficients hold at the maximum clock; ``GpuPhysics`` moves them to any other. Pure: files are read in
``energy/adapters``. Source of the form: roofline (compute against memory traffic) with host and communication terms;
DynamoLLM section IV for the axes (load x TP x clock).
"""

from dataclasses import dataclass, field
from typing import TypeVar

from energy.gpus import GpuPhysics
from energy.profile import GpuState, ProfileRangeError, StepCoefficients

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class StepTimes:
    """What a step costs on one TP at the maximum clock, in seconds; the fields are those of ``StepCoefficients``."""

    overhead_s: float
    host_s_per_seq: float
    compute_s_per_token: float
    attention_s_per_token2: float
    weights_s: float
    kv_s_per_token: float
    communication_s: float
    communication_s_per_token: float
    sharpness: float


def at_clock(times: StepTimes, gpu: GpuPhysics, sm_clock_mhz: float) -> StepCoefficients:
    """Coefficients of a step at a clock: times stretched and powers scaled by the GPU's clock law.

    Powers are per unit of activity, and activity is counted in time that the clock has already stretched.
    """
    slower, memory_slower = gpu.compute_slowdown(sm_clock_mhz), gpu.memory_slowdown(sm_clock_mhz)
    scale = gpu.dynamic_scale(sm_clock_mhz)
    return StepCoefficients(
        overhead_s=times.overhead_s,
        host_s_per_seq=times.host_s_per_seq,
        compute_s_per_token=times.compute_s_per_token * slower,
        attention_s_per_token2=times.attention_s_per_token2 * slower,
        weights_s=times.weights_s * memory_slower,
        kv_s_per_token=times.kv_s_per_token * memory_slower,
        communication_s=times.communication_s,
        communication_s_per_token=times.communication_s_per_token,
        sharpness=times.sharpness,
        idle_w=gpu.idle_w(sm_clock_mhz),
        active_w=gpu.active_w * scale,
        compute_w=gpu.compute_w * scale,
        memory_w=gpu.memory_w * gpu.memory_power_scale(sm_clock_mhz),
        max_w=gpu.board_w,
    )


@dataclass(frozen=True, slots=True)
class Validity:
    """Where the fit has data: outside it the profile extrapolates."""

    input_tokens: tuple[int, int]
    output_tokens: tuple[int, int]
    concurrency: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Source:
    """One published data set that took part in a fit."""

    name: str
    commit: str
    licence: str
    rows: int


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where a profile's numbers come from and how well they hold."""

    origin: dict[str, str]  # axis -> measured | fitted | physical assumption, with a reason
    sources: tuple[Source, ...] = ()
    validity: Validity | None = None
    errors: dict[str, float] = field(default_factory=dict)  # cross-validated medians, as ttft_median


@dataclass(frozen=True, slots=True)
class FittedProfile:
    """One (model, GPU, precision) at every TP of ``times`` and every clock of the GPU."""

    name: str
    model: str
    precision: str
    engine: str
    physics: GpuPhysics
    times: dict[int, StepTimes]
    kv_capacity: dict[int, int]  # tp -> tokens
    sm_clocks_mhz: tuple[int, ...]
    provenance: Provenance

    @property
    def gpu(self) -> str:
        """Name of the GPU."""
        return self.physics.name

    @property
    def tensor_parallel(self) -> tuple[int, ...]:
        """TPs with coefficients, ascending."""
        return tuple(sorted(self.times))

    def step(self, tp: int, sm_clock_mhz: float) -> StepCoefficients:
        """Coefficients at this TP and clock. Raises ``ProfileRangeError`` for a TP or clock it does not hold."""
        times = self._of_tp(self.times, tp)
        self._check_clock(sm_clock_mhz)
        return at_clock(times, self.physics, sm_clock_mhz)

    def kv_capacity_tokens(self, tp: int) -> int:
        """Tokens of KV cache of one instance. Raises ``ProfileRangeError`` for a TP it does not hold."""
        return self._of_tp(self.kv_capacity, tp)

    def idle_power_w(self, state: GpuState, sm_clock_mhz: float) -> float:
        """Power of one GPU that runs no step. Raises ``ProfileRangeError`` for a clock outside the GPU's range."""
        self._check_clock(sm_clock_mhz)
        return self.physics.state_w(state, sm_clock_mhz)

    def _of_tp(self, table: dict[int, _T], tp: int) -> _T:
        try:
            return table[tp]
        except KeyError:
            held = ", ".join(str(tp) for tp in self.tensor_parallel)
            raise ProfileRangeError(f"profile {self.name} holds for TP {held}, not TP {tp}") from None

    def _check_clock(self, sm_clock_mhz: float) -> None:
        low, high = self.physics.min_clock_mhz, self.physics.max_clock_mhz
        if not low <= sm_clock_mhz <= high:
            raise ProfileRangeError(f"profile {self.name} holds for SM clocks of {low}..{high} MHz, not {sm_clock_mhz}")
