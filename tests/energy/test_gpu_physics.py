"""GpuPhysics: the clock law every profile leans on, for each board and for boards nobody has built."""

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from energy.gpus import GPUS, gpu_physics
from energy.profile import GpuState, ProfileError

boards = st.sampled_from(sorted(GPUS)).map(GPUS.__getitem__)


@st.composite
def boards_and_clocks(draw, count=2, above_knee=None):
    """A board and ascending clocks within its range; on one side of the knee if that is asked."""
    gpu = draw(boards)
    low = int(gpu.knee_mhz) if above_knee is True else gpu.min_clock_mhz
    high = int(gpu.knee_mhz) if above_knee is False else gpu.max_clock_mhz
    clock = st.integers(low, high)
    return gpu, sorted(draw(st.lists(clock, min_size=count, max_size=count)))


@pytest.mark.parametrize("name", sorted(GPUS))
class TestAtTheMaximumClock:
    """Every law is relative to the maximum clock, so there it says 1."""

    def test_nothing_is_slowed_and_nothing_saved(self, name):
        gpu = gpu_physics(name)
        top = gpu.max_clock_mhz
        assert gpu.voltage(top) == pytest.approx(1.0)
        assert gpu.dynamic_scale(top) == pytest.approx(1.0)
        assert gpu.compute_slowdown(top) == 1.0
        assert gpu.memory_slowdown(top) == pytest.approx(1.0)
        assert gpu.memory_power_scale(top) == pytest.approx(1.0)
        assert gpu.idle_w(top) == pytest.approx(gpu.loaded_w)

    def test_full_activity_stays_near_the_board_limit(self, name):
        """Arithmetic at its peak beside half the memory traffic would be cut by the limit, but not by much."""
        gpu = gpu_physics(name)
        drawn_w = gpu.loaded_w + gpu.active_w + gpu.compute_w + 0.5 * gpu.memory_w
        assert gpu.board_w < drawn_w < 1.6 * gpu.board_w


@given(boards_and_clocks())
def test_the_laws_are_monotonous_in_the_clock(drawn):
    gpu, (low, high) = drawn
    assert gpu.voltage(low) <= gpu.voltage(high)
    assert gpu.dynamic_scale(low) <= gpu.dynamic_scale(high)
    assert gpu.idle_w(low) <= gpu.idle_w(high)
    assert gpu.memory_power_scale(low) <= gpu.memory_power_scale(high)
    assert gpu.compute_slowdown(low) >= gpu.compute_slowdown(high)
    assert gpu.memory_slowdown(low) >= gpu.memory_slowdown(high)


@given(boards_and_clocks(count=1))
def test_arithmetic_suffers_more_from_a_low_clock_than_memory_traffic(drawn):
    gpu, (clock,) = drawn
    assert 1.0 - 1e-12 <= gpu.memory_slowdown(clock) <= gpu.compute_slowdown(clock) + 1e-12


@given(boards_and_clocks(above_knee=False))
def test_below_the_knee_the_voltage_is_at_its_floor_and_energy_per_operation_with_it(drawn):
    gpu, (low, high) = drawn
    assert gpu.voltage(low) == gpu.voltage(high) == gpu.floor_voltage
    per_operation = [gpu.dynamic_scale(clock) * gpu.compute_slowdown(clock) for clock in (low, high)]
    assert per_operation[0] == pytest.approx(per_operation[1])  # dynamic energy: V^2, which no longer falls


@given(boards_and_clocks(above_knee=True))
def test_above_the_knee_an_operation_costs_more_energy_the_higher_the_clock(drawn):
    gpu, (low, high) = drawn
    assume(low < high)
    costs = [gpu.dynamic_scale(clock) * gpu.compute_slowdown(clock) for clock in (low, high)]
    assert costs[0] < costs[1]


@given(boards_and_clocks(count=1))
def test_idle_states_are_ordered_whatever_clock_is_asked(drawn):
    gpu, (clock,) = drawn
    off, bare, parked, loaded = (
        gpu.state_w(state, clock) for state in (GpuState.OFF, GpuState.BARE, GpuState.PARKED, GpuState.LOADED)
    )
    assert 0.0 == off < bare < parked <= loaded <= gpu.loaded_w


@given(boards_and_clocks())
def test_a_parked_gpu_draws_the_same_whatever_clock_is_asked(drawn):
    gpu, clocks = drawn
    powers = {gpu.state_w(GpuState.PARKED, clock) for clock in clocks}
    assert powers == {gpu.idle_w(gpu.min_clock_mhz)}


class TestOfferedClocks:
    def test_the_papers_grid_on_an_h100(self):
        assert gpu_physics("H100-SXM").clocks_mhz() == (800, 1000, 1200, 1400, 1600, 1800, 1980)

    def test_an_a100_has_a_lower_maximum(self):
        assert gpu_physics("A100-80GB-SXM").clocks_mhz() == (800, 1000, 1200, 1410)

    @given(boards, st.integers(300, 1400), st.sampled_from([15, 50, 100, 200, 400]))
    def test_ascending_and_ending_at_the_maximum(self, gpu, lowest_mhz, step_mhz):
        clocks = gpu.clocks_mhz(lowest_mhz, step_mhz)
        assert list(clocks) == sorted(set(clocks))
        assert clocks[-1] == gpu.max_clock_mhz
        gaps = [b - a for a, b in pairwise(clocks)]
        assert all(gap == step_mhz for gap in gaps[:-1])
        assert all(gap >= step_mhz // 2 for gap in gaps[-1:])  # none that differs from the maximum in name only


def test_the_h200_is_the_h100_with_other_memory():
    h100, h200 = gpu_physics("H100-SXM"), gpu_physics("H200-SXM")
    same = replace(
        h200,
        name=h100.name,
        memory_bytes=h100.memory_bytes,
        bandwidth_bytes_per_s=h100.bandwidth_bytes_per_s,
        bare_w=h100.bare_w,
        idle_origin=h100.idle_origin,
    )
    assert same == h100
    assert h200.bandwidth_bytes_per_s / h100.bandwidth_bytes_per_s == pytest.approx(1.43, abs=0.01)


def test_an_unknown_board_is_refused_with_the_known_ones():
    with pytest.raises(ProfileError, match=r"unknown GPU 'B200'; known: H100-SXM, H200-SXM, A100-80GB-SXM"):
        gpu_physics("B200")
