"""Output length: hints, caps, cold start, learning, honesty of the interval, tenants, bounds, persistence."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pools.classes import ClassCuts
from pools.learned_lengths import LearnedLengths, LengthLimits
from pools.length_costs import LengthCosts
from pools.lengths import LengthFeatures

PLAIN = LengthFeatures("m", 500)
LIST = PLAIN._replace(turn=b'"write a long list of names"')
NAME = PLAIN._replace(turn=b'"answer with one name"')


def taught(lengths, features=PLAIN, **limits):
    predictor = LearnedLengths(LengthLimits(**limits))
    teach(predictor, lengths, features)
    return predictor


def teach(predictor, lengths, features=PLAIN):
    for tokens in lengths:
        predictor.predict(features)
        predictor.learn(features, int(tokens))


def test_a_hint_is_believed_and_a_cap_kept():
    predictor = LearnedLengths()
    assert predictor.predict(PLAIN._replace(hint_tokens=77)) == (77.0,) * 4
    assert predictor.predict(PLAIN._replace(hint_tokens=77, cap_tokens=50)).tokens == 50.0
    assert predictor.predict(PLAIN._replace(cap_tokens=5)) == (5.0,) * 4
    assert predictor.predict(PLAIN._replace(hint_tokens=0)).tokens == 0.0


def test_a_context_leaves_what_the_prompt_does_not_take():
    predictor = taught([3000] * 100, context_tokens={"m": 2000})
    assert predictor.predict(PLAIN).high_tokens == 1500.0
    assert predictor.predict(PLAIN._replace(input_tokens=2500)).tokens == 0.0
    assert predictor.predict(LengthFeatures("other", 2500)).tokens > 0.0


def test_cold_it_expects_the_middle_of_the_cuts():
    predictor = LearnedLengths(LengthLimits(cuts=ClassCuts(output_tokens=(100, 350))))
    cold = predictor.predict(PLAIN)
    assert cold.median_tokens == pytest.approx(math.sqrt(101 * 351) - 1, rel=0.02)
    assert 100 <= cold.tokens < 350
    assert cold.low_tokens < 60
    assert cold.high_tokens > 600


def test_learns_what_it_sees():
    predicted = taught([900] * 200).predict(PLAIN)
    assert predicted.median_tokens == pytest.approx(900, rel=0.2)
    assert predicted.low_tokens > 300
    assert predicted.high_tokens < 2700


def test_one_answer_moves_it_little_and_many_much():
    predictor = LearnedLengths()
    cold = predictor.predict(PLAIN).median_tokens
    teach(predictor, [5000])
    assert predictor.predict(PLAIN).median_tokens < 3.5 * cold
    teach(predictor, [5000] * 100)
    assert predictor.predict(PLAIN).median_tokens > 3500


def test_it_follows_a_change():
    predictor = taught([50] * 3000)
    teach(predictor, [1500] * 3000)
    assert predictor.predict(PLAIN).median_tokens > 1000


def alternating(predictor, kinds, rounds, seed=0):
    random = np.random.default_rng(seed)
    for _ in range(rounds):
        for features, middle in kinds:
            teach(predictor, [random.lognormal(math.log(middle), 0.2)], features)


@pytest.mark.parametrize(
    "other",
    [
        PLAIN._replace(structured=True),
        PLAIN._replace(thinking=True),
        PLAIN._replace(tools=True),
        PLAIN._replace(tier="flex"),
        PLAIN._replace(tool_choice=9),
        PLAIN._replace(system=12345),
        PLAIN._replace(tenant="acme"),
        PLAIN._replace(input_tokens=6000),
    ],
)
def test_every_feature_can_tell_requests_apart(other):
    predictor = LearnedLengths()
    alternating(predictor, [(PLAIN, 40), (other, 900)], 300)
    assert predictor.predict(PLAIN).median_tokens < 150
    assert predictor.predict(other).median_tokens > 300


def test_words_tell_requests_apart():
    predictor = LearnedLengths()
    alternating(predictor, [(NAME, 20), (LIST, 900)], 400)
    assert predictor.predict(NAME).median_tokens < 80
    assert predictor.predict(LIST).median_tokens > 300
    unseen = PLAIN._replace(turn=b'"write a long list of rivers"')
    assert predictor.predict(unseen).median_tokens > 2 * predictor.predict(NAME).median_tokens


def test_words_that_say_nothing_are_not_believed():
    """Two hundred one-off texts and noise: with words it errs hardly more than without."""
    random = np.random.default_rng(3)
    lengths = random.lognormal(4.5, 1.0, 2000).astype(int)
    words = random.integers(97, 123, (2000, 200), dtype=np.uint8)
    errors = {True: [], False: []}
    for texts, missed in errors.items():
        predictor = LearnedLengths()
        for n, (tokens, word) in enumerate(zip(lengths, words, strict=True)):
            turn = b" ".join(word.tobytes()[k : k + 5] for k in range(0, 200, 5)) if texts else b""
            features = PLAIN._replace(turn=turn)
            if n > 500:
                missed.append(abs(math.log((predictor.predict(features).median_tokens + 1) / (tokens + 1))))
            teach(predictor, [tokens], features)
    assert np.mean(errors[True]) < 1.05 * np.mean(errors[False])


def test_models_are_apart():
    predictor = taught([5] * 300)
    assert predictor.predict(LengthFeatures("other", 500)) == LearnedLengths().predict(PLAIN)


def test_eight_answers_in_ten_lie_in_the_interval_though_they_are_learned_late():
    """Fresh data, two kinds, a change on the way, and answers that end forty requests later."""
    random = np.random.default_rng(5)
    predictor, waiting, inside = LearnedLengths(), [], []
    for n in range(6000):
        features = PLAIN._replace(thinking=bool(random.integers(2)))
        scale = 5.0 + 1.5 * features.thinking + (0.7 if n > 3000 else 0.0)
        predicted, actual = predictor.predict(features), int(random.lognormal(scale, 0.8))
        inside.append(predicted.low_tokens <= actual <= predicted.high_tokens)
        waiting.append((features, actual))
        if len(waiting) > 40:
            predictor.learn(*waiting.pop(0))
    assert np.mean(inside[1000:]) == pytest.approx(0.8, abs=0.02)


def test_the_class_is_the_one_that_costs_least():
    lengths = [50] * 60 + [200] * 40
    random = np.random.default_rng(7)
    mixed = random.permutation(lengths * 5)
    dear_when_short = ((0.0, 100.0, 100.0), (1.0, 0.0, 1.0), (2.0, 1.0, 0.0))
    careful = taught(mixed, costs={"m": LengthCosts((dear_when_short,) * 3)})
    assert taught(mixed).predict(PLAIN).tokens < 100
    assert 100 <= careful.predict(PLAIN).tokens < 350
    assert careful.predict(PLAIN).median_tokens == pytest.approx(taught(mixed).predict(PLAIN).median_tokens)


def test_a_flood_of_one_tenant_does_not_spoil_the_others():
    honest, flood = PLAIN._replace(tenant="honest"), PLAIN._replace(tenant="flood")
    predictor, spoiled = LearnedLengths(), LearnedLengths()
    random = np.random.default_rng(9)
    for tokens in random.lognormal(4, 0.3, 400).astype(int):
        teach(predictor, [tokens], honest)
        teach(spoiled, [tokens], honest)
        teach(spoiled, [8000] * 20, flood)
    assert spoiled.predict(honest).median_tokens < 2.0 * predictor.predict(honest).median_tokens
    assert spoiled.predict(flood).median_tokens > 2000  # its own harm is its own


def test_what_was_hinted_at_teaches_nothing():
    predictor = LearnedLengths()
    for _ in range(100):
        predictor.learn(PLAIN._replace(hint_tokens=3), 3)
    assert predictor.predict(PLAIN) == LearnedLengths().predict(PLAIN)


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_what_is_planned_is_what_is_predicted_whoever_learns_in_between(seed):
    random = np.random.default_rng(seed)
    costs = {"m": LengthCosts((((0.0, 9.0, 9.0), (1.0, 0.0, 9.0), (1.0, 1.0, 0.0)),) * 3)}
    asked, alone = (LearnedLengths(LengthLimits(costs=costs, context_tokens={"m": 4000})) for _ in range(2))
    for _ in range(60):
        features = LengthFeatures(
            "m", int(random.integers(1, 4500)), hint_tokens=[None, 7][int(random.integers(8) == 0)], turn=b'"name one"'
        )
        tokens = int(random.integers(1, 900))
        assert asked.plan(features) == asked.predict(features).tokens == alone.predict(features).tokens
        for predictor in (asked, alone):
            predictor.learn(features, tokens)


def test_memory_is_bounded():
    predictor = LearnedLengths(LengthLimits(models=5, promises=10))
    for n in range(100):
        features = LengthFeatures(f"model {n}", n, tenant=f"tenant {n}")
        predictor.predict(features)
        predictor.learn(features, n * n)
    snapshot = predictor.snapshot()
    assert [name for name, *_ in snapshot["models"]] == [f"model {n}" for n in range(95, 100)]
    assert len(predictor._promised) == 10
    assert len(json.dumps(snapshot)) < 1_500_000


def test_survives_a_restart():
    predictor = taught([700] * 300 + [20] * 100)
    teach(predictor, [30] * 50, NAME)
    again = LearnedLengths()
    again.restore(json.loads(json.dumps(predictor.snapshot())))
    for features in (PLAIN, NAME, PLAIN._replace(tools=True), LengthFeatures("m", 9000), LengthFeatures("x", 1)):
        assert tuple(again.predict(features)) == pytest.approx(tuple(predictor.predict(features)), rel=0.2)
    assert again.snapshot()["weights"] == predictor.snapshot()["weights"]
    teach(again, [40] * 20, NAME)
    assert again.snapshot()["weights"] != predictor.snapshot()["weights"]


def broken(**changes):
    return {**taught([10]).snapshot(), **changes}


@pytest.mark.parametrize(
    "snapshot",
    [
        {},
        {"version": 1, "buckets": 54, "per_octave": 3, "kinds": []},
        broken(version=1),
        broken(shape=[1, 2, 3, 4]),
        broken(weights="AAAA"),
        broken(weights="/" * len(broken()["squares"].rstrip("=")) + "="),
        broken(squares="not base64"),
        broken(models=[["m", [float("nan"), 1, 0, 0], [[0, 0], [0, 0]], []]]),
        broken(models=[["m", [1, 1, 0, 0], [[0, 0], [0, 0]], [[1, 1, [1.0]]]]]),
        broken(models=[["m", [1, 1, 0, 0], [[0, 0]], []]]),
    ],
)
def test_a_wrong_snapshot_is_refused_and_nothing_changes(snapshot):
    predictor = taught([700] * 100)
    before = predictor.predict(PLAIN)
    with pytest.raises(ValueError, match=r"length snapshot|shorter|base64|padding|zip\(\)"):
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
    st.text(max_size=5),
    st.none() | st.text(max_size=5),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**32 - 1),
    st.binary(max_size=400),
)


@settings(deadline=None)
@given(st.lists(st.tuples(features, st.integers(-5, 10**9)), max_size=30), features)
def test_no_prediction_is_negative_nan_or_over_a_limit(seen, asked):
    predictor = LearnedLengths(LengthLimits(longest_tokens=8192, context_tokens={"a": 5000}))
    for f, tokens in seen:
        predictor.learn(f, tokens)
    predicted = predictor.predict(asked)
    most = 8192 if asked.model == "b" else max(min(8192, 5000 - asked.input_tokens), 0)
    if asked.cap_tokens is not None:
        most = min(most, max(asked.cap_tokens, 0))
    for tokens in predicted:
        assert math.isfinite(tokens)
        assert 0.0 <= tokens <= most
    assert predicted.low_tokens <= predicted.median_tokens <= predicted.high_tokens
