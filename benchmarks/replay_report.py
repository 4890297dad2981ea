"""What a replay measured, per request class and in all: latency, SLO attainment, throughput, energy, losses. Pure.

* TTFT: from sending (connecting included) to the first event of the stream.
* TBT: gaps between events that carry text, over all requests of a class; to 1 % (they are kept as a histogram).
* Within SLO: finished, TTFT within its class's limit, and its mean TBT within the limit. Whatever failed was not
  within; what was cut off by an interrupt counts neither way.
* Energy: what the target reports per request; beside it, what the GPUs' own counters say if they were read.
"""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from benchmarks.replay import INTERRUPTED, Outcome, ReplayRequest
from pools.classes import REQUEST_CLASSES, ClassSlos, RequestClass
from simulator.histograms import BUCKETS, LEAST_S, PER_LOG, quantile_s


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Of a set of times, in seconds; None where there is none."""

    p50: float | None = None
    p99: float | None = None
    max: float | None = None

    @staticmethod
    def of(values: list[float]) -> "Percentiles":
        """Over exact values."""
        if not values:
            return Percentiles()
        p50, p99, top = np.percentile(values, (50, 99, 100))
        return Percentiles(float(p50), float(p99), float(top))


@dataclass(slots=True)
class GapHistogram:
    """Times between tokens, counted in the simulator's buckets so that both worlds read alike."""

    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(BUCKETS, np.int64))

    def add(self, times_s: tuple[float, ...]) -> None:
        """Count the gaps of one stream."""
        if len(times_s) > 1:
            # bucket_of for all gaps at once: a long stream's end must not make the next request late
            over = np.log(np.maximum(np.diff(times_s), LEAST_S) / LEAST_S) * PER_LOG
            np.add.at(self.counts, np.minimum(np.where(over > 0, over + 1, 0).astype(np.intp), BUCKETS - 1), 1)

    def percentiles(self) -> Percentiles:
        """P50, P99 and the largest gap, at most 1 % too high."""
        if not self.counts.any():
            return Percentiles()
        return Percentiles(*(quantile_s(self.counts, share) for share in (0.5, 0.99, 1.0)))


@dataclass(frozen=True, slots=True)
class ClassReport:
    """The results of one request class, or of all."""

    requests: int
    finished: int
    failed: int
    interrupted: int
    ttft_s: Percentiles
    tbt_s: Percentiles
    within_slo: float | None  # share of the finished and failed; None if there are none
    input_tokens: int  # of the finished, as the target counted
    output_tokens: int
    output_tokens_per_s: float
    energy_j: float | None


@dataclass(frozen=True, slots=True)
class ReplayReport:
    """All results of one replay; its JSON form is described in docs/benchmarking.md."""

    trace: str
    url: str
    model: str
    speedup: float
    planned: int
    not_sent: int
    wall_s: float
    total: ClassReport
    classes: dict[str, ClassReport]  # by class name; only classes that had requests
    failures: dict[str, int]  # reason -> requests
    lateness_s: Percentiles  # sent minus due
    input_token_error: Percentiles  # |counted by the target - wanted|, in tokens
    other_output_length: int  # finished with another number of output tokens than asked for
    gpu_energy_j: float | None  # by the GPUs' counters over the replay

    @property
    def accounted(self) -> bool:
        """Whether every planned request is in exactly one of the counts."""
        total = self.total
        return (
            self.planned == self.not_sent + total.requests
            and total.requests == total.finished + total.failed + total.interrupted
            and total.failed + total.interrupted == sum(self.failures.values())
        )


@dataclass(slots=True)
class _ClassTally:
    requests: int = 0
    finished: int = 0
    interrupted: int = 0
    within: int = 0
    ttfts_s: list[float] = field(default_factory=list)
    gaps: GapHistogram = field(default_factory=GapHistogram)
    input_tokens: int = 0
    output_tokens: int = 0
    energy_j: float | None = None

    def report(self, wall_s: float) -> ClassReport:
        judged = self.requests - self.interrupted
        return ClassReport(
            requests=self.requests,
            finished=self.finished,
            failed=judged - self.finished,
            interrupted=self.interrupted,
            ttft_s=Percentiles.of(self.ttfts_s),
            tbt_s=self.gaps.percentiles(),
            within_slo=self.within / judged if judged else None,
            input_tokens=self.input_tokens,
            output_tokens=self.output_tokens,
            output_tokens_per_s=self.output_tokens / wall_s if wall_s > 0 else 0.0,
            energy_j=self.energy_j,
        )


class Tally:
    """Counts outcomes as they come in."""

    def __init__(self, slos: ClassSlos) -> None:
        self._slos = slos
        self._classes = {request_class: _ClassTally() for request_class in REQUEST_CLASSES}
        self._total = _ClassTally()
        self._failures: Counter[str] = Counter()
        self._lateness_s: list[float] = []
        self._input_errors: list[float] = []
        self._other_output_length = 0

    def add(self, request: ReplayRequest, outcome: Outcome) -> None:
        """Count one request that was sent."""
        request_class = self._slos.cuts.classify(request.input_tokens, request.output_tokens)
        within = self._within_slo(request, request_class, outcome)
        for tally in (self._classes[request_class], self._total):
            _count(tally, outcome, within)
        if outcome.failure is not None:
            self._failures[outcome.failure] += 1
        if outcome.failure != INTERRUPTED:
            self._lateness_s.append(outcome.sent_s - request.due_s)
        if outcome.failure is None:
            if outcome.prompt_tokens is not None:
                self._input_errors.append(float(abs(outcome.prompt_tokens - request.input_tokens)))
            self._other_output_length += outcome.completion_tokens != request.output_tokens

    @property
    def finished(self) -> int:
        """Requests that finished so far."""
        return self._total.finished

    @property
    def failed(self) -> int:
        """Requests that failed so far, interrupted ones included."""
        return sum(self._failures.values())

    def report(
        self,
        *,
        trace: str,
        url: str,
        model: str,
        speedup: float,
        planned: int,
        wall_s: float,
        gpu_energy_j: float | None = None,
    ) -> ReplayReport:
        """The results so far."""
        return ReplayReport(
            trace=trace,
            url=url,
            model=model,
            speedup=speedup,
            planned=planned,
            not_sent=planned - self._total.requests,
            wall_s=wall_s,
            total=self._total.report(wall_s),
            classes={
                request_class.name: tally.report(wall_s)
                for request_class, tally in self._classes.items()
                if tally.requests
            },
            failures=dict(self._failures.most_common()),
            lateness_s=Percentiles.of(self._lateness_s),
            input_token_error=Percentiles.of(self._input_errors),
            other_output_length=self._other_output_length,
            gpu_energy_j=gpu_energy_j,
        )

    def _within_slo(self, request: ReplayRequest, request_class: RequestClass, outcome: Outcome) -> bool:
        if outcome.failure is not None or outcome.ttft_s is None:
            return False
        slo = self._slos.slo(request_class, request.input_tokens)
        return outcome.ttft_s <= slo.ttft_s and (outcome.mean_tbt_s or 0.0) <= slo.tbt_s


def _count(tally: _ClassTally, outcome: Outcome, within: bool) -> None:
    tally.requests += 1
    tally.interrupted += outcome.failure == INTERRUPTED
    if outcome.failure is not None:
        return
    tally.finished += 1
    tally.within += within
    if outcome.ttft_s is not None:
        tally.ttfts_s.append(outcome.ttft_s)
    tally.gaps.add(outcome.token_s)
    tally.input_tokens += outcome.prompt_tokens or 0
    tally.output_tokens += outcome.completion_tokens or len(outcome.token_s)
    if outcome.energy_j is not None:
        tally.energy_j = (tally.energy_j or 0.0) + outcome.energy_j
