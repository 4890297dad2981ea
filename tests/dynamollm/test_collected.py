"""All gateways together: totals only rise, whoever comes and goes; loads are those of the gateways that are there."""

from hypothesis import given
from hypothesis import strategies as st

from dynamollm.collected import Collected
from dynamollm.reports import GatewayReport, Totals, document, read
from pools.classes import RequestClass
from pools.peers import PeerLoad
from pools.traffic import ClassTraffic

GIVEN = (1, 0, 0, 0, 0, 0, 0, 0, 2)


def report(at_s: float, arrived: int, in_flight: float = 0.0, **changes) -> GatewayReport:
    values = {
        "at_unix_s": at_s,
        "follows": (1, 5),
        "totals": (Totals("m", RequestClass.SS, arrived, 10 * arrived, arrived // 2, 7 * arrived, queued=1),),
        "loads": {"i": PeerLoad(in_flight, 100.0, 50.0, 60.0, 2.0, 0.1)} if in_flight else {},
        "given": {"i": GIVEN},
    }
    return GatewayReport(**{**values, **changes})


def test_a_report_survives_the_store():
    before = report(5.0, 10, 3.0, tenants={"acme": 2.0}, minute=7, ledger_batches=4, shares={"i": 0.5})
    assert read(document(before), GatewayReport) == before


def test_what_came_is_counted_from_when_a_gateway_was_first_heard():
    collected = Collected()
    collected.take({"a": report(1.0, 1000)})
    assert collected.traffic.snapshot() == {}
    collected.take({"a": report(2.0, 1010), "b": report(2.0, 5)})
    collected.take({"a": report(2.0, 1010), "b": report(3.0, 9)})
    assert collected.snapshot()["m", RequestClass.SS] == ClassTraffic(14, 140, 7, 98)


def test_a_gateway_that_is_gone_takes_nothing_back():
    collected = Collected()
    collected.take({"a": report(1.0, 0)})
    collected.take({"a": report(2.0, 8, 4.0)})
    collected.take({})
    assert collected.snapshot()["m", RequestClass.SS].arrived == 8
    assert collected.in_flight("i") == 0
    assert (collected.depth, collected.depths()) == (0, {})


def test_loads_and_queues_of_all_add_up():
    collected = Collected()
    reports = {"a": report(1.0, 1, 3.0), "b": report(1.0, 1, 4.0)}
    collected.take(reports)
    collected.take({name: report(2.0, 2, 4.0, given={"i": tuple(2 * n for n in GIVEN)}) for name in reports})
    assert collected.in_flight("i") == 8
    counts = collected.counts()["i"]
    assert (counts.running, counts.pending_tokens, counts.context_tokens) == (8.0, 200.0, 100.0)
    assert counts.given == tuple(2 * n for n in GIVEN)
    assert collected.queue.depths() == {("m", RequestClass.SS): 2}
    assert collected.queue.depth == 2


def test_the_worst_use_of_an_slo_is_passed_on():
    seen: list[tuple[str, float, int]] = []
    collected = Collected(lambda instance_id, share, late: seen.append((instance_id, share, late)))
    collected.take({"a": report(1.0, 1, shares={"i": 0.5}), "b": report(1.0, 1, shares={"i": 0.9})})
    assert seen == [("i", 0.5, 0), ("i", 0.9, 0)]


def test_late_requests_are_news_once():
    seen: list[int] = []
    collected = Collected(lambda instance_id, share, late: seen.append(late))
    for at_s, late in ((1.0, 3), (2.0, 5), (2.0, 5), (3.0, 5), (4.0, 6)):  # what it had before it was heard is none
        collected.take({"a": report(at_s, 1, shares={"i": 1.5}, late={"i": late})})
    assert seen == [0, 2, 0, 0, 1]


def test_who_follows_an_older_cluster_is_known_and_so_is_the_highest_epoch():
    collected = Collected()
    assert collected.highest_epoch == 0
    collected.take({"a": report(1.0, 1, follows=(1, 5)), "b": report(1.0, 1, follows=(2, 1))})
    assert [collected.behind(stamp) for stamp in ((1, 5), (1, 6), (2, 1), (2, 2))] == [0, 1, 1, 2]
    assert collected.highest_epoch == 2


def test_while_nothing_is_heard_the_last_word_stands():
    collected = Collected()
    assert not collected.heard
    collected.take({"a": report(1.0, 1, 3.0)})
    collected.lost()
    assert not collected.heard
    assert collected.in_flight("i") == 3


@given(st.lists(st.dictionaries(st.sampled_from("abc"), st.integers(0, 50), max_size=3), max_size=12))
def test_totals_never_fall(rounds):
    collected, sums, arrived = Collected(), dict.fromkeys("abc", 0), 0
    for at_s, came in enumerate(rounds):
        for name, more in came.items():
            sums[name] += more
        collected.take({name: report(float(at_s), sums[name]) for name in came})
        now = collected.snapshot().get(("m", RequestClass.SS), ClassTraffic()).arrived
        assert now >= arrived
        arrived = now
    assert arrived <= sum(sums.values())
