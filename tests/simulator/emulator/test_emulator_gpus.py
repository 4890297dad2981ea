"""Emulated GPUs: energy that adds up and never falls, clocks that exist, one engine a board."""

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from energy.gpus import gpu_physics
from simulator.emulator.gpus import GpuHeldError, NoSuchGpuError, PowerMeter, make_node
from simulator.emulator.telemetry import dcgm_text

H100 = gpu_physics("H100-SXM")


@dataclass
class Holder:
    id: str = "i-0"
    changes: int = 0

    def on_clock_change(self) -> None:
        self.changes += 1


def test_energy_of_idle_and_busy_time_adds_up():
    meter = PowerMeter(10.0, 100.0)
    assert meter.energy_j(11.0) == pytest.approx(100.0)
    meter.step(12.0, 3.0, 400.0)
    assert meter.energy_j(13.0) == pytest.approx(200.0 + 400.0)
    assert meter.energy_j(20.0) == pytest.approx(200.0 + 1200.0 + 500.0)
    meter.step(15.0, 1.0, 300.0)
    assert meter.energy_j(20.0) == pytest.approx(200.0 + 1200.0 + 300.0 + 400.0)


def test_a_step_that_is_cut_stops_drawing():
    meter = PowerMeter(0.0, 100.0)
    meter.step(0.0, 10.0, 500.0)
    meter.cut(4.0)
    assert meter.energy_j(10.0) == pytest.approx(2000.0 + 600.0)


def test_idle_power_changes_from_then_on_and_not_within_a_step():
    meter = PowerMeter(0.0, 100.0)
    meter.step(0.0, 2.0, 500.0)
    meter.set_idle(1.0, 50.0)
    assert meter.energy_j(4.0) == pytest.approx(1000.0 + 100.0)


def test_power_is_a_mean_over_about_a_second():
    meter = PowerMeter(0.0, 100.0)
    for number in range(40):
        meter.step(number * 0.1, 0.05, 500.0)
    assert meter.power_w(4.0) == pytest.approx(300.0, rel=0.05)
    assert meter.power_w(6.0) == 100.0


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["step", "idle", "lock", "take", "leave", "read", "off", "on"]),
            st.floats(0.0, 5.0),
            st.floats(0.0, 2.0),
        ),
        max_size=40,
    )
)
def test_the_energy_counter_never_decreases_and_is_at_least_off_power(events):
    node = make_node("node-0", 1, H100, 0.0)
    gpu, meter, now_s, last_mj = node.gpus[0], PowerMeter(0.0, 100.0), 0.0, 0
    free_s = 0.0  # end of the last step: steps of one engine do not overlap
    for kind, pause_s, length_s in events:
        now_s += pause_s
        if kind == "take" and gpu.holder is None and gpu.powered:
            node.take([0], Holder(), meter, now_s)
        elif kind == "leave" and gpu.holder is not None:
            meter.cut(now_s)
            free_s = now_s
            gpu.detach(now_s)
        elif kind == "step":
            # it may begin in the past: where the step before ended, while the loop was late
            meter.step(max(free_s, now_s - 0.3), length_s, 100.0 + 600.0 * length_s)
            free_s = max(free_s, now_s - 0.3) + length_s
        elif kind == "idle":
            meter.set_idle(now_s, 100.0 - 10.0 * length_s)
        elif kind == "lock":
            gpu.lock(1000.0 * length_s)
        elif kind in ("on", "off") and gpu.holder is None:
            node.set_power(kind == "on", now_s)
        energy_mj = gpu.energy_mj(now_s)
        assert energy_mj >= last_mj
        last_mj = energy_mj


def test_loaded_idle_energy_is_power_times_time():
    node = make_node("node-0", 2, H100, 0.0)
    meter = PowerMeter(0.0, 121.7)
    node.take([1], Holder(), meter, 100.0)
    assert node.gpus[0].energy_mj(200.0) == pytest.approx(200 * H100.bare_w * 1000)
    assert node.gpus[1].energy_mj(200.0) == pytest.approx((100 * H100.bare_w + 100 * 121.7) * 1000)
    node.gpus[1].detach(200.0)
    assert node.gpus[1].energy_mj(300.0) == pytest.approx((200 * H100.bare_w + 100 * 121.7) * 1000)


def test_two_gpus_of_one_engine_draw_alike():
    node = make_node("node-0", 8, H100, 0.0)
    meter = PowerMeter(0.0, 100.0)
    node.take([2, 3], Holder(), meter, 5.0)
    meter.step(6.0, 2.0, 600.0)
    assert node.gpus[2].energy_mj(9.0) == node.gpus[3].energy_mj(9.0)
    assert node.gpus[2].energy_mj(9.0) == pytest.approx((5 * H100.bare_w + 2 * 100 + 2 * 600) * 1000)


@given(st.floats(0.0, 5000.0))
def test_a_clock_is_snapped_to_the_nearest_supported_one(asked_mhz):
    gpu = make_node("node-0", 1, H100, 0.0).gpus[0]
    clock_mhz = gpu.lock(asked_mhz)
    supported = range(H100.min_clock_mhz, H100.max_clock_mhz + 1, H100.clock_step_mhz)
    assert clock_mhz in supported
    assert abs(clock_mhz - asked_mhz) == pytest.approx(min(abs(c - asked_mhz) for c in supported))


def test_a_lock_tells_the_engine_and_outlives_it():
    node = make_node("node-0", 1, H100, 0.0)
    gpu, holder = node.gpus[0], Holder()
    node.take([0], holder, PowerMeter(0.0, 100.0), 0.0)
    gpu.lock(1200)
    assert holder.changes == 1
    gpu.detach(1.0)
    assert gpu.sm_clock_mhz == 1200
    gpu.lock(None)
    assert gpu.sm_clock_mhz == H100.max_clock_mhz


def test_a_gpu_is_held_once_and_all_or_none_are_taken():
    node = make_node("node-0", 4, H100, 0.0)
    meter = PowerMeter(0.0, 100.0)
    node.take([0, 1], Holder("first"), meter, 0.0)
    with pytest.raises(GpuHeldError, match=r"GPU 1 of node node-0 .* first holds it"):
        node.take([2, 1], Holder("second"), meter, 0.0)
    assert node.gpus[2].holder is None
    with pytest.raises(NoSuchGpuError, match=r"0\.\.3, not 4"):
        node.take([3, 4], Holder("second"), meter, 0.0)
    with pytest.raises(GpuHeldError, match="runs instances"):
        node.set_power(False, 0.0)


def test_a_node_that_is_off_draws_nothing_and_starts_nothing():
    node = make_node("node-0", 1, H100, 0.0)
    node.set_power(False, 10.0)
    before_mj = node.gpus[0].energy_mj(10.0)
    assert node.gpus[0].energy_mj(1000.0) == before_mj
    with pytest.raises(NoSuchGpuError, match="powered off"):
        node.take([0], Holder(), PowerMeter(0.0, 100.0), 20.0)
    assert b'gpu="0"' not in dcgm_text(node.gpus, 20.0)
    node.set_power(True, 20.0)
    assert node.gpus[0].energy_mj(30.0) == before_mj + round(10 * H100.bare_w * 1000)


def test_readings_go_out_under_dcgms_names():
    node = make_node("node-3", 2, H100, 0.0)
    node.take([1], Holder("i-7"), PowerMeter(0.0, 121.7), 0.0)
    node.gpus[1].lock(1410)
    families = {f.name: f for f in text_string_to_metric_families(dcgm_text(node.gpus, 10.0).decode())}
    clocks = {s.labels["gpu"]: s for s in families["DCGM_FI_DEV_SM_CLOCK"].samples}
    assert (clocks["0"].value, clocks["1"].value) == (1980, 1410)
    assert clocks["1"].labels["hostname"] == "node-3"
    assert clocks["1"].labels["UUID"].startswith("GPU-")
    power = [s.value for s in families["DCGM_FI_DEV_POWER_USAGE"].samples]
    assert power == [H100.bare_w, 121.7]
    energy = [s.value for s in families["DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION"].samples]
    assert energy == [10 * H100.bare_w * 1000, 1217000]
