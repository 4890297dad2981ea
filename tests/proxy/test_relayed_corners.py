"""Corners of the relayed path that sockets seldom show: what is remembered of a head, and events that come too late."""

import json

import pytest
from gateway_fakes import (
    CHAT,
    DONE,
    STREAM_HEAD,
    TOKENS,
    USAGE_EVENT,
    WHOLE,
    Engine,
    answer,
    chunk,
    like_vllm,
    parse,
    play,
    read_answer,
    request_bytes,
    running,
    until,
)
from test_relay import relay_of
from test_upstream import connected, inside_loop

from pools.classes import RequestClass, Slo
from pools.escalation import Escalated
from pools.request import Assigned, Queued, Rejected, RejectReason, Request
from proxy.gateway import TICK_S
from proxy.heads import InstanceHead
from proxy.metrics import OTHER, GatewayMetrics
from proxy.outcome import Outcome
from proxy.relay import Failure, State
from proxy.settings import Deadlines, ProxySettings
from proxy.upstream import Phase

BODY = json.dumps(CHAT).encode()
LATE = Rejected(RejectReason.TTL_EXPIRED, contended=True, retry_after_s=1.0)
STREAM = {**CHAT, "stream": True}


def post(*lines, method="POST", version="1.1", length="content-length", body=BODY):
    """A request with its length spelled as told, and where told: ``LENGTH`` among the lines, else last."""
    told = f"{length}: {len(body)}"
    lines = [told if line == "LENGTH" else line for line in lines]
    lines = lines if told in lines else [*lines, told]
    return "\r\n".join([f"{method} /v1/chat/completions HTTP/{version}", *lines, "", ""]).encode() + body


async def asked(reader, writer, request):
    writer.write(request)
    return await read_answer(reader)


def on_one_connection(*steps, **settings):
    """Send each request on the same connection; the statuses that came."""
    statuses = []

    async def scenario():
        async with Engine() as engine, running(engine, settings=ProxySettings(**settings)) as gateway:
            reader, writer = await gateway.connect()
            for request in steps:
                got = await asked(reader, writer, request)
                statuses.append(got.status)
                if got.status == 200 and request.startswith(b"POST"):
                    assert got.body == WHOLE
            writer.close()

    play(scenario)
    return statuses


# --- what is remembered of a request's head -------------------------------------------------------------------------


def test_a_key_counts_for_the_requests_it_came_with():
    right, wrong = post("host: g", "authorization: Bearer k"), post("host: g", "authorization: Bearer x")
    assert on_one_connection(right, right, wrong, right, post("host: g"), right, api_keys=("k",)) == [
        *(200, 200, 401, 200, 401, 200),
    ]


def test_a_first_request_without_headers_has_no_key():
    assert on_one_connection(b"POST /v1/chat/completions HTTP/1.0\r\n\r\n", api_keys=("k",)) == [401]


@pytest.mark.parametrize("length", ["Content-Length", "CONTENT-LENGTH", "content-length"])
def test_the_length_may_stand_anywhere_and_be_spelled_anyhow(length):
    longer = json.dumps({**CHAT, "user": "x" * 500}).encode()
    first, last = post("LENGTH", "host: g", length=length), post("host: g", "LENGTH", length=length)
    other = post("host: g", "LENGTH", "x-a: 1", body=longer)
    assert on_one_connection(first, last, other, first, other, last) == [200] * 6


def test_another_method_or_target_is_another_route():
    health = b"GET /health HTTP/1.1\r\nhost: g\r\n\r\n"
    got = on_one_connection(
        post("host: g"),
        post("host: g", method="PUT"),
        post("host: g"),
        health,
        post("host: g"),
        b"GET /v1/chat/completions HTTP/1.1\r\nhost: g\r\n\r\n",
        post("host: g"),
    )
    assert got == [200, 405, 200, 200, 200, 405, 200]


def test_head_is_no_chat():
    async def scenario():
        async with Engine() as engine, running(engine) as gateway:
            for path in ("/health", "/v1/chat/completions"):
                reader, writer = await gateway.connect()
                writer.write(f"HEAD {path} HTTP/1.1\r\nhost: g\r\nconnection: close\r\n\r\n".encode())
                head, _, body = (await reader.read()).partition(b"\r\n\r\n")
                writer.close()
                assert head.split(b" ")[1] in (b"200", b"405")
                assert body == b""
            assert not engine.seen

    play(scenario)


def test_trailers_are_not_kept():
    async def scenario():
        async with Engine() as engine, running(engine) as gateway:
            reader, writer = await gateway.connect()
            head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: g\r\ntransfer-encoding: chunked\r\n\r\n"
            trailers = b"".join(b"x-%d: %d\r\n" % (n, n) for n in range(1000))
            assert (await asked(reader, writer, head + chunk(BODY) + b"0\r\n" + trailers + b"\r\n")).body == WHOLE
            assert (await asked(reader, writer, post("host: g"))).body == WHOLE
            writer.close()
            assert not any(name.startswith("x-1") for seen in engine.seen for name in seen.headers)

    play(scenario)


@pytest.mark.parametrize("fields", [CHAT, STREAM])
def test_two_requests_split_at_every_byte_boundary(fields):
    """What is remembered of the first head must not depend on how the second came."""
    requests = request_bytes({**fields, "user": "a"}) + request_bytes({**fields, "user": "bc"})

    async def scenario():
        async with Engine() as engine, running(engine) as gateway:
            for cut in range(1, len(requests)):
                reader, writer = await gateway.connect()
                before = len(engine.seen)
                writer.write(requests[:cut])
                await until(lambda before=before: gateway.gateway._connections and len(engine.seen) >= before)
                writer.write(requests[cut:])
                assert [(await read_answer(reader)).status for _ in range(2)] == [200, 200]
                writer.close()
                users = [seen.json["user"] for seen in engine.seen[before:]]
                assert users == ["a", "bc"]

    play(scenario, timeout_s=60.0)


def test_a_pipelined_request_is_told_to_continue_when_its_turn_comes():
    async def scenario():
        async with Engine() as engine, running(engine) as gateway:
            reader, writer = await gateway.connect()
            head, body = request_bytes(CHAT, headers=("expect: 100-continue",)).split(b"\r\n\r\n")
            writer.write(request_bytes(CHAT) + head + b"\r\n\r\n")
            assert WHOLE in await reader.readuntil(b"HTTP/1.1 100 Continue\r\n\r\n")
            assert (await asked(reader, writer, body)).body == WHOLE
            # and one whose body is not here yet, and that did not ask
            head, body = request_bytes(CHAT).split(b"\r\n\r\n")
            writer.write(request_bytes(CHAT) + head + b"\r\n\r\n")
            assert (await read_answer(reader)).body == WHOLE
            assert (await asked(reader, writer, body)).body == WHOLE
            writer.close()
            assert len(engine.seen) == 4

    play(scenario)


# --- a client's connection ------------------------------------------------------------------------------------------


def test_a_client_that_stalls_between_answers_pauses_nobody():
    async def scenario():
        async with Engine() as engine, running(engine) as gateway:
            reader, writer = await gateway.connect()
            assert (await asked(reader, writer, post("host: g"))).status == 200
            (connection,) = gateway.gateway._connections
            connection.pause_writing()
            connection.resume_writing()
            assert (await asked(reader, writer, post("host: g"))).status == 200
            writer.close()

    play(scenario)


def test_an_answer_that_ends_after_its_client_left_moves_nothing_on():
    async def scenario():
        async with Engine() as engine, running(engine) as gateway:
            reader, writer = await gateway.connect()
            writer.write(post("host: g"))
            (connection,) = gateway.gateway._connections or [None]
            await until(lambda: gateway.gateway._connections)
            (connection,) = gateway.gateway._connections
            await until(lambda: connection.cycle is not None)
            exchange = connection.cycle
            await read_answer(reader)
            total = connection.server_state.total_requests
            connection.finished(exchange)
            assert (exchange.response_complete, connection.server_state.total_requests) == (True, total)
            writer.close()

    play(scenario)


def test_of_many_connections_each_is_looked_at_in_time():
    async def scenario():
        deadlines = ProxySettings(deadlines=Deadlines(keep_alive_s=5.0))
        async with Engine() as engine, running(engine, settings=deadlines) as gateway:
            gateway.gateway._timer.cancel()  # no tick but ours
            clients = [await gateway.connect() for _ in range(150)]
            await until(lambda: len(gateway.gateway._connections) == len(clients))
            gateway.pass_time(0.0)
            gateway.gateway._unchecked[-1].transport.abort()  # gone before its turn
            await until(lambda: len(gateway.gateway._connections) == len(clients) - 1)
            gateway.pass_time(6.0)
            await until(lambda: len(gateway.gateway._connections) < len(clients) - 1)
            assert gateway.gateway._connections  # not all at once
            for _ in range(int(1 / TICK_S)):
                gateway.pass_time(0.0)
            await until(lambda: not gateway.gateway._connections)
            for _, writer in clients:
                writer.close()

    play(scenario)


# --- events that come too late --------------------------------------------------------------------------------------


def test_a_relay_that_is_done_is_not_moved_by_anything():
    relay, client, _, router, outcomes = relay_of(CHAT)
    relay.start(0.0)
    relay.head(InstanceHead(200, ()))
    relay.body(WHOLE, 1.0)
    relay.end(1.0)
    written, told = client.written, list(router.told)
    relay.decision(Assigned("i1", "LL"), 2.0)
    relay.moved(LATE, 2.0)
    relay.client_gone(2.0)
    relay.shutdown(2.0)
    relay.head(InstanceHead(200, ()))
    relay.body(b"more", 2.0)
    relay.end(2.0)
    relay.broken(Failure.BROKEN, 2.0)
    relay.check_deadlines(1e6)
    assert (relay.state, client.written, router.told, len(outcomes)) == (State.DONE, written, told, 1)


def test_only_one_that_waits_takes_a_decision_and_only_one_unanswered_moves():
    relay, _, network, _, _ = relay_of(STREAM, Queued(1))
    relay.start(0.0)
    relay.decision(Assigned("i2", "LL"), 1.0)
    relay.decision(Assigned("i1", "LL"), 1.0)
    assert network.sent_to == ["i2"]
    relay.head(InstanceHead(200, ((b"content-type", b"text/event-stream"),)))
    relay.body(TOKENS[0], 2.0)
    relay.moved(Assigned("i1", "LL"), 2.0)
    assert (relay.state, network.sent_to) == (State.RELAYING, ["i2"])


def test_a_whole_answer_longer_than_is_held_passes_as_it_comes():
    relay, client, _, _, _ = relay_of(CHAT)
    relay.start(0.0)
    relay.head(InstanceHead(200, ()))
    piece = b"x" * (2**20 + 1)
    for _ in range(2):
        relay.body(piece, 1.0)
    relay.end(1.0)
    assert parse(client.written).body == 2 * piece


@pytest.mark.parametrize("metered", [True, False])
def test_a_stream_that_asks_for_its_energy_is_told_it_where_it_is_known(metered):
    asked_for = []

    def energy_j(outcome):
        asked_for.append(outcome.completion_tokens)
        return 1.5

    fields = {**STREAM, "stream_options": {"include_usage": True, "include_energy": True}}
    relay, client, _, _, outcomes = relay_of(fields, energy_j=energy_j if metered else None)
    relay.start(0.0)
    relay.head(InstanceHead(200, ((b"content-type", b"text/event-stream"),)))
    relay.body(TOKENS[0], 1.0)
    relay.body(USAGE_EVENT, 2.0)
    relay.body(DONE, 2.0)
    relay.end(2.0)
    assert (b'"energy_mj":1500' in client.written) is metered
    assert asked_for == ([3] if metered else [])
    assert outcomes[0].completion_tokens == 3


def test_released_and_escalated_requests_may_be_gone():
    def gone(name):
        return Request(name, "tiny", 0.0, 1, 1.0, RequestClass.LL, Slo(1.0, 1.0))

    async def scenario():
        async with Engine() as engine, running(engine) as gateway:
            gateway.router.late.append(Escalated(gone("a"), "i0", LATE))
            gateway.router.expired.append(gone("b"))
            gateway.gateway._waiting += 1
            gateway.pass_time(0.0)
            gateway.gateway._waiting -= 1
            assert (await gateway.post(CHAT)).body == WHOLE

    play(scenario)


def test_a_gateway_that_never_began_to_tick_can_stop():
    async def scenario():
        async with Engine(like_vllm) as engine, running(engine) as gateway:
            gateway.gateway._timer.cancel()
            gateway.gateway._timer = None
            reader, writer = await gateway.connect()
            assert (await asked(reader, writer, post("host: g"))).status == 200
            (connection,) = gateway.gateway._connections
            connection.stop = lambda now_s: None  # a client whose connection does not close
            await gateway.gateway.stop()
            writer.close()

    play(scenario)


# --- an instance's connection ---------------------------------------------------------------------------------------


@inside_loop
def test_what_is_remembered_of_an_answers_head_is_not_its_length():
    pool, connection, listener, _ = connected()
    spelled = answer(200, WHOLE).replace(b"content-length", b"Content-Length")
    before = b"HTTP/1.1 200 X\r\ncontent-length: 2\r\nx: y\r\ncontent-type: application/json\r\n\r\n{}"
    chunked = b"HTTP/1.1 200 X\r\ntransfer-encoding: chunked\r\n\r\n" + chunk(WHOLE) + b"0\r\n\r\n"
    expected = []
    for given, body in (
        (answer(200, WHOLE), WHOLE),
        (spelled, WHOLE),
        (before, b"{}"),
        (chunked, WHOLE),
        (spelled, WHOLE),
    ):
        connection.data_received(given)
        expected += [("head", 200), ("body", body), ("end",)]
        assert listener.heard == expected
        assert connection.phase is Phase.IDLE
        assert pool.send(connection._address, b"request", listener) is connection


@inside_loop
def test_an_interim_answer_in_a_segment_of_its_own():
    _, connection, listener, _ = connected()
    connection.data_received(b"HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n")
    connection.data_received(b"HTTP/1.1 100 Continue\r\n\r\n" + STREAM_HEAD)
    connection.data_received(chunk(TOKENS[0]) + chunk(TOKENS[1])[:9])
    connection.data_received(chunk(TOKENS[1])[9:] + b"0\r\n\r\n")
    heard = b"".join(item[1] for item in listener.heard if item[0] == "body")
    assert ([item[0] for item in listener.heard].count("head"), heard) == (1, TOKENS[0] + TOKENS[1])


@inside_loop
def test_a_failure_nobody_waits_for_closes_only():
    _, connection, listener, transport = connected()
    connection._relay = None
    connection._fail(Failure.BROKEN)
    assert (listener.heard, transport.closing, connection.phase) == ([], True, Phase.CLOSED)


# --- metrics --------------------------------------------------------------------------------------------------------


def test_counts_of_many_models_and_tenants_merge_into_others():
    metrics = GatewayMetrics(label_limit=3)
    for n in range(10):
        request = Request(f"r{n}", f"m{n}", 0.0, 1, 1.0, RequestClass.SS, Slo(1.0, 1.0), tenant=f"t{n}")
        for status in (200, 502):
            metrics.count(Outcome(request, None, status, "i", "p", 2.0, None, 5, 7, status == 502))
    metrics.settle()
    known = ("m0", "SS", "p")
    assert [metrics.requests.value((*known, status)) for status in ("200", "502")] == [1, 1]
    assert (metrics.duration.count(known), metrics.duration.count((OTHER,) * 3)) == (2, 14)
    assert (metrics.tenant_requests.value(("t1",)), metrics.tenant_requests.value((OTHER,))) == (2, 14)
    assert metrics.tenant_tokens.value((OTHER, OTHER)) + metrics.tenant_tokens.value(("t0", "input")) > 0
    assert metrics.cancelled.value((OTHER,) * 3) == 7
    total = sum(s.value for f in metrics.collect() for s in f.samples if s.name == "dynamollm_requests_total")
    assert total == 20
