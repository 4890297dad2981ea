"""Feeds and tail: every request is booked once, whatever the store loses, repeats or withholds, and whoever leads."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamollm.ledger_feed import RESEND_S, LedgerFeed, LedgerTail
from energy.accounting import Interval, MeteredInstance, Prices, Use, User
from energy.accounting_ledger import EnergyLedger
from energy.carbon import StaticIntensity

OFFSET_S = 1_700_000_000.0
USER = User("m", "SS", "SS", "acme")


def ledger(offset_s: float = OFFSET_S) -> EnergyLedger:
    return EnergyLedger(StaticIntensity(100.0, "test"), Prices(), offset_s)


class Stream:
    """A store's stream that can be away, and can forget."""

    def __init__(self) -> None:
        self.entries: list[tuple[str, dict]] = []
        self.count = 0
        self.away = False

    def append(self, documents: list[dict]) -> None:
        if self.away:
            raise OSError("away")
        for document in documents:
            self.count += 1
            self.entries.append((f"{self.count:09d}", document))

    def after(self, position: str) -> list[tuple[str, dict]]:
        if self.away:
            raise OSError("away")
        return [entry for entry in self.entries if entry[0] > position]


def send(feed: LedgerFeed, stream: Stream, now_s: float, name: str = "g") -> None:
    """What a gateway does now and then."""
    feed.cut(now_s)
    batches = feed.to_send(now_s)
    try:
        stream.append(feed.documents(name, batches))
    except OSError:
        feed.send_again()
    else:
        feed.sent(batches)


def counted(books: EnergyLedger, now_s: float) -> tuple[int, int, int]:
    rows = [row.row for row in books.window(3600.0, now_s).rows]
    return sum(r.requests for r in rows), sum(r.input_tokens for r in rows), sum(r.output_tokens for r in rows)


def serve(feed: LedgerFeed, name: str, now_s: float) -> None:
    feed.began(name, USER, "ss-1", 100, now_s)
    feed.first_token(name, now_s + 0.1)
    feed.ended(name, now_s + 0.5, 101, 7)


def test_what_is_fed_is_booked_as_if_it_had_been_told_at_once():
    feed, stream, books = LedgerFeed(OFFSET_S), Stream(), ledger(OFFSET_S - 50.0)  # another machine's clock
    serve(feed, "a", 10.0)
    feed.began("b", USER, "ss-1", 50, 10.2)
    send(feed, stream, 11.0)
    tail = LedgerTail(books, OFFSET_S - 50.0)
    tail.take(stream.after(tail.position))
    assert counted(books, 61.0) == (1, 101, 7)
    assert books.knows("b")
    assert not books.knows("a")
    direct = ledger()
    for each, told_s in ((books, 60.0), (direct, 10.0)):
        instance = MeteredInstance("ss-1", "SS", "m", "H100-SXM", 2, Use.IDLE, 70.0)
        each.metered(Interval(instance, told_s, told_s + 1.0, 500.0))
        each.settle(told_s + 10.0)
    assert books.metered_j == direct.metered_j == 500.0


def test_a_retried_request_is_booked_once_where_it_ended():
    feed, stream, books = LedgerFeed(OFFSET_S), Stream(), ledger()
    feed.began("a", USER, "ss-1", 100, 1.0)
    feed.began("a", USER, "ss-2", 100, 1.5)
    feed.ended("a", 2.0, None, None)
    feed.ended("a", 2.1, None, None)  # unknown by now
    feed.first_token("a", 2.2)
    send(feed, stream, 3.0)
    tail = LedgerTail(books, OFFSET_S)
    tail.take(stream.after(""))
    assert counted(books, 3.0) == (1, 100, 0)
    assert feed.energy_j("a", 3.0) is None


Step = st.one_of(
    st.tuples(st.just("serve"), st.integers(0, 1)),
    st.tuples(st.just("begin"), st.integers(0, 1)),
    st.tuples(st.just("end"), st.integers(0, 1)),
    st.tuples(st.just("send"), st.integers(0, 1)),
    st.tuples(st.just("book"), st.just(0)),
    st.tuples(st.just("away"), st.just(0)),
    st.tuples(st.just("killed"), st.just(0)),
    st.tuples(st.just("new leader"), st.just(0)),
    st.tuples(st.just("save"), st.just(0)),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(Step, max_size=40))
def test_no_request_is_lost_or_booked_twice_by_outages_of_the_store_or_changes_of_the_leader(steps):
    """One failure at a time: a store that forgets, or a leader that dies; never both at once."""
    feeds, stream = [LedgerFeed(OFFSET_S) for _ in range(2)], Stream()
    books = ledger()
    tail, saved = LedgerTail(books, OFFSET_S), LedgerTail(ledger(), OFFSET_S).snapshot()
    now_s, open_requests = 0.0, [[], []]
    ended = 0

    def book() -> None:
        if stream.away:
            return
        tail.take(stream.after(tail.position))
        for k, feed in enumerate(feeds):
            feed.booked(tail.booked.get(f"g{k}", 0), now_s)

    for number, (what, k) in enumerate(steps):
        now_s += 1.0
        if what == "serve":
            serve(feeds[k], f"r{number}", now_s)
            ended += 1
        elif what == "begin":
            feeds[k].began(f"r{number}", USER, "ss-1", 100, now_s)
            open_requests[k].append(f"r{number}")
        elif what == "end" and open_requests[k]:
            feeds[k].ended(open_requests[k].pop(), now_s, 100, 7)
            ended += 1
        elif what == "send":
            send(feeds[k], stream, now_s, f"g{k}")
        elif what == "book":
            book()
        elif what == "save" and not stream.away:
            saved = tail.snapshot()
        elif what == "away":
            stream.away = not stream.away
        elif what == "killed":  # Redis comes back with nothing but what the leader writes anew
            stream.entries.clear()
            saved = tail.snapshot()
        elif what == "new leader" and not stream.away:
            books = ledger()
            tail = LedgerTail(books, OFFSET_S)
            tail.restore(saved)
            book()  # first of all
    stream.away = False
    for _ in range(4):  # sent, found to be lost, sent again
        now_s += RESEND_S + 1.0
        for k, feed in enumerate(feeds):
            send(feed, stream, now_s, f"g{k}")
        book()
    assert counted(books, now_s)[0] == ended
    assert tail.lost_batches == 0


def test_what_is_sent_and_not_booked_is_sent_again_after_a_while_and_not_before():
    feed, stream = LedgerFeed(OFFSET_S), Stream()
    serve(feed, "a", 0.0)
    send(feed, stream, 1.0)
    stream.entries.clear()
    send(feed, stream, 1.0 + RESEND_S - 0.5)
    assert stream.entries == []
    send(feed, stream, 1.0 + RESEND_S + 0.5)
    assert [document["number"] for _, document in stream.entries] == [1]
    feed.booked(1, 8.0)
    send(feed, stream, 100.0)
    assert len(stream.entries) == 1


def test_a_feed_is_bounded_and_says_what_it_lost_and_the_tail_goes_on_behind_the_gap():
    feed, stream, books = LedgerFeed(OFFSET_S, most_entries=30), Stream(), ledger()
    tail = LedgerTail(books, OFFSET_S)
    serve(feed, "first", 0.0)
    send(feed, stream, 0.5)
    tail.take(stream.after(tail.position))
    feed.booked(1, 0.6)
    stream.away = True
    for n in range(20):
        serve(feed, f"r{n}", float(n))
        send(feed, stream, float(n))
    assert feed.lost_entries == 3 * 10
    stream.away = False
    send(feed, stream, 30.0)
    tail.take(stream.after(tail.position))
    assert counted(books, 30.0)[0] == 11
    assert tail.lost_batches == 10


def test_energy_is_booked_no_further_than_every_gateway_was_heard():
    feed, stream, books = LedgerFeed(OFFSET_S), Stream(), ledger()
    tail = LedgerTail(books, OFFSET_S)
    assert tail.heard_s({}, 5.0, reachable=True) == 5.0  # nobody there: nothing to wait for
    serve(feed, "a", 6.0)
    send(feed, stream, 7.0)
    at_8_s = {"g": (1, OFFSET_S + 8.0)}
    assert tail.heard_s(at_8_s, 8.5, reachable=True) == 5.0  # it has cut a batch that is not booked
    tail.take(stream.after(""))
    assert tail.heard_s(at_8_s, 8.5, reachable=True) == pytest.approx(8.0, abs=1e-6)
    assert tail.heard_s(at_8_s, 60.0, reachable=False) == pytest.approx(8.0, abs=1e-6)
    assert tail.heard_s(at_8_s, 1000.0, reachable=False) == 400.0  # ten minutes, then without


def test_a_document_that_is_no_ledger_is_refused():
    with pytest.raises(ValueError, match="not an energy ledger"):
        LedgerTail(ledger(), 0.0).restore({"position": "5"})
