"""The ledger hears of every request, through the router the gateway uses and the outcomes it observes."""

import pytest

from dynamollm.accounts import AccountedRouter, GatewayAccounts
from energy.accounting import Interval, MeteredInstance, Prices, Use
from energy.accounting_ledger import EnergyLedger
from energy.adapters.catalogue import load_profile
from energy.carbon import StaticIntensity
from pools.classes import RequestClass, Slo
from pools.request import Assigned, Queued, Rejected, RejectReason, Request
from proxy.outcome import Outcome

C = load_profile("llama-3.1-70b-fp8-h100").step(4, 1980)
INSTANCE = MeteredInstance("i-1", "LL", "llama", "H100-SXM", 4, Use.IDLE, C.idle_w, C)


class ScriptedRouter:
    def __init__(self):
        self.calls = []
        self.decision = Assigned("i-1", "LL")
        self.released = []

    def route(self, request, now_s, exclude=frozenset()):
        self.calls.append(("route", request.id, exclude))
        return self.decision

    def release(self, now_s):
        return self.released

    def __getattr__(self, name):
        return lambda *arguments: self.calls.append((name, *arguments))


@pytest.fixture
def router():
    return ScriptedRouter()


@pytest.fixture
def ledger():
    ledger = EnergyLedger(StaticIntensity(100.0, "test"), Prices(), 0.0)
    ledger.metered(Interval(INSTANCE, -1.0, 0.0, 500.0))
    return ledger


def request_of(request_id, tenant="alice"):
    return Request(request_id, "llama", 0.0, 600, 100.0, RequestClass.MM, Slo(0.4, 0.1), tenant=tenant)


def outcome_of(request, ended_s=3.0):
    return Outcome(request, None, 200, "i-1", "LL", ended_s, 1.0, 640, 80, False)


def rows_of(ledger):
    return {(row.user.request_class, row.user.tenant): row.row for row in ledger.window(100.0, 60.0).rows}


def test_a_request_is_booked_on_who_sent_it_where_it_ran(router, ledger):
    accounted, accounts = AccountedRouter(router, ledger), GatewayAccounts(ledger)
    request = request_of("r")
    assert accounted.route(request, 0.0, frozenset({"i-9"})) == Assigned("i-1", "LL")
    accounted.on_first_token("r", 0.5)
    accounted.on_finished("r", 80, 3.0)
    told_j = accounts.energy_j(outcome_of(request))
    accounts.book(outcome_of(request))
    assert told_j > 0.0
    assert accounts.energy_j(outcome_of(request)) is None
    ledger.metered(Interval(INSTANCE, 0.0, 4.0, 6000.0))
    ledger.settle(20.0)
    row = rows_of(ledger)["MM", "alice"]
    assert (row.requests, row.input_tokens, row.output_tokens) == (1, 640, 80)
    assert row.decode_j > row.prefill_j > 0.0
    assert router.calls == [
        ("route", "r", frozenset({"i-9"})),
        ("on_first_token", "r", 0.5),
        ("on_finished", "r", 80, 3.0),
    ]


def test_one_that_waited_begins_when_it_is_released(router, ledger):
    accounted, accounts = AccountedRouter(router, ledger), GatewayAccounts(ledger)
    router.decision = Queued(1)
    waiting, late = request_of("waiting"), request_of("late")
    accounted.route(waiting, 0.0)
    accounted.route(late, 0.0)
    assert accounts.energy_j(outcome_of(waiting)) is None
    router.released = [
        (waiting, Assigned("i-1", "LL")),
        (late, Rejected(RejectReason.TTL_EXPIRED, contended=True, retry_after_s=1.0)),
    ]
    assert accounted.release(2.0) == router.released
    assert accounts.energy_j(outcome_of(waiting)) > 0.0
    assert accounts.energy_j(outcome_of(late)) is None
    accounts.book(outcome_of(late))
    assert sum(row.requests for row in rows_of(ledger).values()) == 0


def test_more_tenants_than_are_remembered_are_told_apart(router, ledger):
    accounted, accounts = AccountedRouter(router, ledger), GatewayAccounts(ledger)
    for n in range(5000):
        request = request_of(f"r{n}", tenant=f"t{n % 4500}" if n else "alice")
        accounted.route(request, 1.0)
        accounts.book(outcome_of(request, 2.0))
    rows = rows_of(ledger)
    assert (rows["MM", "alice"].requests, rows["MM", "t1"].requests) == (1, 2)
    assert sum(row.requests for row in rows.values()) == 5000
