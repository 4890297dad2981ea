"""Escalation: late requests without a first token move, or are squashed; others are left alone."""

import pytest
from msgspec.structs import replace
from pool_examples import cluster, request

from pools.classes import RequestClass, Slo
from pools.escalation import EscalationLimits
from pools.request import Assigned, Queued, RejectReason
from pools.router import Router, RouterLimits
from pools.view import ClusterView, EngineLoad

MM, LL = RequestClass.MM, RequestClass.LL


def router_of(counts, escalation=None, **options):
    router = Router(RouterLimits(escalation=escalation or EscalationLimits()))
    router.update(cluster(counts, **options), 0.0)
    return router


def test_those_on_time_stay():
    router = router_of({MM: 2})
    router.route(request("a"), 0.0)
    assert router.escalate(0.01) == []


def test_a_late_request_goes_to_an_instance_that_can_keep_its_deadline():
    router = router_of({MM: 2})
    assert router.route(request("a", slo=Slo(1.0, 0.1)), 0.0).instance_id == "MM-0"
    (moved,) = router.escalate(0.6)  # it was due at once; by now it is not to be expected before its deadline
    assert (moved.request.id, moved.left, moved.decision) == ("a", "MM-0", Assigned("MM-1", "MM"))
    assert (router.in_flight("MM-0"), router.in_flight("MM-1")) == (0, 1)
    router.on_first_token("a", 0.7)
    router.on_finished("a", 5, 0.8)
    assert router.in_flight("MM-1") == 0


def test_or_to_a_larger_pool():
    router = router_of({MM: 1, LL: 1})
    router.route(request("a", slo=Slo(1.0, 0.1)), 0.0)
    (moved,) = router.escalate(0.6)
    assert moved.decision == Assigned("LL-0", "LL")


def test_only_once():
    router = router_of({MM: 3})
    router.route(request("a", slo=Slo(2.0, 0.1)), 0.0)
    assert len(router.escalate(1.2)) == 1
    assert router.escalate(1.9) == []


def test_started_ones_are_never_moved():
    router = router_of({MM: 2})
    router.route(request("a", slo=Slo(1.0, 0.1)), 0.0)
    router.on_first_token("a", 0.5)
    assert router.escalate(0.9) == []


def test_one_that_is_not_streamed_is_taken_to_have_begun_when_it_should_have():
    router = router_of({MM: 2})
    unseen = replace(request("a", slo=Slo(1.0, 0.1)), streamed=False)
    router.route(unseen, 0.0)
    assert router.escalate(0.6) == []
    assert router.fleet.load.pending_tokens[router.fleet.index["MM-0"]] == 0.0
    assert router.in_flight("MM-0") == 1


def test_nowhere_better_it_stays():
    router = router_of({MM: 1})
    router.route(request("a", slo=Slo(1.0, 0.1)), 0.0)
    assert router.escalate(0.6) == []
    assert router.in_flight("MM-0") == 1


def test_the_important_and_urgent_choose_first():
    router = router_of({MM: 3}, max_seqs=2)
    for request_id, ttft_s, priority in (("late", 1.2, 0), ("soon", 1.0, 0), ("vip", 1.3, 1)):
        router.route(request(request_id, slo=Slo(ttft_s, 0.1), priority=priority), 0.0)
    assert [e.request.id for e in router.escalate(0.9)][:2] == ["vip", "soon"]


def test_past_hope_they_are_squashed_if_so_configured():
    router = router_of({MM: 1}, EscalationLimits(squash_late_s=1.0), max_seqs=1)
    router.route(request("sent"), 0.0)
    assert isinstance(router.route(request("waits"), 0.0), Queued)
    assert router.escalate(1.3) == []
    squashed = {e.request.id: e for e in router.escalate(1.5)}
    assert squashed["sent"].left == "MM-0"
    assert squashed["waits"].left is None
    assert {e.decision.reason for e in squashed.values()} == {RejectReason.TTL_EXPIRED}
    assert router.in_flight("MM-0") == 0
    assert router.queue.depth == 0


def test_by_default_nothing_is_squashed():
    router = router_of({MM: 1})
    router.route(request("a"), 0.0)
    assert router.escalate(1e6) == []


@pytest.mark.parametrize("foreign", [0, 7])
def test_in_flight_counts_our_own(foreign):
    router = router_of({MM: 1})
    router.route(request("a"), 0.0)
    for _ in range(2):
        router.observe("MM-0", EngineLoad(1 + foreign, 0, 0.1), 0.0)
    assert router.in_flight("MM-0") == 1
    assert router.in_flight("gone") == 0


def test_a_call_looks_only_so_often():
    router = router_of({MM: 2}, EscalationLimits(searches=3), max_seqs=8)
    for n in range(8):
        router.route(request(n, slo=Slo(1.0, 0.1), input_tokens=10), 0.0)
    assert len(router.escalate(0.6)) == 3
    assert len(router.escalate(0.6)) == 3
    assert len(router.escalate(0.6)) == 2


def test_a_model_that_has_gone_is_left_to_the_connection():
    router = router_of({MM: 2})
    router.route(request("a", slo=Slo(1.0, 0.1)), 0.0)
    router.update(ClusterView(3, 0.5, (), ()), 0.5)
    assert router.escalate(0.6) == []
