"""Outliers: which instances have failed so often in a row that they get a rest, and when each is tried again.

Consecutive failures eject; the rest doubles with each ejection; after it one request at a time probes the instance
until one succeeds. Never more than a share of a pool is out, so that a fault of the requests cannot close a pool.
Pure.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EjectionLimits:
    """When to eject, and for how long."""

    consecutive_failures: int = 3
    max_share: float = 0.5  # of a pool's ready instances, rounded down: a lone instance is never ejected
    base_s: float = 5.0
    max_s: float = 120.0


@dataclass(slots=True)
class Health:
    """What is remembered of one instance."""

    failures: int = 0  # in a row
    ejections: int = 0  # since it last proved itself
    until_s: float = 0.0  # resting until then; 0: not ejected
    probing: bool = False


class Outliers:
    """The health of every instance, by id."""

    def __init__(self, limits: EjectionLimits) -> None:
        self._limits = limits
        self._health: dict[str, Health] = {}
        self.next_probe_s = float("inf")  # when the next rest ends

    def ejected(self, instance_id: str) -> bool:
        """Whether it rests."""
        health = self._health.get(instance_id)
        return health is not None and health.until_s > 0.0

    def probing(self, instance_id: str) -> bool:
        """Whether it may hold one request only."""
        health = self._health.get(instance_id)
        return health is not None and health.probing

    def failed(self, instance_id: str, now_s: float, pool_size: int, pool_ejected: int) -> bool:
        """Count a failure; True if it ejects the instance, of whose pool ``pool_ejected`` of ``pool_size`` rest."""
        limits = self._limits
        health = self._health.setdefault(instance_id, Health())
        health.failures += 1
        if health.until_s > 0.0 or not (health.probing or health.failures >= limits.consecutive_failures):
            return False
        if pool_ejected + 1 > limits.max_share * pool_size:
            return False
        rest_s = min(limits.base_s * 2.0**health.ejections, limits.max_s)
        health.failures = 0
        health.ejections += 1
        health.probing = False
        health.until_s = now_s + rest_s
        self.next_probe_s = min(self.next_probe_s, health.until_s)
        return True

    def succeeded(self, instance_id: str) -> bool:
        """Count a success; True if it ends a probe."""
        health = self._health.get(instance_id)
        if health is None:
            return False
        probed = health.probing
        health.failures = 0
        if probed:
            health.probing = False
            health.ejections -= 1
        return probed

    def wake(self, now_s: float) -> bool:
        """Let those whose rest is over be probed; True if any."""
        if now_s < self.next_probe_s:
            return False
        resting = [h for h in self._health.values() if h.until_s > 0.0]
        over = [h for h in resting if h.until_s <= now_s]
        for health in over:
            health.until_s = 0.0
            health.probing = True
        self.next_probe_s = min((h.until_s for h in resting if h.until_s > 0.0), default=float("inf"))
        return bool(over)

    def keep(self, instance_ids: frozenset[str]) -> None:
        """Forget all others."""
        self._health = {k: h for k, h in self._health.items() if k in instance_ids}
