from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tables import CLOCKS, nine_pools, one_pool, table, views

from pools.classes import RequestClass
from pools.instances import InstanceState
from pools.view import PoolView
from solver.clocks import ClockChooser, ClockSettings, _raise

LL = RequestClass.LL
NOBODY = np.zeros(9)  # waits in the gateway


def waiting(count, request_class=LL, models=1, model=0):
    queued = np.zeros(9 * models)
    queued[9 * model + request_class] = count
    return queued


def run(chooser, rows, ticks=40, queued=NOBODY):
    """Ticks in which the instances take the clocks chosen; returns the last choice."""
    choice = None
    for _ in range(ticks):
        choice = chooser.choose(5.0, views(rows), queued)
        for row, clock in zip(rows, choice.sm_clock_mhz, strict=True):
            row["clock"] = int(clock)
    return choice


def full_rate(clock, tp=8):
    t = table()
    return float(t.max_rate_rps(tp, clock, LL))


def test_the_clock_follows_the_load_up_and_down():
    chooser = ClockChooser({"m": table()}, one_pool())
    row = {"id": "a", "tp": 8, "rate": {LL: 0.3 * full_rate(800)}}
    assert run(chooser, [row]).sm_clock_mhz.tolist() == [800]
    row["rate"] = {LL: 0.98 * full_rate(1980)}
    choice = run(chooser, [row], ticks=20)
    assert choice.sm_clock_mhz.tolist() == [1980]
    row["rate"] = {LL: 0.3 * full_rate(800)}
    assert run(chooser, [row], ticks=1).sm_clock_mhz.tolist() != [800]
    assert run(chooser, [row]).sm_clock_mhz.tolist() == [800]


def test_a_load_just_below_the_ceiling_does_not_make_clocks_swing():
    chooser = ClockChooser({"m": table()}, one_pool())
    row = {"id": "a", "tp": 8, "clock": 1200, "rate": {LL: 0.85 * full_rate(1200)}}
    seen = set()
    for _ in range(60):
        run(chooser, [row], ticks=1)
        seen.add(row["clock"])
    assert len(seen) <= 2


def test_a_pool_raises_as_few_instances_as_it_must():
    rows = [{"id": f"i{n}", "tp": 8, "clock": 800, "rate": {LL: 0.97 * full_rate(800)}} for n in range(4)]
    chooser = ClockChooser({"m": table()}, one_pool())
    clocks = run(chooser, rows).sm_clock_mhz
    assert 1 <= np.count_nonzero(clocks > 800) < 4


def knee_table():
    """A table with a knee at 1200 MHz: below it, work takes the same energy at every clock."""
    t = table()
    idle_w = np.array([190.0, 200.0, 215.0, 230.0])[None, :, None, None]
    work_w = np.array([100.0, 100.0, 160.0, 220.0])[None, :, None, None]
    at = CLOCKS.index(1200)
    power = idle_w + work_w * np.asarray(t.loads) * (t.max_rate / t.max_rate[:, at : at + 1])[..., None]
    return replace(t, power=power)


@pytest.mark.parametrize("load", [0.0, 0.1, 0.9])
def test_nobody_goes_below_the_knee_where_slower_work_saves_nothing(load):
    row = {"id": "a", "tp": 8, "rate": {LL: load * full_rate(800)}}
    assert run(ClockChooser({"m": knee_table()}, one_pool()), [row]).sm_clock_mhz.tolist() == [1200]


def test_above_the_knee_the_clock_follows_the_load():
    row = {"id": "a", "tp": 8, "rate": {LL: 1.1 * full_rate(1200)}}
    assert run(ClockChooser({"m": knee_table()}, one_pool()), [row]).sm_clock_mhz[0] > 1200


def test_a_policy_with_one_clock_keeps_it_below_the_knee():
    row = {"id": "a", "tp": 8, "rate": {LL: 0.5 * full_rate(800)}}
    assert run(ClockChooser({"m": knee_table()}, one_pool(), None, (800,)), [row]).sm_clock_mhz.tolist() == [800]


def test_a_table_that_carries_nothing_has_no_knee():
    t = table()
    nothing = replace(t, max_rate=np.zeros_like(t.max_rate))
    assert run(ClockChooser({"m": nothing}, one_pool()), [{"id": "a", "tp": 8}]).sm_clock_mhz.tolist() == [800]


def test_what_waits_in_the_gateway_raises_clocks_before_anybody_is_late():
    chooser = ClockChooser({"m": table()}, one_pool())
    row = {"id": "a", "tp": 8, "rate": {LL: 0.5 * full_rate(800)}, "slack": 0.5}
    assert run(chooser, [row]).sm_clock_mhz.tolist() == [800]
    backlog = 5.0 * (full_rate(1980) - 0.5 * full_rate(800))  # what the highest clock clears in a tick
    assert run(chooser, [row], 1, waiting(0.8 * backlog)).sm_clock_mhz[0] == 1980
    assert run(chooser, [row], 1).sm_clock_mhz.tolist() == [800]  # gone: nothing of it is remembered


def test_more_than_can_be_cleared_shows_as_a_load_beyond_capacity():
    chooser = ClockChooser({"m": table()}, one_pool())
    row = {"id": "a", "tp": 8, "rate": {LL: 0.5 * full_rate(800)}}
    run(chooser, [row])
    choice = run(chooser, [row], 1, waiting(10.0 * full_rate(1980)))
    assert choice.sm_clock_mhz.tolist() == [1980]
    assert choice.pool_load[0] > 1.5


def test_each_pool_clears_its_share_of_what_waits():
    pools = tuple(PoolView(name, "m", LL) for name in ("much", "little", "none"))
    rates = (0.6, 0.2, 0.0)
    rows = [
        {"id": pool.name, "pool": p, "tp": 8, "rate": {LL: rate * full_rate(800)}}
        for p, (pool, rate) in enumerate(zip(pools, rates, strict=True))
    ]
    chooser = ClockChooser({"m": table()}, pools)
    before = run(chooser, rows)
    after = run(chooser, rows, 1, waiting(5.0 * 0.6 * full_rate(800)))
    assert after.sm_clock_mhz[0] > 800  # 0.6 + 0.45 of what the lowest clock carries
    assert after.sm_clock_mhz.tolist()[1:] == [800, 800]  # 0.2 + 0.15, and nothing
    assert after.pool_load[1] > before.pool_load[1]
    assert after.pool_load[2] == before.pool_load[2]


def test_what_waits_for_one_model_raises_no_clock_of_another():
    pools = one_pool("m") + one_pool("n")
    rows = [
        {"id": name, "pool": p, "tp": 8, "rate": {LL: 0.5 * full_rate(800)}} for p, name in enumerate(("of-m", "of-n"))
    ]
    chooser = ClockChooser({"m": table(), "n": table()}, pools)
    run(chooser, rows, queued=waiting(0, models=2))
    clocks = run(chooser, rows, 1, waiting(5.0 * full_rate(1200), models=2, model=1)).sm_clock_mhz
    assert clocks[0] == 800
    assert clocks[1] > 800


def test_a_class_that_waits_and_was_never_given_to_anybody_raises_nothing():
    chooser = ClockChooser({"m": table()}, one_pool())
    row = {"id": "a", "tp": 8, "rate": {LL: 0.5 * full_rate(800)}}
    run(chooser, [row])
    choice = run(chooser, [row], 1, waiting(1000, RequestClass.SS))
    assert choice.sm_clock_mhz.tolist() == [800]
    assert np.isfinite(choice.pool_load).all()


def test_slo_misses_lower_the_capacity_believed_and_spare_slack_raises_it():
    rate = {LL: 0.7 * full_rate(1200)}
    missing, sparing = (ClockChooser({"m": table()}, one_pool()) for _ in range(2))
    bad = run(missing, [{"id": "a", "tp": 8, "clock": 1200, "rate": rate, "slack": -0.2, "late": 0.2}])
    good = run(sparing, [{"id": "a", "tp": 8, "clock": 1200, "rate": rate, "slack": 0.6}])
    assert bad.capacity_factor[0] == pytest.approx(0.7)
    assert bad.sm_clock_mhz.tolist() == [1980]
    assert good.capacity_factor[0] > 1.0
    assert good.sm_clock_mhz[0] <= 1200


def test_late_requests_are_counted_however_many_come_between_two_looks():
    """An instance that serves hundreds between two looks has a late one in most of them."""
    rate = 0.7 * full_rate(1200)
    few, many = ({"id": "a", "tp": 8, "clock": 1200, "rate": {LL: rate}, "slack": -0.1} for _ in range(2))
    few["late"], many["late"] = 0.004 * rate, 0.02 * rate
    chosen = [ClockChooser({"m": table()}, one_pool()) for _ in range(2)]
    for _ in range(200):
        kept, lowered = (c.choose(300.0, views([row]), NOBODY) for c, row in zip(chosen, (few, many), strict=True))
    assert kept.capacity_factor[0] >= 1.0
    assert lowered.capacity_factor[0] == pytest.approx(0.7)


def test_a_moment_in_which_all_come_late_is_soon_forgotten():
    row = {"id": "a", "tp": 8, "clock": 1200, "rate": {LL: 0.7 * full_rate(1200)}, "slack": 0.4}
    chooser = ClockChooser({"m": table()}, one_pool())
    before = run(chooser, [row])
    row |= {"slack": -2.0, "late": 0.7 * full_rate(1200)}
    run(chooser, [row], ticks=1)
    row |= {"slack": 0.4, "late": 0.0}
    after = run(chooser, [row], ticks=24)
    assert after.capacity_factor[0] > 0.9 * before.capacity_factor[0]


def test_one_late_request_does_not_send_the_clock_to_the_top():
    chooser = ClockChooser({"m": table()}, one_pool())
    row = {"id": "a", "tp": 8, "rate": {LL: 0.4 * full_rate(800)}, "slack": 0.4}
    run(chooser, [row])
    row["slack"] = -0.5
    assert run(chooser, [row], ticks=1).sm_clock_mhz.tolist() == [800]


def test_only_ready_instances_change_and_pools_are_apart():
    rows = [
        {"id": "s", "pool": 0, "tp": 2, "clock": 1600, "state": InstanceState.STARTING},
        {"id": "d", "pool": 8, "tp": 2, "clock": 1600, "state": InstanceState.DRAINING, "rate": {LL: 0.1}},
        {"id": "r", "pool": 0, "tp": 2, "clock": 1600},
    ]
    choice = run(ClockChooser({"m": table()}, nine_pools()), rows)
    assert choice.sm_clock_mhz.tolist() == [1600, 1600, 800]
    assert np.isinf(choice.pool_load[8])  # it is given something and has nobody to serve it


def test_what_is_remembered_follows_instances_that_come_and_go():
    chooser = ClockChooser({"m": table()}, one_pool())
    a = {"id": "a", "tp": 8, "rate": {LL: full_rate(1980)}, "slack": -1.0}
    run(chooser, [a])
    choice = chooser.choose(5.0, views([{"id": "b", "tp": 8}, a]), NOBODY)
    assert choice.missed[0] == 0.0
    assert choice.missed[1] > 0.8
    assert len(chooser.choose(5.0, views([]), NOBODY).sm_clock_mhz) == 0


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 6))
def test_raising_the_cheapest_gain_first_costs_at_most_one_step_more_than_the_best(seed, n):
    rng = np.random.default_rng(seed)
    fit = np.sort(rng.uniform(0.05, 1.0, (2, 3)), axis=1)
    power = np.sort(rng.uniform(100.0, 900.0, (2, 3)), axis=1)
    kind = rng.integers(0, 2, n)
    now = rng.integers(0, 3, n)
    enough = float(rng.uniform(0.1, 1.0)) * fit[kind].max(axis=1).sum()
    step = _raise(fit, power, kind, now, enough)
    assert fit[kind, step].sum() >= enough * (1 - 1e-9)
    best = min(
        power[kind, list(steps)].sum()
        for steps in np.ndindex(*(3,) * n)
        if fit[kind, list(steps)].sum() >= enough * (1 - 1e-9)
    )
    widest = (power.max(axis=1) - power.min(axis=1)).max()
    assert power[kind, step].sum() <= best + widest + 1e-6


def test_clocks_are_those_of_the_table():
    rows = [{"id": "a", "tp": 4, "clock": 1111, "rate": {LL: 0.5}}]
    assert run(ClockChooser({"m": table()}, one_pool()), rows).sm_clock_mhz[0] in CLOCKS


def test_traffic_that_has_long_ended_counts_as_none():
    chooser = ClockChooser({"m": table()}, one_pool())
    row = {"id": "a", "tp": 8, "rate": {LL: 0.9 * full_rate(1980)}}
    run(chooser, [row])
    row["rate"] = {}
    assert run(chooser, [row], ticks=5000).sm_clock_mhz.tolist() == [800]


def test_who_may_not_turn_clocks_learns_from_misses_all_the_same():
    chooser = ClockChooser({"m": table()}, one_pool(), ClockSettings(factor_limits=(0.6, 1.0)), (1980,))
    row = {"id": "a", "tp": 8, "clock": 1980, "rate": {LL: 0.7 * full_rate(1980)}, "slack": -0.2, "late": 0.1}
    choice = run(chooser, [row])
    assert choice.sm_clock_mhz.tolist() == [1980]
    assert choice.capacity_factor[0] == pytest.approx(0.6)
    assert choice.pool_load[0] == pytest.approx(0.7 / 0.6, rel=0.02)
    row |= {"slack": 0.6, "late": 0.0}
    for _ in range(2000):
        choice = chooser.choose(5.0, views([row]), NOBODY)
    assert choice.capacity_factor[0] == pytest.approx(1.0)
