"""BoardFile: one emulated GPU as a small file that two processes map: whoever sets its clock, and the engine on it.

Each writes a part of its own: the lock (controller), and the meter (engine). A reader that meets a meter being written
reads again. All times are this machine's monotonic clock, which all its processes share.
"""

import mmap
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Self

_LOCK = struct.Struct("<II")  # low and high MHz; 0, 0: not locked
_METER_AT = 64  # a cache line for each writer
_METER = struct.Struct("<QddddddQ")  # sequence, then the fields of Meter
_BYTES = 4096
_TRIES = 1000


@dataclass(frozen=True, slots=True)
class Meter:
    """Energy settled at ``at_s``; from then on ``busy_w`` until ``busy_until_s``, and ``idle_w`` after that."""

    at_s: float
    energy_j: float
    busy_from_s: float
    busy_until_s: float
    busy_w: float
    idle_w: float
    engine_pid: int = 0  # 0: no engine, the board is bare

    def energy_at_j(self, now_s: float) -> float:
        """Energy since the board was made."""
        since_s = max(now_s - self.at_s, 0.0)
        busy_s = max(min(now_s, self.busy_until_s) - max(self.busy_from_s, self.at_s), 0.0)
        return self.energy_j + self.busy_w * busy_s + self.idle_w * (since_s - busy_s)

    def power_at_w(self, now_s: float) -> float:
        """Draw at this moment."""
        return self.busy_w if self.busy_from_s <= now_s < self.busy_until_s else self.idle_w


class BoardFile:
    """One board; ``make`` it once, ``open`` it anywhere."""

    def __init__(self, path: Path) -> None:
        """Map an existing file. Raises ``OSError``."""
        self.path = path
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), _BYTES)

    @classmethod
    def make(cls, path: Path, now_s: float, bare_w: float) -> Self:
        """Make a board that is bare and not locked, or make an old one so again."""
        temporary = path.with_suffix(".new")
        temporary.write_bytes(bytes(_BYTES))
        os.replace(temporary, path)
        board = cls(path)
        board.write_meter(Meter(now_s, 0.0, now_s, now_s, 0.0, bare_w))
        return board

    def close(self) -> None:
        """Unmap it; the file stays."""
        self._map.close()

    @property
    def lock_mhz(self) -> tuple[int, int] | None:
        """The locked range of clocks."""
        low, high = _LOCK.unpack_from(self._map)
        return (low, high) if high else None

    @lock_mhz.setter
    def lock_mhz(self, lock: tuple[int, int] | None) -> None:
        _LOCK.pack_into(self._map, 0, *(lock or (0, 0)))

    def read_meter(self) -> Meter:
        """The meter as its writer left it last."""
        for _ in range(_TRIES):
            before, *fields = _METER.unpack_from(self._map, _METER_AT)
            if before % 2 == 0 and _METER.unpack_from(self._map, _METER_AT)[0] == before:
                return Meter(*fields)
        raise OSError(f"{self.path}: its meter is being written for ever; did its engine die while writing?")

    def write_meter(self, meter: Meter) -> None:
        """Write the meter; the engine that holds the board does, and nobody else while it lives."""
        sequence = _METER.unpack_from(self._map, _METER_AT)[0] // 2 * 2
        fields = (
            meter.at_s,
            meter.energy_j,
            meter.busy_from_s,
            meter.busy_until_s,
            meter.busy_w,
            meter.idle_w,
            meter.engine_pid,
        )
        struct.pack_into("<Q", self._map, _METER_AT, sequence + 1)
        _METER.pack_into(self._map, _METER_AT, sequence + 1, *fields)
        struct.pack_into("<Q", self._map, _METER_AT, sequence + 2)


def board_path(folder: Path, node: str, index: int) -> Path:
    """Where the board of one GPU lies."""
    return folder / f"{node.replace('/', '_')}-{index}.board"
