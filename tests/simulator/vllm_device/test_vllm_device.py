"""The emulated device under a real vLLM: batches, pacing, boards shared by two processes, power and clocks."""

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from energy.adapters.catalogue import load_profile
from energy.gpu import ClockLock, ClockRangeError
from energy.gpus import GPUS
from energy.profile import GpuState, step_power_w, step_time_s
from simulator.vllm_device.adapters.board import BoardFile, Meter
from simulator.vllm_device.adapters.device import BOARDS, PROFILE, EmulatedDevice
from simulator.vllm_device.adapters.gpus import BoardNode
from simulator.vllm_device.batches import Batch, Batches
from simulator.vllm_device.pacing import SEAMLESS_S, Pace

H100 = GPUS["H100-SXM"]
NAME = "llama-3.1-70b-fp8-h100"


# --- batches ---------------------------------------------------------------------------------------------------------


def test_a_prompt_prefills_and_then_decodes():
    batches = Batches()
    assert batches.step({"a": 100}, {"a": 0}, {"a": 100}, ()) == Batch(100, 5000.0, 0, 0)
    assert batches.step({}, {"a": 100}, {"a": 1}, ()) == Batch(0, 0.0, 1, 101)
    assert batches.step({}, {"a": 101}, {"a": 1}, ()) == Batch(0, 0.0, 1, 102)


def test_a_chunk_attends_to_what_is_before_it_and_cached_prefixes_are_not_computed():
    batches = Batches()
    assert batches.step({"a": 300}, {"a": 128}, {"a": 100}, ()) == Batch(100, 100 * (128 + 50), 0, 0)
    assert batches.step({}, {"a": 228}, {"a": 72}, ()) == Batch(72, 72 * (228 + 36), 0, 0)


def test_the_last_token_of_a_prompt_alone_is_prefill():
    batches = Batches()
    batches.step({"a": 11}, {"a": 0}, {"a": 10}, ())
    assert batches.step({}, {"a": 10}, {"a": 1}, ()) == Batch(1, 10.5, 0, 0)


def test_a_name_may_be_used_again_when_its_request_has_ended():
    batches = Batches()
    batches.step({"a": 50}, {"a": 0}, {"a": 50}, ())
    batches.step({"b": 2}, {"b": 0}, {"b": 2}, ("a",))
    assert batches.step({"a": 5}, {"a": 0}, {"a": 5}, ("b",)).prefill_tokens == 5


@given(st.dictionaries(st.text(min_size=1, max_size=3), st.integers(1, 500), min_size=1, max_size=20))
def test_every_token_scheduled_is_in_the_batch(prompts):
    batches = Batches()
    first = batches.step(prompts, dict.fromkeys(prompts, 0), prompts, ())
    then = batches.step({}, prompts, dict.fromkeys(prompts, 1), prompts)
    assert (first.prefill_tokens, first.decode_seqs) == (sum(prompts.values()), 0)
    assert (then.prefill_tokens, then.decode_seqs) == (0, len(prompts))
    assert then.context_tokens == sum(prompts.values()) + len(prompts)


# --- pacing ----------------------------------------------------------------------------------------------------------


def test_a_busy_engine_keeps_the_profiles_pace_whatever_its_host_needs_between_steps():
    pace, now_s = Pace(), 5.0
    for step in range(1, 101):
        due_s = pace.end(pace.begin(now_s), 0.02)
        assert due_s == pytest.approx(5.0 + 0.02 * step)
        now_s = due_s + 0.9 * SEAMLESS_S


def test_after_a_pause_or_when_the_host_is_too_slow_a_step_begins_when_it_is_asked_for():
    pace = Pace()
    pace.end(pace.begin(1.0), 0.02)
    assert pace.begin(1.02 + 1.1 * SEAMLESS_S) == 1.02 + 1.1 * SEAMLESS_S
    assert pace.begin(1.01) == 1.01


# --- boards ----------------------------------------------------------------------------------------------------------


@given(
    st.lists(st.floats(0, 10), min_size=2, max_size=5),
    st.floats(0, 700),
    st.floats(0, 200),
    st.floats(0, 5),
    st.floats(0, 5),
)
def test_energy_never_decreases_and_lies_between_idle_and_busy(times, busy_w, idle_w, begins_s, lasts_s):
    meter = Meter(1.0, 7.0, 1.0 + begins_s, 1.0 + begins_s + lasts_s, busy_w, idle_w)
    read = [meter.energy_at_j(1.0 + t) for t in sorted(times)]
    assert read == sorted(read) or max(read) - min(read) < 1e-6
    for t, energy_j in zip(sorted(times), read, strict=True):
        assert 7.0 + min(busy_w, idle_w) * t - 1e-6 <= energy_j <= 7.0 + max(busy_w, idle_w) * t + 1e-6


def test_a_board_is_the_same_in_another_process(tmp_path):
    BoardFile.make(tmp_path / "n-0.board", 1.0, 70.0).lock_mhz = (345, 1200)
    program = (
        "import sys; from pathlib import Path; from dataclasses import replace;"
        "from simulator.vllm_device.adapters.board import BoardFile;"
        "b = BoardFile(Path(sys.argv[1])); print(b.lock_mhz);"
        "b.write_meter(replace(b.read_meter(), energy_j=12.5, engine_pid=7))"
    )
    board = BoardFile(tmp_path / "n-0.board")
    told = subprocess.run(
        [sys.executable, "-c", program, str(board.path)], capture_output=True, text=True, check=True
    ).stdout
    assert told.strip() == "(345, 1200)"
    assert (board.read_meter().energy_j, board.read_meter().engine_pid) == (12.5, 7)


def test_a_meter_left_half_written_is_told_with_its_file(tmp_path):
    board = BoardFile.make(tmp_path / "n-0.board", 1.0, 70.0)
    board._map[64] = 1
    with pytest.raises(OSError, match=r"n-0\.board"):
        board.read_meter()
    board.write_meter(Meter(1.0, 2.0, 0.0, 0.0, 0.0, 70.0))
    assert board.read_meter().energy_j == 2.0


# --- the GPUs and the device on them ---------------------------------------------------------------------------------


@pytest.fixture
def node(tmp_path):
    node = BoardNode("n", 8, H100, tmp_path)
    yield node
    node.close()


@pytest.fixture
def device(node, tmp_path):
    environ = {PROFILE: NAME, BOARDS: str(tmp_path), "DYNAMOLLM_NODE": "n", "CUDA_VISIBLE_DEVICES": "2,3"}
    return EmulatedDevice.of_environment(environ)


def test_boards_without_an_engine_are_bare_and_refuse_clocks_they_do_not_have(node):
    gpu = node.gpus()[0]
    assert (gpu.power_w(), gpu.sm_clock_mhz(), gpu.locked_sm_clocks_mhz()) == (H100.bare_w, 1980, None)
    with pytest.raises(ClockRangeError, match="1001"):
        gpu.lock_sm_clocks(ClockLock(1001, 1001))
    gpu.lock_sm_clocks(ClockLock(345, 1200))
    assert (gpu.sm_clock_mhz(), gpu.locked_sm_clocks_mhz()) == (1200, ClockLock(345, 1200))
    gpu.reset_sm_clocks()
    assert gpu.sm_clock_mhz() == 1980


def test_boards_outlive_whoever_sets_their_clocks_as_long_as_an_engine_holds_them(node, tmp_path):
    held, left = node.gpus()[0], node.gpus()[1]
    for gpu in (held, left):
        gpu.lock_sm_clocks(ClockLock(900, 900))
        gpu._board.write_meter(replace(gpu._board.read_meter(), energy_j=5e6))
    held._board.write_meter(replace(held._board.read_meter(), engine_pid=os.getpid()))
    again = BoardNode("n", 8, H100, tmp_path)
    assert again.gpus()[0].locked_sm_clocks_mhz() == ClockLock(900, 900)
    assert again.gpus()[1].locked_sm_clocks_mhz() is None  # of no engine: nobody will take it off
    assert min(gpu.energy_j() for gpu in again.gpus()[:2]) >= 5e6
    again.close()
    assert [path.name for path in tmp_path.glob("*.board")] == ["n-0.board"]
    held.lock_sm_clocks(ClockLock(345, 345))  # the same board still
    assert BoardNode("n", 1, H100, tmp_path).gpus()[0].sm_clock_mhz() == 345


def test_boards_of_another_boot_or_that_are_none_are_made_anew(tmp_path):
    BoardFile.make(tmp_path / "n-0.board", time.monotonic() + 1e6, 70.0).lock_mhz = (345, 900)
    (tmp_path / "n-1.board").write_bytes(b"")
    node = BoardNode("n", 2, H100, tmp_path)
    assert [gpu.locked_sm_clocks_mhz() for gpu in node.gpus()] == [None, None]
    assert max(gpu.energy_j() for gpu in node.gpus()) < 1e4
    node.close()
    assert not tmp_path.exists()


def test_an_engine_holds_the_boards_it_sees_and_their_memory(device, node):
    assert device.tp == 2
    assert device.kv_capacity_tokens == load_profile(NAME).kv_capacity_tokens(2)
    loaded_w = load_profile(NAME).idle_power_w(GpuState.LOADED, 1980)
    assert [board.read_meter().idle_w for board in node._boards[1:4]] == [H100.bare_w, loaded_w, loaded_w]


@pytest.mark.parametrize("clock_mhz", [1980, 1200])
def test_a_step_lasts_and_draws_what_the_profile_says_at_the_clock_of_the_slowest_gpu(device, node, clock_mhz):
    batch = Batch(0, 0.0, 32, 32 * 1000)
    node.gpus()[3].lock_sm_clocks(ClockLock(clock_mhz, clock_mhz))
    step = load_profile(NAME).step(2, clock_mhz)
    before_s = time.monotonic()
    due_s = device.begin_step(batch)
    assert due_s - before_s == pytest.approx(step_time_s(step, *batch), abs=5e-3)
    for meter in (board.read_meter() for board in node._boards[2:4]):
        assert meter.busy_w == pytest.approx(step_power_w(step, *batch))
        assert meter.busy_until_s == due_s
    device.end_step(due_s)
    assert time.monotonic() >= due_s


def test_the_energy_of_steps_is_their_power_times_their_time(device, node, tmp_path):
    batch, gpu = Batch(0, 0.0, 8, 8000), node.gpus()[2]
    step = load_profile(NAME).step(2, 1980)
    before_j = gpu.energy_j()
    before_s = time.monotonic()
    for _ in range(5):
        device.end_step(device.begin_step(batch))
    spent_j, took_s = gpu.energy_j() - before_j, time.monotonic() - before_s
    busy_j = 5 * step_time_s(step, *batch) * step_power_w(step, *batch)
    idle_w = load_profile(NAME).idle_power_w(GpuState.LOADED, 1980)
    idle_j = max(took_s - 5 * step_time_s(step, *batch), 0.0) * idle_w
    assert spent_j == pytest.approx(busy_j + idle_j, rel=0.05)


def test_a_sleeping_engine_draws_what_a_parked_gpu_does(device, node):
    device.enter(GpuState.PARKED)
    profile = load_profile(NAME)
    assert node._boards[2].read_meter().idle_w == profile.idle_power_w(GpuState.PARKED, 1980)
    device.enter(GpuState.LOADED)
    assert node._boards[2].read_meter().idle_w == profile.idle_power_w(GpuState.LOADED, 1980)


def test_the_power_of_an_idle_board_follows_its_clock(device, node):
    for gpu in node.gpus()[2:4]:
        gpu.lock_sm_clocks(ClockLock(345, 345))
    board, lowered_w = node._boards[2], load_profile(NAME).idle_power_w(GpuState.LOADED, 345)
    deadline_s = time.monotonic() + 10.0
    while board.read_meter().idle_w != lowered_w and time.monotonic() < deadline_s:
        os.sched_yield()
    assert board.read_meter().idle_w == lowered_w


def test_a_board_whose_engine_has_died_is_bare_once_its_lock_is_taken_off(node):
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    board = node._boards[0]
    now_s = time.monotonic()
    board.write_meter(Meter(now_s, 100.0, now_s, now_s, 0.0, 120.0, ended.pid))
    node.gpus()[0].reset_sm_clocks()
    after = board.read_meter()
    assert (after.idle_w, after.engine_pid) == (H100.bare_w, 0)
    assert after.energy_j >= 100.0


def test_what_is_not_set_up_is_named(tmp_path):
    with pytest.raises(KeyError, match=BOARDS):
        EmulatedDevice.of_environment({})
    environ = {PROFILE: NAME, BOARDS: str(tmp_path), "DYNAMOLLM_NODE": "x", "CUDA_VISIBLE_DEVICES": "0"}
    with pytest.raises(OSError, match="x-0"):
        EmulatedDevice.of_environment(environ)


def test_sources_are_where_the_worker_is_loaded_from():
    from dynamollm.vllm_wiring import SOURCES, WORKER

    assert (Path(SOURCES) / Path(*WORKER.split(".")[:-1]).with_suffix(".py")).is_file()
