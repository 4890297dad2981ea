"""Gpu: the contract between whatever sets or reads a GPU and the GPU itself; its readings; the errors it can meet.

Adapters (``energy/adapters``): NVML, an agent over HTTP, and one in memory. All speak the units of this file; whatever
a library calls them (millijoules, milliwatts, bit masks) is converted in the adapter.

A clock lock is a range: the SM clock stays within [low, high], and a busy GPU runs at ``high``. It outlives the process
that set it, so locks are set by the node agent (``energy/agent.py``), which gives them a lease.

Errors::

    GpuError
    +-- GpuDriverError         no driver, no library, or it is not loaded: nothing on this node can be read
    +-- GpuPermissionError     the process may read but not set (root or CAP_SYS_ADMIN is needed)
    +-- GpuLostError           the board fell off the bus or must be reset; the others go on
    +-- GpuUnsupportedError    this board or driver cannot do that
    |   +-- GpuMigError        ... because it is split into MIG instances
    +-- NoSuchGpuError         no GPU of that index, or it is out of the agent's scope
    +-- ClockRangeError        that range of clocks is empty or none of its clocks is supported
    +-- ClockDwellError        the clock was changed a moment ago; ``retry_after_s`` says when it may be lowered
    +-- GpuAgentError          the node agent does not answer, or answers what is not understood
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Flag
from typing import Protocol, TypeVar

_Reading = TypeVar("_Reading")


class GpuError(Exception):
    """A GPU could not be read or set; the message names the GPU and the fix."""


class GpuDriverError(GpuError):
    """There is no NVIDIA driver to talk to."""


class GpuPermissionError(GpuError):
    """The process may not do that to the GPU."""


class GpuLostError(GpuError):
    """The GPU does not answer any more."""


class GpuUnsupportedError(GpuError):
    """The GPU or its driver has no such function."""


class GpuMigError(GpuUnsupportedError):
    """The GPU is split into MIG instances, which have no meter or clock of their own."""


class NoSuchGpuError(GpuError):
    """There is no such GPU here."""


class ClockRangeError(GpuError):
    """No clock can be locked to that."""


class ClockDwellError(GpuError):
    """The lock is too young to be lowered."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class GpuAgentError(GpuError):
    """The node agent cannot be reached or understood."""


class ClockEvent(Flag):
    """Why a GPU does not run at the clock it was given (NVML's clocks event reasons, by their bits)."""

    NONE = 0
    IDLE = 0x1
    APPLICATION_SETTING = 0x2
    SW_POWER_CAP = 0x4
    HW_SLOWDOWN = 0x8
    SYNC_BOOST = 0x10
    SW_THERMAL = 0x20
    HW_THERMAL = 0x40
    HW_POWER_BRAKE = 0x80
    DISPLAY_SETTING = 0x100

    @staticmethod
    def of_mask(mask: int) -> "ClockEvent":
        """The events in a driver's bit mask; bits a newer driver knows are left out."""
        return ClockEvent(mask & _KNOWN_EVENTS)


_KNOWN_EVENTS = 0x1FF


@dataclass(frozen=True, slots=True)
class ClockLock:
    """A locked range of SM clocks, in MHz."""

    low_mhz: int
    high_mhz: int

    def __str__(self) -> str:
        return f"{self.low_mhz}..{self.high_mhz} MHz"


class Gpu(Protocol):
    """One board. Every method raises ``GpuError``s; those that name none can still meet a lost GPU or driver."""

    @property
    def index(self) -> int:
        """Its index on its node."""

    @property
    def uuid(self) -> str:
        """Its identity, as ``GPU-…``; the same after a restart."""

    @property
    def name(self) -> str:
        """Its product name."""

    def supported_sm_clocks_mhz(self) -> tuple[int, ...]:
        """Clocks it can be locked to, ascending; empty where only the far end knows them."""

    def lock_sm_clocks(self, lock: ClockLock) -> None:
        """Keep the SM clock within this range. Raises ``GpuPermissionError``, ``ClockRangeError``, ``GpuMigError``."""

    def reset_sm_clocks(self) -> None:
        """Take the lock off; nothing happens where there is none. Raises ``GpuPermissionError``."""

    def locked_sm_clocks_mhz(self) -> ClockLock | None:
        """The lock set through this object or its agent. Drivers do not tell a lock that others set."""

    def sm_clock_mhz(self) -> int:
        """SM clock at this moment; below the lock if an event says so."""

    def power_w(self) -> float:
        """Power draw, a mean over about the last second."""

    def energy_j(self) -> float:
        """Energy since the driver was loaded; ticks every 10 ms or slower. Raises ``GpuMigError``."""

    def temperature_c(self) -> float:
        """Temperature of the die."""

    def clock_events(self) -> ClockEvent:
        """Why it runs slower than it was told."""


@dataclass(frozen=True, slots=True)
class GpuReading:
    """What one GPU reads at one moment, and where it is. None: that reading is not to be had."""

    node: str
    index: int
    uuid: str
    name: str
    sm_clock_mhz: int | None
    power_w: float | None
    energy_j: float | None
    temperature_c: float | None
    clock_events: ClockEvent | None = None
    instance_id: str = ""  # the engine on it, where whoever reads knows


def read(gpu: Gpu, node: str) -> GpuReading:
    """Every reading of one GPU; what it cannot do is None. Raises ``GpuLostError``, ``GpuDriverError``."""
    return GpuReading(
        node=node,
        index=gpu.index,
        uuid=gpu.uuid,
        name=gpu.name,
        sm_clock_mhz=_or_none(gpu.sm_clock_mhz),
        power_w=_or_none(gpu.power_w),
        energy_j=_or_none(gpu.energy_j),
        temperature_c=_or_none(gpu.temperature_c),
        clock_events=_or_none(gpu.clock_events),
    )


def _or_none(reading: Callable[[], _Reading]) -> _Reading | None:
    try:
        return reading()
    except GpuUnsupportedError:
        return None


def snap(sm_clock_mhz: int, supported_mhz: Sequence[int]) -> int:
    """The supported clock (ascending) nearest to this one, the lower of two as near; itself if none are known."""
    if not supported_mhz:
        return sm_clock_mhz
    above = bisect_left(supported_mhz, sm_clock_mhz)
    if above == 0:
        return supported_mhz[0]
    if above == len(supported_mhz):
        return supported_mhz[-1]
    low, high = supported_mhz[above - 1], supported_mhz[above]
    return high if high - sm_clock_mhz < sm_clock_mhz - low else low


def snap_lock(lock: ClockLock, supported_mhz: Sequence[int]) -> ClockLock:
    """The lock with both ends at supported clocks. Raises ``ClockRangeError`` if it is no range."""
    if not 0 < lock.low_mhz <= lock.high_mhz:
        raise ClockRangeError(f"{lock} is not a range of SM clocks: 0 < low <= high")
    return ClockLock(snap(lock.low_mhz, supported_mhz), snap(lock.high_mhz, supported_mhz))
