"""The control loop: ticks when asked, off the event loop, and survives the loss of its controller."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest

from dynamollm.adapters.configuration import load
from dynamollm.control_loop import ControlLoop
from dynamollm.controller_recipe import controller_recipe
from dynamollm.settings import ControllerSettings
from simulator.virtual_loop import run
from solver.adapters.controller_process import ControllerProcess
from solver.control import (
    ClusterState,
    ControllerLostError,
    Demand,
    Diagnostic,
    Effects,
    InstanceViews,
    Level,
    Observation,
    ScaleIn,
    Tick,
)


def observation(now_s: float) -> Observation:
    ints, floats = np.zeros(0, dtype=np.int64), np.zeros(0)
    instances = InstanceViews((), ints, ints, ints, ints, ints, floats, np.zeros((0, 9)), *[floats] * 7)
    pools = ("SS", "SM", "SL", "MS", "MM", "ML", "LS", "LM", "LL")
    cluster = ClusterState(
        now_s, pools, ("a", "b", "c", "d"), np.full(4, 8, dtype=np.int64), np.ones(4, dtype=np.bool_), instances
    )
    rate = np.full(9, 5.0)
    return Observation(now_s, cluster, Demand(1.0, rate, rate * 500, rate * 100, np.zeros(9)))


class EveryTen:
    """Asks to be called every ten seconds; is lost at the calls named."""

    def __init__(self, lost_at: tuple[int, ...] = ()) -> None:
        self.calls = 0
        self.begun = 0
        self._lost_at = lost_at

    async def first_tick(self, now_s: float) -> Tick:
        self.begun += 1
        return Tick(now_s, Level.JOINT)

    async def on_tick(self, tick: Tick, seen: Observation) -> Effects:
        self.calls += 1
        if self.calls in self._lost_at:
            raise ControllerLostError("killed")
        quiet = self.calls % 2 == 0
        actions = () if quiet else (ScaleIn(deadline_s=1.0, instance_id=str(self.calls)),)
        notes = () if quiet else (Diagnostic("plan", "because"),)
        return Effects(actions, Tick(tick.at_s + 10.0, Level.JOINT), notes)


def loop_for(
    controller: EveryTen, seconds: float, first_look_s: float = 0.0
) -> tuple[ControlLoop, list[str], list[float]]:
    applied: list[str] = []
    looked: list[float] = []

    def observe(now_s: float) -> Observation:
        looked.append(now_s)
        return observation(now_s)

    async def main() -> ControlLoop:
        clock = asyncio.get_running_loop().time
        loop = ControlLoop(
            controller, observe, lambda actions: applied.extend(a.instance_id for a in actions), clock, first_look_s
        )
        task = asyncio.create_task(loop.run())
        await asyncio.sleep(seconds)
        task.cancel()
        return loop

    return run(main()), applied, looked


def test_it_looks_and_acts_when_the_controller_asks_for_it():
    loop, applied, looked = loop_for(EveryTen(), 35.0)
    assert looked == [0.0, 0.0, 10.0, 20.0, 30.0], "once to begin counting, then at every tick"
    assert applied == ["1", "3"]
    assert [record.at_s for record in loop.decisions] == [0.0, 20.0]
    assert loop.ticks == 4


def test_it_watches_before_it_decides():
    _, _, looked = loop_for(EveryTen(), 95.0, first_look_s=60.0)
    assert looked == [0.0, 60.0, 70.0, 80.0, 90.0]


def test_a_lost_controller_is_begun_again_and_the_cluster_waits():
    controller = EveryTen(lost_at=(2,))
    loop, applied, looked = loop_for(controller, 35.0)
    assert controller.begun == 2
    assert looked == [0.0, 0.0, 10.0, 11.0, 21.0, 31.0]
    assert applied == ["1", "3", "5"]
    assert loop.ticks == 4


@pytest.fixture
def process():
    settings = load(None, {})
    return ControllerProcess(
        controller_recipe(replace(settings, controller=ControllerSettings("dynamollm", warm_up_s=0.0)))
    )


def test_the_real_controller_plans_in_a_process_of_its_own_and_comes_back_with_a_higher_epoch(process):
    async def main() -> None:
        tick = await process.first_tick(0.0)
        first = await process.on_tick(tick, observation(0.0))
        assert first.actions
        assert {action.plan[0] for action in first.actions} == {1}
        (child,) = process._pool._processes
        assert child != os.getpid()
        os.kill(child, signal.SIGKILL)
        with pytest.raises(ControllerLostError):
            await process.on_tick(first.next_tick, observation(5.0))
        tick = await process.first_tick(6.0)
        again = await process.on_tick(tick, observation(6.0))
        assert {action.plan[0] for action in again.actions} == {2}
        await process.close()

    asyncio.run(main())


def test_a_warm_process_plans_at_once_from_what_came_before_in_the_epochs_it_is_told():
    settings = replace(load(None, {}), controller=ControllerSettings("dynamollm", warm_up_s=60.0))
    recipe = controller_recipe(settings)
    demand = observation(0.0).demand
    past = tuple((float(at_s), replace(demand, window_s=5.0)) for at_s in range(-100, 0, 5))

    async def plan_epochs(process: ControllerProcess) -> set[int]:
        tick = await process.first_tick(0.0)
        effects = await process.on_tick(tick, observation(0.0))
        return {action.plan[0] for action in effects.actions}

    async def main() -> None:
        process = ControllerProcess(recipe)
        await process.warm()
        (warm,) = process._pool._processes
        process.begin(replace(recipe, past=past), 7000)
        assert await plan_epochs(process) == {7000}
        assert list(process._pool._processes) == [warm]
        await process.close()
        process.begin(recipe, 8000)  # nothing is known: it watches first
        assert await plan_epochs(process) == set()
        await process.close()

    asyncio.run(main())


def test_the_controllers_process_ends_with_one_that_is_killed():
    script = (
        "import asyncio, time\n"
        "from dynamollm.adapters.configuration import load\n"
        "from solver.adapters.controller_process import ControllerProcess\n"
        "from dynamollm.controller_recipe import controller_recipe\n"
        "async def main():\n"
        "    process = ControllerProcess(controller_recipe(load(None, {})))\n"
        "    await process.warm()\n"
        "    print(*process._pool._processes, flush=True)\n"
        "    time.sleep(1000)\n"
        "if __name__ == '__main__':\n"
        "    asyncio.run(main())\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    os.kill(child, 0)
    parent.kill()
    parent.wait(10)
    parent.stdout.close()
    until_s = time.monotonic() + 20
    while time.monotonic() < until_s:
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    raise AssertionError(f"process {child} is still there")
