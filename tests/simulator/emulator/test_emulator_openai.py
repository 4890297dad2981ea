"""The official openai client against an emulated server, unchanged."""

import asyncio

import openai
import pytest

HELLO = [{"role": "user", "content": "Hello there"}]
EXACT = {"ignore_eos": True}


@pytest.fixture
def client(instance):
    with openai.OpenAI(base_url=f"{instance.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny"]


def test_chat(client):
    answer = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=5, n=2, extra_body=EXACT)
    assert [choice.finish_reason for choice in answer.choices] == ["length", "length"]
    assert answer.usage.completion_tokens == 10
    assert len(answer.choices[0].message.content.split()) == 5


def test_chat_streamed_with_usage(client):
    chunks = list(
        client.chat.completions.create(
            model="tiny",
            messages=HELLO,
            max_tokens=5,
            stream=True,
            stream_options={"include_usage": True},
            extra_body=EXACT,
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage.completion_tokens == 5
    text = "".join(chunk.choices[0].delta.content for chunk in chunks[:-1])
    assert len(text.split()) == 5


def test_completion(client):
    answer = client.completions.create(model="tiny", prompt=["one", "two"], max_tokens=3, extra_body=EXACT)
    assert [choice.index for choice in answer.choices] == [0, 1]
    streamed = client.completions.create(model="tiny", prompt="one", max_tokens=3, stream=True, extra_body=EXACT)
    assert "".join(chunk.choices[0].text for chunk in streamed) == answer.choices[0].text


def test_asynchronous(instance):
    async def scenario():
        async with openai.AsyncOpenAI(base_url=f"{instance.url}/v1", api_key="none") as client:
            stream = await client.chat.completions.create(
                model="tiny", messages=HELLO, max_tokens=6, stream=True, extra_body=EXACT
            )
            text = "".join([chunk.choices[0].delta.content async for chunk in stream])
            whole = await client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=6, extra_body=EXACT)
            assert whole.choices[0].message.content == text

    asyncio.run(scenario())


def test_errors_have_their_types(client, instance):
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="nope", messages=HELLO)
    with pytest.raises(openai.BadRequestError, match="max_tokens must be at least 1"):
        client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=0)
    instance.change("faults", faults={"error_events": 2})
    with pytest.raises(openai.InternalServerError):
        client.chat.completions.create(model="tiny", messages=HELLO)
    with pytest.raises(openai.APIError, match="EngineCore"):
        list(client.chat.completions.create(model="tiny", messages=HELLO, stream=True))


def test_retries_after_a_full_queue(emulator):
    instance = emulator.start()
    instance.change("faults", faults={"error_events": 1})
    with openai.OpenAI(base_url=f"{instance.url}/v1", api_key="none", max_retries=1) as client:
        answer = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=2, extra_body=EXACT)
    assert answer.usage.completion_tokens == 2
