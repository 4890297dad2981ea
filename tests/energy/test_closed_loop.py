"""closed_loop: agrees with arithmetic done by hand, and its load behaves as queues do."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from energy.closed_loop import LoadShape, closed_loop
from energy.profile import StepCoefficients, step_time_s

C = StepCoefficients(
    overhead_s=2e-3,
    host_s_per_seq=1e-5,
    compute_s_per_token=5e-5,
    attention_s_per_token2=1e-9,
    weights_s=8e-3,
    kv_s_per_token=3e-8,
    communication_s=1e-3,
    communication_s_per_token=2e-6,
    sharpness=2.0,
    idle_w=100.0,
    active_w=20.0,
    compute_w=400.0,
    memory_w=200.0,
    max_w=700.0,
)


def test_one_client_sees_bare_step_times():
    loop = closed_loop(C, LoadShape(1000.0, 11.0, clients=1, rounds=3))
    assert loop.ttft_s == pytest.approx(step_time_s(C, 1000.0, 1000.0**2 / 2, 0.0, 0.0))
    steps = [step_time_s(C, 0.0, 0.0, 1.0, 1001.0 + i) for i in range(10)]
    assert loop.tpot_s == pytest.approx(sum(steps) / 10, rel=1e-6)
    assert loop.duration_s == pytest.approx(3 * (loop.ttft_s + sum(steps)))


def test_a_prompt_over_the_token_budget_is_read_in_chunks():
    whole = closed_loop(C, LoadShape(4000.0, 2.0, clients=1, rounds=1))
    chunked = closed_loop(C, LoadShape(4000.0, 2.0, clients=1, rounds=1, token_budget=1000))
    by_hand = sum(step_time_s(C, 1000.0, 1000.0 * (done + 500.0), 0.0, 0.0) for done in (0, 1000, 2000, 3000))
    assert chunked.ttft_s == pytest.approx(by_hand)
    assert chunked.ttft_s > whole.ttft_s


def test_what_does_not_fit_the_cache_or_the_batch_waits():
    free = closed_loop(C, LoadShape(500.0, 50.0, clients=8))
    one_fewer = closed_loop(C, LoadShape(500.0, 50.0, clients=8, max_running=7))
    small_cache = closed_loop(C, LoadShape(500.0, 50.0, clients=8, kv_capacity_tokens=4 * 550.0))
    assert free.ttft_s < one_fewer.ttft_s < small_cache.ttft_s


def test_the_burst_of_the_start_is_left_out_by_warm_up_rounds():
    burst = closed_loop(C, LoadShape(4000.0, 400.0, clients=32, rounds=6))
    steady = closed_loop(C, LoadShape(4000.0, 400.0, clients=32, rounds=6, warm_up_rounds=2))
    assert steady.ttft_s < 0.5 * burst.ttft_s
    assert steady.duration_s == burst.duration_s


loads = st.tuples(
    st.integers(1, 4000).map(float),
    st.integers(1, 300).map(float),
    st.integers(1, 24),
    st.integers(1, 4),
    st.just(0),
    st.sampled_from([0.8, 1.0]),
).map(lambda fields: LoadShape(*fields))


@pytest.mark.parametrize(
    "wrong",
    [
        {"clients": 0},
        {"input_tokens": 0.0},
        {"token_budget": 0},
        {"max_running": 0},
        {"warm_up_rounds": 10},
        {"shortest_share": 0.0},
    ],
)
def test_a_load_that_cannot_be_served_is_refused(wrong):
    with pytest.raises(ValueError, match=r"must be at least 1|must be counted"):
        closed_loop(C, LoadShape(10.0, 10.0, 2)._replace(**wrong))


@settings(max_examples=40, deadline=None)
@given(loads)
def test_shares_are_shares_and_every_token_is_made(load):
    loop = closed_loop(C, load)
    assert 0.0 < loop.kernels_share < 1.0
    assert 0.0 < loop.compute_share <= loop.kernels_share
    assert 0.0 < loop.memory_share <= loop.kernels_share
    requests = load.rounds * load.clients
    assert load.shortest_share * load.output_tokens * requests - requests <= loop.output_tokens
    assert loop.output_tokens <= load.output_tokens * requests


@settings(max_examples=25, deadline=None)
@given(loads, st.floats(1.0, 3.0))
def test_a_slower_engine_is_never_quicker_to_its_clients(load, factor):
    slower = C._replace(weights_s=C.weights_s * factor, compute_s_per_token=C.compute_s_per_token * factor)
    assert closed_loop(slower, load).duration_s >= closed_loop(C, load).duration_s * (1 - 1e-9)
