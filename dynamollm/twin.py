"""Twin: what `dynamollm serve` would do with a configuration, in virtual time. Values in, values out; starts nothing.

``twin`` is the configured cluster itself, ``baseline`` the same nodes under the paper's baseline or the strong one. The
twin has the same nodes, the same instances to begin with, the same controller, first called as early, the same router
weights and engine limits as the emulator's. What a simulation of it and the live cluster decide is compared in
tests/dynamollm/test_parity.py; what differs by construction stands in docs/live-control.md.
"""

from dynamollm.control_loop import FIRST_LOOK_S
from dynamollm.deployment import Deployment, node_gpus
from dynamollm.errors import UserError
from dynamollm.settings import Settings, of_one_kind
from energy.gpus import gpu_physics
from energy.profile import EnergyProfile
from pools.classes import ClassSlos, RequestClass
from pools.queue import QueueLimits
from pools.scoring import Weights
from simulator.delays import Delays
from simulator.running import RunningCluster, RunningInstance
from simulator.setup import PoolSetup, SimulationSetup
from solver.control import Controller
from solver.policies import Policy

CLOCK_S = 0.005  # a call of NVML, median; the emulator's is of that order
WAKE_S = 1.0  # as the emulator's instances


def twin(
    settings: Settings, profile: EnergyProfile, controller: Controller | None
) -> tuple[SimulationSetup, Controller]:
    """The pretend world of a configuration, and what controls it (None: nothing changes).

    Raises ``UserError`` where the simulator has no such world: several models, or nodes that are not alike.
    """
    pools = tuple(PoolSetup(pool.name, RequestClass[pool.request_class]) for pool in settings.pools)
    setup = _world(settings, profile, pools)
    return setup, RunningCluster(_instances(settings, profile), controller, FIRST_LOOK_S)


def baseline(
    settings: Settings, profile: EnergyProfile, policy: Policy, controller: Controller | None
) -> tuple[SimulationSetup, Controller]:
    """The same nodes, all of them full of the largest instances at the highest clock in a policy's pools.

    ``controller`` goes on from there; without one it is the paper's single-pool. Raises ``UserError`` as ``twin``.
    """
    pools = tuple(PoolSetup(pool.name, pool.request_class) for pool in policy.pools(profile.model))
    setup = _world(settings, profile, pools)
    tp, top_mhz, pool = profile.tensor_parallel[-1], profile.sm_clocks_mhz[-1], pools[-1].name
    instances = [
        RunningInstance(f"{policy.name}-{node}-{index}", pool, tp, top_mhz, f"n{node}")
        for node in range(setup.nodes)
        for index in range(setup.gpus_per_node // tp)
    ]
    return setup, RunningCluster(instances, controller, FIRST_LOOK_S)


def _world(settings: Settings, profile: EnergyProfile, pools: tuple[PoolSetup, ...]) -> SimulationSetup:
    if not of_one_kind(settings):
        raise UserError("models, nodes: only clusters of one model on like nodes can be simulated")
    driver, limits = settings.driver, settings.limits
    return SimulationSetup(
        profile=profile,
        nodes=sum(node.count for node in settings.nodes),
        pools=pools,
        gpus_per_node=settings.nodes[0].gpus,
        delays=Delays(
            node_on_s=0.0, start_s=driver.startup_s, wake_s=WAKE_S, reshard_s=driver.startup_s, clock_s=CLOCK_S
        ),
        slos=ClassSlos(settings.slo.ttft_s, settings.slo.tbt_s, settings.slo.cuts),
        weights=Weights(),
        queue=QueueLimits(max_depth=limits.queue_requests, ttl_s=limits.queue_ttl_s),
        empty_nodes_off=False,  # nobody switches the nodes of a running cluster off
        supported_mhz=gpu_physics(profile.gpu).supported,
        sample_s=10.0,
    )


def _instances(settings: Settings, profile: EnergyProfile) -> list[RunningInstance]:
    """Those configured, where the deployment would put them; the simulator's nodes are called n0, n1, ..."""
    nodes = {name: f"n{index}" for index, name in enumerate(node_gpus(settings.nodes))}
    every = Deployment(settings, {settings.models[0].name: profile}).configured()
    return [
        RunningInstance(
            spec.id, spec.pool, spec.shape.tp, _known_clock(profile, spec.sm_clock_mhz), nodes[spec.gpus[0].node]
        )
        for spec in every
    ]


def _known_clock(profile: EnergyProfile, sm_clock_mhz: int) -> int:
    """The clock of the profile nearest to one configured."""
    return min(profile.sm_clocks_mhz, key=lambda clock_mhz: abs(clock_mhz - sm_clock_mhz))
