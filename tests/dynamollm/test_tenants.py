"""Tenant limits: a minute at a time, over all gateways, without asking anybody on the way."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamollm.tenants import MOST_TENANTS, OTHER, LimitedRouter, TenantLimit
from pools.classes import RequestClass, Slo
from pools.request import Assigned, Rejected, RejectReason, Request

OFFSET_S = 6_000_000.0  # a whole number of minutes


def request(tenant: str = "acme") -> Request:
    return Request("r", "m", 0.0, 10, 10.0, RequestClass.SS, Slo(0.25, 0.1), tenant=tenant)


class Anywhere:
    """A router with room for everybody."""

    def __init__(self) -> None:
        self.routed: list[tuple[str, frozenset[str]]] = []
        self.release = self.escalate = self.on_first_token = self.on_finished = None
        self.on_failed = self.on_cancelled = None

    def route(self, request: Request, now_s: float, exclude: frozenset[str] = frozenset()) -> Assigned:
        self.routed.append((request.tenant, exclude))
        return Assigned("i", "p")


def test_a_tenant_over_its_limit_waits_for_the_next_minute_and_others_do_not():
    limit = TenantLimit(3.0, OFFSET_S)
    assert [limit.retry_after_s("acme", 10.0) for _ in range(4)] == [0.0, 0.0, 0.0, 50.0]
    assert limit.retry_after_s("other", 10.0) == 0.0
    assert limit.retry_after_s("acme", 60.0) == 0.0


def test_what_the_others_counted_in_this_minute_counts():
    limit = TenantLimit(3.0, OFFSET_S)
    minute = int(OFFSET_S // 60)
    limit.hear([(minute, {"acme": 1.0, "b": 9.0}), (minute, {"acme": 1.0}), (minute - 1, {"acme": 50.0})], 1.0)
    assert [limit.retry_after_s("acme", 10.0) for _ in range(2)] == [0.0, 50.0]
    limit.hear([(minute, {"acme": 1.0})], 61.0)  # a late report of the minute before
    assert limit.retry_after_s("acme", 61.0) == 0.0


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=1, max_size=60), st.integers(1, 10), st.integers(1, 5))
def test_the_limit_is_exceeded_by_no_more_than_what_came_between_two_reports(turns, most, every):
    gateways = [TenantLimit(float(most), OFFSET_S) for _ in range(3)]
    admitted = 0
    for n, turn in enumerate(turns):
        if n % every == 0:
            told = [(gateway.minute, dict(gateway.own)) for gateway in gateways]
            for k, gateway in enumerate(gateways):
                gateway.hear(told[:k] + told[k + 1 :], 1.0)
        admitted += gateways[turn].retry_after_s("acme", 1.0) == 0.0
    assert admitted <= most + every
    assert admitted >= min(most, len(turns)) / 3


def test_tenants_beyond_a_bound_are_counted_as_one():
    limit = TenantLimit(2.0, OFFSET_S)
    for n in range(MOST_TENANTS):
        assert limit.retry_after_s(f"t{n}", 1.0) == 0.0
    assert [limit.retry_after_s(f"u{n}", 1.0) > 0.0 for n in range(3)] == [False, False, True]
    assert len(limit.own) == MOST_TENANTS + 1
    assert limit.own[OTHER] == 2.0


def test_the_router_is_asked_for_those_within_and_a_retry_is_not_counted_again():
    router = Anywhere()
    limited = LimitedRouter(router, TenantLimit(1.0, OFFSET_S))
    assert limited.route(request(), 5.0) == Assigned("i", "p")
    assert limited.route(request(), 5.0, frozenset({"i"})) == Assigned("i", "p")
    refused = limited.route(request(), 5.0)
    assert refused == Rejected(RejectReason.SATURATED, contended=True, retry_after_s=pytest.approx(55.0))
    assert [exclude for _, exclude in router.routed] == [frozenset(), frozenset({"i"})]
