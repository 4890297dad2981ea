"""The capacity builder: its compiled engine is the Engine, its rates keep the SLO, the shipped tables are its own."""

import numpy as np
import pytest

from benchmarks.profile_table import shipped_traffic
from energy.adapters.capacity_file import load_capacity
from energy.adapters.catalogue import load_profile, profile_names
from energy.profile import step_power_w, step_time_s
from pools.classes import ClassSlos, RequestClass
from simulator.alone import gap_quantile_s, serve_alone
from simulator.capacity import (
    ATTAINMENT,
    ClassTraffic,
    build_capacity,
    engine_limits,
    fingerprint,
    highest_rate_rps,
    observe,
)
from simulator.engine import Engine, EngineLimits

PROFILE = load_profile("llama-3.1-70b-fp8-h100")
C = PROFILE.step(4, 1400)


@pytest.fixture(scope="module")
def traffic() -> tuple[ClassTraffic, ...]:
    return shipped_traffic()


def some_requests(count: int, rate_rps: float, seed: int):
    rng = np.random.default_rng(seed)
    arrival_s = np.cumsum(rng.exponential(1 / rate_rps, count))
    return arrival_s, rng.integers(1, 3000, count), rng.integers(1, 400, count)


def step_through(limits: EngineLimits, arrival_s, inputs, outputs):
    """First and last token times and energy per GPU, by the interpreted Engine, one step at a time."""
    engine = Engine(limits, C)
    first, last = {}, {}
    now_s = energy_j = 0.0
    arrived = 0
    while len(last) < len(arrival_s) or engine.running or engine.waiting:
        while arrived < len(arrival_s) and arrival_s[arrived] <= now_s:
            engine.submit(arrived, int(inputs[arrived]), int(outputs[arrived]), float(arrival_s[arrived]))
            arrived += 1
        step = engine.start_step(now_s)
        if step is None:
            if arrived == len(arrival_s):
                break
            energy_j += C.idle_w * (arrival_s[arrived] - now_s)
            now_s = float(arrival_s[arrived])
            continue
        energy_j += step.power_w * step.duration_s
        now_s += step.duration_s
        for request in engine.finish_step().emitted:
            first.setdefault(request, now_s)
            last[request] = now_s
    return first, last, energy_j


@pytest.mark.parametrize(("kv_blocks", "rate_rps"), [(50_000, 2.0), (50_000, 12.0), (900, 6.0)])
def test_the_compiled_engine_is_the_engine(kv_blocks, rate_rps):
    limits = EngineLimits(kv_blocks=kv_blocks)
    arrival_s, inputs, outputs = some_requests(120, rate_rps, seed=7)
    marks = serve_alone(C, limits, arrival_s, inputs, outputs, counted_from=0)
    first, last, _ = step_through(limits, arrival_s, inputs, outputs)
    ttft_s = np.array([first[i] for i in range(120)]) - arrival_s
    assert marks.first_s - arrival_s == pytest.approx(ttft_s, rel=0.01, abs=1e-3)
    assert marks.last_s == pytest.approx([last[i] for i in range(120)], rel=0.01)
    assert marks.gaps.sum() == pytest.approx(outputs.sum() - 120)


def test_energy_is_that_of_idling_plus_that_of_the_steps():
    arrival_s = np.array([0.5, 10.0])
    marks = serve_alone(C, EngineLimits(kv_blocks=1000), arrival_s, np.array([64, 64]), np.array([2, 2]), 0)
    steps = [(64.0, 64.0**2 / 2, 0.0, 0.0), (0.0, 0.0, 1.0, 65.0)]
    busy_s = sum(step_time_s(C, *step) for step in steps)
    busy_j = sum(step_time_s(C, *step) * step_power_w(C, *step) for step in steps)
    expected_j = busy_j + C.idle_w * (9.5 - busy_s)
    assert marks.energy_j[1] - marks.energy_j[0] == pytest.approx(expected_j, rel=1e-6)


def test_the_gap_quantile_is_within_a_bucket_of_the_exact_one():
    arrival_s, inputs, outputs = some_requests(1, 1.0, seed=3)
    outputs[:] = 200
    marks = serve_alone(C, EngineLimits(kv_blocks=5000), arrival_s, inputs, outputs, 0)
    mean_gap_s = (marks.last_s[0] - marks.first_s[0]) / 199
    assert gap_quantile_s(marks.gaps, 0.5) == pytest.approx(mean_gap_s, rel=0.05)


@pytest.mark.parametrize("request_class", [RequestClass.SS, RequestClass.ML, RequestClass.LL])
def test_the_highest_rate_keeps_the_slo_and_a_fifth_more_does_not(traffic, request_class):
    limits = engine_limits(PROFILE, 4)
    rate_rps = highest_rate_rps(C, limits, traffic[request_class])
    assert observe(C, limits, traffic[request_class], rate_rps).attainment >= ATTAINMENT
    assert observe(C, limits, traffic[request_class], 1.2 * rate_rps).attainment < ATTAINMENT


def test_a_class_that_misses_its_slo_alone_or_does_not_fit_the_cache_is_not_carried(traffic):
    slow = traffic[RequestClass.LL]
    impossible = ClassTraffic(
        "XX", slow.unit_arrival_s, slow.input_tokens, slow.output_tokens, slow.ttft_slo_s / 1e3, 0.1
    )
    assert highest_rate_rps(C, engine_limits(PROFILE, 4), impossible) == 0.0
    assert highest_rate_rps(C, EngineLimits(kv_blocks=64), slow) == 0.0


def test_power_never_falls_below_idle_and_grows_with_load(traffic):
    table = build_small(traffic)
    for i, clock in enumerate(table.sm_clocks_mhz):
        power_w = table.power[0, i, 0]
        assert power_w[0] == pytest.approx(8 * PROFILE.step(8, clock).idle_w)
        assert (np.diff(power_w) > 0).all()


def test_a_higher_clock_carries_no_less(traffic):
    assert (np.diff(build_small(traffic).max_rate, axis=1) >= 0).all()


_SMALL: dict[str, object] = {}


def build_small(traffic):
    """A table of one TP and one class, built once."""
    if not _SMALL:

        class OneTp:
            name = PROFILE.name
            tensor_parallel = (8,)
            sm_clocks_mhz = (800, 1400, 1980)
            step = staticmethod(PROFILE.step)
            kv_capacity_tokens = staticmethod(PROFILE.kv_capacity_tokens)

        _SMALL["table"] = build_capacity(OneTp(), traffic[RequestClass.MS : RequestClass.MM], loads=(0.0, 0.5, 1.0))
    return _SMALL["table"]


@pytest.mark.parametrize("name", profile_names())
def test_shipped_tables_were_built_from_the_profiles_as_they_are(name, traffic):
    assert load_capacity(name).fingerprint == fingerprint(load_profile(name), traffic), (
        f"stale: run `python -m benchmarks.profile_table capacity {name}`"
    )


@pytest.mark.parametrize("name", profile_names())
def test_a_few_recomputed_cells_agree_with_the_shipped_table(name, traffic):
    profile, table = load_profile(name), load_capacity(name)
    rng = np.random.default_rng(5)
    for _ in range(3):
        t, i, k = (int(rng.integers(n)) for n in table.max_rate.shape)
        tp, clock = table.tps[t], table.sm_clocks_mhz[i]
        c, limits = profile.step(tp, clock), engine_limits(profile, tp)
        rate_rps = table.max_rate[t, i, k]
        if rate_rps == 0:
            assert highest_rate_rps(c, limits, traffic[k]) == 0.0
            continue
        seen = observe(c, limits, traffic[k], rate_rps)
        assert seen.attainment >= ATTAINMENT - 0.002  # the rate is stored with seven digits
        assert tp * seen.power_w == pytest.approx(table.power[t, i, k, -1], rel=0.01)
        assert seen.ttft_p99_s == pytest.approx(table.ttft_p99[t, i, k, -1], rel=0.05)
        assert seen.tbt_p99_s == pytest.approx(table.tbt_p99[t, i, k, -1], rel=0.02)


def test_every_class_is_carried_by_some_instance_of_every_shipped_profile():
    for name in profile_names():
        table = load_capacity(name)
        assert (table.max_rate.max(axis=(0, 1)) > 0).all(), name
        assert [each.label for each in table.classes] == [request_class.name for request_class in RequestClass]
        assert [each.tbt_slo_s for each in table.classes] == [ClassSlos().tbt_s] * 9


@pytest.mark.parametrize("name", profile_names())
def test_feasibility_is_monotone_and_power_above_idle_in_every_shipped_cell(name):
    profile, table = load_profile(name), load_capacity(name)
    assert (np.diff(table.max_rate, axis=1) >= 0).all()  # a higher clock never carries less
    carried = table.max_rate > 0
    slo_s = np.array([[each.ttft_slo_s, each.tbt_slo_s] for each in table.classes])
    assert (table.ttft_p50[..., -1][carried] <= np.broadcast_to(slo_s[:, 0], carried.shape)[carried]).all()
    assert (table.tbt_p99[..., -1][carried] <= 1.01 * np.broadcast_to(slo_s[:, 1], carried.shape)[carried]).all()
    for t, tp in enumerate(table.tps):
        for i, clock in enumerate(table.sm_clocks_mhz):
            idle_w, most_w = (tp * getattr(profile.step(tp, clock), field) for field in ("idle_w", "max_w"))
            assert (table.power[t, i] >= idle_w * 0.999).all()
            assert (table.power[t, i] <= most_w * 1.001).all()
