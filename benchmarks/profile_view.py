"""What the profile commands, plots and documents read off a capacity table."""

import numpy as np
from numpy.typing import NDArray

from energy.capacity import CapacityTable

Floats = NDArray[np.float64]

PAPER_TOKENS_PER_S = 2000.0  # load of the paper's heat-map tables


def rate_of_tokens(table: CapacityTable, k: int, tokens_per_s: float) -> float:
    """Requests/s of class ``k`` whose input and output together are this many tokens/s."""
    each = table.classes[k]
    return tokens_per_s / (each.input_tokens + each.output_tokens)


def energy_grid(table: CapacityTable, k: int, rate_rps: float | None) -> Floats:
    """J per request of class ``k`` by (TP, clock) at this rate, or each cell's highest; inf where the SLO is missed."""
    if rate_rps is None:
        highest = table.max_rate[:, :, k]
        with np.errstate(divide="ignore"):
            return np.where(highest > 0, table.power[:, :, k, -1] / highest, np.inf)
    tps = np.asarray(table.tps)[:, None]
    return table.energy_j_per_request(tps, np.asarray(table.sm_clocks_mhz)[None, :], k, rate_rps)


def least(energy: Floats, table: CapacityTable) -> tuple[int, int, float] | None:
    """(TP, clock, J per request) of the least energy; None if no cell is feasible."""
    if not np.isfinite(energy).any():
        return None
    t, i = np.unravel_index(int(np.argmin(energy)), energy.shape)
    return table.tps[t], table.sm_clocks_mhz[i], float(energy[t, i])
