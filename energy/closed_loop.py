"""closed_loop: what a load generator with a fixed number of clients sees of an engine whose steps cost this much.

Published measurements are closed loops: N clients, each sending its next request when the last one ends. Queueing,
chunked prefill interleaved with decoding, the burst at the start and the tail at the end are all part of the numbers,
so a fit has to go through the same loop. One loop is simulated step by step, in jumps while the batch is constant.
Never draws random numbers: lengths that a generator spreads follow a low-discrepancy sequence.
"""

from typing import Any, NamedTuple

import numba
import numpy as np

from energy.profile import StepCoefficients, step_time_s


class LoadShape(NamedTuple):
    """A closed loop as its load generator was configured. Lengths in tokens."""

    input_tokens: float
    output_tokens: float
    clients: int
    rounds: int = 10  # requests sent = rounds x clients
    warm_up_rounds: int = 0  # of them not counted in the latencies
    shortest_share: float = 1.0  # lengths are spread evenly over [shortest_share, 1] x nominal
    max_running: int = 1024  # sequences the engine runs at once
    token_budget: int = 8192  # tokens of one step, chunked prefill
    kv_capacity_tokens: float = 1e18


class LoopResult(NamedTuple):
    """Means over all requests of one closed loop, and what the engine did meanwhile."""

    ttft_s: float
    tpot_s: float
    duration_s: float
    output_tokens: float
    kernels_share: float  # share of the duration that is not host overhead
    compute_share: float  # compute_s of all steps over the duration
    memory_share: float  # memory_s of all steps over the duration


_time_s: Any = numba.njit(step_time_s)

# what a client is doing
_GONE, _WAITING, _PREFILLING, _DECODING = 0, 1, 2, 3


class _Clients(NamedTuple):
    """By client: its present request. And the queue: clients that wait or prefill, in order of arrival."""

    arrival_s: Any
    input_tokens: Any
    output_tokens: Any
    prefilled: Any
    produced: Any
    first_s: Any
    number: Any  # of the request among all sent
    state: Any
    queue: Any
    counts: Any  # [queued, sent, done, running]
    sums: Any  # [KV tokens reserved, ttft, tpot, requests counted, tokens produced]


_QUEUED, _SENT, _DONE, _RUNNING = 0, 1, 2, 3
_RESERVED, _TTFT, _TPOT, _COUNTED, _PRODUCED = 0, 1, 2, 3, 4


def _send(s: Any, i: int, now_s: float, shape: Any) -> None:
    """Client ``i`` sends its next request; spread lengths follow two incommensurable rotations."""
    number = s.counts[_SENT]
    spread = 1.0 - shape.shortest_share
    input_share = shape.shortest_share + spread * ((number * 0.6180339887498949) % 1.0)
    output_share = shape.shortest_share + spread * ((number * 0.7548776662466927) % 1.0)
    s.arrival_s[i] = now_s
    s.input_tokens[i] = max(1.0, np.floor(shape.input_tokens * input_share))
    s.output_tokens[i] = max(1.0, np.floor(shape.output_tokens * output_share))
    s.prefilled[i] = 0.0
    s.produced[i] = 0.0
    s.number[i] = number
    s.state[i] = _WAITING
    s.queue[s.counts[_QUEUED]] = i
    s.counts[_QUEUED] += 1
    s.counts[_SENT] += 1


def _admit(s: Any, shape: Any) -> None:
    """Waiting requests join the batch in order of arrival, while it and the KV cache have room."""
    for q in range(s.counts[_QUEUED]):
        i = s.queue[q]
        if s.state[i] != _WAITING:
            continue
        need = s.input_tokens[i] + s.output_tokens[i]
        full = s.counts[_RUNNING] >= shape.max_running or s.sums[_RESERVED] + need > shape.kv_capacity_tokens
        if full and s.counts[_RUNNING] > 0:
            return
        s.state[i] = _PREFILLING
        s.counts[_RUNNING] += 1
        s.sums[_RESERVED] += need


def _decoding(s: Any) -> Any:
    """(decoding sequences, their context, steps until the first of them ends)."""
    sequences = 0.0
    context = 0.0
    left = 1e18
    for i in range(len(s.state)):
        if s.state[i] == _DECODING:
            sequences += 1.0
            context += s.input_tokens[i] + s.produced[i]
            left = min(left, s.output_tokens[i] - s.produced[i])
    return sequences, context, left


def _take_prompts(s: Any, budget: float) -> Any:
    """Read prompts in order of arrival within the budget: (new tokens, new tokens x mean tokens attended to)."""
    new_tokens = 0.0
    attended = 0.0
    for q in range(s.counts[_QUEUED]):
        i = s.queue[q]
        if s.state[i] == _PREFILLING and budget > new_tokens:
            chunk = min(budget - new_tokens, s.input_tokens[i] - s.prefilled[i])
            attended += chunk * (s.prefilled[i] + 0.5 * chunk)
            s.prefilled[i] += chunk
            new_tokens += chunk
    return new_tokens, attended


def _progress(s: Any, steps: float, now_s: float, uncounted: int) -> None:
    """Apply a step, or a run of them, to every client; requests that end leave their client gone."""
    for i in range(len(s.state)):
        if s.state[i] == _DECODING:
            s.produced[i] += steps
            s.sums[_PRODUCED] += steps
        elif s.state[i] == _PREFILLING and s.prefilled[i] >= s.input_tokens[i]:
            s.state[i] = _DECODING
            s.produced[i] = 1.0
            s.first_s[i] = now_s
            s.sums[_PRODUCED] += 1.0
            if s.number[i] >= uncounted:
                s.sums[_TTFT] += now_s - s.arrival_s[i]
                s.sums[_COUNTED] += 1.0
        else:
            continue
        if s.produced[i] >= s.output_tokens[i]:
            if s.output_tokens[i] > 1.0 and s.number[i] >= uncounted:
                s.sums[_TPOT] += (now_s - s.first_s[i]) / (s.output_tokens[i] - 1.0)
            s.counts[_DONE] += 1
            s.counts[_RUNNING] -= 1
            s.sums[_RESERVED] -= s.input_tokens[i] + s.output_tokens[i]
            s.state[i] = _GONE
    kept = 0
    for q in range(s.counts[_QUEUED]):
        if s.state[s.queue[q]] == _WAITING or s.state[s.queue[q]] == _PREFILLING:
            s.queue[kept] = s.queue[q]
            kept += 1
    s.counts[_QUEUED] = kept


def _simulate(c: Any, shape: Any) -> Any:
    """One closed loop; compiled. Returns the fields of ``LoopResult``."""
    n = shape.clients
    total = shape.rounds * n
    f, k = np.zeros((6, n)), np.zeros((3, n), np.int64)
    s = _Clients(f[0], f[1], f[2], f[3], f[4], f[5], k[0], k[1], k[2], np.zeros(4, np.int64), np.zeros(5))
    now_s = 0.0
    host_s = 0.0
    compute_s = 0.0
    memory_s = 0.0
    while s.counts[_DONE] < total:
        for i in range(n):
            if s.state[i] == _GONE and s.counts[_SENT] < total:
                _send(s, i, now_s, shape)
        _admit(s, shape)
        sequences, context, left = _decoding(s)
        new_tokens, attended = _take_prompts(s, shape.token_budget - sequences)
        steps = 1.0 if new_tokens > 0 else left
        context += sequences * 0.5 * (steps - 1.0)  # the mean over the run
        now_s += steps * _time_s(c, new_tokens, attended, sequences, context)
        host_s += steps * (c.overhead_s + c.host_s_per_seq * sequences)
        compute_s += steps * (c.compute_s_per_token * (new_tokens + sequences) + c.attention_s_per_token2 * attended)
        memory_s += steps * (c.weights_s + c.kv_s_per_token * context)
        _progress(s, steps, now_s, shape.warm_up_rounds * n)
    counted = s.sums[_COUNTED]
    shares = 1.0 - host_s / now_s, compute_s / now_s, memory_s / now_s
    return s.sums[_TTFT] / counted, s.sums[_TPOT] / counted, now_s, s.sums[_PRODUCED], *shares


_send, _admit, _decoding, _take_prompts, _progress = (
    numba.njit(function) for function in (_send, _admit, _decoding, _take_prompts, _progress)
)
_compiled: Any = numba.njit(cache=True)(_simulate)


def closed_loop(c: StepCoefficients, shape: LoadShape) -> LoopResult:
    """What ``shape.clients`` clients see of an engine with these coefficients. Raises ``ValueError`` on a bad shape."""
    if min(shape.input_tokens, shape.output_tokens, shape.clients, shape.max_running, shape.token_budget) < 1:
        raise ValueError(f"lengths, clients and limits must be at least 1: {shape}")
    if not 0 <= shape.warm_up_rounds < shape.rounds or not 0.0 < shape.shortest_share <= 1.0:
        raise ValueError(f"some round must be counted, and shortest_share be in (0, 1]: {shape}")
    return LoopResult(*_compiled(c, shape))
