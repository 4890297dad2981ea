"""Clock intents: annotations of pods become leases at the node's agent, for as long as the driver lives."""

import asyncio
import os
import subprocess
import sys
import time

import pytest
from kubernetes_examples import NAMESPACE, kubernetes_cluster, kubernetes_driver
from test_kubernetes_driver import ready, spec
from vllm_examples import MemoryNode

from energy.gpu import ClockLock, GpuError
from pools.drivers.kubernetes_api import KubernetesApi
from pools.drivers.kubernetes_intents import SILENT_AFTER_S, ClockIntents, pod_devices


def clocks(node: MemoryNode) -> dict[int, int]:
    locks = {gpu.index: gpu.locked_sm_clocks_mhz() for gpu in node.gpus()}
    return {index: lock.high_mhz for index, lock in locks.items() if isinstance(lock, ClockLock)}


def test_a_pods_clock_is_locked_on_its_gpus_until_it_is_gone():
    async def scenario() -> None:
        now_s = 0.0
        devices: dict[str, frozenset[str]] = {}
        node = MemoryNode()
        async with kubernetes_cluster() as cluster:
            driver = kubernetes_driver(cluster)
            api = KubernetesApi(NAMESPACE, url=cluster.url)
            intents = ClockIntents(api, "node-0", "test", node.gpus, lambda: now_s, lambda: devices)
            try:
                assert await intents.round() == {}  # no driver has shown that it lives
                await driver.start(spec("a"))
                await driver.start(spec("b", node="node-1"))
                await ready(driver, "a", "b")
                names = {
                    p["metadata"]["labels"]["dynamollm.dev/instance"]: p["metadata"]["name"]
                    for p in await cluster.pods()
                }
                devices[names["a"]] = frozenset({"GPU-memory-4", "GPU-memory-5"})
                devices[names["b"]] = frozenset({"GPU-memory-0"})  # of another node: not this agent's
                assert await intents.round() == {4: 1200, 5: 1200}
                assert clocks(node) == {4: 1200, 5: 1200}
                await driver.set_sm_clock("a", 1500)
                await intents.round()
                assert clocks(node) == {4: 1500, 5: 1500}
                writes = sum(gpu.writes for gpu in node.gpus())
                assert await intents.round() == {4: 1500, 5: 1500}
                assert sum(gpu.writes for gpu in node.gpus()) == writes + 2  # the agent counts it as a sign of life
                await driver.park("a")
                await intents.round()
                assert clocks(node) == {4: 345, 5: 345}
                await driver.stop("a", 0.0)
                assert await intents.round() == {}
                assert clocks(node) == {}
            finally:
                await driver.close()
                await api.close()

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_a_driver_that_falls_silent_has_no_say_and_an_agent_that_fails_ends_nothing(monkeypatch):
    monkeypatch.setattr("pools.drivers.kubernetes_intents.PERIOD_S", 0.01)

    async def scenario() -> None:
        now_s, rounds = 0.0, 0
        async with kubernetes_cluster() as cluster:
            driver = kubernetes_driver(cluster)
            api = KubernetesApi(NAMESPACE, url=cluster.url)

            def no_agent():
                nonlocal rounds
                rounds += 1
                raise GpuError("the agent does not answer")

            intents = ClockIntents(api, "node-0", "test", no_agent, lambda: now_s, dict)
            try:
                await driver.list()
                with pytest.raises(GpuError):
                    await intents.round()
                following = asyncio.create_task(intents.run())
                while rounds < 4:  # noqa: ASYNC110 - nobody tells
                    await asyncio.sleep(0.01)
                following.cancel()
                await asyncio.gather(following, return_exceptions=True)
                await driver.close()
                await intents._driver_lives()
                now_s += SILENT_AFTER_S
                asked = rounds
                assert await intents.round() == {}
                assert rounds == asked
            finally:
                await driver.close()
                await api.close()

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_the_gpus_of_a_pod_are_read_from_its_processes():
    told = {"DYNAMOLLM_INSTANCE": "pod-7", "NVIDIA_VISIBLE_DEVICES": "GPU-a,GPU-b"}
    process = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"], env={**os.environ, **told})
    try:
        deadline_s = time.monotonic() + 10
        while "pod-7" not in pod_devices() and time.monotonic() < deadline_s:
            time.sleep(0.05)
        assert pod_devices()["pod-7"] == {"GPU-a", "GPU-b"}
    finally:
        process.kill()
        process.wait()
    assert "pod-7" not in pod_devices()
