"""RayCluster: what the Ray driver asks of Ray, in a dozen blocking calls. Decides nothing; call it from threads.

Everything it makes bears the instance's or the node's name in one Ray namespace, and is detached: it outlives the
driver, and a later one finds it by name. A configured node is the Ray node of the same ``--node-name``; those without
a namesake are given the Ray nodes that are left, in order, which is how autoscaled nodes come in.
"""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.autoscaler.sdk import request_resources
from ray.exceptions import GetTimeoutError, RayActorError, RayError
from ray.util.placement_group import (
    PlacementGroup,
    get_placement_group,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from pools.drivers.port import DriverError
from pools.drivers.ray_agent import AgentActor, AgentSetup
from pools.drivers.ray_supervisor import Supervised, Supervisor, SupervisorSetup

INSTANCE, AGENT = "instance:", "agent:"  # prefixes of actors' and placement groups' names
CALL_TIMEOUT_S = 120.0  # a call may wait for a process to be started
STRICT_PACK = "STRICT_PACK"


@dataclass(frozen=True, slots=True)
class RayNode:
    """One alive node of the Ray cluster with GPUs."""

    id: str
    name: str
    gpus: int


def bind(wanted: Mapping[str, int], alive: Sequence[RayNode], before: Mapping[str, str]) -> dict[str, str]:
    """Which Ray node (its id) stands for which configured node: as before, by name, then whatever is left. Pure.

    ``wanted``: GPUs by configured name; a Ray node with fewer GPUs never stands for it.
    """
    by_id = {node.id: node for node in alive}
    bound = {name: node_id for name, node_id in before.items() if node_id in by_id and name in wanted}
    for name, gpus in wanted.items():
        namesakes = [node.id for node in alive if node.name == name and node.gpus >= gpus]
        if name not in bound and namesakes:
            bound[name] = namesakes[0]
    left = [node for node in alive if node.id not in bound.values() and node.name not in wanted]
    for name, gpus in wanted.items():
        fits = [node for node in left if node.gpus >= gpus]
        if name not in bound and fits:
            bound[name] = fits[0].id
            left.remove(fits[0])
    return bound


class RayCluster:
    """One connection to a Ray cluster."""

    def __init__(self, address: str, namespace: str, cpus_per_gpu: float = 0.0) -> None:
        """``address``: ``auto`` or ``host:port`` of the head; this machine must run a Ray node of that cluster."""
        self._address = address
        self._namespace = namespace
        self._connected = False
        self._bundle = {"GPU": 1.0} | ({"CPU": cpus_per_gpu} if cpus_per_gpu else {})

    def connect(self) -> None:
        """Raises ``DriverError`` where there is no cluster."""
        if ray.is_initialized():
            return  # whoever did that will undo it
        self._connected = True
        try:
            ray.init(
                address=self._address,
                namespace=self._namespace,
                log_to_driver=False,
                configure_logging=False,
            )
        except (ConnectionError, RayError, RuntimeError, ValueError) as error:
            raise DriverError(
                f"no Ray cluster at {self._address!r}: {error}; start one here with `ray start`"
            ) from None

    def disconnect(self) -> None:
        """Let go of it; what is detached runs on."""
        if self._connected:
            ray.shutdown()

    def nodes(self) -> list[RayNode]:
        """Alive nodes that have GPUs, by name."""
        told = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("GPU", 0) > 0]
        nodes = [RayNode(node["NodeID"], node["NodeName"], int(node["Resources"]["GPU"])) for node in told]
        return sorted(nodes, key=lambda node: node.name)

    def hint(self, gpus: Sequence[int]) -> None:
        """Tell Ray's autoscaler to keep or bring up nodes for these GPU counts, one a node; nothing to anybody else."""
        request_resources(bundles=[{"GPU": float(count)} for count in gpus])

    # --- instances ---------------------------------------------------------------------------------------------------

    def reserve(self, instance_id: str, gpus: int, node_id: str) -> PlacementGroup:
        """One bundle a GPU, all on this node. It may have to wait for them: see ``granted``."""
        return placement_group(
            [self._bundle] * gpus,
            strategy=STRICT_PACK,
            name=INSTANCE + instance_id,
            lifetime="detached",
            bundle_label_selector=[{"ray.io/node-id": node_id}] * gpus,
        )

    def granted(self, group: PlacementGroup, timeout_s: float) -> tuple[int, ...] | None:
        """The GPUs that Ray has given to the group, by their indices on the node; None if it has not, by then.

        A bundle keeps its GPU, but only who runs in it is told which: a task looks in each.
        """
        if not group.wait(timeout_s):
            return None
        devices: list[int] = []
        for index in range(group.bundle_count):
            strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)
            look = ray.remote(num_cpus=0, num_gpus=1, max_calls=0)(_gpu_ids)  # one process looks in all
            devices += ray.get(look.options(scheduling_strategy=strategy).remote(), timeout=CALL_TIMEOUT_S)
        return tuple(devices)

    def supervise(self, group: PlacementGroup, setup: SupervisorSetup) -> Any:
        """The actor that is to run an instance inside its group."""
        actor: Any = ray.remote(Supervisor)
        return actor.options(
            name=INSTANCE + setup.spec.id,
            lifetime="detached",
            num_cpus=0,
            max_concurrency=100,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0),
        ).remote(setup)

    def release(self, instance_id: str) -> None:
        """End the actor and free the GPUs, as far as they are there."""
        with contextlib.suppress(ValueError, RayError):
            ray.kill(ray.get_actor(INSTANCE + instance_id))
        with contextlib.suppress(ValueError, RayError):
            remove_placement_group(get_placement_group(INSTANCE + instance_id))

    def supervised(self) -> list[tuple[Supervised, Any]]:
        """Instances that run already, with their actors; what is left of any other is cleared away."""
        found: list[tuple[Supervised, Any]] = []
        for name in ray.util.list_named_actors():
            if name.startswith(INSTANCE):
                with contextlib.suppress(ValueError, RayActorError, GetTimeoutError, AttributeError):
                    actor = ray.get_actor(name)
                    found.append((ray.get(actor.describe.remote(), timeout=CALL_TIMEOUT_S), actor))
        kept = {INSTANCE + told.spec.id for told, _ in found}
        groups = [group["name"] for group in placement_group_table().values() if group["state"] != "REMOVED"]
        for name in {*groups, *ray.util.list_named_actors()} - kept:
            if name.startswith(INSTANCE):
                self.release(name.removeprefix(INSTANCE))
        return found

    # --- node agents -------------------------------------------------------------------------------------------------

    def agent(self, node_id: str, setup: AgentSetup, name: str = "") -> Any:
        """The node's agent actor, made where it is not there yet. It is of this Ray node, and goes with it."""
        actor: Any = ray.remote(AgentActor)
        return actor.options(
            name=f"{AGENT}{name or setup.node}:{node_id}",
            lifetime="detached",
            num_cpus=0,
            get_if_exists=True,
            max_restarts=-1,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
        ).remote(setup)

    def end_agents(self) -> None:
        """End every agent; the locks of one that is killed are reset by the next, or by their leases' end."""
        for name in ray.util.list_named_actors():
            if name.startswith(AGENT):
                with contextlib.suppress(ValueError, RayError):
                    ray.kill(ray.get_actor(name))


def _gpu_ids() -> list[int]:
    return [int(index) for index in ray.get_gpu_ids()]
