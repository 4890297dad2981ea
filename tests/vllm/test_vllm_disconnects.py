"""A client that goes away frees the engine: seen in vLLM's own gauges, whatever the client was waiting for."""

import contextlib
import socket
from urllib.parse import urlsplit

import httpx
import msgspec
import pytest
from vllm_cluster import SEQUENCES, eventually

ABORTED_WITHIN_S = 0.2
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


@pytest.mark.parametrize("stream", [True, False], ids=["streaming", "not streaming"])
def test_a_running_request_ends_with_its_client(cluster, stream):
    short = cluster.engines[1]  # to ask both takes twice as long
    took_s = []
    for _ in range(TRIES):
        eventually(lambda: short.running == 0, "the engine is idle")
        with asked(cluster.url, cluster.body(stream=stream)) as connection:
            eventually(lambda: short.running == 1, "an engine runs it")
            if stream:
                assert connection.recv(100)
        took_s.append(eventually(lambda: short.running == 0, "the engine has dropped it"))
    print("abort seen after", took_s, "s")
    assert min(took_s) < ABORTED_WITHIN_S, took_s


def test_a_request_that_waits_in_an_engine_ends_with_its_client(cluster):
    with contextlib.ExitStack() as filled:
        for engine in cluster.engines:
            for _ in range(SEQUENCES):
                filled.enter_context(asked(engine.url, cluster.body(stream=True)))
        eventually(lambda: running(cluster) == 2 * SEQUENCES, "both engines are full")
        took_s = []
        for _ in range(2):
            with asked(cluster.url, cluster.body(stream=True)):
                eventually(lambda: waiting(cluster) == 1, "it waits in one of them")
            took_s.append(eventually(lambda: waiting(cluster) == 0, "the engine has dropped it"))
            assert running(cluster) == 2 * SEQUENCES
    eventually(lambda: running(cluster) == 0, "the engines are idle again")
    print("abort of one that waited seen after", took_s, "s")
    assert min(took_s) < 2 * ABORTED_WITHIN_S, took_s  # the engine tells only at its next step, and it is full


def test_the_gateway_forgets_it_too(cluster):
    with asked(cluster.url, cluster.body(stream=True)) as connection:
        assert connection.recv(100)
    eventually(lambda: running(cluster) == 0, "the engine has dropped it")
    answer = httpx.post(f"{cluster.url}/v1/chat/completions", json=cluster.body(max_tokens=2), timeout=60)
    assert answer.status_code == httpx.codes.OK
