"""A candidate leads only while its lease is certain, holds its term while the store is away, yields to higher ones."""

import asyncio

import pytest

from dynamollm.adapters.sqlite_store import SqliteStore
from dynamollm.leadership import Candidate


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Flaky:
    """A store whose lease is now and then away, or slow to answer."""

    def __init__(self, clock: Clock) -> None:
        self.store = SqliteStore(clock=clock)
        self.away = False
        self.took_s = 0.0
        self._clock = clock

    async def hold(self, holder: str, ttl_s: float, epoch: int, seen_epoch: int) -> int | None:
        if self.away:
            raise OSError("away")
        held = await self.store.hold(holder, ttl_s, epoch, seen_epoch)
        self._clock.now_s += self.took_s
        return held

    async def release(self, holder: str) -> None:
        if self.away:
            raise OSError("away")
        await self.store.release(holder)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def leadership(clock: Clock) -> Flaky:
    return Flaky(clock)


def renew(candidate: Candidate) -> int:
    return asyncio.run(candidate.renew())


def test_the_first_leads_and_the_second_stands_by(clock, leadership):
    one, other = (Candidate(leadership, name, 2.0, clock) for name in "ab")
    assert not one.leads
    assert (renew(one), renew(other)) == (1, 0)
    assert one.leads
    assert not other.leads
    assert one.period_s == 0.5


def test_it_stops_leading_no_later_than_another_may_begin(clock, leadership):
    one, other = (Candidate(leadership, name, 2.0, clock) for name in "ab")
    leadership.took_s = 0.3  # the lease runs from somewhere in between: it counts from before
    renew(one)
    asked_s = clock.now_s - 0.3
    leadership.took_s = 0.0
    while renew(other) == 0:
        clock.now_s += 0.05
        assert not (one.leads and clock.now_s >= asked_s + 2.0)
    assert not one.leads
    assert other.leads
    assert other.epoch == 2


def test_while_the_lease_is_away_the_term_stands_and_nothing_is_done(clock, leadership, caplog):
    one = Candidate(leadership, "a", 2.0, clock)
    renew(one)
    leadership.away = True
    for _ in range(3):
        clock.now_s += 1.0
        assert renew(one) == 1
    assert not one.leads
    assert not one.reachable
    assert caplog.text.count("held until it can") == 1
    leadership.away = False
    assert renew(one) == 1  # the same term: nobody led meanwhile
    assert one.leads
    assert one.reachable


def test_the_term_is_over_when_another_led_meanwhile(clock, leadership):
    one, other = (Candidate(leadership, name, 2.0, clock) for name in "ab")
    renew(one)
    clock.now_s += 5.0
    assert renew(other) == 2
    assert renew(one) == 0
    clock.now_s += 5.0
    assert renew(one) == 3  # a new term, above the other's


def test_a_higher_epoch_that_somebody_follows_ends_the_term(clock, leadership):
    one = Candidate(leadership, "a", 2.0, clock)
    renew(one)
    one.saw(1)
    assert one.leads
    one.saw(5)
    assert (one.epoch, one.leads) == (0, False)
    assert renew(one) == 6


def test_after_giving_up_the_other_begins_at_once(clock, leadership):
    one, other = (Candidate(leadership, name, 2.0, clock) for name in "ab")
    renew(one)
    asyncio.run(one.release())
    assert renew(other) == 2
    leadership.away = True
    asyncio.run(other.release())  # nobody to tell: it lapses
    assert other.epoch == 0
