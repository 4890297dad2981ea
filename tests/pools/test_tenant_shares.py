"""TenantShares: nobody holds more than a quarter of what all read, unless there is nobody else."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pools.tenant_shares import ALONE, TENANTS, TenantShares


def held(shares):
    snapshot = shares.snapshot()
    return dict(snapshot["held"]), snapshot["total"]


def test_a_tenant_alone_counts_fully():
    shares = TenantShares()
    assert {shares.weigh("one") for _ in range(3000)} == {1.0}


def test_equals_count_alike():
    shares = TenantShares()
    weights = dict.fromkeys("abcdefgh", 0.0)
    for n in range(16_000):
        name = "abcdefgh"[n % 8]
        weights[name] += shares.weigh(name)
    assert max(weights.values()) < 1.05 * min(weights.values())
    assert min(weights.values()) > 0.9 * 2000


def test_a_flood_is_held_to_its_share():
    shares = TenantShares(half_life=4000, floor=100.0)
    random = np.random.default_rng(0)
    for _ in range(40_000):
        shares.weigh("flood" if random.random() < 0.9 else f"small {random.integers(9)}")
    mass, total = held(shares)
    assert mass["flood"] <= max(0.26 * total, 100.0 + 1.0)


def test_who_came_first_gives_way():
    shares = TenantShares(half_life=1000, floor=50.0)
    for _ in range(5000):
        shares.weigh("first")
    before = held(shares)[0]["first"]
    for _ in range(6000):
        shares.weigh("first")
        shares.weigh("second")
    mass, _ = held(shares)
    assert mass["first"] < 0.2 * before
    assert mass["first"] == pytest.approx(mass["second"], rel=0.2)


@given(st.lists(st.sampled_from("abc"), max_size=400))
def test_weights_are_shares_and_sum_to_the_total(names):
    shares = TenantShares(half_life=50, floor=5.0)
    for name in names:
        assert 0.0 <= shares.weigh(name) <= 1.0
    mass, total = held(shares)
    assert sum(mass.values()) == pytest.approx(total)


def test_memory_is_bounded_and_survives():
    shares = TenantShares()
    for n in range(TENANTS + 100):
        shares.weigh(f"tenant {n}")
    again = TenantShares()
    again.restore(json.loads(json.dumps(shares.snapshot())))
    for before, after in zip(held(shares), held(again), strict=True):
        assert after == pytest.approx(before)
    assert len(held(again)[0]) == TENANTS
    assert ALONE < TENANTS
