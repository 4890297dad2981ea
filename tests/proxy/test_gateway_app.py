"""The application beside the relayed path: models, health, metrics, documentation, errors, shutdown."""

import asyncio
import json
import socket
from itertools import pairwise

import pytest
import uvicorn
from gateway_fakes import (
    CHAT,
    DONE,
    STREAM_HEAD,
    TOKENS,
    Clock,
    Engine,
    PlainDirectory,
    PlainRouter,
    Reading,
    chunk,
    parse,
    play,
    request_bytes,
    running,
    token,
    until,
)
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from pools.tokens import InputCounter, TokenEstimator
from proxy.metrics import OTHER, Counter, GatewayMetrics, Histogram
from proxy.serve import gateway_config, listen
from proxy.services import Address, GatewayServices
from proxy.settings import ProxySettings

STREAM = {**CHAT, "stream": True}


async def ask(gateway, method, path, *headers):
    reader, writer = await gateway.connect()
    lines = [f"{method} {path} HTTP/1.1", "host: g", "connection: close", *headers, "", ""]
    writer.write("\r\n".join(lines).encode())
    data = await reader.read()
    writer.close()
    if method == "HEAD":
        data = data.replace(b"content-length", b"x-length")
    return parse(data)


def test_models():
    async def scenario():
        async with Engine() as engine, running(engine, settings=ProxySettings(api_keys=("k",))) as gateway:
            key = "authorization: Bearer k"
            listed = await ask(gateway, "GET", "/v1/models", key)
            card = {"id": "tiny", "object": "model", "created": 1, "owned_by": "dynamollm", "max_model_len": 4096}
            assert listed.json == {"object": "list", "data": [card]}
            assert (await ask(gateway, "GET", "/v1/models/tiny", key)).json == card
            got = await ask(gateway, "GET", "/v1/models/other", key)
            assert (got.status, got.error["type"]) == (404, "NotFoundError")
            assert (await ask(gateway, "GET", "/v1/models")).status == 401
            assert (await ask(gateway, "GET", "/health")).status == 200

    play(scenario)


def test_health_is_whether_a_request_could_be_served():
    async def scenario():
        async with Engine() as engine, running(engine) as gateway:
            assert [(await ask(gateway, "GET", path)).status for path in ("/health", "/ready")] == [200, 200]
            gateway.directory.servable = lambda model: model == "tiny"
            gateway.directory.served["second"] = gateway.directory.served["tiny"]
            assert [(await ask(gateway, "GET", path)).status for path in ("/health", "/ready")] == [200, 503]
            gateway.directory.servable = lambda model: False
            got = await ask(gateway, "GET", "/health")
            assert (got.status, got.headers["x-llm-d-request-dropped-reason"]) == (503, "rejected-no-endpoints")
            gateway.gateway.drain()
            got = await ask(gateway, "GET", "/health")
            assert (got.status, got.headers["x-llm-d-request-dropped-reason"]) == (503, "rejected-shutting-down")
            got = await gateway.post(CHAT)
            assert (got.status, got.headers["x-llm-d-request-dropped-reason"]) == (503, "rejected-shutting-down")

    play(scenario)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nowhere", 404),
        ("GET", "/v1/chat/completions", 405),
        ("HEAD", "/v1/chat/completions", 405),
        ("HEAD", "/v1/completions", 405),
        ("DELETE", "/health", 405),
        ("POST", "/v1/chat/completions/", 404),
    ],
)
def test_errors_have_one_shape(method, path, status):
    async def scenario():
        async with Engine() as engine, running(engine) as gateway:
            got = await ask(gateway, method, path)
            if got.status == 307:
                return  # a slash too many
            assert got.status == status
            if method != "HEAD":
                assert set(got.error) == {"message", "type", "param", "code"}
            assert not engine.seen

    play(scenario)


def test_a_fault_in_the_application_has_the_shape_too():
    async def scenario():
        async with Engine() as engine, running(engine) as gateway:

            def broken():
                raise RuntimeError("a bug")

            gateway.directory.models = broken
            got = await ask(gateway, "GET", "/v1/models")
            assert (got.status, got.error["type"]) == (500, "Internal Server Error")
            assert "bug" not in got.body.decode()

    play(scenario)


def test_documentation_lists_the_relayed_routes():
    async def scenario():
        async with Engine() as engine, running(engine) as gateway:
            document = (await ask(gateway, "GET", "/openapi.json")).json
            for path, required in (("/v1/chat/completions", "messages"), ("/v1/completions", "prompt")):
                operation = document["paths"][path]["post"]
                schema = operation["requestBody"]["content"]["application/json"]["schema"]
                assert schema["required"] == [required]
                assert {"200", "400", "404", "429", "503"} <= set(operation["responses"])
                assert "x-llm-d-slo-ttft-ms" in [parameter["name"] for parameter in operation["parameters"]]
            assert (await ask(gateway, "GET", "/docs")).status == 200

    play(scenario)


def test_metrics_are_what_happened():
    async def scenario():
        async with Engine() as engine, running(engine) as gateway:
            await gateway.post(CHAT)
            await gateway.post(STREAM)
            await gateway.post(CHAT, raw=b"{")
            gateway.pass_time(0)
            text = (await ask(gateway, "GET", "/metrics")).body.decode()
            samples = {
                (sample.name, frozenset(sample.labels.items())): sample.value
                for family in text_string_to_metric_families(text)
                for sample in family.samples
            }
            labels = {"gen_ai_request_model": "tiny", "request_class": "SS", "pool": "LL"}

            def value(name, **more):
                return samples[name, frozenset({**labels, **more}.items())]

            assert value("dynamollm_requests_total", status="200") == 2
            assert value("gen_ai_server_time_to_first_token_seconds_count") == 1
            assert value("gen_ai_server_time_per_output_token_seconds_count") == 1
            assert value("gen_ai_server_request_duration_seconds_bucket", le="+Inf") == 2
            assert value("gen_ai_client_token_usage_sum", gen_ai_token_type="output") == 6
            assert value("dynamollm_slo_requests_total", met="true") == 1
            assert samples["dynamollm_refused_requests_total", frozenset({("status", "400")})] == 1
            assert samples["dynamollm_waiting_requests", frozenset()] == 0
            assert not [name for name, _ in samples if name.startswith("vllm")]

    play(scenario)


def test_a_page_is_made_in_parts_that_are_of_one_moment():
    metrics = GatewayMetrics()
    metrics.refused.add(("400",))
    metrics.set_gauge("lit", "A gauge", 1.0)
    parts = metrics.parts()
    page = next(parts)
    metrics.refused.add(("400",))
    metrics.refused.add(("429",))
    metrics.set_gauge("new", "Another", 1.0)  # a dictionary that is gone through must not change
    page += b"".join(parts)
    assert b'dynamollm_refused_requests_total{status="400"} 1.0' in page
    assert b"lit 1.0" in page
    assert b"429" not in page
    assert b"new" not in page
    now = b"".join(metrics.parts())
    assert b'dynamollm_refused_requests_total{status="429"} 1.0' in now
    assert now == generate_latest(metrics.registry)


def test_a_scrape_does_not_hold_up_the_loop():
    async def scenario():
        async with Engine() as engine, running(engine) as gateway:
            turns = []
            metrics = gateway.gateway.services.metrics
            metrics.answer = lambda: (turns.append(len(turns)) or b"# %d\n" % n for n in range(5))
            others = asyncio.create_task(note(turns))
            text = (await ask(gateway, "GET", "/metrics")).body.decode()
            others.cancel()
            assert text == "# 0\n# 1\n# 2\n# 3\n# 4\n"
            parts = [place for place, turn in enumerate(turns) if turn != "other"]
            assert all(after > before + 1 for before, after in pairwise(parts))

    async def note(turns):
        while True:
            turns.append("other")
            await asyncio.sleep(0)

    play(scenario)


def test_label_sets_are_bounded():
    counter = Counter("c", "", ("tenant",), limit=3)
    histogram = Histogram("h", "", ("tenant",), (1.0, 2.0), limit=3)
    for n in range(10):
        counter.add((f"t{n}",))
        histogram.observe((f"t{n}",), 1.5)
    assert [counter.value((name,)) for name in ("t0", "t2", "t3", OTHER)] == [1, 1, 0, 7]
    assert [histogram.count((name,)) for name in ("t0", "t3", OTHER)] == [1, 0, 7]


def test_histograms_cumulate():
    histogram = Histogram("h", "", (), (1.0, 2.0))
    histogram.observe((), 1.0)
    histogram.observe_gaps((), (10.0, 10.5, 12.0, 15.0))
    samples = {s.labels.get("le", s.name): s.value for s in histogram.collect().samples}
    assert samples == {"1.0": 2, "2.0": 3, "+Inf": 4, "h_count": 4, "h_sum": 6.0}


def test_another_server_is_told_apart():
    """The relayed routes answer 501 where the gateway's protocol does not run."""

    async def scenario():
        async with Engine() as engine, running(engine) as gateway:
            sent = []

            async def receive():
                return {"type": "http.request", "body": b"{}", "more_body": False}

            async def send(message):
                sent.append(message)

            path = "/v1/chat/completions"
            scope = {
                "type": "http",
                "method": "POST",
                "path": path,
                "raw_path": path.encode(),
                "headers": [],
                "query_string": b"",
                "root_path": "",
                "http_version": "1.1",
                "scheme": "http",
            }
            await gateway.app(scope, receive, send)
            assert sent[0]["status"] == 501
            assert "dynamollm serve" in json.loads(sent[1]["body"])["error"]["message"]

    play(scenario)


def test_what_would_wait_while_draining_is_told_so():
    """An instance fails a request while the gateway drains, and the router would queue it."""
    gate = asyncio.Event()

    async def fails(peer, seen):
        await gate.wait()
        peer.reset()

    async def scenario():
        async with Engine(fails) as engine, running(engine, engine) as gateway:
            waiting = asyncio.create_task(gateway.post(CHAT))
            await until(lambda: engine.seen)
            gateway.gateway.drain()
            gateway.gateway.drain()
            gateway.router.capacity = 0
            gate.set()
            got = await waiting
            assert got.headers["x-llm-d-request-dropped-reason"] == "rejected-shutting-down"
            assert gateway.router.ends() == ["failed", "cancelled"]

    play(scenario)


# Shutdown, with uvicorn's own server


def services_over(engine):
    return GatewayServices(
        router=PlainRouter("i0"),
        directory=PlainDirectory({"i0": Address.of_url(f"http://127.0.0.1:{engine.port}")}),
        tokens=InputCounter(TokenEstimator(), {}),
        lengths=_HundredTokens(),
        metrics=GatewayMetrics(),
        clock=Clock(),
    )


class _HundredTokens:
    def output_tokens(self, fields, model, input_tokens, tenant):
        return 100.0


async def serving(services, grace_s):
    """uvicorn's server over a listening socket; its port."""
    listener = listen("127.0.0.1", 0)
    server = uvicorn.Server(gateway_config(services, grace_s))
    server.install_signal_handlers = lambda: None
    task = asyncio.create_task(server.serve(sockets=[listener]))
    await until(lambda: server.started)
    return server, task, listener.getsockname()[1]


async def begin_stream(port):
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request_bytes(STREAM))
    reading = Reading()
    while token("a") not in reading.body:
        reading.feed(await reader.read(65536))
    return reader, writer, reading


async def read_on(reader, reading):
    while data := await reader.read(65536):
        reading.feed(data)


def test_streams_end_well_within_the_grace():
    gate = asyncio.Event()

    async def waits(peer, seen):
        await peer.send(STREAM_HEAD, chunk(token("a")))
        await gate.wait()
        await peer.send(*map(chunk, TOKENS), chunk(DONE) + b"0\r\n\r\n")

    async def scenario():
        async with Engine(waits) as engine:
            server, task, port = await serving(services_over(engine), grace_s=5)
            reader, writer, reading = await begin_stream(port)
            _, idle = await asyncio.open_connection("127.0.0.1", port)
            server.should_exit = True
            await until(lambda: server.servers[0].sockets == () or not server.servers[0].is_serving())
            with pytest.raises(ConnectionError):
                await asyncio.open_connection("127.0.0.1", port)
            gate.set()
            await read_on(reader, reading)
            await task
            assert reading.complete
            assert reading.body.endswith(DONE)
            assert b"error" not in reading.body
            for one in (writer, idle):
                one.close()

    play(scenario)


def test_streams_still_open_after_the_grace_get_an_error_event():
    async def endless(peer, seen):
        await peer.send(STREAM_HEAD, chunk(token("a")))
        await peer.closed()

    async def scenario():
        async with Engine(endless) as engine:
            services = services_over(engine)
            server, task, port = await serving(services, grace_s=1)
            reader, writer, reading = await begin_stream(port)
            services.router.capacity = 0
            queued_reader, queued = await asyncio.open_connection("127.0.0.1", port)
            queued.write(request_bytes(CHAT))
            await until(lambda: services.router.queue)
            server.should_exit = True
            got = parse(await queued_reader.read())  # at once: it has not begun
            assert (got.status, got.headers["x-llm-d-request-dropped-reason"]) == (503, "rejected-shutting-down")
            assert not task.done()
            await read_on(reader, reading)
            await task
            assert reading.complete
            assert b'"code":503' in reading.body
            assert engine.closed.is_set()
            for one in (writer, queued):
                one.close()

    play(scenario)


def test_processes_can_share_a_port():
    with listen("127.0.0.1", 0, shared=True) as first, listen(*first.getsockname(), shared=True) as second:
        assert first.getsockname() == second.getsockname()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(OSError, match="in use"):
            listen("127.0.0.1", taken.getsockname()[1])
