"""TraceStatistics: the few numbers that make a synthetic trace like a real one, and how they are taken from it.

Kept: the rate of every slot, how uneven gaps are inside a slot, the shares of the nine request classes, and for each
class the quantiles of its input and output lengths. Lost: how lengths correlate inside a class, how one user's
requests follow each other, what repeats.
"""

from dataclasses import dataclass

import numpy as np

from pools.classes import ClassCuts
from simulator.workload.arrivals import Arrivals, FloatColumn, TokenColumn, Workload
from simulator.workload.generated import RateCurve, generated
from simulator.workload.lengths import ClassLengths

# finer at the top: a tail of a few long requests holds a good part of all tokens
PROBABILITIES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 1.0)
FEWEST_GAPS = 10  # slots with fewer gaps say nothing of their unevenness


@dataclass(frozen=True, slots=True)
class TraceStatistics:
    """What a synthetic trace is made from; plain numbers, so that they can be shipped.

    Counts and lengths only: ``slot_requests`` are the requests of each slot of ``slot_s`` seconds,
    ``class_requests[c]`` those of each request class, ``*_quantiles[c]`` token counts at
    ``PROBABILITIES`` (empty for a class that has none).
    """

    name: str
    source: str
    slot_s: float
    slot_requests: tuple[int, ...]
    gap_cv: float
    class_requests: tuple[int, ...]
    input_quantiles: tuple[tuple[int, ...], ...]
    output_quantiles: tuple[tuple[int, ...], ...]
    starts_unix_s: float | None = None

    def lengths(self) -> ClassLengths:
        """Its mix of lengths."""
        seen = [index for index, requests in enumerate(self.class_requests) if requests]
        return ClassLengths(
            np.array([self.class_requests[index] for index in seen], float),
            np.array(PROBABILITIES),
            np.array([self.input_quantiles[index] for index in seen], float),
            np.array([self.output_quantiles[index] for index in seen], float),
        )

    def curve(self) -> RateCurve:
        """Its rate over time."""
        return RateCurve.even(np.array(self.slot_requests, float) / self.slot_s, self.slot_s)

    def workload(self, seed: int, rate_scale: float = 1.0) -> Workload:
        """A synthetic trace with these statistics, at ``rate_scale`` times the rate."""
        return generated(
            self.name, self.curve().times(rate_scale), self.lengths(), seed, self.gap_cv, self.starts_unix_s
        )


def classes_of(input_tokens: TokenColumn, output_tokens: TokenColumn, cuts: ClassCuts | None = None) -> TokenColumn:
    """The RequestClass value of each request; shape (n,)."""
    kept = cuts or ClassCuts()
    input_size = np.searchsorted(kept.input_tokens, input_tokens, side="right")
    output_size = np.searchsorted(kept.output_tokens, output_tokens, side="right")
    return (3 * input_size + output_size).astype(np.int32)


def class_shares(arrivals: Arrivals) -> FloatColumn:
    """The share of each of the nine classes, summing to 1; shape (9,)."""
    counts = np.bincount(classes_of(arrivals.input_tokens, arrivals.output_tokens), minlength=9)
    return counts / max(len(arrivals), 1)


def taken_from(workload: Workload, name: str, source: str, slot_s: float) -> TraceStatistics:
    """The statistics of a trace that fits in memory; the rate of its last, incomplete slot is left out."""
    arrivals = workload.collect()
    slots = max(int(workload.duration_s // slot_s), 1)
    inside = arrivals.at(arrivals.arrival_s < slots * slot_s)
    slot_of = (inside.arrival_s // slot_s).astype(np.intp)
    classes = classes_of(arrivals.input_tokens, arrivals.output_tokens)
    return TraceStatistics(
        name=name,
        source=source,
        slot_s=slot_s,
        slot_requests=tuple(int(n) for n in np.bincount(slot_of, minlength=slots)),
        gap_cv=_gap_cv(inside, slot_of, slots),
        class_requests=tuple(int(n) for n in np.bincount(classes, minlength=9)),
        input_quantiles=tuple(_quantiles(arrivals.input_tokens[classes == c]) for c in range(9)),
        output_quantiles=tuple(_quantiles(arrivals.output_tokens[classes == c]) for c in range(9)),
        starts_unix_s=workload.starts_unix_s,
    )


def _quantiles(tokens: TokenColumn) -> tuple[int, ...]:
    if len(tokens) == 0:
        return ()
    return tuple(round(float(q)) for q in np.quantile(tokens, PROBABILITIES))


def _gap_cv(arrivals: Arrivals, slot_of: "np.ndarray[tuple[int], np.dtype[np.intp]]", slots: int) -> float:
    """The median over slots of the coefficient of variation of the gaps inside a slot, to 2 digits."""
    cvs = []
    for slot in range(slots):
        gaps = np.diff(arrivals.arrival_s[slot_of == slot])
        if len(gaps) >= FEWEST_GAPS:
            cvs.append(float(gaps.std() / gaps.mean()))
    return round(float(np.median(cvs)), 2) if cvs else 1.0
