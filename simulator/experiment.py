"""Experiment: a named policy on a workload, set up alike for all; nothing differs but what the policy says.

``prepare`` gives the pretend world and the controller; ``provision_for`` measures the peak that static policies provide
for, from the workload itself: they know their future. The clairvoyant is not run: ``bounds`` says how little energy
perfect knowledge could need.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from energy.capacity import CapacityTable
from energy.profile import EnergyProfile, GpuState
from pools.classes import REQUEST_CLASSES, ClassSlos
from pools.length_costs import LengthCosts
from pools.scoring import Weights
from pools.view import PoolView
from simulator.batching import EngineLimits
from simulator.delays import Delays
from simulator.prediction import Foresight, LearnedLengthsForesight
from simulator.setup import PoolSetup, SimulationSetup
from simulator.workload.arrivals import Workload
from simulator.world import ROWS
from solver.candidates import Knobs, candidates
from solver.clairvoyant import clairvoyant_w
from solver.control import (
    Controller,
    Effects,
    FloatArray,
    Level,
    Observation,
    ScaleOut,
    Tick,
)
from solver.controllers import ControlSettings, PlanningController
from solver.forecast import Forecast, KnownForecaster
from solver.least_energy import StepEngine, Work, least_energy
from solver.planner import ChangeCosts, ClusterCosts
from solver.policies import Policy, policies

GPUS_PER_NODE = 8
BOUND_SLOT_S = 60.0
BOUND_LOADS = (0.1, 0.25, 0.4, 0.55, 0.7, 0.8, 0.9, 1.0)
KNOWN_SLOT_S = 60.0
PEAK_WINDOW_S = 300.0  # static policies provide for the busiest five minutes of each class


@dataclass(frozen=True, slots=True)
class Scenario:
    """What all policies share."""

    profile: EnergyProfile
    capacity: CapacityTable
    nodes: int  # those of single-pool
    spare_nodes: float = 0.5  # more that the other policies may take, as a share; empty ones are off
    delays: Delays = field(default_factory=Delays)
    slos: ClassSlos = field(default_factory=ClassSlos)
    prediction: Foresight | None = None  # of output lengths; None: the product's own, from cold
    known_loads: bool = False  # whether planners are told the loads to come, instead of forecasting them
    limits: EngineLimits = field(default_factory=lambda: EngineLimits(0))  # those that ``capacity`` was built for
    weights: Weights = field(default_factory=lambda: Weights(spread=0.5, margin=0.9))
    parking: bool = False  # whether engines can sleep
    sample_s: float = 60.0

    @property
    def all_nodes(self) -> int:
        """Nodes there are, single-pool's and the others'."""
        return self.nodes + math.ceil(self.nodes * self.spare_nodes)


def prepare(scenario: Scenario, policy_name: str, workload: Workload) -> tuple[SimulationSetup, Controller]:
    """The world and the controller for one run.

    Raises ``ValueError`` for a policy that does not exist, and for a cluster larger than the simulator has room for.
    """
    profile = scenario.profile
    known = policies(profile.tensor_parallel[-1], profile.sm_clocks_mhz[-1])
    if policy_name not in known:
        raise ValueError(f"no policy {policy_name!r}; there are {', '.join(known)}")
    policy = known[policy_name]
    pools = policy.pools(profile.model)
    setup = SimulationSetup(
        profile=profile,
        nodes=scenario.nodes if policy.name == "single-pool" else scenario.all_nodes,
        pools=tuple(PoolSetup(pool.name, pool.request_class) for pool in pools),
        delays=scenario.delays,
        slos=scenario.slos,
        prediction=scenario.prediction or LearnedLengthsForesight(LengthCosts.of(scenario.capacity)),
        limits=scenario.limits,
        weights=scenario.weights,
        sample_s=scenario.sample_s,
    )
    most = setup.gpus // profile.tensor_parallel[0]
    if most > ROWS:
        raise ValueError(
            f"{setup.gpus} GPUs may hold {most} instances of {profile.name}; the simulator has room for {ROWS}"
        )
    if policy.name == "single-pool":
        return setup, WholeCluster(setup, policy)
    provision = provision_for(workload, setup) if policy.static else None
    controller = PlanningController(
        policy,
        {profile.model: scenario.capacity},
        pools,
        settings=control_settings(scenario),
        forecaster=KnownForecaster(known_loads(workload, scenario.slos)) if scenario.known_loads else None,
        provision=provision,
    )
    return setup, controller


def control_settings(scenario: Scenario) -> ControlSettings:
    """The same costs of change that the pretend world charges."""
    delays, profile = scenario.delays, scenario.profile
    least_mhz = profile.sm_clocks_mhz[0]
    parked_w = profile.idle_power_w(GpuState.PARKED, least_mhz) if scenario.parking else float("inf")
    return ControlSettings(
        changes=ChangeCosts(
            start_s=delays.start_s,
            reshard_s=delays.reshard_s,
            wake_s=delays.wake_s,
            parked_w_per_gpu=parked_w,
        ),
        lead_s=delays.node_on_s + delays.start_s,
        cluster_costs=ClusterCosts(free_gpu_w=profile.idle_power_w(GpuState.BARE, least_mhz)),
    )


@dataclass(frozen=True, slots=True)
class Bounds:
    """What perfect knowledge and free changes would need at least, in joules."""

    least_j: float
    """No policy on these engines needs less, whatever SLOs it keeps: ``solver.least_energy``."""
    plan_j: float
    """The plan problem without whole numbers, reserve and costs of change, minute by minute (``solver.clairvoyant``);
    nan if no plan can. What plans could reach on their capacity table; mixed classes may do better than the table."""


def bounds(scenario: Scenario, workload: Workload) -> Bounds:
    """Both bounds; reads the workload twice."""
    profile = scenario.profile
    model = profile.model
    work = sum((Work.of(part.input_tokens, part.output_tokens) for part in workload.chunks()), Work())
    engines = [
        StepEngine(
            tp,
            profile.step(tp, clock),
            scenario.limits.max_num_batched_tokens,
            scenario.limits.max_num_seqs,
            profile.kv_capacity_tokens(tp),
        )
        for tp in profile.tensor_parallel
        for clock in profile.sm_clocks_mhz
    ]
    pools = tuple(PoolView(k.name, model, k) for k in REQUEST_CLASSES)
    every = candidates({model: scenario.capacity}, pools, Knobs(loads=BOUND_LOADS, headroom=0.0))
    rates = [window for _, window in sorted(_class_rates(workload, scenario.slos, BOUND_SLOT_S).items())]
    powers_w = clairvoyant_w(every, scenario.all_nodes, GPUS_PER_NODE, rates)
    return Bounds(least_energy(work, engines).energy_j, float(sum(power_w * BOUND_SLOT_S for power_w in powers_w)))


def provision_for(workload: Workload, setup: SimulationSetup) -> Forecast:
    """The busiest ``PEAK_WINDOW_S`` of each class; reads the workload once."""
    rates = np.array(list(_class_rates(workload, setup.slos, PEAK_WINDOW_S).values()))
    return Forecast(rates.mean(axis=0), rates.max(axis=0))


def known_loads(workload: Workload, slos: ClassSlos) -> Callable[[float, float], Forecast]:
    """What a forecaster that knows the workload would say: the mean ahead, and the busiest minute of each class."""
    by_minute = _class_rates(workload, slos, KNOWN_SLOT_S)
    rates = np.zeros((max(by_minute, default=0) + 1, len(REQUEST_CLASSES)))
    for minute, rate_rps in by_minute.items():
        rates[minute] = rate_rps

    def known(now_s: float, horizon_s: float) -> Forecast:
        first = min(int(now_s // KNOWN_SLOT_S), len(rates) - 1)
        ahead = rates[first : int((now_s + horizon_s) // KNOWN_SLOT_S) + 1]
        return Forecast(ahead.mean(axis=0), ahead.max(axis=0))

    return known


def _class_rates(workload: Workload, slos: ClassSlos, slot_s: float) -> dict[int, FloatArray]:
    """Requests/s of each class in each slot, by slot number."""
    cuts, classes = slos.cuts, len(REQUEST_CLASSES)
    rates: dict[int, FloatArray] = {}
    for chunk in workload.chunks():
        input_size = np.searchsorted(np.asarray(cuts.input_tokens), chunk.input_tokens, side="right")
        output_size = np.searchsorted(np.asarray(cuts.output_tokens), chunk.output_tokens, side="right")
        request_class = 3 * input_size + output_size
        slot = (chunk.arrival_s // slot_s).astype(np.int64)
        for index in np.unique(slot):
            counts = np.bincount(request_class[slot == index], minlength=classes) / slot_s
            rates[int(index)] = rates.get(int(index), np.zeros(classes)) + counts
    return rates


class WholeCluster:
    """The paper's baseline: the whole cluster is one pool at the largest TP and the highest clock, for good."""

    def __init__(self, setup: SimulationSetup, policy: Policy) -> None:
        profile = setup.profile
        tp = profile.tensor_parallel[-1]
        self._actions = tuple(
            ScaleOut(
                deadline_s=float("inf"),
                instance_id=f"{policy.name}-{node}-{index}",
                pool=setup.pools[0].name,
                tp=tp,
                sm_clock_mhz=profile.sm_clocks_mhz[-1],
                node=f"n{node}",
            )
            for node in range(setup.nodes)
            for index in range(setup.gpus_per_node // tp)
        )

    def first_tick(self, now_s: float) -> Tick:
        """At once."""
        return Tick(now_s, Level.JOINT)

    def on_tick(self, tick: Tick, observation: Observation) -> Effects:
        """Everything starts, nothing ever changes."""
        return Effects(self._actions, Tick(float("inf"), Level.JOINT))
