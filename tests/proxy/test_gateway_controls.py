"""Headers and fields that steer a request: what they do here, and that they go no further."""

import asyncio
import json
import threading

import pytest
from gateway_fakes import CHAT, DONE, TOKENS, WHOLE, Engine, answer, play, read_answer, request_bytes, running, until

from pools.escalation import Escalated
from pools.prefixes import prefix_of
from pools.request import Assigned
from pools.tokens import TokenCount
from proxy.settings import ProxySettings

STREAM = {**CHAT, "stream": True}


def routed(*headers, fields=CHAT, settings=None, **overrides):
    """The request as the router saw it, the answer, what the engine saw, and the metrics."""

    async def scenario():
        async with Engine() as engine, running(engine, settings=settings, **overrides) as gateway:
            got = await gateway.post(fields, headers=headers)
            gateway.metrics.settle()
            return gateway.router.routed[0], got, engine.seen[0], gateway.metrics

    return play(scenario)


def test_slo_headers():
    request, _, seen, metrics = routed("x-llm-d-slo-ttft-ms: 150", "x-slo-tpot-ms: 40.5", "x-slo-ttft-ms: 9")
    assert (request.slo.ttft_s, request.slo.tbt_s) == (0.150, 0.0405)
    assert not [name for name in seen.headers if "slo" in name]
    assert metrics.invalid.value(("ttft",)) == 0
    assert (routed()[0].slo.ttft_s, routed()[0].slo.tbt_s) == (0.25, 0.1)


@pytest.mark.parametrize("value", ["", "fast", "nan", "inf", "-5", "0", "1e300", "0.0001", "1" * 400])
def test_bad_slos_are_ignored_and_counted(value):
    request, got, _, metrics = routed(f"x-llm-d-slo-ttft-ms: {value}")
    assert (got.status, request.slo.ttft_s) == (200, 0.25)
    assert metrics.invalid.value(("ttft",)) == 1


@pytest.mark.parametrize("asked", [True, False])
def test_how_a_prompt_begins_is_told_where_it_counts(asked):
    long = {**CHAT, "messages": [{"role": "user", "content": "Why is the sky blue? " * 100}]}
    request, *_ = routed(fields=long, settings=ProxySettings(prefix_affinity=asked))
    assert (request.prefix is not None) == asked
    if asked:
        again = prefix_of(CHAT["model"], json.dumps({"stream": True, **long}).encode(), b'"messages"')
        assert request.prefix.blocks[:3] == again.blocks[:3]
    assert routed(settings=ProxySettings(prefix_affinity=asked))[0].prefix is None  # too short to matter


def test_tenant_and_objective():
    settings = ProxySettings(objectives={"batch": -5, "gold": 7})
    request, _, seen, metrics = routed(
        "x-gateway-inference-fairness-id: team a", "x-llm-d-inference-objective: gold", settings=settings
    )
    assert (request.tenant, request.priority) == ("team a", 7)
    assert not [name for name in seen.headers if "inference" in name]
    assert metrics.tenant_requests.value(("team a",)) == 1
    assert routed("x-gateway-inference-objective: batch", settings=settings)[0].priority == -5
    request, _, _, metrics = routed("x-llm-d-inference-objective: lead", settings=settings)
    assert (request.priority, metrics.invalid.value(("objective",))) == (0, 1)
    assert routed()[0].tenant == "default-flow"
    request, _, _, metrics = routed("x-llm-d-inference-fairness-id: " + "a" * 300)
    assert (request.tenant, metrics.invalid.value(("tenant",))) == ("default-flow", 1)


@pytest.mark.parametrize(
    ("asked", "told", "priority"),
    [("flex", "flex", -1), ("priority", "priority", 1), ("auto", "default", 0), ("default", "default", 0)],
)
@pytest.mark.parametrize("fields", [CHAT, STREAM], ids=["whole", "stream"])
def test_service_tier(asked, told, priority, fields):
    request, got, _, _ = routed(fields={**fields, "service_tier": asked})
    assert request.priority == priority
    first = got.json if fields is CHAT else json.loads(got.body.split(b"\n\n")[0][6:])
    assert first["service_tier"] == told


def test_an_unknown_tier_is_the_default_and_counted():
    request, got, _, metrics = routed(fields={**CHAT, "service_tier": "platinum"})
    assert (request.priority, got.json["service_tier"], metrics.invalid.value(("service_tier",))) == (0, "default", 1)
    assert "service_tier" not in routed()[1].json


def test_vllm_priority_has_one_polarity_here_and_is_not_passed_blindly():
    request, _, seen, _ = routed(fields={**CHAT, "priority": 3})
    assert request.priority == -3
    assert seen.json == CHAT
    ordered = ProxySettings(engine_orders_by_priority=True, objectives={"gold": 7})
    assert routed(fields={**CHAT, "priority": 3}, settings=ordered)[2].json == {**CHAT, "priority": 3}
    assert routed("x-llm-d-inference-objective: gold", settings=ordered)[2].json == {**CHAT, "priority": -7}
    assert routed(settings=ordered)[2].json == CHAT


def test_destinations_in_a_body_are_not_honoured():
    async def scenario():
        async with Engine() as engine, Engine() as elsewhere, running(engine) as gateway:
            url = f"http://127.0.0.1:{elsewhere.port}"
            body = {**CHAT, "api_base": url, "base_url": url}
            assert (await gateway.post(body)).status == 200
            assert engine.seen[0].json == body
            assert not elsewhere.seen

    play(scenario)


def test_headers_end_here_or_go_on():
    _, _, seen, _ = routed(
        "te: trailers",
        "keep-alive: 5",
        "proxy-authorization: Basic x",
        "accept-encoding: gzip",
        "connection: x-private",
        "x-private: 1",
        "x-public: 1",
        "traceparent: 00-1",
        "user-agent: me",
    )
    assert set(seen.headers) == {"host", "content-length", "x-public", "traceparent", "user-agent", "x-request-id"}


def test_response_headers_pass_but_for_those_of_the_hop_and_ours():
    async def tells(peer, seen):
        lines = ("x-engine: 1", "keep-alive: timeout=5", "x-dynamollm-pool: forged", "connection: x-hop", "x-hop: 1")
        await peer.send(answer(200, WHOLE, *lines, "date: today", "x-request-id: engine's"))

    async def scenario():
        async with Engine(tells) as engine, running(engine) as gateway:
            got = await gateway.post(CHAT, headers=("x-request-id: mine-1",))
            assert engine.seen[0].headers["x-request-id"] == "mine-1"
            assert got.headers == {
                "content-type": "application/json",
                "x-engine": "1",
                "date": "today",
                "content-length": str(len(WHOLE)),
                "x-request-id": "mine-1",
                "x-dynamollm-class": "SS",
                "x-dynamollm-input-tokens": "1",
                "x-dynamollm-pool": "LL",
                "x-dynamollm-instance": "i0",
                "connection": "close",
            }

    play(scenario)


@pytest.mark.parametrize("bad", ["a b", "x" * 129, "h\u00e9", ""])
def test_a_bad_request_id_is_replaced(bad):
    _, got, _, metrics = routed(f"x-request-id: {bad}")
    assert got.headers["x-request-id"].startswith("req-")
    assert metrics.invalid.value(("request-id",)) == 1


def test_the_class_follows_from_input_and_expected_output():
    assert routed(fields={**CHAT, "max_tokens": 500})[1].headers["x-dynamollm-class"] == "SL"
    assert routed(fields={**CHAT, "nvext": {"agent_hints": {"osl": 200}}})[1].headers["x-dynamollm-class"] == "SM"
    long = [{"role": "user", "content": "x" * 40_000}]
    request, got, _, _ = routed(fields={**CHAT, "messages": long})
    assert got.headers["x-dynamollm-class"] == "LS"
    assert request.slo.ttft_s == pytest.approx(2.0 * request.input_tokens / 8192)  # beyond the paper's longest
    tokens = {"model": "tiny", "prompt": [1] * 300, "max_tokens": 5}

    async def scenario():
        async with Engine() as engine, running(engine) as gateway:
            got = await gateway.post(tokens, path="/v1/completions")
            assert got.headers["x-dynamollm-class"] == "MS"
            assert gateway.router.routed[0].input_tokens == 300

    play(scenario)


def test_api_keys():
    settings = ProxySettings(api_keys=("key-1", "key-2"), engine_api_key="secret")

    async def scenario():
        async with Engine() as engine, running(engine, settings=settings) as gateway:
            for bad in (
                (),
                ("authorization: Bearer key-3",),
                ("authorization: key-1",),
                ("authorization: Basic key-1",),
            ):
                got = await gateway.post(CHAT, headers=bad)
                assert (got.status, got.error["code"]) == (401, "invalid_api_key")
            assert not engine.seen
            assert (await gateway.post(CHAT, headers=("authorization: bearer key-2",))).status == 200
            assert engine.seen[0].headers["authorization"] == "Bearer secret"

    play(scenario)
    own = ProxySettings(api_keys=("key-1",))
    assert "authorization" not in routed("authorization: Bearer key-1", settings=own)[2].headers
    assert routed("authorization: Bearer theirs")[2].headers["authorization"] == "Bearer theirs"


def test_a_key_is_checked_anew_when_the_headers_change():
    """What a connection's headers were read as is kept only while they stay the same."""
    settings = ProxySettings(api_keys=("key-1",))

    async def scenario():
        async with Engine() as engine, running(engine, settings=settings) as gateway:
            reader, writer = await gateway.connect()
            statuses = []
            for key in ("key-1", "key-1", "key-2", "key-1"):
                writer.write(request_bytes(CHAT, headers=(f"authorization: Bearer {key}",)))
                statuses.append((await read_answer(reader)).status)
            writer.close()
            assert statuses == [200, 200, 401, 200]

    play(scenario)


def test_models_known_unknown_missing():
    async def scenario():
        async with Engine() as engine, running(engine) as gateway:
            got = await gateway.post({**CHAT, "model": "other"})
            assert (got.status, got.error["type"], got.error["param"]) == (404, "NotFoundError", "model")
            nameless = {name: value for name, value in CHAT.items() if name != "model"}
            assert (await gateway.post(nameless)).status == 200
            gateway.directory.served["second"] = gateway.directory.served["tiny"]
            got = await gateway.post(nameless)
            assert (got.status, got.error["param"]) == (400, "body.model")

    play(scenario)


def test_energy_is_told_where_it_is_known():
    async def scenario():
        async with Engine() as engine, running(engine, energy_j=lambda outcome: 1.2345) as gateway:
            assert (await gateway.post(CHAT)).headers["x-dynamollm-energy-mj"] == "1234"

    play(scenario)


class ExactWhereUndecided:
    """Needs the text of every prompt; notes the threads it counted in."""

    def __init__(self, fails=False):
        self.threads = []
        self.fails = fails

    def count(self, model, size, read=None):
        text = read()
        self.threads.append(threading.current_thread())
        if self.fails:
            raise ValueError("no such token")
        return TokenCount(sum(len(part) for _, part in text), exact=True, undecided=False)


@pytest.mark.parametrize("long", [False, True])
def test_undecided_prompts_are_counted_exactly_long_ones_in_a_thread(long):
    text = "x" * (5000 if long else 50)

    async def scenario():
        counter = ExactWhereUndecided()
        async with Engine() as engine, running(engine, tokens=counter) as gateway:
            got = await gateway.post({**CHAT, "messages": [{"role": "user", "content": text}]})
            assert (got.status, gateway.router.routed[0].input_tokens) == (200, len(text))
            assert (counter.threads == [threading.main_thread()]) == (not long)
            assert len(counter.threads) == 1

    play(scenario)


def test_what_cannot_be_counted_is_estimated_and_left_to_the_engine():
    async def scenario():
        async with Engine() as engine, running(engine, tokens=ExactWhereUndecided(fails=True)) as gateway:
            body = {**CHAT, "messages": [{"role": "user", "content": "x" * 4000}]}
            assert (await gateway.post(body)).status == 200
            assert gateway.router.routed[0].input_tokens > 1000

    play(scenario)


def test_client_gone_while_its_prompt_is_counted():
    async def scenario():
        gate, counting = threading.Event(), threading.Event()

        class Slow:
            def count(self, model, size, read=None):
                read()
                counting.set()
                gate.wait(5)
                return TokenCount(1, exact=True, undecided=False)

        async with Engine() as engine, running(engine, tokens=Slow()) as gateway:
            _, writer = await gateway.connect()
            writer.write(request_bytes({**CHAT, "messages": [{"role": "user", "content": "x" * 4000}]}))
            await until(counting.is_set)
            writer.transport.abort()
            await asyncio.sleep(0.02)
            gate.set()
            await asyncio.sleep(0.02)
            assert not gateway.router.routed

    play(scenario)


def test_late_requests_follow_the_router_to_another_instance():
    async def silent(peer, seen):
        await peer.closed()

    async def scenario():
        async with Engine(silent) as slow, Engine() as quick, running(slow, quick) as gateway:
            waiting = asyncio.create_task(gateway.post(STREAM))
            await until(lambda: slow.seen)
            gateway.router.late = [Escalated(gateway.router.routed[0], "i0", Assigned("i1", "LL"))]
            gateway.pass_time(0)
            got = await waiting
            assert got.body == b"".join(TOKENS) + DONE
            assert got.headers["x-dynamollm-instance"] == "i1"
            await slow.closed.wait()
            assert gateway.router.ends() == ["finished"]

    play(scenario)


def test_predictors_see_a_bounded_number_of_outcomes_a_tick():
    learned = []

    async def scenario():
        settings = ProxySettings(learned_per_tick=3)
        async with Engine() as engine, running(engine, settings=settings, learners=(learned.append,)) as gateway:
            gateway.gateway._timer.cancel()
            for _ in range(5):
                await gateway.post(CHAT)
            assert (len(gateway.outcomes), len(learned)) == (5, 0)
            gateway.pass_time(0)
            assert learned == gateway.outcomes[:3]
            gateway.pass_time(0)
            assert len(learned) == 3

    play(scenario)
