"""PlanProblem: what there is to decide, as arrays; PlanSolution: what was decided and how sure it is. Values only.

One joint problem for the whole cluster. Axes:

- K demands: one request class of one model;
- G groups: instances of one shape (model, GPU, TP) that serve one pool; a pool has a group for each TP;
- J points: what one instance of a group may do: (SM clock, load) -> capacity and power;
- H shapes: what an instance physically is; an instance moves between pools of its model for nothing, between shapes
  not;
- E re-shard edges between shapes of one model; N nodes.

Capacity of a group is counted in its pool's own requests/s; ``work[k, g]`` converts: how many of those one request of
demand k takes. So mixed classes add up linearly: an instance is full at ``sum_k rate_k work_kg = capacity``.

Units: watts in the objective. What is paid once (a start, a drain, a re-shard) enters as joules divided by the time
until the next plan, so that it weighs what it is worth.
"""

from dataclasses import dataclass, field
from enum import Enum

import numpy as np
import numpy.typing as npt

from solver.control import FloatArray, IntArray


class ProblemError(ValueError):
    """A problem contradicts itself; the message names the field and what it should be."""


@dataclass(frozen=True, slots=True, eq=False)
class Shapes:
    """What instances physically are, how many there are now, and what changing that costs."""

    tp: IntArray  # (H,) GPUs of one
    ready: FloatArray  # (H,) READY or STARTING now
    parked: FloatArray  # (H,) PARKED now
    start_w: FloatArray  # (H,) start of one / time until the next plan
    stop_w: FloatArray  # (H,) drain of one / time until the next plan
    wake_w: FloatArray  # (H,) wake of one / time until the next plan
    parked_w: FloatArray  # (H,) power of a parked one; inf: cannot be parked
    reshard_from: IntArray  # (E,) shape index
    reshard_to: IntArray  # (E,)
    reshard_w_per_gpu: FloatArray  # (E,) re-shard of one GPU / time until the next plan

    @staticmethod
    def free(tp: npt.ArrayLike) -> "Shapes":
        """Shapes of which nothing exists and that cost nothing to change; parking is not possible."""
        sizes = np.asarray(tp, dtype=np.int64)
        zero, none = np.zeros(len(sizes)), np.zeros(0, dtype=np.int64)
        parked_w = np.full(len(sizes), np.inf)
        return Shapes(sizes, zero, zero, zero, zero, zero, parked_w, none, none, np.zeros(0))


@dataclass(frozen=True, slots=True, eq=False)
class NodeRoom:
    """Where instances fit. An instance lies in one node; pinned instances are already taken out of ``free``."""

    gpus: IntArray  # (N,) GPUs of each node
    free: IntArray  # (N,) those the plan may use
    pinned: IntArray  # (G,) instances of each group that stay where they are; they count as capacity, not as room
    free_gpu_w: float = 0.0  # power of a GPU that holds no instance while its node is on
    node_w: float = 0.0  # power of a node beside its GPUs while it is on
    empty_nodes_off: bool = True  # a node without instances is off
    on: int = 0  # how many of the nodes that may be off are on now
    switch_w: float = 0.0  # switching one on or off / time until the next plan

    @staticmethod
    def whole(nodes: int, gpus_per_node: int, groups: int) -> "NodeRoom":
        """Like nodes, all free, of which only GPUs in use draw power."""
        gpus = np.full(nodes, gpus_per_node, dtype=np.int64)
        return NodeRoom(gpus, gpus, np.zeros(groups, dtype=np.int64))

    @property
    def draws(self) -> bool:
        """Whether a node costs anything beside its instances."""
        return self.free_gpu_w > 0.0 or self.node_w > 0.0


@dataclass(frozen=True, slots=True, eq=False)
class PlanProblem:
    """The least-energy plan: instances, operating points, and which pool serves what. See the module for the axes."""

    demand_names: tuple[str, ...]  # (K,)
    pool_names: tuple[str, ...]  # (P,)
    rate_rps: FloatArray  # (K,) expected: what energy is paid for
    reserve_rps: FloatArray  # (K,) what READY instances must carry at their highest clock
    standby_rps: FloatArray  # (K,) what READY and PARKED ones must carry at their highest clock
    work: FloatArray  # (K, G) inf: this group may not serve this demand
    group_pool: IntArray  # (G,)
    group_shape: IntArray  # (G,)
    group_peak: FloatArray  # (G,) capacity of one instance at its highest clock
    point_group: IntArray  # (J,)
    point_capacity: FloatArray  # (J,)
    point_power_w: FloatArray  # (J,)
    group_idle_w: FloatArray  # (G,) a READY instance given nothing: capacity in reserve
    shapes: Shapes
    room: NodeRoom
    min_ready: FloatArray  # (P,) instances a pool keeps at least
    pool_gpus: tuple[FloatArray, FloatArray] | None = None
    """(P,) least and (P,) most GPUs of each pool; None: no pool has GPUs of its own."""
    power_budget_w: float = float("inf")
    integral_points: bool = False
    """Whether an instance stays at one point. If not, it may divide its time between two: the 5 s controller does."""
    reserve_w_per_gpu: float = float("inf")
    """Price of READY capacity missing for the reserve, in GPUs; inf: it must be there. What READY and idle costs a GPU
    is a fair price: then reserve is held where it is cheap, and nobody is re-sharded for it."""
    unserved_w_per_rps: float = float("inf")
    """Price of leaving a demand unserved; inf: it must be served, else the problem is infeasible."""

    def __post_init__(self) -> None:
        demands, groups, points = len(self.demand_names), len(self.group_pool), len(self.point_group)
        shapes = {
            "rate_rps": (self.rate_rps, (demands,)),
            "reserve_rps": (self.reserve_rps, (demands,)),
            "standby_rps": (self.standby_rps, (demands,)),
            "work": (self.work, (demands, groups)),
            "group_shape": (self.group_shape, (groups,)),
            "group_peak": (self.group_peak, (groups,)),
            "group_idle_w": (self.group_idle_w, (groups,)),
            "point_capacity": (self.point_capacity, (points,)),
            "point_power_w": (self.point_power_w, (points,)),
            "min_ready": (self.min_ready, (len(self.pool_names),)),
            "room.pinned": (self.room.pinned, (groups,)),
        }
        for name, (values, shape) in shapes.items():
            if values.shape != shape:
                raise ProblemError(f"{name} has shape {values.shape}, not {shape}")
        if np.any(self.reserve_rps < self.rate_rps) or np.any(self.standby_rps < self.reserve_rps):
            raise ProblemError("demand must rise: rate_rps <= reserve_rps <= standby_rps")
        sizes = np.unique(self.shapes.tp)
        if len(sizes) and (sizes[0] < 1 or np.any(sizes[1:] % sizes[:-1])):
            raise ProblemError(f"TPs must divide one another to be counted per node size, as 1, 2, 4, 8; not {sizes}")

    @property
    def group_tp(self) -> IntArray:
        """(G,) GPUs of one instance of each group."""
        return self.shapes.tp[self.group_shape]


class SolveStatus(Enum):
    """How much a solution can be trusted."""

    OPTIMAL = "optimal"  # within the gap asked for, proven
    FEASIBLE = "feasible"  # a limit was hit: the plan holds, the gap is what is stated
    INFEASIBLE = "infeasible"  # no plan holds; ``reason`` names the rows that cannot be met
    NONE = "none"  # a limit was hit before any plan was found


@dataclass(frozen=True, slots=True, eq=False)
class PlanSolution:
    """A plan in numbers. The arrays are empty where ``status`` has no plan."""

    status: SolveStatus
    ready: FloatArray = field(default_factory=lambda: np.zeros(0))  # (G,) whole numbers
    parked: FloatArray = field(default_factory=lambda: np.zeros(0))  # (G,) whole numbers
    points: FloatArray = field(default_factory=lambda: np.zeros(0))  # (J,) instances at each point
    share: FloatArray = field(
        default_factory=lambda: np.zeros((0, 0))
    )  # (K, G) of each demand; rows sum to 1 - unserved
    unserved: FloatArray = field(default_factory=lambda: np.zeros(0))  # (K,) share of each demand nobody serves
    objective_w: float = float("nan")  # power of the plan and its changes
    power_w: float = float("nan")  # power of the plan alone
    bound_w: float = float("nan")  # no plan has a lower objective
    branch_nodes: int = 0
    reason: str = ""

    @property
    def found(self) -> bool:
        """Whether there is a plan."""
        return self.status in (SolveStatus.OPTIMAL, SolveStatus.FEASIBLE)

    @property
    def gap(self) -> float:
        """Proven distance to the optimum, relative to the objective; nan where there is no plan."""
        if self.objective_w == 0.0:
            return 0.0
        return (self.objective_w - self.bound_w) / abs(self.objective_w)
