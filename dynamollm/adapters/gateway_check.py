"""What ``dynamollm doctor --url`` finds out about a running gateway, by asking it as a client would."""

from collections.abc import Iterator

import httpx

from dynamollm.diagnosis import Finding, TokenCount, Verdict, estimate_finding

INPUT_TOKENS = "x-dynamollm-input-tokens"

# kinds of text that tokenizers treat differently
TEXTS = {
    "English": "The committee met on Thursday to review the proposal, and most of its members agreed with the plan. ",
    "Python": "def area(width: float, height: float) -> float:\n    if width < 0:\n        raise ValueError(width)\n",
    "JSON": '{"id": 48213, "name": "sensor-7", "values": [0.25, 1.5, -3.75], "active": true, "parent": null}, ',
    "German": "Die Überprüfung der Messgeräte übernimmt künftig eine unabhängige Prüfstelle außerhalb des Werkes. ",
    "Russian": "Следующее заседание совета состоится в четверг, после чего решение будет опубликовано в журнале. ",
    "Chinese": "委员会将在下周四召开会议，讨论新的预算方案，并在会后公布所有成员的投票结果。",
    "numbers": "2024-05-13 17:42:09.184, 1048576, 3.14159265, 0x7ffe12a0, 192.168.14.207, 99.95%, 6.02e23; ",
}
LENGTHS = (1000, 4000, 12_000)  # characters: about the classes' cuts, and a long one


def gateway_findings(url: str, client: httpx.Client) -> Iterator[Finding]:
    """Everything a client can tell about the gateway at ``url``, as far as it gets."""
    try:
        health = client.get("/health")
        models = client.get("/v1/models")
    except httpx.HTTPError as error:
        fix = "is it being served? `dynamollm serve` prints its endpoint"
        yield Finding("gateway", Verdict.FAIL, f"{url} cannot be reached: {error or type(error).__name__}", fix)
        return
    yield _health(url, health)
    yield _models(models)
    name = first_name(models)
    if health.status_code == httpx.codes.OK and name is not None:
        yield token_estimate(client, name)


def _health(url: str, health: httpx.Response) -> Finding:
    if health.status_code == httpx.codes.OK:
        return Finding("gateway", Verdict.OK, f"{url} is healthy")
    found = f"{url}/health answered {health.status_code}"
    return Finding("gateway", Verdict.FAIL, found, "no instance can serve: look at the gateway's log and /metrics")


def _models(models: httpx.Response) -> Finding:
    if models.status_code == httpx.codes.UNAUTHORIZED:
        return Finding("models", Verdict.FAIL, "the gateway wants a key", "pass --api-key or set OPENAI_API_KEY")
    try:
        names = [str(model["id"]) for model in models.json()["data"]]
    except (ValueError, LookupError, TypeError):
        return Finding("models", Verdict.FAIL, f"/v1/models answered {models.status_code} and no list of models")
    if not names:
        return Finding("models", Verdict.FAIL, "none is served", "configure models and pools")
    return Finding("models", Verdict.OK, ", ".join(names))


def first_name(models: httpx.Response) -> str | None:
    """The first model of a list of models; None if there is none."""
    try:
        return str(models.json()["data"][0]["id"])
    except (ValueError, LookupError, TypeError):
        return None


def token_estimate(client: httpx.Client, model: str) -> Finding:
    """Sends texts of several kinds and lengths and compares the gateway's token counts with the engine's."""
    counts = []
    for kind, sample in TEXTS.items():
        for characters in LENGTHS:
            text = (sample * (characters // len(sample) + 1))[:characters]
            try:
                counts.append(_count(client, model, kind, text))
            except httpx.HTTPError as error:
                found = f"a request of {characters} characters failed: {error or type(error).__name__}"
                return Finding("token estimate", Verdict.FAIL, found)
            except (ValueError, LookupError, TypeError) as error:
                found = f"cannot be measured: the answer has no {error}"
                return Finding("token estimate", Verdict.NOTE, found, "only a dynamollm gateway tells what it counted")
    return estimate_finding(counts)


def _count(client: httpx.Client, model: str, kind: str, text: str) -> TokenCount:
    body = {"model": model, "max_tokens": 1, "messages": [{"role": "user", "content": text}]}
    answer = client.post("/v1/chat/completions", json=body)
    answer.raise_for_status()
    return TokenCount(kind, int(answer.headers[INPUT_TOKENS]), int(answer.json()["usage"]["prompt_tokens"]))
