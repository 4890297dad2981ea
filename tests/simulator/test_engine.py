"""The EngineModel: continuous batching, KV blocks, preemption, priorities; every request accounted for."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from energy.profile import StepCoefficients
from simulator.engine import Engine, EngineLimits, RequestTooLongError

COEFFICIENTS = StepCoefficients(
    overhead_s=0.002,
    host_s_per_seq=0.0,
    compute_s_per_token=2e-5,
    attention_s_per_token2=1e-9,
    weights_s=0.012,
    kv_s_per_token=1e-7,
    communication_s=0.001,
    communication_s_per_token=1e-6,
    sharpness=4.0,
    idle_w=110.0,
    active_w=20.0,
    compute_w=400.0,
    memory_w=150.0,
    max_w=700.0,
)


def engine(kv_blocks=1000, **limits):
    return Engine(EngineLimits(kv_blocks, **limits), COEFFICIENTS)


def drain(e, now_s=0.0, steps=100_000):
    """Run to the end: (time of each token by request, order of finishing, energy of one GPU, end)."""
    tokens, finished, energy_j = {}, [], 0.0
    for _ in range(steps):
        step = e.start_step(now_s)
        if step is None:
            return tokens, finished, energy_j, now_s
        now_s += step.duration_s
        energy_j += step.power_w * step.duration_s
        result = e.finish_step()
        for request_id in result.emitted:
            tokens.setdefault(request_id, []).append(now_s)
        finished += result.finished
    raise AssertionError("the engine does not come to an end")


def test_an_idle_engine_has_no_step():
    assert engine().start_step(0.0) is None


def test_one_request_takes_its_prompt_and_then_one_step_a_token():
    e = engine()
    e.submit(7, input_tokens=100, output_tokens=4, now_s=0.0)
    steps = []
    while (step := e.start_step(0.0)) is not None:
        steps.append((step.prefill_tokens, step.decode_seqs, step.context_tokens))
        e.finish_step()
    assert steps == [(100, 0, 0), (0, 1, 101), (0, 1, 102), (0, 1, 103)]
    assert (e.running, e.waiting, e.kv_usage) == (0, 0, 0.0)


def test_a_long_prompt_is_cut_to_the_step_budget_and_decodes_go_first():
    e = engine(max_num_batched_tokens=64)
    e.submit(1, 10, 50, 0.0)
    e.start_step(0.0)
    assert e.finish_step().emitted == (1,)
    e.submit(2, 150, 5, 0.0)
    chunks = []
    for _ in range(4):
        step = e.start_step(0.0)
        chunks.append((step.prefill_tokens, step.decode_seqs))
        emitted = e.finish_step().emitted
    assert chunks == [(63, 1), (63, 1), (24, 1), (0, 2)]
    assert emitted == (1, 2)


def test_no_more_than_max_num_seqs_run_and_the_rest_wait_in_order():
    e = engine(max_num_seqs=2)
    for request_id in range(4):
        e.submit(request_id, 8, 3, 0.0)
    e.start_step(0.0)
    assert (e.running, e.waiting) == (2, 2)
    e.finish_step()
    assert drain(e)[1] == [0, 1, 2, 3]


def test_a_full_cache_preempts_the_last_admitted_which_starts_anew():
    e = engine(kv_blocks=4, block_tokens=16)
    e.submit(1, 16, 30, 0.0)
    e.submit(2, 30, 20, 0.0)
    preempted = []
    tokens = {1: 0, 2: 0}
    while (step := e.start_step(0.0)) is not None:
        preempted += step.preempted
        for request_id in e.finish_step().emitted:
            tokens[request_id] += 1
    assert preempted == [2]
    assert tokens == {1: 30, 2: 20}


def test_by_priority_the_important_start_first_and_the_least_important_is_preempted():
    e = engine(kv_blocks=5, max_num_seqs=2, by_priority=True)
    e.submit(1, 16, 40, 0.0, priority=0)
    e.submit(2, 16, 40, 1.0, priority=5)
    e.submit(3, 16, 40, 2.0, priority=9)
    assert drain(e)[1] == [3, 2, 1]


def test_by_priority_the_victim_may_stand_before_the_one_that_needs_room():
    e = engine(kv_blocks=3, by_priority=True)
    e.submit(1, 15, 20, 0.0, priority=0)
    e.start_step(0.0)
    e.finish_step()
    e.submit(2, 16, 20, 0.0, priority=1)
    preempted = []
    while (step := e.start_step(0.0)) is not None:
        preempted += step.preempted
        e.finish_step()
    assert set(preempted) == {1}


def test_a_request_that_can_never_fit_is_refused():
    e = engine(kv_blocks=2, block_tokens=16)
    with pytest.raises(RequestTooLongError, match="KV cache of 32 tokens"):
        e.submit(1, 30, 3, 0.0)
    with pytest.raises(ValueError, match="at least 1"):
        e.submit(1, 0, 3, 0.0)


def test_an_id_in_use_is_refused():
    e = engine()
    e.submit(1, 5, 5, 0.0)
    with pytest.raises(ValueError, match="already"):
        e.submit(1, 5, 5, 0.0)


def test_steps_do_not_overlap():
    e = engine()
    e.submit(1, 5, 5, 0.0)
    e.start_step(0.0)
    with pytest.raises(RuntimeError, match="finish_step first"):
        e.start_step(0.0)
    e.finish_step()
    with pytest.raises(RuntimeError, match="start_step first"):
        e.finish_step()


def test_another_clock_holds_from_the_next_step_on():
    e = engine()
    e.submit(1, 100, 3, 0.0)
    first = e.start_step(0.0)
    e.set_coefficients(COEFFICIENTS._replace(overhead_s=1.002))
    e.finish_step()
    second = e.start_step(first.duration_s)
    assert second.duration_s > 1.0 > first.duration_s


def test_an_abort_frees_at_once_wherever_the_request_is():
    e = engine(max_num_seqs=1)
    e.submit(1, 100, 10, 0.0)
    e.submit(2, 100, 10, 0.0)
    e.start_step(0.0)
    assert e.abort(1)  # in the middle of its step
    assert e.kv_usage == 0.0
    assert e.finish_step().emitted == ()
    assert e.abort(2)  # waiting
    assert not e.abort(2)
    assert e.start_step(0.0) is None


requests = st.lists(
    st.tuples(st.integers(1, 80), st.integers(1, 40), st.integers(0, 3), st.integers(0, 30), st.booleans()),
    min_size=1,
    max_size=25,
)


@settings(max_examples=150, deadline=None)
@given(
    requests,
    st.integers(8, 30),
    st.integers(1, 6),
    st.integers(1, 64),
    st.booleans(),
)
def test_every_request_is_finished_aborted_or_in_flight_and_energy_covers_idle(
    requests, kv_blocks, max_num_seqs, max_num_batched_tokens, by_priority
):
    e = Engine(EngineLimits(kv_blocks, max_num_seqs, max_num_batched_tokens, 16, by_priority), COEFFICIENTS)
    submitted, finished, aborted, tokens = 0, set(), set(), {}
    now_s, energy_j = 0.0, 0.0
    for step_number in range(40):
        for request_id, (inputs, outputs, priority, at_step, _) in enumerate(requests):
            if at_step == step_number:
                e.submit(request_id, inputs, outputs, now_s, priority)
                submitted += 1
        step = e.start_step(now_s)
        for request_id, (*_, at_step, is_aborted) in enumerate(requests):
            if is_aborted and at_step + 3 == step_number and e.abort(request_id):
                aborted.add(request_id)
        if step is not None:
            assert step.prefill_tokens + step.decode_seqs <= max_num_batched_tokens or step.decode_seqs > 0
            energy_j += step.power_w * step.duration_s
            now_s += step.duration_s
            result = e.finish_step()
            finished |= set(result.finished)
            for request_id in result.emitted:
                tokens[request_id] = tokens.get(request_id, 0) + 1
        assert e.running <= max_num_seqs
        assert 0.0 <= e.kv_usage <= 1.0
        assert submitted == len(finished) + len(aborted) + e.running + e.waiting
    more_tokens, more_finished, more_j, end_s = drain(e, now_s)
    for request_id, times in more_tokens.items():
        tokens[request_id] = tokens.get(request_id, 0) + len(times)
    finished |= set(more_finished)
    assert finished | aborted == set(range(len(requests)))
    assert not finished & aborted
    assert all(tokens[i] == requests[i][1] for i in finished)
    assert e.kv_usage == 0.0
    assert energy_j + more_j >= COEFFICIENTS.idle_w * end_s * (1 - 1e-12)
