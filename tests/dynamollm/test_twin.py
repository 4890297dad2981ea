"""The twin of a configuration: the pretend world has what the deployment would start, and nothing else."""

from dataclasses import replace

import numpy as np
import pytest

from dynamollm.adapters.configuration import load
from dynamollm.control_loop import FIRST_LOOK_S
from dynamollm.errors import UserError
from dynamollm.settings import ModelSettings, NodeSettings
from dynamollm.twin import twin
from energy.adapters.catalogue import load_profile
from simulator.running import RunningCluster, RunningInstance
from solver.control import ClusterState, Demand, Effects, InstanceViews, Level, Observation, Tick

PROFILE = load_profile("llama-3.1-70b-fp8-h100")


def observation(now_s: float) -> Observation:
    ints, floats = np.zeros(0, dtype=np.int64), np.zeros(0)
    views = InstanceViews((), ints, ints, ints, ints, ints, floats, np.zeros((0, 9)), *[floats] * 7)
    cluster = ClusterState(now_s, ("LL",), ("n0",), np.array([8]), np.ones(1, dtype=np.bool_), views)
    return Observation(now_s, cluster, Demand(5.0, np.zeros(9), np.zeros(9), np.zeros(9), np.zeros(9)))


class EveryFive:
    def __init__(self) -> None:
        self.seen: list[tuple[float, Level]] = []

    def first_tick(self, now_s: float) -> Tick:
        return Tick(now_s, Level.JOINT)

    def on_tick(self, tick: Tick, observation: Observation) -> Effects:
        self.seen.append((observation.now_s, tick.levels))
        return Effects((), Tick(observation.now_s + 5.0, Level.INSTANCE))


def test_it_begins_with_the_configured_instances_and_is_decided_after_a_first_look():
    inner = EveryFive()
    settings = load(None, {})
    setup, controller = twin(settings, PROFILE, inner)
    assert (setup.nodes, setup.gpus, setup.empty_nodes_off) == (4, 32, False)
    assert setup.supported_mhz(800) == 795, "GPUs round the clocks they are told"
    effects = controller.on_tick(controller.first_tick(0.0), observation(0.0))
    assert [(a.instance_id, a.tp) for a in effects.actions] == [
        (f"{pool.name.lower()}-1", pool.tp) for pool in settings.pools
    ]
    assert {a.node for a in effects.actions} <= {"n0", "n1", "n2", "n3"}
    assert effects.next_tick.at_s == FIRST_LOOK_S
    assert controller.on_tick(effects.next_tick, observation(5.0)).next_tick.at_s == 10.0
    controller.on_tick(Tick(10.0, Level.INSTANCE), observation(10.0))
    assert inner.seen == [(5.0, Level.JOINT), (10.0, Level.INSTANCE)]


def test_a_cluster_nobody_controls_is_never_asked_again():
    cluster = RunningCluster([RunningInstance("a", "LL", 8, 1980, "n0")])
    effects = cluster.on_tick(cluster.first_tick(0.0), observation(0.0))
    assert [a.instance_id for a in effects.actions] == ["a"]
    assert effects.next_tick.at_s == float("inf")


@pytest.mark.parametrize(
    "change",
    [
        {"models": (ModelSettings("a", "x"), ModelSettings("b", "x"))},
        {"nodes": (NodeSettings("a", gpus=8), NodeSettings("b", gpus=4))},
        {"nodes": (NodeSettings("a"), NodeSettings("b", gpu="H200-SXM"))},
    ],
)
def test_what_the_simulator_has_no_world_for_is_refused(change):
    with pytest.raises(UserError, match="one model on like nodes"):
        twin(replace(load(None, {}), **change), PROFILE, None)
