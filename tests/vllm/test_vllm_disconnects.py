"""A client that goes away frees the engine: seen in vLLM's own gauges, whatever the client was waiting for.

Two things take time: the gateway, until it closes its connection to the engine (the kernel tells), and vLLM, until it
has noticed and a scrape says so. The first is ours, and bounded here; the second takes what the engine's next step and
a scrape take on this machine, and is told (docs/fidelity.md).
"""

import contextlib
import os
import socket
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import msgspec
import pytest
from vllm_cluster import SEQUENCES, eventually

ABORTED_WITHIN_S = 0.2  # ours, in the median, for the machine may be busy with other things
TRIES = 5
ESTABLISHED = "01"


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


def upstream(cluster) -> set[str]:
    """The gateway's open connections to its engines, by their sockets."""
    fds = Path(f"/proc/{cluster.process.pid}/fd")
    sockets = set()
    for fd in fds.iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile
            sockets.add(os.readlink(fd).removeprefix("socket:[").removesuffix("]"))
    ports = {f"{urlsplit(engine.url).port:04X}" for engine in cluster.engines}
    rows = (line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:])
    return {row[9] for row in rows if row[2][-4:] in ports and row[3] == ESTABLISHED and row[9] in sockets}


def check_aborts(what: str, cluster, body: dict[str, object], begun: Callable, dropped: Callable[[], bool]) -> None:
    """Ask and go away again and again, each time once it has ``begun``, until the engine has ``dropped`` it."""
    ours_s, whole_s = [], []
    for _ in range(TRIES):
        with asked(cluster.url, body) as connection:
            begun(connection)
            carrying = upstream(cluster)
            assert carrying
        began_s = time.monotonic()
        ours_s.append(eventually(lambda carrying=carrying: carrying - upstream(cluster), "the gateway closes it"))
        eventually(dropped, "the engine has dropped it")
        whole_s.append(time.monotonic() - began_s)
    vllms_s = [whole - ours for whole, ours in zip(whole_s, ours_s, strict=True)]
    for whose, took_s in (("the gateway", ours_s), ("vLLM and its gauge", vllms_s), ("in all", whole_s)):
        print(f"{what}, {whose}: median {statistics.median(took_s) * 1e3:.0f} ms, worst {max(took_s) * 1e3:.0f} ms")
    assert statistics.median(ours_s) < ABORTED_WITHIN_S, ours_s


@pytest.mark.parametrize("stream", [True, False], ids=["streaming", "not streaming"])
def test_a_running_request_ends_with_its_client(cluster, stream):
    short = cluster.engines[1]  # to ask both takes twice as long
    eventually(lambda: short.running == 0, "the engine is idle")

    def begun(connection: socket.socket) -> None:
        eventually(lambda: short.running == 1, "an engine runs it")
        if stream:
            assert connection.recv(100)

    what = "streaming" if stream else "not streaming"
    check_aborts(what, cluster, cluster.body(stream=stream), begun, lambda: short.running == 0)


def test_a_request_that_waits_in_an_engine_ends_with_its_client(cluster):
    with contextlib.ExitStack() as filled:
        for engine in cluster.engines:
            for _ in range(SEQUENCES):
                filled.enter_context(asked(engine.url, cluster.body(stream=True)))
        eventually(lambda: running(cluster) == 2 * SEQUENCES, "both engines are full")

        def begun(_: socket.socket) -> None:
            eventually(lambda: waiting(cluster) == 1, "it waits in one of them")

        check_aborts(
            "waiting in a full engine", cluster, cluster.body(stream=True), begun, lambda: waiting(cluster) == 0
        )
        assert running(cluster) == 2 * SEQUENCES
    eventually(lambda: running(cluster) == 0, "the engines are idle again")


def test_the_gateway_forgets_it_too(cluster):
    with asked(cluster.url, cluster.body(stream=True)) as connection:
        assert connection.recv(100)
    eventually(lambda: running(cluster) == 0, "the engine has dropped it")
    answer = httpx.post(f"{cluster.url}/v1/chat/completions", json=cluster.body(max_tokens=2), timeout=60)
    assert answer.status_code == httpx.codes.OK
