"""The control vocabulary: what a controller is shown, what it asks for, and how a plan is written down.

A driver (the live runner, or the simulator's event kernel) builds an ``Observation``, calls
``controller.on_tick(tick, observation)`` and carries out ``Effects.actions`` in order, then comes back at
``Effects.next_tick``. Everything is a value: no clock, no randomness, no I/O. Every action names the state that shall
hold afterwards and a deadline, so that doing it twice is the same as doing it once, and a late one is dropped.

Arrays, not objects, carry what is per instance: a simulated week is 120,000 ticks.
Axes: I instances, P pools, N nodes, K demands; a demand is one (model, request class), ordered model-major, so
``k = 9 * model_index + request_class`` for one row of ``Observation.demand``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, IntFlag
from typing import Protocol

import numpy as np
import numpy.typing as npt

from pools.instances import InstanceState

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

INSTANCE_STATES: tuple[InstanceState, ...] = tuple(InstanceState)
"""``InstanceViews.state`` holds indices into this tuple."""

STATE_CODE: Mapping[InstanceState, int] = {state: code for code, state in enumerate(INSTANCE_STATES)}


class Level(IntFlag):
    """Which time-scales are due at a tick; a driver passes them back as they came."""

    INSTANCE = 1  # 5 s: clocks, escalation
    POOL = 2  # 5 min: TP mix inside a pool's GPUs
    CLUSTER = 4  # 30 min: GPUs of each pool
    JOINT = 8  # everything in one problem (replaces POOL and CLUSTER)


@dataclass(frozen=True, slots=True)
class Tick:
    """A moment at which a controller wants to be called, and for what."""

    at_s: float
    levels: Level


@dataclass(frozen=True, slots=True, eq=False)
class InstanceViews:
    """What is known of every instance that holds GPUs (STOPPED ones may be left out)."""

    ids: tuple[str, ...]  # (I,) stable order is welcome, not required
    pool: IntArray  # (I,) index into ClusterState.pools
    node: IntArray  # (I,) index into ClusterState.node_names: where its (first) GPU is
    tp: IntArray  # (I,)
    state: IntArray  # (I,) index into INSTANCE_STATES
    sm_clock_mhz: IntArray  # (I,)
    ready_at_s: FloatArray  # (I,) when a STARTING one is expected READY; -inf for others
    class_rate_rps: FloatArray  # (I, 9) requests given to it since the last tick, per second, by request class
    running: FloatArray  # (I,) sequences in the batch now
    waiting: FloatArray  # (I,) requests accepted by it and not started
    waiting_tokens: FloatArray  # (I,) prompt tokens of those
    context_tokens: FloatArray  # (I,) KV tokens held now
    slo_slack: FloatArray  # (I,) 1 - worst of TTFT / SLO and TBT / SLO seen since the last tick; nan = none seen
    late_rps: FloatArray  # (I,) requests found over their TTFT or TBT since the last tick, each once, per second
    power_w: FloatArray  # (I,) whole instance; nan = not measured

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True, eq=False)
class ClusterState:
    """The cluster at one moment, immutable."""

    at_s: float
    pools: tuple[str, ...]  # (P,) names; fixed by configuration
    node_names: tuple[str, ...]  # (N,)
    node_gpus: IntArray  # (N,) GPUs the node has
    node_usable: BoolArray  # (N,) False: cordoned, lost
    instances: InstanceViews

    def age_s(self, now_s: float) -> float:
        """How old this state is."""
        return now_s - self.at_s


@dataclass(frozen=True, slots=True, eq=False)
class Demand:
    """What arrived at the gateway since the last tick (of any level), served or not."""

    window_s: float
    requests: FloatArray  # (K,) count
    input_tokens: FloatArray  # (K,) sum
    output_tokens: FloatArray  # (K,) sum of what was predicted or, where finished, produced
    queued: FloatArray  # (K,) requests waiting in the gateway now, given to no instance


@dataclass(frozen=True, slots=True, eq=False)
class Observation:
    """All a controller is shown at a tick."""

    now_s: float
    cluster: ClusterState
    demand: Demand
    start_s: float = float("nan")  # how long starts of engines have taken of late; nan = none was seen


# --- actions: the state that shall hold, by when, under which plan ---------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ordered:
    """What all actions share. Done after ``deadline_s`` an action does more harm than good: drop it, say so."""

    deadline_s: float
    plan: tuple[int, int] = (0, 0)  # (epoch, version) of the plan it belongs to; older than the current one: drop it
    not_before_s: float = float("-inf")  # staggering: the driver waits until then
    why: str = ""


@dataclass(frozen=True, slots=True)
class ScaleOut(_Ordered):
    """An instance of this id exists (it starts if it does not) and becomes READY at this clock."""

    instance_id: str
    pool: str
    tp: int
    sm_clock_mhz: int
    node: str


@dataclass(frozen=True, slots=True)
class ScaleIn(_Ordered):
    """The instance gets no new request, finishes what it has, and is STOPPED; its GPUs are free."""

    instance_id: str


@dataclass(frozen=True, slots=True)
class Transfer:
    """Weight bytes to move between GPUs for a re-shard; indices are GPUs of the node."""

    source_gpu: int
    target_gpu: int
    first_eighth: int  # weights are cut in ``shards`` equal parts, see ``solver.reshard``
    last_eighth: int  # exclusive


@dataclass(frozen=True, slots=True)
class Reshard(_Ordered):
    """These instances are gone and those exist, on the same GPUs of one node.

    How is the driver's: weights moved in place over NVLink where the engine can (``transfers``), else drain first and
    start anew on the freed GPUs. ``create`` are complete ScaleOut orders of their own; they inherit this deadline.
    """

    retire: tuple[str, ...]
    create: tuple[ScaleOut, ...]
    transfers: tuple[Transfer, ...] = ()
    transfer_s: float = 0.0  # predicted time of the transfers at NVLink rate


@dataclass(frozen=True, slots=True)
class Reassign(_Ordered):
    """The instance belongs to this pool: it is given that pool's requests from now on, and finishes what it has."""

    instance_id: str
    pool: str


@dataclass(frozen=True, slots=True)
class SetFrequency(_Ordered):
    """The SM clock of all GPUs of the instance is this."""

    instance_id: str
    sm_clock_mhz: int


@dataclass(frozen=True, slots=True)
class Park(_Ordered):
    """The instance is drained and asleep (PARKED), its GPUs locked at this clock."""

    instance_id: str
    sm_clock_mhz: int


@dataclass(frozen=True, slots=True)
class Wake(_Ordered):
    """The instance is READY at this clock; the clock is raised before any request is admitted."""

    instance_id: str
    sm_clock_mhz: int


@dataclass(frozen=True, slots=True, eq=False)
class Route(_Ordered):
    """Where requests go from now on.

    ``pool_share[k, p]`` is the share of demand k that pool p takes; rows sum to 1 (0 where nothing can serve k). Which
    instance of the pool gets a request is the router's: it knows the load of this moment.
    """

    pools: tuple[str, ...]  # (P,)
    pool_share: FloatArray  # (K, P)


class Escalation(Enum):
    """What to do about requests that will miss their SLO, mildest first (DynamoLLM, mispredictions)."""

    REORDER = "reorder"  # queue ordered by deadline
    RESTEER = "resteer"  # not yet started requests go elsewhere in the pool, or to a larger pool
    SQUASH = "squash"  # what is past its deadline is rejected


@dataclass(frozen=True, slots=True)
class Escalate(_Ordered):
    """The measure holds for the instance's queue until ``deadline_s`` (clock to maximum is a SetFrequency)."""

    instance_id: str
    measure: Escalation


Action = ScaleOut | ScaleIn | Reshard | Reassign | SetFrequency | Park | Wake | Route | Escalate


@dataclass(frozen=True, slots=True)
class Diagnostic:
    """Why a tick did what it did, in words and numbers a person can check."""

    topic: str  # "plan", "clock", "forecast", "escalation", ...
    why: str
    numbers: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Effects:
    """What a tick asks for: actions in order, and when to come back."""

    actions: tuple[Action, ...]
    next_tick: Tick
    diagnostics: tuple[Diagnostic, ...] = ()


class Controller(Protocol):
    """Anything that decides. Pure but for what it remembers: same calls, same answers."""

    def first_tick(self, now_s: float) -> Tick:
        """When to call it first."""

    def on_tick(self, tick: Tick, observation: Observation) -> Effects:
        """Decide. Never raises for what the world does: a failed solve keeps the plan and says so."""


class ControllerLostError(Exception):
    """What a controller ran in is gone, and with it what the controller remembered."""


# --- the plan ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, order=True)
class PlanGroup:
    """``count`` like instances a plan wants in a pool."""

    pool: str
    tp: int
    sm_clock_mhz: int
    load: float  # planned share of the instance's SLO capacity, 0..1
    count: int
    parked: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """What the cluster should look like. (epoch, version) orders plans: a higher epoch is a newer leader."""

    epoch: int
    version: int
    made_at_s: float
    horizon_s: float
    pools: tuple[str, ...]  # (P,)
    groups: tuple[PlanGroup, ...]
    pool_share: FloatArray  # (K, P) as in Route
    power_w: float = float("nan")  # predicted, whole cluster
    gap: float = float("nan")  # proven distance to the optimum, relative

    @property
    def stamp(self) -> tuple[int, int]:
        """(epoch, version), comparable."""
        return (self.epoch, self.version)

    def supersedes(self, other: "Plan | None") -> bool:
        """Whether this plan is to be followed instead of the other."""
        return other is None or self.stamp > other.stamp

    def gpus(self, pool: str | None = None) -> int:
        """GPUs the plan holds, of one pool or in all."""
        return sum(g.tp * g.count for g in self.groups if pool is None or g.pool == pool)
