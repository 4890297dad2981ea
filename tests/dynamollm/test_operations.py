"""Operations over a driver in memory, in virtual time: no request harmed, nothing done twice, deadlines kept."""

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest

from dynamollm.adapters.configuration import load
from dynamollm.deployment import Deployment
from dynamollm.operations import Operations, Outcome
from dynamollm.runner import Runner
from energy.adapters.catalogue import load_profile
from pools.classes import RequestClass, Slo
from pools.drivers.fake import FakeDriver
from pools.drivers.port import DriverError
from pools.instances import InstanceState
from pools.request import Assigned, Queued, Rejected, RejectReason, Request
from pools.router import Router as RealRouter
from pools.view import ClusterView, EngineLoad
from simulator.virtual_loop import run
from solver.control import Park, Reassign, Reshard, Route, ScaleIn, ScaleOut, SetFrequency, Wake


class Router:
    """Counts what the tests say is in flight, and remembers every view."""

    def __init__(self) -> None:
        self.view: ClusterView | None = None
        self.held: dict[str, int] = {}
        self.history: list[dict[str, InstanceState]] = []

    def update(self, view: ClusterView, now_s: float) -> None:
        self.view = view
        self.history.append({v.instance.id: v.instance.state for v in view.instances})

    def observe(self, instance_id: str, load: EngineLoad, now_s: float) -> None:
        pass

    def in_flight(self, instance_id: str) -> int:
        return self.held.get(instance_id, 0)


class Probe:
    async def load(self, url: str) -> EngineLoad:
        return EngineLoad(0, 0, 0.0)


class World:
    routes: type[Any] = Router

    def __init__(self) -> None:
        settings = load(None, {})
        self.deployment = Deployment(settings, {"llama-3.1-70b": load_profile("llama-3.1-70b-fp8-h100")})
        self.clocks = self.deployment.profiles["llama-3.1-70b"].sm_clocks_mhz
        self.driver = FakeDriver(self.deployment.placement.nodes, self.clocks)
        self.router = self.routes()
        self.loop = asyncio.get_running_loop()
        self.runner = Runner(self.deployment, self.driver, self.router, Probe(), self.loop.time)
        self.operations = Operations(self.deployment, self.driver, self.runner, self.loop.time)

    def state(self, instance_id: str) -> InstanceState | None:
        instance = self.deployment.instances.get(instance_id)
        return instance.state if instance else None

    def outcomes(self) -> list[Outcome]:
        return [record.outcome for record in self.operations.records]


def in_world(scenario: Callable[[World], Awaitable[None]], kind: type[World] = World) -> World:
    async def main() -> World:
        world = kind()
        running = asyncio.create_task(world.runner.run())
        await world.runner.settled()
        await scenario(world)
        await world.operations.close()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        return world

    return run(main())


def free_node(world: World) -> str:
    """A node with two GPUs free: 30 of 32 are taken by the configured pools."""
    return next(node for node in world.deployment.placement.nodes if world.deployment.placement.free_gpus(node) >= 2)


def scale_out(world: World, instance_id: str = "new-1", **changes: object) -> ScaleOut:
    order = ScaleOut(
        deadline_s=world.loop.time() + 60,
        instance_id=instance_id,
        pool="SS",
        tp=2,
        sm_clock_mhz=world.clocks[-1],
        node=free_node(world),
    )
    return dataclasses.replace(order, **changes)


def halved(world: World) -> Reshard:
    """The order to make two TP4 of the TP8 there is, on its GPUs."""
    node, end_s = world.deployment.instances["ll-1"].gpus[0].node, world.loop.time() + 300
    create = tuple(scale_out(world, f"small-{k}", pool="LL", tp=4, node=node, deadline_s=end_s) for k in range(2))
    return Reshard(deadline_s=end_s, retire=("ll-1",), create=create)


def test_scaling_out_starts_the_instance_where_it_was_told_to():
    async def scenario(world: World) -> None:
        node = free_node(world)
        world.operations.apply([scale_out(world)])
        await world.operations.settled()
        assert world.state("new-1") is InstanceState.READY
        assert {gpu.node for gpu in world.deployment.instances["new-1"].gpus} == {node}
        assert world.outcomes() == [Outcome.DONE]

    in_world(scenario)


def test_the_same_order_twice_starts_one_instance():
    async def scenario(world: World) -> None:
        order = scale_out(world)
        world.operations.apply([order, order])
        await world.operations.settled()
        assert world.outcomes() == [Outcome.DONE, Outcome.DONE]
        assert sum(i.pool == "SS" for i in world.deployment.instances.values()) == 2

    in_world(scenario)


def test_scaling_in_waits_for_every_request_and_routes_nothing_new_there():
    async def scenario(world: World) -> None:
        world.router.held["ss-1"] = 3
        world.operations.apply([ScaleIn(deadline_s=600.0, instance_id="ss-1")])
        await asyncio.sleep(300)
        assert world.state("ss-1") is InstanceState.DRAINING
        assert world.router.history[-1]["ss-1"] is InstanceState.DRAINING
        world.router.held["ss-1"] = 0
        await world.operations.settled()
        assert world.state("ss-1") is None
        assert (
            world.deployment.placement.free_gpus("h100-0")
            + sum(world.deployment.placement.free_gpus(n) for n in ("h100-1", "h100-2", "h100-3"))
            == 4
        )

    in_world(scenario)


def test_a_drain_that_takes_too_long_is_abandoned_and_the_instance_serves_on():
    async def scenario(world: World) -> None:
        world.router.held["ss-1"] = 1
        world.operations.apply([ScaleIn(deadline_s=world.loop.time() + 30, instance_id="ss-1")])
        await world.operations.settled()
        assert world.state("ss-1") is InstanceState.READY
        assert world.outcomes() == [Outcome.ABANDONED]
        assert "its requests to finish" in world.operations.records[0].reason

    in_world(scenario)


def test_orders_on_one_instance_are_done_in_turn():
    async def scenario(world: World) -> None:
        world.router.held["ss-1"] = 1
        end = world.loop.time() + 100
        world.operations.apply(
            [
                Park(deadline_s=end, instance_id="ss-1", sm_clock_mhz=world.clocks[0]),
                Wake(deadline_s=end, instance_id="ss-1", sm_clock_mhz=world.clocks[-1]),
            ]
        )
        await asyncio.sleep(50)
        assert world.state("ss-1") is InstanceState.DRAINING
        world.router.held["ss-1"] = 0
        await world.operations.settled()
        assert world.state("ss-1") is InstanceState.READY
        states = [seen.get("ss-1") for seen in world.router.history]
        assert InstanceState.PARKED in states

    in_world(scenario)


def test_a_parked_instance_wakes_at_full_clock_before_it_is_routed_to():
    async def scenario(world: World) -> None:
        end = world.loop.time() + 100
        world.operations.apply([Park(deadline_s=end, instance_id="ll-1", sm_clock_mhz=world.clocks[0])])
        await world.operations.settled()
        assert world.state("ll-1") is InstanceState.PARKED
        world.operations.apply([Wake(deadline_s=end, instance_id="ll-1", sm_clock_mhz=1800)])
        await world.operations.settled()
        awake = next(v for v in world.router.view.instances if v.instance.id == "ll-1")
        assert awake.instance.state is InstanceState.READY
        assert awake.instance.sm_clock_mhz == 1800
        assert awake.step == world.deployment.profiles["llama-3.1-70b"].step(8, 1800)

    in_world(scenario)


def test_a_clock_already_set_is_not_written_again():
    async def scenario(world: World) -> None:
        writes = []
        write = world.driver.set_sm_clock

        async def counting(instance_id: str, sm_clock_mhz: int) -> int:
            writes.append(sm_clock_mhz)
            return await write(instance_id, sm_clock_mhz)

        world.driver.set_sm_clock = counting
        order = SetFrequency(deadline_s=world.loop.time() + 10, instance_id="ss-1", sm_clock_mhz=world.clocks[1])
        world.operations.apply([order, order, dataclasses.replace(order, instance_id="nobody")])
        await world.operations.settled()
        assert writes == [world.clocks[1]]
        assert world.outcomes() == [Outcome.DONE] * 3

    in_world(scenario)


def test_a_reshard_on_full_gpus_drains_first_and_then_starts():
    async def scenario(world: World) -> None:
        world.router.held["ll-1"] = 2
        world.operations.apply([halved(world)])
        await asyncio.sleep(20)
        assert world.state("ll-1") is InstanceState.DRAINING
        assert world.state("small-0") is None
        world.router.held["ll-1"] = 0
        await world.operations.settled()
        assert world.state("ll-1") is None
        assert [world.state(f"small-{k}") for k in range(2)] == [InstanceState.READY] * 2

    in_world(scenario)


class Routed(World):
    """With the router as it is, asked for the longest requests: only the LL pool has a place for those."""

    routes = RealRouter

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0

    def ask(self) -> Assigned | Queued | Rejected:
        self.asked += 1
        now_s = self.loop.time()
        slo = Slo(2.0, 0.1)
        return self.router.route(
            Request(f"r{self.asked}", "llama-3.1-70b", now_s, 4000, 800.0, RequestClass.LL, slo), now_s
        )


def test_requests_wait_while_the_only_instance_drains_for_those_that_replace_it():
    async def scenario(world: World) -> None:
        first = world.ask()
        assert first == Assigned("ll-1", "LL")
        world.operations.apply([halved(world)])
        await asyncio.sleep(5)
        assert world.state("ll-1") is InstanceState.DRAINING
        assert [world.ask(), world.ask()] == [Queued(1), Queued(2)]
        world.router.on_finished("r1", 800, world.loop.time())
        await world.operations.settled()
        released = world.router.release(world.loop.time())
        assert {request.id for request, _ in released} == {"r2", "r3"}
        assert {decision.instance_id for _, decision in released} <= {"small-0", "small-1"}
        assert world.deployment.coming == frozenset()

    in_world(scenario, Routed)


def test_requests_wait_for_an_instance_ordered_before_there_is_room_and_no_longer_than_it_is():
    async def scenario(world: World) -> None:
        world.operations.apply([ScaleIn(deadline_s=1e9, instance_id="ll-1")])
        await world.operations.settled()
        assert world.ask().reason is RejectReason.NO_ENDPOINTS
        full = next(node for node in world.deployment.placement.nodes if not world.deployment.placement.free_gpus(node))
        due_s = world.loop.time() + 10
        world.operations.apply([scale_out(world, "new-1", pool="LL", tp=8, node=full, deadline_s=due_s)])
        assert world.ask() == Queued(1)
        await asyncio.sleep(8)
        assert world.ask() == Queued(2)
        await world.operations.settled()
        assert world.outcomes()[-1] is Outcome.ABANDONED
        assert world.ask().reason is RejectReason.NO_ENDPOINTS
        end_s = world.router.next_release_s + world.router.limits.queue.ttl_s
        assert {d.reason for _, d in world.router.release(end_s)} == {RejectReason.TTL_EXPIRED}

    in_world(scenario, Routed)


def test_an_order_given_twice_is_waited_for_until_both_have_ended():
    async def scenario(world: World) -> None:
        world.operations.apply([ScaleIn(deadline_s=1e9, instance_id="ll-1")])
        await world.operations.settled()
        full = next(node for node in world.deployment.placement.nodes if not world.deployment.placement.free_gpus(node))
        order = scale_out(world, "new-1", pool="LL", tp=8, node=full)
        at_s = world.loop.time()
        world.operations.apply([dataclasses.replace(order, deadline_s=at_s + wait_s) for wait_s in (5, 20)])
        await asyncio.sleep(10)
        assert world.outcomes()[-1] is Outcome.ABANDONED
        assert world.ask() == Queued(1)
        await world.operations.settled()
        assert world.ask().reason is RejectReason.NO_ENDPOINTS

    in_world(scenario, Routed)


def test_a_reshard_with_room_starts_first_and_never_leaves_the_pool_empty():
    async def scenario(world: World) -> None:
        end = world.loop.time() + 300
        world.operations.apply(
            [Reshard(deadline_s=end, retire=("ss-1",), create=(scale_out(world, "new-1", deadline_s=end),))]
        )
        await world.operations.settled()
        assert world.state("ss-1") is None
        assert world.state("new-1") is InstanceState.READY

    world = in_world(scenario)
    pool = [{seen.get("ss-1"), seen.get("new-1")} for seen in world.router.history[:-9]]  # the last are the shutdown
    up = next(i for i, states in enumerate(pool) if InstanceState.READY in states)
    assert all(InstanceState.READY in states for states in pool[up:])


def test_what_a_driver_refuses_is_tried_again_until_the_deadline():
    async def scenario(world: World) -> None:
        start, refusals = world.driver.start, [DriverError("busy")] * 3

        async def moody(spec):
            if refusals:
                raise refusals.pop()
            return await start(spec)

        world.driver.start = moody
        world.operations.apply([scale_out(world)])
        await world.operations.settled()
        assert world.state("new-1") is InstanceState.READY
        refusals.extend([DriverError("broken")] * 1000)
        world.operations.apply([ScaleIn(deadline_s=1e9, instance_id="new-1")])
        await world.operations.settled()
        world.operations.apply([scale_out(world, "new-2")])
        await world.operations.settled()
        assert world.outcomes() == [Outcome.DONE, Outcome.DONE, Outcome.ABANDONED]
        assert world.operations.records[-1].reason == "broken"
        assert world.deployment.placement.free_gpus(free_node(world)) >= 2

    in_world(scenario)


def test_an_older_plan_is_refused_and_one_overtaken_while_it_waits_is_dropped():
    async def scenario(world: World) -> None:
        later = world.loop.time() + 100
        world.operations.apply(
            [
                scale_out(world, "first", plan=(1, 5), not_before_s=world.loop.time() + 20, deadline_s=later),
                SetFrequency(deadline_s=later, plan=(1, 6), instance_id="ss-1", sm_clock_mhz=world.clocks[0]),
                scale_out(world, "second", plan=(1, 5), deadline_s=later),
                scale_out(world, "third", plan=(0, 99), deadline_s=later),
            ]
        )
        await world.operations.settled()
        assert sorted(o.value for o in world.outcomes()) == ["done", "stale", "stale", "stale"]
        assert {"first", "second", "third"}.isdisjoint(world.deployment.instances)

    in_world(scenario)


def test_shares_of_a_route_reach_the_router():
    async def scenario(world: World) -> None:
        names = tuple(pool.name for pool in world.deployment.settings.pools)
        share = np.zeros((9, len(names)))
        share[0, names.index("MM")] = 0.25
        share[0, names.index("LL")] = 0.75
        world.operations.apply([Route(deadline_s=1e9, pools=names, pool_share=share)])
        await world.operations.settled()
        assert dict(world.router.view.shares) == {("llama-3.1-70b", 0): (("MM", 0.25), ("LL", 0.75))}

    in_world(scenario)


def test_an_instance_can_serve_in_another_pool():
    async def scenario(world: World) -> None:
        world.operations.apply([Reassign(deadline_s=1e9, instance_id="ss-1", pool="SM")])
        world.operations.apply([Reassign(deadline_s=1e9, instance_id="nobody", pool="SM")])
        await world.operations.settled()
        assert [v.instance.pool for v in world.router.view.instances if v.instance.id == "ss-1"] == ["SM"]
        assert world.outcomes() == [Outcome.DONE] * 2

    in_world(scenario)


def test_the_last_one_for_a_class_stays_in_its_pool_until_what_replaces_it_is_ready():
    """Nothing dominates LL: moved at once, its requests would have nowhere to go."""

    async def scenario(world: World) -> None:
        world.operations.apply([Reassign(deadline_s=1e9, instance_id="ll-1", pool="SM")])
        await asyncio.sleep(5)
        assert world.deployment.instances["ll-1"].pool == "LL"
        world.operations.apply([scale_out(world, pool="LL", tp=2, node=free_node(world))])
        await world.operations.settled()
        assert world.deployment.instances["ll-1"].pool == "SM"
        assert world.state("new-1") is InstanceState.READY
        assert world.outcomes() == [Outcome.DONE] * 2

    in_world(scenario)


def test_closing_leaves_nothing_under_way():
    async def scenario(world: World) -> None:
        world.router.held["ss-1"] = 1
        world.operations.apply([ScaleIn(deadline_s=1e9, instance_id="ss-1")])
        await asyncio.sleep(1)
        assert world.operations.busy == 1
        await world.operations.close()
        assert world.operations.busy == 0

    in_world(scenario)


def test_the_clock_follows_at_once_while_an_instance_drains():
    async def scenario(world: World) -> None:
        world.router.held["ss-1"] = 3
        clocks = [SetFrequency(deadline_s=600.0, instance_id="ss-1", sm_clock_mhz=mhz) for mhz in world.clocks[:2]]
        world.operations.apply([ScaleIn(deadline_s=600.0, instance_id="ss-1"), *clocks])
        await asyncio.sleep(1)
        assert world.state("ss-1") is InstanceState.DRAINING
        assert world.deployment.instances["ss-1"].sm_clock_mhz == world.clocks[1], "in the order given"
        world.router.held["ss-1"] = 0
        await world.operations.settled()
        assert world.outcomes() == [Outcome.DONE] * 3

    in_world(scenario)
