"""Workloads made from a rate curve, an arrival process and a length distribution. Pure: everything by seed.

Each slot of the curve has a random stream of its own, seeded by (seed, slot): a slot's requests do not depend on
how many the slots before it held, and a week needs no more memory than its fullest slot.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from simulator.workload.arrivals import Arrivals, FloatColumn, Workload, WorkloadError
from simulator.workload.lengths import LengthDistribution
from simulator.workload.processes import filled, gamma_gaps, poisson_slot


@dataclass(frozen=True, slots=True)
class RateCurve:
    """Requests per second, constant inside each slot; ``slot_s`` holds the length of every slot."""

    rates_rps: FloatColumn  # shape (slots,), >= 0
    slot_s: FloatColumn  # shape (slots,), > 0

    def __post_init__(self) -> None:
        if len(self.rates_rps) == 0 or self.rates_rps.shape != self.slot_s.shape:
            raise WorkloadError("a rate curve needs a rate and a length for each of its slots")
        if self.rates_rps.min() < 0 or self.slot_s.min() <= 0:
            raise WorkloadError("a rate curve needs rates of at least 0 and slots longer than 0")

    @staticmethod
    def even(rates_rps: FloatColumn, slot_s: float) -> "RateCurve":
        """A curve whose slots are all ``slot_s`` long."""
        return RateCurve(rates_rps, np.full(len(rates_rps), slot_s))

    def times(self, factor: float) -> "RateCurve":
        """The same curve at ``factor`` times the rates."""
        return RateCurve(self.rates_rps * factor, self.slot_s)

    @property
    def starts_s(self) -> FloatColumn:
        """Where each slot begins; shape (slots,)."""
        return np.concatenate(([0.0], np.cumsum(self.slot_s)[:-1]))

    @property
    def duration_s(self) -> float:
        """How long the curve is."""
        return float(self.slot_s.sum())

    @property
    def expected_requests(self) -> float:
        """The area under the curve."""
        return float(self.rates_rps @ self.slot_s)


def generated(
    name: str,
    curve: RateCurve,
    lengths: LengthDistribution,
    seed: int,
    gap_cv: float = 1.0,
    starts_unix_s: float | None = None,
) -> Workload:
    """A workload with this rate curve and these lengths.

    At ``gap_cv`` 1 it is a non-homogeneous Poisson process. Above or below, each slot's count is still Poisson and
    its gaps are gamma with that coefficient of variation. Raises WorkloadError for a cv that is not above 0.
    """
    if not gap_cv > 0:
        raise WorkloadError(f"{name}: a coefficient of variation of {gap_cv:g} is not above 0")
    starts_s = curve.starts_s

    def begin() -> Iterator[Arrivals]:
        for slot, start_s in enumerate(starts_s):
            rng = np.random.default_rng([seed, slot])
            rate_rps, slot_s = float(curve.rates_rps[slot]), float(curve.slot_s[slot])
            if gap_cv == 1.0:
                times_s = poisson_slot(rng, rate_rps, slot_s)
            else:
                count = int(rng.poisson(rate_rps * slot_s))
                times_s = filled(gamma_gaps(rng, count + 1, gap_cv**-2), slot_s)
            yield Arrivals(times_s + start_s, *lengths.sample(rng, len(times_s)))

    process = "Poisson" if gap_cv == 1.0 else f"gamma gaps of CV {gap_cv:g} inside a slot"
    return Workload(
        name,
        curve.duration_s,
        curve.expected_requests,
        begin,
        starts_unix_s,
        (f"arrivals drawn: {process}, seed {seed}",),
    )


def poisson(
    rate_rps: float, duration_s: float, lengths: LengthDistribution, seed: int, name: str = "poisson"
) -> Workload:
    """Arrivals at one constant mean rate, in slots of at most a minute."""
    if not rate_rps > 0 or not duration_s > 0:
        raise WorkloadError(f"{name}: rate and duration must be above 0, not {rate_rps:g} /s and {duration_s:g} s")
    slots = max(1, int(np.ceil(duration_s / 60)))
    curve = RateCurve.even(np.full(slots, rate_rps), duration_s / slots)
    return generated(name, curve, lengths, seed)
