"""Where requests go that begin as others did: to the instance that has read it, unless load or SLO says otherwise."""

from dataclasses import replace

import pytest
from pool_examples import cluster, request
from test_router import router_of, with_states

from pools.classes import RequestClass, Slo
from pools.instances import InstanceState
from pools.prefixes import Prefix
from pools.request import Assigned
from pools.scoring import Weights

MM, LL = RequestClass.MM, RequestClass.LL
SPREADING = Weights(spread=1e6)  # without a prefix, the emptiest instance is taken
LOOSE = Slo(5.0, 0.5)


def conversation(name, turns=1):
    """Four blocks a turn; each turn begins as the one before."""
    return Prefix(tuple(hash((name, block)) for block in range(4 * turns)), 1.0 / (4 * turns))


def send(router, name, prefix, now_s=0.0, **options):
    """Route one request and let it finish; where it went."""
    decision = router.route(request(name, arrival_s=now_s, prefix=prefix, **options), now_s)
    assert isinstance(decision, Assigned)
    router.on_first_token(str(name), now_s)
    router.on_finished(str(name), 200, now_s)
    return decision.instance_id


def occupy(router, view, instance_id, count, **options):
    """Requests that stay on one instance."""
    others = frozenset(v.instance.id for v in view.instances) - {instance_id}
    for n in range(count):
        name = f"{instance_id}/{n}"
        decision = router.route(request(name, **options), 0.0, exclude=others)
        assert decision.instance_id == instance_id
        router.on_first_token(name, 0.0)


@pytest.fixture
def three():
    view = cluster({MM: 3})
    return router_of(view), view


def held_by(router, view, instance_id, prefix):
    others = frozenset(v.instance.id for v in view.instances) - {instance_id}
    router.route(request("first", prefix=prefix), 0.0, exclude=others)
    router.on_finished("first", 200, 0.0)


def test_a_conversation_stays_where_it_began(three):
    router, view = three
    held_by(router, view, "MM-2", conversation("a"))
    assert send(router, "no prefix", None) == "MM-0"
    assert send(router, "another", conversation("b")) == "MM-0"
    assert send(router, "next turn", conversation("a", 2)) == "MM-2"
    assert send(router, "and the next", conversation("a", 3)) == "MM-2"


def test_the_longest_of_several_prefixes_wins(three):
    router, view = three
    held_by(router, view, "MM-1", conversation("a"))
    held_by(router, view, "MM-2", conversation("a", 3))
    assert send(router, "next", conversation("a", 4)) == "MM-2"


def test_packing_by_energy_outweighs_a_short_prefix_and_not_a_long_one(three):
    router, view = three
    occupy(router, view, "MM-0", 3, slo=LOOSE)  # to join them saves most of the streaming of the weights
    held_by(router, view, "MM-2", conversation("a"))
    little = Prefix(conversation("a").blocks[:1], 0.02)
    assert send(router, "short", little, slo=LOOSE) == "MM-0"
    assert send(router, "long", conversation("a"), slo=LOOSE, input_tokens=6000, output_tokens=5.0) == "MM-2"


def test_an_instance_without_headroom_is_not_taken_for_its_prefix():
    view = cluster({MM: 2}, max_seqs=4)
    router = router_of(view)
    held_by(router, view, "MM-1", conversation("a"))
    occupy(router, view, "MM-1", 4)
    assert send(router, "next", conversation("a", 2)) == "MM-0"


def test_what_is_cached_makes_a_strict_slo_possible(three):
    router, view = three
    held_by(router, view, "MM-1", conversation("a"))
    strict = Slo(0.1, 0.1)
    occupy(router, view, "MM-0", 1)
    assert send(router, "next", conversation("a"), slo=strict, input_tokens=4000) == "MM-1"


def test_a_prefix_is_found_in_a_dominating_pool():
    view = cluster({MM: 1, LL: 1})
    router = router_of(view)
    held_by(router, view, "LL-0", conversation("a"))
    assert send(router, "shared nothing", conversation("b")) == "MM-0"
    assert send(router, "next", conversation("a"), input_tokens=6000, slo=LOOSE) == "LL-0"


def test_excluded_closed_and_gone_instances_are_passed_over(three):
    router, view = three
    held_by(router, view, "MM-2", conversation("a"))
    there = router.route(request("retry", prefix=conversation("a")), 0.0, exclude=frozenset({"MM-2"}))
    assert there.instance_id != "MM-2"
    router.update(with_states(view, MM_2=InstanceState.DRAINING), 1.0)
    assert send(router, "draining", conversation("a"), 1.0) != "MM-2"
    gone = replace(view, version=3, instances=view.instances[:2])
    router.update(gone, 2.0)
    assert send(router, "gone", conversation("a"), 2.0) != "MM-2"


def test_an_instance_that_was_parked_has_forgotten(three):
    router, view = three
    held_by(router, view, "MM-2", conversation("a"))
    router.update(with_states(view, MM_2=InstanceState.PARKED), 1.0)
    router.update(replace(view, version=3), 2.0)
    assert send(router, "next", conversation("a"), 2.0) == "MM-0"


def test_requests_without_prefixes_leave_nothing_behind(three):
    router, _ = three
    for n in range(20):
        send(router, n, None)
    assert len(router.fleet.prefixes) == 0
