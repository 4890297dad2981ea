"""One suite for every Gpu: in memory, NVML over the stub library, and each through a node agent over a Unix socket."""

import time

import pytest
from agents import agent_command, started

from energy.adapters.agent_client import AgentClient
from energy.adapters.memory_gpu import MemoryGpu
from energy.adapters.nvml import Nvml
from energy.gpu import ClockEvent, ClockLock, NoSuchGpuError, read
from energy.gpus import gpu_physics


@pytest.fixture(params=("memory", "nvml", "agent"))
def gpu(request, tmp_path):
    if request.param == "memory":
        yield MemoryGpu(1, gpu_physics("H100-SXM"), time.monotonic)
        return
    if request.param == "nvml":
        request.getfixturevalue("here")
        with Nvml() as nvml:
            yield nvml.gpus()[1]
        return
    machine = request.getfixturevalue("machine")
    command = agent_command(machine, tmp_path, "--socket", str(tmp_path / "agent.sock"), "--dwell", "0")
    with started(command, machine) as (_, address), AgentClient(address, "test") as agent:
        yield agent.gpus()[1]


def test_every_gpu_reads_in_these_units_and_locks_as_told(gpu):
    assert gpu.index == 1
    assert gpu.uuid.startswith("GPU-")
    assert gpu.name

    clocks = gpu.supported_sm_clocks_mhz()
    assert clocks == tuple(sorted(set(clocks)))
    assert (clocks[0], clocks[-1]) == (345, 1980)

    default_mhz = gpu.sm_clock_mhz()
    assert default_mhz == clocks[-1]
    assert gpu.locked_sm_clocks_mhz() is None
    assert 20.0 < gpu.power_w() < 1000.0
    assert 20.0 < gpu.temperature_c() < 90.0
    assert gpu.clock_events() == ClockEvent.NONE
    before_j = gpu.energy_j()
    assert gpu.energy_j() >= before_j >= 0.0

    for lock in (ClockLock(1200, 1200), ClockLock(345, 990)):
        gpu.lock_sm_clocks(lock)
        assert gpu.locked_sm_clocks_mhz() == lock
        assert gpu.sm_clock_mhz() == lock.high_mhz
    gpu.reset_sm_clocks()
    gpu.reset_sm_clocks()
    assert gpu.locked_sm_clocks_mhz() is None
    assert gpu.sm_clock_mhz() == default_mhz

    reading = read(gpu, "node-0")
    assert (reading.uuid, reading.sm_clock_mhz) == (gpu.uuid, default_mhz)
    assert None not in (reading.power_w, reading.energy_j, reading.temperature_c, reading.clock_events)


def test_nvml_knows_its_gpus(here):
    with Nvml() as nvml:
        assert [gpu.index for gpu in nvml.gpus()] == [0, 1, 2, 3]
        assert [gpu.index for gpu in nvml.gpus((2,))] == [2]
        with pytest.raises(NoSuchGpuError, match="there is no GPU 4: this node has 4"):
            nvml.gpus((1, 4))
