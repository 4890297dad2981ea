"""The vLLM driver of a configuration: real engines on this machine's GPUs, or on emulated devices. Starts nothing."""

import hashlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from dynamollm.deployment import node_gpus
from dynamollm.errors import UserError
from dynamollm.settings import Settings
from energy.adapters.agent_client import AgentClient
from energy.adapters.catalogue import profile_path
from energy.gpus import GPUS
from pools.drivers.vllm import VllmDriver
from pools.drivers.vllm_clocks import GpuClocks, NodeGpus
from pools.drivers.vllm_launch import VllmLaunch, VllmModel
from simulator.vllm_device.adapters.device import BOARDS, PROFILE
from simulator.vllm_device.adapters.gpus import BoardNode

SOURCES = Path(__file__).resolve().parent.parent
HOLDER = "dynamollm-gateway"
WORKER = "simulator.vllm_device.adapters.vllm_worker.EmulatedDeviceWorker"
# one thread, for a small model: more only wait for each other; and no executor of its own process, which spins
_ON_CPU = {"OMP_NUM_THREADS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}
_CPU_ARGUMENTS = ("--dtype", "float32", "--enforce-eager", "--distributed-executor-backend", "uni")


def build_vllm_driver(settings: Settings) -> VllmDriver:
    """Engines on this machine's GPUs; clocks through the nodes' agents, where they are named."""
    vllm = settings.driver.vllm
    agents: dict[str, NodeGpus] = {node: AgentClient(address, HOLDER) for node, address in vllm.agents.items()}
    launch = VllmLaunch(
        command=(vllm.command,), arguments=vllm.arguments, environment=vllm.environment, can_park=vllm.can_park
    )
    return _driver(settings, launch, agents, {})


def build_emulated_device_driver(settings: Settings) -> VllmDriver:
    """Engines on CPU, whose devices are as the profile says. Raises ``UserError`` for what cannot be emulated."""
    vllm = settings.driver.vllm
    kinds = {name: node.gpu for node in settings.nodes for name in node.names()}
    if unknown := sorted(set(kinds.values()) - set(GPUS)):
        raise UserError(f"nodes: no figures of GPU {unknown[0]!r}; known: {', '.join(GPUS)}")
    folder = _boards(vllm.log_dir)
    boards: dict[str, NodeGpus] = {
        name: BoardNode(name, count, GPUS[kinds[name]], folder) for name, count in node_gpus(settings.nodes).items()
    }
    launch = VllmLaunch(
        command=(vllm.command,),
        arguments=(*_CPU_ARGUMENTS, "--kv-cache-memory-bytes", "1", "--worker-cls", WORKER, *vllm.arguments),
        environment={**_ON_CPU, "PYTHONPATH": str(SOURCES), BOARDS: str(folder), **vllm.environment},
        splits_model=False,
        can_park=vllm.can_park,
    )
    return _driver(
        settings,
        launch,
        boards,
        {model.name: {PROFILE: str(profile_path(model.profile).resolve())} for model in settings.models},
    )


def _boards(log_dir: str) -> Path:
    """Where the boards of a deployment lie, which its engines map for as long as they run, whoever commands them."""
    deployment = hashlib.sha256(str(Path(log_dir).expanduser().resolve()).encode()).hexdigest()[:12]
    return Path(tempfile.gettempdir()) / f"dynamollm-boards-{os.getuid()}-{deployment}"


def _driver(
    settings: Settings,
    launch: VllmLaunch,
    gpus: dict[str, NodeGpus],
    environments: Mapping[str, Mapping[str, str]],
) -> VllmDriver:
    vllm = settings.driver.vllm
    return VllmDriver(
        node_gpus(settings.nodes),
        served_models(settings, environments),
        launch,
        GpuClocks(gpus),
        Path(vllm.log_dir).expanduser(),
        start_timeout_s=vllm.start_timeout_s,
        leave_running=vllm.leave_running,
    )


def served_models(settings: Settings, environments: Mapping[str, Mapping[str, str]]) -> dict[str, VllmModel]:
    """What the engines of each model are told; ``environments``: more of it, by model name."""
    return {
        model.name: VllmModel(model.path or model.name, model.vllm_arguments, environments.get(model.name, {}))
        for model in settings.models
    }
