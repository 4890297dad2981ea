"""attribute: every joule of an interval goes somewhere, once, and to whom was at work."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from energy.accounting import Interval, MeteredInstance, Use, User
from energy.accounting_attribution import Serving, attribute
from energy.accounting_work import prefill_j, prefill_s, token_j, token_s
from energy.adapters.catalogue import load_profile

PROFILE = load_profile("llama-3.1-70b-fp8-h100")
C = PROFILE.step(4, 1980)
INSTANCE = MeteredInstance("i-1", "LL", "llama", "H100-SXM", 4, Use.IDLE, C.idle_w, C)
USER = User("llama", "LL", "MM", "t")


@st.composite
def servings(draw):
    """Requests in any state: sent, started, ended, before, in and after an interval of [0, 10]."""
    found = []
    for number in range(draw(st.integers(0, 8))):
        begin_s = draw(st.floats(-20.0, 12.0))
        started = draw(st.booleans())
        first_s = begin_s + draw(st.floats(0.0, 5.0)) if started else None
        ended = draw(st.booleans())
        end_s = (first_s if first_s is not None else begin_s) + draw(st.floats(0.0, 20.0)) if ended else None
        found.append(Serving(f"r{number}", USER, "i-1", begin_s, draw(st.integers(1, 8000)), first_s, end_s))
    return found


energies = st.floats(0.0, 30_000.0)


@given(servings(), energies)
def test_parts_and_rest_are_the_interval(found, energy_j):
    attribution = attribute(Interval(INSTANCE, 0.0, 10.0, energy_j), found)
    parts_j = sum(part.prefill_j + part.decode_j for part in attribution.parts)
    assert parts_j + attribution.rest_j == pytest.approx(energy_j, rel=1e-9, abs=1e-9)
    assert attribution.rest_j >= -1e-9
    assert all(part.prefill_j >= -1e-9 and part.decode_j >= -1e-9 for part in attribution.parts)


@given(servings(), st.floats(1.0, 30_000.0))
def test_who_was_not_there_pays_nothing(found, energy_j):
    paying = {part.serving.id for part in attribute(Interval(INSTANCE, 0.0, 10.0, energy_j), found).parts}
    for serving in found:
        gone = serving.end_s is not None and serving.end_s <= 0.0
        if gone or serving.begin_s >= 10.0:
            assert serving.id not in paying


@given(servings(), st.floats(100.0, 30_000.0), st.floats(1.1, 5.0))
def test_twice_the_meter_beyond_idling_is_twice_the_parts(found, energy_j, factor):
    """Shares do not depend on how much there is to share."""
    small, large = (
        {part.serving.id: part.prefill_j + part.decode_j for part in attribution.parts}
        for attribution in (
            attribute(Interval(INSTANCE, 0.0, 10.0, 20_000.0 + energy_j * f), found) for f in (1.0, factor)
        )
    )
    assert small.keys() == large.keys()
    total_small, total_large = sum(small.values()), sum(large.values())
    for name, joules in small.items():
        assert joules / total_small == pytest.approx(large[name] / total_large, rel=1e-6)


@given(servings(), energies)
def test_order_does_not_matter(found, energy_j):
    interval = Interval(INSTANCE, 0.0, 10.0, energy_j)
    forward, backward = (
        {p.serving.id: (p.prefill_j, p.decode_j) for p in attribute(interval, order).parts}
        for order in (found, found[::-1])
    )
    assert forward.keys() == backward.keys()
    for name, joules in forward.items():
        assert joules == pytest.approx(backward[name], rel=1e-6, abs=1e-9)


@given(st.integers(1, 6), st.integers(1, 4000), st.floats(1000.0, 20_000.0))
def test_equals_pay_equally(count, input_tokens, energy_j):
    alike = [Serving(f"r{n}", USER, "i-1", 0.0, input_tokens, 1.0, 9.0) for n in range(count)]
    parts = attribute(Interval(INSTANCE, 0.0, 10.0, energy_j), alike).parts
    assert len(parts) == count
    for part in parts:
        assert part.prefill_j == pytest.approx(parts[0].prefill_j)
        assert part.decode_j == pytest.approx(parts[0].decode_j)


def test_a_longer_prompt_pays_more_prefill_and_a_longer_answer_more_decoding():
    short = Serving("short", USER, "i-1", 0.0, 100, 1.0, 4.0)
    prompt = Serving("prompt", USER, "i-1", 0.0, 6000, 1.0, 4.0)
    answer = Serving("answer", USER, "i-1", 0.0, 100, 1.0, 9.5)
    parts = {p.serving.id: p for p in attribute(Interval(INSTANCE, 0.0, 10.0, 15_000.0), [short, prompt, answer]).parts}
    assert parts["prompt"].prefill_j > 5 * parts["short"].prefill_j
    assert parts["answer"].decode_j > 1.5 * parts["short"].decode_j


def test_an_interval_cut_in_two_books_what_it_books_whole():
    found = [Serving("a", USER, "i-1", 1.0, 500, 2.0, 8.0), Serving("b", USER, "i-1", 3.0, 1500, 4.0, None)]
    whole = attribute(Interval(INSTANCE, 0.0, 10.0, 12_000.0), found)
    halves = [attribute(Interval(INSTANCE, begin_s, begin_s + 5.0, 6_000.0), found) for begin_s in (0.0, 5.0)]
    for name in ("a", "b"):
        of = [
            sum(p.prefill_j + p.decode_j for p in attribution.parts if p.serving.id == name)
            for attribution in (whole, *halves)
        ]
        assert of[1] + of[2] == pytest.approx(of[0], rel=0.25)  # the meter read evenly; work was not


@pytest.mark.parametrize("instance", [INSTANCE, MeteredInstance("b", "", "", "H100-SXM", 8, Use.IDLE, 70.0)])
def test_nobody_there_is_all_rest(instance):
    attribution = attribute(Interval(instance, 0.0, 10.0, 500.0), [])
    assert (attribution.parts, attribution.rest_j, attribution.scale) == ((), 500.0, None)


class TestWork:
    @given(st.integers(1, 8000), st.floats(0.0, 100.0))
    def test_a_prompt_among_others_shares_what_a_step_costs_anyway(self, tokens, batch):
        alone, among = prefill_j(C, 4, tokens, 0.0), prefill_j(C, 4, tokens, batch)
        assert 0.0 < among <= alone * (1 + 1e-12)

    @given(st.integers(1, 4000), st.integers(1, 4000))
    def test_longer_prompts_take_longer_and_cost_more(self, a, b):
        low, high = sorted((a, b))
        assert prefill_s(C, low) <= prefill_s(C, high)
        assert prefill_j(C, 4, low, 0.0) <= prefill_j(C, 4, high, 0.0) * (1 + 1e-12)

    @given(st.floats(1.0, 200.0), st.floats(1.0, 200.0), st.integers(1, 3000))
    def test_a_token_is_cheaper_in_a_larger_batch_and_takes_longer(self, a, b, context):
        few, many = sorted((a, b))
        assert token_j(C, 4, many, context) <= token_j(C, 4, few, context) * (1 + 1e-9)
        assert token_s(C, many, context) >= token_s(C, few, context) * (1 - 1e-12)

    def test_arrays_do_as_numbers_do(self):
        tokens = np.array([10.0, 500.0, 4000.0])
        assert prefill_j(C, 4, tokens, 3.0) == pytest.approx([prefill_j(C, 4, t, 3.0) for t in tokens])
        assert token_j(C, 4, 8.0, tokens) == pytest.approx([token_j(C, 4, 8.0, t) for t in tokens])
