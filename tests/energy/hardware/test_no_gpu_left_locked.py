"""The agent's promise as a machine of random events: controllers that ask, fall silent and come back, GPUs that fail
and recover, full journals, killed agents. No GPU stays locked behind anybody's back."""

from contextlib import suppress

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from test_node_agent import H100, MemoryJournal

from energy.adapters.memory_gpu import MemoryGpu
from energy.agent import NodeAgent
from energy.gpu import ClockLock, GpuError, GpuLostError, GpuPermissionError
from energy.leases import LeaseTable

TTL_S, DWELL_S = 10.0, 1.0
COUNT = 3
HOLDERS = ("solver", "operator")
gpu_sets = st.lists(st.integers(0, COUNT - 1), min_size=1, max_size=COUNT, unique=True)
clocks = st.integers(345, 1900)  # a lock at the maximum could be undone without anybody seeing it


class Agents(RuleBasedStateMachine):
    """One node over many agents."""

    def __init__(self):
        super().__init__()
        self.now_s = 0.0
        self.gpus = [MemoryGpu(index, H100, lambda: self.now_s) for index in range(COUNT)]
        self.journal = MemoryJournal()
        self.agent = self.new_agent()
        self.heard_s = {}  # GPU -> when its lease began last, as far as the agent said yes

    def new_agent(self):
        return NodeAgent("node-0", self.gpus, self.journal, LeaseTable(TTL_S, DWELL_S))

    @property
    def healthy(self):
        return not self.journal.full and all(gpu.fault is None for gpu in self.gpus)

    def locked(self):
        return {gpu.index for gpu in self.gpus if gpu.locked_sm_clocks_mhz() is not None}

    # --- controllers ---

    @rule(indices=gpu_sets, low=clocks, high=clocks, holder=st.sampled_from(HOLDERS))
    def lock(self, indices, low, high, holder):
        before = [gpu.locked_sm_clocks_mhz() for gpu in self.gpus]
        try:
            self.agent.lock(indices, ClockLock(low, high), holder, self.now_s)
        except (GpuError, OSError):
            if self.healthy:  # refused as a whole: nothing was written
                assert [gpu.locked_sm_clocks_mhz() for gpu in self.gpus] == before
            for index in indices:  # those before the one that failed keep their leases
                lease = self.agent.lease(index)
                if lease is not None and lease.expires_s == self.now_s + TTL_S:
                    self.heard_s[index] = self.now_s
            return
        for index in indices:
            lock = self.gpus[index].locked_sm_clocks_mhz()
            assert abs(lock.high_mhz - high) <= H100.clock_step_mhz
            assert self.agent.lease(index).holder == holder
            self.heard_s[index] = self.now_s

    @rule(indices=gpu_sets, holder=st.sampled_from(HOLDERS))
    def renew(self, indices, holder):
        renewed = self.agent.renew(indices, holder, self.now_s)
        for index, lease in renewed.items():
            assert index in indices
            assert (lease.holder, lease.expires_s) == (holder, self.now_s + TTL_S)
            assert index in self.locked()
            self.heard_s[index] = self.now_s

    @rule(indices=gpu_sets)
    def reset(self, indices):
        try:
            self.agent.reset(indices, self.now_s)
        except (GpuError, OSError):
            assert not self.healthy
            return
        assert not self.locked() & set(indices)

    # --- the world ---

    @rule(seconds=st.sampled_from((0.3, 1.0, 4.0, 11.0)))
    def time_passes(self, seconds):
        self.now_s += seconds
        self.agent.tick(self.now_s)
        if self.healthy:
            for index in self.locked():
                assert self.agent.lease(index) is None or self.agent.lease(index).expires_s > self.now_s

    @rule(index=st.integers(0, COUNT - 1), error=st.sampled_from((GpuLostError, GpuPermissionError)))
    def a_gpu_fails(self, index, error):
        self.gpus[index].fault = error(f"GPU {index}")

    @rule()
    def everything_recovers(self):
        self.journal.full = False
        for gpu in self.gpus:
            gpu.fault = None

    @rule()
    def the_disk_is_full(self):
        self.journal.full = True

    @rule()
    def somebody_undoes_a_lock(self):
        for gpu in self.gpus:
            with suppress(GpuError):
                gpu.reset_sm_clocks()
        self.agent.tick(self.now_s)  # sees it, and sets them again

    @rule()
    def the_agent_is_killed_and_another_starts(self):
        self.agent = self.new_agent()
        self.agent.restore_orphans(self.now_s)
        if self.healthy:
            assert self.locked() == set()
            assert self.journal.locks == {}

    @rule()
    def the_agent_ends_in_order(self):
        left = self.agent.release_all(self.now_s)
        if self.healthy:
            assert left == []
            assert self.locked() == set()
        self.agent = self.new_agent()

    # --- the promises ---

    @invariant()
    def what_is_locked_stands_in_the_journal(self):
        noted = {gpu.index for gpu in self.gpus if gpu.uuid in self.journal.locks}
        assert self.locked() <= noted

    @invariant()
    def who_is_silent_for_the_ttl_has_no_lock_at_the_next_tick(self):
        if not self.healthy:
            return
        overdue = {i for i in self.locked() if self.now_s >= self.heard_s.get(i, float("-inf")) + 3 * TTL_S}
        held = {i for i in overdue if (lease := self.agent.lease(i)) is not None and lease.expires_s > self.now_s}
        assert not held

    def teardown(self):
        """However the story went: once everything works again, silence ends every lock."""
        self.everything_recovers()
        self.now_s += 2 * TTL_S
        self.agent.tick(self.now_s)
        under_lease = {i for i in self.locked() if self.agent.lease(i) is not None}
        assert not under_lease
        self.agent.release_all(self.now_s)
        assert self.locked() == set()


Agents.TestCase.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)
TestAgents = Agents.TestCase
