"""Gateways and the published cluster over one store, in virtual time: following, telling, drains, outages."""

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import pytest

from dynamollm.adapters.configuration import load
from dynamollm.adapters.sqlite_store import SqliteStore
from dynamollm.collected import Collected
from dynamollm.deployment import Deployment
from dynamollm.ledger_feed import LedgerFeed
from dynamollm.publishing import REFRESH_S, PublishedFleet
from dynamollm.replica import REPORT_TTL_S, Replica
from dynamollm.reports import CLUSTER, CONTROLLERS, GATEWAYS, LEDGER, ControllerReport, GatewayReport, document, read
from dynamollm.settings import Settings
from dynamollm.store import NEVER, Document, Stamp
from dynamollm.tenants import TenantLimit
from dynamollm.wiring import load_profiles
from energy.accounting import User
from energy.adapters.catalogue import load_profile
from pools.classes import RequestClass, Slo
from pools.drivers.port import InstanceEvent
from pools.instances import Instance, InstanceState
from pools.request import Assigned, Queued, RejectReason, Request
from pools.router import Router
from simulator.virtual_loop import run

MODEL = "llama-3.1-70b"
SETTINGS = load(None, {})
PROFILES = {MODEL: load_profile("llama-3.1-70b-fp8-h100")}
OFFSET_S = 1_700_000_000.0


class FlakyStore(SqliteStore):
    """A store that can be away, and can forget all it knew."""

    away = False

    async def _run(self, work: Any) -> Any:
        if self.away:
            raise OSError("the store is away")
        return await super()._run(work)

    async def nudged(self, timeout_s: float) -> None:
        await asyncio.sleep(timeout_s)

    async def forget(self) -> None:
        await self.close()


class World:
    """One controller's side, and some gateways."""

    def __init__(self, gateways: int = 2, tenant_limit: float | None = None) -> None:
        self.now = asyncio.get_running_loop().time
        self.store = FlakyStore(clock=self.now)
        self.collected = Collected()
        self.deployment = Deployment(SETTINGS, PROFILES)
        self.superseded: list[int] = []
        self.fleet = self.lead(1)
        self.replicas = [self._replica(f"g{n}", tenant_limit) for n in range(gateways)]
        for spec in self.deployment.configured():
            self.deployment.put(
                Instance(spec.id, spec.pool, spec.shape, "http://h:1", InstanceState.READY, 1980, spec.gpus)
            )
        self.show()

    def lead(self, epoch: int) -> PublishedFleet:
        return PublishedFleet(
            f"c{epoch}",
            epoch,
            self.store,
            self.deployment,
            self.collected,
            lambda: self.now() + OFFSET_S,
            self.superseded.append,
        )

    def _replica(self, name: str, tenant_limit: float | None) -> Replica:
        deployment, router, feed = Deployment(SETTINGS, PROFILES), Router(), LedgerFeed(OFFSET_S)
        limit = TenantLimit(tenant_limit, OFFSET_S) if tenant_limit else None
        replica = Replica(name, self.store, deployment, router, feed, limit, load_profiles, self.now, OFFSET_S)
        replica.parts = deployment, router, feed, limit  # type: ignore[attr-defined]
        return replica

    def show(self) -> None:
        self.fleet.update(self.deployment.routing_view(self.now()), self.now())

    async def hear(self) -> None:
        """What the commander does four times a second."""
        try:
            plain = await self.store.reports(GATEWAYS)
        except OSError:
            self.collected.lost()
        else:
            self.collected.take({name: read(each, GatewayReport) for name, each in plain.items()})


def play(scenario: Callable[[World], Awaitable[None]], **options: Any) -> World:
    async def main() -> World:
        world = World(**options)

        async def hearing() -> None:
            while True:
                await world.hear()
                await asyncio.sleep(0.25)

        tasks = [asyncio.create_task(each) for each in (world.fleet.run(), hearing())]
        tasks += [asyncio.create_task(replica.run()) for replica in world.replicas]
        try:
            await asyncio.sleep(1.0)
            await scenario(world)
        finally:
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, asyncio.CancelledError) for result in results), results
        return world

    return run(main())


def request(name: str, now_s: float, tenant: str = "acme") -> Request:
    return Request(name, MODEL, now_s, 100, 50.0, RequestClass.SS, Slo(2.0, 0.1), tenant=tenant)


def send(replica: Replica, name: str, now_s: float) -> str:
    _, router, feed, _ = replica.parts  # type: ignore[attr-defined]
    decision = router.route(request(name, now_s), now_s)
    assert isinstance(decision, Assigned)
    feed.began(name, User(MODEL, decision.pool, "SS", "acme"), decision.instance_id, 100, now_s)
    return decision.instance_id


def finish(replica: Replica, name: str, now_s: float) -> None:
    _, router, feed, _ = replica.parts  # type: ignore[attr-defined]
    router.on_finished(name, 50, now_s)
    feed.ended(name, now_s, 100, 50)


def test_gateways_follow_what_is_published_and_route_to_it():
    async def scenario(world: World) -> None:
        for replica in world.replicas:
            async with asyncio.timeout(1.0):
                await replica.following()
            assert send(replica, "a", world.now()) == "ss-1"
            assert replica.parts[0].instances == world.deployment.instances
        world.deployment.change(InstanceEvent("ss-1", InstanceState.FAILED))
        world.show()
        await asyncio.sleep(1.0)
        assert all(send(replica, "b", world.now()) != "ss-1" for replica in world.replicas)

    play(scenario)


def test_gateways_price_by_the_profiles_the_leader_plans_with_as_far_as_they_have_them(caplog):
    def named(profile: str) -> Settings:
        return dataclasses.replace(SETTINGS, models=(dataclasses.replace(SETTINGS.models[0], profile=profile),))

    async def scenario(world: World) -> None:
        deployments = [replica.parts[0] for replica in world.replicas]
        steps = [deployment.routing_view(world.now()).instances[0].step for deployment in deployments]
        other = named("llama-2-70b-h100")
        world.deployment.reconfigure(other, load_profiles(other))
        world.show()
        await asyncio.sleep(1.0)
        for deployment, before in zip(deployments, steps, strict=True):
            assert deployment.settings == other
            after = deployment.routing_view(world.now()).instances[0].step
            assert after != before
            assert after == world.deployment.routing_view(world.now()).instances[0].step
        world.deployment.reconfigure(named("gpt-9"), world.deployment.profiles)
        world.deployment.change(InstanceEvent("ss-1", InstanceState.STOPPED))
        for _ in range(3):
            world.show()
            await asyncio.sleep(1.0)
        assert all(deployment.settings == other for deployment in deployments)
        assert all(deployment.instances == world.deployment.instances for deployment in deployments)
        assert not any(replica.store_away for replica in world.replicas)
        assert caplog.text.count("goes on with the profiles it has") == len(deployments), "said once by each"

    play(scenario)


def test_gateways_let_requests_wait_for_an_instance_that_the_leader_has_ordered():
    async def scenario(world: World) -> None:
        starts = [("new-1", "SS")]
        for name in tuple(world.deployment.instances):
            world.deployment.change(InstanceEvent(name, InstanceState.STOPPED))
        world.deployment.expect(starts)
        world.show()
        await asyncio.sleep(1.0)
        routers = [replica.parts[1] for replica in world.replicas]
        assert [router.route(request("a", world.now()), world.now()) for router in routers] == [Queued(1)] * 2
        world.deployment.expect_no_more(starts)
        world.show()
        await asyncio.sleep(1.0)
        reasons = {router.route(request("b", world.now()), world.now()).reason for router in routers}
        assert reasons == {RejectReason.NO_ENDPOINTS}

    play(scenario)


def test_what_a_leader_of_before_publishes_is_refused_and_it_learns_of_its_successor():
    async def scenario(world: World) -> None:
        follows = world.replicas[0].follows
        assert follows[0] == 1
        successor = world.lead(2)
        successor.update(world.deployment.routing_view(world.now()), world.now())
        leading = asyncio.create_task(successor.run())
        await asyncio.sleep(1.0)
        assert {replica.follows[0] for replica in world.replicas} == {2}
        world.show()  # the old one has not noticed yet
        await asyncio.sleep(1.0)
        assert world.superseded == [2]
        assert {replica.follows[0] for replica in world.replicas} == {2}
        leading.cancel()

    play(scenario)


def test_a_stale_document_that_a_forgetful_store_holds_is_not_followed():
    async def scenario(world: World) -> None:
        await asyncio.sleep(3 * REFRESH_S)
        follows = world.replicas[0].follows
        assert follows > (1, 1)
        await world.store.forget()
        await world.store.publish(CLUSTER, {"instances": [], "stale": True}, (1, 0))
        await asyncio.sleep(0.6)
        assert world.replicas[0].follows == follows
        await asyncio.sleep(2 * REFRESH_S)
        assert world.replicas[0].follows > follows, "the leader tells it again"

    play(scenario)


def test_gateways_hear_what_the_others_have_on_each_instance():
    async def scenario(world: World) -> None:
        one, other = world.replicas
        instance_id = send(one, "a", world.now())
        await asyncio.sleep(0.6)
        load = other.parts[1].fleet.load
        index = other.parts[1].fleet.index[instance_id]
        assert load.in_flight[index] == 1.0
        assert (one.peers, other.peers) == (1, 1)
        assert world.collected.in_flight(instance_id) == 1
        finish(one, "a", world.now())
        await asyncio.sleep(0.6)
        assert load.in_flight[index] == 0.0

    play(scenario)


def test_a_drain_waits_until_no_gateway_can_have_or_send_anything_there():
    async def scenario(world: World) -> None:
        instance_id = send(world.replicas[0], "a", world.now())
        await asyncio.sleep(0.8)
        world.deployment.change(InstanceEvent(instance_id, InstanceState.DRAINING))
        world.show()
        assert world.fleet.in_flight(instance_id) == 3, "one request, two gateways that do not know yet"
        await asyncio.sleep(1.5)
        assert world.fleet.in_flight(instance_id) == 1
        world.store.away = True
        finish(world.replicas[0], "a", world.now())
        await asyncio.sleep(20.0)
        assert world.fleet.in_flight(instance_id) >= 1, "nobody says that it is over"
        world.store.away = False
        await asyncio.sleep(1.0)
        assert world.fleet.in_flight(instance_id) == 0

    play(scenario)


def test_while_the_store_is_away_gateways_serve_on_and_forget_the_others_load():
    async def scenario(world: World) -> None:
        one, other = world.replicas
        instance_id = send(one, "a", world.now())
        await asyncio.sleep(0.6)
        world.store.away = True
        await asyncio.sleep(REPORT_TTL_S + 1.0)
        assert one.store_away
        assert other.parts[1].fleet.own() == {}
        index = other.parts[1].fleet.index[instance_id]
        assert other.parts[1].fleet.load.in_flight[index] == 0.0
        assert send(other, "b", world.now()) == instance_id
        world.store.away = False
        await asyncio.sleep(1.0)
        assert not one.store_away
        assert one.parts[1].fleet.load.in_flight[index] == 2.0

    play(scenario)


def test_what_the_ledger_is_owed_arrives_after_an_outage_and_is_let_go_when_booked():
    async def entries(world: World) -> list[tuple[str, Document]]:
        return await world.store.entries(LEDGER)

    async def scenario(world: World) -> None:
        one, _ = world.replicas
        world.store.away = True
        for n in range(5):
            send(one, f"r{n}", world.now())
            finish(one, f"r{n}", world.now())
            await asyncio.sleep(1.0)
        world.store.away = False
        await asyncio.sleep(1.0)
        batches = [batch for _, batch in await entries(world)]
        assert [batch["number"] for batch in batches] == [1, 2, 3, 4, 5]
        assert sum(entry[0] == "e" for batch in batches for entry in batch["entries"]) == 5
        feed = one.parts[2]
        assert feed.backlog == 10
        leader = ControllerReport("http://leader", 3, {"g0": 5})
        standby = ControllerReport("http://standby", 0)
        await world.store.report(CONTROLLERS, "s", document(standby), 60.0)
        await world.store.report(CONTROLLERS, "l", document(leader), 60.0)
        await asyncio.sleep(1.0)
        assert feed.backlog == 0
        assert one.controller_url == "http://leader"

    play(scenario)


def test_a_tenant_is_limited_over_all_gateways():
    async def scenario(world: World) -> None:
        limits = [replica.parts[3] for replica in world.replicas]
        for _ in range(3):
            assert limits[0].retry_after_s("acme", world.now()) == 0.0
        await asyncio.sleep(0.6)
        assert limits[1].retry_after_s("acme", world.now()) > 0.0

    play(scenario, tenant_limit=3.0)


def test_a_report_tells_demand_load_and_the_worst_use_of_slos_for_a_while():
    async def scenario(world: World) -> None:
        one = world.replicas[0]
        instance_id = send(one, "a", world.now())
        one.on_share(instance_id, 0.4, 0)
        one.on_share(instance_id, 1.7, 1)
        one.on_share(instance_id, 0.5, 0)
        one.on_share("gone", 1.5, 1)
        report = one.report(world.now())
        assert [(t.arrived, t.input_tokens, t.request_class) for t in report.totals] == [(1, 100, RequestClass.SS)]
        assert report.loads[instance_id].in_flight == 1.0
        assert report.given[instance_id][RequestClass.SS] == 1
        assert report.shares == {instance_id: 1.7, "gone": 1.5}
        assert report.late == {instance_id: 1, "gone": 1}
        assert report.follows == one.follows != NEVER
        await asyncio.sleep(12.0)
        later = one.report(world.now())
        assert later.shares == {}
        assert later.late == {instance_id: 1}  # ever, but of those that are there

    play(scenario)


class Recorded(SqliteStore):
    """Remembers what was published."""

    def __init__(self, clock: Callable[[], float]) -> None:
        super().__init__(clock=clock)
        self.stamps: list[Stamp] = []

    async def publish(self, name: str, document: Mapping[str, Any], stamp: Stamp) -> bool:
        self.stamps.append(stamp)
        return await super().publish(name, document, stamp)


def test_versions_rise_and_changes_that_come_together_are_published_once():
    async def main() -> Sequence[Stamp]:
        now = asyncio.get_running_loop().time
        store, deployment = Recorded(now), Deployment(SETTINGS, PROFILES)
        fleet = PublishedFleet("c", 4, store, deployment, Collected(), now, lambda epoch: None)
        for _ in range(3):
            fleet.update(deployment.routing_view(now()), now())
        task = asyncio.create_task(fleet.run())
        await asyncio.sleep(0.1)
        fleet.update(deployment.routing_view(now()), now())
        await asyncio.sleep(2.5 * REFRESH_S)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return store.stamps

    assert run(main()) == [(4, 3), (4, 4), (4, 5), (4, 6)]
