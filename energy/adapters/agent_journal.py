"""The agent's journal of locks as a file, whole at every moment, owned by one agent at a time."""

import fcntl
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

from energy.adapters.catalogue import write_whole
from energy.gpu import ClockLock

_FORMAT = 1


class JournalError(Exception):
    """The journal cannot be used; the message names the file and the fix."""


class FileJournal:
    """Locks by GPU UUID in a JSON file. Raises ``JournalError`` if another agent has it, or it cannot be written."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._owner = self._own()

    def _own(self) -> TextIO:
        lock_path = self._path.with_name(self._path.name + ".lock")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            owner = lock_path.open("w")
        except OSError as error:
            raise JournalError(f"{lock_path}: {error.strerror}; choose another place with --journal") from None
        try:
            fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            owner.close()
            raise JournalError(f"{self._path}: another agent is running on this journal; stop it first") from None
        return owner

    def read(self) -> dict[str, ClockLock]:
        """The locks noted; none if there is no file. Raises ``JournalError`` for a file that is no journal."""
        try:
            document = json.loads(self._path.read_text(encoding="utf-8"))
            if document["format"] != _FORMAT:
                raise ValueError(document["format"])
            return {uuid: ClockLock(int(low), int(high)) for uuid, (low, high) in document["locks"].items()}
        except FileNotFoundError:
            return {}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise JournalError(
                f"{self._path}: not an agent's journal of format {_FORMAT}; reset the GPUs' clocks "
                "(nvidia-smi -rgc) and remove it"
            ) from None

    def write(self, locks: Mapping[str, ClockLock]) -> None:
        """Replace the file. It need not reach the disk: a machine that loses power loses its locks too."""
        document = {"format": _FORMAT, "locks": {uuid: [lock.low_mhz, lock.high_mhz] for uuid, lock in locks.items()}}
        write_whole(self._path, json.dumps(document).encode())

    def close(self) -> None:
        """Let another agent have it."""
        self._owner.close()
