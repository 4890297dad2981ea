"""Deployment: specifications from settings, views from what drivers report."""

import dataclasses

import numpy as np
import pytest

from dynamollm.adapters.configuration import load
from dynamollm.deployment import Deployment
from dynamollm.placement import NoRoomError
from energy.adapters.catalogue import load_profile
from pools.drivers.port import InstanceEvent
from pools.instances import GpuSlot, Instance, InstanceShape, InstanceState
from pools.request import RequestClass


@pytest.fixture(scope="module")
def profile():
    return load_profile("llama-3.1-70b-fp8-h100")


@pytest.fixture
def deployment(profile):
    return Deployment(load(None, {}), {"llama-3.1-70b": profile})


def started(spec, state=InstanceState.READY):
    return Instance(spec.id, spec.pool, spec.shape, "http://127.0.0.1:9", state, spec.sm_clock_mhz, spec.gpus)


def test_every_configured_instance_gets_its_own_gpus_and_the_default_clock(deployment, profile):
    specs = deployment.configured()
    assert [spec.pool for spec in specs] == ["SS", "SM", "SL", "MS", "MM", "ML", "LS", "LM", "LL"]
    gpus = [gpu for spec in specs for gpu in spec.gpus]
    assert len(gpus) == len(set(gpus)) == 30
    assert {spec.sm_clock_mhz for spec in specs} == {profile.sm_clocks_mhz[-1]}
    assert {spec.shape.gpu for spec in specs} == {"H100-SXM"}


def test_ids_are_never_used_twice(deployment):
    deployment.configured()
    spec = deployment.specify("SS")
    assert spec.id == "ss-2"
    deployment.put(started(spec))
    deployment.change(InstanceEvent(spec.id, InstanceState.STOPPED))
    assert deployment.specify("SS").id == "ss-3"


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"pool": "XX"}, "there is no pool 'XX' any more"),
        ({"shape": InstanceShape("other", "H100-SXM", 2)}, "is of model 'llama-3.1-70b' now, not 'other'"),
        ({"shape": InstanceShape("llama-3.1-70b", "H100-SXM", 1)}, "holds for TP 2, 4, 8 now, not 1"),
        ({"shape": InstanceShape("llama-3.1-70b", "A100-SXM", 2)}, "has H100-SXM now, not A100-SXM"),
        ({"gpus": (GpuSlot("gone", 0), GpuSlot("gone", 1))}, "there is no node 'gone' any more"),
    ],
)
def test_what_an_earlier_controller_left_is_adopted_only_where_the_settings_know_it(deployment, changed, why):
    left = started(deployment.specify("SS", tp=2))
    deployment.placement.release(left.gpus)
    assert why in deployment.adopt(dataclasses.replace(left, **changed))
    assert not deployment.instances
    assert deployment.adopt(left) == ""
    assert deployment.instances == {left.id: left}


@pytest.mark.parametrize(("policy", "missing"), [("static", 8), ("scale-freq", 8), ("dynamollm", 0)])
def test_beside_what_was_adopted_those_the_pools_lack_are_started_where_no_plan_says_so(profile, policy, missing):
    settings = load(None, {"DYNAMOLLM_CONTROLLER__POLICY": policy})
    deployment = Deployment(settings, {"llama-3.1-70b": profile})
    left = started(deployment.specify("SS"))
    deployment.placement.release(left.gpus)
    assert deployment.adopt(left) == ""
    assert len(deployment.configured()) == missing


def test_one_that_is_gone_frees_its_gpus_and_is_not_routed_to(deployment):
    specs = deployment.configured()
    for spec in specs:
        deployment.put(started(spec))
    with pytest.raises(NoRoomError):
        deployment.specify("LL")
    gone = deployment.change(InstanceEvent("ll-1", InstanceState.FAILED, "killed"))
    assert gone is not None
    assert gone.state is InstanceState.FAILED
    assert deployment.address("ll-1") is None
    assert "ll-1" not in [view.instance.id for view in deployment.routing_view(0.0).instances]
    assert len(deployment.specify("LL").gpus) == 8


def test_the_view_prices_each_instance_at_its_present_clock(deployment, profile):
    spec = deployment.specify("LL")
    deployment.put(started(spec, InstanceState.STARTING))
    assert not deployment.servable("llama-3.1-70b")
    deployment.change(InstanceEvent(spec.id, InstanceState.READY))
    deployment.set_sm_clock(spec.id, 800, profile.sm_clocks_mhz[0])
    view = deployment.routing_view(7.0)
    assert view.as_of_s == 7.0
    assert view.instances[0].step == profile.step(8, profile.sm_clocks_mhz[0])
    assert view.instances[0].limits.kv_capacity_tokens == profile.kv_capacity_tokens(8)
    assert deployment.servable("llama-3.1-70b")
    assert deployment.address(spec.id).port == 9


def test_every_change_makes_a_new_version_and_pools_keep_their_class(deployment):
    versions = [deployment.routing_view(0.0).version]
    spec = deployment.specify("ML")
    deployment.put(started(spec))
    versions.append(deployment.routing_view(0.0).version)
    deployment.set_sm_clock(spec.id, 1200, 1200)
    versions.append(deployment.routing_view(0.0).version)
    assert versions == sorted(set(versions))
    assert deployment.routing_view(0.0).pools[5].request_class is RequestClass.ML


def test_what_is_unknown_is_ignored(deployment):
    assert deployment.change(InstanceEvent("nobody", InstanceState.READY)) is None
    deployment.set_sm_clock("nobody", 1000, 1000)


def test_machines_of_one_kind_have_names_of_their_own(profile):
    settings = load(None, {})
    two = dataclasses.replace(settings, nodes=(dataclasses.replace(settings.nodes[0], count=1), settings.nodes[0]))
    names = Deployment(two, {"llama-3.1-70b": profile}).placement.nodes
    assert names == {"h100": 8, "h100-0": 8, "h100-1": 8, "h100-2": 8, "h100-3": 8}


def test_a_controller_sees_the_clock_it_ordered_though_the_gpu_rounds_it(deployment):
    spec = deployment.specify("LL")
    deployment.put(started(spec))
    assert deployment.ordered_sm_clock_mhz(spec.id) == spec.sm_clock_mhz
    deployment.set_sm_clock(spec.id, 1000, 1005)
    assert deployment.ordered_sm_clock_mhz(spec.id) == 1000
    assert deployment.instances[spec.id].sm_clock_mhz == 1005


def test_what_did_not_change_is_the_same_object_in_the_next_view(deployment):
    for name in ("SS", "LL"):
        deployment.put(started(deployment.specify(name)))
    before = deployment.routing_view(0.0).instances
    deployment.set_sm_clock("ll-1", 1000, 1005)
    after = deployment.routing_view(1.0).instances
    assert after[0] is before[0]
    assert after[1] is not before[1]


def test_it_follows_another_deployment_as_that_is_now(profile):
    leader, follower = (Deployment(load(None, {}), {"llama-3.1-70b": profile}) for _ in range(2))
    for spec in leader.configured():
        leader.put(started(spec))
    share = np.zeros((9, len(leader.settings.pools)))
    share[:, -1] = 1.0
    leader.set_shares([pool.name for pool in leader.settings.pools], share)
    follower.follow(leader.instances.values(), leader.shares)
    before, view = leader.routing_view(5.0), follower.routing_view(5.0)
    assert (view.instances, view.shares) == (before.instances, before.shares)
    assert follower.address("ll-1") is not None
    assert leader.expect([("ss-9", "SS"), ("ll-1", "LL")])
    assert leader.coming == {"SS"}, "ll-1 is there"
    leader.change(InstanceEvent("ll-1", InstanceState.STOPPED))
    follower.follow(leader.instances.values(), {}, leader.coming)
    after = follower.routing_view(6.0)
    assert after.version > view.version
    assert "ll-1" not in {v.instance.id for v in after.instances}
    assert (follower.address("ll-1"), after.shares) == (None, {})
    assert after.coming == {"SS", "LL"}
    assert leader.expect_no_more([("ss-9", "SS"), ("ll-1", "LL")])
    assert leader.coming == frozenset()
    assert not leader.expect_no_more([("ss-9", "SS")]), "nobody expected it"
    follower.follow(leader.instances.values(), {}, leader.coming)
    assert follower.routing_view(7.0).coming == frozenset()


def test_instances_are_in_the_order_their_starts_were_asked_for_and_show_the_clock_ordered(deployment):
    first, second = deployment.specify("SS"), deployment.specify("SM", sm_clock_mhz=800)
    deployment.begin_start(first, 60.0)
    deployment.begin_start(second, 60.0)
    deployment.put(dataclasses.replace(started(second), sm_clock_mhz=795))  # ready first; the GPU rounds
    deployment.put(started(first))
    assert [instance.id for instance in deployment.in_order()] == [first.id, second.id]
    assert deployment.ordered_sm_clock_mhz(second.id) == 800
    deployment.change(InstanceEvent(first.id, InstanceState.STOPPED))
    again = deployment.specify("SS")
    deployment.begin_start(again, 90.0)
    deployment.put(started(again))
    assert [instance.id for instance in deployment.in_order()] == [second.id, again.id]
