"""Capacity tables for the engine settings of the experiments, built once and kept beside their results.

The shipped tables hold for the default chunk of prompt tokens; the experiments run with a smaller one
(``simulator.experiment.Scenario.limits``).
"""

from collections.abc import Callable
from pathlib import Path

from benchmarks.profile_table import shipped_traffic
from energy.adapters.capacity_file import load_capacity, save_capacity
from energy.capacity import CapacityTable
from energy.profile import EnergyProfile, ProfileError
from simulator.batching import EngineLimits
from simulator.capacity import build_capacity, engine_limits, fingerprint


def experiment_capacity(
    profile: EnergyProfile, limits: EngineLimits, folder: Path, progress: Callable[[str], None]
) -> CapacityTable:
    """The table of this profile for engines with these limits, from ``folder`` if it is there and current."""

    def limits_of(held: EnergyProfile, tp: int) -> EngineLimits:
        return limits._replace(kv_blocks=engine_limits(held, tp).kv_blocks)

    traffic = shipped_traffic()
    path = folder / f"{profile.name}--chunk{limits.max_num_batched_tokens}.npz"
    try:
        table = load_capacity(path)
        if table.fingerprint == fingerprint(profile, traffic, limits_of):
            return table
    except ProfileError:
        pass
    table = build_capacity(profile, traffic, limits_of, progress=progress)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_capacity(table, path)
    return table
