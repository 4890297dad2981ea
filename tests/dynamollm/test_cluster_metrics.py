"""The cluster and its controller as Prometheus reads them."""

import asyncio
import dataclasses

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from dynamollm.adapters.configuration import load
from dynamollm.cluster_metrics import PLAN_GAUGES, ControlMetrics, FleetMetrics
from dynamollm.control_loop import ControlLoop
from dynamollm.deployment import Deployment
from dynamollm.operations import Operations, Outcome
from dynamollm.settings import ControllerSettings
from dynamollm.wiring import build
from energy.adapters.catalogue import load_profile
from pools.drivers.fake import FakeDriver
from pools.drivers.port import InstanceEvent
from pools.instances import Instance, InstanceState
from proxy.metrics import Histogram
from simulator.virtual_loop import run
from solver.control import (
    ClusterState,
    Demand,
    Diagnostic,
    Effects,
    InstanceViews,
    Level,
    Observation,
    ScaleIn,
    SetFrequency,
    Tick,
)

MODEL = "llama-3.1-70b"


def scraped(*collectors) -> dict[tuple[str, frozenset], float]:
    """Every sample of what the collectors expose, by name and labels."""
    registry = CollectorRegistry()
    for collector in collectors:
        registry.register(collector)
    families = text_string_to_metric_families(generate_latest(registry).decode())
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


def sample(samples, name, **labels):
    return samples[name, frozenset(labels.items())]


@pytest.fixture
def deployment():
    deployment = Deployment(load(None, {}), {MODEL: load_profile("llama-3.1-70b-fp8-h100")})
    for spec in deployment.configured():
        state = InstanceState.STARTING if spec.pool == "LL" else InstanceState.READY
        deployment.put(Instance(spec.id, spec.pool, spec.shape, "http://h:1", state, spec.sm_clock_mhz, spec.gpus))
    return deployment


def test_instances_are_counted_by_pool_tp_clock_and_state(deployment):
    deployment.set_sm_clock("ss-1", 1200, 1200)
    samples = scraped(FleetMetrics(deployment, lambda _: 0))
    shape = {"gen_ai_request_model": MODEL, "pool": "SS", "tp": "2", "sm_clock_mhz": "1200", "state": "ready"}
    assert sample(samples, "dynamollm_instances", **shape) == 1
    starting = {**shape, "pool": "LL", "tp": "8", "sm_clock_mhz": "1980", "state": "starting"}
    assert sample(samples, "dynamollm_instances", **starting) == 1
    assert sum(value for (name, _), value in samples.items() if name == "dynamollm_instances") == 9


def test_gpus_and_their_mean_clock_follow_a_change_of_shape(deployment):
    before = scraped(FleetMetrics(deployment, lambda _: 0))
    spec = deployment.specify("SS", None, 990)
    deployment.put(Instance(spec.id, "SS", spec.shape, "http://h:2", InstanceState.READY, 990, spec.gpus))
    after = scraped(FleetMetrics(deployment, lambda _: 0))
    pool = {"gen_ai_request_model": MODEL, "pool": "SS"}
    assert sample(before, "dynamollm_held_gpus", **pool) == 2
    assert sample(after, "dynamollm_held_gpus", **pool) == 4
    assert sample(before, "dynamollm_sm_clock_hertz", **pool) == 1980e6
    assert sample(after, "dynamollm_sm_clock_hertz", **pool) == pytest.approx((1980e6 + 990e6) / 2)
    assert sample(after, "dynamollm_gpus") == 32


def test_the_clock_of_a_pool_is_weighted_by_gpus(deployment):
    deployment.set_pool("ss-1", "LL")  # two GPUs at 1,200 MHz beside eight at 1,980 MHz
    deployment.set_sm_clock("ss-1", 1200, 1200)
    samples = scraped(FleetMetrics(deployment, lambda _: 0))
    pool = {"gen_ai_request_model": MODEL, "pool": "LL"}
    assert sample(samples, "dynamollm_sm_clock_hertz", **pool) == pytest.approx((2 * 1200e6 + 8 * 1980e6) / 10)


def test_load_is_summed_over_a_pool(deployment):
    spec = deployment.specify("MM")
    deployment.put(Instance(spec.id, "MM", spec.shape, "http://h:3", InstanceState.READY, 1980, spec.gpus))
    held = {"mm-1": 3, "mm-2": 4, "ss-1": 5}
    samples = scraped(FleetMetrics(deployment, lambda instance_id: held.get(instance_id, 0)))
    by_pool = {dict(labels)["pool"]: v for (name, labels), v in samples.items() if name.endswith("in_flight_requests")}
    assert (by_pool["MM"], by_pool["SS"], by_pool["LL"]) == (7, 5, 0)


def test_a_gone_instance_leaves_no_sample(deployment):
    deployment.change(InstanceEvent("ss-1", InstanceState.STOPPED))
    samples = scraped(FleetMetrics(deployment, lambda _: 0))
    assert not [labels for _, labels in samples if ("pool", "SS") in labels]
    assert sample(samples, "dynamollm_gpus") == 32


class Scripted:
    """Answers with what it is given, every ten seconds."""

    def __init__(self, answers: list[tuple[tuple, tuple]]) -> None:
        self.answers = iter(answers)

    async def first_tick(self, now_s: float) -> Tick:
        return Tick(now_s, Level.JOINT)

    async def on_tick(self, tick: Tick, seen: Observation) -> Effects:
        await asyncio.sleep(0.3)
        actions, notes = next(self.answers, ((), ()))
        return Effects(actions, Tick(tick.at_s + 10.0, Level.JOINT), notes)

    async def close(self) -> None:
        pass


def nothing_seen(now_s: float) -> Observation:
    ints, floats = np.zeros(0, dtype=np.int64), np.zeros(0)
    views = InstanceViews((), ints, ints, ints, ints, ints, floats, np.zeros((0, 9)), *[floats] * 7)
    state = ClusterState(now_s, ("LL",), ("a",), np.full(1, 8, dtype=np.int64), np.ones(1, dtype=np.bool_), views)
    return Observation(now_s, state, Demand(10.0, np.zeros(9), np.zeros(9), np.zeros(9), np.zeros(9)))


def controlled(answers: list[tuple[tuple, tuple]], seconds: float) -> dict[tuple[str, frozenset], float]:
    """What is exposed after a scripted controller was in command for so long."""

    async def main():
        clock = asyncio.get_running_loop().time
        deployment = Deployment(load(None, {}), {MODEL: load_profile("llama-3.1-70b-fp8-h100")})
        driver = FakeDriver(deployment.placement.nodes, (1980,))
        operations = Operations(deployment, driver, None, clock)
        control = ControlLoop(Scripted(answers), nothing_seen, operations.apply, clock, first_look_s=0.0)
        task = asyncio.create_task(control.run())
        await asyncio.sleep(seconds)
        samples = scraped(ControlMetrics(control, operations))
        task.cancel()
        await operations.close()
        return samples

    return run(main())


def plan_note(**numbers: float) -> Diagnostic:
    return Diagnostic("plan", "because", numbers)


def test_ticks_are_counted_and_timed_also_those_that_decide_nothing():
    samples = controlled([], seconds=35.0)
    assert sample(samples, "dynamollm_control_ticks_total") == 4
    assert sample(samples, "dynamollm_control_tick_seconds_count") == 4
    assert sample(samples, "dynamollm_control_tick_seconds_sum") == pytest.approx(1.2)
    assert sample(samples, "dynamollm_control_tick_seconds_bucket", le="0.2") == 0
    assert sample(samples, "dynamollm_control_tick_seconds_bucket", le="0.5") == 4


def test_decisions_are_counted_by_what_they_are_about():
    notes = (plan_note(), Diagnostic("clock", "full"))
    samples = controlled([((), notes), ((), (plan_note(),))], seconds=15.0)
    assert sample(samples, "dynamollm_decisions_total", topic="plan") == 2
    assert sample(samples, "dynamollm_decisions_total", topic="clock") == 1
    assert sample(samples, "dynamollm_decisions_total", topic="escalation") == 0


def test_the_last_plan_is_told_and_what_a_later_note_leaves_out_stays():
    told = [((), (plan_note(power_w=9000.0, gap=0.0005, served=1.0),)), ((), (plan_note(observed_rps=3.0),))]
    samples = controlled(told, seconds=15.0)
    assert sample(samples, "dynamollm_plan_power_watts") == 9000.0
    assert sample(samples, "dynamollm_plan_gap_ratio") == 0.0005
    assert sample(samples, "dynamollm_plan_observed_requests_per_second") == 3.0


def test_before_the_first_plan_nothing_is_claimed_of_one():
    names = {name for name, _ in controlled([], seconds=5.0)}
    assert not names & {name for name, _ in PLAN_GAUGES.values()}


def test_operations_are_counted_by_kind_and_outcome_and_the_plan_in_force_is_told():
    gone = ScaleIn(deadline_s=100.0, plan=(2, 7), instance_id="not-there")
    late = SetFrequency(deadline_s=100.0, plan=(2, 6), instance_id="not-there", sm_clock_mhz=1980)
    samples = controlled([((gone, late), ())], seconds=5.0)
    assert sample(samples, "dynamollm_operations_total", action="ScaleIn", outcome=Outcome.DONE.value) == 1
    assert sample(samples, "dynamollm_operations_total", action="SetFrequency", outcome=Outcome.STALE.value) == 1
    assert sample(samples, "dynamollm_operations_total", action="Reshard", outcome=Outcome.ABANDONED.value) == 0
    assert sample(samples, "dynamollm_plan_epoch") == 2
    assert sample(samples, "dynamollm_plan_version") == 7
    assert sample(samples, "dynamollm_operations_under_way") == 0


def test_every_number_a_controller_tells_of_a_plan_that_is_a_gauge_has_a_unit_in_its_name():
    units = ("watts", "ratio", "seconds", "requests_per_second")
    assert [name for name, _ in PLAN_GAUGES.values() if not name.endswith(units)] == []


def test_the_gateway_exposes_them_beside_its_own():
    settings = dataclasses.replace(load(None, {}), controller=ControllerSettings("static"))
    application = build(settings, clock=lambda: 1.0)
    names = {family.name for family in application.services.metrics.registry.collect()}
    assert {"dynamollm_requests", "dynamollm_energy_joules", "dynamollm_instances", "dynamollm_control_ticks"} <= names
    assert isinstance(application.control.tick_s, Histogram)
