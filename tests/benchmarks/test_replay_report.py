import io
import json

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from benchmarks.replay import INTERRUPTED, Outcome, ReplayRequest
from benchmarks.replay_report import GapHistogram, Percentiles, Tally
from benchmarks.replay_table import print_report
from pools.classes import ClassSlos
from simulator.histograms import BUCKETS, bucket_of


def request(number=0, due_s=0.0, input_tokens=100, output_tokens=3) -> ReplayRequest:
    return ReplayRequest(number, due_s, input_tokens, output_tokens)


def finished(sent_s=0.0, ttft_s=0.1, gap_s=0.05, tokens=3, prompt_tokens=100, energy_j=None) -> Outcome:
    times = tuple(sent_s + ttft_s + gap_s * index for index in range(tokens))
    return Outcome(sent_s, times[-1], None, times[0], times, prompt_tokens, tokens, energy_j)


def report(tally, planned=None, wall_s=10.0, **more):
    planned = planned if planned is not None else tally.finished + tally.failed
    return tally.report(trace="t", url="u", model="m", speedup=1.0, planned=planned, wall_s=wall_s, **more)


def test_classes_are_counted_apart_and_together():
    tally = Tally(ClassSlos())
    tally.add(request(0), finished())
    tally.add(request(1, input_tokens=3000, output_tokens=400), finished(tokens=400))
    tally.add(request(2), finished(ttft_s=0.2))
    got = report(tally)
    assert set(got.classes) == {"SS", "LL"}
    assert got.classes["SS"].requests == 2
    assert got.classes["SS"].ttft_s.p50 == pytest.approx(0.15)
    assert got.classes["SS"].ttft_s.max == pytest.approx(0.2)
    assert got.total.output_tokens == 406
    assert got.total.output_tokens_per_s == pytest.approx(40.6)
    assert got.total.tbt_s.p50 == pytest.approx(0.05, rel=0.01)
    assert got.accounted


@pytest.mark.parametrize(
    ("outcome", "within"),
    [
        (finished(ttft_s=0.25), True),
        (finished(ttft_s=0.251), False),
        (finished(gap_s=0.0999), True),
        (finished(gap_s=0.101), False),
        (finished(tokens=1), True),
        (Outcome(0.0, 1.0, "HTTP 503"), False),
    ],
)
def test_within_slo_means_both_limits_of_the_class(outcome, within):
    tally = Tally(ClassSlos())
    tally.add(request(), outcome)
    assert report(tally).total.within_slo == within


def test_the_slo_is_that_of_the_input_size():
    tally = Tally(ClassSlos())
    tally.add(request(input_tokens=2000), finished(ttft_s=1.9))
    tally.add(request(input_tokens=300), finished(ttft_s=0.5))
    got = report(tally)
    assert got.classes["LS"].within_slo == 1
    assert got.classes["MS"].within_slo == 0


def test_merged_tokens_are_counted_by_usage():
    outcome = Outcome(0.0, 2.0, None, 0.5, (0.5, 1.0, 1.5), 100, 11)
    assert outcome.mean_tbt_s == pytest.approx(0.1)
    assert outcome.ttft_s == 0.5
    assert Outcome(0.0, 2.0, None, 0.5, (0.5,), 100, 1).mean_tbt_s is None


def test_failures_are_counted_by_reason_and_interrupts_do_not_judge_the_target():
    tally = Tally(ClassSlos())
    tally.add(request(0), finished())
    for number, reason in enumerate(("HTTP 503", "HTTP 503", "timeout", INTERRUPTED), start=1):
        tally.add(request(number), Outcome(0.0, 1.0, reason))
    got = report(tally, planned=9)
    assert next(iter(got.failures.items())) == ("HTTP 503", 2)
    assert (got.total.finished, got.total.failed, got.total.interrupted, got.not_sent) == (1, 3, 1, 4)
    assert got.total.within_slo == pytest.approx(1 / 4)
    assert got.accounted


@given(st.lists(st.sampled_from([None, "a", "b", INTERRUPTED]), max_size=40), st.integers(0, 10))
def test_everything_planned_is_in_one_count(reasons, not_sent):
    tally = Tally(ClassSlos())
    for number, reason in enumerate(reasons):
        sizes = {"input_tokens": 1 + 500 * (number % 3), "output_tokens": 2 + 300 * (number % 2)}
        tally.add(request(number, **sizes), finished() if reason is None else Outcome(0.0, 1.0, reason))
    got = report(tally, planned=len(reasons) + not_sent)
    assert got.accounted
    assert sum(results.requests for results in got.classes.values()) == got.total.requests


def test_lateness_and_length_errors_are_the_replays_own_honesty():
    tally = Tally(ClassSlos())
    for number in range(100):
        late_s = 0.001 if number else 0.02
        tally.add(request(number, due_s=number), finished(sent_s=number + late_s, prompt_tokens=100 + number % 2))
    tally.add(request(100, output_tokens=9), finished(sent_s=0.0))
    got = report(tally)
    assert got.lateness_s.p50 == pytest.approx(0.001)
    assert got.lateness_s.max == pytest.approx(0.02)
    assert got.input_token_error.max == 1
    assert got.other_output_length == 1


def test_energy_is_summed_where_it_is_reported():
    tally = Tally(ClassSlos())
    tally.add(request(0), finished(energy_j=2.0))
    tally.add(request(1), finished(energy_j=3.5))
    assert report(tally).total.energy_j == 5.5
    silent = Tally(ClassSlos())
    silent.add(request(0), finished())
    assert report(silent).total.energy_j is None


@given(st.lists(st.floats(1e-4, 50), min_size=2, max_size=200))
def test_gap_percentiles_are_right_to_one_percent(gaps_s):
    histogram = GapHistogram()
    histogram.add(tuple(np.concatenate(([0.0], np.cumsum(gaps_s)))))
    real = np.sort(np.diff(np.concatenate(([0.0], np.cumsum(gaps_s)))))
    exact = real[int(np.ceil(0.5 * len(real))) - 1]
    assert histogram.percentiles().p50 == pytest.approx(exact, rel=0.011)
    assert histogram.percentiles().max == pytest.approx(real[-1], rel=0.011)


@given(st.lists(st.floats(0, 1e4), min_size=1, max_size=50))
def test_gaps_are_counted_in_the_simulators_buckets(gaps_s):
    times_s = tuple(np.concatenate(([0.0], np.cumsum(gaps_s))).tolist())
    histogram = GapHistogram()
    histogram.add(times_s)
    expected = np.bincount([bucket_of(gap_s) for gap_s in np.diff(times_s)], minlength=BUCKETS)
    assert np.array_equal(histogram.counts, expected)


def test_gaps_outside_the_buckets_fall_into_the_outermost():
    histogram = GapHistogram()
    histogram.add((0.0, 0.0, 1e6))
    assert histogram.counts[0] == histogram.counts[-1] == 1
    assert GapHistogram().percentiles() == Percentiles()
    assert Percentiles.of([]) == Percentiles(None, None, None)


def printed(got) -> str:
    out = io.StringIO()
    print_report(got, Console(file=out, width=80))
    return out.getvalue()


def test_the_table_tells_everything_that_was_counted():
    tally = Tally(ClassSlos())
    tally.add(request(0), finished(energy_j=2.0, ttft_s=12.345, gap_s=1.2))
    tally.add(request(1, input_tokens=500), finished(energy_j=4.0, sent_s=0.004))
    tally.add(request(2), Outcome(0.0, 1.0, "HTTP 429 rejected-saturated"))
    tally.add(request(3, output_tokens=8), finished())
    text = printed(report(tally, planned=7, gpu_energy_j=3600.0))
    for part in (
        "SS", "MS", "all", "J/req", "7 planned = 3 finished + 1 failed + 0 interrupted + 3 not sent",
        "1 x HTTP 429 rejected-saturated", "sent late by", "input tokens off by 0", "1 finished with another output",
        "energy as reported per request: 6 J", "GPUs' counters: 3600 J (1.00 Wh), 1200.0 J/request",
    ):  # fmt: skip
        assert part in text.replace("\n", " ")
    assert "…" not in text  # it fits a terminal of 80 columns


def test_an_empty_report_prints_dashes():
    text = printed(report(Tally(ClassSlos()), planned=3, wall_s=0.0))
    assert "0 finished" in text
    assert "-" in text


def test_the_report_is_json():
    tally = Tally(ClassSlos())
    tally.add(request(0), finished())
    read = json.loads(json.dumps(msgspec.to_builtins(report(tally))))
    assert read["classes"]["SS"]["ttft_s"]["p99"] == pytest.approx(0.1)
    assert read["total"]["finished"] == read["planned"] == 1
    assert set(read) == {
        "trace", "url", "model", "speedup", "planned", "not_sent", "wall_s", "total", "classes", "failures",
        "lateness_s", "input_token_error", "other_output_length", "gpu_energy_j",
    }  # fmt: skip
