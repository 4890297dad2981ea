"""Commanders over one store, in virtual time: one leads, another follows within its lease, a plan is held meanwhile."""

import asyncio
from typing import Any

import httpx
import numpy as np
from fastapi import FastAPI
from fastapi.testclient import TestClient
from prometheus_client import CollectorRegistry

from dynamollm.adapters import admin_relay
from dynamollm.adapters.sqlite_store import SqliteStore
from dynamollm.collected import Collected
from dynamollm.commander import Commander
from dynamollm.controller_app import controller_app
from dynamollm.leadership import Candidate
from dynamollm.load_history import LoadHistory
from dynamollm.reports import CONTROLLERS, GATEWAYS, LOAD, ControllerReport, GatewayReport, document, read
from dynamollm.sharing_metrics import CommanderMetrics
from proxy.app import error_response
from proxy.errors import ApiError
from simulator.virtual_loop import run
from solver.control import Demand, Observation

DEMANDS = 9
LEASE_S = 2.0


class FlakyStore(SqliteStore):
    away = False

    async def _run(self, work: Any) -> Any:
        if self.away:
            raise OSError("the store is away")
        return await super()._run(work)


class ShortTerm:
    """A term that remembers when it was in command."""

    def __init__(self, epoch: int, fails_after_s: float = float("inf")) -> None:
        self.epoch = epoch
        self.booked = {"g0": epoch}
        self.running = False
        self._fails_after_s = fails_after_s

    async def run(self) -> None:
        self.running = True
        try:
            await asyncio.sleep(self._fails_after_s)
            raise RuntimeError("no driver")
        finally:
            self.running = False


class Node:
    """One controller process."""

    def __init__(self, name: str, store: SqliteStore, fails_after_s: float = float("inf")) -> None:
        now = asyncio.get_running_loop().time
        self.terms: list[ShortTerm] = []
        self.warmed = 0
        self.history = LoadHistory()
        self.candidate = Candidate(store, name, LEASE_S, now)

        async def begin(epoch: int) -> ShortTerm:
            self.terms.append(ShortTerm(epoch, fails_after_s))
            return self.terms[-1]

        async def warm() -> None:
            self.warmed += 1

        self.commander: Commander[ShortTerm] = Commander(
            store, self.candidate, Collected(), self.history, DEMANDS, observed, begin, warm, now, 0.0
        )
        self.commander.url = f"http://{name}"
        self.task = asyncio.create_task(self.commander.run())

    @property
    def leads(self) -> bool:
        return bool(self.terms) and self.terms[-1].running

    async def end(self) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)


def observed(now_s: float) -> Observation:
    cluster: Any = None  # nobody looks
    columns = [np.full(DEMANDS, 2.0) for _ in range(4)]
    return Observation(now_s, cluster, Demand(5.0, *columns))


async def nothing() -> None:
    """What one that is killed gives back."""


def test_one_leads_and_the_other_follows_when_it_falls_silent():
    async def main() -> None:
        store = FlakyStore(clock=asyncio.get_running_loop().time)
        one = Node("one", store)
        await asyncio.sleep(0.1)
        other = Node("other", store)
        await asyncio.sleep(10.0)
        assert (one.leads, other.leads) == (True, False)
        one.candidate.release = nothing
        await one.end()
        await asyncio.sleep(LEASE_S + LEASE_S / 4 + 0.1)
        assert other.leads
        assert [term.epoch for term in (*one.terms, *other.terms)] == [1, 2]
        await other.end()

    run(main())


def test_one_that_is_told_to_end_lets_the_other_begin_at_once():
    async def main() -> None:
        store = FlakyStore(clock=asyncio.get_running_loop().time)
        one, other = Node("one", store), Node("other", store)
        await asyncio.sleep(3.0)
        first, second = (one, other) if one.leads else (other, one)
        await first.end()
        await asyncio.sleep(LEASE_S / 4 + 0.1)
        assert second.leads
        await second.end()

    run(main())


def test_while_the_store_is_away_the_term_goes_on_and_is_not_in_command():
    async def main() -> None:
        store = FlakyStore(clock=asyncio.get_running_loop().time)
        one = Node("one", store)
        await asyncio.sleep(2.0)
        store.away = True
        await asyncio.sleep(30.0)
        assert one.leads
        assert not one.candidate.leads
        store.away = False
        await asyncio.sleep(1.0)
        assert one.candidate.leads
        assert [term.epoch for term in one.terms] == [1]
        assert one.warmed == 1
        await one.end()

    run(main())


def test_a_gateway_that_follows_a_higher_epoch_makes_it_begin_anew_above_that():
    async def main() -> None:
        store = FlakyStore(clock=asyncio.get_running_loop().time)
        one = Node("one", store)
        await asyncio.sleep(2.0)
        ahead = GatewayReport(1.0, follows=(7, 3))
        await store.report(GATEWAYS, "g", document(ahead), 60.0)
        await asyncio.sleep(2.0)
        assert [term.epoch for term in one.terms] == [1, 8]
        assert one.leads
        await one.end()

    run(main())


def test_one_that_cannot_command_gives_the_lease_to_the_other():
    async def main() -> None:
        store = FlakyStore(clock=asyncio.get_running_loop().time)
        broken = Node("broken", store, fails_after_s=1.0)
        await asyncio.sleep(0.5)
        other = Node("other", store)
        await asyncio.sleep(10.0)
        assert other.leads
        assert broken.warmed >= 2
        for node in (broken, other):
            await node.end()

    run(main())


def test_gateways_learn_who_leads_and_what_is_booked():
    async def main() -> None:
        store = FlakyStore(clock=asyncio.get_running_loop().time)
        one = Node("one", store)
        await asyncio.sleep(0.1)
        other = Node("other", store)
        await asyncio.sleep(2.0)
        told = {name: read(each, ControllerReport) for name, each in (await store.reports(CONTROLLERS)).items()}
        assert told == {
            "one": ControllerReport("http://one", 1, {"g0": 1}),
            "other": ControllerReport("http://other", 0, {}),
        }
        for node in (one, other):
            await node.end()

    run(main())


def test_a_standby_knows_the_load_it_saw_and_what_the_leader_wrote_before():
    async def main() -> None:
        store = FlakyStore(clock=asyncio.get_running_loop().time)
        one = Node("one", store)
        await asyncio.sleep(1.0)
        for n in range(30):  # what a term's control loop observes
            one.history.add(5.0 * (n + 1), observed(0.0).demand)
        await asyncio.sleep(10.0)
        assert [entry["window_s"] for _, entry in await store.entries(LOAD)] == [150.0]
        other = Node("other", store)
        await asyncio.sleep(21.0)
        windows = other.history.windows
        assert [window.demand.window_s for window in windows] == [150.0, 5.0, 5.0, 5.0, 5.0, 5.0]
        for node in (one, other):
            await node.end()

    run(main())


def test_a_controller_that_stands_by_says_so_and_a_gateway_asks_the_one_that_leads(monkeypatch):
    async def main() -> Commander[Any]:
        node = Node("one", FlakyStore(clock=asyncio.get_running_loop().time))
        await asyncio.sleep(1.0)
        await node.end()
        return node.commander

    commander: Any = run(main())
    commander.term = None
    registry = CollectorRegistry()
    registry.register(CommanderMetrics(commander))
    client = TestClient(controller_app(commander, ("secret",), registry))
    assert client.get("/health").status_code == client.get("/ready").status_code == 200
    assert "dynamollm_controller_leads 0.0" in client.get("/metrics").text
    assert client.get("/admin/status").status_code == 401
    stands_by = client.get("/admin/status", headers={"authorization": "Bearer secret"})
    assert stands_by.status_code == 503
    assert stands_by.json()["error"]["type"] == "not_leading"

    leader = [""]
    gateway = FastAPI()
    gateway.add_exception_handler(ApiError, lambda request, error: error_response(error))  # type: ignore[arg-type]
    gateway.include_router(admin_relay.admin_relay(lambda: leader[0]), prefix="/admin")
    asked: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        if request.url.host == "dead":
            raise httpx.ConnectError("refused")
        return httpx.Response(418, json={"at": str(request.url)})

    class Client(httpx.AsyncClient):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options, transport=httpx.MockTransport(answer))

    monkeypatch.setattr(admin_relay.httpx, "AsyncClient", Client)
    through = TestClient(gateway)
    assert through.get("/admin/status").status_code == 503
    leader[0] = "http://dead:1"
    assert "does not answer" in through.get("/admin/status").json()["error"]["message"]
    leader[0] = "http://leader:1"
    relayed = through.get("/admin/energy?since_s=60", headers={"authorization": "Bearer k"})
    assert (relayed.status_code, relayed.json()) == (418, {"at": "http://leader:1/admin/energy?since_s=60"})
    assert asked[-1].headers["authorization"] == "Bearer k"
    through.post("/admin/policy", json={"policy": "static"})
    assert (asked[-1].method, asked[-1].content) == ("POST", b'{"policy":"static"}')
