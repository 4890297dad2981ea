"""Several gateways' counts: together they see what one that sees all would; alone again, nothing of it is left."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pool_examples import MODEL, cluster

from pools.classes import RequestClass, Slo
from pools.peers import NOTHING, PeerLoad, together
from pools.request import Assigned, Request
from pools.router import Router
from pools.scoring import UNPROMISED_S, Load

COUNTED = ("in_flight", "pending_tokens", "context_tokens", "reserved_tokens", "prompt_share", "tbt_limit_s")


def request(name: str, input_tokens: int = 100, output_tokens: float = 50.0, tbt_s: float = 0.1) -> Request:
    return Request(name, MODEL, 0.0, input_tokens, output_tokens, RequestClass.LL, Slo(2.0, tbt_s))


def router(instances: int = 3) -> Router:
    made = Router()
    made.update(cluster({RequestClass.LL: instances}), 0.0)
    return made


def columns(load: Load) -> dict[str, list[float]]:
    return {name: list(getattr(load, name)) for name in COUNTED}


def exchange(gateways: list[Router], now_s: float) -> None:
    own = [gateway.fleet.own() for gateway in gateways]
    for k, gateway in enumerate(gateways):
        gateway.hear(together(own[:k] + own[k + 1 :]), now_s)


sent = st.lists(st.tuples(st.integers(0, 2), st.integers(1, 4000), st.integers(1, 800), st.booleans()), max_size=25)


@settings(max_examples=60, deadline=None)
@given(sent)
def test_gateways_that_hear_each_other_count_what_one_that_sees_all_counts(requests):
    gateways, one = [router() for _ in range(3)], router()
    for n, (k, input_tokens, output_tokens, ends) in enumerate(requests):
        a_request = request(f"r{n}", input_tokens, float(output_tokens))
        exchange(gateways, 0.0)
        went = gateways[k].route(a_request, 0.0)
        if not isinstance(went, Assigned):
            gateways[k].on_cancelled(a_request.id, 0.0)
            continue
        one.fleet.sent(one.fleet.index[went.instance_id], a_request, 0.0)
        if ends:
            gateways[k].on_finished(a_request.id, 1, 0.0)
            one.on_finished(a_request.id, 1, 0.0)
    exchange(gateways, 0.0)
    expected = columns(one.fleet.load)
    for gateway in gateways:
        for name, column in columns(gateway.fleet.load).items():
            assert column == pytest.approx(expected[name], abs=1e-6), name


@settings(max_examples=60, deadline=None)
@given(sent, st.lists(st.tuples(*[st.floats(0, 1e4)] * 5), min_size=3, max_size=3))
def test_what_peers_had_leaves_nothing_behind(requests, heard):
    gateway, alone = router(), router()
    peers = {f"LL-{i}": PeerLoad(float(round(h[0])), *h[1:], 0.05) for i, h in enumerate(heard)}
    for n, (i, input_tokens, output_tokens, _) in enumerate(requests):
        for each in (gateway, alone):
            each.fleet.sent(i, request(f"r{n}", input_tokens, float(output_tokens)), 0.0)
    own = alone.fleet.own()
    gateway.hear(peers, 0.0)
    assert gateway.fleet.own().keys() == own.keys()
    for instance_id, load in gateway.fleet.own().items():
        assert list(load) == pytest.approx(list(own[instance_id]), abs=1e-6)
        assert gateway.in_flight(instance_id) == load.in_flight
    gateway.hear({}, 0.0)
    for name, column in columns(gateway.fleet.load).items():
        assert column == pytest.approx(columns(alone.fleet.load)[name], abs=1e-6), name
    for n in range(len(requests)):
        gateway.on_finished(f"r{n}", 1, 1.0)
    assert gateway.fleet.load.in_flight == [0.0] * 3
    assert gateway.fleet.load.tbt_limit_s == [UNPROMISED_S] * 3


def test_until_they_are_heard_again_the_others_are_expected_to_send_where_we_do():
    gateway = router(1)
    gateway.hear({"LL-0": PeerLoad(4.0, tbt_limit_s=0.1)}, 0.0, gateways=3)
    for n in range(2):
        assert isinstance(gateway.route(request(f"r{n}", input_tokens=100, output_tokens=50.0), 0.0), Assigned)
    load = gateway.fleet.load
    assert load.in_flight == [2.0 + 4.0 + 6.0]
    assert load.pending_tokens == [2 * 4 * 100.0]
    assert gateway.fleet.own() == {"LL-0": PeerLoad(2.0, 200.0, 250.0, 300.0, 4.0, 0.1)}
    assert gateway.in_flight("LL-0") == 2
    gateway.hear({"LL-0": PeerLoad(5.0, tbt_limit_s=0.1)}, 0.25, gateways=3)  # they sent less than expected
    assert load.in_flight == [7.0]
    assert load.pending_tokens == [200.0]
    for n in range(2):
        gateway.on_finished(f"r{n}", 50, 1.0)
    gateway.hear({}, 2.0)
    assert load.in_flight == [0.0]


def test_a_request_goes_where_the_others_are_not():
    gateway = router(2)
    gateway.hear({"LL-0": PeerLoad(250.0, 60_000.0, 300_000.0, 390_000.0, 20.0, 0.1)}, 0.0)
    for n in range(5):
        assert gateway.route(request(f"r{n}"), 0.0) == Assigned("LL-1", "LL")


def test_an_instance_full_of_others_requests_is_full():
    gateway = router(1)
    gateway.hear({"LL-0": PeerLoad(256.0, 0.0, 1e3, 1e3, 1.0, 0.1)}, 0.0)
    assert not isinstance(gateway.route(request("a"), 0.0), Assigned)
    gateway.hear({"LL-0": PeerLoad(255.0, 0.0, 1e3, 1e3, 1.0, 0.1)}, 0.0)
    assert [decision for _, decision in gateway.release(1.0)] == [Assigned("LL-0", "LL")]


def test_a_tbt_promised_by_another_gateway_is_kept_too():
    gateway = router(1)
    gateway.hear({"LL-0": PeerLoad(1.0, 0.0, 100.0, 100.0, 1.0, 0.012)}, 0.0)  # a lone step takes 9 ms
    assert not isinstance(gateway.route(request("a", input_tokens=4000), 0.0), Assigned)


def test_an_unknown_instance_is_of_no_account_and_a_new_view_keeps_what_was_heard():
    gateway = router(1)
    gateway.hear({"gone": PeerLoad(5.0), "LL-0": PeerLoad(7.0)}, 0.0)
    gateway.update(cluster({RequestClass.LL: 2}, version=2), 1.0)
    assert gateway.fleet.load.in_flight == [7.0, 0.0]
    assert gateway.fleet.own() == {}


def test_together_adds_up_and_takes_the_tightest_promise():
    total = together(
        [{"a": PeerLoad(1.0, 2.0, 3.0, 4.0, 5.0, 0.2)}, {"a": PeerLoad(1.0, tbt_limit_s=0.1), "b": NOTHING}]
    )
    assert total == {"a": PeerLoad(2.0, 2.0, 3.0, 4.0, 5.0, 0.1), "b": NOTHING}
