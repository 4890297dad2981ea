"""A GPU in memory: the port's variant for tests and for trying things without a board. Public and tested as the rest.

It behaves as ``GpuPhysics`` says a loaded, idle board does: clocks in its steps, power by its clock, energy over the
clock it is given. ``fault`` makes every call fail as a real one could.
"""

from collections.abc import Callable

from energy.gpu import ClockEvent, ClockLock, ClockRangeError, GpuError
from energy.gpus import GpuPhysics

AMBIENT_C = 30.0
C_PER_W = 0.065  # an SXM board at its 700 W limit is about 75 C


class MemoryGpu:
    """One board on ``clock`` (seconds)."""

    def __init__(self, index: int, physics: GpuPhysics, clock: Callable[[], float]) -> None:
        self.index = index
        self.uuid = f"GPU-memory-{index}"
        self.name = physics.name
        self.fault: GpuError | None = None
        self.writes = 0  # locks and resets that reached the board
        self._physics = physics
        self._clock = clock
        self._lock: ClockLock | None = None
        self._settled_j = 0.0
        self._settled_s = clock()

    def supported_sm_clocks_mhz(self) -> tuple[int, ...]:
        """Every step of the board's clock, ascending."""
        p = self._physics
        return tuple(range(p.min_clock_mhz, p.max_clock_mhz + 1, p.clock_step_mhz))

    def lock_sm_clocks(self, lock: ClockLock) -> None:
        """Lock it; as a driver does, it refuses what it does not support."""
        self._fail()
        if not {lock.low_mhz, lock.high_mhz} <= set(self.supported_sm_clocks_mhz()):
            raise ClockRangeError(f"GPU {self.index}: {lock} is not supported")
        self._change(lock)

    def reset_sm_clocks(self) -> None:
        """Take the lock off."""
        self._fail()
        self._change(None)

    def locked_sm_clocks_mhz(self) -> ClockLock | None:
        """The lock in force."""
        return self._lock

    def sm_clock_mhz(self) -> int:
        """The top of its lock, or its maximum."""
        self._fail()
        return self._physics.max_clock_mhz if self._lock is None else self._lock.high_mhz

    def power_w(self) -> float:
        """What a loaded, idle board draws at this clock."""
        return self._physics.idle_w(self.sm_clock_mhz())

    def energy_j(self) -> float:
        """Energy since it was made."""
        return self._settled_j + self.power_w() * (self._clock() - self._settled_s)

    def temperature_c(self) -> float:
        """In proportion to its power."""
        return AMBIENT_C + C_PER_W * self.power_w()

    def clock_events(self) -> ClockEvent:
        """It always runs at what it was told."""
        self._fail()
        return ClockEvent.NONE

    def _change(self, lock: ClockLock | None) -> None:
        self._settled_j, self._settled_s = self.energy_j(), self._clock()
        self._lock = lock
        self.writes += 1

    def _fail(self) -> None:
        if self.fault is not None:
            raise self.fault
