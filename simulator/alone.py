"""One engine alone under given arrivals: the EngineModel stepped to the end, in jumps while its batch only decodes.

What the capacity table is made from: latencies of every request and the energy between the first and the last counted
arrival. Pure and compiled; same scheduling and step functions as everywhere else.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from energy.profile import StepCoefficients, step_power_w, step_time_s
from simulator.batching import NO_SLOT, BatchState, EngineLimits, complete, enqueue, schedule
from simulator.compiled import compile_trees
from simulator.runs import advance, quadratic_through, run_length, steps_until, sum_of_steps

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

GAP_BUCKETS = 480
SHORTEST_GAP_S = 1e-3
BUCKETS_PER_E = 48.0  # histogram resolution: 2 % of a gap


class Marks(NamedTuple):
    """By request: when its first and last token came. And of all of them: gaps between tokens, by log bucket."""

    first_s: Floats
    last_s: Floats
    gaps: Floats
    energy_j: Floats  # (2,) per GPU: up to the first counted arrival, and to the last arrival


def _count_gap(gaps: Floats, gap_s: float, count: float) -> None:
    bucket = int(np.log(max(gap_s, SHORTEST_GAP_S) / SHORTEST_GAP_S) * BUCKETS_PER_E)
    gaps[min(bucket, GAP_BUCKETS - 1)] += count


def _serve(s: BatchState, limits: EngineLimits, c: StepCoefficients, counted_from: int, m: Marks) -> None:
    """Run every request of ``s`` (one slot each, in order of arrival) to its end; fills ``m``."""
    n = len(s.arrival_s)
    now_s = 0.0
    energy_j = 0.0
    arrived = 0
    done = 0
    while done < n:
        if s.running_count[0] == 0 and s.waiting_count[0] == 0:
            energy_j += c.idle_w * (s.arrival_s[arrived] - now_s)
            now_s = s.arrival_s[arrived]
        while arrived < n and s.arrival_s[arrived] <= now_s:
            if arrived == counted_from:
                m.energy_j[0] = energy_j
            if arrived == n - 1:
                m.energy_j[1] = energy_j
            enqueue(s, 0, arrived, limits.by_priority)
            arrived += 1
        steps, context = run_length(s, 0, limits)
        if steps > 1:
            seqs = s.running_count[0]
            last = float(context + seqs * (steps - 1))
            middle = 0.5 * (context + last)
            times = (
                step_time_s(c, 0.0, 0.0, float(seqs), float(context)),
                step_time_s(c, 0.0, 0.0, float(seqs), middle),
                step_time_s(c, 0.0, 0.0, float(seqs), last),
            )
            q = quadratic_through(times[0], times[1], times[2], steps)
            if arrived < n:
                steps = steps_until(q, steps, s.arrival_s[arrived] - now_s)
            duration_s = sum_of_steps(q, steps)
            middle = context + 0.5 * seqs * (steps - 1)
            energy_j += duration_s * step_power_w(c, 0.0, 0.0, float(seqs), middle)
            now_s += duration_s
            _count_gap(m.gaps, duration_s / steps, float(seqs * steps))
            for position in range(seqs):
                m.last_s[s.running[0][position]] = now_s
            done += advance(s, 0, steps, limits.block_tokens)
            continue
        batch = schedule(s, 0, limits)
        prefill = float(batch.prefill_tokens)
        seqs_f = float(batch.decode_seqs)
        context_f = float(batch.context_tokens)
        step_s = step_time_s(c, prefill, batch.prefill_attention_tokens2, seqs_f, context_f)
        energy_j += step_s * step_power_w(c, prefill, batch.prefill_attention_tokens2, seqs_f, context_f)
        now_s += step_s
        emitted, finished = complete(s, 0)
        for position in range(emitted):
            slot = s.emitted[0][position]
            if s.generated_tokens[slot] == 1:
                m.first_s[slot] = now_s
            else:
                _count_gap(m.gaps, now_s - m.last_s[slot], 1.0)
            m.last_s[slot] = now_s
        done += finished


_compiled: list[Any] = []


def serve_alone(
    c: StepCoefficients,
    limits: EngineLimits,
    arrival_s: Floats,
    input_tokens: Ints,
    output_tokens: Ints,
    counted_from: int,
) -> Marks:
    """Serve these requests on one engine; energy is counted from the arrival of request ``counted_from`` on."""
    if not _compiled:  # compiling takes seconds: only when it is first needed
        _compiled.extend(compile_trees(_serve))
    n = len(arrival_s)
    marks = Marks(np.zeros(n), np.zeros(n), np.zeros(GAP_BUCKETS), np.zeros(2))
    _compiled[0](_batch_of(limits, arrival_s, input_tokens, output_tokens), limits, c, counted_from, marks)
    return marks


def gap_quantile_s(gaps: Floats, share: float) -> float:
    """The gap that ``share`` of all gaps do not exceed (upper edge of its bucket); 0 without gaps."""
    if gaps.sum() == 0:
        return 0.0
    bucket = int(np.searchsorted(np.cumsum(gaps), share * gaps.sum()))
    return float(SHORTEST_GAP_S * np.exp((bucket + 1) / BUCKETS_PER_E))


def _batch_of(limits: EngineLimits, arrival_s: Floats, input_tokens: Ints, output_tokens: Ints) -> BatchState:
    n = len(arrival_s)
    places = np.zeros((1, limits.max_num_seqs), np.int64)
    columns: dict[str, Any] = {  # arrays serve as the mutable sequences the scheduler works on
        "input_tokens": input_tokens.astype(np.int64),
        "output_tokens": output_tokens.astype(np.int64),
        "arrival_s": arrival_s.astype(np.float64),
        "next_slot": np.full(n, NO_SLOT, np.int64),
        "waiting_head": np.full(1, NO_SLOT, np.int64),
        "waiting_tail": np.full(1, NO_SLOT, np.int64),
        "free_blocks": np.full(1, limits.kv_blocks, np.int64),
        **{name: places.copy() for name in ("running", "emitted", "finished", "preempted")},
        **{name: np.zeros(1, np.int64) for name in ("running_count", "waiting_count")},
    }
    columns |= {name: np.zeros(n, np.int64) for name in BatchState._fields if name not in columns}  # by slot
    return BatchState(**columns)
