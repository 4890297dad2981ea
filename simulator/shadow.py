"""Shadows: clusters that are only simulated, fed what a real one is asked, as it becomes known.

A request is known when it has been answered, so shadows follow some way behind. What each has used since it began is
what a real cluster under its policy would have used, as far as the engine model goes. Pure: whoever feeds them says
until when all is known.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

from simulator.setup import SimulationSetup
from simulator.simulation import Simulation
from simulator.workload.arrivals import Arrivals, Workload
from solver.control import Controller

World = Callable[[], tuple[SimulationSetup, Controller]]
"""Makes a pretend world and what controls it."""


class Shadows:
    """Simulations by name, at the same moment."""

    def __init__(self, worlds: Mapping[str, World]) -> None:
        self._runs: dict[str, Simulation] = {}
        for name, make in worlds.items():
            setup, controller = make()
            setup = replace(setup, sample_s=float("inf"))  # a series is for plots, and a shadow runs for weeks
            run = Simulation(setup, Workload("as it comes", float("inf"), 0.0, lambda: iter(())), controller, 0)
            run.begin()
            self._runs[name] = run

    def follow(self, requests: Arrivals, until_s: float) -> dict[str, float]:
        """Take in all requests that came up to ``until_s`` and go on until then; joules of each since it began.

        Times are seconds since they began. Raises ``ValueError`` for a request from before the last ``until_s``.
        """
        energy_j = {}
        for name, run in self._runs.items():
            run.feed(requests)
            run.advance(until_s)
            energy_j[name] = sum(run.total_energy_j().values())
        return energy_j
