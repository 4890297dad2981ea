"""Output length: hints, caps, cold start, learning, bounds, persistence."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pools.classes import ClassCuts
from pools.lengths import (
    BUCKETS,
    LengthFeatures,
    RunningLengths,
    RunningLengthsLimits,
    bucket_of,
    edge,
    prior_of,
    quantile,
)

PLAIN = LengthFeatures("m", 500)


def taught(lengths, features=PLAIN, **limits):
    predictor = RunningLengths(RunningLengthsLimits(**limits))
    for tokens in lengths:
        predictor.learn(features, tokens)
    return predictor


def test_a_hint_is_believed_and_a_cap_kept():
    predictor = RunningLengths()
    assert predictor.predict(PLAIN._replace(hint_tokens=77)) == 77.0
    assert predictor.predict(PLAIN._replace(hint_tokens=77, cap_tokens=50)) == 50.0
    assert predictor.predict(PLAIN._replace(cap_tokens=5)) == 5.0
    assert predictor.predict(PLAIN._replace(hint_tokens=0)) == 0.0


def test_cold_it_expects_the_middle_of_the_cuts():
    cuts = ClassCuts(output_tokens=(100, 350))
    predictor = RunningLengths(RunningLengthsLimits(cuts=cuts))
    assert 100 < predictor.predict(PLAIN) < 350
    assert predictor.predict(PLAIN) == pytest.approx(math.sqrt(101 * 351) - 1, rel=0.02)


def test_the_prior_has_the_cuts_as_its_thirds():
    weights = prior_of(ClassCuts(output_tokens=(100, 350)))
    assert sum(weights) == pytest.approx(1.0)
    assert quantile(weights, 1 / 3) == pytest.approx(100, rel=0.05)
    assert quantile(weights, 2 / 3) == pytest.approx(350, rel=0.05)


def test_learns_what_it_sees():
    predictor = taught([900] * 200)
    assert predictor.predict(PLAIN) == pytest.approx(900, rel=0.15)


def test_one_answer_moves_it_little_and_many_much():
    predictor = RunningLengths()
    cold = predictor.predict(PLAIN)
    predictor.learn(PLAIN, 5000)
    assert predictor.predict(PLAIN) < 2 * cold
    for _ in range(100):
        predictor.learn(PLAIN, 5000)
    assert predictor.predict(PLAIN) > 4000


def test_kinds_are_told_apart_and_lean_on_each_other():
    structured, thinking = PLAIN._replace(structured=True), PLAIN._replace(thinking=True)
    predictor = taught([30] * 100, structured)
    for _ in range(100):
        predictor.learn(thinking, 3000)
    assert predictor.predict(structured) < 60
    assert predictor.predict(thinking) > 2000
    assert 30 < predictor.predict(PLAIN._replace(tools=True)) < 3000  # never seen: what its size does
    assert predictor.predict(LengthFeatures("other", 500)) == RunningLengths().predict(PLAIN)


def test_follows_a_change():
    predictor = taught([100] * 3000, half_life=200)
    for _ in range(1000):
        predictor.learn(PLAIN, 1500)
    assert predictor.predict(PLAIN) > 1200


def test_the_quantile_says_which_side_to_err_on():
    random = np.random.default_rng(0)
    lengths = random.lognormal(5, 1, 2000).astype(int)
    for share in (0.2, 0.5, 0.8):
        predicted = taught(lengths, quantile=share).predict(PLAIN)
        assert (lengths <= predicted).mean() == pytest.approx(share, abs=0.05)


def test_beats_any_constant_where_kinds_differ():
    random = np.random.default_rng(1)
    predictor, errors, constants = RunningLengths(), [], []
    for n in range(3000):
        thinking = bool(random.integers(2))
        actual = int(random.lognormal(7 if thinking else 4, 0.4))
        features = PLAIN._replace(thinking=thinking)
        if n > 500:
            errors.append(abs(math.log((predictor.predict(features) + 1) / (actual + 1))))
            constants.append(math.log(actual + 1))
        predictor.learn(features, actual)
    best_constant = np.abs(np.array(constants) - np.median(constants)).mean()
    assert np.mean(errors) < 0.4 * best_constant


def test_memory_is_bounded():
    predictor = RunningLengths(RunningLengthsLimits(max_keys=50))
    for n in range(500):
        predictor.learn(LengthFeatures(f"model {n}", n), 10)
    assert len(predictor.snapshot()["kinds"]) == 50
    assert predictor.predict(LengthFeatures("model 499", 499)) < predictor.predict(LengthFeatures("model 0", 0))


def test_survives_a_restart():
    predictor = taught([700] * 300 + [20] * 100)
    predictor.learn(PLAIN._replace(tools=True), 5)
    again = RunningLengths()
    again.restore(json.loads(json.dumps(predictor.snapshot())))
    for features in (PLAIN, PLAIN._replace(tools=True), LengthFeatures("m", 9000), LengthFeatures("x", 1)):
        assert again.predict(features) == pytest.approx(predictor.predict(features), rel=0.02)
    assert again.snapshot() == predictor.snapshot()


@pytest.mark.parametrize(
    "snapshot",
    [
        {},
        {"version": 2},
        {"version": 1, "buckets": 3, "per_octave": 3, "kinds": []},
        {"version": 1, "buckets": BUCKETS, "per_octave": 3, "kinds": [[["m"], 1, [1.0]]]},
        {"version": 1, "buckets": BUCKETS, "per_octave": 3, "kinds": [[["m"], 1, [float("nan")] * BUCKETS]]},
    ],
)
def test_a_wrong_snapshot_is_refused_and_nothing_changes(snapshot):
    predictor = taught([700] * 100)
    before = predictor.predict(PLAIN)
    with pytest.raises(ValueError, match="length snapshot"):
        predictor.restore(snapshot)
    assert predictor.predict(PLAIN) == before


features = st.builds(
    LengthFeatures,
    st.sampled_from(["a", "b"]),
    st.integers(-5, 10**9),
    st.none() | st.integers(-5, 10**9),
    st.none() | st.integers(-5, 10**9),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)


@given(st.lists(st.tuples(features, st.integers(-5, 10**9)), max_size=40), features, st.floats(0.01, 0.99))
def test_no_prediction_is_negative_nan_or_over_a_limit(seen, asked, share):
    predictor = RunningLengths(RunningLengthsLimits(quantile=share, longest_tokens=8192))
    for f, tokens in seen:
        predictor.learn(f, tokens)
    predicted = predictor.predict(asked)
    assert math.isfinite(predicted)
    assert 0.0 <= predicted <= 8192
    if asked.cap_tokens is not None:
        assert predicted <= max(asked.cap_tokens, 0)


@given(st.integers(0, 200_000))
def test_a_length_lies_in_its_bucket(tokens):
    bucket = bucket_of(tokens)
    assert 0 <= bucket < BUCKETS
    assert edge(bucket) <= tokens * (1 + 1e-9) + 1e-6
    assert tokens <= edge(bucket + 1) * (1 + 1e-9) + 1e-6


@given(st.lists(st.floats(0, 10), min_size=BUCKETS, max_size=BUCKETS), st.floats(0, 1), st.floats(0, 1))
def test_quantiles_rise(weights, low, high):
    low, high = sorted((low, high))
    assert quantile(weights, low) <= quantile(weights, high) * (1 + 1e-9)
