"""What is foretold of lengths in virtual time: right as often as told, or learned, without looking ahead."""

import numpy as np
import pytest

from pools.classes import ClassCuts
from pools.length_marks import coarse
from simulator.prediction import ASKED_EVERY_S, LearnedLengthsForesight, TrueLengths, _coarse
from simulator.workload.arrivals import Arrivals

CUTS = ClassCuts()


def two_kinds(seconds=1200.0, rate_rps=5.0, seed=0):
    """Inputs of 200 tokens get long answers, those of 2,000 short ones."""
    random = np.random.default_rng(seed)
    count = int(seconds * rate_rps)
    long_answer = random.random(count) < 0.5
    outputs = np.where(long_answer, random.normal(600, 60, count), random.normal(30, 5, count))
    return Arrivals.of(
        np.sort(random.random(count)) * seconds, np.where(long_answer, 200, 2000), np.maximum(outputs, 1).astype(int)
    )


def begin(kind):
    return kind.begin(CUTS, np.random.default_rng(0))


def truth(requests):
    return np.searchsorted(CUTS.output_tokens, requests.output_tokens, side="right")


@pytest.mark.parametrize("accuracy", [1.0, 0.8, 0.6])
def test_true_lengths_are_wrong_as_often_as_told(accuracy):
    requests = two_kinds()
    size, tokens = begin(TrueLengths(accuracy))(requests)
    assert (size == truth(requests)).mean() == pytest.approx(accuracy, abs=0.02)
    assert (np.abs(size - truth(requests)) <= 1).all()
    assert (tokens == np.asarray(TrueLengths().mean_tokens)[size]).all()


def test_learned_lengths_become_right():
    requests = two_kinds()
    size, tokens = begin(LearnedLengthsForesight())(requests)
    first, later = requests.arrival_s < ASKED_EVERY_S, requests.arrival_s > 300.0
    assert len(set(tokens[first])) <= 2  # cold: the same for all inputs, but for what the table says by their sizes
    assert (size == truth(requests))[later].mean() > 0.98
    assert np.median(tokens[later & (requests.input_tokens == 200)]) == pytest.approx(600, rel=0.3)


def test_the_future_changes_nothing():
    requests = two_kinds()
    now_s = 600.0
    past = requests.arrival_s < now_s
    other = Arrivals(
        requests.arrival_s, requests.input_tokens, np.where(past, requests.output_tokens, 5000).astype(np.int32)
    )
    _, tokens = begin(LearnedLengthsForesight())(requests)
    _, same = begin(LearnedLengthsForesight())(other)
    known = requests.arrival_s < now_s + 1.0  # no answer to what came later can have ended
    assert (tokens[known] == same[known]).all()
    assert (tokens[~known] != same[~known]).any()


def test_chunks_make_no_difference():
    requests = two_kinds()
    whole = begin(LearnedLengthsForesight())(requests)[1]
    foretell = begin(LearnedLengthsForesight())
    parts = [foretell(requests.at(slice(start, start + 777)))[1] for start in range(0, len(requests), 777)]
    assert (np.concatenate(parts) == whole).all()


def test_a_run_begins_cold():
    kind = LearnedLengthsForesight()
    first = begin(kind)(two_kinds())[1]
    assert (begin(kind)(two_kinds())[1] == first).all()


def test_gaps_in_the_arrivals_are_survived():
    requests = Arrivals.of([1.0, 2.0, 50_000.0, 50_001.0], [100, 100, 100, 100], [900, 900, 900, 900])
    _, tokens = begin(LearnedLengthsForesight())(requests)
    assert tokens[0] == tokens[1] < tokens[2] == tokens[3]


def test_coarse_lengths_of_many_are_those_of_each():
    inputs = np.random.default_rng(0).integers(0, 200_000, 500)
    assert _coarse(inputs).tolist() == [coarse(int(value)) for value in inputs]
