"""SimulationSetup: everything about the pretend world that is not the workload and not the policy. Values only."""

from collections.abc import Callable
from dataclasses import dataclass, field

from energy.profile import EnergyProfile
from pools.classes import ClassSlos, RequestClass
from pools.queue import QueueLimits
from pools.scoring import Weights
from simulator.batching import EngineLimits
from simulator.delays import Delays
from simulator.prediction import Foresight, TrueLengths


def _as_asked(sm_clock_mhz: int) -> int:
    return sm_clock_mhz


@dataclass(frozen=True, slots=True)
class PoolSetup:
    """A pool and the longest class it is kept for."""

    name: str
    request_class: RequestClass


@dataclass(frozen=True, slots=True)
class SimulationSetup:
    """One cluster of like nodes that serves one model."""

    profile: EnergyProfile
    nodes: int
    pools: tuple[PoolSetup, ...]
    gpus_per_node: int = 8
    limits: EngineLimits = field(default_factory=lambda: EngineLimits(kv_blocks=0))  # blocks follow from the profile
    delays: Delays = field(default_factory=Delays)
    slos: ClassSlos = field(default_factory=ClassSlos)
    weights: Weights = field(default_factory=Weights)
    queue: QueueLimits = field(
        default_factory=lambda: QueueLimits(1_000_000, ttl_s=600.0)
    )  # late counts as late, not as refused
    prediction: Foresight = field(default_factory=TrueLengths)
    empty_nodes_off: bool = True  # a node without instances draws nothing and is not paid for
    supported_mhz: Callable[[int], int] = _as_asked  # the clock a GPU runs at for one that is ordered
    sample_s: float = 60.0  # of the series kept for plots

    @property
    def gpus(self) -> int:
        """GPUs in all."""
        return self.nodes * self.gpus_per_node
