"""Engines that fail, at every stage: what the client sees, and what the router is told."""

import asyncio

import pytest
from gateway_fakes import (
    CHAT,
    DONE,
    STREAM_HEAD,
    TOKENS,
    WHOLE,
    Engine,
    answer,
    chunk,
    event,
    like_vllm,
    play,
    running,
    token,
    until,
)

from proxy.services import Address
from proxy.settings import Deadlines, Limits, ProxySettings

STREAM = {**CHAT, "stream": True}
ERROR_503 = b'{"error":{"message":"queue full","type":"ServiceUnavailableError","param":null,"code":503}}'
ERROR_400 = b'{"error":{"message":"bad token id","type":"BadRequestError","param":"prompt","code":400}}'


async def resets(peer, seen):
    peer.reset()


async def closes(peer, seen):
    peer.close()


async def half_head(peer, seen):
    await peer.send(b"HTTP/1.1 200 OK\r\ncontent-ty")
    peer.reset()


async def head_only(peer, seen):
    await peer.send(STREAM_HEAD)
    peer.reset()


async def half_first_event(peer, seen):
    await peer.send(STREAM_HEAD, chunk(token("a")[:20]))
    peer.close()


async def half_answer(peer, seen):
    await peer.send(answer(200, WHOLE)[:-10])
    peer.reset()


async def answers_500(peer, seen):
    await peer.send(answer(500, b'{"detail":"draining"}'))


async def answers_503(peer, seen):
    await peer.send(answer(503, ERROR_503))


async def error_event(peer, seen):
    await peer.send(STREAM_HEAD, chunk(b"data: " + ERROR_503 + b"\n\n"), chunk(DONE) + b"0\r\n\r\n")


async def empty_stream(peer, seen):
    await peer.send(STREAM_HEAD + b"0\r\n\r\n")


async def no_http(peer, seen):
    await peer.send(b"SSH-2.0-OpenSSH_9.2\r\n")


async def switches(peer, seen):
    await peer.send(b"HTTP/1.1 101 Switching Protocols\r\nupgrade: h2c\r\nconnection: upgrade\r\n\r\n")


async def two_answers(peer, seen):
    await peer.send(answer(200, WHOLE) + answer(200, b'{"from":"the other tenant"}'))


async def huge_header_then_reset(peer, seen):
    await peer.send(b"HTTP/1.1 200 OK\r\nx: " + b"a" * 1000)
    peer.reset()


BEFORE_THE_FIRST_BYTE = [
    resets,
    closes,
    half_head,
    answers_500,
    answers_503,
    no_http,
    switches,
    two_answers,
    huge_header_then_reset,
]


@pytest.mark.parametrize("fields", [CHAT, STREAM], ids=["whole", "stream"])
@pytest.mark.parametrize("fault", BEFORE_THE_FIRST_BYTE, ids=lambda f: f.__name__)
def test_before_the_first_byte_another_instance_serves(fault, fields):
    async def scenario():
        async with Engine(fault) as sick, Engine() as well, running(sick, well) as gateway:
            got = await gateway.post(fields)
            assert got.status == 200
            assert got.headers["x-dynamollm-instance"] == "i1"
            assert got.body == (WHOLE if fields is CHAT else b"".join(TOKENS) + DONE)
            assert gateway.router.ends() == ["failed", "finished"]
            assert len(gateway.outcomes) == 1

    play(scenario)


@pytest.mark.parametrize(
    "fault", [head_only, half_first_event, error_event, empty_stream], ids=lambda fault: fault.__name__
)
def test_a_stream_is_not_committed_before_its_first_event(fault):
    async def scenario():
        async with Engine(fault) as sick, Engine() as well, running(sick, well) as gateway:
            got = await gateway.post(STREAM)
            assert (got.status, got.body) == (200, b"".join(TOKENS) + DONE)
            assert gateway.router.ends() == ["failed", "finished"]

    play(scenario)


def test_a_whole_answer_that_breaks_off_is_got_elsewhere():
    async def scenario():
        async with Engine(half_answer) as sick, Engine() as well, running(sick, well) as gateway:
            assert (await gateway.post(CHAT)).body == WHOLE

    play(scenario)


@pytest.mark.parametrize(
    ("fault", "status", "kind", "retry"),
    [
        (resets, 502, "bad_gateway", True),
        (answers_500, 500, "Internal Server Error", False),
        (answers_503, 503, "ServiceUnavailableError", True),
        (error_event, 503, "ServiceUnavailableError", True),
        (empty_stream, 502, "bad_gateway", True),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_only_once(fault, status, kind, retry):
    """Two instances fail: the second failure is the answer, the third instance is left alone."""

    async def scenario():
        async with (
            Engine(fault) as first,
            Engine(fault) as second,
            Engine() as third,
            running(first, second, third) as gateway,
        ):
            got = await gateway.post(STREAM)
            assert (got.status, got.error["type"]) == (status, kind)
            assert ("retry-after" in got.headers) == retry
            assert gateway.router.ends() == ["failed", "failed"]
            assert not third.seen

    play(scenario)


def test_nothing_listens():
    async def scenario():
        async with Engine() as well, running(well, well) as gateway:
            gateway.directory.addresses["i0"] = Address.of_url("http://127.0.0.1:1")
            got = await gateway.post(CHAT)
            assert (got.status, got.headers["x-dynamollm-instance"]) == (200, "i1")
            gateway.directory.addresses["i1"] = Address.of_url("http://127.0.0.1:1")
            got = await gateway.post(CHAT)
            assert (got.status, got.headers["x-llm-d-request-dropped-reason"]) == (503, "rejected-no-endpoints")
            assert got.headers["retry-after"] == "1"
            del gateway.directory.addresses["i0"], gateway.directory.addresses["i1"]
            assert (await gateway.post(CHAT)).status == 503
            assert gateway.metrics.dropped.value(("rejected-no-endpoints",)) == 2

    play(scenario)


def test_an_error_of_the_request_is_told_as_one_even_inside_a_stream():
    async def refuses(peer, seen):
        await peer.send(STREAM_HEAD, chunk(b"data: " + ERROR_400 + b"\n\n"), chunk(DONE) + b"0\r\n\r\n")

    async def scenario():
        async with Engine(refuses) as engine, Engine() as other, running(engine, other) as gateway:
            got = await gateway.post(STREAM)
            assert (got.status, got.error["param"]) == (400, "prompt")
            assert gateway.router.ends() == ["finished"]
            assert not other.seen

    play(scenario)


@pytest.mark.parametrize("end", [resets, closes, no_http], ids=lambda end: end.__name__)
def test_after_the_first_byte_an_error_event_ends_the_stream(end):
    async def dies(peer, seen):
        await peer.send(STREAM_HEAD, chunk(token("a")), chunk(token("b")[:15]))
        await asyncio.sleep(0.02)
        await end(peer, seen)

    async def scenario():
        async with Engine(dies) as engine, Engine() as other, running(engine, other) as gateway:
            got = await gateway.post(STREAM)
            assert (got.status, got.complete) == (200, True)
            whole, error, done, rest = got.body.split(b"\n\n")
            assert whole + b"\n\n" == token("a")  # and no half event
            assert b'"code":502' in error
            assert (done, rest) == (b"data: [DONE]", b"")
            assert gateway.router.ends() == ["failed"]
            assert not other.seen
            assert gateway.outcomes[0].status == 502

    play(scenario)


def test_a_long_whole_answer_is_cut_off_so_that_it_cannot_look_whole():
    settings = ProxySettings(limits=Limits(held_bytes=1000))

    async def dies(peer, seen):
        await peer.send(answer(200, b"x" * 5000)[:-100])
        await asyncio.sleep(0.02)
        peer.reset()

    async def scenario():
        async with Engine(dies) as engine, running(engine, settings=settings) as gateway:
            got = await gateway.post(CHAT)
            assert got.status == 200
            assert not got.complete

    play(scenario)


@pytest.mark.parametrize("framing", ["length", "chunked", "close"])
def test_answers_of_every_framing(framing):
    """Longer than what is held, and shorter."""
    settings = ProxySettings(limits=Limits(held_bytes=1000))

    async def answers(peer, seen):
        size = seen.json["max_tokens"]
        body = b'{"text":"%b"}' % (b"x" * size)
        if framing == "length":
            await peer.send(answer(200, body))
        elif framing == "chunked":
            head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
            await peer.send(head, chunk(body[:7]), chunk(body[7:]), b"0\r\nx-trailer: 1\r\n\r\n")
        else:
            await peer.send(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n\r\n", body)
            peer.close()

    async def scenario():
        async with Engine(answers) as engine, running(engine, settings=settings) as gateway:
            for size in (10, 5000):
                got = await gateway.post({**CHAT, "max_tokens": size})
                assert got.complete
                assert got.json == {"text": "x" * size}
            assert gateway.router.ends() == ["finished", "finished"]

    play(scenario)


def test_interim_answers_are_dropped():
    async def hints(peer, seen):
        await peer.send(b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n")
        await peer.send(b"HTTP/1.1 102 Processing\r\n\r\n" + answer(200, WHOLE, "x-engine: yes"))

    async def scenario():
        async with Engine(hints) as engine, running(engine) as gateway:
            for _ in range(2):
                got = await gateway.post(CHAT)
                assert (got.status, got.body, got.headers["x-engine"]) == (200, WHOLE, "yes")
                assert "link" not in got.headers
            assert engine.connections == 1

    play(scenario)


def test_a_connection_the_engine_closed_while_idle_is_no_failure():
    """Its keep-alive ran out as we sent: the same request on a fresh connection, not counted as a failure."""

    async def scenario():
        stale = asyncio.Event()

        async def closes_after_next(peer, seen):
            stale.set()
            peer.close()

        async with Engine(like_vllm, closes_after_next, like_vllm) as engine, running(engine) as gateway:
            assert (await gateway.post(CHAT)).body == WHOLE
            assert (await gateway.post(CHAT)).body == WHOLE
            assert stale.is_set()
            assert engine.connections == 2
            assert gateway.router.ends() == ["finished", "finished"]

    play(scenario)


def test_an_idle_connection_closed_by_the_engine_is_forgotten():
    async def says_close(peer, seen):
        await like_vllm(peer, seen)
        await asyncio.sleep(0)
        peer.close()

    async def scenario():
        async with Engine(says_close) as engine, running(engine) as gateway:
            for _ in range(3):
                assert (await gateway.post(CHAT)).body == WHOLE
                await asyncio.sleep(0.02)
            gateway.pass_time(0)
            assert gateway.gateway.open_connections == 0

    play(scenario)


def test_bytes_on_an_idle_connection_close_it():
    async def talks_on(peer, seen):
        await like_vllm(peer, seen)
        await asyncio.sleep(0.02)
        await peer.send(b"HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\n\r\n")
        await peer.closed()

    async def scenario():
        async with Engine(talks_on) as engine, running(engine) as gateway:
            assert (await gateway.post(CHAT)).body == WHOLE
            await engine.closed.wait()
            assert gateway.gateway.open_connections == 0

    play(scenario)


def test_connection_close_is_obeyed():
    async def once(peer, seen):
        await peer.send(answer(200, WHOLE, "connection: close"))
        await peer.closed()

    async def scenario():
        async with Engine(once) as engine, running(engine) as gateway:
            for _ in range(2):
                got = await gateway.post(CHAT)
                assert got.body == WHOLE
            assert engine.connections == 2

    play(scenario)


def test_idle_connections_expire_and_are_limited():
    settings = ProxySettings(limits=Limits(upstream_connections=1))
    gate = asyncio.Event()

    async def waits(peer, seen):
        await gate.wait()
        await like_vllm(peer, seen)

    async def scenario():
        async with Engine(waits) as engine, running(engine, settings=settings) as gateway:
            first = asyncio.create_task(gateway.post(CHAT))
            await until(lambda: engine.seen)
            assert (await gateway.post(CHAT)).status == 503
            gate.set()
            assert (await first).status == 200
            assert gateway.gateway.open_connections == 1
            gateway.pass_time(settings.deadlines.upstream_idle_s + 0.1)
            await engine.closed.wait()
            assert gateway.gateway.open_connections == 0

    play(scenario)


@pytest.mark.parametrize("fields", [CHAT, STREAM], ids=["whole", "stream"])
def test_a_late_engine_is_given_up(fields):
    settings = ProxySettings(deadlines=Deadlines(first_byte_s=5.0))

    async def silent(peer, seen):
        await peer.closed()

    async def scenario():
        async with Engine(silent) as engine, running(engine, settings=settings) as gateway:
            waiting = asyncio.create_task(gateway.post(fields))
            await until(lambda: engine.seen)
            gateway.pass_time(5.1)
            got = await waiting
            assert (got.status, got.error["type"]) == (504, "gateway_timeout")
            await engine.closed.wait()
            assert gateway.router.ends() == ["cancelled"]

    play(scenario)


def test_a_stream_without_end_is_ended():
    async def endless(peer, seen):
        await peer.send(STREAM_HEAD, chunk(token("a")))
        await peer.closed()

    async def scenario():
        async with Engine(endless) as engine, running(engine) as gateway:
            waiting = asyncio.create_task(gateway.post(STREAM))
            await until(lambda: gateway.router.told)
            gateway.pass_time(ProxySettings().deadlines.total_s + 1)
            got = await waiting
            assert got.complete
            assert b'"code":504' in got.body
            await engine.closed.wait()

    play(scenario)


def test_engine_errors_of_other_shapes_are_brought_into_one():
    async def scenario():
        cases = {b'{"error":"Unauthorized"}': "Unauthorized", b'{"detail":"Not Found"}': "Not Found", b"<html>": "404"}
        for body, message in cases.items():

            async def refuses(peer, seen, body=body):
                await peer.send(answer(404, body))

            async with Engine(refuses) as engine, running(engine) as gateway:
                got = await gateway.post(CHAT)
                assert got.status == 404
                assert message in got.error["message"]
                assert set(got.error) == {"message", "type", "param", "code"}

    play(scenario)


def test_a_fault_of_ours_does_not_leave_the_client_waiting():
    async def scenario():
        async with Engine() as engine, running(engine) as gateway:

            def raises(*_):
                raise RuntimeError("a bug")

            loop = asyncio.get_running_loop()
            raised = []
            loop.set_exception_handler(lambda _, context: raised.append(context["exception"]))
            gateway.gateway.services.router.on_finished = raises
            assert (await gateway.post(CHAT)).status == 502
            assert str(raised[0]) == "a bug"

    play(scenario)


def test_first_events_may_come_after_comments_and_split():
    async def pings(peer, seen):
        await peer.send(STREAM_HEAD, chunk(b": ping\n\n"), chunk(b"\n"), *(chunk(bytes([b])) for b in token("a")))
        await peer.send(chunk(event({"choices": [], "usage": {"completion_tokens": 7}})), chunk(DONE), b"0\r\n\r\n")

    async def scenario():
        async with Engine(pings) as engine, running(engine) as gateway:
            got = await gateway.post(STREAM)
            assert got.body.endswith(token("a") + DONE)
            assert gateway.outcomes[0].completion_tokens == 7

    play(scenario)
