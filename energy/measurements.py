"""Measurement and PowerSample: what someone measured on real GPUs, in the one form that fits and tables take.

Values and selection only; files are read in ``energy/adapters``.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from energy.closed_loop import LoadShape
from energy.profile import ProfileError


class FitRefusedError(ProfileError):
    """The measurements cannot carry a fit; the message says what is missing."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """One row: a load on one instance, and the mean latencies and power it showed (None = not measured)."""

    where: str  # file and line
    gpu: str
    model: str
    precision: str
    engine: str
    tp: int
    sm_clock_mhz: int | None  # None = the GPU's maximum
    load: LoadShape
    ttft_s: float | None
    tpot_s: float | None
    power_w: float | None = None  # per GPU
    ttft_p99_s: float | None = None
    tbt_p99_s: float | None = None
    rate_rps: float | None = None  # given instead of concurrency

    @property
    def shape(self) -> tuple[int, int]:
        """(input, output) tokens."""
        return int(self.load.input_tokens), int(self.load.output_tokens)


@dataclass(frozen=True, slots=True)
class ServedPower:
    """Power per GPU of an instance whose own batch and step time were measured, so that its activity is known."""

    where: str
    gpu: str
    model: str
    precision: str
    tp: int
    sequences: float  # mean batch
    step_s: float  # mean time between tokens
    output_tokens: float  # mean of a request
    power_w: float


def clients_of_rate(rate_rps: float, ttft_s: float, tbt_s: float, output_tokens: float) -> int:
    """Clients of the closed loop that keeps as many requests in flight as an open loop at this rate (Little's law)."""
    return max(1, round(rate_rps * (ttft_s + tbt_s * max(output_tokens - 1.0, 0.0))))


def one_kind(measurements: Sequence[Measurement]) -> Measurement:
    """Any of the measurements, once it is sure that all are of one GPU, model, precision and engine.

    Raises ``FitRefusedError`` naming what differs: precisions and engines are never mixed in one profile.
    """
    if not measurements:
        raise FitRefusedError("no measurement left to fit")
    for what in ("gpu", "model", "precision", "engine"):
        seen = sorted({getattr(each, what) for each in measurements})
        if len(seen) > 1:
            kinds = ", ".join(repr(each) for each in seen)
            raise FitRefusedError(f"mixed {what}: {kinds}; a profile holds for one, choose it with --{what}")
    return measurements[0]
