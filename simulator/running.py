"""RunningCluster: a controller that finds a cluster running and watches it for a while before it decides.

That is how `dynamollm serve` begins: the configured instances come up, traffic is watched, then the controller is
called for the first time. With this around it, a simulation begins in the same way.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from solver.control import Controller, Effects, Level, Observation, ScaleOut, Tick


@dataclass(frozen=True, slots=True)
class RunningInstance:
    """One instance that is READY when the simulation begins."""

    id: str
    pool: str
    tp: int
    sm_clock_mhz: int
    node: str


class RunningCluster:
    """``controller`` decides from ``watched_s`` on; without one, nothing ever changes."""

    def __init__(
        self, instances: Sequence[RunningInstance], controller: Controller | None = None, watched_s: float = 0.0
    ) -> None:
        self._instances = tuple(instances)
        self._controller = controller
        self._watched_s = watched_s
        self._begun = False
        self._decides = False

    def first_tick(self, now_s: float) -> Tick:
        """At once: the instances are there."""
        return Tick(now_s, Level.INSTANCE)

    def on_tick(self, tick: Tick, observation: Observation) -> Effects:
        """First the instances, then what the controller says."""
        now_s = observation.now_s
        if not self._begun:
            self._begun = True
            starts = tuple(
                ScaleOut(
                    deadline_s=float("inf"),
                    instance_id=i.id,
                    pool=i.pool,
                    tp=i.tp,
                    sm_clock_mhz=i.sm_clock_mhz,
                    node=i.node,
                )
                for i in self._instances
            )
            watched_s = self._watched_s if self._controller is not None else float("inf")
            return Effects(starts, Tick(now_s + watched_s, Level.INSTANCE))
        assert self._controller is not None  # else there is no second tick
        if not self._decides:
            self._decides = True
            tick = self._controller.first_tick(now_s)
        return self._controller.on_tick(tick, observation)
