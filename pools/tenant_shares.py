"""TenantShares: how much one tenant may weigh in what all tenants share, so that none can spoil it for the others.

A tenant's answers count fully until they hold ``share`` of all that counts (or ``floor`` answers, where there is little
else), then only as fast as what they hold fades. While others have taught next to nothing there is nothing to spoil,
and a tenant alone is not limited. What only the tenant itself reads is not limited by this either.
"""

from collections import OrderedDict
from typing import Any

HALF_LIFE = 4000  # answers after which one counts half
SHARE = 0.25
FLOOR = 500.0
ALONE = 10.0  # answers of all others together up to which a tenant counts as alone
TENANTS = 1024  # remembered; the longest unseen is forgotten


class TenantShares:
    """Bounded memory of who has taught how much."""

    def __init__(self, share: float = SHARE, floor: float = FLOOR, half_life: int = HALF_LIFE) -> None:
        self._ratio = share / (1.0 - share)
        self._floor = floor
        self._fade = 0.5 ** (1.0 / half_life)
        self._answers = 0
        self._total = 0.0
        self._held: OrderedDict[str, tuple[float, int]] = OrderedDict()  # mass, and at which answer it was that

    def weigh(self, tenant: str) -> float:
        """Book an answer of this tenant; the weight it has in what is shared, 0..1."""
        self._answers += 1
        self._total *= self._fade
        mass, at = self._held.pop(tenant, (0.0, self._answers))
        mass *= self._fade ** (self._answers - at)
        others = max(self._total - mass, 0.0)
        limit = max(self._floor, self._ratio * others)
        weight = 1.0 if others < ALONE else min(max(limit - mass, 0.0), 1.0)
        self._total += weight
        self._held[tenant] = (mass + weight, self._answers)
        if len(self._held) > TENANTS:
            self._held.popitem(last=False)
        return weight

    def snapshot(self) -> dict[str, Any]:
        """Who holds how much, now."""
        held = [[name, mass * self._fade ** (self._answers - at)] for name, (mass, at) in self._held.items()]
        return {"total": self._total, "held": held}

    def restore(self, snapshot: dict[str, Any]) -> None:
        """Take over a snapshot."""
        self._answers = 0
        self._total = float(snapshot["total"])
        self._held = OrderedDict((str(name), (float(mass), 0)) for name, mass in snapshot["held"][-TENANTS:])
