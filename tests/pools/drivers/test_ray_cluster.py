"""The Ray driver under the whole control plane, on a real cluster of three raylets with fake GPUs.

Start, serve, lose a node under load, recover, consolidate for a TP8, and be taken over after a restart.
"""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import httpx
import numpy as np
import pytest
from ray_examples import GPUS_A_NODE, NAMESPACE, NODES, RayMachines, ray_driver

from dynamollm import wiring
from dynamollm.role_server import RoleServer
from dynamollm.settings import (
    ControllerSettings,
    DriverSettings,
    ModelSettings,
    NodeSettings,
    PoolSettings,
    RaySettings,
    Settings,
    VllmSettings,
)
from energy.gpu import ClockLock, GpuAgentError, GpuError
from energy.gpus import GPUS
from pools.classes import RequestClass
from pools.drivers.port import GpuBusyError, InstanceSpec, StartRefusedError, UnknownGpuError
from pools.drivers.ray_cluster import RayNode, bind
from pools.drivers.vllm_launch import VllmLaunch
from pools.instances import GpuSlot, InstanceShape, InstanceState
from pools.view import PoolView
from proxy.serve import gateway_config, listen
from simulator.vllm_device.adapters.gpus import board_gpus
from solver.control import Plan, PlanGroup, Route
from solver.diff import DiffSettings, diff

MODEL, PROFILE, GPU = "tiny", "llama-3.1-8b-bf16-h100", "H100-SXM"
POOL = "LL"


def settings(folder: Path, instances: int = 0, policy: str = "static", leave_running: bool = False) -> Settings:
    return Settings(
        models=(ModelSettings(MODEL, PROFILE, max_model_len=8192),),
        nodes=(NodeSettings("node", GPU, GPUS_A_NODE, count=len(NODES)),),
        pools=(PoolSettings(POOL, MODEL, POOL, tp=1, instances=instances),),
        driver=DriverSettings(
            "ray",
            startup_s=0.1,
            ray=RaySettings(namespace=NAMESPACE, engine="emulated", leave_running=leave_running),
            vllm=VllmSettings(log_dir=str(folder), start_timeout_s=120.0),
        ),
        controller=ControllerSettings(policy, warm_up_s=0.5),
    )


class World:
    """The application of one `dynamollm serve`, but for its process."""

    def __init__(self, told: Settings) -> None:
        self.application = wiring.build(told)
        self.deployment = self.application.deployment
        self.runner = self.application.runner
        self.driver = self.runner._driver
        self.url = ""

    def ready(self) -> dict[str, str]:
        """READY instances, and the node of each."""
        return {i.id: i.gpus[0].node for i in self.deployment.instances.values() if i.state is InstanceState.READY}

    async def start(self, instance_id: str, node: str, tp: int = 1) -> None:
        await self.runner.start_instance(self.deployment.specify(POOL, tp, None, node, instance_id))

    async def until(self, holds: Callable[[], bool], within_s: float = 120.0) -> None:
        async with asyncio.timeout(within_s):
            while not holds():  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(0.1)


@asynccontextmanager
async def running(told: Settings, controlled: bool = False) -> AsyncIterator[World]:
    world = World(told)
    application = world.application
    listener = listen("127.0.0.1", 0)
    world.url = "http://{}:{}".format(*listener.getsockname()[:2])
    server = RoleServer(gateway_config(application.services, 1.0))
    tasks = [asyncio.create_task(application.runner.run()), asyncio.create_task(server.serve(sockets=[listener]))]
    if controlled:
        tasks.append(asyncio.create_task(application.control.run()))
    try:
        yield world
    finally:
        server.should_exit = True
        await tasks[1]
        for task in tasks:
            task.cancel()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        await application.operations.close()
        await application.control.close()
        await application.probe.close()
        listener.close()
        assert not [outcome for outcome in outcomes if isinstance(outcome, Exception)]


class Load:
    """Clients that stream one answer after another through the gateway."""

    def __init__(self, url: str, clients: int) -> None:
        self.done = self.failed = 0
        self._client = httpx.AsyncClient(base_url=url, trust_env=False, timeout=30.0)
        self._tasks = [asyncio.create_task(self._stream()) for _ in range(clients)]

    async def _stream(self) -> None:
        body = {"model": MODEL, "prompt": "word " * 50, "max_tokens": 40, "stream": True, "ignore_eos": True}
        while True:
            try:
                answer = await self._client.post("/v1/completions", json=body)
                complete = answer.text.rstrip().endswith("data: [DONE]") and '"error"' not in answer.text
            except httpx.HTTPError:
                complete = False
            self.done += complete
            self.failed += not complete
            await asyncio.sleep(0.02)

    async def more(self, answers: int) -> int:
        """Wait for so many more good answers; returns how many failed meanwhile."""
        done, failed = self.done + answers, self.failed
        async with asyncio.timeout(120.0):
            while self.done < done:  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(0.05)
        return self.failed - failed

    async def end(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._client.aclose()


async def reach(world: World, groups: dict[int, int], within_s: float = 180.0) -> None:
    """Follow a plan of so many instances by TP, as a controller does: what is missing is ordered again and again."""
    plan_groups = tuple(PlanGroup(POOL, tp, 1980, 0.5, count) for tp, count in groups.items())
    plan = Plan(7, 1, time.monotonic(), 600.0, (POOL,), plan_groups, np.ones((9, 1)))
    pools = (PoolView(POOL, MODEL, RequestClass.LL),)
    serial = 0
    observe, operations = world.application.control._observe, world.application.operations
    async with asyncio.timeout(within_s):
        while True:
            now_s = world.application.clock()
            cluster = observe(now_s).cluster
            told = DiffSettings(start_deadline_s=60.0, drain_deadline_s=60.0)
            actions = [a for a in diff(plan, cluster, now_s, pools, told, {}, serial) if not isinstance(a, Route)]
            if not actions:
                return
            serial += 100  # names are never given twice
            operations.apply(actions)
            await operations.settled()


def engine_processes() -> int:
    """Emulated servers of supervisors that run on this machine."""
    found = 0
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                found += b"vllm_command\0serve" in (entry / "cmdline").read_bytes()
            except OSError:
                continue
    return found


def test_a_node_is_lost_under_load_and_a_tp8_finds_its_place_among_spread_tp1s(ray_cluster: RayMachines, tmp_path):
    async def scenario() -> None:
        before = engine_processes()
        async with running(settings(tmp_path)) as world:
            await world.until(lambda: not world.driver.lost_nodes())
            spread = {f"one-{number}": NODES[number % 3] for number in range(8)}

            async def fill(node: str) -> None:
                for name in [name for name, where in spread.items() if where == node]:
                    await world.start(name, node)

            await asyncio.gather(*(fill(node) for node in NODES))
            await world.until(lambda: world.ready() == spread)
            load = Load(world.url, clients=6)
            try:
                assert await load.more(20) == 0
                began_s = time.monotonic()
                ray_cluster.kill("node-2")
                await world.until(lambda: world.driver.lost_nodes() == {"node-2"})
                lost_after_s = time.monotonic() - began_s
                survivors = {name for name, node in spread.items() if node != "node-2"}
                await world.until(lambda: survivors <= world.ready().keys() and "node-2" not in world.ready().values())
                assert lost_after_s < 20.0
                # streams that were under way there are lost, and nothing else is
                assert await load.more(20) <= 6
                assert await load.more(20) == 0
                # what is left: sixteen GPUs on two nodes, with TP1s on both; a TP8 needs one of them whole
                await reach(world, {1: 8, 8: 1})
                assert await load.more(20) == 0
            finally:
                await load.end()
            tps = sorted(i.shape.tp for i in world.deployment.instances.values())
            assert tps == [1] * 8 + [8]
            by_node = {
                node: [i.shape.tp for i in world.deployment.instances.values() if i.gpus[0].node == node]
                for node in NODES
            }
            assert sorted(by_node.values()) == [[], [1] * 8, [8]]
            assert engine_processes() - before == 9
            ray_cluster.join("node-2")
            await world.until(lambda: not world.driver.lost_nodes())
        await asyncio.sleep(0.5)
        assert engine_processes() == before

    asyncio.run(asyncio.wait_for(scenario(), 400))


def test_a_later_driver_takes_over_what_runs_with_its_clock(ray_cluster: RayMachines, tmp_path):
    """The first one is killed as a process is: nothing of it is closed."""

    async def scenario() -> None:
        folder = tmp_path / "one"
        async with running(settings(folder, leave_running=True)) as first:
            await first.start("stays-1", "node-0", tp=2)
            await first.start("sleeps-1", "node-1")
            await first.until(lambda: len(first.ready()) == 2)
            assert await first.driver.set_sm_clock("stays-1", 1003) == 1005
            await first.driver.park("sleeps-1")
            url = first.deployment.instances["stays-1"].url
        engines = engine_processes()
        async with running(settings(folder)) as second:
            await second.until(lambda: "stays-1" in second.ready())
            stays, sleeps = (second.deployment.instances[name] for name in ("stays-1", "sleeps-1"))
            assert (stays.url, stays.sm_clock_mhz, stays.gpus[0].node) == (url, 1005, "node-0")
            assert (sleeps.state, sleeps.sm_clock_mhz) == (InstanceState.PARKED, 345)
            assert engine_processes() == engines == 2
            locked = {r.index: r.sm_clock_mhz for r in await second.driver.read_gpus() if r.node == "node-0"}
            assert sorted(locked.values())[:3] == [1005, 1005, 1980]
            assert {locked[gpu.index] for gpu in stays.gpus} == {1005}
            with pytest.raises(GpuBusyError, match="stays-1"):
                await second.driver.start(
                    InstanceSpec("other", POOL, InstanceShape(MODEL, GPU, 1), (GpuSlot("node-0", 0),), 1980)
                )
            await second.driver.wake("sleeps-1")
            assert [i.sm_clock_mhz for i in await second.driver.list() if i.id == "sleeps-1"] == [1980]
            load = Load(second.url, clients=1)
            try:
                assert await load.more(3) == 0
            finally:
                await load.end()
        assert engine_processes() == 0

    asyncio.run(asyncio.wait_for(scenario(), 200))


def test_locks_of_a_driver_that_falls_silent_are_taken_off(ray_cluster: RayMachines, tmp_path):
    ray = pytest.importorskip("ray")
    from pools.drivers.ray_agent import ActorNode, AgentSetup
    from pools.drivers.ray_cluster import RayCluster

    cluster = RayCluster("auto", NAMESPACE)
    boards = tmp_path / "boards"
    setup = AgentSetup(
        "node-0", partial(board_gpus, "node-0", 2, GPUS["H100-SXM"], boards), tmp_path / "journal", ttl_s=3.0
    )
    node_id = next(node.id for node in cluster.nodes() if node.name == "node-0")
    agent = cluster.agent(node_id, setup, name="leases")
    node = ActorNode("node-0", lambda: agent, "test")
    first, second = node.gpus()
    first.lock_sm_clocks(ClockLock(1200, 1200))
    second.lock_sm_clocks(ClockLock(900, 900))
    for _ in range(12):  # twice as long as the lease, and often enough on a machine that is late
        time.sleep(0.5)
        assert node.renew() == ()
    assert [gpu.locked_sm_clocks_mhz() for gpu in (first, second)] == [ClockLock(1200, 1200), ClockLock(900, 900)]
    assert first.sm_clock_mhz() == 1200
    deadline_s = time.monotonic() + 20.0
    while second.sm_clock_mhz() != 1980 and time.monotonic() < deadline_s:
        time.sleep(0.2)
    assert [gpu.sm_clock_mhz() for gpu in (first, second)] == [1980, 1980]
    assert node.renew() == (0, 1)
    with pytest.raises(GpuError):
        first.lock_sm_clocks(ClockLock(0, 0))
    ray.kill(agent)  # returns before the actor is gone

    def ask_on() -> None:
        while time.monotonic() < deadline_s + 20.0:
            node.gpus()

    with pytest.raises(GpuAgentError, match="node-0"):
        ask_on()


def test_a_process_that_dies_or_cannot_start_frees_its_gpus(ray_cluster: RayMachines):
    async def scenario() -> None:
        driver = ray_driver(nodes=("node-0",))
        events = driver.events()
        try:
            await driver.start(spec("i-1"))
            async for event in events:
                if event.state is InstanceState.READY:
                    break
            pid = stand_ins()[0]
            os.kill(pid, signal.SIGKILL)
            async for event in events:
                if event.state is InstanceState.FAILED:
                    assert "SIGKILL" in event.reason
                    break
            again = await driver.start(spec("i-2"))
            assert again.gpus == spec("i-2").gpus
        finally:
            await driver.close()
        broken = ray_driver(nodes=("node-0",), launch=VllmLaunch(command=("/no/such/vllm",)))
        try:
            with pytest.raises(StartRefusedError, match=r"setpriv|no/such"):
                await start_and_wait(broken, spec("i-3"))
            with pytest.raises(UnknownGpuError, match="node-9"):
                await broken.start(spec("i-4", "node-9"))
            assert await broken.list() == ()
        finally:
            await broken.close()

    asyncio.run(asyncio.wait_for(scenario(), 120))


async def start_and_wait(driver, told: InstanceSpec) -> None:
    """A start that fails when the command is executed, or a moment later where another command executes it."""
    events = driver.events()
    await driver.start(told)
    async for event in events:
        if event.state is InstanceState.FAILED:
            raise StartRefusedError(event.reason)


def spec(name: str, node: str = "node-0") -> InstanceSpec:
    return InstanceSpec(name, POOL, InstanceShape(MODEL, GPU, 2), (GpuSlot(node, 0), GpuSlot(node, 1)), 1200)


def stand_ins() -> list[int]:
    """Process ids of stand-in servers."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if any(word.endswith(b"vllm_stand_in.py") for word in words) and words[0] != b"setpriv":
                found.append(int(entry.name))
    return found


def ray_node(name: str, gpus: int = 8) -> RayNode:
    return RayNode(f"id-{name}", name, gpus)


def test_configured_nodes_are_found_by_name_and_else_by_what_is_left():
    wanted = {"a": 8, "b": 8}
    assert bind(wanted, [ray_node("b"), ray_node("x")], {}) == {"a": "id-x", "b": "id-b"}
    assert bind(wanted, [ray_node("x", 4), ray_node("y")], {}) == {"a": "id-y"}
    assert bind(wanted, [], {}) == {}


def test_a_node_that_was_bound_stays_what_it_is_while_it_lives():
    wanted = {"a": 8, "b": 8}
    bound = bind(wanted, [ray_node("x"), ray_node("y")], {})
    assert bound == {"a": "id-x", "b": "id-y"}
    assert bind(wanted, [ray_node("w"), ray_node("y")], bound) == {"a": "id-w", "b": "id-y"}
    assert bind(wanted, [ray_node("y")], bound) == {"b": "id-y"}
