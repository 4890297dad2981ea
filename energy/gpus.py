"""GpuPhysics: what a GPU's datasheet and published measurements say about its speed and power over the SM clock.

Values and plain formulas; never reads a device. Public data sweep neither clock nor voltage on these boards, so the
clock axis is a physical assumption: activity power goes with f * V(f)^2, V is flat below a knee and rises linearly
above it, arithmetic slows as 1 / f, and memory bandwidth holds until the SMs no longer issue enough loads.
"""

from dataclasses import dataclass

from energy.profile import GpuState, ProfileError


@dataclass(frozen=True, slots=True)
class GpuPhysics:
    """One GPU board. Powers in watts, clocks in MHz, rates per second for one GPU."""

    name: str
    memory_bytes: float
    bandwidth_bytes_per_s: float
    flops_per_s: dict[str, float]  # dense tensor-core peak by precision
    max_clock_mhz: int
    min_clock_mhz: int
    clock_step_mhz: int
    board_w: float
    bare_w: float  # powered, no context
    loaded_w: float  # context and weights resident, idle, at the maximum clock
    idle_clock_share: float  # share of loaded_w that follows the clock
    active_w: float  # added while any kernel runs, at the maximum clock
    compute_w: float  # added at full arithmetic rate, at the maximum clock
    memory_w: float  # added at full memory bandwidth, at the maximum clock
    memory_clock_share: float  # share of memory_w that is spent in the core's clock domain
    knee_mhz: float  # below it the voltage is at its floor
    floor_voltage: float  # floor voltage over the voltage at the maximum clock
    issue_mhz: float  # clock at which SM issue would stretch memory traffic by 2^(1/4)
    idle_origin: str = "physical assumption"  # where bare_w and loaded_w come from

    def supported(self, sm_clock_mhz: float) -> int:
        """The clock the board runs at when asked for this one: the nearest of its steps."""
        clock_mhz = min(max(sm_clock_mhz, self.min_clock_mhz), self.max_clock_mhz)
        steps = round((clock_mhz - self.min_clock_mhz) / self.clock_step_mhz)
        return min(self.min_clock_mhz + steps * self.clock_step_mhz, self.max_clock_mhz)

    def voltage(self, sm_clock_mhz: float) -> float:
        """Core voltage relative to that at the maximum clock."""
        above = max(0.0, sm_clock_mhz - self.knee_mhz) / (self.max_clock_mhz - self.knee_mhz)
        return self.floor_voltage + (1.0 - self.floor_voltage) * above

    def dynamic_scale(self, sm_clock_mhz: float) -> float:
        """Product f * V^2 relative to the maximum clock: how core activity power shrinks."""
        return sm_clock_mhz / self.max_clock_mhz * self.voltage(sm_clock_mhz) ** 2

    def compute_slowdown(self, sm_clock_mhz: float) -> float:
        """How many times longer arithmetic takes than at the maximum clock."""
        return self.max_clock_mhz / sm_clock_mhz

    def memory_slowdown(self, sm_clock_mhz: float) -> float:
        """How many times longer memory traffic takes than at the maximum clock; about 1 until low clocks."""
        bound = 1.0 + (self.issue_mhz / sm_clock_mhz) ** 4
        bound_at_max = 1.0 + (self.issue_mhz / self.max_clock_mhz) ** 4
        ratio: float = (bound / bound_at_max) ** 0.25
        return ratio

    def idle_w(self, sm_clock_mhz: float) -> float:
        """Power of a loaded, idle GPU at this clock."""
        share = self.idle_clock_share
        return self.loaded_w * (1.0 - share + share * self.dynamic_scale(sm_clock_mhz))

    def state_w(self, state: GpuState, sm_clock_mhz: float) -> float:
        """Power of a GPU that runs no step; a parked GPU is locked at its minimum clock whatever is asked."""
        if state is GpuState.OFF:
            return 0.0
        if state is GpuState.BARE:
            return self.bare_w
        return self.idle_w(self.min_clock_mhz if state is GpuState.PARKED else sm_clock_mhz)

    def memory_power_scale(self, sm_clock_mhz: float) -> float:
        """How the power of full memory use shrinks: the DRAM's part does not move with the SM clock."""
        share = self.memory_clock_share
        return 1.0 - share + share * self.dynamic_scale(sm_clock_mhz)

    def clocks_mhz(self, lowest_mhz: int = 800, step_mhz: int = 200) -> tuple[int, ...]:
        """Clocks to offer, ascending: the paper's 800.. in 200 MHz steps, then the maximum."""
        return (*range(lowest_mhz, self.max_clock_mhz - step_mhz // 2, step_mhz), self.max_clock_mhz)


# Peaks, bandwidth, board power and clocks: NVIDIA datasheets (dense, SXM). H100 bare and loaded: measured 71.8 and
# 121.7 W; low clocks cut idle power by 22 % (arXiv 2604.04745), hence idle_clock_share. active_w, compute_w, memory_w
# are priors of a fit: a prefill at full rate draws the board's power (Splitwise), decoding 137-300 W on H200 and
# 47-90 W less at 780 MHz, losing under 2 % (arXiv 2605.11999): hence memory_w, memory_clock_share, floor_voltage and
# issue_mhz. The knee puts the paper's U-shape of energy over clock where it reports it. The H200 is the H100's die.
# A100: Splitwise's averages of decoding one sequence (174, 238, 294 W at 19, 39, 63 % of bandwidth) are a line through
# 122 W with 273 W for the whole bandwidth; its lowest averages, over mostly idle time, are 69 W.
_H100 = GpuPhysics(
    name="H100-SXM",
    memory_bytes=80e9,
    bandwidth_bytes_per_s=3.35e12,
    flops_per_s={"bf16": 989e12, "fp8": 1979e12},
    max_clock_mhz=1980,
    min_clock_mhz=345,
    clock_step_mhz=15,
    board_w=700.0,
    bare_w=71.8,
    loaded_w=121.7,
    idle_clock_share=0.24,
    active_w=25.0,
    compute_w=600.0,
    memory_w=230.0,
    memory_clock_share=0.33,
    knee_mhz=1400.0,
    floor_voltage=0.70,
    issue_mhz=400.0,
    idle_origin="published measurements",
)
_H200 = GpuPhysics(
    name="H200-SXM",
    memory_bytes=141e9,
    bandwidth_bytes_per_s=4.8e12,
    flops_per_s={"bf16": 989e12, "fp8": 1979e12},
    max_clock_mhz=1980,
    min_clock_mhz=345,
    clock_step_mhz=15,
    board_w=700.0,
    bare_w=75.0,
    loaded_w=121.7,
    idle_clock_share=0.24,
    active_w=25.0,
    compute_w=600.0,
    memory_w=230.0,
    memory_clock_share=0.33,
    knee_mhz=1400.0,
    floor_voltage=0.70,
    issue_mhz=400.0,
    idle_origin="physical assumption: as the H100's, with a little more for its memory when bare",
)
_A100 = GpuPhysics(
    name="A100-80GB-SXM",
    memory_bytes=80e9,
    bandwidth_bytes_per_s=2.039e12,
    flops_per_s={"bf16": 312e12},
    max_clock_mhz=1410,
    min_clock_mhz=210,
    clock_step_mhz=15,
    board_w=400.0,
    bare_w=52.0,
    loaded_w=69.0,
    idle_clock_share=0.24,
    active_w=53.0,
    compute_w=330.0,
    memory_w=270.0,
    memory_clock_share=0.33,
    knee_mhz=1000.0,
    floor_voltage=0.75,
    issue_mhz=350.0,
    idle_origin="loaded: Splitwise's averages over mostly idle time; bare: physical assumption",
)
GPUS: dict[str, GpuPhysics] = {gpu.name: gpu for gpu in (_H100, _H200, _A100)}


def gpu_physics(name: str) -> GpuPhysics:
    """The GPU of this name. Raises ``ProfileError`` naming the known ones."""
    try:
        return GPUS[name]
    except KeyError:
        raise ProfileError(f"unknown GPU {name!r}; known: {', '.join(GPUS)}") from None
