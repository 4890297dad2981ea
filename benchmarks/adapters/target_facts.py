"""What must be known of a target before a replay: its model, how it counts tokens, its GPUs' energy counters."""

import httpx
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.adapters.http_streams import HttpStreams, Target
from benchmarks.replay import Clock, ReplayRequest
from benchmarks.replay_body import RequestBodies
from benchmarks.replay_prompt import VOCABULARY, PromptText, calibrated, counted_alike, repeated

WORD_PROBE = 32  # words
LENGTH_PROBES = (32, 288)  # words
_PROBE_TIMEOUT_S = 120.0
ENERGY_COUNTERS = {  # name -> joules of its unit
    "DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION": 1e-3,  # of each GPU: DCGM, our node agents, emulated nodes
    "dynamollm_metered_joules": 1.0,  # of all GPUs: a dynamollm gateway
}


class TargetError(Exception):
    """The target cannot be replayed against; the message says why and what to check."""


async def first_model(target: Target) -> str:
    """The name of the first model the target lists. Raises TargetError if it lists none or cannot be reached."""
    headers = {"authorization": f"Bearer {target.api_key}"} if target.api_key else {}
    url = f"{target.url}/v1/models"
    try:
        async with httpx.AsyncClient(timeout=10) as client:
            answer = await client.get(url, headers=headers)
            answer.raise_for_status()
            models = answer.json()["data"]
            return str(models[0]["id"])
    except httpx.HTTPStatusError as error:
        raise TargetError(f"{url} answered {error.response.status_code}: name the model with --model") from error
    except httpx.HTTPError as error:
        raise TargetError(f"{url} cannot be reached ({error or type(error).__name__}): is it being served?") from error
    except (ValueError, LookupError, TypeError) as error:
        raise TargetError(f"{url} lists no model: name it with --model") from error


async def probe_prompts(target: Target, model: str, chat: bool, clock: Clock) -> RequestBodies:
    """Bodies whose prompts have the wanted number of tokens as the target counts, found by one-token completions.

    Raises TargetError if one of them fails, or the target reports no usage.
    """
    plain = RequestBodies(model, chat)
    counts = {word: await _counted(target, plain, repeated(word, WORD_PROBE), clock) for word in VOCABULARY}
    text = PromptText(counted_alike(counts))
    # numbers from the end of the text: a probe shares no prefix with the requests to come
    points = [(words, await _counted(target, plain, text.stretch(-1 - words, words), clock)) for words in LENGTH_PROBES]
    try:
        return RequestBodies(model, chat, calibrated(*points), text)
    except ValueError as error:
        raise TargetError(str(error)) from error


async def _counted(target: Target, bodies: RequestBodies, prompt: bytes, clock: Clock) -> int:
    """How many tokens the target counts for a prompt."""
    streams = HttpStreams(target, bodies.path, lambda request: bodies.around(prompt, 1), clock, _PROBE_TIMEOUT_S)
    try:
        outcome = await streams.complete(ReplayRequest(0, clock.now_s(), 0, 1))
    finally:
        streams.close()
    if outcome.failure is not None:
        raise TargetError(f"a first request of {len(prompt)} characters to {target.url} failed: {outcome.failure}")
    if outcome.prompt_tokens is None:
        raise TargetError(f"{target.url} reports no usage with stream_options.include_usage")
    return outcome.prompt_tokens


async def energy_counter_j(metrics_url: str) -> float:
    """What all GPUs behind a metrics URL have drawn so far, in J. Raises TargetError if it does not tell."""
    try:
        async with httpx.AsyncClient(timeout=10) as client:
            answer = await client.get(metrics_url)
            answer.raise_for_status()
    except httpx.HTTPError as error:
        raise TargetError(f"{metrics_url} cannot be read: {error or type(error).__name__}") from error
    try:
        families = list(text_string_to_metric_families(answer.text))
    except ValueError as error:
        raise TargetError(f"{metrics_url} is not in Prometheus' text format: {error}") from error
    samples = [sample for family in families for sample in family.samples]
    for name, joules in ENERGY_COUNTERS.items():
        # the parser gives every counter the suffix that OpenMetrics wants
        values = [sample.value for sample in samples if sample.name.removesuffix("_total") == name]
        if values:
            return sum(values) * joules
    raise TargetError(f"{metrics_url} exports none of {', '.join(ENERGY_COUNTERS)}")
