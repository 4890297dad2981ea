"""What every InstanceDriver keeps to, whoever runs the engines: one suite, run on each driver."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import httpx
import pytest
from ray_examples import ray_driver
from vllm_examples import stand_in_driver

from pools.drivers.attach import AttachDriver
from pools.drivers.emulator import EmulatedMachine, EmulatedModel, EmulatorDriver
from pools.drivers.fake import FakeDriver
from pools.drivers.port import (
    DriverError,
    GpuBusyError,
    InstanceDriver,
    InstanceEvent,
    InstanceSpec,
    StartRefusedError,
    UnknownGpuError,
    UnknownInstanceError,
)
from pools.instances import GpuSlot, InstanceShape, InstanceState

MODEL, GPU = "tiny", "H100-SXM"
PROFILE = "llama-3.1-70b-fp8-h100"
WITHIN_S = 60.0  # a bound on a hang, not a measure of speed


def fake() -> FakeDriver:
    return FakeDriver({"node-0": 8, "node-1": 8}, range(345, 1981, 15), models=frozenset({MODEL}))


def emulator() -> EmulatorDriver:
    machines = [EmulatedMachine("node-0"), EmulatedMachine("node-1")]
    return EmulatorDriver(machines, {MODEL: EmulatedModel(PROFILE)}, startup_s=0.02, wake_s=0.02)


def attach() -> AttachDriver:
    """Its servers are there, and complete whatever they are asked to."""
    answer = httpx.MockTransport(lambda _: httpx.Response(200, json={"usage": {"completion_tokens": 2}}))
    return AttachDriver({"ss": ["http://a:1", "http://b:2"]}, transport=answer)


DRIVERS: dict[str, Callable[[], InstanceDriver]] = {
    "fake": fake,
    "emulator": emulator,
    "vllm": stand_in_driver,
    "ray": ray_driver,
    "attach": attach,
}
OF_WHOEVER_STARTS_ENGINES = {  # what holds for drivers that own the engines and their GPUs
    "test_a_gpu_belongs_to_one_engine",
    "test_what_cannot_start_is_refused_and_holds_nothing",
    "test_the_clock_is_snapped_to_a_supported_one",
    "test_parking_lowers_the_clock_and_waking_restores_it",
    "test_a_clock_set_while_parked_holds_after_waking",
}
CLUSTERS = {"ray": "ray_cluster"}  # fixtures that must be there first


@asynccontextmanager
async def opened(name: str) -> AsyncIterator[InstanceDriver]:
    if name == "kubernetes":
        from kubernetes_examples import kubernetes_cluster, kubernetes_driver  # skips where its extra is not installed

        async with kubernetes_cluster() as cluster:
            yield kubernetes_driver(cluster)
    else:
        yield DRIVERS[name]()


def spec(
    instance_id: str = "i-0", first: int = 0, tp: int = 2, node: str = "node-0", clock: int = 1980
) -> InstanceSpec:
    gpus = tuple(GpuSlot(node, first + index) for index in range(tp))
    return InstanceSpec(instance_id, "ss", InstanceShape(MODEL, GPU, tp), gpus, clock)


async def until(events: AsyncIterator[InstanceEvent], state: InstanceState, instance_id: str = "i-0") -> InstanceEvent:
    async for event in events:
        if event.instance_id == instance_id and event.state is state:
            return event
    raise AssertionError(f"the stream of events ended before {instance_id} was {state}")


Scenario = Callable[[InstanceDriver, AsyncIterator[InstanceEvent]], Awaitable[None]]


@pytest.fixture(params=[*DRIVERS, "kubernetes"])
def run(request) -> Callable[[Scenario], None]:
    """Play one scenario against a fresh driver, and close it whatever happens."""
    if request.param == "attach" and request.node.originalname in OF_WHOEVER_STARTS_ENGINES:
        pytest.skip("attached servers and their GPUs belong to others")
    if request.param in CLUSTERS:
        request.getfixturevalue(CLUSTERS[request.param])

    async def play(scenario: Scenario) -> None:
        async with opened(request.param) as driver:
            try:
                async with asyncio.timeout(WITHIN_S):
                    await scenario(driver, driver.events())
            finally:
                await driver.close()

    return lambda scenario: asyncio.run(play(scenario))


def test_a_started_instance_becomes_ready_and_is_listed(run):
    async def scenario(driver, events):
        instance = await driver.start(spec())
        assert instance.state is InstanceState.STARTING
        assert instance.url.startswith("http://")
        await until(events, InstanceState.READY)
        (listed,) = await driver.list()
        assert listed.state is InstanceState.READY
        assert (listed.id, listed.pool, listed.url, listed.gpus) == ("i-0", "ss", instance.url, spec().gpus)

    run(scenario)


def test_a_gpu_belongs_to_one_engine(run):
    async def scenario(driver, events):
        await driver.start(spec(tp=4))
        with pytest.raises(GpuBusyError, match="i-0"):
            await driver.start(spec("i-1", first=3))
        await driver.start(spec("i-1", first=4))
        await driver.start(spec("i-2", first=0, node="node-1"))
        assert [instance.id for instance in await driver.list()] == ["i-0", "i-1", "i-2"]

    run(scenario)


def test_what_cannot_start_is_refused_and_holds_nothing(run):
    async def scenario(driver, events):
        with pytest.raises(UnknownGpuError, match="node-7"):
            await driver.start(spec(node="node-7"))
        with pytest.raises(UnknownGpuError):
            await driver.start(spec(first=7))
        other = InstanceSpec("i-0", "ss", InstanceShape("no-such-model", GPU, 2), spec().gpus, 1980)
        with pytest.raises(StartRefusedError, match="no-such-model"):
            await driver.start(other)
        assert await driver.list() == ()
        await driver.start(spec())
        with pytest.raises(DriverError, match="i-0"):
            await driver.start(spec(first=4))

    run(scenario)


def test_stopping_frees_the_gpus_and_may_be_repeated(run):
    async def scenario(driver, events):
        await driver.start(spec())
        await until(events, InstanceState.READY)
        await driver.stop("i-0", 1.0)
        await until(events, InstanceState.STOPPED)
        assert await driver.list() == ()
        await driver.stop("i-0", 1.0)
        await driver.stop("never-there", 1.0)
        await driver.start(spec("i-1"))

    run(scenario)


def test_an_instance_may_be_stopped_while_it_starts(run):
    async def scenario(driver, events):
        await driver.start(spec())
        await driver.stop("i-0", 0.0)
        assert await driver.list() == ()
        await driver.start(spec("i-1"))

    run(scenario)


def test_the_clock_is_snapped_to_a_supported_one(run):
    async def scenario(driver, events):
        await driver.start(spec(clock=1201))
        (listed,) = await driver.list()
        assert listed.sm_clock_mhz == 1200
        in_force = await driver.set_sm_clock("i-0", 1403)
        assert in_force % 15 == 0
        assert abs(in_force - 1403) <= 15
        assert (await driver.list())[0].sm_clock_mhz == in_force
        assert await driver.set_sm_clock("i-0", 9000) == 1980
        assert await driver.set_sm_clock("i-0", 1) == 345

    run(scenario)


def test_parking_lowers_the_clock_and_waking_restores_it(run):
    async def scenario(driver, events):
        await driver.start(spec(clock=1605))
        await until(events, InstanceState.READY)
        for _ in range(2):
            await driver.park("i-0")
        await until(events, InstanceState.PARKED)
        (parked,) = await driver.list()
        assert (parked.state, parked.sm_clock_mhz) == (InstanceState.PARKED, 345)
        for _ in range(2):
            await driver.wake("i-0")
        await until(events, InstanceState.READY)
        (awake,) = await driver.list()
        assert (awake.state, awake.sm_clock_mhz) == (InstanceState.READY, 1605)

    run(scenario)


def test_a_clock_set_while_parked_holds_after_waking(run):
    async def scenario(driver, events):
        await driver.start(spec())
        await until(events, InstanceState.READY)
        await driver.park("i-0")
        assert await driver.set_sm_clock("i-0", 1200) == 1200
        assert (await driver.list())[0].sm_clock_mhz == 345
        await driver.wake("i-0")
        assert (await driver.list())[0].sm_clock_mhz == 1200

    run(scenario)


def test_an_unknown_instance_is_named_in_the_error(run):
    async def scenario(driver, events):
        for call in (driver.set_sm_clock("i-9", 1200), driver.park("i-9"), driver.wake("i-9")):
            with pytest.raises(UnknownInstanceError, match="i-9"):
                await call

    run(scenario)


def test_every_listener_hears_all_events_in_order_until_closed(run):
    async def scenario(driver, events):
        second, third = driver.events(), driver.events()
        await driver.start(spec())
        await until(third, InstanceState.READY)
        await driver.stop("i-0", 0.0)
        await driver.close()
        heard = [event.state async for event in events]
        assert heard == [event.state async for event in second]
        assert heard[0] is InstanceState.STARTING
        assert heard[-1] is InstanceState.STOPPED
        assert [event async for event in driver.events()] == []

    run(scenario)


def test_a_specification_that_contradicts_itself_is_refused():
    shape = InstanceShape(MODEL, GPU, 2)
    with pytest.raises(ValueError, match="needs 2 GPUs"):
        InstanceSpec("i-0", "ss", shape, (GpuSlot("node-0", 0),), 1980)
    with pytest.raises(ValueError, match="single node"):
        InstanceSpec("i-0", "ss", shape, (GpuSlot("node-0", 0), GpuSlot("node-1", 0)), 1980)
    with pytest.raises(ValueError, match="single node"):
        InstanceSpec("i-0", "ss", shape, (GpuSlot("node-0", 0), GpuSlot("node-0", 0)), 1980)
