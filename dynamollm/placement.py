"""Placement: which GPUs of which node an instance gets. Pure bookkeeping; starts nothing.

An instance of TP k takes k GPUs of one node, aligned to k where k divides the node, so that a pair never straddles two
fours. The fullest node with room is taken: nodes left empty can take a TP8 or be switched off.
"""

from collections.abc import Callable, Collection, Mapping, Sequence

from pools.instances import GpuSlot


class NoRoomError(Exception):
    """No node has that many GPUs free side by side; the message says what is free."""


class Placement:
    """GPUs of every node, and which are taken."""

    def __init__(self, nodes: Mapping[str, int], lost_nodes: Callable[[], Collection[str]] = tuple) -> None:
        """``nodes``: GPUs by node name; nothing is placed on those that ``lost_nodes`` tells."""
        self._free: dict[str, list[bool]] = {name: [True] * gpus for name, gpus in nodes.items()}
        self._lost_nodes = lost_nodes

    @property
    def nodes(self) -> dict[str, int]:
        """GPUs by node name."""
        return {name: len(free) for name, free in self._free.items()}

    def free_gpus(self, node: str) -> int:
        """GPUs of a node that nobody holds."""
        return sum(self._free[node])

    def take(self, tp: int, node: str | None = None) -> tuple[GpuSlot, ...]:
        """Reserve ``tp`` GPUs of one node (of ``node``, if given). Raises ``NoRoomError`` and takes nothing."""
        lost = self._lost_nodes()
        names = [node] if node is not None else sorted(self._free, key=self.free_gpus)
        names = [name for name in names if name not in lost]
        for name in names:
            start = self._aligned_start(name, tp)
            if start is not None:
                self._free[name][start : start + tp] = [False] * tp
                return tuple(GpuSlot(name, index) for index in range(start, start + tp))
        free = ", ".join(f"{name}: {self.free_gpus(name)}" for name in names if name in self._free)
        gone = f"; lost are {', '.join(sorted(lost))}" if lost else ""
        raise NoRoomError(f"no {tp} aligned GPUs free on one node; free are {free or 'none'}{gone}")

    def hold(self, gpus: Sequence[GpuSlot]) -> None:
        """Take these very GPUs: whoever runs there was there before."""
        for gpu in gpus:
            self._free[gpu.node][gpu.index] = False

    def release(self, gpus: Sequence[GpuSlot]) -> None:
        """Give GPUs back; those already free stay free."""
        for gpu in gpus:
            self._free[gpu.node][gpu.index] = True

    def _aligned_start(self, node: str, tp: int) -> int | None:
        free = self._free.get(node, [])
        fits = [start for start in range(0, len(free) - tp + 1, tp) if all(free[start : start + tp])]
        if not fits:
            return None
        # beside the most neighbours already taken: keeps the larger aligned blocks whole
        return max(fits, key=lambda start: (self._taken_around(free, start, tp), -start))

    @staticmethod
    def _taken_around(free: list[bool], start: int, tp: int) -> int:
        block = 2 * tp
        first = start // block * block
        return sum(not one for one in free[first : first + block])
