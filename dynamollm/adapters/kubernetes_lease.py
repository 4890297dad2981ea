"""KubernetesLease: leadership by a coordination/v1 Lease, for deployments that share no other store.

What ``kubectl get lease`` shows is what holds: who leads, since when, until when; ``leaseTransitions`` is the epoch.
A write names the version it was read at, so that of two who take a lapsed lease the server lets one have it. Lapses are
judged as client-go judges them: by how long the same renewal has been seen here, never by the other's clock.
"""

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from pools.drivers.kubernetes_api import ConflictError, KubernetesApi, NotFoundError
from pools.drivers.port import DriverError

LEASES = "leases"


class KubernetesLease:
    """See ``dynamollm.leadership.Leadership``."""

    def __init__(self, api: KubernetesApi, name: str, clock: Callable[[], float], unix_s: Callable[[], float]) -> None:
        """``clock`` counts seconds; ``unix_s`` tells the time that people read in the Lease."""
        self._api = api
        self._name = name
        self._clock = clock
        self._unix_s = unix_s
        self._seen: tuple[str, float] = ("", 0.0)  # the version last read, and when it was first seen

    async def hold(self, holder: str, ttl_s: float, epoch: int, seen_epoch: int) -> int | None:
        """See ``Leadership``."""
        try:
            return await self._hold(holder, ttl_s, epoch, seen_epoch)
        except ConflictError:
            return None  # another was quicker; of our own renewal, the next one tells
        except DriverError as error:
            raise OSError(str(error)) from None

    async def _hold(self, holder: str, ttl_s: float, epoch: int, seen_epoch: int) -> int | None:
        try:
            lease = await self._api.get(LEASES, self._name)
        except NotFoundError:
            # an epoch that is ours is kept where the Lease was lost and nobody has led since
            term = epoch if epoch and epoch >= seen_epoch else max(epoch, seen_epoch) + 1
            await self._api.create(LEASES, self._lease(holder, ttl_s, term, self._now()))
            return term
        spec, meta = lease["spec"], lease["metadata"]
        other, known = spec.get("holderIdentity") or "", int(spec.get("leaseTransitions") or 0)
        if other not in ("", holder) and not self._lapsed(meta["resourceVersion"], spec):
            return None
        ours = other == holder and epoch and epoch >= max(known, seen_epoch)
        term = epoch if ours else max(known, seen_epoch, epoch) + 1
        since = spec.get("acquireTime") if ours else self._now()
        body = self._lease(holder, ttl_s, term, since)
        body["metadata"]["resourceVersion"] = meta["resourceVersion"]
        await self._api.replace(LEASES, self._name, body)
        return term

    def _lapsed(self, version: str, spec: dict[str, Any]) -> bool:
        now_s = self._clock()
        if self._seen[0] != version:
            self._seen = (version, now_s)
        return now_s - self._seen[1] >= float(spec.get("leaseDurationSeconds") or 0)

    async def release(self, holder: str) -> None:
        """See ``Leadership``; the epoch stays."""
        try:
            lease = await self._api.get(LEASES, self._name)
            if lease["spec"].get("holderIdentity") != holder:
                return
            epoch = int(lease["spec"].get("leaseTransitions") or 0)
            body = self._lease("", 1.0, epoch, self._now())
            body["metadata"]["resourceVersion"] = lease["metadata"]["resourceVersion"]
            await self._api.replace(LEASES, self._name, body)
        except (NotFoundError, ConflictError):
            return
        except DriverError as error:
            raise OSError(str(error)) from None

    def _lease(self, holder: str, ttl_s: float, epoch: int, since: Any) -> dict[str, Any]:
        return {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": {"name": self._name},
            "spec": {
                "holderIdentity": holder,
                "leaseDurationSeconds": max(round(ttl_s), 1),
                "leaseTransitions": epoch,
                "acquireTime": since,
                "renewTime": self._now(),
            },
        }

    def _now(self) -> str:
        return datetime.fromtimestamp(self._unix_s(), UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
