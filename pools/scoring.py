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

from energy.profile import StepCoefficients

NONE = -1  # no instance
ANY_TOKENS = 1e18
INFINITE = float("inf")
UNPROMISED_S = 1e9  # TBT limit of an instance that owes nobody anything


class Costs(NamedTuple):
    """Columns, one element an instance: what it costs there, and what it can hold. Floats; see ``cost_row``."""

    kind: Sequence[float]  # equal where all costs are equal, and only there
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
    max_seqs: Sequence[float]  # requests it may hold
    kv_capacity_tokens: Sequence[float]


class Load(NamedTuple):
    """Columns, one element an instance: what is there now. Floats; changed by the four functions at the end."""

    in_flight: MutableSequence[float]  # requests sent and not finished
    pending_tokens: MutableSequence[float]  # prompt tokens of those without a first token
    prefill_done_s: MutableSequence[float]  # when those should all have been read; 0 if none
    context_tokens: MutableSequence[float]  # mean context of those in flight over their lives: input + output / 2
    reserved_tokens: MutableSequence[float]  # their contexts at the end: input + output
    prompt_share: MutableSequence[float]  # prompt tokens per output token, summed over those in flight
    tbt_limit_s: MutableSequence[float]  # the tightest TBT promised to any there
    # derived from these by ``settle``, so that ``choose`` need not
    step_s: MutableSequence[float]  # a decode step of all those in flight (of nobody: of a lone token)
    between_s: MutableSequence[float]  # TBT with one more: that step, stalls by prefills, its own share
    prompt_s: MutableSequence[float]  # reading one prompt token, in chunks that share steps with decoding
    free_tokens: MutableSequence[float]  # KV cache not spoken for; negative if no seat is free


LOAD_EMPTY = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, UNPROMISED_S, 0.0, 0.0, 0.0, 0.0)
"""A row of ``Load`` before ``settle``."""


class Weights(NamedTuple):
    """The whole policy in two numbers."""

    spread: float = 1.0  # how dear pressure is; 0 = pack by energy alone
    margin: float = 0.8  # share of a latency budget that predictions may use: means are predicted, P99 is promised


def cost_row(
    c: StepCoefficients, tp: int, kind: float, chunk_tokens: float, max_seqs: float, kv_capacity_tokens: float
) -> tuple[float, ...]:
    """One row of ``Costs`` from the step coefficients of an instance of ``tp`` GPUs.

    Prompts are taken to be bound by arithmetic, decoding by memory: there an output token's arithmetic hides behind
    the streaming of weights and keeps no kernel running longer.
    """
    return (
        float(kind),
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
    """A step that decodes all those in flight; of an empty instance, a lone token. For ``settle``.

    ``energy.profile.step_time_s`` without a prompt, written out: this runs twice a request.
    """
    seqs = in_flight if in_flight > 1.0 else 1.0
    sharpness = c.sharpness
    compute_s = c.compute_s_per_token * seqs
    memory_s = c.weights_s + c.kv_s_per_token * context_tokens
    roofline_s: float = (compute_s**sharpness + memory_s**sharpness) ** (1.0 / sharpness)
    host_s = c.overhead_s + c.host_s_per_seq * seqs
    return host_s + roofline_s + c.communication_s + c.communication_s_per_token * seqs


def prefill_s(costs: Costs, load: Load, i: int, input_tokens: float) -> float:
    """Time to read a prompt on instance ``i``, in chunks that share their steps with those decoding there.

    An upper bound: the smooth maximum of compute and memory time is at most their sum.
    """
    return input_tokens * (load.prompt_s[i] + 0.5 * costs.attention_s[i] * input_tokens)


def wait_s(load: Load, i: int, now_s: float) -> float:
    """Time until the prompts sent before are read. Late by x is taken to be x from done: a hung instance repels."""
    done_s = load.prefill_done_s[i]
    return abs(done_s - now_s) if done_s > 0.0 else 0.0


def ttft_s(costs: Costs, load: Load, i: int, now_s: float, input_tokens: float) -> float:
    """Predicted time from now to the first token of such a request: wait, step under way, prefill."""
    return wait_s(load, i, now_s) + load.step_s[i] + prefill_s(costs, load, i, input_tokens)


def tbt_s(costs: Costs, load: Load, i: int, input_tokens: float, output_tokens: float, saved_s: float = 0.0) -> float:
    """Predicted mean time between tokens of those on instance ``i`` once such a request is among them.

    A decode step, and the prefills that interrupt it: each request is taken to be replaced, when it ends, by one like
    it. But a step reads no more than one chunk of prompt, however short the answers. A request alone is not interrupted
    by its own. ``saved_s`` of its prefill is cached.
    """
    between_s = load.between_s[i] + costs.kv_s[i] * (input_tokens + 0.5 * output_tokens)
    if load.in_flight[i] > 0.0:
        stall_s = (prefill_s(costs, load, i, input_tokens) - saved_s) / max(output_tokens, 1.0)
        most_s = load.step_s[i] + costs.token_s[i] * costs.chunk_tokens[i] + costs.seq_s[i] - load.between_s[i]
        between_s += min(stall_s, most_s)
    return between_s


def marginal_energy_j(costs: Costs, load: Load, i: int, input_tokens: float, output_tokens: float) -> float:
    """Energy that adding the request makes instance ``i`` use beyond idling, in joules over all its GPUs."""
    return work_j(costs, i, input_tokens, output_tokens) + costs.step_j[i] * output_tokens / (load.in_flight[i] + 1.0)


def work_j(costs: Costs, i: int, input_tokens: float, output_tokens: float) -> float:
    """The part of it that does not depend on who else is there."""
    return (
        costs.prompt_j[i] * input_tokens
        + costs.output_j[i] * output_tokens
        + 0.5 * costs.attention_j[i] * input_tokens * input_tokens
        + costs.kv_j[i] * output_tokens * (input_tokens + 0.5 * output_tokens)
    )


def score(
    costs: Costs,
    load: Load,
    i: int,
    now_s: float,
    input_tokens: float,
    cached_tokens: float,
    output_tokens: float,
    ttft_budget_s: float,
    tbt_slo_s: float,
    spread: float,
    margin: float,
) -> float:
    """The score of instance ``i``, which holds the first ``cached_tokens`` of the prompt; infinite without headroom.

    What is cached is not read again: that is less energy and an earlier first token, and nothing else changes. So a
    prefix weighs against load and SLO in the score's own terms. With nothing cached it is what ``choose`` compares.
    """
    if load.free_tokens[i] < input_tokens + output_tokens:
        return INFINITE
    cached2 = 0.5 * cached_tokens * cached_tokens
    energy_j = marginal_energy_j(costs, load, i, input_tokens, output_tokens)
    energy_j -= costs.prompt_j[i] * cached_tokens + costs.attention_j[i] * cached2
    saved_s = load.prompt_s[i] * cached_tokens + costs.attention_s[i] * cached2
    first = ttft_s(costs, load, i, now_s, input_tokens) - saved_s
    between = tbt_s(costs, load, i, input_tokens, output_tokens, saved_s)
    limit_s = margin * min(tbt_slo_s, load.tbt_limit_s[i])
    if first >= margin * ttft_budget_s or between >= limit_s:
        return INFINITE
    pressure = max(first / (margin * ttft_budget_s), between / limit_s)
    return energy_j * (1.0 + spread * pressure / (1.0 - pressure))


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

    ``ttft_budget_s`` is what is left until its deadline. The loop is ``ttft_s``, ``tbt_s`` and ``marginal_energy_j`` of
    above, written out, with what only depends on the kind of instance taken out of it: this is the gateway's hot path.
    """
    kind, token_s, seq_s, attention_s2, kv_s, prompt_j, output_j, attention_j, kv_j, step_j, chunk_tokens, _, _ = costs
    in_flight, _, prefill_done_s, _, _, _, tbt_limit_s, step_s, between_s, prompt_s, free_tokens = load
    all_tokens = input_tokens + output_tokens
    per_output = 1.0 / max(output_tokens, 1.0)
    ttft_limit_s = margin * ttft_budget_s
    kind_now = empty_kind = -1.0
    context_s = attention_s = base_j = steps_j = chunk_s = 0.0
    best = NONE
    best_score = 1e300
    for i in candidates:
        seqs = in_flight[i]
        if seqs == 0.0 and kind[i] == empty_kind:  # as good as the last empty one
            continue
        if free_tokens[i] < all_tokens:
            continue
        if kind[i] != kind_now:
            kind_now = kind[i]
            context_tokens = input_tokens + 0.5 * output_tokens
            attention_tokens2 = 0.5 * input_tokens * input_tokens
            context_s = kv_s[i] * context_tokens
            attention_s = attention_s2[i] * attention_tokens2
            base_j = prompt_j[i] * input_tokens + output_j[i] * output_tokens
            base_j += attention_j[i] * attention_tokens2 + kv_j[i] * output_tokens * context_tokens
            steps_j = step_j[i] * output_tokens
            chunk_s = token_s[i] * chunk_tokens[i] + seq_s[i]
        if seqs == 0.0:
            empty_kind = kind_now
        energy_j = base_j + steps_j / (seqs + 1.0)
        if energy_j >= best_score:  # pressure only adds to it
            continue
        prefill = input_tokens * prompt_s[i] + attention_s
        first = step_s[i] + prefill
        done_s = prefill_done_s[i]
        if done_s > now_s:
            first += done_s - now_s
        elif done_s > 0.0:
            first += now_s - done_s
        if first >= ttft_limit_s:
            continue
        between = between_s[i] + context_s
        if seqs > 0.0:
            stall_s = prefill * per_output
            most_s = step_s[i] + chunk_s - between_s[i]
            between += stall_s if stall_s < most_s else most_s
        limit_s = tbt_limit_s[i]
        if limit_s > tbt_slo_s:
            limit_s = tbt_slo_s
        limit_s *= margin
        if between >= limit_s:
            continue
        pressure = between / limit_s
        pressure_ttft = first / ttft_limit_s
        if pressure_ttft > pressure:
            pressure = pressure_ttft
        score = energy_j * (1.0 + spread * pressure / (1.0 - pressure))
        if score < best_score:
            best = i
            best_score = score
    return best


def attainable(
    costs: Costs,
    i: int,
    lone_step_s: float,
    input_tokens: float,
    output_tokens: float,
    ttft_budget_s: float,
    tbt_slo_s: float,
    margin: float,
) -> bool:
    """Whether instance ``i`` would keep the SLO if it were empty; ``lone_step_s`` is its step of one token.

    If no instance would, waiting for one is no use.
    """
    token_s = costs.token_s[i] + lone_step_s / costs.chunk_tokens[i]
    first = lone_step_s + input_tokens * (token_s + 0.5 * costs.attention_s[i] * input_tokens)
    between = lone_step_s + costs.seq_s[i] + costs.kv_s[i] * (input_tokens + 0.5 * output_tokens)
    return first < margin * ttft_budget_s and between < margin * tbt_slo_s


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
        if load.free_tokens[i] < input_tokens + output_tokens:
            continue
        if load.in_flight[i] > 0.0 and tbt_s(costs, load, i, input_tokens, output_tokens) >= load.tbt_limit_s[i]:
            continue
        first = ttft_s(costs, load, i, now_s, input_tokens)
        if best == NONE or first < best_s:
            best = i
            best_s = first
    return best


def add(
    costs: Costs, load: Load, i: int, now_s: float, input_tokens: float, output_tokens: float, tbt_slo_s: float
) -> None:
    """Count a request sent to instance ``i``. ``settle`` it after."""
    in_flight, pending_tokens, done_s, context_tokens, reserved_tokens, prompt_share, tbt_limit_s = load[:7]
    step_s, prompt_s = load.step_s, load.prompt_s
    start_s = done_s[i]
    if start_s < now_s:
        start_s = now_s
    token_s = prompt_s[i] + 0.5 * costs.attention_s[i] * input_tokens
    done_s[i] = start_s + step_s[i] + input_tokens * token_s
    in_flight[i] += 1.0
    pending_tokens[i] += input_tokens
    context_tokens[i] += input_tokens + 0.5 * output_tokens
    reserved_tokens[i] += input_tokens + output_tokens
    prompt_share[i] += input_tokens / max(output_tokens, 1.0)
    if tbt_slo_s < tbt_limit_s[i]:
        tbt_limit_s[i] = tbt_slo_s


def start(load: Load, i: int, now_s: float, input_tokens: float) -> None:
    """Count the first token of a request on instance ``i``: what is still pending is expected from now."""
    pending_tokens = load.pending_tokens[i] - input_tokens
    if pending_tokens > 0.0:
        load.pending_tokens[i] = pending_tokens
        load.prefill_done_s[i] = now_s + pending_tokens * load.prompt_s[i]
    else:
        load.pending_tokens[i] = 0.0
        load.prefill_done_s[i] = 0.0


def remove(load: Load, i: int, input_tokens: float, output_tokens: float) -> None:
    """Forget a request that has left instance ``i``; same lengths as in ``add``. ``settle`` it after.

    One that had no first token is to be taken off ``pending_tokens`` with ``start`` before.
    """
    in_flight, pending_tokens, done_s, context_tokens, reserved_tokens, prompt_share, tbt_limit_s = load[:7]
    left = in_flight[i] - 1.0
    if left > 0.0:
        in_flight[i] = left
        context_tokens[i] -= input_tokens + 0.5 * output_tokens
        reserved_tokens[i] -= input_tokens + output_tokens
        prompt_share[i] -= input_tokens / max(output_tokens, 1.0)
    else:  # nobody left: drop what rounding left
        in_flight[i] = 0.0
        pending_tokens[i] = 0.0
        done_s[i] = 0.0
        context_tokens[i] = 0.0
        reserved_tokens[i] = 0.0
        prompt_share[i] = 0.0
        tbt_limit_s[i] = UNPROMISED_S


def change(load: Load, i: int, now_s: float, by: Sequence[float]) -> None:
    """Add to the first of the columns, but for the time: what other gateways have sent there. ``settle`` it after.

    ``by``: requests, pending tokens, context tokens, reserved tokens, prompt share. Prompts that came are expected to
    be read after those that were there; where some are done, what is left is expected from now, as in ``start``.
    """
    in_flight, pending_tokens, prefill_done_s, context_tokens, reserved_tokens, prompt_share = load[:6]
    columns = in_flight, pending_tokens, context_tokens, reserved_tokens, prompt_share
    for column, amount in zip(columns, by, strict=True):
        column[i] = max(column[i] + amount, 0.0)
    if in_flight[i] <= 0.0 or pending_tokens[i] <= 0.0:
        prefill_done_s[i] = 0.0
    elif by[1] > 0.0:
        prefill_done_s[i] = max(prefill_done_s[i], now_s) + by[1] * load.prompt_s[i]
    elif by[1] < 0.0:
        prefill_done_s[i] = now_s + pending_tokens[i] * load.prompt_s[i]


def settle(costs: Costs, load: Load, i: int, step_s: float) -> None:
    """Derive what follows from the load of instance ``i``; ``step_s`` is ``decode_step_s`` of it."""
    in_flight, _, _, _, reserved_tokens, prompt_share, _, steps_s, between_s, prompt_s, free_tokens = load
    _, tokens_s, seq_s, _, _, _, _, _, _, _, chunk_tokens, max_seqs, capacity_tokens = costs
    token_s, seqs = tokens_s[i], in_flight[i]
    steps_s[i] = step_s
    between_s[i] = step_s + token_s * min(prompt_share[i], chunk_tokens[i]) + seq_s[i]
    prompt_s[i] = token_s + step_s / chunk_tokens[i]
    if seqs >= max_seqs[i]:
        free_tokens[i] = -1.0
    elif seqs > 0.0:
        free_tokens[i] = capacity_tokens[i] - reserved_tokens[i]
    else:  # an empty instance is offered anything: whether it is too long is for the engine to say
        free_tokens[i] = ANY_TOKENS


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
