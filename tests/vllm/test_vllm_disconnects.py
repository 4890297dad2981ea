"""A client that goes away frees the engine: seen in vLLM's own gauges, whatever the client was waiting for."""

import contextlib
import socket
import statistics
from collections.abc import Iterator
from urllib.parse import urlsplit

import httpx
import msgspec
import pytest
from vllm_cluster import SEQUENCES, eventually

ABORTED_WITHIN_S = 0.2
OURS_S = 0.1  # at most, of the median: what the gateway adds to vLLM's own time, on a machine that may be busy
TRIES = 5  # the machine may be busy with other things: what counts is what the gateway can do


def running(cluster) -> float:
    return sum(engine.running for engine in cluster.engines)


def waiting(cluster) -> float:
    return sum(engine.waiting for engine in cluster.engines)


@contextlib.contextmanager
def asked(url: str, body: dict[str, object]):
    """A plain socket with a request sent on it, so that closing it is closing it."""
    place = urlsplit(url)
    content = msgspec.json.encode(body)
    with socket.create_connection((place.hostname, place.port), timeout=60) as connection:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(content)}\r\n"
        connection.sendall(head.encode() + b"content-type: application/json\r\n\r\n" + content)
        yield connection


def told(what: str, gateway_s: list[float], direct_s: list[float]) -> None:
    """What vLLM itself takes is part of it: its gauges change with a step, and a scrape takes its time."""
    for how, took_s in (("through the gateway", gateway_s), ("asked directly", direct_s)):
        print(f"{what}, {how}: median {statistics.median(took_s) * 1e3:.0f} ms, worst {max(took_s) * 1e3:.0f} ms")


@pytest.mark.parametrize("stream", [True, False], ids=["streaming", "not streaming"])
def test_a_running_request_ends_with_its_client(cluster, stream):
    short = cluster.engines[1]  # to ask both takes twice as long

    def aborts_s(url: str) -> Iterator[float]:
        for _ in range(TRIES):
            eventually(lambda: short.running == 0, "the engine is idle")
            with asked(url, cluster.body(stream=stream)) as connection:
                eventually(lambda: short.running == 1, "an engine runs it")
                if stream:
                    assert connection.recv(100)
            yield eventually(lambda: short.running == 0, "the engine has dropped it")

    took_s, direct_s = list(aborts_s(cluster.url)), list(aborts_s(short.url))
    told("streaming" if stream else "not streaming", took_s, direct_s)
    assert min(took_s) < ABORTED_WITHIN_S, took_s
    assert statistics.median(took_s) < statistics.median(direct_s) + OURS_S


def test_a_request_that_waits_in_an_engine_ends_with_its_client(cluster):
    with contextlib.ExitStack() as filled:
        for engine in cluster.engines:
            for _ in range(SEQUENCES):
                filled.enter_context(asked(engine.url, cluster.body(stream=True)))
        eventually(lambda: running(cluster) == 2 * SEQUENCES, "both engines are full")

        def aborts_s(url: str) -> Iterator[float]:
            for _ in range(TRIES):
                with asked(url, cluster.body(stream=True)):
                    eventually(lambda: waiting(cluster) == 1, "it waits in one of them")
                yield eventually(lambda: waiting(cluster) == 0, "the engine has dropped it")
                assert running(cluster) == 2 * SEQUENCES

        took_s, direct_s = list(aborts_s(cluster.url)), list(aborts_s(cluster.engines[1].url))
    eventually(lambda: running(cluster) == 0, "the engines are idle again")
    told("waiting in a full engine", took_s, direct_s)
    assert min(took_s) < ABORTED_WITHIN_S, took_s
    assert statistics.median(took_s) < statistics.median(direct_s) + OURS_S


def test_the_gateway_forgets_it_too(cluster):
    with asked(cluster.url, cluster.body(stream=True)) as connection:
        assert connection.recv(100)
    eventually(lambda: running(cluster) == 0, "the engine has dropped it")
    answer = httpx.post(f"{cluster.url}/v1/chat/completions", json=cluster.body(max_tokens=2), timeout=60)
    assert answer.status_code == httpx.codes.OK
