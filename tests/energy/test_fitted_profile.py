"""FittedProfile: every shipped profile behaves like a GPU, and refuses what it does not hold."""

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from energy.adapters.catalogue import load_profile, profile_names
from energy.profile import GpuState, ProfileRangeError, step_power_w, step_time_s

PROFILES = {name: load_profile(name) for name in profile_names()}
names = st.sampled_from(sorted(PROFILES))
batches = st.tuples(st.integers(0, 8192), st.integers(0, 8192), st.integers(0, 256), st.integers(0, 4096)).map(
    lambda b: (float(b[0]), b[0] * (b[1] + b[0] / 2), float(b[2]), float(b[2] * b[3]))
)


@settings(deadline=None)
@given(names, batches, batches, st.data())
def test_a_step_never_gets_shorter_as_the_batch_grows(name, batch, more, data):
    profile = PROFILES[name]
    c = profile.step(
        data.draw(st.sampled_from(profile.tensor_parallel)), data.draw(st.sampled_from(profile.sm_clocks_mhz))
    )
    grown = tuple(a + b for a, b in zip(batch, more, strict=True))
    assert step_time_s(c, *grown) >= step_time_s(c, *batch)


@settings(deadline=None)
@given(names, batches, st.data())
def test_a_higher_clock_is_never_slower_and_never_draws_less(name, batch, data):
    profile = PROFILES[name]
    tp = data.draw(st.sampled_from(profile.tensor_parallel))
    low, high = sorted(data.draw(st.tuples(st.floats(500, 1410), st.floats(500, 1410))))
    slow, fast = profile.step(tp, low), profile.step(tp, high)
    assert step_time_s(fast, *batch) <= step_time_s(slow, *batch) * (1 + 1e-12)
    assert step_power_w(fast, *batch) >= step_power_w(slow, *batch) * (1 - 1e-12)


@settings(deadline=None)
@given(names, batches, st.data())
def test_power_lies_between_idle_and_the_board_limit(name, batch, data):
    profile = PROFILES[name]
    c = profile.step(
        data.draw(st.sampled_from(profile.tensor_parallel)), data.draw(st.sampled_from(profile.sm_clocks_mhz))
    )
    assert c.idle_w <= step_power_w(c, *batch) <= c.max_w
    assert c.idle_w == pytest.approx(profile.idle_power_w(GpuState.LOADED, profile.sm_clocks_mhz[-1]), rel=0.5)


@pytest.mark.parametrize("name", sorted(PROFILES))
def test_more_gpus_make_a_step_shorter_and_hold_more_tokens(name):
    profile = PROFILES[name]
    clock = profile.sm_clocks_mhz[-1]
    prefill = [step_time_s(profile.step(tp, clock), 2048.0, 2048.0**2 / 2, 0.0, 0.0) for tp in profile.tensor_parallel]
    assert prefill == sorted(prefill, reverse=True)
    held = [profile.kv_capacity_tokens(tp) for tp in profile.tensor_parallel]
    assert held == sorted(held)
    assert held[0] > 0


@pytest.mark.parametrize("name", sorted(PROFILES))
def test_power_of_a_gpu_that_runs_nothing_falls_from_loaded_to_off(name):
    profile = PROFILES[name]
    clock = profile.sm_clocks_mhz[-1]
    loaded, parked, bare, off = (
        profile.idle_power_w(state, clock) for state in (GpuState.LOADED, GpuState.PARKED, GpuState.BARE, GpuState.OFF)
    )
    assert loaded > parked > bare > off == 0.0


def test_the_same_functions_run_on_arrays_and_compiled():
    profile = PROFILES["llama-3.1-70b-fp8-h100"]
    c = profile.step(4, 1400)
    seqs = np.array([1.0, 16.0, 64.0])
    zeros = np.zeros(3)
    as_arrays = step_power_w(c, zeros, zeros, seqs, seqs * 700)
    one_by_one = [step_power_w(c, 0.0, 0.0, n, n * 700) for n in seqs]
    compiled = numba.njit(step_time_s)
    assert as_arrays == pytest.approx(one_by_one)
    assert compiled(c, 512.0, 512.0**2 / 2, 8.0, 5600.0) == pytest.approx(
        step_time_s(c, 512.0, 512.0**2 / 2, 8.0, 5600.0)
    )


def test_what_a_profile_does_not_hold_is_refused_by_name():
    profile = PROFILES["llama-3.1-70b-fp8-h100"]
    with pytest.raises(ProfileRangeError, match="TP 2, 4, 8, not TP 3"):
        profile.step(3, 1980)
    with pytest.raises(ProfileRangeError, match=r"345\.\.1980 MHz, not 2500"):
        profile.step(4, 2500)
    with pytest.raises(ProfileRangeError):
        profile.idle_power_w(GpuState.LOADED, 100)
