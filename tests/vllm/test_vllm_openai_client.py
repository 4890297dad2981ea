"""What the official client does with a vLLM works through the gateway as it does without."""

import asyncio

import httpx
import openai
import pytest
from vllm_cluster import LONG, MODEL, QUEUED, SEQUENCES, SHORT

MESSAGES = [{"role": "user", "content": "Why is the sky blue?"}]
EXACT = {"ignore_eos": True}


def ask(client, **more):
    return client.chat.completions.create(
        model=MODEL, messages=MESSAGES, **{"max_tokens": 8, "extra_body": EXACT, **more}
    )


def test_a_chat_answer_and_its_usage(client):
    answer = ask(client)
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].message.content
    assert answer.usage.completion_tokens == 8
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 8


def test_a_completion(client):
    answer = client.completions.create(model=MODEL, prompt="def f(x):", max_tokens=5, extra_body=EXACT)
    assert answer.usage.completion_tokens == 5
    assert answer.choices[0].text


def test_a_stream_with_usage_says_as_much_as_the_whole_answer(client):
    whole = ask(client, temperature=0, seed=1).choices[0].message.content
    stream = ask(client, temperature=0, seed=1, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole
    assert chunks[-1].usage.completion_tokens == 8
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"


def test_the_same_answer_with_and_without_the_gateway(client, cluster):
    body = cluster.body(max_tokens=16, temperature=0, seed=3)
    said = {
        httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()["choices"][0]["message"]["content"]
        for url in (cluster.url, *(engine.url for engine in cluster.engines))
    }
    assert len(said) == 1


def test_several_choices(client):
    answer = ask(client, n=3, temperature=1.0)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert answer.usage.completion_tokens == 24
    streamed = {c.choices[0].index for c in ask(client, n=3, temperature=1.0, stream=True) if c.choices}
    assert streamed == {0, 1, 2}


def test_logprobs(client):
    tokens = ask(client, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert len(tokens) == 8
    assert all(token.logprob <= 0 and len(token.top_logprobs) == 2 for token in tokens)


TOOL = {
    "type": "function",
    "function": {
        "name": "look",
        "parameters": {"type": "object", "properties": {"far": {"type": "boolean"}}, "required": ["far"]},
    },
}


@pytest.mark.parametrize("choice", ["none", "auto", {"type": "function", "function": {"name": "look"}}], ids=str)
def test_tools_are_passed_through(cluster, choice):
    body = cluster.body(tools=[TOOL], tool_choice=choice, max_tokens=24, temperature=0, ignore_eos=False)
    messages = []
    for url in (cluster.url, cluster.engines[1].url):
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)
        assert answer.status_code == httpx.codes.OK, answer.text
        message = answer.json()["choices"][0]["message"]
        for call in message.get("tool_calls") or ():
            call.pop("id")  # drawn anew each time
        messages.append(message)
    assert messages[0] == messages[1]


def test_models(client):
    assert [model.id for model in client.models.list()] == [MODEL]


@pytest.mark.parametrize(
    ("more", "error"),
    [
        ({"max_tokens": 0}, openai.BadRequestError),
        ({"max_tokens": 100_000}, openai.BadRequestError),
        ({"temperature": 5.0}, openai.BadRequestError),
        ({"model": "no-such-model"}, openai.NotFoundError),
        ({"messages": [{"role": "user", "content": "word " * 9000}]}, openai.BadRequestError),
    ],
)
def test_errors_are_of_the_clients_own_kinds(client, more, error):
    with pytest.raises(error) as caught:
        client.chat.completions.create(**{"model": MODEL, "messages": MESSAGES, "max_tokens": 4, **more})
    assert set(caught.value.body) >= {"message", "type", "param", "code"}


def test_more_streams_than_an_engine_takes_are_absorbed(cluster):
    count = SEQUENCES + 2 * QUEUED

    async def stream(client, number):
        chunks = await client.chat.completions.create(
            model=MODEL,
            messages=MESSAGES,
            max_tokens=5 + number,
            stream=True,
            stream_options={"include_usage": True},
            extra_body=EXACT,
        )
        return [chunk async for chunk in chunks][-1].usage.completion_tokens

    async def play():
        async with openai.AsyncOpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(stream(client, number) for number in range(count)))

    assert asyncio.run(play()) == [5 + number for number in range(count)]


def test_an_answer_names_its_instance_and_class(cluster):
    answer = httpx.post(f"{cluster.url}/v1/chat/completions", json=cluster.body(max_tokens=4), timeout=60)
    assert answer.headers["x-dynamollm-instance"] in cluster.addresses
    assert int(answer.headers["x-dynamollm-input-tokens"]) == answer.json()["usage"]["prompt_tokens"]


def test_requests_go_to_the_pool_of_their_class(cluster):
    for prompt, pool in ((SHORT, "short"), (LONG, "long")):
        body = cluster.body(prompt, max_tokens=2)
        answer = httpx.post(f"{cluster.url}/v1/chat/completions", json=body, timeout=60)
        assert answer.headers["x-dynamollm-pool"] == pool
