"""Policies: the product's own, the paper's and the baselines, as settings of one controller. Values only.

A policy says which knobs may turn, how often each level decides, and how many pools there are. Nothing else differs
between them: same controllers, same router, same profiles. Source of the baselines: DynamoLLM section V (cumulative
knobs).
"""

from dataclasses import dataclass, field, replace

from pools.classes import REQUEST_CLASSES, RequestClass
from pools.view import PoolView
from solver.candidates import Knobs

ONE_POOL = (RequestClass.LL,)
BY_PREFILL = (RequestClass.ML, RequestClass.LS, RequestClass.LL)
"""What harms a request beside it is a long prefill, and long prompts with short answers are little else; otherwise
outputs of any length share an instance well. See docs/adr."""


@dataclass(frozen=True, slots=True)
class Periods:
    """Seconds between the ticks of each level."""

    instance_s: float = 5.0
    pool_s: float = 300.0
    cluster_s: float = 1800.0
    joint_s: float = 120.0


@dataclass(frozen=True, slots=True)
class Policy:
    """One way to run a cluster."""

    name: str
    pool_classes: tuple[RequestClass, ...] = REQUEST_CLASSES
    """The classes that have a pool of their own; the others go to pools that dominate them."""
    joint: bool = True  # one plan for the whole cluster; else the paper's hierarchy
    scale_instances: bool = True
    scale_shards: bool = True
    scale_clocks: bool = True
    knobs: Knobs = field(default_factory=Knobs)
    periods: Periods = field(default_factory=Periods)

    @property
    def static(self) -> bool:
        """Whether the number of GPUs of each pool is provided once, for the peak."""
        return not self.scale_instances

    @property
    def clocks_alone(self) -> bool:
        """Whether clocks are all it turns: it then needs no plan, only instances, whoever has provided them."""
        return self.scale_clocks and not (self.scale_instances or self.scale_shards)

    def pools(self, model: str) -> tuple[PoolView, ...]:
        """The pools of a model under this policy."""
        if self.pool_classes == ONE_POOL:
            return (PoolView("all", model, RequestClass.LL),)
        return tuple(PoolView(k.name, model, k) for k in self.pool_classes)


def policies(largest_tp: int, top_clock_mhz: int) -> dict[str, Policy]:
    """All policies by name, on a profile with this largest TP and highest clock."""
    top = (top_clock_mhz,)
    fixed = Knobs(tps=(largest_tp,), sm_clocks_mhz=top, dominating=False)
    shards = Knobs(sm_clocks_mhz=top, dominating=False)
    baseline = Policy("", scale_instances=False, scale_shards=False, scale_clocks=False, knobs=fixed)
    every = (
        Policy("dynamollm", pool_classes=BY_PREFILL),
        Policy("dynamollm-paper", joint=False),
        replace(baseline, name="single-pool", pool_classes=ONE_POOL),
        replace(baseline, name="multi-pool"),
        replace(baseline, name="scale-inst", joint=False, scale_instances=True),
        replace(baseline, name="scale-shard", scale_shards=True, knobs=shards),
        replace(baseline, name="scale-freq", scale_clocks=True),
        replace(baseline, name="packing", pool_classes=ONE_POOL, scale_instances=True),
    )
    return {policy.name: policy for policy in every}


POLICY_NAMES = tuple(policies(8, 1980))
"""``clairvoyant`` is no policy but a bound: see ``solver.clairvoyant``."""
