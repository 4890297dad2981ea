"""Filter -> score -> pick over the live load of instances: the arithmetic of a routing decision.

Scalar functions over indexables. The gateway passes lists and interprets them; the simulator passes NumPy arrays and
compiles these very functions with Numba. So: plain arithmetic, no objects but the two named tuples of columns, no
keyword arguments, no clock. Nothing here knows pools, requests or HTTP: see pools/router.py for who calls it.

The policy. Dynamic energy of an engine step is additive: so much per token computed, so much per context token read, and
one streaming of the weights, shared by all sequences of the step. A request that joins ``n`` others of comparable
(exponential) remaining length keeps the instance stepping ``output / (n + 1)`` steps longer in expectation, so its marginal
energy falls steeply with ``n``: energy wants PACKING. Waiting and slower steps use up the SLO: latency wants
SPREADING. Let ``pressure`` in [0, 1) be the larger share of the TTFT and TBT budgets in use once the request is there,
for itself and for those already there. Then

    score = marginal energy x (1 + spread x pressure / (1 - pressure))

``spread`` 0 packs until nothing more fits; 1 (the default) makes the last tenth of a budget ten times as dear as an
empty one; larger values spread. The instance of the least score is picked. Those over their budget are filtered out.
"""

from collections.abc import MutableSequence, Sequence
from typing import NamedTuple

from energy.profile import StepCoefficients, step_time_s

NONE = -1  # no instance


class Costs(NamedTuple):
    """Columns, one element an instance: what it costs there, and what it can hold. Floats; see ``cost_row``."""

    token_s: Sequence[float]  # one more token in a step
    attention_s: Sequence[float]  # prefill attention, per token squared
    kv_s: Sequence[float]  # one more context token read in a step
    token_j: Sequence[float]  # the same in joules of the whole instance
    attention_j: Sequence[float]
    kv_j: Sequence[float]
    weights_j: Sequence[float]  # streaming the weights once
    chunk_tokens: Sequence[float]  # prompt tokens an engine step takes at most
    max_seqs: Sequence[float]  # requests it may hold; 0 closes it
    kv_capacity_tokens: Sequence[float]


class Load(NamedTuple):
    """Columns, one element an instance: what is there now. Floats, changed by ``add``, ``start`` and ``remove``."""

    in_flight: MutableSequence[float]  # requests sent and not finished
    pending_tokens: MutableSequence[float]  # prompt tokens of those without a first token
    context_tokens: MutableSequence[float]  # mean context of those in flight over their lives: input + output / 2
    reserved_tokens: MutableSequence[float]  # their contexts at the end: input + output
    interference_s: MutableSequence[float]  # prefill per output token, summed over those in flight
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
    """One row of ``Costs`` from the step coefficients of an instance of ``tp`` GPUs."""
    compute_w, memory_w = tp * c.compute_w, tp * c.memory_w
    return (
        c.compute_s_per_token + c.communication_s_per_token,
        c.attention_s_per_token2,
        c.kv_s_per_token,
        compute_w * c.compute_s_per_token,
        compute_w * c.attention_s_per_token2,
        memory_w * c.kv_s_per_token,
        memory_w * c.weights_s,
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
    """Predicted time from now to the first token if a request of this length is added: wait, step under way, prefill."""
    return wait_s(load, i, now_s) + load.step_s[i] + prefill_s(costs, load, i, input_tokens)


def tbt_s(costs: Costs, load: Load, i: int, input_tokens: float, output_tokens: float) -> float:
    """Predicted mean time between tokens once such a request is added.

    A decode step, plus the prefills of the others: each in flight is taken to be replaced, when it ends, by one like it.
    """
    context_tokens = input_tokens + 0.5 * output_tokens
    return load.step_s[i] + load.interference_s[i] + costs.token_s[i] + costs.kv_s[i] * context_tokens


def marginal_energy_j(costs: Costs, load: Load, i: int, input_tokens: float, output_tokens: float) -> float:
    """Energy that adding the request makes instance ``i`` use beyond idling, in joules over all its GPUs."""
    return (
        costs.token_j[i] * (input_tokens + output_tokens)
        + 0.5 * costs.attention_j[i] * input_tokens * input_tokens
        + costs.kv_j[i] * output_tokens * (input_tokens + 0.5 * output_tokens)
        + costs.weights_j[i] * output_tokens / (load.in_flight[i] + 1.0)
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
    best = NONE
    best_score = 0.0
    for i in candidates:
        if (
            load.in_flight[i] >= costs.max_seqs[i]
            or load.reserved_tokens[i] + input_tokens + output_tokens > costs.kv_capacity_tokens[i]
        ):
            continue
        pressure = pressure_of(costs, load, i, now_s, input_tokens, output_tokens, ttft_budget_s, tbt_slo_s) / margin
        if pressure >= 1.0:
            continue
        energy_j = marginal_energy_j(costs, load, i, input_tokens, output_tokens)
        score = energy_j * (1.0 + spread * pressure / (1.0 - pressure))
        if best == NONE or score < best_score:
            best = i
            best_score = score
    return best


def pressure_of(
    costs: Costs,
    load: Load,
    i: int,
    now_s: float,
    input_tokens: float,
    output_tokens: float,
    ttft_budget_s: float,
    tbt_slo_s: float,
) -> float:
    """The largest share of a latency budget in use once the request is there: its TTFT, its TBT, the others' TBT."""
    prefill = prefill_s(costs, load, i, input_tokens)
    first_s = wait_s(load, i, now_s) + load.step_s[i] + prefill
    between_s = tbt_s(costs, load, i, input_tokens, output_tokens)
    pressure = between_s / tbt_slo_s
    if load.in_flight[i] > 0.0:
        pressure = max(pressure, (between_s + prefill / max(output_tokens, 1.0)) / load.tbt_limit_s[i])
    if ttft_budget_s <= 0.0:
        return 1e9
    return max(pressure, first_s / ttft_budget_s)


def choose_least_late(
    candidates: Sequence[int],
    costs: Costs,
    load: Load,
    now_s: float,
    input_tokens: float,
    output_tokens: float,
) -> int:
    """For a request whose deadline cannot be met: the candidate with room that gives a first token soonest, or ``NONE``."""
    best = NONE
    best_s = 0.0
    for i in candidates:
        if (
            load.in_flight[i] >= costs.max_seqs[i]
            or load.reserved_tokens[i] + input_tokens + output_tokens > costs.kv_capacity_tokens[i]
        ):
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
    load.interference_s[i] += input_tokens * costs.token_s[i] / max(output_tokens, 1.0)
    load.tbt_limit_s[i] = min(load.tbt_limit_s[i], tbt_slo_s)


def start(costs: Costs, load: Load, i: int, now_s: float, input_tokens: float) -> None:
    """Count the first token of a request on instance ``i``: what is still pending is expected from now."""
    load.pending_tokens[i] = max(load.pending_tokens[i] - input_tokens, 0.0)
    load.prefill_done_s[i] = now_s + prefill_s(costs, load, i, load.pending_tokens[i])


def remove(costs: Costs, load: Load, i: int, input_tokens: float, output_tokens: float, tbt_slo_s: float) -> None:
    """Forget a request that has left instance ``i``; same lengths as in ``add``. The caller then sets ``step_s``.

    One that had no first token is to be taken off ``pending_tokens`` with ``start`` before.
    """
    load.in_flight[i] -= 1.0
    if load.in_flight[i] <= 0.0:  # nobody left: drop what rounding left
        load.in_flight[i] = 0.0
        load.pending_tokens[i] = 0.0
        load.context_tokens[i] = 0.0
        load.reserved_tokens[i] = 0.0
        load.interference_s[i] = 0.0
        return
    load.context_tokens[i] -= input_tokens + 0.5 * output_tokens
    load.reserved_tokens[i] -= input_tokens + output_tokens
    load.interference_s[i] -= input_tokens * costs.token_s[i] / max(output_tokens, 1.0)
