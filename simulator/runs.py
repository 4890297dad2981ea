"""Decode runs: many decode steps of an unchanged batch at once.

Between an admission and the next completion a batch of ``B`` decoding sequences only grows its context, by ``B`` tokens
a step. Step time and step energy are smooth in the context, so a run of ``n`` steps is described by the quadratic
through its first, middle and last step, and sums over any of its steps have a closed form. The engine's own rules
(``simulator.batching``) say when a run must end; the result differs from stepping by far less than 1 %, see the tests.

Pure functions over the same struct of arrays, interpreted or compiled.
"""

from typing import NamedTuple

from simulator.batching import BatchState, EngineLimits, is_decoding


class Quadratic(NamedTuple):
    """``a + b i + c i^2`` for step ``i`` = 0, 1, ..."""

    a: float
    b: float
    c: float


def quadratic_through(first: float, middle: float, last: float, n: int) -> Quadratic:
    """The quadratic over steps 0 .. n-1 with these values at 0, (n-1)/2 and n-1."""
    if n < 2:
        return Quadratic(first, 0.0, 0.0)
    half = 0.5 * (n - 1)
    c = (first - 2.0 * middle + last) / (2.0 * half * half)
    b = (last - first) / (2.0 * half) - 2.0 * half * c
    return Quadratic(first, b, c)


def sum_of_steps(q: Quadratic, k: int) -> float:
    """Sum of the first ``k`` steps."""
    return k * (q.a + (k - 1) * (0.5 * q.b + q.c * (2 * k - 1) / 6.0))


def value_at(q: Quadratic, i: float) -> float:
    """Value at step ``i``."""
    return q.a + i * (q.b + q.c * i)


def steps_until(q: Quadratic, n: int, elapsed: float) -> int:
    """How many steps (1 .. n) until the first step end at or after ``elapsed``; the values must be positive."""
    k = elapsed / value_at(q, 0.0)
    for _ in range(3):  # Newton on the sum, whose slope is the step
        k -= (k * (q.a + (k - 1.0) * (0.5 * q.b + q.c * (2.0 * k - 1.0) / 6.0)) - elapsed) / value_at(q, k)
        k = min(max(k, 1.0), float(n))
    steps = int(k)
    while steps < n and sum_of_steps(q, steps) < elapsed:
        steps += 1
    while steps > 1 and sum_of_steps(q, steps - 1) >= elapsed:
        steps -= 1
    return steps


def run_length(s: BatchState, e: int, limits: EngineLimits) -> tuple[int, int]:
    """How many steps engine ``e`` can decode unchanged, and the context read in the first; (0, 0) if it cannot.

    It cannot while a prompt is being read, a waiting sequence could be admitted, or KV blocks might run out (16 tokens
    of each sequence at a time are known to fit, so near a full cache runs are short).
    """
    count = s.running_count[e]
    if count == 0 or may_admit(s, e, limits):
        return 0, 0
    row = s.running[e]
    steps = (s.free_blocks[e] // count) * limits.block_tokens
    context_tokens = 0
    for position in range(count):
        slot = row[position]
        if not is_decoding(s, slot):
            return 0, 0
        context_tokens += s.computed_tokens[slot] + 1
        steps = min(steps, s.output_tokens[slot] - s.generated_tokens[slot])
    return steps, context_tokens


def may_admit(s: BatchState, e: int, limits: EngineLimits) -> bool:
    """Whether the next step would admit the head of the queue."""
    count = s.running_count[e]
    if s.waiting_count[e] == 0 or count >= limits.max_num_seqs:
        return False
    slot = s.waiting_head[e]
    new = min(s.input_tokens[slot] + s.generated_tokens[slot], limits.max_num_batched_tokens - count)
    return new > 0 and (new + limits.block_tokens - 1) // limits.block_tokens <= s.free_blocks[e]


def advance(s: BatchState, e: int, steps: int, block_tokens: int) -> int:
    """Apply ``steps`` decode steps to every running sequence; fills ``finished`` and returns how many finished."""
    row = s.running[e]
    finished = 0
    kept = 0
    for position in range(s.running_count[e]):
        slot = row[position]
        s.computed_tokens[slot] += steps
        s.generated_tokens[slot] += steps
        if s.generated_tokens[slot] == s.output_tokens[slot]:
            s.free_blocks[e] += s.blocks[slot]
            s.blocks[slot] = 0
            s.finished[e][finished] = slot
            finished += 1
            continue
        more = (s.computed_tokens[slot] + block_tokens - 1) // block_tokens - s.blocks[slot]
        if more > 0:
            s.blocks[slot] += more
            s.free_blocks[e] -= more
        row[kept] = slot
        kept += 1
    s.running_count[e] = kept
    return finished
