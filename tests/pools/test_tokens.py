"""Input tokens estimated from sizes: learning, bounds, deciding a class, persistence."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pools.classes import ClassCuts
from pools.tokens import InputCounter, PromptSize, TokenEstimate, TokenEstimator

CUTS = ClassCuts()


def prompts(count, seed=0, a=0.31, b=7.0, c=2.0, noise=0.05):
    """Sizes of chats and the tokens an engine would count."""
    random = np.random.default_rng(seed)
    for _ in range(count):
        size = PromptSize(int(random.lognormal(7.0, 1.5)) + 10, int(random.integers(1, 9)))
        tokens = (a * size.text_bytes + b * size.messages + c) * math.exp(random.normal(0.0, noise))
        yield size, max(1, round(tokens))


def taught(examples):
    estimator = TokenEstimator(CUTS)
    for size, tokens in examples:
        estimator.learn("m", size, tokens)
    return estimator


def test_cold_it_guesses_and_is_unsure():
    estimate = TokenEstimator(CUTS).estimate("m", PromptSize(4000, 1))
    assert estimate.tokens == pytest.approx(1000, rel=0.05)
    assert estimate.low < 0.7 * estimate.tokens < 1.5 * estimate.tokens < estimate.high


def test_learns_the_line_of_a_model():
    estimator = taught(prompts(1000))
    for size, tokens in prompts(200, seed=1, noise=0.0):
        assert estimator.estimate("m", size).tokens == pytest.approx(tokens, rel=0.04, abs=2)


def test_a_few_requests_are_enough_to_be_useful():
    estimator = taught(prompts(20))
    errors = [abs(math.log(estimator.estimate("m", s).tokens / t)) for s, t in prompts(300, seed=1)]
    assert np.median(errors) < 0.1


def test_the_bounds_hold_as_often_as_they_say():
    estimator = taught(prompts(3000, noise=0.1))
    inside = []
    for size, tokens in prompts(2000, seed=1, noise=0.1):
        estimate = estimator.estimate("m", size)
        inside.append(estimate.low <= tokens <= estimate.high)
        estimator.learn("m", size, tokens)
    assert 0.92 <= np.mean(inside) <= 0.98


def test_follows_a_change_of_language():
    estimator = taught([*prompts(1000), *prompts(1000, seed=2, a=0.9)])
    (size, tokens), *_ = prompts(1, seed=3, a=0.9, noise=0.0)
    assert estimator.estimate("m", size).tokens == pytest.approx(tokens, rel=0.1)


def test_an_image_now_and_then_does_not_mislead():
    examples = list(prompts(1000, noise=0.02))
    for k in range(0, 1000, 50):
        examples[k] = (examples[k][0], examples[k][1] + 3000)
    estimator = taught(examples)
    errors = [abs(math.log(estimator.estimate("m", s).tokens / t)) for s, t in prompts(300, seed=1, noise=0.02)]
    assert np.median(errors) < 0.1


def test_models_are_told_apart():
    estimator = taught(prompts(300))
    assert estimator.estimate("other", PromptSize(4000, 1)) == TokenEstimator(CUTS).estimate("m", PromptSize(4000, 1))


def test_errors_are_reported_by_size_of_input():
    estimator = taught(prompts(2000))
    errors = estimator.errors("m")
    assert [e.input_size for e in errors] == [0, 1, 2]
    assert sum(e.count for e in errors) == 2000
    assert all(0 < e.mean < e.p95 < 0.5 for e in errors)
    assert estimator.errors("other") == ()


def test_what_decides():
    def decides(low, high):
        return TokenEstimate((low + high) // 2, low, high).decides(CUTS)

    assert decides(10, 255)
    assert not decides(200, 256)
    assert decides(256, 1023)
    assert not decides(1000, 1024)
    assert decides(2000, 8192)
    assert not decides(8000, 8193)
    assert decides(9000, 20_000)


class Exact:
    def __init__(self):
        self.asked = []

    def of_text(self, text):
        self.asked.append(text)
        return len(text)

    def of_chat(self, messages):
        self.asked.append(messages)
        return sum(len(text) for _, text in messages)


def never():
    raise AssertionError("the text was read without need")


def test_text_is_read_only_where_the_estimate_does_not_decide():
    exact = Exact()
    counter = InputCounter(TokenEstimator(CUTS), {"m": exact})
    assert counter.count("m", PromptSize(40, 1), never).exact is False
    counted = counter.count("m", PromptSize(1000, 1), lambda: "x" * 300)
    assert (counted.tokens, counted.exact, counted.undecided) == (300, True, False)
    chat = counter.count("m", PromptSize(1000, 1), lambda: [("user", "x" * 200)])
    assert chat.tokens == 200
    assert len(exact.asked) == 2


def test_undecided_where_nothing_counts_exactly():
    counter = InputCounter(TokenEstimator(CUTS), {})
    assert counter.count("m", PromptSize(1000, 1), never).undecided
    assert not counter.count("m", PromptSize(40, 1)).undecided


def test_survives_a_restart():
    estimator = taught(prompts(500))
    again = TokenEstimator(CUTS)
    again.restore(json.loads(json.dumps(estimator.snapshot())))
    for size, _ in prompts(20, seed=5):
        assert again.estimate("m", size) == estimator.estimate("m", size)
    assert again.errors("m") == estimator.errors("m")


def broken(**changes):
    snapshot = taught(prompts(5)).snapshot()
    snapshot["models"]["m"].update(changes)
    return snapshot


@pytest.mark.parametrize(
    "snapshot", [{}, {"version": 7}, broken(theta=[1.0]), broken(theta=[math.nan] * 3), broken(bounds=[])]
)
def test_a_wrong_snapshot_is_refused_and_nothing_changes(snapshot):
    estimator = taught(prompts(50))
    before = estimator.snapshot()
    with pytest.raises(ValueError, match="token snapshot"):
        estimator.restore(snapshot)
    assert estimator.snapshot() == before


sizes = st.builds(PromptSize, st.integers(0, 10**8), st.integers(0, 10**4))


@given(st.lists(st.tuples(sizes, st.integers(0, 10**7)), max_size=60), sizes)
def test_estimates_are_sane_whatever_it_was_taught(examples, asked):
    estimate = taught(examples).estimate("m", asked)
    assert estimate.tokens >= 1
    assert 0 <= estimate.low <= estimate.tokens <= estimate.high
    assert math.isfinite(estimate.high)
