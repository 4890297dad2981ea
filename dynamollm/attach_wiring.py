"""The attach driver of a configuration: servers somebody else started, listed or in a file. Starts nothing."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import ConfigDict, Field

from dynamollm.adapters.configuration import parse_yaml
from dynamollm.deployment import node_gpus
from dynamollm.errors import UserError
from dynamollm.settings import Name, Settings, TensorParallel
from dynamollm.validation import ConfigurationError
from dynamollm.validation import build as validated
from dynamollm.vllm_wiring import HOLDER
from energy.adapters.agent_client import AgentClient
from energy.adapters.catalogue import load_profile
from energy.profile import EnergyProfile, ProfileError
from pools.drivers.attach import AttachDriver
from pools.drivers.attached import AttachedFile, AttachedServer
from pools.drivers.vllm_clocks import GpuClocks, NodeGpus
from pools.instances import GpuSlot, InstanceShape


@dataclass(frozen=True, slots=True)
class ServerEntry:
    """One server of the file, below the name of its pool."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    url: str
    tp: TensorParallel | None = None  # None: as many as gpus; without those, the pool's
    node: Name | None = None
    gpus: tuple[Annotated[int, Field(ge=0)], ...] = ()  # of the node; with its agent, their clocks can be set


def build_attach_driver(settings: Settings) -> AttachDriver:
    """Servers of ``driver.urls``, or of ``driver.urls_file``. Raises ``UserError`` for a file that it cannot use."""
    if settings.driver.urls_file is None:
        return AttachDriver(settings.driver.urls)
    path = Path(settings.driver.urls_file).expanduser()
    profiles = _profiles(settings)

    def parse(text: str) -> tuple[AttachedServer, ...]:
        try:
            return parse_servers(text, str(path), settings, profiles)
        except ConfigurationError as error:
            raise ValueError(str(error)) from None

    file = AttachedFile(path, parse)
    try:
        file.read()
    except OSError as error:
        raise UserError(f"driver.urls_file: {path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"driver.urls_file: {error}") from None
    agents: dict[str, NodeGpus] = {
        node: AgentClient(address, HOLDER) for node, address in settings.driver.vllm.agents.items()
    }
    return AttachDriver({}, clocks=GpuClocks(agents), file=file)


def parse_servers(
    text: str, source: str, settings: Settings, profiles: Mapping[str, EnergyProfile]
) -> tuple[AttachedServer, ...]:
    """The servers of a file. Raises ``ConfigurationError`` naming each line or key of ``source`` that is wrong.

    ``profiles``, by model: the clock of pools that set none is the highest.
    """
    plain = parse_yaml(text, source)
    if plain is None:  # an accident rather than an order to let all of them go
        raise ConfigurationError(source, ["is empty; write {} where there shall be no server"])
    if not isinstance(plain, dict):
        raise ConfigurationError(source, [f"must hold servers by pool name, not a {type(plain).__name__}"])
    entries = validated(dict[str, tuple[ServerEntry, ...]], plain, source)
    if problems := list(_problems(entries, settings)):
        raise ConfigurationError(source, problems)
    pools = {pool.name: pool for pool in settings.pools}
    gpu_of = {name: node.gpu for node in settings.nodes for name in node.names()}
    made, problems = [], []
    for name, servers in entries.items():
        pool = pools[name]
        profile = profiles[pool.model]
        for index, entry in enumerate(servers):
            tp = entry.tp or len(entry.gpus) or pool.tp
            if tp not in (holds := profile.tensor_parallel):
                problems.append(
                    f"{name}[{index}].tp: profile {profile.name} holds for TP {', '.join(map(str, holds))}, not {tp}"
                )
            gpu = gpu_of[entry.node] if entry.node else settings.nodes[0].gpu
            slots = tuple(GpuSlot(entry.node, gpu_index) for gpu_index in entry.gpus) if entry.node else ()
            clock_mhz = pool.sm_clock_mhz or profile.sm_clocks_mhz[-1]
            shape = InstanceShape(pool.model, gpu, tp)
            made.append(AttachedServer(name, shape, entry.url.rstrip("/"), clock_mhz, slots))
    if problems:
        raise ConfigurationError(source, problems)
    return tuple(made)


def _problems(entries: Mapping[str, tuple[ServerEntry, ...]], settings: Settings) -> Iterator[str]:
    """What contradicts the configuration or itself."""
    pools = [pool.name for pool in settings.pools]
    nodes = node_gpus(settings.nodes)
    urls: dict[str, str] = {}
    held: dict[tuple[str, int], str] = {}
    for name, servers in entries.items():
        if name not in pools:
            yield f"{name}: no such pool; there are {', '.join(pools)}"
        for index, entry in enumerate(servers):
            at = f"{name}[{index}]"
            if not entry.url.startswith("http://"):
                yield f"{at}.url: must begin with http://; found {entry.url!r}"
            if (first := urls.setdefault(entry.url.rstrip("/"), at)) != at:
                yield f"{at}.url: {entry.url} is already {first}"
            yield from _problems_of_gpus(at, entry, nodes)
            if settings.controller.policy == "scale-freq" and entry.node not in settings.driver.vllm.agents:
                yield (
                    f"{at}: policy scale-freq sets its clock: tell its node and gpus, and the node's agent in "
                    "driver.vllm.agents"
                )
            for gpu in entry.gpus:
                if entry.node and (other := held.setdefault((entry.node, gpu), at)) != at:
                    yield f"{at}.gpus: GPU {gpu} of {entry.node} is already {other}'s"


def _problems_of_gpus(at: str, entry: ServerEntry, nodes: Mapping[str, int]) -> Iterator[str]:
    if (entry.node is None) != (not entry.gpus):
        yield f"{at}.gpus: a node needs the indices of its GPUs, and they need the node"
    elif entry.node is not None and entry.node not in nodes:
        yield f"{at}.node: {entry.node!r} is not among nodes: {', '.join(nodes)}"
    elif entry.node is not None and max(entry.gpus) >= nodes[entry.node]:
        yield f"{at}.gpus: node {entry.node} has {nodes[entry.node]} GPUs, from 0; found {max(entry.gpus)}"
    if len(set(entry.gpus)) < len(entry.gpus):
        yield f"{at}.gpus: one is named twice"
    if entry.gpus and len(entry.gpus) not in (1, 2, 4, 8):
        yield f"{at}.gpus: tensor parallelism is over 1, 2, 4 or 8 GPUs; found {len(entry.gpus)}"
    elif entry.gpus and entry.tp not in (None, len(entry.gpus)):
        yield f"{at}.tp: {entry.tp}, but {len(entry.gpus)} GPUs are named; leave it out"


def _profiles(settings: Settings) -> dict[str, EnergyProfile]:
    try:
        return {model.name: load_profile(model.profile) for model in settings.models}
    except (ProfileError, OSError) as error:
        raise UserError(f"models: {error}") from None
