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


def _simulate(c: Any, shape: Any) -> Any:
    """One closed loop; compiled. Returns the fields of ``LoopResult``."""
    clients = shape.clients
    total = shape.rounds * clients
    arrival = np.zeros(clients)
    inputs = np.zeros(clients)
    outputs = np.zeros(clients)
    prefilled = np.zeros(clients)
    produced = np.zeros(clients)
    first_s = np.zeros(clients)
    state = np.zeros(clients, np.int64)  # 0 gone, 1 waiting, 2 prefilling, 3 decoding
    queue = np.zeros(clients, np.int64)  # clients that wait or prefill, in order of arrival
    queued = 0
    sent = 0
    done = 0
    running = 0
    kv_reserved = 0.0
    now = 0.0
    ttft = 0.0
    tpot = 0.0
    tokens_out = 0.0
    host = 0.0
    compute = 0.0
    memory = 0.0
    spread = 1.0 - shape.shortest_share
    for i in range(clients):
        u = (sent * 0.6180339887498949) % 1.0
        v = (sent * 0.7548776662466927) % 1.0
        inputs[i] = max(1.0, np.floor(shape.input_tokens * (shape.shortest_share + spread * u)))
        outputs[i] = max(1.0, np.floor(shape.output_tokens * (shape.shortest_share + spread * v)))
        state[i] = 1
        queue[queued] = i
        queued += 1
        sent += 1
    while done < total:
        # admit in order of arrival
        for q in range(queued):
            i = queue[q]
            if state[i] != 1:
                continue
            need = inputs[i] + outputs[i]
            if running > 0 and (running >= shape.max_running or kv_reserved + need > shape.kv_capacity_tokens):
                break
            state[i] = 2
            running += 1
            kv_reserved += need
        decodes = 0.0
        context = 0.0
        left = 1e18
        for i in range(clients):
            if state[i] == 3:
                decodes += 1.0
                context += inputs[i] + produced[i]
                left = min(left, outputs[i] - produced[i])
        budget = shape.token_budget - decodes
        new_tokens = 0.0
        attended = 0.0
        for q in range(queued):
            i = queue[q]
            if state[i] == 2 and budget > 0:
                chunk = min(budget, inputs[i] - prefilled[i])
                attended += chunk * (prefilled[i] + 0.5 * chunk)
                prefilled[i] += chunk
                new_tokens += chunk
                budget -= chunk
        steps = 1.0 if new_tokens > 0 else left
        context += decodes * 0.5 * (steps - 1.0)
        step_s = _time_s(c, new_tokens, attended, decodes, context)
        now += steps * step_s
        host += steps * (c.overhead_s + c.host_s_per_seq * decodes)
        compute += steps * (c.compute_s_per_token * (new_tokens + decodes) + c.attention_s_per_token2 * attended)
        memory += steps * (c.weights_s + c.kv_s_per_token * context)
        tokens_out += steps * decodes
        ended = 0
        for i in range(clients):
            if state[i] == 3:
                produced[i] += steps
            elif state[i] == 2 and prefilled[i] >= inputs[i]:
                state[i] = 3
                produced[i] = 1.0
                tokens_out += 1.0
                first_s[i] = now
                ttft += now - arrival[i]
            else:
                continue
            if produced[i] >= outputs[i]:
                if outputs[i] > 1.0:
                    tpot += (now - first_s[i]) / (outputs[i] - 1.0)
                done += 1
                running -= 1
                kv_reserved -= inputs[i] + outputs[i]
                state[i] = 0
                ended += 1
        kept = 0
        for q in range(queued):
            if state[queue[q]] == 1 or state[queue[q]] == 2:
                queue[kept] = queue[q]
                kept += 1
        queued = kept
        if ended > 0:
            for i in range(clients):
                if state[i] == 0 and sent < total:
                    u = (sent * 0.6180339887498949) % 1.0
                    v = (sent * 0.7548776662466927) % 1.0
                    inputs[i] = max(1.0, np.floor(shape.input_tokens * (shape.shortest_share + spread * u)))
                    outputs[i] = max(1.0, np.floor(shape.output_tokens * (shape.shortest_share + spread * v)))
                    arrival[i] = now
                    prefilled[i] = 0.0
                    produced[i] = 0.0
                    state[i] = 1
                    queue[queued] = i
                    queued += 1
                    sent += 1
                elif state[i] == 0:
                    state[i] = -1
    return ttft / total, tpot / total, now, tokens_out, 1.0 - host / now, compute / now, memory / now


_compiled: Any = numba.njit(cache=True)(_simulate)


def closed_loop(c: StepCoefficients, shape: LoadShape) -> LoopResult:
    """What ``shape.clients`` clients see of an engine with these coefficients."""
    return LoopResult(*_compiled(c, shape))
