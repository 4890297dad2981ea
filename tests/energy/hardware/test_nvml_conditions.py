"""What can be wrong with NVML, each by its name; on the real nvidia-ml-py over the stub library."""

import ctypes.util
import json
import subprocess
import sys

import pytest
from nvml_stub import DRIVER_NOT_LOADED, GPU_IS_LOST, NO_PERMISSION, NOT_SUPPORTED, StubMachine, build, missing_compiler

from energy.adapters.nvml import Nvml
from energy.gpu import (
    ClockEvent,
    ClockLock,
    ClockRangeError,
    GpuDriverError,
    GpuLostError,
    GpuMigError,
    GpuPermissionError,
    GpuUnsupportedError,
    read,
)

SLOW = ClockLock(900, 900)


def test_driver_not_loaded(here):
    here.state.init_error = DRIVER_NOT_LOADED
    with pytest.raises(GpuDriverError, match="kernel driver is not loaded"), Nvml():
        pass


def test_no_permission(here):
    here.gpus[2].write_error = NO_PERMISSION
    with Nvml() as nvml:
        gpu = nvml.gpus()[2]
        with pytest.raises(GpuPermissionError, match=r"GPU 2: lock_clocks: not permitted: .* root or CAP_SYS_ADMIN"):
            gpu.lock_sm_clocks(SLOW)
        with pytest.raises(GpuPermissionError):
            gpu.reset_sm_clocks()
        assert gpu.locked_sm_clocks_mhz() is None
        assert gpu.power_w() == 121.7, "reading is not setting"


def test_a_lost_gpu_does_not_touch_the_others(here):
    with Nvml() as nvml:
        gpus = nvml.gpus()
        here.gpus[0].read_error = here.gpus[0].write_error = GPU_IS_LOST
        for call in (gpus[0].power_w, gpus[0].energy_j, gpus[0].sm_clock_mhz, gpus[0].reset_sm_clocks):
            with pytest.raises(GpuLostError, match=r"GPU 0: .* fell off the bus"):
                call()
        assert gpus[1].energy_j() == 5000.0


def test_mig_has_no_meter_and_says_why(here):
    here.gpus[0].mig = 1
    here.gpus[1].write_error = NOT_SUPPORTED
    with Nvml() as nvml:
        gpus = nvml.gpus()
        with pytest.raises(GpuMigError, match=r"GPU 0: energy: .* MIG mode"):
            gpus[0].energy_j()
        assert read(gpus[0], "n").energy_j is None
        with pytest.raises(GpuUnsupportedError, match="GPU 1: lock_clocks: the board does not support this") as caught:
            gpus[1].lock_sm_clocks(SLOW)
        assert not isinstance(caught.value, GpuMigError)


def test_a_value_the_driver_refuses(here):
    with Nvml() as nvml, pytest.raises(ClockRangeError, match="GPU 0: lock_clocks: the driver refuses this value"):
        nvml.gpus()[0].lock_sm_clocks(ClockLock(900, 9000))


def test_units_and_events_are_converted(here):
    here.gpus[0].power_mw, here.gpus[0].energy_mj, here.gpus[0].reasons = 345_678, 2**40 + 5, 0x4 | 0x40 | 1 << 40
    with Nvml() as nvml:
        gpu = nvml.gpus()[0]
        assert gpu.power_w() == 345.678
        assert gpu.energy_j() == (2**40 + 5) / 1000
        assert gpu.clock_events() == ClockEvent.SW_POWER_CAP | ClockEvent.HW_THERMAL


def test_every_call_is_timed_even_one_that_fails(here):
    calls: list[tuple[str, float]] = []
    here.gpus[0].write_error = NO_PERMISSION
    with Nvml(lambda name, seconds: calls.append((name, seconds))) as nvml:
        gpu = nvml.gpus((0,))[0]
        gpu.power_w()
        with pytest.raises(GpuPermissionError):
            gpu.lock_sm_clocks(SLOW)
    assert [name for name, _ in calls] == [
        "init",
        "count",
        "handle",
        "uuid",
        "name",
        "power",
        "lock_clocks",
        "shutdown",
    ]
    assert all(0.0 <= seconds < 1.0 for _, seconds in calls)


def in_child(code, environment):
    """What a fresh interpreter prints: the NVML binding keeps the library it found first."""
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    ).stdout.strip()


LOCK_AND_TELL = """
from energy.adapters.nvml import Nvml
from energy.gpu import ClockLock, GpuError
try:
    with Nvml() as nvml:
        gpu = nvml.gpus()[0]
        print(gpu.sm_clock_mhz())
        gpu.lock_sm_clocks(ClockLock(900, 900))
except GpuError as error:
    print(type(error).__name__, error)
"""


def test_function_missing_in_an_old_driver(tmp_path):
    if reason := missing_compiler():
        pytest.skip(reason)
    machine = StubMachine(tmp_path, build(tmp_path, locked_clocks=False))
    printed = in_child(LOCK_AND_TELL, machine.environment).splitlines()
    assert printed[0] == "1980"
    assert printed[1].startswith("GpuUnsupportedError GPU 0: lock_clocks: the driver is too old")


def real_library():
    return ctypes.util.find_library("nvidia-ml")


@pytest.mark.skipif(real_library() is not None, reason="this machine has the NVIDIA library")
def test_no_library_at_all():
    assert "GpuDriverError NVML: init: libnvidia-ml.so.1 is not installed" in in_child(LOCK_AND_TELL, None)


READ_ALL = """
import json, time
from dataclasses import asdict
from energy.adapters.nvml import Nvml
from energy.gpu import read
with Nvml() as nvml:
    gpus = nvml.gpus()
    first = [read(gpu, "here") for gpu in gpus]
    time.sleep(0.5)
    print(json.dumps([
        {"power_w": a.power_w, "from_j": a.energy_j, "to_j": read(gpu, "here").energy_j, "clock_mhz": a.sm_clock_mhz,
         "clocks_mhz": gpu.supported_sm_clocks_mhz()}
        for gpu, a in zip(gpus, first)
    ]))
"""


@pytest.mark.skipif(real_library() is None, reason="no NVIDIA library on this machine: no real GPU to read")
def test_real_gpus_read_sensibly_and_are_only_read():
    for gpu in json.loads(in_child(READ_ALL, None)):
        assert 5.0 < gpu["power_w"] < 2000.0
        assert gpu["to_j"] is None or gpu["to_j"] > gpu["from_j"] > 0.0
        assert gpu["clock_mhz"] <= gpu["clocks_mhz"][-1]
