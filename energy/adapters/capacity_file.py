"""Capacity tables on disk: one compressed NumPy archive beside each shipped profile."""

import io
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np

from energy.adapters.catalogue import SHIPPED, write_whole
from energy.capacity import CapacityTable, ClassLoad
from energy.profile import ProfileError

_ARRAYS = ("max_rate", "ttft_p50", "ttft_p99", "tbt_p50", "tbt_p99", "gap_p99", "power")
_FORMAT = 1


def shipped_capacity_path(profile: str) -> Path:
    """Where the table of a shipped profile lies."""
    return SHIPPED / f"{profile}.capacity.npz"


def load_capacity(name_or_path: str | Path) -> CapacityTable:
    """Read a table by path or by the name of a shipped profile. Raises ``ProfileError`` saying how to make it."""
    path = Path(name_or_path)
    if not path.is_file():
        path = shipped_capacity_path(str(name_or_path))
    if not path.is_file():
        raise ProfileError(
            f"no capacity table for {str(name_or_path)!r}; make it with "
            f"`python -m benchmarks.profile_table capacity {name_or_path}`"
        )
    try:
        with np.load(path, allow_pickle=False) as archive:
            head = json.loads(str(archive["head"]))
            arrays = {name: archive[name].astype(np.float64) for name in _ARRAYS}
    except (OSError, KeyError, ValueError) as error:
        raise ProfileError(f"{path}: not a capacity table: {error}") from None
    if head.pop("format", None) != _FORMAT:
        raise ProfileError(f"{path}: not a capacity table of format {_FORMAT}; build it again")
    return CapacityTable(
        profile=head["profile"],
        fingerprint=head["fingerprint"],
        tps=tuple(head["tps"]),
        sm_clocks_mhz=tuple(head["sm_clocks_mhz"]),
        classes=tuple(ClassLoad(**each) for each in head["classes"]),
        loads=tuple(head["loads"]),
        **arrays,
    )


def save_capacity(table: CapacityTable, path: Path) -> None:
    """Write a table; the file appears whole or not at all."""
    head = {
        "format": _FORMAT,
        "profile": table.profile,
        "fingerprint": table.fingerprint,
        "tps": table.tps,
        "sm_clocks_mhz": table.sm_clocks_mhz,
        "classes": [asdict(each) for each in table.classes],
        "loads": table.loads,
    }
    stream = io.BytesIO()
    arrays = {name: getattr(table, name).astype(np.float32) for name in _ARRAYS}
    np.savez_compressed(stream, allow_pickle=False, head=np.array(json.dumps(head)), **arrays)
    write_whole(path, stream.getvalue())
