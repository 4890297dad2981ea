"""Nodes that an autoscaler is asked for: what the Ray driver hints, waits for and lets go. No Ray cluster is needed."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray", reason="Ray is not installed: dynamollm[ray]")

from pools.drivers.port import DriverError, InstanceSpec, StartRefusedError, UnknownGpuError
from pools.drivers.ray import RayDriver, RayOptions
from pools.drivers.ray_cluster import RayNode
from pools.drivers.vllm_launch import VllmLaunch, VllmModel
from pools.instances import GpuSlot, InstanceShape


class ScalingCluster:
    """Stands for ``RayCluster``; a node comes up ``delay`` looks after it was hinted at. It starts no instance."""

    def __init__(self, delay: int = 2) -> None:
        self.hints: list[list[int]] = []
        self.reserved: list[str] = []
        self.delay = delay

    def connect(self) -> None:
        pass

    disconnect = connect
    end_agents = connect

    def supervised(self) -> list[Any]:
        return []

    def nodes(self) -> list[RayNode]:
        if self.hints and self.hints[-1]:
            self.delay -= 1
            return [RayNode("id-new", "10.0.0.7", 8)] if self.delay < 0 else []
        return []

    def hint(self, gpus: list[int]) -> None:
        self.hints.append(list(gpus))

    def reserve(self, instance_id: str, gpus: int, node_id: str) -> None:
        self.reserved.append(node_id)
        raise DriverError("no further than this")

    def release(self, instance_id: str) -> None:
        pass


def driver(cluster: ScalingCluster, **options: Any) -> RayDriver:
    told = RayOptions(Path("/nowhere"), leave_running=False, **options)
    models = {"tiny": VllmModel("/models/tiny")}
    return RayDriver(cluster, {"node-0": 8, "node-1": 8}, models, VllmLaunch(), told, {})  # type: ignore[arg-type]


SPEC = InstanceSpec("i", "LL", InstanceShape("tiny", "H100-SXM", 1), (GpuSlot("node-1", 0),), 1980)


def play(cluster: ScalingCluster, expected: type[DriverError], match: str, **options: Any) -> None:
    async def scenario() -> None:
        ray = driver(cluster, **options)
        try:
            assert await ray.list() == ()
            assert ray.lost_nodes() == (frozenset() if options.get("autoscale") else {"node-0", "node-1"})
            with pytest.raises(expected, match=match):
                await ray.start(SPEC)
        finally:
            await ray.close()

    asyncio.run(asyncio.wait_for(scenario(), 30))


def test_a_node_is_asked_for_waited_for_and_bound_to_the_name_that_wanted_it(monkeypatch):
    monkeypatch.setattr("pools.drivers.ray.NODES_PERIOD_S", 0.05)
    cluster = ScalingCluster()
    play(cluster, DriverError, "no further", autoscale=True)
    assert cluster.hints == [[8], []]  # the whole node, and then no more
    assert cluster.reserved == ["id-new"]


def test_a_node_that_does_not_come_is_a_refused_start(monkeypatch):
    monkeypatch.setattr("pools.drivers.ray.NODES_PERIOD_S", 0.05)
    cluster = ScalingCluster(delay=10_000)
    play(cluster, StartRefusedError, r"no node came up for node-1 within 0.5 s", autoscale=True, start_timeout_s=0.5)
    assert cluster.hints == [[8], []]


def test_without_an_autoscaler_a_node_that_is_not_there_is_lost_and_nobody_is_asked():
    cluster = ScalingCluster()
    play(cluster, UnknownGpuError, "node node-1 is not in the Ray cluster")
    assert cluster.hints == []
