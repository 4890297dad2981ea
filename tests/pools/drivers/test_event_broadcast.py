"""EventBroadcast: every listener hears everything from when it began, in order, and ends when the driver closes."""

import asyncio

from hypothesis import given
from hypothesis import strategies as st

from pools.drivers.broadcast import EventBroadcast
from pools.drivers.port import InstanceEvent
from pools.instances import InstanceState
from simulator.virtual_loop import run


def event(number):
    return InstanceEvent(f"i-{number}", InstanceState.READY)


async def heard_by(listener):
    return [e.instance_id async for e in listener]


def test_a_listener_hears_what_is_published_after_it_began():
    async def scenario():
        broadcast = EventBroadcast()
        broadcast.publish(event(0))
        listener = broadcast.listen()
        broadcast.publish(event(1))
        broadcast.publish(event(2))
        broadcast.close()
        return await heard_by(listener)

    assert run(scenario()) == ["i-1", "i-2"]


@given(st.lists(st.sampled_from(["publish", "listen"]), max_size=30))
def test_every_listener_hears_a_tail_of_all_in_order(script):
    async def scenario():
        broadcast, listeners, published = EventBroadcast(), [], []
        for what in script:
            if what == "publish":
                published.append(f"i-{len(published)}")
                broadcast.publish(event(len(published) - 1))
            else:
                listeners.append((len(published), broadcast.listen()))
        broadcast.close()
        return published, [(since, await heard_by(listener)) for since, listener in listeners]

    published, heard = run(scenario())
    for since, events in heard:
        assert events == published[since:]


def test_who_comes_after_the_end_hears_nothing_and_ends():
    async def scenario():
        broadcast = EventBroadcast()
        broadcast.close()
        return await heard_by(broadcast.listen())

    assert run(scenario()) == []


def test_a_listener_that_leaves_is_forgotten():
    async def scenario():
        broadcast = EventBroadcast()
        leaver, stayer = broadcast.listen(), broadcast.listen()
        broadcast.publish(event(1))
        assert (await anext(leaver)).instance_id == "i-1"
        await leaver.aclose()
        broadcast.publish(event(2))
        broadcast.close()
        return await heard_by(stayer)

    assert run(scenario()) == ["i-1", "i-2"]


def test_a_slow_listener_does_not_hold_up_the_others():
    async def scenario():
        broadcast = EventBroadcast()
        slow, quick = broadcast.listen(), broadcast.listen()

        async def slowly():
            told = []
            async for e in slow:
                await asyncio.sleep(10.0)
                told.append(e.instance_id)
            return told

        waiting = asyncio.create_task(slowly())
        for number in range(3):
            broadcast.publish(event(number))
        broadcast.close()
        began_s = asyncio.get_running_loop().time()
        told = await heard_by(quick)
        assert asyncio.get_running_loop().time() == began_s
        return told, await waiting

    quick, slow = run(scenario())
    assert quick == slow == ["i-0", "i-1", "i-2"]
