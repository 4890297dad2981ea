"""Whatever is ordered of a running cluster and whatever breaks meanwhile: nobody's request is cut by an order, every
order ends with an outcome, and deployment, driver and GPUs agree in the end. In virtual time."""

import asyncio
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st
from test_operations import World, in_world

from dynamollm.operations import Outcome
from pools.drivers.port import DriverError
from pools.instances import InstanceState
from solver.control import Park, Reassign, Reshard, ScaleIn, ScaleOut, SetFrequency, Wake

LONG_S = 600.0
THERE = ("ss-1", "sm-1", "ll-1")  # configured
NEW = ("new-1", "new-2", "new-3")
names = st.sampled_from((*THERE, *NEW))
deadlines = st.sampled_from((3.0, LONG_S))
clocks = st.sampled_from((800, 1400, 1980))
nodes = st.integers(0, 3)


@st.composite
def scale_outs(draw, name=None):
    return {
        "kind": ScaleOut,
        "instance_id": name or draw(st.sampled_from(NEW)),
        "pool": draw(st.sampled_from(("SS", "LL"))),
        "tp": draw(st.sampled_from((2, 4))),
        "sm_clock_mhz": draw(clocks),
        "node": draw(nodes),
    }


def on_one(kind, **more):
    """Orders about one instance."""
    return st.fixed_dictionaries({"kind": st.just(kind), "instance_id": names, **more})


reshards = st.fixed_dictionaries(
    {
        "kind": st.just(Reshard),
        "retire": st.lists(names, min_size=1, max_size=2, unique=True).map(tuple),
        "create": st.lists(st.sampled_from(NEW), min_size=1, max_size=2, unique=True),
        "node": nodes,
    }
)
orders = st.one_of(
    scale_outs(),
    reshards,
    on_one(ScaleIn),
    on_one(SetFrequency, sm_clock_mhz=clocks),
    on_one(Park, sm_clock_mhz=clocks),
    on_one(Wake, sm_clock_mhz=clocks),
    on_one(Reassign, pool=st.sampled_from(("SS", "LL"))),
)
happenings = st.one_of(
    st.tuples(st.just("order"), orders, deadlines),
    st.tuples(st.just("requests"), names, st.integers(0, 3)),
    st.tuples(st.just("crash"), names),
    st.tuples(st.just("wait"), st.sampled_from((0.1, 1.0, 5.0))),
)


def action_of(world, order, deadline_s):
    """The order as an action, on nodes of the cluster there is."""
    given_nodes = list(world.deployment.placement.nodes)
    fields = {key: value for key, value in order.items() if key != "kind"}
    due_s = world.loop.time() + deadline_s
    if "node" in fields:
        fields["node"] = given_nodes[fields["node"] % len(given_nodes)]
    if order["kind"] is Reshard:
        fields["create"] = tuple(
            ScaleOut(deadline_s=due_s, instance_id=name, pool="LL", tp=2, sm_clock_mhz=1980, node=fields["node"])
            for name in fields.pop("create")
        )
        fields.pop("node")
    return order["kind"](deadline_s=due_s, **fields)


class Watched(World):
    """A world that notes every stop of an instance that still had requests."""

    def __init__(self):
        super().__init__()
        self.cut = []
        stop = self.driver.stop

        async def watched_stop(instance_id, grace_s):
            running = [i for i in await self.driver.list() if i.id == instance_id]
            if running and self.router.in_flight(instance_id):
                self.cut.append(instance_id)
            await stop(instance_id, grace_s)

        self.driver.stop = watched_stop


async def play(world, script):
    for what, *details in script:
        if what == "order":
            world.operations.apply([action_of(world, *details)])
        elif what == "requests":
            name, count = details
            if world.state(name) is InstanceState.READY or count == 0:  # the router gives others none
                world.router.held[name] = count
        elif what == "crash":
            try:
                world.driver.crash(details[0])
            except DriverError:
                continue
            world.router.held.pop(details[0], None)
        else:
            await asyncio.sleep(details[0])
    world.router.held.clear()  # every request ends some day
    await world.operations.settled()
    await asyncio.sleep(120.0)  # replacements of what crashed


def played(script):
    """The world afterwards, and what its driver ran in the end."""
    listed = []

    async def scenario(world):
        await play(world, script)
        listed.extend(await world.driver.list())

    return in_world(scenario, Watched), listed


@settings(max_examples=40, deadline=None)
@given(st.lists(happenings, min_size=1, max_size=14))
def test_any_story_ends_well(script):
    world, listed = played(script)
    assert world.cut == []
    # every order has an end, and it is one of three
    ordered = sum(what == "order" for what, *_ in script)
    assert len(world.operations.records) == ordered
    assert world.operations.busy == 0
    for record in world.operations.records:
        assert record.ended_s >= record.began_s
        assert (record.outcome is Outcome.ABANDONED) == bool(record.reason) or record.outcome is Outcome.STALE
    # what is known is what runs, on the GPUs that are held
    known = {i.id: (i.state, i.gpus) for i in world.deployment.instances.values()}
    assert known == {i.id: (i.state, i.gpus) for i in listed}
    held = Counter(gpu for i in listed for gpu in i.gpus)
    assert all(times == 1 for times in held.values())
    placement = world.deployment.placement
    for node, gpus in placement.nodes.items():
        assert placement.free_gpus(node) == gpus - sum(gpu.node == node for gpu in held)
    # and what the router was shown last is that, too
    shown = {v.instance.id: v.instance.state for v in world.router.view.instances}
    assert shown == {name: state for name, (state, _) in known.items()}
    assert world.deployment.coming == world.router.view.coming == frozenset()


@settings(max_examples=20, deadline=None)
@given(st.lists(happenings, min_size=1, max_size=10))
def test_the_same_story_twice_ends_alike(script):
    first, second = (played(script) for _ in range(2))
    assert first[1] == second[1]
    assert first[0].outcomes() == second[0].outcomes()


def test_an_instance_that_dies_while_it_drains_is_not_replaced():
    """It was to go anyway: its GPUs are wanted for something else."""

    async def scenario(world):
        world.router.held["ss-1"] = 1
        world.operations.apply([ScaleIn(deadline_s=world.loop.time() + LONG_S, instance_id="ss-1")])
        await asyncio.sleep(1.0)
        assert world.state("ss-1") is InstanceState.DRAINING
        world.driver.crash("ss-1")
        await asyncio.sleep(0.1)
        world.router.held.clear()
        await world.operations.settled()
        await asyncio.sleep(120.0)
        assert not [i for i in world.deployment.instances.values() if i.pool == "SS"]

    in_world(scenario)


def test_an_instance_that_dies_while_it_serves_is_replaced():
    async def scenario(world):
        world.driver.crash("ss-1")
        await asyncio.sleep(120.0)
        replaced = [i for i in world.deployment.instances.values() if i.pool == "SS"]
        assert [i.state for i in replaced] == [InstanceState.READY]

    in_world(scenario)
