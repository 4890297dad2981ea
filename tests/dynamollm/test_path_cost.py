"""What one request costs on the relayed path, counted in interpreted instructions: it must not creep up."""

import asyncio
import sys
import time

import pytest
from path_cost import (
    ANSWER,
    ANSWER_BODY,
    STREAM_END,
    STREAM_HEAD,
    TOKEN,
    Counted,
    RelayedPath,
    request_of,
)

REQUESTS = 32
EVENTS = 64
STREAM = (STREAM_HEAD + TOKEN, *(TOKEN,) * EVENTS, STREAM_END)
# instructions of CPython 3.11, a tenth above what was counted
WHOLE_ANSWER, STREAM_ITSELF, EVENT = 4860, 6330, 127


@pytest.fixture(scope="module")
def counts():
    return asyncio.run(_count())


async def _count():
    path = RelayedPath()
    whole, stream = request_of(300), request_of(300, stream=True)
    for _ in range(300):  # dial, learn, fill the caches
        assert (await path.exchange(whole, ANSWER)).endswith(ANSWER_BODY)
        assert (await path.exchange(stream, STREAM_HEAD + TOKEN, STREAM_END)).endswith(b"0\r\n\r\n")
        path.gateway.tick(time.monotonic())
    counts = {}
    for name, request, segments in (
        ("whole", whole, (ANSWER,)),
        ("stream", stream, (STREAM_HEAD + TOKEN, STREAM_END)),
        ("events", stream, STREAM),
    ):
        counted = counts[name] = Counted()
        with counted.counting():
            for _ in range(REQUESTS):
                path.exchange_now(request, segments)
            path.gateway.services.metrics.settle()
        path.taken()
    return counts


def _instructions(counted):
    return sum(count for name, count, _ in counted.by_file() if not name.startswith("tests/")) / REQUESTS


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="instructions are those of CPython 3.11")
def test_a_request_takes_no_more_instructions_than_it_did(counts):
    whole, stream, events = (_instructions(counts[name]) for name in ("whole", "stream", "events"))
    event = (events - stream) / EVENTS
    print(f"\na whole answer {whole:.0f}, a stream {stream:.0f}, each event {event:.1f} instructions")
    for name, count, frames in counts["whole"].by_file():
        print(f"  {name:<70}{count / REQUESTS:>8.0f}{frames / REQUESTS:>6.0f}")
    assert (whole <= WHOLE_ANSWER, stream <= STREAM_ITSELF, event <= EVENT) == (True, True, True)
