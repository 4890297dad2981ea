"""Placing: on which node a new instance goes, and which instance makes room where none is. Pure.

Best fit: the fullest node that still has room, so that nodes fall empty and can be off. Where GPUs are free but no node
has enough together, the node that costs the least to clear is cleared, and what lay there goes elsewhere.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from solver.control import BoolArray, ClusterState, IntArray


@dataclass(slots=True, eq=False)
class Occupancy:
    """GPUs of every node while a plan is laid out; counts change as instances are placed and taken away."""

    total: IntArray  # (N,)
    free: IntArray  # (N,) free now, or promised to nobody
    freeing: IntArray  # (N,) will be free when what is draining or told to stop has gone
    usable: BoolArray  # (N,)

    @staticmethod
    def of(cluster: ClusterState, leaving: BoolArray) -> "Occupancy":
        """Where everything lies now; ``leaving`` (I,) marks instances whose GPUs will be free."""
        held = np.bincount(cluster.instances.node, cluster.instances.tp, len(cluster.node_gpus)).astype(np.int64)
        soon = np.bincount(
            cluster.instances.node[leaving], cluster.instances.tp[leaving], len(cluster.node_gpus)
        ).astype(np.int64)
        return Occupancy(cluster.node_gpus.copy(), cluster.node_gpus - held, soon, cluster.node_usable.copy())

    def best_node(self, gpus: int, wait: bool) -> int | None:
        """The fullest usable node with room, now or (``wait``) once what leaves has left; empty nodes last."""
        room = self.free + self.freeing if wait else self.free
        fits = np.flatnonzero((room >= gpus) & self.usable)
        if not len(fits):
            return None
        return int(fits[np.argmin(room[fits])])

    def place(self, node: int, gpus: int) -> int:
        """Take GPUs of a node; returns how many of them are not free yet."""
        now = min(int(self.free[node]), gpus)
        self.free[node] -= now
        self.freeing[node] -= gpus - now
        return gpus - now

    def leave(self, node: int, gpus: int) -> None:
        """An instance will go."""
        self.freeing[node] += gpus


@dataclass(slots=True)
class Clearing:
    """A node to clear: who goes from it."""

    node: int
    instances: list[int] = field(default_factory=list)


def cheapest_clearing(
    occupancy: Occupancy, gpus: int, movable: Mapping[int, Sequence[tuple[int, int]]]
) -> Clearing | None:
    """The node where the fewest GPUs must move to make room; ``movable`` is node -> (instance, GPUs of it).

    None where no node can be cleared that far.
    """
    best: tuple[int, Clearing] | None = None
    for node, instances in movable.items():
        missing = gpus - int(occupancy.free[node] + occupancy.freeing[node])
        if not occupancy.usable[node] or missing <= 0:
            continue
        clearing, moved = Clearing(node), 0
        for instance, size in sorted(instances, key=lambda pair: (pair[1], pair[0])):
            if missing <= 0:
                break
            clearing.instances.append(instance)
            missing -= size
            moved += size
        if missing <= 0 and (best is None or moved < best[0]):
            best = (moved, clearing)
    return best[1] if best else None
