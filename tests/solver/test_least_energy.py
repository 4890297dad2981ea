"""The clairvoyant's bound: prices hold for every step, and what steps cost is never below it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from energy.adapters.catalogue import load_profile
from solver.least_energy import StepEngine, Work, least_energy, step_energy_j

PROFILE = load_profile("llama-3.1-70b-fp8-h100")
ENGINES = tuple(
    StepEngine(tp, PROFILE.step(tp, mhz), 1024, 256, PROFILE.kv_capacity_tokens(tp))
    for tp in PROFILE.tensor_parallel
    for mhz in (800, 1400, 1980)
)
RNG = np.random.default_rng(7)
INPUTS, OUTPUTS = RNG.integers(8, 6000, 400).astype(float), RNG.integers(1, 700, 400).astype(float)
WORK = Work.of(INPUTS, OUTPUTS)
FOUND = least_energy(WORK, ENGINES)


def test_work_counts_what_a_request_computes_token_by_token():
    work = Work.of(np.array([100.0]), np.array([4.0]))
    assert work.prompt_tokens == 100.0
    assert work.attention_tokens2 == 5000.0
    assert work.decode_tokens == 3.0
    assert work.context_tokens == 101.0 + 102.0 + 103.0
    assert work.longest_tokens == 104.0


def test_work_of_parts_is_the_work_of_the_whole():
    parts = (
        Work.of(INPUTS[:150], OUTPUTS[:150]) + Work.of(INPUTS[150:], OUTPUTS[150:]) + Work.of(INPUTS[:0], OUTPUTS[:0])
    )
    assert np.allclose(parts.amounts, WORK.amounts)
    assert parts.longest_tokens == WORK.longest_tokens


@settings(max_examples=200, deadline=None)
@given(
    engine=st.sampled_from(ENGINES),
    prompt=st.integers(0, 1024),
    sees=st.floats(0.5, 1.0),
    seqs=st.integers(0, 256),
    context=st.floats(0.001, 1.0),
)
def test_no_step_costs_less_than_its_content_is_worth(engine, prompt, sees, seqs, context):
    prompt = min(prompt, 1024 - seqs)
    read = min(seqs * context * WORK.longest_tokens, engine.kv_tokens)
    content = np.array([[prompt, prompt * sees * WORK.longest_tokens, seqs, read]], dtype=float)
    (energy_j,) = step_energy_j(engine, content)
    assert energy_j >= float(content[0] @ FOUND.prices_j) * (1.0 - 1e-3)


def test_the_bound_is_the_work_at_its_prices_and_close_to_what_the_best_steps_cost():
    assert FOUND.energy_j == pytest.approx(float(FOUND.prices_j @ WORK.amounts))
    prefill = np.array([[1024.0, 1024.0 * 2000.0, 0.0, 0.0]])
    decode = np.array([[0.0, 0.0, 128.0, 128.0 * 2000.0]])
    cheapest = min(
        WORK.prompt_tokens / 1024.0 * float(step_energy_j(e, prefill)[0])
        + WORK.decode_tokens / 128.0 * float(step_energy_j(e, decode)[0])
        for e in ENGINES
        if e.kv_tokens >= decode[0, 3]
    )
    assert 0.5 * cheapest < FOUND.energy_j < 1.1 * cheapest


def test_more_engines_to_choose_from_never_raise_the_bound_and_more_work_never_lowers_it():
    fewer = least_energy(WORK, ENGINES[:3])
    assert FOUND.energy_j <= fewer.energy_j * (1.0 + 1e-6)
    twice = least_energy(WORK + WORK, ENGINES)
    assert twice.energy_j == pytest.approx(2.0 * FOUND.energy_j, rel=1e-6)


def test_prompts_alone_and_nothing_at_all():
    only_first_tokens = Work.of(np.array([500.0]), np.array([1.0]))
    alone = least_energy(only_first_tokens, ENGINES)
    assert alone.energy_j > 0.0
    assert alone.prices_j[2:].tolist() == [0.0, 0.0]
    assert least_energy(Work(), ENGINES).energy_j == 0.0
