"""The official openai client, unchanged, against the gateway."""

import asyncio
import threading

import openai
import pytest
from gateway_fakes import CHAT, STREAM_HEAD, Engine, answer, chunk, like_vllm, play, running, token

MESSAGES = CHAT["messages"]


def client_of(gateway, cls=openai.OpenAI, **options):
    return cls(base_url=gateway.url + "/v1", api_key="none", **{"max_retries": 0, **options})


def in_thread(work):
    """The synchronous client blocks: it needs a thread beside the loop."""
    return asyncio.get_running_loop().run_in_executor(None, work)


def test_models_chat_and_completions():
    async def scenario():
        async with Engine() as engine, running(engine) as gateway:

            def work():
                with client_of(gateway) as client:
                    assert [model.id for model in client.models.list()] == ["tiny"]
                    assert client.models.retrieve("tiny").id == "tiny"
                    chat = client.chat.completions.create(model="tiny", messages=MESSAGES)
                    text = client.completions.create(model="tiny", prompt="hello")
                    return chat, text

            chat, text = await in_thread(work)
            assert chat.choices[0].message.content == "abc"
            assert chat._request_id.startswith("req-")
            assert chat.usage.completion_tokens == 3
            assert text.choices[0].text == "abc"

    play(scenario)


@pytest.mark.parametrize("usage", [True, False])
def test_streams_sync_and_async(usage):
    async def scenario():
        options = {"stream_options": {"include_usage": True}} if usage else {}
        async with Engine() as engine, running(engine) as gateway:

            def work():
                with client_of(gateway) as client:
                    return list(client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True, **options))

            chunks = await in_thread(work)
            async with client_of(gateway, openai.AsyncOpenAI) as client:
                stream = await client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True, **options)
                async_chunks = [chunk async for chunk in stream]
            assert chunks == async_chunks
            assert "".join(chunk.choices[0].delta.content for chunk in chunks if chunk.choices) == "abc"
            assert [chunk.usage.completion_tokens for chunk in chunks if chunk.usage] == ([3] if usage else [])

    play(scenario)


@pytest.mark.parametrize(
    ("arguments", "error", "param"),
    [
        ({"model": "other"}, openai.NotFoundError, "model"),
        ({"extra_body": {"max_tokens": "many"}}, openai.BadRequestError, "body.max_tokens"),
        ({"extra_body": {"messages": 3}}, openai.BadRequestError, "body.messages"),
    ],
)
def test_typed_errors(arguments, error, param):
    async def scenario():
        async with Engine() as engine, running(engine) as gateway, client_of(gateway, openai.AsyncOpenAI) as client:
            with pytest.raises(error) as caught:
                await client.chat.completions.create(**{"model": "tiny", "messages": MESSAGES, **arguments})
            assert caught.value.param == param
            assert not engine.seen

    play(scenario)


def test_the_client_obeys_retry_after():
    """Refused once with a wait, then served: the client comes back by itself, not before the time it was told."""

    async def scenario():
        async with Engine() as engine, running(engine) as gateway:
            instances, gateway.router.instances = gateway.router.instances, []
            asked_s = []
            route = gateway.router.route

            def timed(request, now_s, exclude=frozenset()):
                asked_s.append(now_s)
                decision = route(request, now_s, exclude)
                gateway.router.instances = instances
                return decision

            gateway.router.route = timed
            async with client_of(gateway, openai.AsyncOpenAI, max_retries=1) as client:
                chat = await client.chat.completions.create(model="tiny", messages=MESSAGES)
            assert chat.choices[0].message.content == "abc"
            assert len(asked_s) == 2
            assert asked_s[1] - asked_s[0] >= gateway.router.retry_after_s

    play(scenario)


def test_an_error_inside_a_stream_is_raised():
    async def dies(peer, seen):
        await peer.send(STREAM_HEAD, chunk(token("a")))
        peer.reset()

    async def scenario():
        async with Engine(dies) as engine, running(engine) as gateway, client_of(gateway, openai.AsyncOpenAI) as client:
            stream = await client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True)
            with pytest.raises(openai.APIError, match="failed"):
                async for _ in stream:
                    pass

    play(scenario)


def test_eight_threads_share_one_client():
    async def scenario():
        async with Engine() as engine, running(engine) as gateway:
            texts = []

            def work():
                with client_of(gateway) as client:

                    def loop():
                        for _ in range(5):
                            chat = client.chat.completions.create(model="tiny", messages=MESSAGES)
                            texts.append(chat.choices[0].message.content)

                    threads = [threading.Thread(target=loop) for _ in range(8)]
                    for thread in threads:
                        thread.start()
                    for thread in threads:
                        thread.join()

            await in_thread(work)
            assert texts == ["abc"] * 40

    play(scenario)


def test_engine_errors_keep_their_type():
    async def refuses(peer, seen):
        body = b'{"error":{"message":"too long","type":"BadRequestError","param":"input_tokens","code":400}}'
        await peer.send(answer(400, body))

    async def scenario():
        scripts = Engine(refuses, like_vllm)
        async with scripts as engine, running(engine) as gateway, client_of(gateway, openai.AsyncOpenAI) as client:
            with pytest.raises(openai.BadRequestError) as caught:
                await client.chat.completions.create(model="tiny", messages=MESSAGES)
            assert caught.value.param == "input_tokens"
            await client.chat.completions.create(model="tiny", messages=MESSAGES)

    play(scenario)
