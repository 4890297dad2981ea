"""Accounting's values: what is metered, who used it, and what it cost. Nothing here computes.

The rule of all of it: a meter's joules are never made or lost. Every joule of an interval is booked once, as prefill or
decode of a request, as idle, or as transition (an instance that starts, drains empty, or wakes).
"""

from dataclasses import dataclass, field
from enum import Enum

import msgspec

from energy.profile import StepCoefficients


class Use(Enum):
    """What GPUs are held for, when no request is on them: how their energy is booked then."""

    IDLE = "idle"  # ready, parked, or held by nobody
    TRANSITION = "transition"  # starting, draining or waking


@dataclass(frozen=True, slots=True)
class MeteredInstance:
    """One instance as accounting sees it, while it stays as it is. Of GPUs that nobody holds, ``pool`` is empty."""

    id: str
    pool: str
    model: str
    gpu: str  # what it is priced by, as H100-SXM
    gpus: int
    use: Use
    idle_w: float  # of one of its GPUs, with nothing to do, at its clock
    coefficients: StepCoefficients | None = None  # None: never serves; all its energy goes to ``use``


@dataclass(frozen=True, slots=True)
class Interval:
    """What the GPUs of one instance drew between two readings."""

    instance: MeteredInstance
    begin_s: float
    end_s: float
    energy_j: float


class User(msgspec.Struct, frozen=True, gc=False):
    """Whose request it was; the dimensions of a report."""

    model: str
    pool: str
    request_class: str
    tenant: str


# GPU-hours on the rental market, December 2025; of the H200, the low end of 2.50-7.00 (May 2026).
GPU_HOUR_USD: dict[str, float] = {
    "H100-SXM": 2.25,
    "H200-SXM": 2.50,
    "A100-80GB-SXM": 1.35,
    "L40S": 0.87,
}


@dataclass(frozen=True, slots=True)
class Prices:
    """What GPUs and electricity cost, in US dollars.

    A rented GPU-hour includes its electricity: so the default price of a kWh is 0. Who owns the machines sets it, and
    the GPU-hour to what the hardware costs without power.
    """

    gpu_hour_usd: dict[str, float] = field(default_factory=lambda: dict(GPU_HOUR_USD))
    electricity_usd_per_kwh: float = 0.0


@dataclass(slots=True)
class EnergyRow:
    """What one user, or an idle or changing part of a pool, took in one stretch of time. Sums, that add up."""

    requests: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    prefill_j: float = 0.0
    decode_j: float = 0.0
    idle_j: float = 0.0
    transition_j: float = 0.0
    gpu_s: float = 0.0
    co2_g: float = 0.0
    gpu_usd: float = 0.0
    electricity_usd: float = 0.0

    @property
    def energy_j(self) -> float:
        """All of it."""
        return self.prefill_j + self.decode_j + self.idle_j + self.transition_j

    def add(self, other: "EnergyRow") -> None:
        """Add another's sums."""
        self.requests += other.requests
        self.input_tokens += other.input_tokens
        self.output_tokens += other.output_tokens
        self.prefill_j += other.prefill_j
        self.decode_j += other.decode_j
        self.idle_j += other.idle_j
        self.transition_j += other.transition_j
        self.gpu_s += other.gpu_s
        self.co2_g += other.co2_g
        self.gpu_usd += other.gpu_usd
        self.electricity_usd += other.electricity_usd


@dataclass(frozen=True, slots=True)
class UserRow:
    """A row and whose it is."""

    user: User
    row: EnergyRow


@dataclass(frozen=True, slots=True)
class EnergyWindow:
    """What the ledger knows of a stretch of time, whole minutes; Unix seconds."""

    begin_unix_s: float
    end_unix_s: float
    rows: tuple[UserRow, ...]
    carbon_source: str
    unpriced_gpus: tuple[str, ...] = ()  # GPUs with no price: their hours cost nothing here
