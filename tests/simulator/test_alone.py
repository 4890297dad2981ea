"""serve_alone, compiled and in jumps, beside the engine stepped singly: the same tokens at the same times."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_engine import COEFFICIENTS

from simulator.alone import GAP_BUCKETS, SHORTEST_GAP_S, gap_quantile_s, serve_alone
from simulator.batching import EngineLimits
from simulator.engine import Engine


def stepped(limits, arrival_s, input_tokens, output_tokens):
    """First and last token of each request, the gaps between tokens, and energy up to the last arrival."""
    engine = Engine(limits, COEFFICIENTS)
    n = len(arrival_s)
    first_s, last_s, gaps_s = np.zeros(n), np.zeros(n), []
    now_s = energy_j = 0.0
    energy_at_last_j = 0.0
    sent = done = 0
    while done < n:
        if engine.running == 0 and engine.waiting == 0:
            energy_j += COEFFICIENTS.idle_w * (arrival_s[sent] - now_s)
            now_s = float(arrival_s[sent])
        while sent < n and arrival_s[sent] <= now_s:
            if sent == n - 1:
                energy_at_last_j = energy_j
            engine.submit(sent, int(input_tokens[sent]), int(output_tokens[sent]), now_s)
            sent += 1
        step = engine.start_step(now_s)
        now_s += step.duration_s
        energy_j += step.duration_s * step.power_w
        result = engine.finish_step()
        for i in result.emitted:
            if first_s[i] == 0.0:
                first_s[i] = now_s
            else:
                gaps_s.append(now_s - last_s[i])
            last_s[i] = now_s
        done += len(result.finished)
    return first_s, last_s, np.array(gaps_s), energy_at_last_j


@st.composite
def loads(draw):
    n = draw(st.integers(2, 25))
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    arrival_s = np.cumsum(rng.exponential(draw(st.sampled_from([0.01, 0.2, 3.0])), n))
    return arrival_s, rng.integers(1, 2500, n), rng.integers(1, draw(st.sampled_from([5, 200])), n)


limits = st.builds(
    EngineLimits,
    st.sampled_from([200, 400, 20_000]),
    max_num_seqs=st.sampled_from([2, 6, 256]),
    max_num_batched_tokens=st.sampled_from([256, 2048]),
    block_tokens=st.just(16),
    by_priority=st.just(False),
)


@settings(max_examples=40, deadline=None)
@given(loads(), limits)
def test_jumps_are_the_steps(load, engine_limits):
    first_s, last_s, gaps_s, energy_j = stepped(engine_limits, *load)
    marks = serve_alone(COEFFICIENTS, engine_limits, *load, counted_from=0)
    assert marks.first_s == pytest.approx(first_s, rel=2e-3)
    assert marks.last_s == pytest.approx(last_s, rel=2e-3)
    assert int(marks.gaps.sum()) == len(gaps_s)
    assert marks.energy_j[1] == pytest.approx(energy_j, rel=5e-3)
    if len(gaps_s) > 20:
        assert gap_quantile_s(marks.gaps, 0.5) == pytest.approx(np.median(gaps_s), rel=0.06)


@settings(max_examples=25, deadline=None)
@given(loads(), limits)
def test_order_and_counts(load, engine_limits):
    arrival_s, _, output_tokens = load
    marks = serve_alone(COEFFICIENTS, engine_limits, *load, counted_from=len(arrival_s) // 2)
    assert (marks.first_s > arrival_s).all()
    assert (marks.last_s >= marks.first_s).all()
    assert (marks.last_s[output_tokens == 1] == marks.first_s[output_tokens == 1]).all()
    assert int(marks.gaps.sum()) == int((output_tokens - 1).sum())
    assert 0.0 <= marks.energy_j[0] <= marks.energy_j[1]


@settings(max_examples=20, deadline=None)
@given(loads(), st.floats(1.2, 3.0))
def test_a_slower_engine_is_never_earlier_at_the_end(load, factor):
    slow = COEFFICIENTS._replace(
        weights_s=COEFFICIENTS.weights_s * factor, compute_s_per_token=COEFFICIENTS.compute_s_per_token * factor
    )
    ample = EngineLimits(20_000)
    quick, late = (serve_alone(c, ample, *load, counted_from=0) for c in (COEFFICIENTS, slow))
    assert late.last_s.max() >= quick.last_s.max() * (1 - 1e-9)


def test_a_request_alone_sees_bare_steps():
    marks = serve_alone(COEFFICIENTS, EngineLimits(1000), np.array([5.0]), np.array([100]), np.array([3]), 0)
    engine = Engine(EngineLimits(1000), COEFFICIENTS)
    engine.submit(0, 100, 3, 5.0)
    times = []
    at_s = 5.0
    while (step := engine.start_step(at_s)) is not None:
        at_s += step.duration_s
        engine.finish_step()
        times.append(at_s)
    assert marks.first_s[0] == pytest.approx(times[0])
    assert marks.last_s[0] == pytest.approx(times[-1])
    assert marks.energy_j[1] == pytest.approx(5.0 * COEFFICIENTS.idle_w)


class TestGapQuantiles:
    def test_of_nothing_is_nothing(self):
        assert gap_quantile_s(np.zeros(GAP_BUCKETS), 0.5) == 0.0

    @given(st.lists(st.floats(1.5e-3, 5.0), min_size=1, max_size=60), st.sampled_from([0.1, 0.5, 0.9, 0.99]))
    def test_within_a_bucket_of_the_true_one(self, gaps_s, share):
        counts = np.zeros(GAP_BUCKETS)
        for gap_s in gaps_s:
            counts[int(np.log(gap_s / SHORTEST_GAP_S) * 48.0)] += 1
        true_s = float(np.quantile(gaps_s, share, method="inverted_cdf"))
        assert true_s * (1 - 1e-9) <= gap_quantile_s(counts, share) <= true_s * np.exp(1 / 48.0) * (1 + 1e-9)
