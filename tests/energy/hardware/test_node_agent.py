"""NodeAgent over GPUs in memory: locks, leases, faults, orphans."""

import pytest

from energy.adapters.memory_gpu import MemoryGpu
from energy.agent import NodeAgent
from energy.gpu import (
    ClockDwellError,
    ClockLock,
    ClockRangeError,
    GpuLostError,
    GpuPermissionError,
    GpuUnsupportedError,
    NoSuchGpuError,
)
from energy.gpus import gpu_physics
from energy.leases import LeaseTable

H100 = gpu_physics("H100-SXM")


class MemoryJournal:
    def __init__(self):
        self.locks = {}
        self.history = []
        self.full = False

    def read(self):
        return dict(self.locks)

    def write(self, locks):
        if self.full:
            raise OSError("no space left on device")
        self.locks = dict(locks)
        self.history.append(dict(locks))


@pytest.fixture
def gpus():
    return [MemoryGpu(index, H100, lambda: 0.0) for index in range(4)]


@pytest.fixture
def journal():
    return MemoryJournal()


def agent_of(gpus, journal):
    return NodeAgent("node-0", gpus, journal, LeaseTable(ttl_s=10.0, dwell_s=1.0))


def locked(gpus):
    return [gpu.index for gpu in gpus if gpu.locked_sm_clocks_mhz() is not None]


def test_it_locks_the_nearest_supported_clock_and_writes_only_on_change(gpus, journal):
    agent = agent_of(gpus, journal)
    for now_s in (0.0, 1.0, 2.0):
        agent.lock([1, 2], ClockLock(1200, 1203), "plan", now_s)
    assert gpus[1].locked_sm_clocks_mhz() == ClockLock(1200, 1200)
    assert [gpu.writes for gpu in gpus] == [0, 1, 1, 0]
    assert journal.locks == {gpus[i].uuid: ClockLock(1200, 1200) for i in (1, 2)}
    assert len(journal.history) == 1


def test_a_lock_is_noted_before_it_is_set_and_struck_out_after_it_is_reset(gpus, journal):
    agent = agent_of(gpus, journal)
    journal.full = True
    with pytest.raises(OSError, match="no space"):
        agent.lock([0], ClockLock(1200, 1200), "plan", 0.0)
    assert locked(gpus) == []
    journal.full = False
    agent.lock([0], ClockLock(1200, 1200), "plan", 0.0)
    gpus[0].fault = GpuLostError("GPU 0 fell off the bus")
    with pytest.raises(GpuLostError):
        agent.reset([0], 1.0)
    assert gpus[0].uuid in journal.locks
    gpus[0].fault = None
    agent.reset([0], 1.0)
    assert journal.locks == {}


def test_a_silent_controller_loses_its_locks(gpus, journal):
    agent = agent_of(gpus, journal)
    agent.lock([0, 1], ClockLock(900, 900), "plan", 0.0)
    assert set(agent.renew([0], "plan", 8.0)) == {0}
    agent.tick(9.9)
    assert locked(gpus) == [0, 1]
    agent.tick(10.0)
    assert locked(gpus) == [0]
    agent.tick(18.0)
    assert locked(gpus) == []
    assert agent.renew([0, 1], "plan", 18.0) == {}


def test_a_reset_that_fails_is_tried_again_and_one_lost_gpu_does_not_keep_the_others(gpus, journal):
    agent = agent_of(gpus, journal)
    agent.lock([0, 1], ClockLock(900, 900), "plan", 0.0)
    gpus[0].fault = GpuLostError("GPU 0 fell off the bus")
    agent.tick(10.0)
    assert gpus[1].locked_sm_clocks_mhz() is None
    assert agent.failures["GpuLostError"] == 1
    gpus[0].fault = None
    agent.tick(11.0)
    assert locked(gpus) == []


def test_a_reset_of_many_goes_on_after_one_that_fails(gpus, journal):
    agent = agent_of(gpus, journal)
    agent.lock([0, 1, 2], ClockLock(900, 900), "plan", 0.0)
    gpus[0].fault = GpuLostError("GPU 0 fell off the bus")
    with pytest.raises(GpuLostError):
        agent.reset([0, 1, 2], 1.0)
    assert [gpu.locked_sm_clocks_mhz() for gpu in gpus[1:]] == [None] * 3


def test_a_lock_that_somebody_else_undid_is_set_again(gpus, journal):
    agent = agent_of(gpus, journal)
    agent.lock([0], ClockLock(900, 900), "plan", 0.0)
    gpus[0].reset_sm_clocks()
    agent.tick(1.0)
    assert gpus[0].locked_sm_clocks_mhz() == ClockLock(900, 900)
    assert agent.drifts == 1
    agent.tick(2.0)
    assert agent.drifts == 1


def test_nothing_is_written_if_one_of_many_cannot_be(gpus, journal):
    agent = agent_of(gpus, journal)
    with pytest.raises(NoSuchGpuError, match=r"no such GPU: 7; this agent's scope is 0, 1, 2, 3"):
        agent.lock([0, 7], ClockLock(900, 900), "plan", 0.0)
    with pytest.raises(ClockRangeError, match=r"1200\.\.900 MHz is not a range"):
        agent.lock([0], ClockLock(1200, 900), "plan", 0.0)
    agent.lock([3], ClockLock(1500, 1500), "plan", 0.0)
    with pytest.raises(ClockDwellError):
        agent.lock([0, 3], ClockLock(900, 900), "plan", 0.5)
    assert locked(gpus) == [3]


def test_without_permission_nothing_is_leased(gpus, journal):
    agent = agent_of(gpus, journal)
    gpus[0].fault = GpuPermissionError("GPU 0: lock_clocks: not permitted")
    with pytest.raises(GpuPermissionError):
        agent.lock([0], ClockLock(900, 900), "plan", 0.0)
    assert agent.lease(0) is None
    assert agent.failures == {"GpuPermissionError": 1}


def test_the_next_agent_restores_what_a_killed_one_left_and_only_in_its_scope(gpus, journal):
    agent_of(gpus, journal).lock([0, 1, 3], ClockLock(900, 900), "plan", 0.0)  # and is killed
    second = agent_of(gpus[:2], journal)
    assert sorted(second.restore_orphans(5.0)) == [gpus[0].uuid, gpus[1].uuid]
    assert locked(gpus) == [3]
    assert second.orphans == (gpus[3].uuid,)
    third = agent_of(gpus, journal)
    assert third.restore_orphans(6.0) == [gpus[3].uuid]
    assert locked(gpus) == []
    assert journal.locks == {}


def test_at_its_end_it_resets_all_and_says_what_it_could_not(gpus, journal):
    agent = agent_of(gpus, journal)
    agent.lock([0, 1, 2], ClockLock(900, 900), "plan", 0.0)
    gpus[1].fault = GpuLostError("GPU 1 fell off the bus")
    assert agent.release_all(1.0) == [gpus[1].uuid]
    assert locked(gpus) == [1]
    assert set(journal.locks) == {gpus[1].uuid}


def test_a_lost_gpu_is_left_out_of_the_readings_and_a_missing_meter_is_none(gpus, journal):
    agent = agent_of(gpus, journal)
    gpus[0].fault = GpuLostError("GPU 0 fell off the bus")
    gpus[1].energy_j = lambda: (_ for _ in ()).throw(GpuUnsupportedError("no counter"))
    readings = agent.readings()
    assert [reading.index for reading in readings] == [1, 2, 3]
    assert readings[0].energy_j is None
    assert readings[1].energy_j == 0.0
    assert readings[1].power_w == pytest.approx(H100.idle_w(H100.max_clock_mhz))
