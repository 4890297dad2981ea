"""Windows of a workload, its first requests, and more or fewer of them. Pure: seeded, no I/O.

How a recorded trace is brought to another rate, because each way changes something:

* below 1, thinning: every request is kept with that probability, independently. The rate curve and the mix stay;
  bursts lose their edge (a thinned stream tends to Poisson).
* above 1, superposition: the trace plus copies of it, each request of a copy delayed by its own uniform draw in
  [0, ``JITTER_S``). The rate curve stays beyond that time and the mix stays; gaps at a finer scale fill up.

A generated workload is scaled where it is made (its rates are multiplied) and needs neither.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from simulator.workload.arrivals import Arrivals, Workload, WorkloadError

JITTER_S = 30.0


def window(workload: Workload, start_s: float = 0.0, duration_s: float | None = None) -> Workload:
    """The part that arrives in [start_s, start_s + duration_s), moved to begin at 0.

    The expected number of requests is scaled by the time kept. Raises WorkloadError if nothing can be left.
    """
    if start_s < 0 or start_s >= workload.duration_s > 0:
        raise WorkloadError(f"{workload.name}: a window from {start_s:g} s is outside its {workload.duration_s:g} s")
    if duration_s is not None and duration_s <= 0:
        raise WorkloadError(f"{workload.name}: a window of {duration_s:g} s is empty: give a duration above 0")
    left_s = workload.duration_s - start_s
    kept_s = left_s if duration_s is None else min(duration_s, left_s)
    if start_s == 0 and kept_s == workload.duration_s:
        return workload
    # the whole rest includes the very last arrival, a window inside does not include its end
    end_s = np.inf if kept_s == left_s else start_s + kept_s

    def begin() -> Iterator[Arrivals]:
        for chunk in workload.chunks():
            if chunk.arrival_s[0] >= end_s:
                return
            first, last = np.searchsorted(chunk.arrival_s, [start_s, end_s])
            yield chunk.at(slice(int(first), int(last))).moved(-start_s)

    starts = workload.starts_unix_s
    return replace(
        workload,
        name=f"{workload.name} [{start_s:g}s +{kept_s:g}s]",
        duration_s=kept_s,
        expected_requests=workload.expected_requests * kept_s / workload.duration_s if workload.duration_s else 0.0,
        begin=begin,
        starts_unix_s=None if starts is None else starts + start_s,
    )


def limited(workload: Workload, requests: int) -> Workload:
    """The first ``requests`` of it; its duration stays."""
    if requests < 1:
        raise WorkloadError(f"{workload.name}: a limit of {requests} requests leaves none: give at least 1")

    def begin() -> Iterator[Arrivals]:
        left = requests
        for chunk in workload.chunks():
            yield chunk.at(slice(left))
            left -= len(chunk)
            if left <= 0:
                return

    return replace(workload, expected_requests=min(float(requests), workload.expected_requests), begin=begin)


def sped_up(workload: Workload, speedup: float) -> Workload:
    """The same requests in a ``speedup``-th of the time, as `dynamollm replay --speedup` sends them."""
    if not 0 < speedup < np.inf:
        raise WorkloadError(f"{workload.name}: a speedup of {speedup:g} is not above 0")
    if speedup == 1:
        return workload

    def begin() -> Iterator[Arrivals]:
        for chunk in workload.chunks():
            yield Arrivals(chunk.arrival_s / speedup, chunk.input_tokens, chunk.output_tokens)

    return replace(
        workload, name=f"{workload.name} at {speedup:g}x", duration_s=workload.duration_s / speedup, begin=begin
    )


def scaled(workload: Workload, factor: float, seed: int) -> Workload:
    """``factor`` times as many requests over the same time, by thinning or superposition (see the module)."""
    if not 0 < factor < np.inf:
        raise WorkloadError(f"{workload.name}: a rate scale of {factor:g} is not above 0")
    if factor == 1:
        return workload
    if factor < 1:
        how = f"thinned: each request kept with probability {factor:g}"
    else:
        how = f"superposed {factor:g} times: copies delayed by up to {JITTER_S:g} s"

    def begin() -> Iterator[Arrivals]:
        return _thinned(workload, factor, seed) if factor < 1 else _superposed(workload, factor, seed)

    return replace(
        workload,
        name=f"{workload.name} x{factor:g}",
        expected_requests=workload.expected_requests * factor,
        begin=begin,
        assumptions=(*workload.assumptions, how),
    )


def _thinned(workload: Workload, keep: float, seed: int) -> Iterator[Arrivals]:
    for number, chunk in enumerate(workload.chunks()):
        rng = np.random.default_rng([seed, number])
        yield chunk.at(rng.random(len(chunk)) < keep)


def _superposed(workload: Workload, factor: float, seed: int) -> Iterator[Arrivals]:
    whole, fraction = int(factor), factor - int(factor)
    waiting = Arrivals.of((), (), ())  # delayed copies that may still fall behind the next chunk
    for number, chunk in enumerate(workload.chunks()):
        rng = np.random.default_rng([seed, number])
        copies = np.full(len(chunk), whole - 1) + (rng.random(len(chunk)) < fraction)
        delayed = chunk.at(np.repeat(np.arange(len(chunk)), copies))
        # a copy never leaves the workload's time: the delay is wrapped into what is left of it
        left_s = np.minimum(JITTER_S, workload.duration_s - delayed.arrival_s)
        delayed = Arrivals(
            delayed.arrival_s + rng.random(len(delayed)) * left_s, delayed.input_tokens, delayed.output_tokens
        )
        pending = Arrivals.joined((waiting, chunk, delayed)).sorted()
        settled = int(np.searchsorted(pending.arrival_s, chunk.arrival_s[-1], side="right"))
        yield pending.at(slice(settled))
        waiting = pending.at(slice(settled, None))
    yield waiting
