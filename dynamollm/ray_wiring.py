"""The Ray driver of a configuration: real engines or emulated ones on a cluster's nodes. Starts nothing.

Ray is an extra: its modules are imported only where this driver is asked for.
"""

import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from dynamollm.deployment import node_gpus
from dynamollm.errors import UserError
from dynamollm.settings import Settings
from dynamollm.vllm_wiring import HOLDER, served_models
from energy.adapters.agent_client import AgentClient
from energy.adapters.catalogue import profile_path
from energy.gpus import GPUS
from pools.drivers.port import InstanceDriver
from pools.drivers.vllm_clocks import NodeGpus
from pools.drivers.vllm_launch import VllmLaunch
from simulator.vllm_device.adapters.device import BOARDS, PROFILE
from simulator.vllm_device.adapters.gpus import board_gpus

if TYPE_CHECKING:
    from pools.drivers.ray_agent import AgentSetup

EMULATED_VLLM = (sys.executable, "-m", "simulator.emulator.adapters.vllm_command")


def build_ray_driver(settings: Settings) -> InstanceDriver:
    """Raises ``UserError`` where Ray is not installed, or a GPU that is to be emulated is not known."""
    try:
        from pools.drivers.ray import RayDriver, RayOptions
        from pools.drivers.ray_cluster import RayCluster
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "ray":
            raise
        raise UserError("driver.kind: ray needs the extra of that name: pip install 'dynamollm[ray]'") from None
    ray, vllm = settings.driver.ray, settings.driver.vllm
    environments: Mapping[str, Mapping[str, str]] = {}
    if ray.engine == "emulated":
        launch = VllmLaunch(
            command=EMULATED_VLLM,
            arguments=("--emulated-startup-s", str(settings.driver.startup_s), *vllm.arguments),
            environment={BOARDS: str(_boards(ray.namespace)), **vllm.environment},
        )
        environments = {model.name: {PROFILE: str(profile_path(model.profile).resolve())} for model in settings.models}
    else:
        launch = VllmLaunch((vllm.command,), vllm.arguments, vllm.environment, can_park=vllm.can_park)
    return RayDriver(
        RayCluster(ray.address, ray.namespace, ray.cpus_per_gpu),
        node_gpus(settings.nodes),
        served_models(settings, environments),
        launch,
        RayOptions(
            log_dir=Path(vllm.log_dir).expanduser(),
            start_timeout_s=vllm.start_timeout_s,
            leave_running=ray.leave_running,
            autoscale=ray.autoscale,
            holder=HOLDER,
        ),
        _agents(settings),
    )


def _boards(namespace: str) -> Path:
    """Where emulated boards lie, on whichever machine a node runs."""
    return Path(tempfile.gettempdir()) / f"dynamollm-boards-{namespace}"


def _agents(settings: Settings) -> "Callable[[str], AgentSetup] | Mapping[str, NodeGpus]":
    """Who sets the clocks: agents that are named, else actors, else nobody."""
    from pools.drivers.ray_agent import AgentSetup, nvml_gpus

    ray, named = settings.driver.ray, settings.driver.vllm.agents
    if named or ray.clocks == "none":
        return {node: AgentClient(address, HOLDER) for node, address in named.items()}
    counts = node_gpus(settings.nodes)
    kinds = {name: node.gpu for node in settings.nodes for name in node.names()}
    if ray.engine == "emulated" and (unknown := sorted(set(kinds.values()) - set(GPUS))):
        raise UserError(f"nodes: no figures of GPU {unknown[0]!r}; known: {', '.join(GPUS)}")

    def setup(node: str) -> AgentSetup:
        gpus = nvml_gpus
        if ray.engine == "emulated":
            gpus = partial(board_gpus, node, counts[node], GPUS[kinds[node]], _boards(ray.namespace))
        journal = Path(tempfile.gettempdir()) / f"dynamollm-agent-{ray.namespace}-{node.replace('/', '_')}.json"
        return AgentSetup(node, gpus, journal)

    return setup
