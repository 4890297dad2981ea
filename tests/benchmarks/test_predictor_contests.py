"""The contests themselves: nobody looks ahead, and scores are what they say."""

import math
import time

import numpy as np
import pytest

from benchmarks import load_contest
from benchmarks.length_contest import FIRST_S, UNSCORED, Constant, Product, Sample, contest
from pools.length_costs import LengthCosts
from pools.lengths import LengthFeatures


class Spy:
    """Says what it was last taught."""

    def __init__(self):
        self.taught = []
        self.asked = 0

    def predict(self, features):
        self.asked += 1
        tokens = float(self.taught[-1]) if self.taught else 0.0
        return tokens, tokens, tokens, tokens

    def learn(self, features, output_tokens):
        self.taught.append(output_tokens)


def samples(outputs, gap_s):
    return [Sample(n * gap_s, LengthFeatures("m", 500), int(tokens)) for n, tokens in enumerate(outputs)]


def test_answers_teach_only_when_they_have_ended():
    spy = Spy()
    quick = contest(samples(range(1, 501), FIRST_S + 60.0), {"spy": lambda: spy}, LengthCosts())[0]
    assert quick.error_tokens == pytest.approx(1.0)  # each knows the answer just before it
    assert spy.asked == 500
    late = Spy()
    row = contest(samples(range(1, 501), 0.001), {"spy": lambda: late}, LengthCosts())[0]
    assert late.taught == []
    assert row.error_tokens == pytest.approx(np.mean(np.arange(UNSCORED + 1, 501)))


def test_scores_of_a_constant_are_known():
    outputs = [50] * UNSCORED + [50, 50, 200, 400]
    row = contest(samples(outputs, 100.0), {"median": lambda: Constant("median")}, LengthCosts())[0]
    assert row.accuracy == 0.5
    assert row.balanced == pytest.approx(1 / 3)
    assert row.error_tokens == pytest.approx((150 + 350) / 4)
    assert row.loss_j == pytest.approx((0 + 0 + 1 + 2) / 4)
    assert row.covered == 0.5


def test_waiting_is_not_counted_as_computing():
    class Sleepy(Spy):
        def predict(self, features):
            time.sleep(0.002)  # the clocks themselves are under test
            return super().predict(features)

    row = contest(samples([50] * (UNSCORED + 5), 100.0), {"sleepy": Sleepy}, LengthCosts())[0]
    assert row.p50_us >= 2000.0
    assert 0.0 < row.cpu_p50_us < 1000.0
    assert row.cpu_p50_us <= row.cpu_p99_us


def test_the_bound_knows_the_mean_and_only_its_reserve_errs():
    minutes = np.random.default_rng(0).poisson(60.0, (5 * 1440, 9)).astype(float)
    rows = {row.name: row for row in load_contest.contest(minutes, 0.0)}
    bound = rows.pop(load_contest.BOUND)
    assert bound.error == 0.0
    assert 0.0 < bound.under < 0.1
    assert all(row.error > 0.0 and bound.pinball < row.pinball for row in rows.values())


def test_the_product_beats_constants_where_sizes_tell():
    random = np.random.default_rng(0)
    made = []
    for n in range(1500):
        inputs = int(random.choice([100, 3000]))
        made.append(Sample(n * 5.0, LengthFeatures("m", inputs), int(random.lognormal(4 if inputs < 999 else 6, 0.3))))
    makers = {"product": lambda: Product(LengthCosts()), "constant": lambda: Constant("median")}
    product, constant = contest(made, makers, LengthCosts())
    assert product.accuracy > constant.accuracy + 0.2
    assert product.error_tokens < 0.6 * constant.error_tokens
    assert product.covered == pytest.approx(0.8, abs=0.04)
    assert math.isfinite(product.p99_us)


def test_a_forecast_knows_nothing_of_its_epoch():
    random = np.random.default_rng(0)
    minutes = random.poisson(60.0, (2 * 1440, 9)).astype(float)
    other = minutes.copy()
    other[1440:] *= 7.0
    one, two = (load_contest.product(each, 0.0, 300.0)[1] for each in (minutes, other))
    slot = 1440 // load_contest.PER_SLOT
    assert (one[: slot + 1] == two[: slot + 1]).all()
    assert (one[slot + 1] != two[slot + 1]).any()
