"""Engines that refuse, die and stop under load: what their clients see, and what the others do not."""

import asyncio
import contextlib
import os
import signal
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from conftest import ENVIRONMENT
from vllm_cluster import LONG, QUEUED, SEQUENCES, SHORT, START_S, eventually, refuses_when_full

from pools.drivers.vllm_http import VllmServer

STREAMS = 12  # half of them of each pool
TOKENS = 900  # of each: it lasts until they are all seen to run, on a busy machine too


@dataclass
class Seen:
    """What one streaming client saw."""

    status: int
    instance: str
    tokens: int | None  # by usage; None where the stream has none
    error: dict[str, object] | None
    done: bool


async def stream(client: httpx.AsyncClient, url: str, body: dict[str, object]) -> Seen:
    body = {**body, "stream": True, "stream_options": {"include_usage": True}}
    seen = Seen(0, "", None, None, False)
    async with client.stream("POST", f"{url}/v1/chat/completions", json=body) as answer:
        seen.status = answer.status_code
        seen.instance = answer.headers.get("x-dynamollm-instance", "")
        async for line in answer.aiter_lines():
            if line == "data: [DONE]":
                seen.done = True
            elif line.startswith("data: "):
                event = httpx.Response(200, content=line.removeprefix("data: ")).json()
                seen.error = event.get("error", seen.error)
                seen.tokens = (event.get("usage") or {}).get("completion_tokens", seen.tokens)
    return seen


def together(cluster, count, tokens, during=None, lost=False) -> list[Seen]:
    """So many streams side by side, short and long prompts in turn, and something that happens meanwhile.

    Where they may be ``lost`` with the gateway, one that was cut off is None.
    """

    async def play():
        limits = httpx.Limits(max_connections=200)
        async with httpx.AsyncClient(timeout=120, limits=limits, trust_env=False) as client:
            bodies = [cluster.body(LONG if number % 2 else SHORT, max_tokens=tokens) for number in range(count)]
            streams = [asyncio.create_task(stream(client, cluster.url, body)) for body in bodies]
            if during is not None:
                await asyncio.to_thread(during)
            seen = await asyncio.gather(*streams, return_exceptions=lost)
            return [None if isinstance(s, httpx.HTTPError) else s for s in seen]

    return asyncio.run(play())


def all_run(*engines) -> None:
    """Wait until each engine runs its half of the streams."""
    seen = []

    def halves():
        seen[:] = [(engine.running, engine.waiting) for engine in engines]
        return all(running == STREAMS // 2 for running, _ in seen)

    try:
        eventually(halves, "each engine runs its half")
    except AssertionError as error:
        raise AssertionError(f"{error}; running, waiting: {seen}") from None


def finished(seen: Seen, tokens: int) -> bool:
    return (seen.status, seen.tokens, seen.error, seen.done) == (200, tokens, None, True)


@pytest.mark.skipif(not refuses_when_full(Path(ENVIRONMENT)), reason="this build of vLLM has no --max-num-queued-reqs")
def test_what_a_full_engine_refuses_goes_to_the_other(cluster):
    free, full = cluster.engines
    refused_before = full.gauge("admission_rejections_total")

    async def play():
        limits = httpx.Limits(max_connections=200)
        async with httpx.AsyncClient(timeout=120, limits=limits, trust_env=False) as client:
            fill = [
                asyncio.create_task(stream(client, full.url, cluster.body(max_tokens=400)))
                for _ in range(SEQUENCES + QUEUED)
            ]
            await asyncio.to_thread(eventually, lambda: full.running + full.waiting >= SEQUENCES + QUEUED, "it is full")
            through = await asyncio.gather(*(stream(client, cluster.url, cluster.body(max_tokens=6)) for _ in range(6)))
            for task in fill:
                task.cancel()
            await asyncio.gather(*fill, return_exceptions=True)
            return through

    through = asyncio.run(play())
    assert all(finished(seen, 6) for seen in through), through
    assert {seen.instance for seen in through} == {free.id}
    assert full.gauge("admission_rejections_total") > refused_before  # it was asked, and said no
    eventually(lambda: full.running == 0, "it is idle again")


def test_only_the_started_streams_of_a_killed_engine_fail_each_with_an_error_event(cluster):
    other, victim = cluster.engines

    def kill():
        all_run(victim, other)
        os.kill(cluster.process_of(victim), signal.SIGKILL)

    seen = together(cluster, STREAMS, TOKENS, kill)
    assert {s.status for s in seen} == {200}
    lost = [s for s in seen if not finished(s, TOKENS)]
    assert len(lost) == STREAMS // 2
    assert {s.instance for s in lost} == {victim.id}
    assert all(s.error is not None and {"message", "type", "code"} <= set(s.error) for s in lost), lost
    assert all(finished(s, TOKENS) for s in seen if s.instance == other.id)

    # what comes while it is gone is served by the other; and it is replaced
    assert all(finished(s, 4) for s in together(cluster, 8, 4))
    eventually(lambda: cluster.engines[1].id != victim.id, "it was replaced", START_S)


def test_an_engine_told_to_stop_loses_nothing(cluster):
    staying, leaving = cluster.engines

    def stop():
        all_run(leaving, staying)
        # behind the driver's back: an operator's hand, or a node's end
        os.kill(cluster.process_of(leaving), signal.SIGTERM)

    seen = together(cluster, STREAMS, TOKENS, stop)
    assert all(finished(s, TOKENS) for s in seen), seen
    # it answers /health with 200 and requests with 500 now; its clients see neither
    assert all(finished(s, 4) for s in together(cluster, 8, 4))
    eventually(lambda: cluster.engines[1].id != leaving.id, "it was replaced", START_S)


def test_an_engine_sleeps_and_wakes_and_a_token_is_what_tells(cluster):
    engine = cluster.engines[1]

    async def play():
        server = VllmServer(engine.url, "tiny")
        try:
            await server.until_idle()
            await server.sleep()
            assert engine.answers()  # /health is 200 all the while
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    await server.until_first_token()
                    raise AssertionError("asleep, and it gave a token")
            await server.wake()
        finally:
            await server.close()

    asyncio.run(play())
