"""Tenant limits: how many requests a minute each tenant may send, over all gateways together. Pure; given ``now_s``.

Each gateway counts its own and hears now and then what the others counted: so a tenant may exceed the limit by what it
sends to the others between two reports. The request's path waits for nobody.
"""

from collections.abc import Iterable, Mapping

from pools.request import Decision, Rejected, RejectReason, Request
from proxy.services import Router

MINUTE_S = 60.0
MOST_TENANTS = 10_000  # beyond, they are counted as one
OTHER = "other"


class TenantLimit:
    """Requests of each tenant in this Unix minute."""

    def __init__(self, requests_per_minute: float, unix_offset_s: float) -> None:
        self.minute = 0
        self.own: dict[str, float] = {}
        self._limit = requests_per_minute
        self._offset_s = unix_offset_s
        self._peers: dict[str, float] = {}

    def retry_after_s(self, tenant: str, now_s: float) -> float:
        """0, and one more is counted, if the tenant may send it; else how long it should wait."""
        self._turn(now_s)
        if tenant not in self.own and len(self.own) >= MOST_TENANTS:
            tenant = OTHER
        used = self.own.get(tenant, 0.0)
        if used + self._peers.get(tenant, 0.0) >= self._limit:
            return (self.minute + 1) * MINUTE_S - (now_s + self._offset_s)
        self.own[tenant] = used + 1.0
        return 0.0

    def hear(self, peers: Iterable[tuple[int, Mapping[str, float]]], now_s: float) -> None:
        """Take in what each of the other gateways counted, and in which minute."""
        self._turn(now_s)
        self._peers = {}
        for minute, counts in peers:
            if minute == self.minute:
                for tenant, count in counts.items():
                    self._peers[tenant] = self._peers.get(tenant, 0.0) + count

    def _turn(self, now_s: float) -> None:
        minute = int((now_s + self._offset_s) // MINUTE_S)
        if minute != self.minute:
            self.minute, self.own, self._peers = minute, {}, {}


class LimitedRouter:
    """The router it is given, refusing what exceeds its tenant's limit."""

    def __init__(self, router: Router, limit: TenantLimit) -> None:
        self._limit = limit
        self._route = router.route
        self.release = router.release
        self.escalate = router.escalate
        self.on_first_token = router.on_first_token
        self.on_finished = router.on_finished
        self.on_failed = router.on_failed
        self.on_cancelled = router.on_cancelled

    def route(self, request: Request, now_s: float, exclude: frozenset[str] = frozenset()) -> Decision:
        """As the router decides; a retry has been counted."""
        wait_s = 0.0 if exclude else self._limit.retry_after_s(request.tenant, now_s)
        if wait_s > 0.0:
            return Rejected(RejectReason.SATURATED, contended=True, retry_after_s=wait_s)
        return self._route(request, now_s, exclude)
