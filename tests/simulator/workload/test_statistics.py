import numpy as np
import pytest

from pools.classes import ClassCuts
from simulator.workload.adapters.catalogue import open_workload
from simulator.workload.adapters.published import published
from simulator.workload.arrivals import Arrivals, recorded
from simulator.workload.statistics import class_shares, classes_of, taken_from

# Shares (%) of SS SM SL MS MM ML LS LM LL in the Azure 2023 traces
CONV_SHARES = [3.6, 9.8, 0.05, 19, 10.4, 7.7, 15.1, 8.8, 25.6]
CODE_SHARES = [15.4, 0.5, 0.1, 20.7, 1, 0.1, 59.4, 2.4, 0.4]


def test_classes_are_those_of_the_router():
    rng = np.random.default_rng(0)
    inputs = np.concatenate((rng.integers(1, 3000, 500), [255, 256, 1023, 1024])).astype(np.int32)
    outputs = np.concatenate((rng.integers(1, 700, 500), [99, 100, 349, 350])).astype(np.int32)
    cuts = ClassCuts()
    expected = [cuts.classify(int(i), int(o)).value for i, o in zip(inputs, outputs, strict=True)]
    assert classes_of(inputs, outputs).tolist() == expected


def test_statistics_of_a_small_trace():
    arrivals = Arrivals(
        np.concatenate((np.linspace(0, 59, 40), np.linspace(60, 119, 20), [121.0])),
        np.repeat(np.array([100, 500, 2000], np.int32), [40, 20, 1]),
        np.repeat(np.array([50, 200, 400], np.int32), [40, 20, 1]),
    )
    taken = taken_from(recorded("t", arrivals), "t", "made here", 60.0)
    assert taken.slot_requests == (40, 20)  # the third minute is not whole
    assert taken.gap_cv == pytest.approx(0)
    assert taken.class_requests == (40, 0, 0, 0, 20, 0, 0, 0, 1)
    assert set(taken.input_quantiles[4]) == {500}
    assert taken.input_quantiles[1] == ()


@pytest.mark.parametrize(
    ("name", "shares", "requests", "mean_tokens"),
    [("synthetic-conv", CONV_SHARES, 19_329, (1155, 211)), ("synthetic-code", CODE_SHARES, 8623, (2048, 27.9))],
)
def test_the_shipped_hours_have_the_published_statistics(name, shares, requests, mean_tokens):
    workload = open_workload(name, seed=3, rate_scale=4.0)
    arrivals = workload.collect()
    assert workload.expected_requests == pytest.approx(4 * requests)
    assert len(arrivals) == pytest.approx(4 * requests, rel=0.03)
    assert class_shares(arrivals) * 100 == pytest.approx(shares, abs=0.5)
    assert arrivals.input_tokens.mean() == pytest.approx(mean_tokens[0], rel=0.05)
    assert arrivals.output_tokens.mean() == pytest.approx(mean_tokens[1], rel=0.1)


def test_the_shipped_code_hour_is_bursty_and_the_conversation_hour_is_not():
    def cv(name: str) -> float:
        gaps = np.diff(open_workload(name, seed=1).collect().arrival_s)
        return float(gaps.std() / gaps.mean())

    assert cv("synthetic-conv") == pytest.approx(1.1, abs=0.1)
    assert cv("synthetic-code") > 8  # 13.2 as recorded
    per_minute = np.bincount((open_workload("synthetic-code").collect().arrival_s // 60).astype(int))
    assert per_minute.max() > 400
    assert (per_minute == 0).any()


def test_the_shipped_week_has_days_and_a_weekend():
    week = published("synthetic-week")
    per_day = np.array(week.slot_requests).reshape(7, 48).sum(axis=1)
    assert sum(week.slot_requests) == pytest.approx(16.8e6, rel=0.005)
    friday, saturday, sunday, monday = per_day[:4]
    assert max(saturday, sunday) < 0.7 * min(friday, monday)
    day = open_workload("synthetic-day", seed=0, rate_scale=0.01)
    assert day.duration_s == 86_400
    assert day.starts_unix_s == week.starts_unix_s + 4 * 86_400
    assert len(day.collect()) == pytest.approx(per_day[4] * 0.01, rel=0.03)
