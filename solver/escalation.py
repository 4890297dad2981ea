"""Escalation: what to do about an instance that misses its SLO although its clock is at the top. Pure.

DynamoLLM, mispredictions: under-estimates are repaired at the instance, mildest measure first: order the queue by
deadline, clock to maximum, send what has not started elsewhere, reject what is past its deadline. The clock is the
chooser's.
"""

from dataclasses import dataclass

import numpy as np

from solver.control import BoolArray, Escalate, Escalation, InstanceViews

_LADDER = (Escalation.REORDER, Escalation.RESTEER, Escalation.SQUASH)


@dataclass(frozen=True, slots=True)
class EscalationSettings:
    """When a measure is taken, and for how long."""

    slack: float = 0.0  # SLO slack below which an instance is in trouble
    holds_s: float = 15.0
    squash: bool = False  # whether requests past their deadline may be rejected at all


class EscalationLadder:
    """Remembers how far up the ladder each instance is."""

    def __init__(self, settings: EscalationSettings | None = None) -> None:
        self._settings = settings or EscalationSettings()
        self._rung: dict[str, int] = {}

    def climb(self, now_s: float, instances: InstanceViews, at_top: BoolArray) -> list[Escalate]:
        """One measure more for every instance in trouble for another tick; ``at_top`` (I,) marks the highest clock."""
        trouble = (instances.slo_slack < self._settings.slack) & (instances.waiting > 0) & at_top
        if not np.any(trouble):
            self._rung.clear()
            return []
        rungs = {instances.ids[i]: self._rung.get(instances.ids[i], -1) + 1 for i in np.flatnonzero(trouble)}
        highest = len(_LADDER) - 1 if self._settings.squash else len(_LADDER) - 2
        self._rung = {name: min(rung, highest) for name, rung in rungs.items()}
        return [
            Escalate(
                instance_id=name,
                measure=_LADDER[rung],
                deadline_s=now_s + self._settings.holds_s,
                why=f"SLO missed at the highest clock for {rungs[name] + 1} ticks",
            )
            for name, rung in self._rung.items()
        ]
