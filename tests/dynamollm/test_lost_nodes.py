"""Losing a node: the real controller, observer, operations and runner over a driver in memory, in virtual time."""

import asyncio
import dataclasses
from collections.abc import Collection

import numpy as np
import pytest
from virtual_cluster import Inline, Recorded

from dynamollm.adapters.configuration import load
from dynamollm.control_loop import ControlLoop
from dynamollm.controller_recipe import controller_recipe
from dynamollm.deployment import Deployment, node_gpus
from dynamollm.observation import Observer
from dynamollm.operations import Operations
from dynamollm.runner import Runner
from energy.adapters.catalogue import load_profile
from pools.classes import RequestClass
from pools.drivers.fake import FakeDriver
from pools.instances import InstanceState
from pools.router import Router
from pools.view import EngineLoad
from simulator.virtual_loop import run
from solver.control import Demand, Observation, ScaleOut

MODEL = "llama-3.1-70b"


class Quiet:
    async def load(self, url: str) -> EngineLoad:
        return EngineLoad(running=0, waiting=0, kv_cache_usage=0.0)


class World:
    def __init__(self, rate_rps: float) -> None:
        settings = load(None, {"DYNAMOLLM_DRIVER__STARTUP_S": "60"})
        profile = load_profile("llama-3.1-70b-fp8-h100")
        clock = asyncio.get_running_loop().time
        self.driver = FakeDriver(node_gpus(settings.nodes), profile.sm_clocks_mhz)
        self.deployment = Deployment(settings, {MODEL: profile}, self.driver.lost_nodes)
        router = Router()
        self.runner = Runner(self.deployment, self.driver, router, Quiet(), clock)
        self.operations = Operations(self.deployment, self.driver, self.runner, clock)
        observer = Observer(self.deployment, router, clock())
        self.rate_rps = rate_rps

        def observe(now_s: float) -> Observation:
            seen = observer.observe(now_s)
            return dataclasses.replace(seen, demand=self.demand(seen.demand.window_s))

        self.controller = Recorded(controller_recipe(settings)(1))
        self.control = ControlLoop(Inline(self.controller), observe, self.operations.apply, clock)

    def demand(self, window_s: float) -> Demand:
        """The same requests of class MM all the time."""
        columns = np.zeros((3, 9))
        columns[:, RequestClass.MM] = np.array([1.0, 600.0, 200.0]) * self.rate_rps * window_s
        return Demand(window_s, columns[0], columns[1], columns[2], np.zeros(9))

    def gpus(self) -> dict[str, int]:
        """GPUs of READY instances by node."""
        found: dict[str, int] = {}
        for instance in self.deployment.instances.values():
            if instance.state is InstanceState.READY:
                found[instance.gpus[0].node] = found.get(instance.gpus[0].node, 0) + instance.shape.tp
        return found

    def starts_since(self, now_s: float) -> Collection[str]:
        """Nodes that starts were ordered on."""
        ticks = [effects for seen, effects in self.controller.ticks if seen.now_s > now_s]
        return {a.node for effects in ticks for a in effects.actions if isinstance(a, ScaleOut)}


@pytest.mark.parametrize("rate_rps", [40.0, 150.0])
def test_what_a_lost_node_served_is_planned_onto_what_is_left(rate_rps):
    async def scenario() -> None:
        world = World(rate_rps)
        tasks = [asyncio.create_task(world.runner.run()), asyncio.create_task(world.control.run())]
        await asyncio.sleep(1800)
        before = world.gpus()
        lost = max(before, key=lambda node: before[node])
        began_s = asyncio.get_running_loop().time()
        world.driver.lose_node(lost)
        await asyncio.sleep(10)  # two ticks of the quickest level
        seen = world.controller.ticks[-1][0].cluster
        assert [name for name, usable in zip(seen.node_names, seen.node_usable, strict=True) if not usable] == [lost]
        await asyncio.sleep(900)
        after = world.gpus()
        room = 8 * (len(world.deployment.placement.nodes) - 1)
        assert lost not in after
        assert lost not in world.starts_since(began_s)
        # as much as before where there is room for it, else all there is, but for what TPs leave over
        assert sum(after.values()) >= min(sum(before.values()), room - 3)
        world.driver.regain_node(lost)
        await asyncio.sleep(900)
        assert sum(world.gpus().values()) >= sum(before.values()) - 1
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await world.operations.close()

    run(scenario())
