"""Work: the energy a request's prefill and its decoding tokens are expected to take, by the profile's coefficients.

Only how the works of requests compare matters to attribution: a meter says how much there is to share. Joules of one
instance, all its GPUs. Pure arithmetic on ``StepCoefficients``, of one request or of arrays of them.
"""

from typing import Any

from energy.profile import StepCoefficients, step_power_w, step_time_s

Quantity = Any  # a float, or an array of them


def prefill_s(c: StepCoefficients, input_tokens: Quantity) -> Quantity:
    """Time a prompt takes by itself."""
    return step_time_s(c, input_tokens, _attention(input_tokens), 0.0, 0.0)


def prefill_j(c: StepCoefficients, gpus: int, input_tokens: Quantity, batch: float) -> Quantity:
    """Energy of a prompt worked on among ``batch`` decoding sequences.

    What its step costs whatever is in it (weights, overhead, the all-reduce's latency) is shared with them by head.
    """
    alone_j = _step_j(c, gpus, input_tokens, 0.0, 0.0)
    return alone_j - _step_j(c, gpus, 0.0, 0.0, 0.0) * batch / (batch + 1.0)


def token_s(c: StepCoefficients, batch: float, context_tokens: Quantity) -> Quantity:
    """Time between two tokens of a sequence that decodes among ``batch`` with this mean context."""
    return step_time_s(c, 0.0, 0.0, batch, batch * context_tokens)


def token_j(c: StepCoefficients, gpus: int, batch: float, context_tokens: Quantity) -> Quantity:
    """Energy of one token: its part of a decode step of ``batch`` sequences with its own context.

    What the step costs whatever is in it is shared by head.
    """
    return _step_j(c, gpus, 0.0, batch, batch * context_tokens) / batch


def _step_j(c: StepCoefficients, gpus: int, prompt: float, batch: float, context_tokens: Quantity) -> Quantity:
    attention = _attention(prompt)
    return (
        gpus
        * step_time_s(c, prompt, attention, batch, context_tokens)
        * step_power_w(c, prompt, attention, batch, context_tokens)
    )


def _attention(input_tokens: Quantity) -> Quantity:
    return 0.5 * input_tokens * input_tokens
