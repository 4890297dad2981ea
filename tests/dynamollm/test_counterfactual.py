"""What was saved: requests as they become known, meters at the same moment, an error that is measured.

Live shadows beside a simulation of the whole trace: tests/dynamollm/test_parity.py, whose run they share.
"""

import asyncio
from dataclasses import replace

import pytest
from test_parity import cluster

from dynamollm.adapters.shadow_process import ShadowProcess
from dynamollm.counterfactual import LONGEST_WAIT_S, OWN, Counterfactual, ShadowLostError, compared
from dynamollm.shadow_wiring import build_shadows
from pools.classes import RequestClass, Slo
from pools.request import Request
from proxy.outcome import Outcome
from simulator.virtual_loop import run
from simulator.workload.arrivals import Arrivals


class Scripted:
    """Shadows that draw 100 W and 200 W, and remember what they were told."""

    def __init__(self) -> None:
        self.told: list[tuple[list[float], list[int], float]] = []
        self.closed = False
        self.lost = False

    async def follow(self, requests: Arrivals, until_s: float) -> dict[str, float]:
        if self.lost:
            raise ShadowLostError("killed")
        self.told.append((requests.arrival_s.tolist(), requests.output_tokens.tolist(), until_s))
        return {OWN: 100.0 * until_s, "single-pool": 200.0 * until_s}

    async def close(self) -> None:
        self.closed = True


def request(name: str, arrival_s: float) -> Request:
    return Request(name, "llama", arrival_s, 300, 50.0, RequestClass.MS, Slo(2.0, 0.1))


def ended(asked: Request, status: int = 200, tokens: int | None = 80) -> Outcome:
    return Outcome(asked, None, status, "i", "LL", asked.arrival_s + 5.0, None, 310, tokens, False)


def watch(scenario, seconds: float = 100.0):
    """Run it beside a scenario; meters draw 102 W."""
    shadows = Scripted()

    async def main() -> Counterfactual:
        clock = asyncio.get_running_loop().time
        it = Counterfactual(shadows, lambda: 102.0 * clock(), clock)
        task = asyncio.create_task(it.run())
        await asyncio.sleep(0)
        await scenario(it, clock)
        await asyncio.sleep(max(0.0, seconds - clock()))
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return it

    return run(main()), shadows


def test_shadows_follow_to_where_every_request_has_ended():
    async def scenario(it, clock):
        await asyncio.sleep(1.0)
        slow, quick = request("slow", clock()), request("quick", clock() + 1.0)
        it.on_arrival(slow)
        it.on_arrival(quick)
        it.on_outcome(ended(quick, tokens=20))
        await asyncio.sleep(31.0)
        it.on_outcome(ended(slow, tokens=700))

    it, shadows = watch(scenario)
    assert shadows.closed
    (arrivals_s, tokens, until_s), *later = [told for told in shadows.told if told[0]]
    assert arrivals_s == [1.0, 2.0], "in order of arrival, not of their ends"
    assert tokens == [700, 20]
    assert until_s == pytest.approx(40.0)
    assert not later
    before = [told for told in shadows.told if told[2] < 40.0]
    assert all(told[2] < 1.0 for told in before), "nothing is simulated beyond a request that still runs"
    comparison = it.comparisons[0]
    assert comparison.policy == "single-pool"
    assert comparison.saved_j == pytest.approx(98.0 * comparison.seconds)
    assert comparison.band_j == pytest.approx(200.0 * comparison.seconds * (1.0 - 100.0 / 102.0))


def test_one_that_never_ends_is_taken_to_be_as_long_as_predicted():
    async def scenario(it, clock):
        endless = request("endless", clock() + 1.0)
        it.on_arrival(endless)
        await asyncio.sleep(LONGEST_WAIT_S + 30.0)
        it.on_outcome(ended(endless))  # too late to matter

    _, shadows = watch(scenario, 200.0)
    assert [told[:2] for told in shadows.told if told[0]] == [([1.0], [50])]


def test_what_an_engine_would_have_refused_is_no_work_for_anybody():
    async def scenario(it, clock):
        for status in (400, 404, 429, 499, 503, 200):
            asked = request(str(status), clock() + 0.1)
            it.on_arrival(asked)
            it.on_outcome(ended(asked, status))

    _, shadows = watch(scenario)
    assert sum(len(told[0]) for told in shadows.told) == 4


def test_nothing_is_begun_without_a_request_and_lost_shadows_keep_their_last_word():
    async def quiet(it, clock):
        await asyncio.sleep(60.0)

    it, shadows = watch(quiet)
    assert shadows.told == []
    assert it.comparisons == ()

    async def lost(it, clock):
        it.on_arrival(asked := request("a", clock()))
        it.on_outcome(ended(asked))
        await asyncio.sleep(25.0)
        it._shadows.lost = True

    it, shadows = watch(lost)
    assert shadows.closed
    assert it.comparisons[0].seconds == pytest.approx(20.0)


def test_the_band_is_what_the_own_shadow_misses_the_meters_by():
    (single,) = compared({OWN: 90.0, "single-pool": 300.0}, 100.0, 60.0)
    assert (single.saved_j, single.band_j) == (200.0, pytest.approx(30.0))
    (exact,) = compared({OWN: 100.0, "single-pool": 300.0}, 100.0, 60.0)
    assert exact.band_j == pytest.approx(3.0), "a percent at least"


def test_shadows_run_in_a_process_of_their_own():
    shadows = build_shadows(replace(cluster(), controller=replace(cluster().controller, policy="static")))
    assert isinstance(shadows, ShadowProcess)

    async def main() -> None:
        first = await shadows.follow(Arrivals.of((1.0,), (300,), (20,)), 10.0)
        second = await shadows.follow(Arrivals.of((), (), ()), 20.0)
        assert set(first) == {OWN, "single-pool", "packing"}
        assert all(second[name] > first[name] > 0.0 for name in first)
        with pytest.raises(ShadowLostError, match="comes after"):
            await shadows.follow(Arrivals.of((1.0,), (300,), (20,)), 30.0)
        await shadows.close()

    asyncio.run(main())


def test_several_models_have_no_shadows():
    settings = cluster()
    second = replace(settings.models[0], name="second")
    assert build_shadows(replace(settings, models=(*settings.models, second))) is None
