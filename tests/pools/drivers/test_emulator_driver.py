"""What only a driver with processes can do wrong: leave them behind, miss their death, lose a request."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time

import httpx
import pytest

from pools.drivers.emulator import EmulatedMachine, EmulatedModel, EmulatorDriver
from pools.drivers.port import DriverError, InstanceSpec, StartRefusedError
from pools.instances import GpuSlot, InstanceShape, InstanceState

PROFILE = "llama-3.1-70b-fp8-h100"
WITHIN_S = 20.0
SPAWN = """
import asyncio, sys, time
from pools.drivers.emulator import EmulatedMachine, EmulatedModel, EmulatorDriver
from pools.drivers.port import InstanceSpec
from pools.instances import GpuSlot, InstanceShape

async def main():
    driver = EmulatorDriver([EmulatedMachine("n")], {"tiny": EmulatedModel(sys.argv[1])}, startup_s=0.0)
    spec = InstanceSpec("i", "p", InstanceShape("tiny", "H100-SXM", 2), (GpuSlot("n", 0), GpuSlot("n", 1)), 1980)
    events = driver.events()
    instance = await driver.start(spec)
    async for event in events:
        if event.state.value == "ready":
            print(instance.url, flush=True)
    time.sleep(1000)

asyncio.run(main())
"""


def spec(instance_id: str = "i-0", first: int = 0, node: str = "node-0", model: str = "tiny") -> InstanceSpec:
    gpus = (GpuSlot(node, first), GpuSlot(node, first + 1))
    return InstanceSpec(instance_id, "ss", InstanceShape(model, "H100-SXM", 2), gpus, 1980)


def play(scenario, **options) -> None:
    async def with_driver() -> None:
        machines = [EmulatedMachine("node-0"), EmulatedMachine("node-1")]
        driver = EmulatorDriver(machines, {"tiny": EmulatedModel(PROFILE)}, startup_s=0.0, **options)
        try:
            async with asyncio.timeout(WITHIN_S):
                await scenario(driver)
        finally:
            await driver.close()

    asyncio.run(with_driver())


async def until(events, instance_id, state):
    async for event in events:
        if (event.instance_id, event.state) == (instance_id, state):
            return event
    raise AssertionError("the stream of events ended")


async def start_ready(driver, a_spec):
    events = driver.events()
    instance = await driver.start(a_spec)
    await until(events, a_spec.id, InstanceState.READY)
    return instance


def chat(max_tokens: int, **fields) -> dict:
    messages = [{"role": "user", "content": "Hello"}]
    return {"model": "tiny", "messages": messages, "max_tokens": max_tokens, "ignore_eos": True, **fields}


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def wait_until_gone(pid: int) -> None:
    until_s = time.monotonic() + WITHIN_S
    while alive(pid):
        assert time.monotonic() < until_s, f"process {pid} is still there"
        threading.Event().wait(0.01)


def pids(driver) -> list[int]:
    return [process._process.pid for process in driver._processes if process._process is not None]


def test_a_started_instance_serves_at_its_url():
    async def scenario(driver):
        instance = await start_ready(driver, spec())
        async with httpx.AsyncClient(base_url=instance.url) as client:
            answer = await client.post("/v1/chat/completions", json=chat(3))
        assert answer.json()["usage"]["completion_tokens"] == 3

    play(scenario)


def test_stopping_lets_running_requests_finish():
    async def scenario(driver):
        instance = await start_ready(driver, spec())
        async with httpx.AsyncClient(base_url=instance.url, timeout=10) as client:
            request = asyncio.create_task(client.post("/v1/chat/completions", json=chat(40)))
            while (await client.get("/load")).json() == {"server_load": 0}:
                pass
            await driver.stop("i-0", 10.0)
            assert (await request).json()["usage"]["completion_tokens"] == 40

    play(scenario)


def test_a_crash_is_told_with_its_reason_and_frees_the_gpus():
    async def scenario(driver):
        await start_ready(driver, spec())
        events = driver.events()
        await driver.inject("i-0", {"crash": True})
        event = await until(events, "i-0", InstanceState.FAILED)
        assert "died" in event.reason
        await driver.start(spec())

    play(scenario)


def test_the_death_of_a_process_fails_its_instances_only_and_the_next_start_spawns_another():
    async def scenario(driver):
        await start_ready(driver, spec("i-0", node="node-0"))
        await start_ready(driver, spec("i-1", node="node-1"))
        events = driver.events()
        first, _ = pids(driver)
        os.kill(first, signal.SIGKILL)
        event = await until(events, "i-0", InstanceState.FAILED)
        assert "node-0" in event.reason
        assert [instance.id for instance in await driver.list()] == ["i-1"]
        await start_ready(driver, spec("i-2", node="node-0"))
        assert len(set(pids(driver)) - {first}) == 2

    play(scenario, processes=2)


def test_closing_leaves_no_process_and_refuses_what_comes():
    async def scenario(driver):
        await driver.start(spec("i-0", node="node-0"))
        await driver.start(spec("i-1", node="node-1"))
        running = pids(driver)
        assert len(running) == 2
        await driver.close()
        assert not any(alive(pid) for pid in running)
        with pytest.raises(DriverError, match="closed"):
            await driver.start(spec("i-2"))

    play(scenario, processes=2)


def test_no_process_is_spawned_before_it_is_needed():
    async def scenario(driver):
        assert await driver.list() == ()
        assert pids(driver) == []
        await driver.start(spec())
        assert len(pids(driver)) == 1

    play(scenario, processes=2)


def test_instances_do_not_outlive_a_parent_that_is_killed():
    with subprocess.Popen([sys.executable, "-c", SPAWN, PROFILE], stdout=subprocess.PIPE, text=True) as parent:
        url = parent.stdout.readline().strip()
        assert httpx.get(f"{url}/health").status_code == 200
        children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(parent.pid)], capture_output=True, text=True)
        if children.returncode:  # not every ps knows --ppid
            children = subprocess.run(["pgrep", "-P", str(parent.pid)], capture_output=True, text=True, check=True)
        (child,) = map(int, children.stdout.split())
        parent.kill()
        wait_until_gone(child)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health")


def test_a_gpu_of_another_kind_and_a_profile_of_another_gpu_are_refused():
    async def scenario(driver):
        other = InstanceSpec("i-0", "ss", InstanceShape("tiny", "H200-SXM", 2), spec().gpus, 1980)
        with pytest.raises(StartRefusedError, match="node-0 has H100-SXM"):
            await driver.start(other)
        await driver.start(spec())

    play(scenario)
    machines = [EmulatedMachine("node-0", "H200-SXM")]

    async def another() -> None:
        driver = EmulatorDriver(machines, {"tiny": EmulatedModel(PROFILE)})
        with pytest.raises(StartRefusedError, match="is of H100-SXM"):
            await driver.start(InstanceSpec("i-0", "ss", InstanceShape("tiny", "H200-SXM", 2), spec().gpus, 1980))
        await driver.close()

    asyncio.run(another())


def test_an_emulator_that_cannot_start_says_what_to_try():
    async def scenario() -> None:
        driver = EmulatorDriver([EmulatedMachine("node-0", "no-such-gpu")], {"tiny": EmulatedModel(PROFILE)})
        with pytest.raises(DriverError, match="did not start"):
            await driver.agent_urls()
        await driver.close()

    asyncio.run(scenario())


def test_every_node_has_an_agent():
    async def scenario(driver):
        urls = await driver.agent_urls()
        await driver.start(spec(node="node-1"))
        async with httpx.AsyncClient() as client:
            for node, url in urls.items():
                metrics = (await client.get(f"{url}/metrics")).text
                assert metrics.count(f'hostname="{node}"') == 4 * 8
            energy = (await client.get(f"{urls['node-1']}/gpu/get_cumulative_energy?gpu_ids=0,2")).json()
            assert set(energy) == {"0", "2"}
        await driver.set_sm_clock("i-0", 1200)
        async with httpx.AsyncClient(base_url=urls["node-1"]) as agent:
            assert 'DCGM_FI_DEV_SM_CLOCK{gpu="1"' in (await agent.get("/metrics")).text
            clocks = [line for line in (await agent.get("/metrics")).text.splitlines() if "SM_CLOCK{" in line]
            assert [line.rsplit(" ", 1)[1] for line in clocks] == ["1200", "1200"] + ["1980"] * 6

    play(scenario, processes=2)


# --- emulators that somebody else runs -------------------------------------------------------------------------------


@pytest.fixture
def emulators():
    """A process with both nodes, and where to find each."""
    command = [sys.executable, "-m", "simulator.emulator", "--watch-stdin"]
    command += ["--node=node-0=8xH100-SXM", "--node=node-1=8xH100-SXM"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    url = json.loads(process.stdout.readline())["control_url"]
    yield {"node-0": url, "node-1": url}
    process.stdin.close()
    process.wait(WITHIN_S)
    process.stdout.close()


def test_what_runs_on_attached_emulators_outlives_the_driver_and_is_taken_over(emulators):
    async def first(driver):
        await start_ready(driver, spec())
        assert await driver.set_sm_clock("i-0", 1200) == 1200

    async def second(driver):
        events = driver.events()
        (taken,) = await driver.list()
        assert (taken.id, taken.pool, taken.state, taken.sm_clock_mhz) == ("i-0", "ss", InstanceState.READY, 1200)
        assert taken.gpus == spec().gpus
        async with httpx.AsyncClient(base_url=taken.url) as client:
            answer = await client.post("/v1/chat/completions", json=chat(3))
        assert answer.json()["usage"]["completion_tokens"] == 3
        assert await driver.set_sm_clock("i-0", 1500) == 1500
        with pytest.raises(DriverError, match="runs already"):
            await driver.start(spec())
        await start_ready(driver, spec("i-1", first=2))
        await driver.inject("i-0", {"crash": True})
        await until(events, "i-0", InstanceState.FAILED)

    async def third(driver):
        assert [instance.id for instance in await driver.list()] == ["i-1"]
        await driver.stop("i-1", grace_s=0.0)
        assert await driver.list() == ()

    for scenario in (first, second, third):
        play(scenario, emulators=emulators)


def test_the_agents_of_attached_emulators_are_known(emulators):
    async def scenario(driver):
        urls = await driver.agent_urls()
        assert urls.keys() == {"node-0", "node-1"}
        async with httpx.AsyncClient() as client:
            assert "DCGM_FI_DEV_SM_CLOCK" in (await client.get(f"{urls['node-1']}/metrics")).text

    play(scenario, emulators=emulators)


def test_instances_listen_where_their_emulator_does():
    command = [sys.executable, "-m", "simulator.emulator", "--watch-stdin", "--host=127.0.0.9"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    url = json.loads(process.stdout.readline())["control_url"]

    async def scenario():
        driver = EmulatorDriver(
            [EmulatedMachine("node-0")], {"tiny": EmulatedModel(PROFILE)}, startup_s=0.0, emulators={"node-0": url}
        )
        instance = await driver.start(spec())
        assert instance.url.startswith("http://127.0.0.9:")
        await driver.close()

    asyncio.run(scenario())
    process.stdin.close()
    process.wait(WITHIN_S)
    process.stdout.close()


def test_an_emulator_that_is_not_there_or_lacks_a_node_is_named(emulators):
    async def not_there(driver):
        with pytest.raises(DriverError, match=r"http://127.0.0.1:9 does not answer"):
            await driver.list()

    async def lacks(driver):
        with pytest.raises(DriverError, match="emulates node-0, node-1, not node-2"):
            await driver.list()

    play(not_there, emulators=dict.fromkeys(emulators, "http://127.0.0.1:9"))
    asyncio.run(lacks(EmulatorDriver([EmulatedMachine("node-2")], {}, emulators={"node-2": emulators["node-0"]})))
