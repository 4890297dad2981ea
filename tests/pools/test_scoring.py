"""The arithmetic of a routing decision: predictions, filter, score, and the bookkeeping under them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pool_examples import SLOW_STEP, STEP

from energy.profile import step_power_w, step_time_s
from pools import scoring
from pools.scoring import NONE, Costs, Load
from simulator.compiled import compile_trees

CHUNK = 2048.0
SPREAD, MARGIN = scoring.Weights()


class Columns:
    """Costs and load of a few instances, with the steps a caller has to take."""

    def __init__(self, steps, tp=4, max_seqs=256, kv_capacity_tokens=400_000, of=list):
        self.steps = steps
        kinds = {c: k for k, c in enumerate(dict.fromkeys(steps))}
        rows = [scoring.cost_row(c, tp, kinds[c], CHUNK, max_seqs, kv_capacity_tokens) for c in steps]
        self.costs = Costs(*(of(column) for column in zip(*rows, strict=True)))
        self.load = Load(*(of([value] * len(steps)) for value in scoring.LOAD_EMPTY))
        for i in range(len(steps)):
            self.settle(i)

    def settle(self, i):
        load = self.load
        step_s = scoring.decode_step_s(self.steps[i], load.in_flight[i], load.context_tokens[i])
        scoring.settle(self.costs, load, i, step_s)

    def add(self, i, input_tokens=500, output_tokens=200.0, now_s=0.0, tbt_slo_s=0.1, started=False):
        scoring.add(self.costs, self.load, i, now_s, input_tokens, output_tokens, tbt_slo_s)
        self.settle(i)
        if started:
            scoring.start(self.load, i, now_s, input_tokens)

    def remove(self, i, input_tokens=500, output_tokens=200.0):
        scoring.remove(self.load, i, input_tokens, output_tokens)
        self.settle(i)

    def choose(self, candidates=None, now_s=0.0, inputs=500, outputs=200.0, ttft=0.4, tbt=0.1, spread=SPREAD):
        candidates = range(len(self.steps)) if candidates is None else candidates
        return scoring.choose(candidates, self.costs, self.load, now_s, inputs, outputs, ttft, tbt, spread, MARGIN)


def test_an_empty_instance_takes_a_lone_step_and_the_prefill():
    c = Columns([STEP])
    lone_s = step_time_s(STEP, 0, 0, 1, 0)
    expected_s = lone_s + 500 * (4.2e-5 + lone_s / CHUNK) + 500**2 / 2 * 1e-10
    assert scoring.ttft_s(c.costs, c.load, 0, 7.0, 500) == pytest.approx(expected_s)


def test_predicted_ttft_bounds_the_profiles_step_from_above():
    c = Columns([STEP])
    for tokens in (1, 100, 2000):
        exact_s = step_time_s(STEP, tokens, tokens**2 / 2, 0, 0)
        assert exact_s <= scoring.ttft_s(c.costs, c.load, 0, 0.0, tokens) <= exact_s + 2 * step_time_s(STEP, 0, 0, 1, 0)


def test_predicted_tbt_bounds_the_profiles_step_of_those_decoding():
    c = Columns([STEP])
    for n in range(1, 60):
        c.add(0, 1, 400.0, started=True)
        exact_s = step_time_s(STEP, 0, 0, n + 1, (n + 1) * 201.0)
        predicted_s = scoring.tbt_s(c.costs, c.load, 0, 1, 400.0)
        assert exact_s <= predicted_s <= 1.5 * exact_s


@pytest.mark.parametrize("outputs", [1.0, 3.0, 40.0])
def test_no_more_than_a_chunk_of_prompt_stalls_a_step_however_short_the_answers(outputs):
    c = Columns([STEP])
    for _ in range(12):
        c.add(0, 4000, outputs, started=True)
    full_s = step_time_s(STEP, CHUNK, CHUNK**2, 13, 13 * 4000.0)
    predicted_s = scoring.tbt_s(c.costs, c.load, 0, 4000, outputs)
    assert predicted_s <= 1.5 * full_s
    if outputs == 1.0:
        assert predicted_s > CHUNK * c.costs.token_s[0]  # but one chunk it does read


def test_short_answers_to_long_prompts_are_still_taken_in_while_a_full_step_keeps_the_promise():
    c = Columns([STEP], tp=8)
    full_s = c.costs.token_s[0] * CHUNK
    for _ in range(4):
        c.add(0, 600, 1.0, tbt_slo_s=1.0, started=True)
    assert c.choose(inputs=600, outputs=1.0, ttft=2.0, tbt=2.0 * full_s) == 0
    assert c.choose(inputs=600, outputs=1.0, ttft=2.0, tbt=0.5 * full_s) == NONE


def test_waiting_grows_with_pending_prompts_and_shrinks_with_time():
    c = Columns([STEP])
    assert scoring.wait_s(c.load, 0, 0.0) == 0.0
    c.add(0, 4000)
    one_s = scoring.wait_s(c.load, 0, 0.0)
    c.add(0, 4000)
    two_s = scoring.wait_s(c.load, 0, 0.0)
    assert 0.0 < one_s < two_s
    assert scoring.wait_s(c.load, 0, 0.1) == pytest.approx(two_s - 0.1)


def test_a_hung_instance_looks_ever_longer_to_wait_for():
    c = Columns([STEP])
    c.add(0, 1000)
    done_s = c.load.prefill_done_s[0]
    assert scoring.wait_s(c.load, 0, done_s + 3.0) == pytest.approx(3.0)


def test_a_first_token_corrects_the_wait():
    c = Columns([STEP])
    c.add(0, 1000)
    c.add(0, 600)
    scoring.start(c.load, 0, 5.0, 1000)
    assert scoring.wait_s(c.load, 0, 5.0) == pytest.approx(600 * c.load.prompt_s[0])
    scoring.start(c.load, 0, 5.1, 600)
    assert scoring.wait_s(c.load, 0, 9.0) == 0.0


def test_marginal_energy_of_a_lone_request_is_what_its_steps_draw_beyond_idling():
    """Decode one token a step on an empty instance: the profile's own power, less idle, over those steps."""
    c = Columns([STEP], tp=4)
    outputs = 100.0
    energy_j = scoring.marginal_energy_j(c.costs, c.load, 0, 0, outputs)
    context = outputs / 2
    step_s = step_time_s(STEP, 0, 0, 1, context)
    exact_j = 4 * outputs * step_s * (step_power_w(STEP, 0, 0, 1, context) - STEP.idle_w)
    assert energy_j == pytest.approx(exact_j, rel=0.05)


def test_company_makes_a_request_cheaper():
    c = Columns([STEP])
    energies = []
    for _ in range(20):
        energies.append(scoring.marginal_energy_j(c.costs, c.load, 0, 500, 200.0))
        c.add(0)
    assert energies == sorted(energies, reverse=True)
    assert energies[0] > 2 * energies[-1]


def test_packs_while_there_is_headroom():
    c = Columns([STEP, STEP, STEP])
    for n in range(6):
        i = c.choose(now_s=n)
        assert i == 0
        c.add(i, now_s=n, started=True)


def test_spreads_when_the_prompts_before_would_cost_the_ttft():
    c = Columns([STEP, STEP])
    for _ in range(16):
        i = c.choose()
        c.add(i, started=False)
    assert i == 1
    assert c.load.in_flight[0] > 1


def test_more_spread_opens_the_next_instance_sooner():
    def opened_after(spread):
        c = Columns([STEP, STEP])
        for n in range(200):
            i = c.choose(now_s=float(n), inputs=3000, outputs=100.0, ttft=2.0, spread=spread)
            if i != 0:
                return n
            c.add(i, 3000, 100.0, now_s=float(n), started=True)
        return 200

    counts = [opened_after(spread) for spread in (0.0, 1.0, 10.0)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[2]


def test_prefers_the_cheaper_clock_while_it_keeps_the_slo():
    c = Columns([STEP, SLOW_STEP])
    assert c.choose(inputs=2000, ttft=2.0) == 1
    assert c.choose(inputs=7000, ttft=0.5) == 0


def test_passes_over_full_instances():
    seats = Columns([STEP], max_seqs=2)
    cache = Columns([STEP], kv_capacity_tokens=1500)
    for c in (seats, cache):
        c.add(0, started=True)
        c.add(0, started=True)
        assert c.choose() == NONE
        c.remove(0)
        assert c.choose() == 0


def test_an_empty_instance_is_offered_what_it_may_not_hold():
    assert Columns([STEP], kv_capacity_tokens=100).choose() == 0


def test_protects_the_strictest_promise_already_made():
    c = Columns([STEP])
    c.add(0, tbt_slo_s=0.0112, started=True)
    assert c.choose() == NONE
    c.remove(0)
    assert c.choose() == 0


def test_a_stricter_slo_narrows_the_choice():
    c = Columns([STEP, STEP])
    for _ in range(30):
        c.add(0, started=True)
    assert c.choose(spread=0.0) == 0
    assert c.choose(spread=0.0, tbt=0.015) == 1
    assert c.choose(spread=0.0, tbt=0.005) == NONE


def test_nothing_is_chosen_of_nobody_or_past_the_deadline():
    c = Columns([STEP])
    assert c.choose(candidates=[]) == NONE
    assert c.choose(ttft=0.0) == NONE
    assert c.choose(ttft=-1.0) == NONE


def test_least_late_takes_the_soonest_and_spares_the_others():
    c = Columns([STEP, STEP, STEP])
    c.add(0, 8000)
    c.add(1, 4000)
    c.add(2, 10, tbt_slo_s=0.0091, started=True)
    assert scoring.choose_least_late([0, 1, 2], c.costs, c.load, 0.0, 500, 200.0) == 1
    assert scoring.choose_least_late([2], c.costs, c.load, 0.0, 500, 200.0) == NONE


def test_attainable_is_what_choose_says_of_an_empty_instance():
    c = Columns([STEP])
    lone_s = c.load.step_s[0]
    for inputs in (1, 100, 1000, 8000):
        for ttft in (0.01, 0.05, 0.4, 2.0):
            for tbt in (0.009, 0.012, 0.1):
                said = scoring.attainable(c.costs, 0, lone_s, inputs, 100.0, ttft, tbt, MARGIN)
                assert said == (c.choose(inputs=inputs, outputs=100.0, ttft=ttft, tbt=tbt) == 0)


def test_turns_follow_the_weights():
    credit = [0.0, 0.0, 0.0]
    turns = [scoring.take_turn([5.0, 3.0, 2.0], credit) for _ in range(100)]
    assert [turns.count(k) for k in range(3)] == [50, 30, 20]
    assert turns[:10] != sorted(turns[:10])  # interleaved, not in blocks


event = st.tuples(st.integers(0, 2), st.integers(1, 9000), st.floats(0.0, 2000.0), st.sampled_from([0.05, 0.1]))


@given(st.lists(event, max_size=40), st.randoms(use_true_random=False))
def test_what_is_added_and_removed_leaves_nothing(events, random):
    c = Columns([STEP, SLOW_STEP, STEP])
    empty = [list(column) for column in c.load]
    for i, inputs, outputs, tbt in events:
        c.add(i, inputs, outputs, tbt_slo_s=tbt)
    assert sum(c.load.in_flight) == len(events)
    random.shuffle(events)
    for i, inputs, outputs, _ in events:
        scoring.start(c.load, i, 1.0, inputs)
        c.remove(i, inputs, outputs)
    assert [list(column) for column in c.load] == empty


@given(st.lists(event, max_size=30), event, st.floats(0.0, 50.0))
def test_choose_is_the_filter_and_score_of_its_parts(events, last, spread):
    """The unrolled loop equals the policy written with the named functions."""
    c = Columns([STEP, SLOW_STEP, STEP])
    for n, (i, inputs, outputs, tbt) in enumerate(events):
        c.add(i, inputs, outputs, now_s=0.01 * n, tbt_slo_s=tbt, started=n % 3 > 0)
    _, inputs, outputs, tbt = last
    now_s, ttft = 0.5, 1.5
    scores = {}
    for i in range(3):
        limit_s = min(tbt, c.load.tbt_limit_s[i]) * MARGIN
        pressure = max(
            scoring.tbt_s(c.costs, c.load, i, inputs, outputs) / limit_s,
            scoring.ttft_s(c.costs, c.load, i, now_s, inputs) / (MARGIN * ttft),
        )
        if pressure < 1.0 and c.load.free_tokens[i] >= inputs + outputs:
            energy_j = scoring.marginal_energy_j(c.costs, c.load, i, inputs, outputs)
            scores[i] = energy_j * (1 + spread * pressure / (1 - pressure))
    chosen = c.choose(now_s=now_s, inputs=inputs, outputs=outputs, ttft=ttft, tbt=tbt, spread=spread)
    if not scores:
        assert chosen == NONE
    else:
        assert scores[chosen] == pytest.approx(min(scores.values()), rel=1e-9)


@pytest.fixture(scope="module")
def compiled_choose():
    return compile_trees(scoring.choose)[0]


def test_compiled_by_numba_it_decides_the_same(compiled_choose):
    random = np.random.default_rng(1)
    plain = Columns([STEP, SLOW_STEP] * 8)
    arrays = Columns([STEP, SLOW_STEP] * 8, of=lambda column: np.array(column, dtype=np.float64))
    candidates = np.arange(16)
    for n in range(400):
        inputs, outputs = int(random.integers(1, 3000)), float(random.integers(1, 500))
        arguments = (0.05 * n, float(inputs), outputs, 0.4, 0.1, SPREAD, MARGIN)
        i = scoring.choose(candidates, plain.costs, plain.load, *arguments)
        assert compiled_choose(candidates, arrays.costs, arrays.load, *arguments) == i
        if i != NONE:
            for c in (plain, arrays):
                c.add(i, inputs, outputs, now_s=0.05 * n, started=n % 2 == 0)


@settings(max_examples=50)
@given(st.integers(1, 8000), st.floats(1.0, 1000.0), st.integers(0, 100))
def test_predictions_grow_with_load(inputs, outputs, others):
    c = Columns([STEP])
    before = (0.0, 0.0)
    for _ in range(others):
        now = (scoring.ttft_s(c.costs, c.load, 0, 0.0, inputs), scoring.tbt_s(c.costs, c.load, 0, inputs, outputs))
        assert now[0] >= before[0]
        assert now[1] >= before[1]
        before = now
        c.add(0, 200, 100.0)


def score(c, i, cached=0.0, now_s=0.0, inputs=500, outputs=200.0, ttft=0.4, tbt=0.1):
    return scoring.score(c.costs, c.load, i, now_s, inputs, cached, outputs, ttft, tbt, SPREAD, MARGIN)


loads = st.lists(st.tuples(st.integers(1, 3000), st.floats(1, 800), st.booleans()), max_size=12)


@settings(max_examples=60, deadline=None)
@given(st.lists(loads, min_size=1, max_size=4), st.integers(1, 4000), st.floats(1, 800), st.floats(0.05, 3.0))
def test_choose_takes_the_least_score(held, inputs, outputs, ttft):
    c = Columns([STEP if i % 2 else SLOW_STEP for i in range(len(held))])
    for i, requests in enumerate(held):
        for input_tokens, output_tokens, started in requests:
            c.add(i, input_tokens, output_tokens, started=started)
    scores = [score(c, i, inputs=inputs, outputs=outputs, ttft=ttft, now_s=0.01) for i in range(len(held))]
    chosen = c.choose(inputs=inputs, outputs=outputs, ttft=ttft, now_s=0.01)
    if min(scores) == scoring.INFINITE:
        assert chosen == NONE
    else:
        assert scores[chosen] == pytest.approx(min(scores), rel=1e-9)


@given(st.integers(2, 4000), st.floats(0.0, 1.0), st.floats(0.0, 1.0))
def test_the_more_is_cached_the_better_the_score(inputs, one, other):
    c = Columns([STEP])
    c.add(0)
    less, more = sorted((one * (inputs - 1), other * (inputs - 1)))
    assert score(c, 0, more, inputs=inputs, ttft=3.0) <= score(c, 0, less, inputs=inputs, ttft=3.0)


def test_what_is_cached_is_not_read_again_and_not_paid_for():
    c = Columns([STEP])
    whole, cached, rest = 2000, 1500, 500
    saved_j = scoring.work_j(c.costs, 0, whole, 0.0) - scoring.work_j(c.costs, 0, cached, 0.0)
    spread = 0.0  # then the score is the energy
    args = (c.costs, c.load, 0, 0.0, whole)
    full_j = scoring.score(*args, 0.0, 1.0, 9.0, 0.1, spread, MARGIN)
    part_j = scoring.score(*args, float(cached), 1.0, 9.0, 0.1, spread, MARGIN)
    assert full_j - part_j == pytest.approx(scoring.work_j(c.costs, 0, cached, 0.0))
    assert part_j == pytest.approx(saved_j + full_j - scoring.work_j(c.costs, 0, whole, 0.0))
    assert score(c, 0, 0.0, inputs=whole, ttft=0.1) == scoring.INFINITE  # too long to read in time
    assert score(c, 0, float(cached), inputs=whole, ttft=0.1) < scoring.INFINITE
    assert score(c, 0, 0.0, inputs=rest, ttft=0.1) < scoring.INFINITE


def test_what_does_not_fit_has_no_score():
    c = Columns([STEP], kv_capacity_tokens=600)
    c.add(0, 100, 100.0)
    assert score(c, 0, 0.0, inputs=500) == scoring.INFINITE
    assert score(c, 0, 499.0, inputs=500) == scoring.INFINITE  # cached tokens take room too
    assert score(c, 0, 0.0, inputs=100) < scoring.INFINITE
