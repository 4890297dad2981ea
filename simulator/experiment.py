"""Experiment: a named policy on a workload, set up alike for all; nothing differs but what the policy says.

``prepare`` gives the pretend world and the controller; ``provision_for`` measures the peak that static policies provide
for, from the workload itself: they know their future. ``clairvoyant`` is not run: it is a bound, see
``solver.clairvoyant``.
"""

from dataclasses import dataclass, field

import numpy as np

from energy.capacity import CapacityTable
from energy.profile import EnergyProfile, GpuState
from pools.classes import REQUEST_CLASSES, ClassSlos
from simulator.delays import Delays
from simulator.prediction import LengthPrediction
from simulator.setup import PoolSetup, SimulationSetup
from simulator.workload.arrivals import Workload
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
from solver.forecast import Forecast
from solver.planner import ChangeCosts, ClusterCosts
from solver.policies import Policy, policies

PEAK_WINDOW_S = 300.0  # static policies provide for the busiest five minutes of each class


@dataclass(frozen=True, slots=True)
class Scenario:
    """What all policies share."""

    profile: EnergyProfile
    capacity: CapacityTable
    nodes: int
    delays: Delays = field(default_factory=Delays)
    slos: ClassSlos = field(default_factory=ClassSlos)
    prediction: LengthPrediction = field(default_factory=LengthPrediction)
    parking: bool = False  # whether engines can sleep
    sample_s: float = 60.0


def prepare(scenario: Scenario, policy_name: str, workload: Workload) -> tuple[SimulationSetup, Controller]:
    """The world and the controller for one run. Raises ``ValueError`` for a policy that does not exist."""
    profile = scenario.profile
    known = policies(profile.tensor_parallel[-1], profile.sm_clocks_mhz[-1])
    if policy_name not in known:
        raise ValueError(f"no policy {policy_name!r}; there are {', '.join(known)}")
    policy = known[policy_name]
    pools = policy.pools(profile.model)
    setup = SimulationSetup(
        profile=profile,
        nodes=scenario.nodes,
        pools=tuple(PoolSetup(pool.name, pool.request_class) for pool in pools),
        delays=scenario.delays,
        slos=scenario.slos,
        prediction=scenario.prediction,
        sample_s=scenario.sample_s,
    )
    if policy.name == "single-pool":
        return setup, WholeCluster(setup, policy)
    provision = provision_for(workload, setup) if policy.static else None
    controller = PlanningController(
        policy,
        {profile.model: scenario.capacity},
        pools,
        settings=control_settings(scenario),
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
        cluster_costs=ClusterCosts(free_gpu_w=profile.idle_power_w(GpuState.BARE, least_mhz)),
    )


def provision_for(workload: Workload, setup: SimulationSetup) -> Forecast:
    """The busiest ``PEAK_WINDOW_S`` of each class; reads the workload once."""
    cuts = setup.slos.cuts
    windows: dict[int, FloatArray] = {}
    for chunk in workload.chunks():
        input_size = np.searchsorted(np.asarray(cuts.input_tokens), chunk.input_tokens, side="right")
        output_size = np.searchsorted(np.asarray(cuts.output_tokens), chunk.output_tokens, side="right")
        window = (chunk.arrival_s // PEAK_WINDOW_S).astype(np.int64)
        for index in np.unique(window):
            counts = np.bincount((3 * input_size + output_size)[window == index], minlength=len(REQUEST_CLASSES))
            windows[int(index)] = windows.get(int(index), np.zeros(len(REQUEST_CLASSES))) + counts
    rates = np.array(list(windows.values())) / PEAK_WINDOW_S
    return Forecast(rates.mean(axis=0), rates.max(axis=0))


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
