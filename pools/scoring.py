"""Filter -> score -> pick over the live load of instances: the arithmetic of a routing decision.

Scalar functions over indexables. The gateway passes lists and interprets them; the simulator passes NumPy arrays and
compiles these very functions with Numba. So: plain arithmetic, no objects but the two named tuples of columns, no
keyword arguments, no clock. Nothing here knows pools, requests or HTTP: see pools/router.py for who calls it.

The policy. Dynamic energy of an engine step is additive: so much per token computed, so much per context token read,
and one streaming of the weights, shared by all sequences of the step. A request that joins ``n`` others of comparable
(exponential) remaining length keeps the instance stepping ``output / (n + 1)`` steps longer in expectation, so its
marginal energy falls steeply with ``n``: energy wants PACKING. Waiting and slower steps use up the SLO: latency wants
SPREADING. Let ``pressure`` in [0, 1) be the larger share of the TTFT and TBT budgets in use once the request is
there, for itself and for those already there. Then

    score = marginal energy x (1 + spread x pressure / (1 - pressure))

``spread`` 0 packs until nothing more fits; 1 (the default) makes the last tenth of a budget ten times as dear as an
empty one; larger values spread. The instance of the least score is picked. Those over their budget are filtered out.
"""

from collections.abc import MutableSequence, Sequence
from typing import NamedTuple

from energy.profile import StepCoefficients, step_time_s

NONE = -1  # no instance
UNPROMISED_S = 1e9  # TBT limit of an instance that owes nobody anything


class Costs(NamedTuple):
    """Columns, one element an instance: what it costs there, and what it can hold. Floats; see ``cost_row``."""

    token_s: Sequence[float]  # one more prompt token in a step
    seq_s: Sequence[float]  # one more decoding sequence in a step
    attention_s: Sequence[float]  # prefill attention, per token squared
    kv_s: Sequence[float]  # one more context token read in a step
    prompt_j: Sequence[float]  # a prompt token, in joules of the whole instance
    output_j: Sequence[float]  # an output token, but for what is below
    attention_j: Sequence[float]
    kv_j: Sequence[float]
    step_j: Sequence[float]  # a step as such: streaming the weights, all-reduce latency
    chunk_tokens: Sequence[float]  # prompt tokens an engine step takes at most
    max_seqs: Sequence[float]  # requests it may hold; 0 closes it
    kv_capacity_tokens: Sequence[float]


class Load(NamedTuple):
    """Columns, one element an instance: what is there now. Floats, changed by ``add``, ``start`` and ``remove``."""

    in_flight: MutableSequence[float]  # requests sent and not finished
    pending_tokens: MutableSequence[float]  # prompt tokens of those without a first token
    context_tokens: MutableSequence[float]  # mean context of those in flight over their lives: input + output / 2
    reserved_tokens: MutableSequence[float]  # their contexts at the end: input + output
    prompt_share: MutableSequence[float]  # prompt tokens per output token, summed over those in flight
    prefill_done_s: MutableSequence[float]  # when the pending prompts should all have been read
    step_s: MutableSequence[float]  # a decode step of all those in flight; set by the caller, see ``decode_step_s``
    tbt_limit_s: MutableSequence[float]  # the tightest TBT promised to any there


class Weights(NamedTuple):
    """The whole policy in two numbers."""

    spread: float = 1.0  # how dear pressure is; 0 = pack by energy alone
    margin: float = 0.8  # share of a latency budget that predictions may use: means are predicted, P99 is promised


def cost_row(
    c: StepCoefficients, tp: int, chunk_tokens: float, max_seqs: float, kv_capacity_tokens: float
) -> tuple[float, ...]:
    """One row of ``Costs`` from the step coefficients of an instance of ``tp`` GPUs.

    Prompts are taken to be bound by arithmetic, decoding by memory: there an output token's arithmetic hides behind
    the streaming of weights and keeps no kernel running longer.
    """
    return (
        c.compute_s_per_token + c.communication_s_per_token,
        c.compute_s_per_token + c.communication_s_per_token + c.host_s_per_seq,
        c.attention_s_per_token2,
        c.kv_s_per_token,
        tp * ((c.compute_w + c.active_w) * c.compute_s_per_token + c.active_w * c.communication_s_per_token),
        tp * (c.compute_w * c.compute_s_per_token + c.active_w * c.communication_s_per_token),
        tp * (c.compute_w + c.active_w) * c.attention_s_per_token2,
        tp * (c.memory_w + c.active_w) * c.kv_s_per_token,
        tp * ((c.memory_w + c.active_w) * c.weights_s + c.active_w * c.communication_s),
        float(chunk_tokens),
        float(max_seqs),
        float(kv_capacity_tokens),
    )


def decode_step_s(c: StepCoefficients, in_flight: float, context_tokens: float) -> float:
    """What ``Load.step_s`` holds: a step that decodes all those in flight (of an empty instance, a lone token)."""
    return step_time_s(c, 0.0, 0.0, max(in_flight, 1.0), context_tokens)


def prefill_s(costs: Costs, load: Load, i: int, input_tokens: float) -> float:
    """Time to read a prompt on instance ``i``, in chunks that share their steps with those decoding there.

    An upper bound: the smooth maximum of compute and memory time is at most their sum.
    """
    return input_tokens * (
        costs.token_s[i] + load.step_s[i] / costs.chunk_tokens[i] + 0.5 * costs.attention_s[i] * input_tokens
    )


def wait_s(load: Load, i: int, now_s: float) -> float:
    """Time until the prompts sent before are read. Late by x is taken to be x from done: a hung instance repels."""
    if load.pending_tokens[i] <= 0.0:
        return 0.0
    return abs(load.prefill_done_s[i] - now_s)


def ttft_s(costs: Costs, load: Load, i: int, now_s: float, input_tokens: float) -> float:
    """Predicted time from now to the first token of such a request: wait, step under way, prefill."""
    return wait_s(load, i, now_s) + load.step_s[i] + prefill_s(costs, load, i, input_tokens)


def tbt_s(costs: Costs, load: Load, i: int, input_tokens: float, output_tokens: float) -> float:
    """Predicted mean time between tokens once such a request is added.

    A decode step, plus the prefills of the others: each in flight is taken to be replaced, when it ends, by one like
    it.
    """
    context_tokens = input_tokens + 0.5 * output_tokens
    stalls_s = costs.token_s[i] * load.prompt_share[i]
    return load.step_s[i] + stalls_s + costs.seq_s[i] + costs.kv_s[i] * context_tokens


def marginal_energy_j(costs: Costs, load: Load, i: int, input_tokens: float, output_tokens: float) -> float:
    """Energy that adding the request makes instance ``i`` use beyond idling, in joules over all its GPUs."""
    return (
        costs.prompt_j[i] * input_tokens
        + costs.output_j[i] * output_tokens
        + 0.5 * costs.attention_j[i] * input_tokens * input_tokens
        + costs.kv_j[i] * output_tokens * (input_tokens + 0.5 * output_tokens)
        + costs.step_j[i] * output_tokens / (load.in_flight[i] + 1.0)
    )


def choose(
    candidates: Sequence[int],
    costs: Costs,
    load: Load,
    now_s: float,
    input_tokens: float,
    output_tokens: float,
    ttft_budget_s: float,
    tbt_slo_s: float,
    spread: float,
    margin: float,
) -> int:
    """The candidate of the least score among those with room and headroom, or ``NONE``. Ties: the first.

    ``ttft_budget_s`` is what is left until its deadline.
    """
    in_flight, pending_tokens, reserved_tokens = load.in_flight, load.pending_tokens, load.reserved_tokens
    prompt_share, prefill_done_s = load.prompt_share, load.prefill_done_s
    step_s, tbt_limit_s = load.step_s, load.tbt_limit_s
    token_s, seq_s, attention_s, kv_s = costs.token_s, costs.seq_s, costs.attention_s, costs.kv_s
    prompt_j, output_j, attention_j, kv_j = costs.prompt_j, costs.output_j, costs.attention_j, costs.kv_j
    step_j, chunk_tokens, max_seqs = costs.step_j, costs.chunk_tokens, costs.max_seqs
    kv_capacity_tokens = costs.kv_capacity_tokens
    all_tokens = input_tokens + output_tokens
    context_tokens = input_tokens + 0.5 * output_tokens
    context_reads = context_tokens * output_tokens
    attention_tokens2 = 0.5 * input_tokens * input_tokens
    ttft_limit_s = margin * ttft_budget_s
    tbt_limit_own_s = margin * tbt_slo_s
    per_output = 1.0 / max(output_tokens, 1.0)
    best = NONE
    best_score = 0.0
    for i in candidates:
        seqs = in_flight[i]
        if seqs >= max_seqs[i] or reserved_tokens[i] + all_tokens > kv_capacity_tokens[i]:
            continue
        step = step_s[i]
        a_token_s = token_s[i]
        between_s = step + a_token_s * prompt_share[i] + seq_s[i] + kv_s[i] * context_tokens
        if between_s >= tbt_limit_own_s:
            continue
        prefill = input_tokens * (a_token_s + step / chunk_tokens[i]) + attention_s[i] * attention_tokens2
        first_s = step + prefill
        if pending_tokens[i] > 0.0:
            first_s += abs(prefill_done_s[i] - now_s)
        if first_s >= ttft_limit_s:
            continue
        pressure = between_s / tbt_limit_own_s
        if seqs > 0.0:
            pressure = max(pressure, (between_s + prefill * per_output) / (margin * tbt_limit_s[i]))
            if pressure >= 1.0:
                continue
        pressure = max(pressure, first_s / ttft_limit_s)
        energy_j = (
            prompt_j[i] * input_tokens
            + output_j[i] * output_tokens
            + attention_j[i] * attention_tokens2
            + kv_j[i] * context_reads
            + step_j[i] * output_tokens / (seqs + 1.0)
        )
        score = energy_j * (1.0 + spread * pressure / (1.0 - pressure))
        if best == NONE or score < best_score:
            best = i
            best_score = score
    return best


def choose_least_late(
    candidates: Sequence[int],
    costs: Costs,
    load: Load,
    now_s: float,
    input_tokens: float,
    output_tokens: float,
) -> int:
    """For a request whose SLO cannot be met: the candidate that gives a first token soonest, or ``NONE``.

    It must have room, and the TBT promised to those already there must hold.
    """
    best = NONE
    best_s = 0.0
    for i in candidates:
        if (
            load.in_flight[i] >= costs.max_seqs[i]
            or load.reserved_tokens[i] + input_tokens + output_tokens > costs.kv_capacity_tokens[i]
        ):
            continue
        if load.in_flight[i] > 0.0:
            stall_s = prefill_s(costs, load, i, input_tokens) / max(output_tokens, 1.0)
            if tbt_s(costs, load, i, input_tokens, output_tokens) + stall_s >= load.tbt_limit_s[i]:
                continue
        first_s = ttft_s(costs, load, i, now_s, input_tokens)
        if best == NONE or first_s < best_s:
            best = i
            best_s = first_s
    return best


def add(
    costs: Costs, load: Load, i: int, now_s: float, input_tokens: float, output_tokens: float, tbt_slo_s: float
) -> None:
    """Count a request sent to instance ``i``. The caller then sets ``load.step_s[i]``."""
    prefill = prefill_s(costs, load, i, input_tokens)
    start_s = now_s
    if load.pending_tokens[i] > 0.0:
        start_s = max(now_s, load.prefill_done_s[i])
    load.prefill_done_s[i] = start_s + load.step_s[i] + prefill
    load.in_flight[i] += 1.0
    load.pending_tokens[i] += input_tokens
    load.context_tokens[i] += input_tokens + 0.5 * output_tokens
    load.reserved_tokens[i] += input_tokens + output_tokens
    load.prompt_share[i] += input_tokens / max(output_tokens, 1.0)
    load.tbt_limit_s[i] = min(load.tbt_limit_s[i], tbt_slo_s)


def start(costs: Costs, load: Load, i: int, now_s: float, input_tokens: float) -> None:
    """Count the first token of a request on instance ``i``: what is still pending is expected from now."""
    load.pending_tokens[i] = max(load.pending_tokens[i] - input_tokens, 0.0)
    load.prefill_done_s[i] = now_s + load.pending_tokens[i] * (
        costs.token_s[i] + load.step_s[i] / costs.chunk_tokens[i]
    )


def remove(load: Load, i: int, input_tokens: float, output_tokens: float) -> None:
    """Forget a request that has left instance ``i``; same lengths as in ``add``. The caller then sets ``step_s``.

    One that had no first token is to be taken off ``pending_tokens`` with ``start`` before.
    """
    load.in_flight[i] -= 1.0
    if load.in_flight[i] <= 0.0:  # nobody left: drop what rounding left
        load.in_flight[i] = 0.0
        load.pending_tokens[i] = 0.0
        load.context_tokens[i] = 0.0
        load.reserved_tokens[i] = 0.0
        load.prompt_share[i] = 0.0
        load.tbt_limit_s[i] = UNPROMISED_S
        return
    load.context_tokens[i] -= input_tokens + 0.5 * output_tokens
    load.reserved_tokens[i] -= input_tokens + output_tokens
    load.prompt_share[i] -= input_tokens / max(output_tokens, 1.0)


def take_turn(weights: Sequence[float], credit: MutableSequence[float]) -> int:
    """The next index of a smooth weighted round robin; ``credit`` starts at zeros and is changed."""
    total = 0.0
    best = 0
    for k in range(len(weights)):
        total += weights[k]
        credit[k] += weights[k]
        if credit[k] > credit[best]:
            best = k
    credit[best] -= total
    return best
