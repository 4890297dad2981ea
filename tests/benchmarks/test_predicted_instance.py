"""One instance in virtual time: against steps worked out by hand, and against the fit's closed loop."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.prediction import Latencies, differences, predict
from energy.profile import StepCoefficients, step_time_s
from simulator.engine import Engine, EngineLimits
from simulator.workload.arrivals import Arrivals

STEP = StepCoefficients(
    overhead_s=2e-3,
    host_s_per_seq=5e-6,
    compute_s_per_token=4e-5,
    attention_s_per_token2=1e-10,
    weights_s=6e-3,
    kv_s_per_token=3e-8,
    communication_s=1e-3,
    communication_s_per_token=2e-6,
    sharpness=4.0,
    idle_w=120.0,
    active_w=60.0,
    compute_w=400.0,
    memory_w=200.0,
    max_w=700.0,
)


def engine(step_tokens=2048, kv_blocks=100_000):
    return Engine(EngineLimits(kv_blocks, 256, step_tokens), STEP)


def prefill_s(tokens, context=0):
    return step_time_s(STEP, tokens, tokens * (context + tokens / 2), 0, 0)


def decode_s(seqs, context):
    return step_time_s(STEP, 0, 0, seqs, context)


def test_a_request_alone_takes_its_prefill_and_its_decode_steps():
    seen = predict(engine(), Arrivals.of([5.0], [100], [3]))
    assert seen.ttft_s[0] == pytest.approx(prefill_s(100))
    assert seen.tbt_s[0] == pytest.approx((decode_s(1, 101) + decode_s(1, 102)) / 2, rel=1e-3)
    assert seen.span_s == pytest.approx(seen.ttft_s[0] + 2 * seen.tbt_s[0])
    assert seen.busy_share == pytest.approx(1.0)
    assert seen.output_tokens == 3


def test_who_comes_during_a_step_waits_for_its_end():
    first_s = prefill_s(1000)
    seen = predict(engine(), Arrivals.of([0.0, first_s / 2], [1000, 10], [1, 1]))
    assert seen.ttft_s[1] == pytest.approx(first_s / 2 + prefill_s(10))
    assert np.isnan(seen.tbt_s).all()  # one token has no gap


def test_a_long_prompt_is_read_in_chunks():
    seen = predict(engine(step_tokens=512), Arrivals.of([0.0], [1024], [1]))
    assert seen.ttft_s[0] == pytest.approx(prefill_s(512) + prefill_s(512, context=512), rel=1e-6)


def test_pauses_are_not_busy():
    seen = predict(engine(), Arrivals.of([0.0, 100.0], [10, 10], [1, 1]))
    assert seen.busy_share == pytest.approx(2 * prefill_s(10) / (100.0 + prefill_s(10)))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 5), st.integers(1, 3000), st.integers(1, 50)), min_size=1, max_size=20),
    st.sampled_from([256, 2048]),
)
def test_every_request_is_served_no_sooner_than_alone(requests, step_tokens):
    requests.sort()
    arrivals = Arrivals.of(*map(list, zip(*requests, strict=True)))
    seen = predict(engine(step_tokens), arrivals)
    assert not np.isnan(seen.ttft_s).any()
    assert seen.output_tokens == sum(tokens for *_, tokens in requests)
    for i, (_, inputs, outputs) in enumerate(requests):
        alone = predict(engine(step_tokens), Arrivals.of([0.0], [inputs], [outputs]))
        assert seen.ttft_s[i] >= alone.ttft_s[0] - 1e-9
        if outputs > 1:
            assert seen.tbt_s[i] >= alone.tbt_s[0] - 1e-9
    assert 0.0 < seen.busy_share <= 1.0 + 1e-9


def test_figures_pass_over_what_has_no_latency_and_differences_are_shares():
    seen = Latencies(np.array([0.1, 0.3, np.nan]), np.array([0.02, np.nan, np.nan]), 50, 10.0)
    figures = seen.figures()
    assert figures["ttft_p50_s"] == pytest.approx(0.2)
    assert figures["tbt_mean_s"] == 0.02
    assert figures["output_tokens_per_s"] == 5.0
    assert differences({**figures, "ttft_p50_s": 0.22}, figures)["ttft_p50_s"] == pytest.approx(0.1)
