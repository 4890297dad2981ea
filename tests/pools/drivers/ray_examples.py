"""A real Ray cluster on this machine: a head and three nodes of eight GPUs that are numbers only."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
from vllm_examples import STAND_IN, MemoryNode

from pools.drivers.vllm_clocks import NodeGpus
from pools.drivers.vllm_launch import VllmLaunch, VllmModel

NODES = ("node-0", "node-1", "node-2")
GPUS_A_NODE = 8
NAMESPACE = "dynamollm-test"
# a killed node is noticed within about a second; nothing is reported, and no worker is started before it is needed
ENVIRONMENT = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "4",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_enable_worker_prestart": "0",
    "RAY_prestart_worker_first_driver": "0",
    "RAY_DEDUP_LOGS": "0",
}
SMALL = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False}


class RayMachines:
    """Nodes by name, to be killed and to come back."""

    def __init__(self) -> None:
        cluster_utils = pytest.importorskip("ray.cluster_utils", reason="Ray is not installed: dynamollm[ray]")
        self.cluster = cluster_utils.Cluster()
        self.cluster.add_node(num_gpus=0, node_name="head", **SMALL)
        self._nodes: dict[str, Any] = {}
        for name in NODES:
            self.join(name)

    def join(self, name: str, gpus: int = GPUS_A_NODE) -> None:
        self._nodes[name] = self.cluster.add_node(num_gpus=gpus, node_name=name, **SMALL)

    def kill(self, name: str) -> None:
        """As a machine that loses power: its raylet and all it runs get SIGKILL."""
        self.cluster.remove_node(self._nodes.pop(name), allow_graceful=False)


@contextmanager
def ray_machines() -> Iterator[RayMachines]:
    ray = pytest.importorskip("ray", reason="Ray is not installed: dynamollm[ray]")
    before = dict(os.environ)
    os.environ.update(ENVIRONMENT)
    machines = None
    try:
        machines = RayMachines()
        ray.init(address=machines.cluster.address, namespace=NAMESPACE, log_to_driver=False, configure_logging=False)
        yield machines
    finally:
        ray.shutdown()
        if machines is not None:
            machines.cluster.shutdown()
        os.environ.clear()
        os.environ.update(before)


def ray_driver(
    agents: Callable[[str], Any] | Mapping[str, NodeGpus] | None = None,
    nodes: tuple[str, ...] = ("node-0", "node-1"),
    models: Mapping[str, VllmModel] | None = None,
    launch: VllmLaunch | None = None,
    **options: Any,
) -> Any:
    """A driver over the cluster that runs; engines are stand-ins and clocks are in memory unless said otherwise."""
    from pools.drivers.ray import RayDriver, RayOptions
    from pools.drivers.ray_cluster import RayCluster

    return RayDriver(
        RayCluster("auto", NAMESPACE),
        dict.fromkeys(nodes, GPUS_A_NODE),
        models or {"tiny": VllmModel("/models/tiny")},
        launch or VllmLaunch(command=STAND_IN),
        RayOptions(
            **{"log_dir": Path(mkdtemp()), "start_timeout_s": 60.0, "leave_running": False, **options},
        ),
        agents or {name: MemoryNode() for name in nodes},
    )
