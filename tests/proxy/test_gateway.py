"""The gateway end to end over real sockets, against engines that behave."""

from gateway_fakes import CHAT, DONE, TOKENS, USAGE_EVENT, WHOLE, Engine, play, read_answer, request_bytes, running


def test_an_answer_passes_as_it_is_and_says_who_gave_it():
    async def scenario():
        async with Engine() as engine, running(engine) as gateway:
            got = await gateway.post(CHAT)
            assert (got.status, got.body) == (200, WHOLE)
            assert got.headers["x-request-id"].startswith("req-")
            assert got.headers["x-dynamollm-class"] == "SS"
            assert int(got.headers["x-dynamollm-input-tokens"]) > 0
            assert got.headers["x-dynamollm-pool"] == "LL"
            assert got.headers["x-dynamollm-instance"] == "i0"
            assert engine.seen[0].json == CHAT
            assert gateway.router.ends() == ["finished"]
            assert gateway.outcomes[0].completion_tokens == 3

    play(scenario)


def test_a_stream_passes_byte_for_byte_without_the_usage_nobody_asked_for():
    async def scenario():
        async with Engine() as engine, running(engine) as gateway:
            got = await gateway.post({**CHAT, "stream": True})
            assert got.complete
            assert got.body == b"".join(TOKENS) + DONE
            assert engine.seen[0].json == {**CHAT, "stream": True, "stream_options": {"include_usage": True}}
            assert gateway.outcomes[0].completion_tokens == 3

    play(scenario)


def test_a_stream_keeps_the_usage_asked_for():
    async def scenario():
        async with Engine() as engine, running(engine) as gateway:
            asked = {**CHAT, "stream": True, "stream_options": {"include_usage": True}}
            got = await gateway.post(asked)
            assert got.body == b"".join(TOKENS) + USAGE_EVENT + DONE
            assert engine.seen[0].json == asked
            assert gateway.outcomes[0].prompt_tokens == 11

    play(scenario)


def test_connections_are_kept_on_both_sides():
    async def scenario():
        async with Engine() as engine, running(engine) as gateway:
            reader, writer = await gateway.connect()
            for stream in (False, True, False):
                writer.write(request_bytes({**CHAT, "stream": stream}))
                got = await read_answer(reader)
                assert got.status == 200
            writer.close()
            assert engine.connections == 1
            assert len(engine.seen) == 3

    play(scenario)
