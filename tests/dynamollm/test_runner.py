"""The runner over a driver in memory, in virtual time: bring-up, crashes, back-off, scraping, shutdown."""

import asyncio
import itertools
import math
from collections.abc import Awaitable, Callable

import pytest

from dynamollm.adapters.configuration import load
from dynamollm.deployment import Deployment, node_gpus
from dynamollm.runner import Runner, restart_delay_s
from energy.adapters.catalogue import load_profile
from pools.drivers.fake import FakeDriver
from pools.drivers.port import DriverError, InstanceEvent, InstanceSpec
from pools.instances import GpuSlot, Instance, InstanceShape, InstanceState
from pools.view import ClusterView, EngineLoad
from simulator.virtual_loop import run


class SeenRouter:
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.views: list[ClusterView] = []
        self.loads: list[tuple[str, float]] = []
        self.sent: dict[str, int] = {}

    def update(self, view: ClusterView, now_s: float) -> None:
        self.views.append(view)

    def observe(self, instance_id: str, load: EngineLoad, now_s: float) -> None:
        self.loads.append((instance_id, now_s))

    def in_flight(self, instance_id: str) -> int:
        return self.sent.get(instance_id, 0)

    def ready(self) -> list[str]:
        return [v.instance.id for v in self.views[-1].instances if v.instance.state is InstanceState.READY]


class Probe:
    """Every engine is idle, but those in ``dead`` do not answer."""

    def __init__(self) -> None:
        self.dead: set[str] = set()

    async def load(self, url: str) -> EngineLoad:
        if url in self.dead:
            raise OSError("no answer")
        return EngineLoad(running=0, waiting=0, kv_cache_usage=0.0)


class World:
    """A runner and everything around it."""

    def __init__(self, policy: str = "dynamollm", **driver_options: bool) -> None:
        settings = load(None, {"DYNAMOLLM_CONTROLLER__POLICY": policy})
        profile = load_profile("llama-3.1-70b-fp8-h100")
        self.driver = FakeDriver(node_gpus(settings.nodes), profile.sm_clocks_mhz, **driver_options)
        self.deployment = Deployment(settings, {"llama-3.1-70b": profile}, self.driver.lost_nodes)
        self.router = SeenRouter()
        self.probe = Probe()
        clock = asyncio.get_running_loop().time
        self.runner = Runner(self.deployment, self.driver, self.router, self.probe, clock)


def in_world(scenario: Callable[[World], Awaitable[None]], **driver_options: bool) -> World:
    async def main() -> World:
        world = World(**driver_options)
        running = asyncio.create_task(world.runner.run())
        await scenario(world)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        return world

    return run(main())


def test_every_configured_instance_comes_up_and_is_routed_to():
    async def scenario(world: World) -> None:
        await world.runner.settled()

    world = in_world(scenario)
    assert len(world.router.ready()) == 9


def test_an_instance_that_loads_weights_is_not_routed_to_before_it_is_ready():
    async def scenario(world: World) -> None:
        await asyncio.sleep(60)
        assert world.router.ready() == []
        assert not world.runner._settled.is_set()
        world.driver.finish_start("ll-1")
        await asyncio.sleep(1)
        assert world.router.ready() == ["ll-1"]

    in_world(scenario, manual_start=True)


def test_how_long_starts_take_is_measured_and_expected_of_the_next():
    async def scenario(world: World) -> None:
        assert math.isnan(world.runner.seen_start_s)
        await asyncio.sleep(40)
        world.driver.finish_start("ss-1")
        await asyncio.sleep(0)
        assert world.runner.seen_start_s == pytest.approx(40.0)
        await asyncio.sleep(20)
        world.driver.finish_start("ll-1")
        await asyncio.sleep(0)
        assert world.runner.seen_start_s == pytest.approx(0.7 * 40.0 + 0.3 * 60.0)
        assert world.runner.startup_s == world.runner.seen_start_s
        world.driver.crash("ll-1")  # its successor is expected to take as long
        await asyncio.sleep(2)
        due_s = world.deployment.ready_at_s("ll-2")
        assert due_s - asyncio.get_running_loop().time() == pytest.approx(46.0, abs=2.0)

    in_world(scenario, manual_start=True)


def test_a_crashed_instance_is_replaced_on_its_gpus_after_a_delay():
    async def scenario(world: World) -> None:
        await world.runner.settled()
        gpus = world.deployment.instances["ll-1"].gpus
        world.driver.crash("ll-1", "killed by signal 9")
        await asyncio.sleep(0.5)
        assert "ll-1" not in world.router.ready()
        assert len(world.router.ready()) == 8
        await asyncio.sleep(1)
        assert "ll-2" in world.router.ready()
        assert world.deployment.instances["ll-2"].gpus == gpus

    in_world(scenario)


def test_one_that_keeps_crashing_is_started_ever_more_rarely():
    starts = []

    async def scenario(world: World) -> None:
        start = world.driver.start

        async def failing_start(spec):
            if spec.pool == "LL":
                starts.append(asyncio.get_running_loop().time())
                raise DriverError("out of memory")
            return await start(spec)

        world.driver.start = failing_start
        await asyncio.sleep(300)

    in_world(scenario)
    gaps = [round(later - earlier) for earlier, later in itertools.pairwise(starts)]
    assert gaps == [1, 2, 4, 8, 16, 32, 60, 60, 60]


def test_a_start_that_succeeds_ends_the_back_off():
    async def scenario(world: World) -> None:
        await world.runner.settled()
        for attempt in range(1, 4):
            world.driver.crash(f"ll-{attempt}")
            await asyncio.sleep(1.5)
            assert f"ll-{attempt + 1}" in world.router.ready()

    in_world(scenario)


def test_every_engine_is_scraped_once_a_period_and_a_dead_one_disturbs_nobody():
    async def scenario(world: World) -> None:
        await world.runner.settled()
        world.probe.dead.add("http://ll-1.fake.invalid:8000")
        await asyncio.sleep(50.0)

    world = in_world(scenario)
    counts = {name: sum(1 for i, _ in world.router.loads if i == name) for name in world.router.ready()}
    assert counts.pop("ll-1") == 0
    assert set(counts.values()) <= {9, 10, 11}
    times = [now_s for _, now_s in world.router.loads]
    assert max(times.count(t) for t in times) == 1


def test_stopping_the_runner_stops_every_instance():
    async def scenario(world: World) -> None:
        await world.runner.settled()

    world = in_world(scenario)
    assert run(world.driver.list()) == ()


def test_the_delay_doubles_up_to_a_minute():
    assert [restart_delay_s(n) for n in (1, 2, 3, 7, 50)] == [1.0, 2.0, 4.0, 60.0, 60.0]


def left_running(instance_id: str, pool: str, first: int, tp: int, node: str = "h100-3") -> InstanceSpec:
    gpus = tuple(GpuSlot(node, first + index) for index in range(tp))
    return InstanceSpec(instance_id, pool, InstanceShape("llama-3.1-70b", "H100-SXM", tp), gpus, 1200)


def in_world_with(
    left: list[InstanceSpec], scenario: Callable[[World], Awaitable[None]], policy: str = "static"
) -> World:
    """A world whose driver runs these when the runner begins."""

    async def main() -> World:
        world = World(policy)
        for spec in left:
            await world.driver.start(spec)
        running = asyncio.create_task(world.runner.run())
        await scenario(world)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        return world

    return run(main())


def test_what_runs_already_is_taken_over_and_not_started_again():
    async def scenario(world: World) -> None:
        await world.runner.settled()
        assert {"ll-1", "ss-1"} <= set(world.router.ready())
        assert len(world.router.ready()) == 9
        ll = world.deployment.instances["ll-1"]
        assert (ll.gpus[0].node, ll.sm_clock_mhz) == ("h100-3", 1200)
        held = [gpu for instance in world.deployment.instances.values() for gpu in instance.gpus]
        assert len(held) == len(set(held))

    in_world_with([left_running("ll-1", "LL", 0, 4), left_running("ss-1", "SS", 4, 2)], scenario)


def test_where_a_controller_plans_what_runs_is_what_it_wanted():
    async def scenario(world: World) -> None:
        await world.runner.settled()
        await asyncio.sleep(60)
        assert set(world.router.ready()) == {"ll-1", "ss-1"}

    left = [left_running("ll-1", "LL", 0, 4), left_running("ss-1", "SS", 4, 2)]
    in_world_with(left, scenario, policy="dynamollm")


def test_an_adopted_instance_that_crashes_is_replaced_under_a_name_of_its_own():
    async def scenario(world: World) -> None:
        await world.runner.settled()
        world.driver.crash("ll-1")
        await asyncio.sleep(2)
        assert [i.id for i in world.deployment.instances.values() if i.pool == "LL"] == ["ll-3"]

    in_world_with([left_running("ll-1", "LL", 0, 4), left_running("ll-2", "SS", 4, 2)], scenario)


def test_what_the_settings_no_longer_know_is_stopped():
    async def scenario(world: World) -> None:
        await world.runner.settled()
        assert "old-1" not in {instance.id for instance in await world.driver.list()}
        assert len(world.router.ready()) == 9

    in_world_with([left_running("old-1", "OLD", 0, 8)], scenario)


def test_what_a_lost_node_held_waits_for_room_without_disturbing_the_rest():
    async def scenario(world: World) -> None:
        await world.runner.settled()
        lost = world.deployment.instances["ll-1"].gpus[0].node
        world.driver.lose_node(lost)
        await asyncio.sleep(120)
        assert len(world.router.ready()) == 8  # no other node has eight GPUs free
        world.driver.regain_node(lost)
        await asyncio.sleep(61)
        assert len(world.router.ready()) == 9
        assert [i.gpus[0].node for i in world.deployment.instances.values() if i.pool == "LL"] == [lost]

    in_world(scenario)


def test_what_a_lost_node_held_comes_back_on_another_one():
    async def scenario(world: World) -> None:
        await world.runner.settled()
        world.driver.crash("ll-1")  # makes room
        world.deployment.placement.hold(tuple(GpuSlot("h100-0", index) for index in range(4)))
        lost = world.deployment.instances["ss-1"].gpus[0].node
        world.driver.lose_node(lost)
        await asyncio.sleep(3)
        (again,) = (i for i in world.deployment.instances.values() if i.pool == "SS")
        assert again.gpus[0].node != lost

    in_world(scenario)


def test_an_instance_the_driver_comes_upon_is_taken_over_and_let_go_of_once_its_requests_have_ended():
    async def scenario(world: World) -> None:
        await world.runner.settled()
        shape = InstanceShape("llama-3.1-70b", "H100-SXM", 2)
        found = Instance("found-1", "LL", shape, "http://a:1", InstanceState.STARTING, 1980)
        for _ in range(2):  # heard again after it was listed
            world.driver._broadcast.publish(InstanceEvent(found.id, found.state, found=found))
        world.driver._broadcast.publish(InstanceEvent(found.id, InstanceState.READY))
        await asyncio.sleep(1)
        assert "found-1" in world.router.ready()
        stopped = []

        async def stop(instance_id: str, grace_s: float) -> None:
            stopped.append(instance_id)
            world.driver._broadcast.publish(InstanceEvent(instance_id, InstanceState.STOPPED))

        world.driver.stop = stop
        world.router.sent["found-1"] = 1
        world.driver._broadcast.publish(InstanceEvent(found.id, InstanceState.DRAINING, withdrawn=True))
        await asyncio.sleep(60)
        assert "found-1" not in world.router.ready()
        assert world.deployment.instances["found-1"].state is InstanceState.DRAINING
        assert stopped == []
        world.router.sent["found-1"] = 0
        await asyncio.sleep(1)
        assert stopped == ["found-1"]
        assert "found-1" not in world.deployment.instances

    in_world(scenario)


def test_an_instance_of_a_pool_that_is_not_configured_is_not_taken_over():
    async def scenario(world: World) -> None:
        await world.runner.settled()
        found = Instance("x-1", "x", InstanceShape("m", "H100-SXM", 1), "http://a:1", InstanceState.STARTING, 1980)
        world.driver._broadcast.publish(InstanceEvent(found.id, found.state, found=found))
        await asyncio.sleep(1)
        assert "x-1" not in world.deployment.instances

    in_world(scenario)
