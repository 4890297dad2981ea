"""Decode runs: the closed form against stepping, for any coefficients a profile might hold."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from energy.profile import StepCoefficients, step_time_s
from simulator.runs import Quadratic, quadratic_through, steps_until, sum_of_steps, value_at

coefficients = st.builds(
    StepCoefficients,
    overhead_s=st.floats(0.0, 0.01),
    host_s_per_seq=st.floats(0.0, 1e-4),
    compute_s_per_token=st.floats(1e-6, 1e-3),
    attention_s_per_token2=st.just(1e-9),
    weights_s=st.floats(0.002, 0.06),
    kv_s_per_token=st.floats(1e-9, 1e-6),
    communication_s=st.floats(0.0, 0.005),
    communication_s_per_token=st.floats(0.0, 1e-5),
    sharpness=st.floats(1.0, 8.0),
    idle_w=st.just(100.0),
    active_w=st.just(50.0),
    compute_w=st.just(300.0),
    memory_w=st.just(150.0),
    max_w=st.just(700.0),
)


@given(coefficients, st.integers(1, 256), st.integers(1, 2000), st.integers(1, 8000))
def test_a_run_takes_as_long_as_its_steps(c, seqs, steps, mean_context):
    context = seqs * mean_context

    def step_s(i):
        return step_time_s(c, 0.0, 0.0, seqs, context + seqs * i)

    stepped_s = sum(step_s(i) for i in range(steps))
    q = quadratic_through(step_s(0), step_s(0.5 * (steps - 1)), step_s(steps - 1), steps)
    assert sum_of_steps(q, steps) == pytest.approx(stepped_s, rel=0.01)


def test_the_quadratic_goes_through_its_three_points():
    q = quadratic_through(3.0, 5.0, 11.0, 9)
    assert [value_at(q, i) for i in (0, 4, 8)] == pytest.approx([3.0, 5.0, 11.0])
    assert quadratic_through(3.0, 9.0, 9.0, 1) == Quadratic(3.0, 0.0, 0.0)


quadratics = st.builds(Quadratic, st.floats(0.005, 0.05), st.floats(0.0, 1e-4), st.floats(0.0, 1e-8))


@given(quadratics, st.integers(1, 3000), st.floats(0.0, 1.0))
def test_an_interruption_waits_for_the_end_of_the_step_under_way(q, n, share):
    elapsed = share * sum_of_steps(q, n)
    k = steps_until(q, n, elapsed)
    assert 1 <= k <= n
    assert sum_of_steps(q, k) >= elapsed or k == n
    assert k == 1 or sum_of_steps(q, k - 1) < elapsed


@given(quadratics, st.integers(1, 500))
def test_the_sum_is_the_sum(q, n):
    assert sum_of_steps(q, n) == pytest.approx(sum(value_at(q, i) for i in range(n)))
