"""What must be known of a target before a replay: its model, how it counts tokens, its GPUs' energy counters."""

import httpx
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.adapters.http_streams import HttpStreams, Target
from benchmarks.replay import Clock, ReplayRequest
from benchmarks.replay_body import RequestBodies
from benchmarks.replay_prompt import Calibration, calibrated

PROBE_WORDS = (16, 272)
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


async def probe_tokens(target: Target, bodies: RequestBodies, clock: Clock) -> Calibration:
    """How the target counts tokens, from two one-token completions. Raises TargetError if they fail."""

    def render(request: ReplayRequest) -> bytes:
        return bodies.of(request.number, request.input_tokens, 1)

    streams = HttpStreams(target, bodies.path, render, clock, _PROBE_TIMEOUT_S)
    counted = []
    try:
        for number, words in enumerate(PROBE_WORDS):
            # numbers from the end of the text: a probe shares no prefix with the requests to come
            outcome = await streams.complete(ReplayRequest(-1 - number, clock.now_s(), words, 1))
            if outcome.failure is not None:
                raise TargetError(f"a first request of {words} words to {target.url} failed: {outcome.failure}")
            if outcome.prompt_tokens is None:
                raise TargetError(f"{target.url} reports no usage with stream_options.include_usage")
            counted.append((words, outcome.prompt_tokens))
    finally:
        streams.close()
    try:
        return calibrated(*counted)
    except ValueError as error:
        raise TargetError(str(error)) from error


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
