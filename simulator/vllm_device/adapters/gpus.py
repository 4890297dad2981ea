"""The emulated devices' GPUs behind the Gpu port: what drivers lock, agents read and NVML would be on a real board."""

import contextlib
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from energy.gpu import ClockEvent, ClockLock, ClockRangeError, GpuReading, read
from energy.gpus import GpuPhysics
from simulator.vllm_device.adapters.board import BoardFile, board_path

AMBIENT_C = 30.0
C_PER_W = 0.065  # an SXM board at its 700 W limit is about 75 C
MEAN_OVER_S = 0.2  # readings further apart than this give a mean power


class BoardGpu:
    """One emulated GPU. See ``energy.gpu.Gpu``."""

    def __init__(self, node: str, index: int, physics: GpuPhysics, board: BoardFile) -> None:
        self.index = index
        self.uuid = f"GPU-{node}-{index}"
        self.name = physics.name
        self._physics = physics
        self._board = board
        self._mean_from = (time.monotonic(), self.energy_j())

    def supported_sm_clocks_mhz(self) -> tuple[int, ...]:
        """Every step of the board's clock, ascending."""
        p = self._physics
        return tuple(range(p.min_clock_mhz, p.max_clock_mhz + 1, p.clock_step_mhz))

    def lock_sm_clocks(self, lock: ClockLock) -> None:
        """Lock it; as a driver does, it refuses what it does not support."""
        if not {lock.low_mhz, lock.high_mhz} <= set(self.supported_sm_clocks_mhz()):
            raise ClockRangeError(f"GPU {self.index}: {lock} is not supported")
        self._board.lock_mhz = (lock.low_mhz, lock.high_mhz)

    def reset_sm_clocks(self) -> None:
        """Take the lock off; of an engine that has died, the board forgets it is loaded."""
        self._board.lock_mhz = None
        meter = self._board.read_meter()
        if meter.engine_pid and not _alive(meter.engine_pid):
            now_s = time.monotonic()
            settled = replace(meter, at_s=now_s, energy_j=meter.energy_at_j(now_s), busy_until_s=now_s)
            self._board.write_meter(replace(settled, idle_w=self._physics.bare_w, engine_pid=0))

    def locked_sm_clocks_mhz(self) -> ClockLock | None:
        """The lock in force."""
        lock = self._board.lock_mhz
        return ClockLock(*lock) if lock else None

    def sm_clock_mhz(self) -> int:
        """The top of its lock, or its maximum."""
        lock = self._board.lock_mhz
        return lock[1] if lock else self._physics.max_clock_mhz

    def power_w(self) -> float:
        """Mean since it was last asked, or the draw now if that was a moment ago."""
        now_s, energy_j = time.monotonic(), self.energy_j()
        since_s, since_j = self._mean_from
        if now_s - since_s < MEAN_OVER_S:
            return self._board.read_meter().power_at_w(now_s)
        self._mean_from = (now_s, energy_j)
        return (energy_j - since_j) / (now_s - since_s)

    def energy_j(self) -> float:
        """Energy since the board was made."""
        return self._board.read_meter().energy_at_j(time.monotonic())

    def temperature_c(self) -> float:
        """In proportion to its power."""
        return AMBIENT_C + C_PER_W * self._board.read_meter().power_at_w(time.monotonic())

    def clock_events(self) -> ClockEvent:
        """It always runs at what it was told."""
        return ClockEvent.NONE


class BoardNode:
    """The emulated GPUs of one node; makes the boards that are not there, and removes them when closed.

    Boards that are there keep their counters, and those that an engine holds their locks too, as real ones do while a
    controller starts again; the latter stay when it is closed.
    """

    def __init__(self, node: str, count: int, physics: GpuPhysics, folder: Path) -> None:
        self._node = node
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._boards = [_board(board_path(folder, node, index), physics) for index in range(count)]
        self._gpus = [BoardGpu(node, index, physics, board) for index, board in enumerate(self._boards)]
        for gpu, board in zip(self._gpus, self._boards, strict=True):
            if not _alive(board.read_meter().engine_pid):
                gpu.reset_sm_clocks()

    def gpus(self) -> Sequence[BoardGpu]:
        """All of them."""
        return self._gpus

    def readings(self) -> list[GpuReading]:
        """What all of them read now."""
        return [read(gpu, self._node) for gpu in self._gpus]

    def renew(self) -> tuple[int, ...]:
        """Locks on these boards are no leases."""
        return ()

    def close(self) -> None:
        """Remove the boards that no engine holds, and the folder if nothing else is in it."""
        for board in self._boards:
            held = _alive(board.read_meter().engine_pid)
            board.close()
            if not held:
                board.path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self._folder.rmdir()


def board_gpus(node: str, count: int, physics: GpuPhysics, folder: Path) -> Sequence[BoardGpu]:
    """GPUs of one node, for whoever never closes them."""
    return BoardNode(node, count, physics, folder).gpus()


def _board(path: Path, physics: GpuPhysics) -> BoardFile:
    """The board that is there, unless it is none or of another boot; else a new one."""
    now_s = time.monotonic()
    with contextlib.suppress(OSError, ValueError):
        board = BoardFile(path)
        if board.read_meter().at_s <= now_s:
            return board
    return BoardFile.make(path, now_s, physics.bare_w)


def _alive(pid: int) -> bool:
    """Whether a process is there and is more than a zombie; 0 is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"
