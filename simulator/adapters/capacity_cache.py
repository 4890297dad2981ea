"""The capacity table of any profile: shipped, or built once and kept in the user's cache folder."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from energy.adapters.capacity_file import load_capacity, save_capacity, shipped_capacity_path
from energy.capacity import CapacityTable
from energy.profile import EnergyProfile, ProfileError
from simulator.capacity import ClassTraffic, build_capacity, fingerprint


def cache_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """Where built tables are kept: ``$DYNAMOLLM_CACHE``, else the user's cache folder."""
    if environ.get("DYNAMOLLM_CACHE"):
        return Path(environ["DYNAMOLLM_CACHE"]) / "capacity"
    home = environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "dynamollm" / "capacity"


def capacity_table(
    profile: EnergyProfile,
    traffic: Sequence[ClassTraffic],
    progress: Callable[[str], None] = lambda _: None,
    folder: Path | None = None,
) -> CapacityTable:
    """The table of this profile for this traffic: the shipped one or a kept one if it fits, else built and kept."""
    wanted = fingerprint(profile, traffic)
    kept = (folder or cache_folder()) / f"{wanted}.npz"
    for path in (shipped_capacity_path(profile.name), kept):
        try:
            table = load_capacity(path)
        except ProfileError:
            continue
        if table.fingerprint == wanted:
            return table
    table = build_capacity(profile, traffic, progress=progress)
    kept.parent.mkdir(parents=True, exist_ok=True)
    save_capacity(table, kept)
    return table
