import asyncio
import os
from collections.abc import Callable
from functools import partial

import pytest

from benchmarks.adapters.gateway_processes import _process, core_number
from benchmarks.solve_interference import NOW, WINDOW, Solving, p99_ms, solving, summary
from solver.adapters.controller_process import ControllerProcess
from solver.control import Effects


class Counted:
    """A process that answers at once, or never before it is let."""

    def __init__(self) -> None:
        self.asked = self.answered = 0
        self.may_answer = asyncio.Event()
        self.may_answer.set()

    async def on_tick(self, tick, observation):
        self.asked += 1
        await self.may_answer.wait()
        self.answered += 1
        await asyncio.sleep(0)
        return Effects((), tick)


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - nobody sets an event
        await asyncio.sleep(0)


def test_pairs_give_the_ratio_and_the_target_is_one_sided():
    found = summary(WINDOW, [2.0, 2.0, 4.0], [2.0, 3.0, 4.0], [0.1, 0.3])
    assert found["ratios"] == [1.0, 1.5, 1.0]
    assert (found["p99_alone_ms"], found["p99_while_solving_ms"], found["ratio"]) == (2.0, 3.0, 1.0)
    assert (found["solves_meanwhile"], found["solve_median_s"]) == (2, pytest.approx(0.2))
    assert found["met"]
    assert not summary(WINDOW, [2.0], [2.11], [])["met"]
    assert summary(WINDOW, [2.0], [1.5], [])["met"], "quicker while solving is chance, and no harm"


def test_solves_follow_each_other_while_a_window_lasts_and_what_is_begun_is_ended():
    async def main() -> None:
        process = Counted()
        async with solving(process, 0.0) as solves:
            await until(lambda: process.asked >= 5)
            process.may_answer.clear()
            await until(lambda: process.asked > process.answered)
            asyncio.get_running_loop().call_later(0.02, process.may_answer.set)
        assert process.asked == process.answered == len(solves.took_s), "the next window is alone"
        asked = process.asked
        await asyncio.sleep(0.02)
        assert process.asked == asked

    asyncio.run(main())


def test_at_a_pace_a_window_meets_one_solve_and_its_end_is_not_waited_for():
    async def main() -> None:
        process = Counted()
        async with solving(process, 3600.0) as solves:
            await until(lambda: bool(solves.took_s))
        assert process.asked == 1

    asyncio.run(main())


def test_plans_are_solved_in_the_products_own_process():
    async def main() -> None:
        process = ControllerProcess(partial(Solving, 96, None))
        try:
            tick = await process.first_tick(0.0)
            assert (await process.on_tick(tick, None)).next_tick == tick
        finally:
            await process.close()

    asyncio.run(main())


def test_a_solver_can_be_held_on_a_core():
    allowed = os.sched_getaffinity(0)
    try:
        core = core_number(0)
        solver = Solving(96, core, 1)
        assert os.sched_getaffinity(0) == {core}
        assert solver.on_tick(NOW, None).actions == ()
    finally:
        os.sched_setaffinity(0, allowed)


@pytest.mark.parametrize("own", [True, False])
def test_a_process_shares_the_callers_session_where_it_is_told_to(own):
    with _process(["sleep", "600"], "sleeper", own) as process:
        session, group = os.getsid(process.pid), os.getpgid(process.pid)
        assert (session == process.pid) is own
        assert own or session == os.getsid(0)
        assert group == process.pid, "it is ended with all it began, and nobody else is"
    assert process.poll() is not None


def test_a_window_with_failed_requests_is_no_measurement(monkeypatch):
    monkeypatch.setattr("benchmarks.solve_interference.measure", lambda *_, **__: '{"good": 3999, "requests": 4000}')
    with pytest.raises(RuntimeError, match="1 of 4000 requests failed"):
        p99_ms(None, type("Gateway", (), {"port": 1}), WINDOW)
    told = '{"good": 4000, "requests": 4000, "latency_us": {"p99": 2830}}'
    monkeypatch.setattr("benchmarks.solve_interference.measure", lambda *_, **__: told)
    assert p99_ms(None, type("Gateway", (), {"port": 1}), WINDOW) == 2.83
