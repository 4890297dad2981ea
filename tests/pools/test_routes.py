"""Fragmentation: which pools may serve a class, in which order."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pool_examples import MODEL, cluster, nine_pools

from pools.classes import REQUEST_CLASSES, RequestClass
from pools.routes import Route, distance, route_of, routes_of

SS, SM, SL, MS, MM, ML, LS, LM, LL = REQUEST_CLASSES


def names(*classes):
    return tuple(c.name for c in classes)


def route(view, request_class, served=None):
    served = frozenset(p.name for p in view.pools) if served is None else frozenset(names(*served))
    return route_of(view, MODEL, request_class, served)


def test_a_class_goes_to_its_own_pool_then_to_larger_ones_by_nearness():
    assert route(nine_pools(), MM) == Route(("MM",), (1.0,), names(ML, LM, LL))
    assert route(nine_pools(), SL) == Route(("SL",), (1.0,), names(ML, LL))
    assert route(nine_pools(), LL) == Route(("LL",), (1.0,), ())


def test_a_class_without_a_pool_goes_to_the_nearest_that_dominates_it():
    view = cluster(dict.fromkeys((SS, MS, ML, LL), 1))
    assert route(view, SL).first == ("ML",)  # never MS: shorter in outputs
    assert route(view, SM).first == ("ML",)
    assert route(view, LM).first == ("LL",)


def test_of_two_equally_near_the_one_with_the_same_inputs_is_taken():
    assert route(cluster(dict.fromkeys((SM, MS), 1)), SS) == Route(("SM",), (1.0,), ("MS",))


def test_a_pool_without_instances_is_no_first_choice_but_stays_a_fallback():
    assert route(nine_pools(), MM, served=(ML, LL)) == Route(("ML",), (1.0,), names(MM, LM, LL))


def test_the_plans_shares_come_first():
    view = nine_pools(shares={(MODEL, SS): (("MM", 3.0), ("LL", 1.0), ("SS", 0.0))})
    assert route(view, SS).first == ("MM", "LL")
    assert route(view, SS).weights == (3.0, 1.0)
    assert "SS" in route(view, SS).then
    assert route(view, SM).first == ("SM",)


def test_shares_of_pools_without_instances_do_not_count():
    view = nine_pools(shares={(MODEL, SS): (("MM", 1.0),)})
    assert route(view, SS, served=(SS, LL)).first == ("SS",)


def test_nothing_dominates():
    assert route(cluster({MM: 1}), LL) == Route((), (), ())


def test_two_pools_kept_for_one_class_share_it():
    from pool_examples import instance_view, pool_view

    from pools.view import ClusterView

    pools = (pool_view(SS, "a"), pool_view(SS, "b"))
    view = ClusterView(1, 0.0, pools, (instance_view("1", "a"), instance_view("2", "b")))
    assert route_of(view, MODEL, SS, frozenset("ab")).first == ("a", "b")


def test_models_are_kept_apart():
    view = nine_pools()
    assert set(routes_of(view, frozenset())) == {MODEL}
    assert route_of(view, "other", SS, frozenset()) == Route((), (), ())


@given(st.sets(st.sampled_from(REQUEST_CLASSES)), st.sets(st.sampled_from(REQUEST_CLASSES)))
def test_every_pool_of_a_route_dominates_and_none_is_missed(kept, served):
    view = cluster(dict.fromkeys(sorted(kept), 1))
    for request_class in REQUEST_CLASSES:
        r = route(view, request_class, served=served & kept)
        pools = r.first + r.then
        assert len(set(pools)) == len(pools)
        assert set(pools) == {c.name for c in kept if c.dominates(request_class)}
        able = [c for c in served & kept if c.dominates(request_class)]
        if able:
            nearest = min(able, key=lambda c: distance(c, request_class))
            assert r.first == (nearest.name,)


@pytest.mark.parametrize("c", REQUEST_CLASSES)
def test_a_class_is_nearest_to_itself(c):
    assert distance(c, c) == (0, 0)
    assert all(distance(RequestClass(k), c) > (0, 0) for k in range(9) if RequestClass(k).dominates(c) and k != c)
