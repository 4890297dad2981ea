"""What is in one step of a real vLLM scheduler, in the terms of an EnergyProfile. Pure; knows nothing of vLLM's types.

A scheduler tells of a request's prompt once, when it first runs; hence the memory here. The rules are those of the
engine model (``simulator.batching``): a request with one new token behind its whole prompt decodes, any other prefills.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple


class Batch(NamedTuple):
    """The arguments of ``energy.profile.step_time_s``."""

    prefill_tokens: int
    prefill_attention_tokens2: float
    decode_seqs: int
    context_tokens: int


class Batches:
    """Steps in order; ``step`` for each."""

    def __init__(self) -> None:
        self._prompt_tokens: dict[str, int] = {}

    def step(
        self,
        begun: Mapping[str, int],
        computed_tokens: Mapping[str, int],
        scheduled_tokens: Mapping[str, int],
        ended: Iterable[str],
    ) -> Batch:
        """Take one step in.

        ``begun``: prompt length of requests that run for the first time; ``computed_tokens``: of all that run, those
        whose KV is there already (cached prefixes among them); ``scheduled_tokens``: of each, those computed now.
        """
        self._prompt_tokens.update(begun)
        prefill_tokens = decode_seqs = context_tokens = 0
        attention_tokens2 = 0.0
        for request, new in scheduled_tokens.items():
            computed = computed_tokens[request]
            if new == 1 and computed >= self._prompt_tokens[request]:
                decode_seqs += 1
                context_tokens += computed + 1
            else:
                prefill_tokens += new
                attention_tokens2 += new * (computed + 0.5 * new)
        for request in ended:
            self._prompt_tokens.pop(request, None)
        return Batch(prefill_tokens, attention_tokens2, decode_seqs, context_tokens)
