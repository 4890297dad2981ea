"""When a step of an emulated device begins and ends. Pure, given ``now_s``.

A profile's step is all of a step, scheduling included. The host that emulates needs time of its own between two steps;
so a step that follows within ``SEAMLESS_S`` began when the one before it was due, and what the host used is not added.
"""

from dataclasses import dataclass

SEAMLESS_S = 0.01  # a busy engine's own time between two steps is well below; an idle engine's pause well above


@dataclass(slots=True)
class Pace:
    """The steps of one engine, one after another."""

    due_s: float = float("-inf")

    def begin(self, now_s: float) -> float:
        """When the step that is asked for now began."""
        return self.due_s if 0.0 <= now_s - self.due_s < SEAMLESS_S else now_s

    def end(self, began_s: float, duration_s: float) -> float:
        """When that step is due."""
        self.due_s = began_s + duration_s
        return self.due_s
