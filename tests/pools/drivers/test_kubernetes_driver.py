"""The Kubernetes driver against an API server that conflicts, refuses, forgets and loses nodes."""

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable

import pytest
from kubernetes_examples import Cluster, kubernetes_cluster, kubernetes_driver

from pools.drivers import kubernetes_objects as objects
from pools.drivers.kubernetes import KubernetesDriver
from pools.drivers.kubernetes_api import ApiError, ConflictError, KubernetesApi, NotFoundError
from pools.drivers.port import DriverError, InstanceEvent, InstanceSpec, StartRefusedError, UnknownGpuError
from pools.instances import GpuSlot, InstanceShape, InstanceState

DEPLOYMENT = "test-tiny-ss-tp2"


def spec(name: str, first: int = 0, node: str = "node-0", tp: int = 2) -> InstanceSpec:
    gpus = tuple(GpuSlot(node, first + index) for index in range(tp))
    return InstanceSpec(name, "ss", InstanceShape("tiny", "H100-SXM", tp), gpus, 1200)


def play(scenario: Callable[[Cluster, KubernetesDriver], Awaitable[None]], **options: object) -> None:
    async def main() -> None:
        async with kubernetes_cluster() as cluster:
            driver = kubernetes_driver(cluster, **options)
            try:
                async with asyncio.timeout(60):
                    await scenario(cluster, driver)
            finally:
                await driver.close()

    asyncio.run(main())


async def until(holds: Callable[[], Awaitable[bool]]) -> None:
    while not await holds():  # noqa: ASYNC110 - nobody tells
        await asyncio.sleep(0.05)


async def ready(driver: KubernetesDriver, *names: str) -> None:
    async def all_ready() -> bool:
        states = {instance.id: instance.state for instance in await driver.list()}
        return all(states.get(name) is InstanceState.READY for name in names)

    await until(all_ready)


async def event(driver_events, name: str, state: InstanceState) -> InstanceEvent:
    async for told in driver_events:
        if (told.instance_id, told.state) == (name, state):
            return told
    raise AssertionError("the driver was closed")


def test_instances_are_replicas_and_their_pods_lie_where_the_plan_says():
    async def scenario(cluster: Cluster, driver: KubernetesDriver) -> None:
        await asyncio.gather(
            driver.start(spec("a")), driver.start(spec("b", node="node-1")), driver.start(spec("c", 2))
        )
        await ready(driver, "a", "b", "c")
        assert await cluster.replicas() == {DEPLOYMENT: 3}
        placed = {p["metadata"]["labels"][objects.INSTANCE]: p["spec"]["nodeName"] for p in await cluster.pods()}
        assert placed == {"a": "node-0", "b": "node-1", "c": "node-0"}
        assert len({instance.url for instance in await driver.list()}) == 3
        await driver.stop("b", 1.0)  # that very one, not the newest
        assert await cluster.replicas() == {DEPLOYMENT: 2}

        async def the_others_alone() -> bool:  # a pod made in its place before the replica went, goes unplaced
            return {p["metadata"]["labels"].get(objects.INSTANCE) for p in await cluster.pods()} == {"a", "c"}

        await until(the_others_alone)
        assert {i.id: i.state for i in await driver.list()} == dict.fromkeys("ac", InstanceState.READY)
        await driver.start(spec("d", 4, tp=4))
        assert await cluster.replicas() == {DEPLOYMENT: 2, "test-tiny-ss-tp4": 1}

    play(scenario)


def test_an_instance_leaves_readiness_before_it_is_stopped():
    async def scenario(cluster: Cluster, driver: KubernetesDriver) -> None:
        await driver.start(spec("a"))
        await ready(driver, "a")
        (pod,) = await cluster.pods()
        assert objects.read_pod(pod).serving
        before = len(cluster.server.seen)
        await driver.stop("a", 1.0)
        calls = [
            (method, "status" if "/status" in path else "scale" if "/scale" in path else path.rpartition("/")[2])
            for method, path, body in cluster.server.seen[before:]
            if ("dynamollm.dev/serving" in str(body) and method == "PATCH")
            or (method == "DELETE" and "gracePeriodSeconds" in path)
            or path.endswith("/scale")
        ]
        assert [method for method, _ in calls] == ["PATCH", "DELETE", "PATCH"]
        assert (calls[0][1], calls[2][1]) == ("status", "scale")

    play(scenario)


def test_a_clock_is_an_annotation_that_the_agent_enforces():
    async def scenario(cluster: Cluster, driver: KubernetesDriver) -> None:
        await driver.start(spec("a"))
        await ready(driver, "a")
        assert await driver.set_sm_clock("a", 1003) == 1005
        pod = objects.read_pod((await cluster.pods())[0])
        assert (pod.clock_mhz, pod.awake_clock_mhz) == (1005, 1005)
        await driver.park("a")
        pod = objects.read_pod((await cluster.pods())[0])
        assert (pod.clock_mhz, pod.awake_clock_mhz) == (345, 1005)

    play(scenario)


def test_conflicts_throttling_and_outages_of_the_server_are_sat_out():
    async def scenario(cluster: Cluster, driver: KubernetesDriver) -> None:
        cluster.server.refuse("PATCH", r"/scale$", 429, times=2, **{"retry-after": "0"})
        cluster.server.refuse("PATCH", r"/pods/[^/]+$", 409)  # the claim: changed by somebody else meanwhile
        cluster.server.refuse("POST", r"/binding$", 503)
        await driver.start(spec("a"))
        await ready(driver, "a")
        cluster.server.refuse("POST", r"/binding$", 500, after=True)  # done, but the answer is lost: 409 comes next
        await driver.start(spec("b", 2))
        await ready(driver, "a", "b")
        assert await cluster.replicas() == {DEPLOYMENT: 2}
        assert all(not refusal.times for refusal in cluster.server.refusals)

    play(scenario)


def test_what_the_server_refuses_for_good_is_told_and_leaves_nothing():
    async def scenario(cluster: Cluster, driver: KubernetesDriver) -> None:
        cluster.server.refuse("POST", r"/deployments$", 403, times=9)
        with pytest.raises(ApiError, match="403: refused on purpose"):
            await driver.start(spec("a"))
        assert await driver.list() == ()
        cluster.server.refusals.clear()
        await driver.start(spec("a"))
        assert await cluster.replicas() == {DEPLOYMENT: 1}

    play(scenario)


def test_a_stop_that_fails_half_way_can_be_repeated():
    async def scenario(cluster: Cluster, driver: KubernetesDriver) -> None:
        await driver.start(spec("a"))
        await driver.start(spec("b", 2))
        await ready(driver, "a", "b")
        cluster.server.refuse("PATCH", r"/scale$", 403)
        with pytest.raises(ApiError, match="403"):
            await driver.stop("a", 0.5)
        await driver.stop("a", 0.5)

        async def settled() -> bool:
            return await cluster.replicas() == {DEPLOYMENT: 1} and len(await cluster.pods()) == 1

        await until(settled)
        assert [instance.id for instance in await driver.list()] == ["b"]

    play(scenario)


def test_a_watch_that_drops_loses_no_event():
    async def scenario(cluster: Cluster, driver: KubernetesDriver) -> None:
        await driver.start(spec("a"))
        await ready(driver, "a")
        cluster.server.refuse("GET", r"watch=true", 410, times=2)  # the version asked for is forgotten
        await cluster.server.drop_watches()
        (pod,) = await cluster.pods()
        events = driver.events()
        await cluster.api.delete("pods", pod["metadata"]["name"])
        told = await event(events, "a", InstanceState.FAILED)
        assert "deleted" in told.reason
        await driver.start(spec("b"))
        await ready(driver, "b")
        assert await cluster.replicas() == {DEPLOYMENT: 1}

    play(scenario)


def test_a_container_that_restarts_is_starting_until_it_gives_tokens_again():
    async def scenario(cluster: Cluster, driver: KubernetesDriver) -> None:
        await driver.start(spec("a"))
        await ready(driver, "a")
        events = driver.events()
        (process,) = cluster.processes.values()
        os.killpg(process.pid, signal.SIGKILL)
        told = await event(events, "a", InstanceState.STARTING)
        assert "restarted" in told.reason
        await event(events, "a", InstanceState.READY)

    play(scenario)


def test_instances_of_a_node_that_falls_silent_fail_and_the_node_is_lost(monkeypatch):
    monkeypatch.setattr("pools.drivers.kubernetes.NODES_PERIOD_S", 0.1)

    async def scenario(cluster: Cluster, driver: KubernetesDriver) -> None:
        await driver.start(spec("a"))
        await driver.start(spec("b", node="node-1"))
        await ready(driver, "a", "b")
        events = driver.events()
        assert driver.lost_nodes() == frozenset()
        await cluster.break_node("node-1")
        assert "node-1 is lost" in (await event(events, "b", InstanceState.FAILED)).reason
        assert driver.lost_nodes() == {"node-1"}
        with pytest.raises(UnknownGpuError, match="node-1 is not ready"):
            await driver.start(spec("c", node="node-1"))
        assert [instance.id for instance in await driver.list()] == ["a"]

    play(scenario)


def test_a_cordoned_node_is_lost_to_plans_and_what_runs_there_goes_on(monkeypatch):
    monkeypatch.setattr("pools.drivers.kubernetes.NODES_PERIOD_S", 0.1)

    async def scenario(cluster: Cluster, driver: KubernetesDriver) -> None:
        await driver.start(spec("a"))
        await cluster.api.patch("nodes", "node-0", {"spec": {"unschedulable": True}})

        async def lost() -> bool:
            return driver.lost_nodes() == {"node-0"}

        await until(lost)
        await ready(driver, "a")

    play(scenario)


def test_a_later_driver_takes_over_what_runs():
    async def scenario(cluster: Cluster, driver: KubernetesDriver) -> None:
        first = await driver.start(spec("a"))
        await driver.start(spec("b", 2))
        await ready(driver, "a", "b")
        await driver.set_sm_clock("a", 1500)
        await driver.park("b")
        await driver.close()
        # while nobody looks: one replica too many
        await cluster.api.patch("deployments", DEPLOYMENT, {"spec": {"replicas": 3}}, "scale")
        later = kubernetes_driver(cluster)
        try:
            a, b = await later.list()
            assert (a.id, a.url, a.state, a.sm_clock_mhz, a.gpus) == (
                "a",
                first.url,
                InstanceState.READY,
                1500,
                spec("a").gpus,
            )
            assert (b.id, b.state, b.sm_clock_mhz) == ("b", InstanceState.PARKED, 345)

            async def two() -> bool:
                return await cluster.replicas() == {DEPLOYMENT: 2} and len(await cluster.pods()) == 2

            await until(two)
            await later.wake("b")
            await later.stop("a", 0.0)
        finally:
            await later.close()

        async def empty() -> bool:
            return await cluster.pods() == []

        await until(empty)

    play(scenario, leave_running=True)


def test_in_metrics_mode_replicas_are_told_and_somebody_else_scales():
    async def scenario(cluster: Cluster, driver: KubernetesDriver) -> None:
        starting = asyncio.create_task(driver.start(spec("a")))
        await asyncio.sleep(0.5)
        assert driver.desired() == {DEPLOYMENT: 1}
        assert await cluster.replicas() == {}
        scaler = kubernetes_driver(cluster)._api  # what an HPA does with the metric
        await scaler.create("deployments", driver._shapes[DEPLOYMENT])
        await scaler.patch("deployments", DEPLOYMENT, {"spec": {"replicas": 1}}, "scale")
        assert (await starting).id == "a"
        await ready(driver, "a")
        stopping = asyncio.create_task(driver.stop("a", 0.0))
        await asyncio.sleep(0.2)
        assert driver.desired() == {DEPLOYMENT: 0}
        await scaler.patch("deployments", DEPLOYMENT, {"spec": {"replicas": 0}}, "scale")
        await stopping
        await scaler.close()

    play(scenario, scales=False)


def test_no_pod_in_time_is_a_refused_start():
    async def scenario(cluster: Cluster, driver: KubernetesDriver) -> None:
        with pytest.raises(StartRefusedError, match=f"no pod of {DEPLOYMENT} came up within 0.5 s"):
            await driver.start(spec("a"))
        assert driver.desired() == {DEPLOYMENT: 0}

    play(scenario, scales=False, start_timeout_s=0.5)


def test_errors_of_the_api_have_names_and_a_server_that_is_not_there_is_said():
    async def scenario(cluster: Cluster, driver: KubernetesDriver) -> None:
        with pytest.raises(NotFoundError, match="404"):
            await cluster.api.get("pods", "nobody")
        await cluster.add_node("again")
        with pytest.raises(ConflictError, match="409"):
            await cluster.add_node("again")

    play(scenario)

    async def nowhere() -> None:
        api = KubernetesApi("serving", url="http://127.0.0.1:9")
        try:
            with pytest.raises(DriverError, match="does not answer GET"):
                await api.list("nodes")
        finally:
            await api.close()

    asyncio.run(nowhere())


def test_names_of_objects_are_valid_and_differ_where_what_they_name_does():
    assert objects.object_name("prod", "llama", "SS", "tp2") == objects.object_name("prod", "llama", "SS", "tp2")
    names = {
        objects.object_name("prod", model, pool, "tp2")
        for model in ("meta-llama/Llama-3.1-70B", "meta-llama-Llama-3-1-70B", "x" * 80, "x" * 81)
        for pool in ("SS", "ss")
    }
    assert len(names) == 8
    assert all(len(name) <= 50 and name == name.lower() and name.strip("-") == name for name in names)
    assert objects.object_name("prod", "tiny", "ss", "tp2") == "prod-tiny-ss-tp2"
