"""Clients that leave, read slowly, pipeline, or do not speak HTTP as one should."""

import asyncio
import json
import socket
from contextlib import contextmanager, suppress

import pytest
from gateway_fakes import (
    CHAT,
    DONE,
    STREAM_HEAD,
    TOKENS,
    WHOLE,
    Engine,
    Reading,
    answer,
    chunk,
    like_vllm,
    parse,
    play,
    read_answer,
    request_bytes,
    running,
    token,
    until,
)

from proxy.services import Address
from proxy.settings import Deadlines, Limits, ProxySettings

STREAM = {**CHAT, "stream": True}


async def silent(peer, seen):
    await peer.closed()


async def endless(peer, seen):
    await peer.send(STREAM_HEAD, chunk(token("a")))
    await peer.closed()


async def held(peer, seen):
    """A whole answer of which only the beginning comes."""
    await peer.send(answer(200, WHOLE)[:-10])
    await peer.closed()


async def read_until(reader, condition):
    data = b""
    while not condition(data):
        piece = await reader.read(65536)
        assert piece, f"closed after {data[-200:]!r}"
        data += piece
    return data


async def leave(how, writer):
    if how == "reset":
        writer.transport.abort()
    elif how == "half-close":
        writer.write_eof()
    else:
        writer.close()


@pytest.mark.parametrize("how", ["close", "reset", "half-close"])
@pytest.mark.parametrize(
    ("script", "fields"),
    [(silent, CHAT), (silent, STREAM), (endless, STREAM), (held, CHAT)],
    ids=["waiting-whole", "waiting-stream", "streaming", "holding"],
)
def test_client_gone_engine_released_within_100_ms(script, fields, how):
    async def scenario():
        async with Engine(script) as engine, running(engine) as gateway:
            _, writer = await gateway.connect()
            writer.write(request_bytes(fields))
            await until(lambda: engine.seen)
            await asyncio.sleep(0.02)
            await leave(how, writer)
            async with asyncio.timeout(0.1):
                await engine.closed.wait()
                await until(lambda: gateway.router.ends() == ["cancelled"])
            assert gateway.outcomes[0].cancelled
            writer.close()

    play(scenario)


@contextmanager
def deaf_port():
    """A port whose queue of connections is full: dialling it gets no answer."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(0)
    callers = []
    for _ in range(3):
        caller = socket.socket()
        caller.setblocking(False)
        with suppress(BlockingIOError):
            caller.connect(listener.getsockname())
        callers.append(caller)
    yield listener.getsockname()[1]
    for one in (*callers, listener):
        one.close()


def test_client_gone_while_dialling():
    async def scenario():
        async with Engine() as engine, running(engine) as gateway:
            with deaf_port() as port:
                gateway.directory.addresses["i0"] = Address.of_url(f"http://127.0.0.1:{port}")
                _, writer = await gateway.connect()
                writer.write(request_bytes(CHAT))
                await until(lambda: gateway.router.routed)
                assert gateway.gateway.open_connections == 1
                writer.transport.abort()
                await until(lambda: gateway.router.ends() == ["cancelled"])
                assert gateway.gateway.open_connections == 0

    play(scenario)


def test_dialling_has_its_deadline():
    settings = ProxySettings(deadlines=Deadlines(connect_s=0.05))

    async def scenario():
        async with Engine() as engine, Engine() as well, running(engine, well, settings=settings) as gateway:
            with deaf_port() as port:
                gateway.directory.addresses["i0"] = Address.of_url(f"http://127.0.0.1:{port}")
                assert (await gateway.post(CHAT)).body == WHOLE
                assert gateway.metrics.failures.value(("i0", "unreachable")) == 1

    play(scenario)


def test_queued_requests_are_served_cancelled_and_expire():
    gate = asyncio.Event()

    async def waits(peer, seen):
        await gate.wait()
        await like_vllm(peer, seen)

    async def scenario():
        async with Engine(waits) as engine, running(engine) as gateway:
            gateway.router.capacity = 1
            first = asyncio.create_task(gateway.post(CHAT))
            await until(lambda: engine.seen)
            second = asyncio.create_task(gateway.post(CHAT))
            await until(lambda: len(gateway.router.queue) == 1)
            _, leaver = await gateway.connect()
            leaver.write(request_bytes(CHAT))
            await until(lambda: len(gateway.router.queue) == 2)
            leaver.transport.abort()
            await until(lambda: len(gateway.router.queue) == 1)
            late = asyncio.create_task(gateway.post(CHAT))
            await until(lambda: len(gateway.router.queue) == 2)
            gateway.router.expired.append(gateway.router.queue.pop())
            gateway.pass_time(0)
            got = await late
            assert (got.status, got.headers["x-llm-d-request-dropped-reason"]) == (429, "rejected-ttl-expired")
            assert (got.headers["retry-after"], got.headers["retry-after-ms"]) == ("2", "1500")
            assert not second.done()
            gate.set()
            assert [(await task).body for task in (first, second)] == [WHOLE, WHOLE]
            assert len(engine.seen) == 2

    play(scenario)


def test_a_queued_request_keeps_its_deadline():
    settings = ProxySettings(deadlines=Deadlines(first_byte_s=3.0))

    async def scenario():
        async with Engine() as engine, running(engine, settings=settings) as gateway:
            gateway.router.capacity = 0
            waiting = asyncio.create_task(gateway.post(CHAT))
            await until(lambda: gateway.router.queue)
            gateway.pass_time(3.1)
            assert (await waiting).status == 504
            assert not gateway.router.queue

    play(scenario)


def small_buffer_socket(port):
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.setblocking(False)
    return client


def test_a_slow_reader_slows_the_engine_and_gets_every_byte():
    """The engine cannot run ahead by more than the buffers between; nothing is lost when the reader goes on."""
    events = 1500  # more than all socket buffers on the way can hold
    sent = []

    async def floods(peer, seen):
        await peer.send(STREAM_HEAD)
        for n in range(events):
            await peer.send(chunk(token(f"{n:06}" + "x" * 20_000)))
            sent.append(n)
        await peer.send(chunk(DONE) + b"0\r\n\r\n")

    async def scenario():
        async with Engine(floods) as engine, running(engine) as gateway:
            loop = asyncio.get_running_loop()
            client = small_buffer_socket(gateway.port)
            await loop.sock_connect(client, ("127.0.0.1", gateway.port))
            await loop.sock_sendall(client, request_bytes(STREAM))
            before = -1
            while before != len(sent):  # until the engine is stuck
                before = len(sent)
                await asyncio.sleep(0.1)
            assert len(sent) < events
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
            reading = Reading()
            while not reading.complete:
                reading.feed(await loop.sock_recv(client, 1 << 20))
            client.close()
            assert reading.body.count(b"\n\n") == events + 1
            assert gateway.router.ends() == ["finished"]

    play(scenario)


def test_a_reader_that_stopped_is_cut_off():
    settings = ProxySettings(deadlines=Deadlines(stalled_client_s=5.0))

    async def floods(peer, seen):
        await peer.send(STREAM_HEAD)
        while True:
            await peer.send(chunk(token("x" * 10_000)))

    async def scenario():
        async with Engine(floods) as engine, running(engine, settings=settings) as gateway:
            loop = asyncio.get_running_loop()
            client = small_buffer_socket(gateway.port)
            await loop.sock_connect(client, ("127.0.0.1", gateway.port))
            await loop.sock_sendall(client, request_bytes(STREAM))
            while not gateway.router.ends():
                await asyncio.sleep(0.05)
                gateway.pass_time(6)
            assert gateway.router.ends() == ["cancelled"]
            await engine.closed.wait()
            client.close()

    play(scenario)


def test_every_split_of_a_request():
    whole = request_bytes(CHAT)

    async def scenario():
        async with Engine() as engine, running(engine) as gateway:
            reader, writer = await gateway.connect()
            for at in range(1, len(whole)):
                for part in (whole[:at], whole[at:]):
                    writer.write(part)
                    await asyncio.sleep(0)
                assert (await read_answer(reader)).body == WHOLE
            writer.close()
            assert all(seen.json == CHAT for seen in engine.seen)

    play(scenario, timeout_s=30)


def test_every_split_of_a_stream():
    wire = STREAM_HEAD + b"".join(map(chunk, TOKENS[:2])) + chunk(DONE) + b"0\r\n\r\n"

    async def scenario():
        cuts = iter(range(1, len(wire)))

        async def splits(peer, seen):
            at = next(cuts)
            await peer.send(wire[:at], wire[at:])

        async with Engine(splits) as engine, running(engine) as gateway:
            reader, writer = await gateway.connect()
            for _ in range(1, len(wire)):
                writer.write(request_bytes(STREAM))
                assert (await read_answer(reader)).body == b"".join(TOKENS[:2]) + DONE
            writer.close()
            assert set(gateway.router.ends()) == {"finished"}

    play(scenario, timeout_s=30)


def test_byte_by_byte():
    wire = STREAM_HEAD + b"".join(map(chunk, TOKENS[:2])) + chunk(DONE) + b"0\r\n\r\n"

    async def drips(peer, seen):
        await peer.send(*(wire[i : i + 1] for i in range(len(wire))))

    async def scenario():
        async with Engine(drips) as engine, running(engine) as gateway:
            got = await gateway.post(STREAM)
            assert got.body == b"".join(TOKENS[:2]) + DONE

    play(scenario)


def test_a_chunked_request_body_goes_on_with_its_length():
    async def scenario():
        async with Engine() as engine, running(engine) as gateway:
            reader, writer = await gateway.connect()
            body = json.dumps(CHAT).encode()
            head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: chunked\r\n\r\n"
            trailer = b"0\r\nAuthorization: Bearer smuggled\r\n\r\n"
            writer.write(head + chunk(body[:9]) + chunk(body[9:]) + trailer)
            assert (await read_answer(reader)).body == WHOLE
            writer.close()
            seen = engine.seen[0]
            assert seen.headers["content-length"] == str(len(body))
            assert "transfer-encoding" not in seen.headers
            assert "authorization" not in seen.headers

    play(scenario)


def test_expect_continue():
    async def scenario():
        async with Engine() as engine, running(engine) as gateway:
            reader, writer = await gateway.connect()
            head, body = request_bytes(CHAT, headers=("expect: 100-continue",)).split(b"\r\n\r\n")
            writer.write(head + b"\r\n\r\n")
            assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            writer.write(body)
            assert (await read_answer(reader)).body == WHOLE
            writer.close()
            assert "expect" not in engine.seen[0].headers

    play(scenario)


def test_expect_continue_of_too_much_is_refused_at_once():
    async def scenario():
        async with Engine() as engine, running(engine, settings=ProxySettings(limits=Limits(body_bytes=99))) as gateway:
            reader, writer = await gateway.connect()
            writer.write(
                b"POST /v1/completions HTTP/1.1\r\nhost: g\r\ncontent-length: 100\r\nexpect: 100-continue\r\n\r\n"
            )
            assert parse(await reader.read()).status == 413
            writer.close()

    play(scenario)


def test_pipelined_requests_of_both_kinds_are_answered_in_order():
    get = b"GET /v1/models HTTP/1.1\r\nhost: g\r\n\r\n"
    requests = (request_bytes(CHAT), get, request_bytes(STREAM), get, request_bytes(CHAT))

    async def scenario():
        async with Engine() as engine, running(engine) as gateway:
            for joined in (True, False):
                reader, writer = await gateway.connect()
                for part in [b"".join(requests)] if joined else requests:
                    writer.write(part)
                    await asyncio.sleep(0)
                data = await read_until(reader, lambda d: d.count(b"HTTP/1.1 200") == 5 and d.endswith(WHOLE))
                writer.close()
                bodies = [part.partition(b"\r\n\r\n")[2] for part in data.split(b"HTTP/1.1 200")[1:]]
                assert bodies[0] == bodies[4] == WHOLE
                assert json.loads(bodies[1]) == json.loads(bodies[3])
                assert DONE in bodies[2]

    play(scenario)


def test_a_flood_of_pipelined_requests_is_cut_off():
    async def scenario():
        async with Engine(silent) as engine, running(engine) as gateway:
            reader, writer = await gateway.connect()
            writer.write(request_bytes({"model": "tiny", "messages": []}) * 500)
            data = b""
            with suppress(ConnectionError):
                data = await reader.read()
            writer.close()
            assert parse(data).status == 400
            assert not engine.seen

    play(scenario)


def test_many_pipelined_errors_do_not_recurse():
    async def scenario():
        settings = ProxySettings(limits=Limits(pipelined_requests=100))
        async with Engine() as engine, running(engine, settings=settings) as gateway:
            reader, writer = await gateway.connect()
            writer.write(request_bytes({}, raw=b"{") * 1000)
            await read_until(reader, lambda data: data.count(b"HTTP/1.1 400") == 1000)
            writer.close()

    play(scenario)


BAD_HEADS = {
    "no host": b"POST /v1/completions HTTP/1.1\r\ncontent-length: 2\r\n\r\n{}",
    "two hosts": b"POST /v1/completions HTTP/1.1\r\nhost: a\r\nhost: b\r\ncontent-length: 2\r\n\r\n{}",
    "absolute form": b"POST http://evil/v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\n\r\n{}",
    "absolute form, another route": b"GET http://evil/health HTTP/1.1\r\nhost: a\r\n\r\n",
    "asterisk form": b"OPTIONS * HTTP/1.1\r\nhost: a\r\n\r\n",
    "connect": b"CONNECT a:80 HTTP/1.1\r\nhost: a\r\n\r\n",
    "upgrade": (
        b"POST /v1/completions HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: h2c\r\n"
        b"content-length: 2\r\n\r\n{}"
    ),
    "websocket": b"GET /health HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n",
    "length and chunked": (
        b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n"
    ),
    "chunked and length": (
        b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\ncontent-length: 2\r\n\r\n0\r\n\r\n"
    ),
    "two lengths": b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\n{}",
    "signed length": b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: +2\r\n\r\n{}",
    "list of lengths": b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 2, 2\r\n\r\n{}",
    "chunked is not last": (
        b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked, gzip\r\n\r\n0\r\n\r\n"
    ),
    "unknown encoding": b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ntransfer-encoding: xchunked\r\n\r\n0\r\n\r\n",
    "space before colon": b"POST /v1/completions HTTP/1.1\r\nhost : a\r\ncontent-length: 2\r\n\r\n{}",
    "folded header": b"POST /v1/completions HTTP/1.1\r\nhost: a\r\nx: 1\r\n content-length: 2\r\n\r\n{}",
    "bare line feeds": b"POST /v1/completions HTTP/1.1\nhost: a\ncontent-length: 2\n\n{}",
    "null in a header": b"POST /v1/completions HTTP/1.1\r\nhost: a\r\nx: \x00\r\ncontent-length: 2\r\n\r\n{}",
    "bad chunk size": b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n0x2\r\n{}\r\n",
    "not http": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "http/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
}


@pytest.mark.parametrize("head", BAD_HEADS.values(), ids=BAD_HEADS.keys())
def test_refused_heads(head):
    """400, closed, and nothing reaches an engine: neither the request nor what hides behind it."""

    async def scenario():
        async with Engine() as engine, running(engine) as gateway:
            reader, writer = await gateway.connect()
            writer.write(head + request_bytes(CHAT))
            got = parse(await reader.read())
            writer.close()
            assert got.status == 400
            assert set(got.error) == {"message", "type", "param", "code"}
            assert got.headers["connection"] == "close"
            assert not engine.seen

    play(scenario)


def test_a_bad_request_behind_a_running_answer_cuts_the_connection():
    """There is no place to say 400 in the middle of another answer."""

    async def scenario():
        async with Engine(endless) as engine, running(engine) as gateway:
            reader, writer = await gateway.connect()
            writer.write(request_bytes(STREAM))
            await read_until(reader, lambda data: token("a") in data)
            writer.write(b"nonsense\r\n\r\n")
            rest = b""
            with suppress(ConnectionError):
                rest = await reader.read()
            writer.close()
            assert b"400" not in rest
            await until(lambda: gateway.router.ends() == ["cancelled"])

    play(scenario)


@pytest.mark.parametrize("size", [70_000, 200_000])
@pytest.mark.parametrize("kind", ["one header", "many headers", "target", "unfinished"])
def test_large_heads_are_refused(size, kind):
    fill = {
        "one header": b"GET /health HTTP/1.1\r\nhost: a\r\nx: " + b"a" * size + b"\r\n\r\n",
        "many headers": b"GET /health HTTP/1.1\r\nhost: a\r\n" + b"x: aaaaaaaa\r\n" * (size // 9) + b"\r\n",
        "target": b"GET /" + b"a" * size + b" HTTP/1.1\r\nhost: a\r\n\r\n",
        "unfinished": b"GET /health HTTP/1.1\r\nhost: a\r\nx: " + b"a" * size,
    }[kind]

    async def scenario():
        async with Engine() as engine, running(engine) as gateway:
            reader, writer = await gateway.connect()
            writer.write(fill)
            data = b""
            try:
                while piece := await reader.read(65536):
                    data += piece
            except ConnectionError:
                pass
            writer.close()
            assert parse(data).status == 431

    play(scenario)


def test_large_bodies_are_refused_told_or_not():
    settings = ProxySettings(limits=Limits(body_bytes=1000))
    told = b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 1001\r\n\r\n"
    chunked = b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n" + chunk(b"a" * 1001)

    async def scenario():
        async with Engine() as engine, running(engine, settings=settings) as gateway:
            for data in (told, chunked, told.replace(b"/v1/completions", b"/health")):
                reader, writer = await gateway.connect()
                writer.write(data)
                assert parse(await reader.read()).status == 413
                writer.close()
            reader, writer = await gateway.connect()
            writer.write(chunked.replace(b"/v1/completions", b"/health"))
            with suppress(ConnectionError):  # the application was about to answer: no second answer, but the end
                assert await reader.read() == b""
            writer.close()
            assert not engine.seen

    play(scenario)


@pytest.mark.parametrize(
    ("sent", "after_s", "status"),
    [
        (b"POST /v1/comp", 10.5, 408),
        (b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 10\r\n\r\n{", 71, 408),
        (b"POST /nowhere HTTP/1.1\r\nhost: a\r\ncontent-length: 10\r\n\r\n{", 80, None),
        (b"", 76, None),
        (b"GET /health HTTP/1.1\r\nhost: a\r\n\r\n", 76, 200),
    ],
    ids=["head", "body", "body to the application", "nothing", "idle"],
)
def test_slow_clients_are_sent_away(sent, after_s, status):
    async def scenario():
        async with Engine() as engine, running(engine) as gateway:
            reader, writer = await gateway.connect()
            writer.write(sent)
            await asyncio.sleep(0.05)
            gateway.pass_time(after_s)
            data = await reader.read()
            writer.close()
            if status is not None:
                assert parse(data).status == status

    play(scenario)


def test_http_1_0_is_answered_without_chunks_and_closed():
    async def scenario():
        async with Engine() as engine, running(engine) as gateway:
            for fields, body in ((STREAM, b"".join(TOKENS) + DONE), (CHAT, WHOLE)):
                reader, writer = await gateway.connect()
                writer.write(request_bytes(fields).replace(b"HTTP/1.1", b"HTTP/1.0"))
                data = await reader.read()
                writer.close()
                assert b"transfer-encoding" not in data
                assert data.endswith(b"\r\n\r\n" + body)

    play(scenario)


def test_a_query_string_changes_nothing():
    async def scenario():
        async with Engine() as engine, running(engine) as gateway:
            assert (await gateway.post(CHAT, path="/v1/chat/completions?api-version=1")).body == WHOLE
            assert engine.seen[0].head.startswith("POST /v1/chat/completions HTTP/1.1")

    play(scenario)
