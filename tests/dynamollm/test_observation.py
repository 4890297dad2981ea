"""What the controller is shown: counts since the last look, of the right pool, class and instance."""

import math

import msgspec
import numpy as np
import pytest

from dynamollm.adapters.configuration import load
from dynamollm.deployment import Deployment
from dynamollm.observation import CLASSES, Observer
from dynamollm.slo_watch import SloWatch, tbt_share
from energy.adapters.catalogue import load_profile
from pools.classes import RequestClass, Slo
from pools.instances import Instance, InstanceState
from pools.request import Assigned, Request
from pools.router import Router
from proxy.fields import read_chat
from proxy.outcome import Outcome
from solver.control import INSTANCE_STATES

MODEL = "llama-3.1-70b"


class World:
    def __init__(self, power_w: dict[str, float] | None = None) -> None:
        self.deployment = Deployment(load(None, {}), {MODEL: load_profile("llama-3.1-70b-fp8-h100")})
        self.router = Router()
        for spec in self.deployment.configured():
            self.deployment.put(
                Instance(
                    spec.id, spec.pool, spec.shape, "http://h:1", InstanceState.READY, spec.sm_clock_mhz, spec.gpus
                )
            )
        self.router.update(self.deployment.routing_view(0.0), 0.0)
        self.observer = Observer(self.deployment, self.router, 0.0, power_w=lambda: power_w or {})
        self.watch = SloWatch(self.router, self.observer.on_share)

    def send(self, name: str, request_class: RequestClass, now_s: float, input_tokens: int = 10) -> Request:
        request = Request(name, MODEL, now_s, input_tokens, 50.0, request_class, Slo(2.0, 0.1))
        assert isinstance(self.router.route(request, now_s), Assigned)
        return request


def outcome(request: Request, first_s: float, ended_s: float, tokens: int, stream: bool = True, **changes) -> Outcome:
    body = b'{"model": "m", "messages": [], "stream": %b}' % (b"true" if stream else b"false")
    values = {
        "request": request,
        "fields": read_chat(body),
        "status": 200,
        "instance_id": "ss-1",
        "pool": "SS",
        "ended_s": ended_s,
        "first_token_s": first_s,
        "prompt_tokens": 10,
        "completion_tokens": tokens,
        "cancelled": False,
    }
    names = [f.name for f in msgspec.structs.fields(Outcome)]
    return Outcome(**{name: {**values, **changes}.get(name) for name in names})


def test_demand_is_what_arrived_since_the_last_look():
    world = World()
    for n in range(4):
        world.send(f"a{n}", RequestClass.SS, 1.0, input_tokens=100)
    world.send("b", RequestClass.LL, 1.0, input_tokens=3000)
    demand = world.observer.observe(5.0).demand
    assert demand.window_s == 5.0
    assert demand.requests.tolist() == [4, 0, 0, 0, 0, 0, 0, 0, 1]
    assert demand.input_tokens[RequestClass.SS] == 400
    assert demand.queued.sum() == 0
    assert world.observer.observe(10.0).demand.requests.sum() == 0


def test_outputs_of_what_arrives_are_taken_as_those_that_ended():
    world = World()
    world.send("a", RequestClass.SS, 1.0)
    world.router.on_finished("a", 80, 2.0)
    world.send("b", RequestClass.SS, 3.0)
    assert world.observer.observe(5.0).demand.output_tokens[RequestClass.SS] == 2 * 80


def test_each_instance_shows_what_it_was_given():
    world = World()
    for n in range(10):
        world.send(f"a{n}", RequestClass.SS, 1.0)
    views = world.observer.observe(5.0).cluster.instances
    ss = views.ids.index("ss-1")
    assert views.class_rate_rps[ss].tolist() == [2.0] + [0.0] * (CLASSES - 1)
    assert views.running[ss] == 10
    assert views.waiting_tokens[ss] == 100
    later = world.observer.observe(10.0).cluster.instances
    assert later.class_rate_rps.sum() == 0
    assert later.running[ss] == 10


def test_the_cluster_is_described_as_it_is():
    world = World({"ll-1": 2400.0})
    cluster = world.observer.observe(5.0).cluster
    views = cluster.instances
    ll = views.ids.index("ll-1")
    assert cluster.pools[views.pool[ll]] == "LL"
    assert cluster.node_names[views.node[ll]] == world.deployment.instances["ll-1"].gpus[0].node
    assert (views.tp[ll], views.sm_clock_mhz[ll], views.power_w[ll]) == (8, 1980, 2400.0)
    assert math.isnan(views.power_w[views.ids.index("ss-1")])
    assert INSTANCE_STATES[views.state[ll]] is InstanceState.READY
    assert views.ready_at_s[ll] == -math.inf
    assert cluster.node_gpus.tolist() == [8, 8, 8, 8]


def test_slack_is_the_worst_seen_since_the_last_look():
    world = World()
    a, b = world.send("a", RequestClass.SS, 0.0), world.send("b", RequestClass.SS, 0.0)
    world.watch.on_outcome(outcome(a, first_s=0.5, ended_s=1.5, tokens=21))  # TBT 1/2 of the SLO
    world.watch.on_outcome(outcome(b, first_s=1.8, ended_s=2.0, tokens=21))  # TBT 1/10
    views = world.observer.observe(5.0).cluster.instances
    assert views.slo_slack[views.ids.index("ss-1")] == pytest.approx(0.5)
    assert np.isnan(world.observer.observe(10.0).cluster.instances.slo_slack).all()


def test_a_request_is_late_once_in_ttft_or_else_in_tbt():
    world = World()
    sent = {name: world.send(name, RequestClass.SS, 0.0) for name in ("ttft", "tbt", "both", "none")}
    for name, first_s, ended_s in (("ttft", 3.0, 3.5), ("tbt", 1.0, 5.0), ("both", 3.0, 7.0), ("none", 1.0, 1.5)):
        world.watch.on_first_token(name, first_s)
        world.router.on_first_token(name, first_s)
        world.watch.on_outcome(outcome(sent[name], first_s=first_s, ended_s=ended_s, tokens=21))  # TBT SLO: 0.1 s
    views = world.observer.observe(10.0).cluster.instances
    assert dict(zip(views.ids, views.late_rps, strict=True)) == {i: 0.3 if i == "ss-1" else 0.0 for i in views.ids}
    assert not world.observer.observe(20.0).cluster.instances.late_rps.any()


def test_a_late_first_token_shows_before_its_request_ends_and_once():
    world = World()
    world.send("a", RequestClass.SS, 0.0)
    world.watch.on_first_token("a", 3.0)  # of 2 s promised
    world.router.on_first_token("a", 3.0)
    views = world.observer.observe(5.0).cluster.instances
    assert views.slo_slack[views.ids.index("ss-1")] == pytest.approx(-0.5)
    world.watch.on_first_token("a", 6.0)
    world.watch.on_first_token("unknown", 6.0)
    assert np.isnan(world.observer.observe(10.0).cluster.instances.slo_slack).all()


def test_what_says_nothing_of_latency_is_left_out():
    request = World().send("a", RequestClass.SS, 0.0)
    assert tbt_share(outcome(request, 0.5, 1.5, 21)) == pytest.approx(0.5)
    assert tbt_share(outcome(request, 0.5, 1.5, 1)) is None
    assert tbt_share(outcome(request, 0.5, 1.5, 21, stream=False)) is None
    assert tbt_share(outcome(request, 0.5, 1.5, 21, cancelled=True)) is None
    assert tbt_share(outcome(request, 0.5, 1.5, 21, first_token_s=None)) is None


def test_the_controller_is_told_how_long_starts_take_once_one_was_seen():
    world, seen_s = World(), [math.nan]
    observer = Observer(world.deployment, world.router, 0.0, start_s=lambda: seen_s[0])
    assert math.isnan(observer.observe(1.0).start_s)
    seen_s[0] = 37.0
    assert observer.observe(2.0).start_s == 37.0


def test_an_empty_cluster_can_be_observed():
    deployment = Deployment(load(None, {}), {MODEL: load_profile("llama-3.1-70b-fp8-h100")})
    observation = Observer(deployment, Router(), 0.0).observe(5.0)
    assert len(observation.cluster.instances) == 0
    assert observation.cluster.instances.class_rate_rps.shape == (0, CLASSES)


def test_one_that_starts_says_when_it_should_be_ready():
    world = World()
    spec = world.deployment.specify("SS")
    world.deployment.begin_start(spec, 60.0)
    world.deployment.put(Instance(spec.id, "SS", spec.shape, "http://h:2", InstanceState.STARTING, 1980, spec.gpus))
    views = world.observer.observe(5.0).cluster.instances
    assert views.ready_at_s[views.ids.index(spec.id)] == 60.0


def test_a_lost_node_is_not_open_to_plans():
    lost: set[str] = set()
    profiles = {MODEL: load_profile("llama-3.1-70b-fp8-h100")}
    deployment = Deployment(load(None, {}), profiles, lambda: lost)
    observer = Observer(deployment, Router(), 0.0)
    assert observer.observe(5.0).cluster.node_usable.all()
    lost.add("h100-2")
    cluster = observer.observe(10.0).cluster
    assert [name for name, usable in zip(cluster.node_names, cluster.node_usable, strict=True) if not usable] == [
        "h100-2"
    ]
