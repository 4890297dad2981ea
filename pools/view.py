"""ClusterView: what the router may know of the cluster, immutable and dated. Values only; made by the control plane."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from energy.profile import StepCoefficients
from pools.classes import RequestClass
from pools.instances import Instance


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """What one engine holds and takes at a time."""

    max_seqs: int = 256
    max_batched_tokens: int = 2048  # prompt tokens of one step; what instances are started with
    kv_capacity_tokens: int = 1 << 40


@dataclass(frozen=True, slots=True)
class InstanceView:
    """An instance with what a step costs at its present clock."""

    instance: Instance
    step: StepCoefficients
    limits: EngineLimits = field(default_factory=EngineLimits)


@dataclass(frozen=True, slots=True)
class PoolView:
    """A pool: the model it serves and the longest class it is kept for (LL: any request)."""

    name: str
    model: str
    request_class: RequestClass


@dataclass(frozen=True, slots=True)
class ClusterView:
    """Everything known at ``as_of_s``; ``version`` rises with every change.

    ``shares`` says, where a plan does, how a model's class is spread: ``(model, class) -> ((pool, weight), ...)``. A
    class it does not name goes to the pool kept for it, else to the nearest that dominates it.

    ``coming`` names the pools for which a start is ordered that has not begun: requests wait as for one STARTING.
    """

    version: int
    as_of_s: float
    pools: tuple[PoolView, ...]
    instances: tuple[InstanceView, ...]
    shares: Mapping[tuple[str, RequestClass], tuple[tuple[str, float], ...]] = field(default_factory=dict)
    coming: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """What an engine says of itself on /metrics at a scrape."""

    running: int
    waiting: int
    kv_cache_usage: float  # 0..1
    awake: bool = True
