"""The load of an engine, read from its metrics page over a real transport."""

import asyncio

import httpx
import pytest

from dynamollm.adapters.engine_probe import HttpEngineProbe, parse_load
from pools.view import EngineLoad

PAGE = b"""# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="a{b}"} 3.0
vllm:num_requests_waiting{engine="0",model_name="m"} 2.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="m"} 9.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 2.5e-1
vllm:engine_sleep_state{engine="0",model_name="m",sleep_state="awake"} 1.0
vllm:engine_sleep_state{engine="0",model_name="m",sleep_state="discard_all"} 0.0
"""


def test_the_four_gauges_are_found():
    page = PAGE.replace(b"a{b}", b"m")
    assert parse_load(page, "http://e") == EngineLoad(running=3, waiting=2, kv_cache_usage=0.25, awake=True)


def test_an_engine_asleep_says_so_and_one_without_the_gauge_is_awake():
    page = PAGE.replace(b"a{b}", b"m")
    assert not parse_load(page.replace(b'"awake"} 1.0', b'"awake"} 0.0'), "http://e").awake
    lines = [line for line in page.splitlines() if b"sleep_state" not in line]
    assert parse_load(b"\n".join(lines), "http://e").awake


def test_engines_behind_one_server_add_up():
    page = PAGE.replace(b"a{b}", b"m")
    load = parse_load(page + page.replace(b'engine="0"', b'engine="1"'), "http://e")
    assert (load.running, load.waiting, load.kv_cache_usage) == (6, 4, 0.25)


def test_what_is_no_vllm_is_refused_with_its_url():
    with pytest.raises(OSError, match="http://e/metrics: no vllm:num_requests_running"):
        parse_load(b"up 1\n", "http://e")


def serve(handler) -> HttpEngineProbe:
    probe = HttpEngineProbe()
    probe._client = httpx.AsyncClient(transport=httpx.MockTransport(handler))
    return probe


def test_a_page_is_fetched_from_the_engine():
    asked = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(str(request.url))
        return httpx.Response(200, content=PAGE.replace(b"a{b}", b"m"))

    assert asyncio.run(serve(answer).load("http://e:1")).running == 3
    assert asked == ["http://e:1/metrics"]


def test_an_engine_that_does_not_answer_is_an_os_error():
    def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    with pytest.raises(OSError, match="refused"):
        asyncio.run(serve(refuse).load("http://e:1"))
    with pytest.raises(OSError, match="status 500"):
        asyncio.run(serve(lambda request: httpx.Response(500)).load("http://e:1"))
