"""VllmDriver beyond the contract: processes, drains, crashes, orphans, clocks. tests/vllm runs it on a real vLLM."""

import asyncio
import os
import signal
import time
from pathlib import Path

import httpx
import pytest
from vllm_examples import MemoryNode, stand_in_driver

from energy.gpu import ClockLock
from pools.drivers.port import DriverError, InstanceEvent, InstanceSpec, StartRefusedError
from pools.drivers.vllm_launch import VllmLaunch, VllmModel, command_line, environment
from pools.instances import GpuSlot, InstanceShape, InstanceState

ORPHAN = f"orphan-{os.getpid()}"
WITHIN_S = 30.0  # a bound on a hang, not a measure of speed


def spec(instance_id="i-0", first=0, tp=2, clock=1980, model="tiny"):
    gpus = tuple(GpuSlot("node-0", first + index) for index in range(tp))
    return InstanceSpec(instance_id, "ss", InstanceShape(model, "H100-SXM", tp), gpus, clock)


def play(scenario, **options):
    async def playing():
        driver = stand_in_driver(**options)
        try:
            async with asyncio.timeout(WITHIN_S):
                await scenario(driver, driver.events())
        finally:
            await driver.close()

    asyncio.run(playing())


async def until(events, state) -> InstanceEvent:
    async for event in events:
        if event.state is state:
            return event
    raise AssertionError(f"no {state} before the events ended")


async def ready(driver, events, what=None):
    instance = await driver.start(what or spec())
    await until(events, InstanceState.READY)
    return instance


async def seen(instance):
    async with httpx.AsyncClient() as client:
        return (await client.get(f"{instance.url}/environment")).json()["environment"]


async def eventually(holds, what):
    for _ in range(1000):
        if holds():
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"never: {what}")


def engines() -> set[int]:
    """Groups of processes that bear an instance's name."""
    found = set()
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and f"DYNAMOLLM_INSTANCE={ORPHAN}".encode() in (entry / "environ").read_bytes():
                found.add(int(entry.name))
        except OSError:
            continue
    return found


def test_an_engine_sees_its_own_gpus_and_bears_its_instances_name():
    async def scenario(driver, events):
        variables = await seen(await ready(driver, events, spec("i-7", first=2)))
        assert variables["CUDA_VISIBLE_DEVICES"] == "2,3"
        assert variables["DYNAMOLLM_INSTANCE"] == "i-7"
        assert variables["DYNAMOLLM_NODE"] == "node-0"
        assert variables["HF_HUB_OFFLINE"] == "1"

    play(scenario, environment={"HF_HUB_OFFLINE": "1"})


def test_the_command_line_has_what_the_operator_adds_last():
    launch = VllmLaunch(arguments=("--enforce-eager", "--port", "1"))
    words = command_line(launch, VllmModel("/models/m", ("--max-model-len", "4096")), spec(), 8001)
    assert words[:5] == ["vllm", "serve", "/models/m", "--served-model-name", "tiny"]
    assert words[words.index("--port") + 1] == "8001"
    assert words[words.index("--tensor-parallel-size") + 1] == "2"
    assert words[-5:] == ["--enforce-eager", "--port", "1", "--max-model-len", "4096"]


def test_an_engine_that_makes_its_tensor_parallelism_up_is_not_told_of_it():
    words = command_line(VllmLaunch(splits_model=False), VllmModel("m"), spec(), 8001)
    assert "--tensor-parallel-size" not in words
    assert "--enable-sleep-mode" not in words


def test_what_makes_it_this_instance_wins_over_the_environment_it_inherits():
    launch = VllmLaunch(environment={"A": "launch", "CUDA_VISIBLE_DEVICES": "7"})
    variables = environment(
        launch, VllmModel("m", environment={"C": "model"}), spec(), "1:2", {"A": "inherited", "B": "inherited"}
    )
    assert (variables["A"], variables["B"]) == ("launch", "inherited")
    assert variables["C"] == "model"
    assert (variables["CUDA_VISIBLE_DEVICES"], variables["DYNAMOLLM_CONTROLLER"]) == ("0,1", "1:2")


def test_an_engine_that_dies_loading_fails_with_the_error_of_its_log_and_frees_its_gpus():
    async def scenario(driver, events):
        await driver.start(spec())
        event = await until(events, InstanceState.FAILED)
        assert "exited with status 1: ValueError: free memory on device is less than desired" in event.reason
        assert event.reason.endswith("i-0.log")
        assert await driver.list() == ()
        await driver.start(spec("i-1"))

    play(scenario, environment={"FAIL_START": "1"})


def test_a_killed_engine_fails_with_all_its_processes():
    async def scenario(driver, events):
        variables = await seen(await ready(driver, events, spec(ORPHAN)))
        assert variables["DYNAMOLLM_CONTROLLER"].startswith(f"{os.getpid()}:")
        group = os.getpgid(min(engines()))
        os.kill(group, signal.SIGKILL)
        event = await until(events, InstanceState.FAILED)
        assert "was killed by SIGKILL" in event.reason
        await eventually(lambda: not engines(), "the process it had made went with it")

    play(scenario)


def test_a_server_that_refuses_the_first_request_fails_with_its_answer():
    async def scenario(driver, events):
        await driver.start(spec())
        event = await until(events, InstanceState.FAILED)
        assert "refuses to complete 'ready': 400" in event.reason

    play(scenario, models={"tiny": VllmModel("/models/-refusing-/m")})


def test_a_command_that_is_not_installed_is_refused_with_the_fix():
    async def scenario(driver, events):
        with pytest.raises(StartRefusedError, match=r"cannot execute .*is it installed"):
            await driver.start(spec())
        assert await driver.list() == ()

    play(scenario, command=("/nowhere/vllm",))


def test_a_drain_waits_for_the_last_answer_and_no_longer():
    async def scenario(driver, events):
        instance = await ready(driver, events)
        body = {"model": "tiny", "prompt": "slow", "max_tokens": 3}
        async with httpx.AsyncClient() as client:
            answering = asyncio.create_task(client.post(f"{instance.url}/v1/completions", json=body, timeout=10))
            await eventually(lambda: httpx.get(f"{instance.url}/load").json()["server_load"], "it has the request")
            await driver.stop("i-0", 20.0)
            assert (await answering).json()["usage"]["completion_tokens"] == 3

    began = time.monotonic()
    play(scenario)
    assert time.monotonic() - began < 15.0  # the stand-in never ends by itself: the grace would be 20 s


def test_an_engine_that_cannot_sleep_is_not_parked_and_stays_ready():
    async def scenario(driver, events):
        await ready(driver, events)
        with pytest.raises(DriverError, match="VLLM_SERVER_DEV_MODE"):
            await driver.park("i-0")
        (instance,) = await driver.list()
        assert (instance.state, instance.sm_clock_mhz) == (InstanceState.READY, 1980)

    play(scenario, can_park=False)


def test_only_a_ready_instance_parks():
    async def scenario(driver, events):
        await driver.start(spec())
        with pytest.raises(DriverError, match="starting"):
            await driver.park("i-0")

    play(scenario)


def test_locks_are_taken_off_when_an_instance_is_gone_however_it_went():
    node = MemoryNode()

    async def scenario(driver, events):
        await ready(driver, events, spec(ORPHAN, clock=1200))
        assert [board.locked_sm_clocks_mhz() for board in node.boards[:3]] == [ClockLock(1200, 1200)] * 2 + [None]
        os.kill(os.getpgid(min(engines())), signal.SIGKILL)
        await until(events, InstanceState.FAILED)
        assert [board.locked_sm_clocks_mhz() for board in node.boards] == [None] * 8
        await driver.start(spec("i-1", clock=900))
        await driver.stop("i-1", 0.0)
        assert [board.locked_sm_clocks_mhz() for board in node.boards] == [None] * 8

    play(scenario, nodes={"node-0": node})


def test_a_lock_whose_lease_lapsed_is_set_again(monkeypatch):
    monkeypatch.setattr("pools.drivers.vllm_clocks.RENEW_PERIOD_S", 0.01)
    node = MemoryNode()

    async def scenario(driver, events):
        await driver.start(spec(clock=1200))
        for board in node.boards[:2]:
            board.reset_sm_clocks()
        node.lost = (0, 1)
        again = [ClockLock(1200, 1200)] * 2
        await eventually(lambda: [b.locked_sm_clocks_mhz() for b in node.boards[:2]] == again, "locked again")

    play(scenario, nodes={"node-0": node})


def test_on_a_node_without_an_agent_engines_run_and_clocks_are_refused():
    async def scenario(driver, events):
        await ready(driver, events)
        with pytest.raises(DriverError, match=r"driver\.agents\.node-0"):
            await driver.set_sm_clock("i-0", 1200)
        await driver.park("i-0")
        await driver.wake("i-0")
        assert (await driver.list())[0].state is InstanceState.READY

    play(scenario, nodes={})
