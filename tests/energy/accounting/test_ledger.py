"""EnergyLedger against an instance played step by step, and against its own rules."""

import json

import numpy as np
import pytest
from batching_truth import Job, play
from hypothesis import given, settings
from hypothesis import strategies as st

from energy.accounting import Interval, MeteredInstance, Prices, Use, User
from energy.accounting_ledger import KEPT_UNMETERED, MINUTE_S, SETTLE_S, EnergyLedger
from energy.accounting_work import prefill_s
from energy.adapters.catalogue import load_profile
from energy.carbon import StaticIntensity

PROFILE = load_profile("llama-3.1-70b-fp8-h100")
TP = 4
C = PROFILE.step(TP, 1980)
INSTANCE = MeteredInstance("i-1", "LL", "llama", "H100-SXM", TP, Use.IDLE, C.idle_w, C)
CARBON = StaticIntensity(360.0, "a test")


def new_ledger(**changed):
    return EnergyLedger(CARBON, Prices(), unix_offset_s=1_000_000.0, **changed)


def user_of(job, tenant="t"):
    return User("llama", "LL", "LL" if job.input_tokens > 1000 else "SS", tenant)


def jobs_of(rng, count, rate_rps):
    arrivals_s = np.cumsum(rng.exponential(1.0 / rate_rps, count))
    return [
        Job(f"r{i}", float(at_s), int(rng.choice((80, 600, 4000))), int(rng.integers(1, 400)))
        for i, at_s in enumerate(arrivals_s)
    ]


def account(ledger, jobs, meter, period_s=1.0, streamed=True):
    """Tell the ledger everything in the order it happens; returns what it said each request took at its end."""
    last_s = max(job.end_s for job in jobs) + 10.0
    ledger.metered(Interval(INSTANCE, -5.0, 0.0, 2434.0))
    events = [(job.arrival_s, 0, job) for job in jobs] + [(job.end_s, 2, job) for job in jobs]
    events += [(job.first_token_s, 1, job) for job in jobs]
    readings_s = np.append(np.arange(period_s, last_s, period_s), last_s)
    events += [(float(at_s), 3, None) for at_s in readings_s]
    said_j, before_s = {}, 0.0
    for at_s, kind, job in sorted(events, key=lambda event: event[:2]):
        if kind == 0:
            ledger.began(job.id, user_of(job), "i-1", job.input_tokens, at_s)
        elif kind == 1 and streamed:
            ledger.first_token(job.id, at_s)
        elif kind == 2:
            said_j[job.id] = ledger.energy_j(job.id, at_s, job.output_tokens)
            ledger.ended(job.id, at_s, job.input_tokens, job.output_tokens)
        elif kind == 3:
            ledger.metered(Interval(INSTANCE, before_s, at_s, meter.read_j(at_s) - meter.read_j(before_s)))
            ledger.settle(at_s)
            before_s = at_s
    ledger.settle(last_s + 2 * SETTLE_S)
    return said_j, last_s


def total(ledger, name, **where):
    rows = ledger.window(1e6, 1e5).rows
    return sum(getattr(r.row, name) for r in rows if all(getattr(r.user, k) == v for k, v in where.items()))


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from((0.3, 1.0, 6.0)), st.floats(0.0, 60.0))
def test_the_parts_sum_to_the_meter_within_one_percent_in_every_minute(seed, rate_rps, offset_s):
    jobs = jobs_of(np.random.default_rng(seed), 40, rate_rps)
    meter = play(C, TP, jobs)
    ledger = EnergyLedger(CARBON, Prices(), unix_offset_s=600.0 + offset_s)
    _, last_s = account(ledger, jobs, meter)
    booked_j: dict[int, float] = {}
    for row in ledger.snapshot()["rows"]:
        parts_j = sum(row[name] for name in ("prefill_j", "decode_j", "idle_j", "transition_j"))
        booked_j[row["minute"]] = booked_j.get(row["minute"], 0.0) + parts_j
    for minute, parts_j in booked_j.items():
        begin_s, end_s = (at * MINUTE_S - 600.0 - offset_s for at in (minute, minute + 1))
        if begin_s >= 0.0 and end_s <= last_s:  # whole minutes
            assert parts_j == pytest.approx(meter.read_j(end_s) - meter.read_j(begin_s), rel=0.01)
    # and nothing is lost or made over all of it
    assert sum(booked_j.values()) == pytest.approx(2434.0 + meter.read_j(last_s), rel=1e-9)
    assert ledger.metered_j == pytest.approx(sum(booked_j.values()), rel=1e-9)


@pytest.mark.parametrize("rate_rps", [0.5, 2.0, 6.0])
def test_shares_are_what_the_steps_say(rate_rps):
    jobs = jobs_of(np.random.default_rng(7), 120, rate_rps)
    meter = play(C, TP, jobs)
    ledger = new_ledger()
    said_j, _ = account(ledger, jobs, meter)
    # each class, prefill and decode, against the truth of the steps
    for name in ("LL", "SS"):
        of_class = [job for job in jobs if user_of(job).request_class == name]
        for kind, within in (("prefill_j", 0.25), ("decode_j", 0.1)):
            true_j = sum(getattr(job, kind) for job in of_class)
            assert total(ledger, kind, request_class=name) == pytest.approx(true_j, rel=within)
    served_j = sum(job.prefill_j + job.decode_j for job in jobs)
    assert total(ledger, "prefill_j") + total(ledger, "decode_j") == pytest.approx(served_j, rel=0.02)
    # what a client is told at the end of its request
    assert sum(said_j.values()) == pytest.approx(served_j, rel=0.1)
    off = [said_j[job.id] / (job.prefill_j + job.decode_j) - 1.0 for job in jobs]
    assert abs(np.median(off)) < 0.05
    assert np.percentile(np.abs(off), 90) < 0.3


def test_answers_that_are_not_streamed_are_charged_for_their_decoding():
    jobs = jobs_of(np.random.default_rng(3), 100, 2.0)
    meter = play(C, TP, jobs)
    ledger = new_ledger()
    account(ledger, jobs, meter, streamed=False)
    assert total(ledger, "decode_j") == pytest.approx(sum(job.decode_j for job in jobs), rel=0.15)


def test_an_empty_instance_is_idle_or_in_transition():
    ledger = new_ledger()
    ledger.metered(Interval(INSTANCE, 0.0, 10.0, 4866.0))
    starting = MeteredInstance("i-2", "SS", "llama", "H100-SXM", 2, Use.TRANSITION, 121.7)
    ledger.metered(Interval(starting, 0.0, 10.0, 3000.0))
    ledger.settle(10.0 + 2 * SETTLE_S)
    assert total(ledger, "idle_j", pool="LL") == pytest.approx(4866.0)
    assert total(ledger, "transition_j", pool="SS") == pytest.approx(3000.0)
    assert total(ledger, "energy_j") == pytest.approx(7866.0)


def test_money_and_carbon_follow_the_joules():
    prices = Prices({"H100-SXM": 2.25}, electricity_usd_per_kwh=0.1)
    ledger = EnergyLedger(CARBON, prices, 0.0)
    ledger.metered(Interval(INSTANCE, 0.0, 3600.0, 3.6e6))
    odd = MeteredInstance("i-3", "LL", "llama", "B300", 1, Use.IDLE, 100.0)
    ledger.metered(Interval(odd, 0.0, 3600.0, 3.6e6))
    ledger.settle(4000.0)
    assert total(ledger, "gpu_s") == pytest.approx(5 * 3600.0)
    assert total(ledger, "gpu_usd") == pytest.approx(4 * 2.25)
    assert total(ledger, "electricity_usd") == pytest.approx(0.2)
    assert total(ledger, "co2_g") == pytest.approx(720.0)
    assert ledger.window(1e6, 4000.0).unpriced_gpus == ("B300",)


def test_a_request_in_flight_knows_what_it_took_and_an_unmetered_one_does_not():
    ledger = new_ledger()
    ledger.began("r", User("llama", "LL", "LL", "t"), "i-1", 600, 0.0)
    assert ledger.energy_j("r", 1.0) is None
    ledger.metered(Interval(INSTANCE, -5.0, 0.0, 2434.0))
    assert ledger.energy_j("r", 0.0) == 0.0
    ledger.first_token("r", 1.0)
    at_first_j = ledger.energy_j("r", 1.0)
    later_j = ledger.energy_j("r", 2.0)
    assert 0.0 < at_first_j < later_j
    ledger.ended("r", 2.0)
    assert ledger.energy_j("r", 3.0) is None
    ledger.ended("r", 3.0)  # once is enough
    assert total(ledger, "requests") == 1


def test_a_second_attempt_leaves_the_first_instance():
    ledger = new_ledger()
    other = MeteredInstance("i-2", "LL", "llama", "H100-SXM", TP, Use.IDLE, C.idle_w, C)
    user = User("llama", "LL", "LL", "t")
    ledger.began("r", user, "i-1", 600, 0.0)
    ledger.began("r", user, "i-2", 600, 1.0)
    ledger.first_token("r", 2.0)
    for instance in (INSTANCE, other):
        ledger.metered(Interval(instance, 0.0, 10.0, 10_000.0))
    ledger.ended("r", 8.0, 600, 100)
    ledger.settle(20.0)
    assert total(ledger, "requests") == 1
    idle_s = (10.0 - 1.0) + (10.0 - (8.0 - 2.0) - prefill_s(C, 600))
    assert total(ledger, "idle_j") == pytest.approx(idle_s * C.idle_w * TP)
    assert total(ledger, "energy_j") == pytest.approx(20_000.0)


def test_it_is_bounded():
    ledger = new_ledger(retention_s=3600.0, max_rows=50, max_tenants=3)
    for i in range(300):
        at_s = i * 60.0
        ledger.began(f"r{i}", User("llama", "LL", "LL", f"tenant-{i}"), "i-1", 10, at_s)
        ledger.ended(f"r{i}", at_s + 1.0, 10, 1)
        ledger.began(f"never-{i}", User("llama", "LL", "LL", "tenant-0"), "i-1", 10, at_s)
        ledger.metered(Interval(INSTANCE, at_s, at_s + 60.0, 1000.0))
        ledger.settle(at_s + 60.0)
    rows = ledger.snapshot()["rows"]
    assert len(rows) <= 52
    assert {row["tenant"] for row in rows} <= {"", "other", "tenant-0"}
    assert ledger.energy_j("never-0", 18_000.0) is None


def test_where_nobody_meters_nothing_piles_up():
    ledger = new_ledger()
    for i in range(5000):
        ledger.began(f"r{i}", User("llama", "LL", "LL", "t"), f"i-{i % 7}", 10, float(i))
        ledger.ended(f"r{i}", i + 0.5, 10, 1)
    assert [len(account.ended) for account in ledger._accounts.values()] == [KEPT_UNMETERED] * 7
    assert total(ledger, "requests") == 5000


def test_a_snapshot_restores_and_adds_up():
    jobs = jobs_of(np.random.default_rng(5), 30, 1.0)
    first = new_ledger()
    account(first, jobs, play(C, TP, jobs))
    document = json.loads(json.dumps(first.snapshot()))
    second = new_ledger()
    second.restore(document)
    assert second.snapshot() == first.snapshot()
    second.restore(document)
    assert second.metered_j == pytest.approx(2 * first.metered_j)
    for wrong in ({}, {"format": 1}, {"format": 1, "metered_j": 0.0, "rows": [{"minute": 1}]}):
        with pytest.raises(ValueError, match="energy ledger's snapshot"):
            second.restore(wrong)


def test_a_window_is_whole_minutes_up_to_now():
    ledger = EnergyLedger(CARBON, Prices(), unix_offset_s=0.0)
    for minute in range(10):
        ledger.metered(Interval(INSTANCE, minute * 60.0, minute * 60.0 + 60.0, 100.0))
    ledger.settle(700.0)
    window = ledger.window(since_s=150.0, now_s=600.0)
    assert (window.begin_unix_s, window.end_unix_s) == (420.0, 600.0)
    assert sum(r.row.energy_j for r in window.rows) == pytest.approx(300.0)
    for since_s, minutes in ((float("inf"), 10), (float("nan"), 0), (-1.0, 0)):
        assert sum(r.row.energy_j for r in ledger.window(since_s, 600.0).rows) == pytest.approx(100.0 * minutes)
