"""Who steps back computes last: as the kernel tells it, of this process and of those that solve and simulate."""

import asyncio
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import numpy as np
import pytest

from dynamollm.adapters.configuration import load
from dynamollm.adapters.shadow_process import ShadowProcess
from dynamollm.counterfactual import OWN
from dynamollm.shadow_wiring import ShadowWorld
from simulator.workload.arrivals import Arrivals
from solver.adapters import background
from solver.adapters.background import LOWEST_PRIORITY, end, step_back
from solver.adapters.controller_process import LOADING_PRIORITY, ControllerProcess
from solver.control import ControllerLostError, Effects, Level, Tick

linux = pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="SCHED_IDLE is of Linux")


class Slow:
    """A controller that says that it has begun, and is not done before the test is."""

    def __init__(self, path: str, epoch: int) -> None:
        self._path = path

    def first_tick(self, now_s: float) -> Tick:
        return Tick(now_s, Level.INSTANCE)

    def on_tick(self, tick: Tick, observation: object) -> Effects:
        with open(self._path, "w") as begun:
            begun.write("begun")
        time.sleep(600.0)
        return Effects((), tick)


class Telling:
    """A controller that tells how its process stood when it was made, and stands when it decides."""

    def __init__(self, path: str, epoch: int) -> None:
        self._path = path
        self._note("made")

    def first_tick(self, now_s: float) -> Tick:
        return Tick(now_s, Level.INSTANCE)

    def on_tick(self, tick: Tick, observation: object) -> Effects:
        self._note("decides")
        return Effects((), tick)

    def _note(self, moment: str) -> None:
        with open(self._path, "a") as notes:
            notes.write(f"{moment} {os.sched_getscheduler(0)} {os.getpriority(os.PRIO_PROCESS, 0)} {os.getsid(0)}\n")


def stood(path) -> list[tuple[str, int, int, int]]:
    lines = (line.split() for line in path.read_text().splitlines())
    return [(moment, int(policy), int(nice), int(session)) for moment, policy, nice, session in lines]


def stand_back_and_tell(told) -> None:
    step_back()
    step_back()  # again is as once
    told.send((os.sched_getscheduler(0), os.getpriority(os.PRIO_PROCESS, 0)))


@linux
def test_who_steps_back_is_idle_to_the_scheduler_and_last_in_niceness():
    context = multiprocessing.get_context("spawn")
    heard, told = context.Pipe(duplex=False)
    process = context.Process(target=stand_back_and_tell, args=(told,))
    process.start()
    try:
        assert heard.poll(60)
        assert heard.recv() == (os.SCHED_IDLE, LOWEST_PRIORITY)
    finally:
        process.join(60)


def test_where_idle_is_forbidden_or_unknown_niceness_is_all(monkeypatch):
    nice = []
    monkeypatch.setattr(background.os, "nice", nice.append)

    def forbidden(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(background.os, "SCHED_IDLE", 5, raising=False)
    monkeypatch.setattr(background.os, "sched_setscheduler", forbidden, raising=False)
    monkeypatch.setattr(background.os, "sched_param", lambda priority: priority, raising=False)
    step_back()
    monkeypatch.delattr(background.os, "SCHED_IDLE")
    monkeypatch.delattr(background.os, "sched_setscheduler")
    step_back()
    assert nice == [LOWEST_PRIORITY] * 2


@linux
def test_a_controller_loads_nicely_and_solves_when_nobody_else_wants_the_core(tmp_path):
    notes = tmp_path / "notes"
    began = os.getpriority(os.PRIO_PROCESS, 0)

    async def main() -> None:
        process = ControllerProcess(partial(Telling, str(notes)))
        await process.warm()
        tick = await process.first_tick(0.0)
        await process.on_tick(tick, None)
        await process.close()

    asyncio.run(main())
    loaded, made, decides = stood(notes)
    assert loaded[:3] == ("made", os.SCHED_OTHER, min(began + LOADING_PRIORITY, 19))
    assert made[:2] == ("made", os.SCHED_IDLE), "warm: it need not load again"
    assert decides[:3] == ("decides", os.SCHED_IDLE, LOWEST_PRIORITY)
    sessions = {session for *_, session in (loaded, made, decides)}
    assert sessions == {os.getsid(0)}, "it gives way to those of its own session"


@linux
def test_a_process_that_steps_back_leaves_its_parent_as_it_was(tmp_path):
    before = os.sched_getscheduler(0), os.getpriority(os.PRIO_PROCESS, 0)

    async def main() -> None:
        process = ControllerProcess(partial(Telling, str(tmp_path / "notes")))
        await process.first_tick(0.0)
        (child,) = process._pool._processes
        assert os.sched_getscheduler(child) == os.SCHED_IDLE
        await process.close()

    asyncio.run(main())
    assert (os.sched_getscheduler(0), os.getpriority(os.PRIO_PROCESS, 0)) == before


@linux
def test_shadows_simulate_when_nobody_else_wants_the_core():
    none = Arrivals(np.zeros(0), np.zeros(0, np.int32), np.zeros(0, np.int32))

    async def main() -> None:
        shadows = ShadowProcess({OWN: ShadowWorld(load(None, {"DYNAMOLLM_CONTROLLER__POLICY": "static"}), OWN)})
        assert await shadows.follow(none, 0.0)
        (child,) = shadows._pool._processes
        assert os.sched_getscheduler(child) == os.SCHED_IDLE
        await shadows.close()

    asyncio.run(main())


def test_a_solve_that_nobody_wants_any_more_is_not_waited_for(tmp_path):
    begun = tmp_path / "begun"

    async def main() -> int:
        process = ControllerProcess(partial(Slow, str(begun)))
        tick = await process.first_tick(0.0)
        (child,) = process._pool._processes
        solving = asyncio.create_task(process.on_tick(tick, None))
        while not begun.exists():  # noqa: ASYNC110 - another process makes it
            await asyncio.sleep(0.01)
        began_s = time.monotonic()
        await process.close()
        assert time.monotonic() - began_s < 300.0, "half of what the solve takes"
        with pytest.raises(ControllerLostError):
            await solving
        return child

    with pytest.raises(ProcessLookupError):
        os.kill(asyncio.run(main()), 0)


def test_what_has_not_begun_ends_as_well():
    pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    end(pool)
    end(pool)
    with pytest.raises(RuntimeError):
        pool.submit(os.getpid)
