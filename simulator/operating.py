"""OperatingPoints: the (TP, clock) pairs of a profile as one table of coefficients for the compiled loop."""

from collections.abc import Callable

import numpy as np

from energy.profile import EnergyProfile, StepCoefficients
from simulator.world import COEFFICIENTS, F


class OperatingPoints:
    """Every TP of a profile at every one of its clocks, or at the supported clock nearest to it."""

    def __init__(
        self, profile: EnergyProfile, supported_mhz: Callable[[int], int] = lambda asked_mhz: asked_mhz
    ) -> None:
        pairs = [(tp, clock) for tp in profile.tensor_parallel for clock in profile.sm_clocks_mhz]
        self._steps = [profile.step(tp, supported_mhz(clock)) for tp, clock in pairs]
        self._index = {pair: index for index, pair in enumerate(pairs)}
        self._name = profile.name
        self.table: F = np.array([tuple(step) for step in self._steps], dtype=COEFFICIENTS)

    def index(self, tp: int, sm_clock_mhz: int) -> int:
        """Row of the table. Raises ``KeyError`` with what is there for a pair that is not."""
        try:
            return self._index[tp, sm_clock_mhz]
        except KeyError:
            raise KeyError(
                f"profile {self._name} has no TP{tp} at {sm_clock_mhz} MHz; take a clock of its list"
            ) from None

    def step(self, index: int) -> StepCoefficients:
        """Coefficients of one row."""
        return self._steps[index]
