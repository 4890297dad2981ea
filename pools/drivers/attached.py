"""AttachedFile: servers that somebody else started, as a file tells them, followed while it changes.

A change is read once the file has stayed the same between two looks, so that one that is just being written is not
taken for a short one. A file that is wrong changes nothing: the servers of the last good one stand, and the log says
what is wrong and where. It knows nothing of the file's format.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pools.instances import GpuSlot, InstanceShape

log = logging.getLogger("dynamollm.attach")


@dataclass(frozen=True, slots=True)
class AttachedServer:
    """One server; equal ones are the same. ``gpus``: those it runs on, where that is known."""

    pool: str
    shape: InstanceShape
    url: str
    sm_clock_mhz: int  # what it is to run at, where its GPUs' clocks can be set
    gpus: tuple[GpuSlot, ...] = ()


class AttachedFile:
    """Reads ``path`` when it has changed; ``parse`` makes servers of its text."""

    def __init__(self, path: Path, parse: Callable[[str], tuple[AttachedServer, ...]]) -> None:
        """``parse`` raises ``ValueError`` whose text names the file and the line or key that is wrong."""
        self.path = path
        self._parse = parse
        self._read_as: tuple[int, int, int] | None = None  # how it was when it was read
        self._last: tuple[int, int, int] | None = None  # how it was at the last look

    def read(self) -> tuple[AttachedServer, ...]:
        """All servers it has now. Raises ``OSError``, and ``ValueError`` for what it cannot be."""
        try:
            text = self.path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path}: {error}") from None
        return self._parse(text)

    def changed(self) -> tuple[AttachedServer, ...] | None:
        """All servers, if it has changed since it was read, and is right; else None. Blocks; raises nothing."""
        try:
            status = self.path.stat()
            now = (status.st_mtime_ns, status.st_size, status.st_ino)  # of a file moved over it the inode differs
            stays = self._last in (None, now)
            self._last = now
            if now == self._read_as or not stays:
                return None
            self._read_as = now
            return self.read()
        except FileNotFoundError:
            if self._read_as is not None:
                log.error("%s: is gone; its servers stay as they were", self.path)
            self._read_as = None
        except OSError as error:
            log.error("%s: %s; its servers stay as they were", self.path, error.strerror)
        except ValueError as error:
            log.error("%s\n  its servers stay as they were", error)
        return None
