"""The open loop in virtual time: what is sent when, and that nothing is lost."""

import asyncio

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.replay import INTERRUPTED, Outcome, Replay, ReplayRequest
from simulator.virtual_loop import run
from simulator.workload.arrivals import Arrivals


class LoopClock:
    """The event loop's own (virtual) time."""

    def now_s(self) -> float:
        return asyncio.get_running_loop().time()

    async def sleep_until(self, due_s: float) -> None:
        await asyncio.sleep(max(due_s - self.now_s(), 0))


class SlowEndpoint:
    """Answers each request after ``answer_s(number)``; remembers what it saw."""

    def __init__(self, answer_s=lambda number: 1.0, clock=None):
        self.answer_s = answer_s
        self.clock = clock or LoopClock()
        self.seen: list[tuple[float, ReplayRequest]] = []
        self.open = self.most_open = 0

    async def complete(self, request: ReplayRequest) -> Outcome:
        sent_s = self.clock.now_s()
        self.seen.append((sent_s, request))
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        try:
            await asyncio.sleep(self.answer_s(request.number))
        finally:
            self.open -= 1
        return Outcome(sent_s, self.clock.now_s(), first_s=self.clock.now_s(), token_s=(self.clock.now_s(),))


def arrivals(times) -> Arrivals:
    count = len(times)
    return Arrivals(np.array(times, float), np.arange(1, count + 1, dtype=np.int32), np.full(count, 5, np.int32))


def play(times, endpoint, speedup=1.0, stop_after_s=None):
    """(outcomes by request number, the replay, virtual seconds it took)."""
    outcomes: dict[int, Outcome] = {}

    def record(request, outcome):
        assert request.number not in outcomes
        outcomes[request.number] = outcome

    async def main():
        replay = Replay(arrivals(times), endpoint, LoopClock(), record, speedup)
        loop = asyncio.get_running_loop()
        if stop_after_s is not None:
            loop.call_later(stop_after_s, replay.stop.set)
        began_s = loop.time()
        await replay.run()
        return replay, loop.time() - began_s

    return (outcomes, *run(main(), 1000.0))


def test_requests_are_sent_when_due_though_none_is_answered():
    endpoint = SlowEndpoint(lambda number: 500.0)
    outcomes, replay, took_s = play([0.0, 1.0, 1.0, 4.5], endpoint)
    assert [sent_s - 1000 for sent_s, _ in endpoint.seen] == [0, 1, 1, 4.5]
    assert endpoint.most_open == 4
    assert took_s == 504.5
    assert replay.sent == len(outcomes) == 4
    assert all(outcome.failure is None for outcome in outcomes.values())


def test_speedup_divides_the_times():
    endpoint = SlowEndpoint()
    play([0.0, 10.0, 30.0], endpoint, speedup=10.0)
    assert [sent_s - 1000 for sent_s, _ in endpoint.seen] == [0, 1, 3]


def test_lengths_and_due_times_reach_the_endpoint():
    endpoint = SlowEndpoint()
    play([0.0, 2.0], endpoint)
    assert endpoint.seen[1][1] == ReplayRequest(1, 1002.0, 2, 5)


def test_stopping_accounts_for_what_was_open_and_sends_no_more():
    endpoint = SlowEndpoint(lambda number: 0.5 if number == 0 else 100.0)
    outcomes, replay, took_s = play([0.0, 1.0, 2.0, 9.0], endpoint, stop_after_s=3.0)
    assert took_s == 3.0
    assert replay.sent == 3
    assert outcomes[0].failure is None
    assert [outcomes[number].failure for number in (1, 2)] == [INTERRUPTED, INTERRUPTED]
    assert endpoint.open == 0


def test_stopping_while_draining_ends_the_wait():
    outcomes, _, took_s = play([0.0], SlowEndpoint(lambda number: 1e9), stop_after_s=5.0)
    assert took_s == 5.0
    assert outcomes[0].failure == INTERRUPTED


@given(
    gaps=st.lists(st.floats(0, 3), min_size=1, max_size=30),
    answers=st.lists(st.floats(0, 20), min_size=30, max_size=30),
    stop_after_s=st.none() | st.floats(0, 60),
)
def test_every_request_sent_is_recorded_once_whatever_happens(gaps, answers, stop_after_s):
    times = np.cumsum(gaps).tolist()
    endpoint = SlowEndpoint(lambda number: answers[number])
    outcomes, replay, _ = play(times, endpoint, stop_after_s=stop_after_s)
    assert set(outcomes) == set(range(replay.sent))
    assert endpoint.open == 0
    if stop_after_s is None:
        assert replay.sent == len(times)
        for (sent_s, _), due_s in zip(endpoint.seen, times, strict=True):
            assert sent_s - 1000 == pytest.approx(due_s, abs=1e-6)


def test_a_broken_endpoint_is_not_hidden():
    class Broken:
        async def complete(self, request):
            raise RuntimeError("a bug")

    class BrokenClock(LoopClock):
        async def sleep_until(self, due_s):
            raise RuntimeError("a bug in the clock")

    async def main():
        replay = Replay(arrivals([0.0]), Broken(), BrokenClock(), lambda request, outcome: None)
        await replay.run()

    with pytest.raises(RuntimeError, match="a bug in the clock"):
        run(main())
