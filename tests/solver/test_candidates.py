from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tables import CLOCKS, TPS, nine_pools, one_pool, table

from pools.classes import REQUEST_CLASSES, RequestClass
from pools.view import PoolView
from solver.candidates import Knobs, _useful, candidates


def test_every_pool_has_a_group_for_each_tp_and_only_dominated_classes_may_use_it():
    c = candidates({"m": table()}, nine_pools(), Knobs())
    assert len(c.group_pool) == 9 * len(TPS)
    for g, p in enumerate(c.group_pool):
        for k in REQUEST_CLASSES:
            if np.isfinite(c.work[k, g]):
                assert c.pools[p].request_class.dominates(k)


def test_work_is_counted_in_the_pools_own_requests():
    c = candidates({"m": table()}, one_pool(), Knobs())
    assert c.work[RequestClass.LL] == pytest.approx(1.0)
    assert np.all(c.work[RequestClass.LS] < 1.0)


def test_a_class_may_not_wait_behind_a_prefill_longer_than_its_slo():
    t = table()
    slow = np.where(np.arange(9)[None, None, :, None] // 3 == 2, 0.5, t.ttft_p99)  # long inputs: half a second
    with_slow = type(t)(**{f: getattr(t, f) for f in t.__dataclass_fields__} | {"ttft_p99": slow})
    c = candidates({"m": with_slow}, (*one_pool(), PoolView("SL", "m", RequestClass.SL)), Knobs())
    in_all = c.group_pool == 0
    assert np.all(np.isinf(c.work[RequestClass.SS, in_all]))
    assert np.all(np.isfinite(c.work[RequestClass.SS, ~in_all]))
    assert np.all(np.isfinite(c.work[RequestClass.LS, in_all]))


def test_headroom_and_knobs_limit_what_a_plan_may_count_on():
    t = table()
    whole = candidates({"m": t}, one_pool(), Knobs(headroom=0.0))
    part = candidates({"m": t}, one_pool(), Knobs(headroom=0.2, tps=(8,), sm_clocks_mhz=(1980,)))
    assert part.point_capacity.max() == pytest.approx(0.8 * whole.point_capacity.max())
    assert set(part.point_clock_mhz) == {1980}
    assert part.shape_tp.tolist() == [8]
    assert part.group_peak.tolist() == pytest.approx([whole.group_peak.max()])  # the reserve counts on all of it


def test_without_dominating_pools_each_class_keeps_to_the_nearest():
    c = candidates({"m": table()}, nine_pools(), Knobs(dominating=False))
    for k in REQUEST_CLASSES:
        assert {int(c.group_pool[g]) for g in np.flatnonzero(np.isfinite(c.work[k]))} == {int(k)}


def test_models_share_axes_but_not_groups():
    c = candidates({"a": table(), "b": table()}, (*nine_pools("a"), *one_pool("b")), Knobs())
    of_b = np.array([c.pools[p].model == "b" for p in c.group_pool])
    assert np.all(np.isinf(c.work[:9, of_b]))
    assert np.all(np.isinf(c.work[9:, ~of_b]))
    assert c.demand_names[9] == "b/SS"
    assert c.shape_of(1, 8) != c.shape_of(0, 8)
    with pytest.raises(ValueError, match="no candidate of model a has TP16"):
        c.shape_of(0, 16)


def test_what_does_not_fit_together_is_refused_by_name():
    with pytest.raises(ValueError, match="no capacity table for other"):
        candidates({"m": table()}, (*one_pool(), PoolView("x", "other", RequestClass.LL)), Knobs())
    with pytest.raises(ValueError, match=r"holds for TP \(2, 4, 8\), not \[3\]"):
        candidates({"m": table()}, one_pool(), Knobs(tps=(3,)))


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 2**31), st.booleans())
def test_points_left_out_are_never_missed(seed, shared):
    """Whatever capacity is asked of one instance, the points kept give it for as little power as all of them."""
    rng = np.random.default_rng(seed)
    capacity, power = rng.uniform(0.1, 2.0, 30), rng.uniform(100.0, 900.0, 30)
    kept = _useful(capacity, power, shared)
    assert np.all(np.diff(capacity[kept]) > 0)
    assert np.all(np.diff(power[kept]) > 0)
    for want in rng.uniform(0.1, capacity.max(), 10):
        if not shared:
            assert power[kept][capacity[kept] >= want].min() == power[capacity >= want].min()
            continue
        # taking turns between two points of all is never cheaper than between two that were kept
        best = (
            min(
                (
                    power[j]
                    if capacity[i] == capacity[j]
                    else np.interp(want, [capacity[i], capacity[j]], [power[i], power[j]])
                )
                for i in range(30)
                for j in range(30)
                if capacity[i] <= want <= capacity[j]
            )
            if np.any(capacity <= want)
            else np.inf
        )
        best = min(best, power[capacity >= want].min())
        hull = np.interp(want, capacity[kept], power[kept])
        assert hull <= best * (1 + 1e-9)


def test_clocks_that_only_cost_more_are_left_out():
    c = candidates({"m": table()}, one_pool(), Knobs())
    assert set(c.point_clock_mhz) <= set(CLOCKS)
    energy = c.point_power_w / c.point_capacity
    assert np.all(energy > 0)


def slow_prompts(p99_s):
    """The table, on which the longest prompts of every class take this long."""
    t = table()
    return replace(t, ttft_p50=0.1 * t.ttft_p50, ttft_p99=np.full_like(t.ttft_p99, p99_s))


def pools_of(c, k):
    return {c.pools[c.group_pool[g]].request_class for g in np.flatnonzero(np.isfinite(c.work[k]))}


def test_a_class_shares_an_instance_only_where_it_is_in_time_behind_one_of_its_longest_prompts():
    quick, slow = (candidates({"m": slow_prompts(s)}, nine_pools(), Knobs()) for s in (0.05, 1.0))
    for k in REQUEST_CLASSES:
        assert pools_of(quick, k) == {p for p in REQUEST_CLASSES if p.dominates(k)}
        alike = {p for p in REQUEST_CLASSES if p.dominates(k) and p.input_size == k.input_size}
        assert pools_of(slow, k) == alike


def test_a_class_that_is_in_time_nowhere_still_has_the_nearest_pool():
    two = tuple(PoolView(k.name, "m", k) for k in (RequestClass.MM, RequestClass.LL))
    c = candidates({"m": slow_prompts(1.0)}, two, Knobs())
    assert pools_of(c, RequestClass.SS) == {RequestClass.MM}
    assert pools_of(c, RequestClass.SL) == {RequestClass.LL}
    assert pools_of(candidates({"m": slow_prompts(9.0)}, one_pool(), Knobs()), RequestClass.SS) == {RequestClass.LL}
