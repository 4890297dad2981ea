"""The routing decision, from outside: where requests go, wait, are refused, and come back."""

from dataclasses import replace

import pytest
from pool_examples import MODEL, cluster, instance_view, nine_pools, request

from pools.classes import REQUEST_CLASSES, RequestClass, Slo
from pools.instances import InstanceState
from pools.outliers import EjectionLimits
from pools.queue import QueueLimits
from pools.request import Assigned, Queued, Rejected, RejectReason
from pools.router import Router, RouterLimits
from pools.scoring import Weights
from pools.view import EngineLoad

SS, SM, SL, MS, MM, ML, LS, LM, LL = REQUEST_CLASSES


def router_of(view, **limits):
    router = Router(RouterLimits(**limits))
    router.update(view, 0.0)
    return router


def with_states(view, version=2, **states):
    """The view with some instances, named by id with ``_`` for ``-``, in another state."""
    states = {k.replace("_", "-"): s for k, s in states.items()}
    instances = tuple(
        replace(v, instance=replace(v.instance, state=states.get(v.instance.id, v.instance.state)))
        for v in view.instances
    )
    return replace(view, version=version, instances=instances)


def fill(router, count, *, start=0, now_s=0.0, **options):
    """Route requests until ``count`` are in; each gets its first token at once."""
    decisions = []
    for n in range(start, start + count):
        decisions.append(router.route(request(n, arrival_s=now_s, **options), now_s))
        router.on_first_token(str(n), now_s)
    return decisions


# Where requests go


def test_goes_to_its_own_pool():
    router = router_of(nine_pools())
    for c in REQUEST_CLASSES:
        assert router.route(request(c.name, c), 0.0) == Assigned(f"{c.name}-0", c.name)


def test_fills_one_instance_before_the_next():
    router = router_of(cluster({MM: 3}))
    assert {d.instance_id for d in fill(router, 10)} == {"MM-0"}


def test_escalates_to_a_dominating_pool_then_queues():
    router = router_of(cluster({SS: 1, MM: 1, LL: 1}, max_seqs=2))
    decisions = fill(router, 7, request_class=SS)
    assert [d.pool for d in decisions[:6]] == ["SS", "SS", "MM", "MM", "LL", "LL"]
    assert decisions[6] == Queued(1)


def test_never_to_a_pool_that_does_not_dominate():
    router = router_of(cluster({SS: 5, MS: 5}, max_seqs=1))
    assert router.route(request("a", MM), 0.0).reason is RejectReason.NO_ENDPOINTS


@pytest.mark.parametrize("state", [InstanceState.STARTING, InstanceState.PARKED])
def test_what_only_a_coming_instance_can_serve_waits_for_it(state):
    router = router_of(with_states(cluster({MM: 1}), MM_0=state))
    assert router.route(request("a"), 0.0) == Queued(1)
    router.update(cluster({MM: 1}, version=2), 1.0)
    assert router.release(1.0) == [(request("a"), Assigned("MM-0", "MM"))]


def test_shares_of_the_plan_are_kept():
    router = router_of(cluster({SS: 1, LL: 1}, shares={(MODEL, SS): (("SS", 3.0), ("LL", 1.0))}))
    pools = [d.pool for d in fill(router, 40, request_class=SS)]
    assert pools.count("SS") == 30
    assert pools.count("LL") == 10


def test_a_full_share_overflows_to_the_other():
    router = router_of(cluster({SS: 1, LL: 1}, shares={(MODEL, SS): (("SS", 1.0),)}, max_seqs=2))
    assert [d.pool for d in fill(router, 4, request_class=SS)] == ["SS", "SS", "LL", "LL"]


def test_a_pool_larger_than_a_window_is_used_whole():
    router = router_of(cluster({MM: 100}, max_seqs=1))
    assert len({d.instance_id for d in fill(router, 100)}) == 100
    assert isinstance(router.route(request("more"), 0.0), Queued)


def test_unknown_model_is_not_the_same_as_no_endpoint():
    router = router_of(with_states(cluster({MM: 1}), MM_0=InstanceState.DRAINING))
    unknown = router.route(request("a", model="nope"), 0.0)
    assert (unknown.reason, unknown.contended) == (RejectReason.UNKNOWN_MODEL, False)
    nowhere = router.route(request("b"), 0.0)
    assert (nowhere.reason, nowhere.contended) == (RejectReason.NO_ENDPOINTS, False)


def test_requests_wait_for_a_pool_that_has_an_instance_ordered_and_not_for_one_that_cannot_serve_them():
    view = cluster({SS: 0, MM: 0})
    router = router_of(replace(view, coming=frozenset({"SS"})))
    assert router.route(request("a", SS), 0.0) == Queued(1)
    assert router.route(request("b", MM), 0.0).reason is RejectReason.NO_ENDPOINTS
    router.update(replace(cluster({SS: 1, MM: 0}), version=2), 1.0)
    assert [(r.id, d.instance_id) for r, d in router.release(1.0)] == [("a", "SS-0")]


def test_what_waits_for_an_order_that_was_given_up_waits_no_longer_than_its_time():
    router = router_of(replace(cluster({MM: 0}), coming=frozenset({"MM"})))
    assert router.route(request("a"), 0.0) == Queued(1)
    router.update(replace(cluster({MM: 0}), version=2), 1.0)
    assert router.route(request("b"), 1.0).reason is RejectReason.NO_ENDPOINTS
    assert router.release(1.0) == []
    ended_s = router.limits.queue.ttl_s
    assert [(r.id, d.reason) for r, d in router.release(ended_s)] == [("a", RejectReason.TTL_EXPIRED)]


def test_before_any_view_no_model_is_known():
    assert Router().route(request("a"), 0.0).reason is RejectReason.UNKNOWN_MODEL


@pytest.mark.parametrize("state", [s for s in InstanceState if s is not InstanceState.READY])
def test_only_ready_instances_are_given_requests(state):
    view = cluster({MM: 2})
    router = router_of(with_states(view, MM_0=state))
    assert {d.instance_id for d in fill(router, 5)} == {"MM-1"}


def test_a_strict_header_narrows_the_choice():
    router = router_of(cluster({MM: 2}), weights=Weights(spread=0.0))
    fill(router, 40)
    strict = request("strict", slo=Slo(0.4, 0.0135))
    assert router.route(strict, 0.0).instance_id == "MM-1"


def test_those_already_promised_a_strict_slo_are_spared():
    router = router_of(cluster({MM: 2}))
    assert router.route(request("strict", slo=Slo(0.4, 0.0113)), 0.0).instance_id == "MM-0"
    router.on_first_token("strict", 0.1)
    assert router.route(request("a"), 0.2).instance_id == "MM-1"
    router.on_finished("strict", 10, 0.3)
    assert router.route(request("b", arrival_s=0.3), 0.3).instance_id == "MM-1"  # packing again, there now
    router.on_finished("a", 10, 0.4)
    router.on_finished("b", 10, 0.4)
    assert router.route(request("c", arrival_s=0.5), 0.5).instance_id == "MM-0"


def test_an_slo_nobody_can_keep_is_served_at_once_and_best():
    router = router_of(cluster({MM: 2, LL: 1}))
    for n in range(3):
        router.route(request(n, input_tokens=1000 * (n + 1), slo=Slo(1e-6, 1e-6)), 0.0)
    fourth = router.route(request("x", slo=Slo(1e-6, 0.1)), 0.0)
    assert isinstance(fourth, Assigned)
    loads = {i: router.fleet.load.in_flight[i] for i in range(3)}
    assert sorted(loads.values()) == [1.0, 1.0, 2.0]  # spread: nothing to be gained by packing the hopeless


def test_inputs_beyond_any_limit_are_for_the_engine_to_refuse():
    router = router_of(cluster({LL: 1}, kv_capacity_tokens=1000))
    assert isinstance(router.route(request("a", LL, input_tokens=5000, slo=Slo(2.0, 0.1)), 0.0), Assigned)


# Waiting


def full_router(**limits):
    """One pool of one instance with two seats, both taken by ``0`` and ``1``."""
    router = router_of(cluster({MM: 1}, max_seqs=2), **limits)
    fill(router, 2)
    return router


def test_what_waits_is_released_when_a_request_ends():
    router = full_router()
    assert router.route(request("w", slo=Slo(50.0, 0.1)), 0.0) == Queued(1)
    router.release(0.0)
    assert router.release(0.01) == []
    router.on_finished("0", 100, 1.0)
    assert [(r.id, d) for r, d in router.release(1.0)] == [("w", Assigned("MM-0", "MM"))]
    assert router.next_release_s == float("inf")


@pytest.mark.parametrize("end", ["finished", "failed", "cancelled"])
def test_every_end_frees_a_seat(end):
    router = full_router()
    router.route(request("w", slo=Slo(50.0, 0.1)), 0.0)
    router.release(0.0)
    {
        "finished": lambda: router.on_finished("0", 5, 0.01),
        "failed": lambda: router.on_failed("0", "MM-0", 0.01),
        "cancelled": lambda: router.on_cancelled("0", 0.01),
    }[end]()
    assert [r.id for r, _ in router.release(0.01)] == ["w"]


def test_released_by_priority_then_deadline():
    router = full_router()
    slo = Slo(50.0, 0.1)
    for request_id, priority, arrival_s in (("b", 0, 0.2), ("c", 1, 0.3), ("a", 0, 0.1)):
        router.route(request(request_id, priority=priority, arrival_s=arrival_s, slo=slo), 0.4)
    order = []
    running = ["0", "1"]
    for n in range(3):
        router.on_finished(running.pop(0), 1, 1.0 + n)
        released = [r.id for r, _ in router.release(1.0 + n)]
        running += released
        order += released
    assert order == ["c", "a", "b"]


def test_a_newcomer_does_not_overtake_those_as_urgent():
    router = full_router()
    router.route(request("w", slo=Slo(50.0, 0.1)), 0.0)
    router.on_finished("0", 1, 1.0)
    assert isinstance(router.route(request("late", arrival_s=1.0, slo=Slo(50.0, 0.1)), 1.0), Queued)
    assert isinstance(router.route(request("vip", arrival_s=1.0, priority=1, slo=Slo(50.0, 0.1)), 1.0), Assigned)


def test_what_waits_past_its_deadline_is_served_late_not_dropped():
    router = full_router()
    router.route(request("w"), 0.0)
    router.on_finished("0", 1, 20.0)
    assert [r.id for r, _ in router.release(20.0)] == ["w"]


def test_given_up_after_its_time():
    router = full_router(queue=QueueLimits(ttl_s=5.0))
    router.route(request("w"), 0.0)
    assert 0.0 <= router.next_release_s <= 5.0
    (released,) = router.release(5.0)
    assert released[0].id == "w"
    assert (released[1].reason, released[1].contended) == (RejectReason.TTL_EXPIRED, True)


def test_a_full_queue_refuses_or_sheds_the_less_important():
    router = full_router(queue=QueueLimits(max_depth=2))
    for request_id, priority in (("low", -1), ("mid", 0)):
        assert isinstance(router.route(request(request_id, priority=priority), 0.0), Queued)
    refused = router.route(request("low too", priority=-1), 0.0)
    assert (refused.reason, refused.contended) == (RejectReason.SATURATED, True)
    assert isinstance(router.route(request("high", priority=3), 0.0), Queued)
    assert [(r.id, d.reason) for r, d in router.release(0.0)] == [("low", RejectReason.EVICTED_QUEUE_PRESSURE)]
    assert router.queue.depth == 2


def test_a_tenant_over_its_share_waits_no_more_and_displaces_nobody():
    router = full_router(queue=QueueLimits(max_depth=4, tenant_share=0.5))
    router.route(request("other", priority=-1), 0.0)
    for n in range(2):
        assert isinstance(router.route(request(f"g{n}", tenant="greedy"), 0.0), Queued)
    assert router.route(request("g2", tenant="greedy", priority=5), 0.0).reason is RejectReason.SATURATED
    assert isinstance(router.route(request("modest"), 0.0), Queued)
    assert router.queue.depth == 4


def test_retry_after_follows_the_pace_and_stays_in_bounds():
    router = router_of(cluster({MM: 1}, max_seqs=200), queue=QueueLimits(max_depth=40))
    assert router.retry_after_s == 1.0
    fill(router, 200)
    for n in range(200, 240):
        router.route(request(n, arrival_s=0.0), 0.0)
    for n in range(100):
        router.on_finished(str(n), 10, 2.0 * (n + 1))
    assert router.retry_after_s == 30.0
    waiting = router.queue.depth
    for n in range(100):
        router.on_finished(str(100 + n), 10, 200.0 + 0.1 * (n + 1))
    assert router.retry_after_s == pytest.approx((waiting + 1) * 0.1, rel=0.05)


def test_cancelled_while_waiting():
    router = full_router()
    router.route(request("w"), 0.0)
    router.on_cancelled("w", 0.1)
    router.on_finished("0", 1, 0.2)
    assert router.release(0.2) == []


def test_those_waiting_for_a_model_that_has_gone_are_told():
    router = full_router()
    router.route(request("w"), 0.0)
    router.update(replace(cluster({MM: 1}, model="other"), version=2, pools=()), 1.0)
    assert [(r.id, d.reason) for r, d in router.release(1.0)] == [("w", RejectReason.NO_ENDPOINTS)]


def test_a_new_instance_takes_those_waiting():
    router = full_router()
    router.route(request("w", slo=Slo(50.0, 0.1)), 0.0)
    router.release(0.0)
    router.update(cluster({MM: 2}, version=2, max_seqs=2), 0.01)
    assert [(r.id, d.instance_id) for r, d in router.release(0.01)] == [("w", "MM-1")]


# Failing


def test_a_retry_goes_elsewhere():
    router = router_of(cluster({MM: 2}))
    first = router.route(request("a"), 0.0)
    router.on_failed("a", first.instance_id, 0.1)
    second = router.route(request("a"), 0.1, exclude=frozenset({first.instance_id}))
    assert second.instance_id != first.instance_id
    assert router.traffic.snapshot()[MODEL, MM].arrived == 1


def test_a_retry_with_nowhere_else_is_refused():
    router = router_of(cluster({MM: 1}))
    decision = router.route(request("a"), 0.0, exclude=frozenset({"MM-0"}))
    assert decision.reason is RejectReason.NO_ENDPOINTS


def test_a_retry_that_waits_still_goes_elsewhere():
    router = router_of(cluster({MM: 2}, max_seqs=1))
    fill(router, 2)
    router.route(request("w", slo=Slo(50.0, 0.1)), 0.0, exclude=frozenset({"MM-0"}))
    router.release(0.0)
    router.on_finished("0", 1, 0.01)
    assert router.release(0.01) == []
    assert router.release(1.0) == []
    router.on_finished("1", 1, 1.01)
    assert [d.instance_id for _, d in router.release(1.01)] == ["MM-1"]


def fail_repeatedly(router, instance_id, times, now_s=0.0):
    for n in range(times):
        router.on_failed(f"failed {n}", instance_id, now_s)


def test_failing_instances_are_ejected_probed_and_taken_back():
    router = router_of(cluster({MM: 2}), ejection=EjectionLimits(consecutive_failures=3, base_s=5.0))
    fail_repeatedly(router, "MM-0", 3)
    assert {d.instance_id for d in fill(router, 5)} == {"MM-1"}
    router.on_cancelled("0", 5.0)
    decisions = fill(router, 1, start=100, now_s=5.0)  # its rest is over; packing leaves it alone
    assert decisions[0].instance_id == "MM-1"
    probe = router.route(request("probe", arrival_s=5.0), 5.0, exclude=frozenset({"MM-1"}))
    assert probe == Assigned("MM-0", "MM")
    second = router.route(request("second", arrival_s=5.0), 5.0, exclude=frozenset({"MM-1"}))
    assert isinstance(second, Queued)  # one probe at a time
    router.on_first_token("probe", 5.1)
    assert [r.id for r, _ in router.release(5.1)] == ["second"]


def test_half_of_a_pool_may_be_ejected_not_more():
    router = router_of(cluster({MM: 2}))
    for instance_id in ("MM-0", "MM-1"):
        fail_repeatedly(router, instance_id, 10)
    assert isinstance(router.route(request("a"), 0.0), Assigned)


# What the engines say


def test_load_from_elsewhere_counts_once_confirmed():
    router = router_of(cluster({MM: 1}, max_seqs=10))
    busy = EngineLoad(running=9, waiting=0, kv_cache_usage=0.1)
    router.observe("MM-0", busy, 1.0)
    assert router.fleet.load.in_flight[0] == 0.0  # a scrape may be older than our own count
    router.observe("MM-0", busy, 2.0)
    assert router.fleet.load.in_flight[0] == 9.0
    assert [type(d) for d in fill(router, 2)] == [Assigned, Queued]
    router.observe("MM-0", EngineLoad(running=1, waiting=0, kv_cache_usage=0.0), 3.0)
    assert router.fleet.load.in_flight[0] == 1.0
    assert [r.id for r, _ in router.release(3.0)] == ["1"]


def test_own_requests_are_not_counted_twice():
    router = router_of(cluster({MM: 1}))
    fill(router, 5)
    for n in range(3):
        router.observe("MM-0", EngineLoad(running=4, waiting=1, kv_cache_usage=0.1), float(n))
    assert router.fleet.load.in_flight[0] == 5.0


def test_sleeping_instances_are_given_nothing_until_awake():
    router = router_of(cluster({MM: 2}))
    router.observe("MM-0", EngineLoad(0, 0, 0.0, awake=False), 1.0)
    assert {d.instance_id for d in fill(router, 3)} == {"MM-1"}
    router.observe("MM-0", EngineLoad(0, 0, 0.0, awake=True), 2.0)
    router.update(with_states(cluster({MM: 2}), MM_1=InstanceState.DRAINING), 3.0)
    assert router.route(request("x", arrival_s=3.0), 3.0).instance_id == "MM-0"


def test_observing_what_is_not_there_is_harmless():
    router_of(cluster({MM: 1})).observe("gone", EngineLoad(1, 1, 0.5), 0.0)


# Views


def test_load_survives_a_new_view_and_a_new_clock():
    router = router_of(cluster({MM: 2}))
    fill(router, 5)
    before = router.fleet.load.in_flight[router.fleet.index["MM-0"]]
    view = cluster({SS: 1, MM: 2}, version=2)
    router.update(view, 1.0)
    assert router.fleet.load.in_flight[router.fleet.index["MM-0"]] == before == 5.0
    for n in range(5):
        router.on_finished(str(n), 10, 2.0)
    assert list(router.fleet.load.context_tokens) == [0.0] * 3


def test_an_instance_that_went_and_came_back_comes_back_empty():
    router = router_of(cluster({MM: 2}))
    fill(router, 3)
    router.update(cluster({MM: 0}, version=2), 1.0)
    router.update(cluster({MM: 2}, version=3), 2.0)
    for n in range(3):
        router.on_finished(str(n), 10, 3.0)
    assert router.fleet.load.in_flight == [0.0, 0.0]


def test_an_older_view_is_ignored():
    router = router_of(cluster({MM: 1}, version=5))
    router.update(cluster({SS: 1}, version=4), 1.0)
    assert isinstance(router.route(request("a"), 1.0), Assigned)


def test_two_instances_of_one_id_are_refused():
    view = cluster({MM: 1})
    twice = replace(view, instances=(instance_view("x", "MM"), instance_view("x", "MM")))
    with pytest.raises(ValueError, match="two instances have one id"):
        Router().update(twice, 0.0)


def test_traffic_counts_what_came_and_went():
    router = router_of(cluster({MM: 1}))
    fill(router, 3)
    router.on_finished("0", 50, 1.0)
    router.on_finished("0", 50, 1.0)  # told twice, counted once
    counted = router.traffic.snapshot()[MODEL, RequestClass.MM]
    assert (counted.arrived, counted.input_tokens, counted.finished, counted.output_tokens) == (3, 1500, 1, 50)


def test_unknown_requests_are_ignored():
    router = router_of(cluster({MM: 1}))
    router.on_first_token("x", 0.0)
    router.on_finished("x", 1, 0.0)
    router.on_cancelled("x", 0.0)
    router.on_failed("x", "gone", 0.0)
    assert isinstance(router.route(request("a"), 0.0), Assigned)


def test_rejections_are_values_with_a_hint():
    router = full_router(queue=QueueLimits(max_depth=0))
    decision = router.route(request("x"), 0.0)
    assert isinstance(decision, Rejected)
    assert 1.0 <= decision.retry_after_s <= 30.0
