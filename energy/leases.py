"""LeaseTable: who has locked which GPU's clocks, and until when. A pure state machine given ``now_s``.

Each GPU is free or held. Held ends by release, or by its lease running out: a controller that falls silent loses its
locks, so that no GPU stays slow for ever. A lock is written only if it differs from the one in force. Lowering a clock
waits until the last change is ``dwell_s`` old, so that clocks do not flap; raising one never waits, since a late
request may depend on it. Touches no GPU: it says what is to be written, and is told what was.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from energy.gpu import ClockDwellError, ClockLock


@dataclass(frozen=True, slots=True)
class Lease:
    """A lock in force: its range, who set it, when it lapses."""

    lock: ClockLock
    holder: str
    ttl_s: float
    expires_s: float


class LeaseTable:
    """The leases of one node's GPUs, by UUID."""

    def __init__(self, ttl_s: float, dwell_s: float) -> None:
        self._ttl_s = ttl_s
        self._dwell_s = dwell_s
        self._leases: dict[str, Lease] = {}
        self._changed_s: dict[str, float] = {}

    @property
    def leases(self) -> Mapping[str, Lease]:
        """Those in force, those that lapsed and are not reset yet among them."""
        return self._leases

    def must_write(self, uuid: str, lock: ClockLock, now_s: float) -> bool:
        """Whether this lock has to be written to the GPU. Raises ``ClockDwellError`` if it lowers the clock too soon.

        A lock that has lapsed is written again: its reset may be under way or have failed.
        """
        held = self._leases.get(uuid)
        if held is not None and held.lock == lock and now_s < held.expires_s:
            return False
        lowers = held is None or lock.high_mhz < held.lock.high_mhz
        wait_s = self._changed_s.get(uuid, float("-inf")) + self._dwell_s - now_s
        if lowers and wait_s > 0.0:
            raise ClockDwellError(
                f"GPU {uuid}: its clock changed {self._dwell_s - wait_s:.3f} s ago and may be lowered every "
                f"{self._dwell_s:g} s; ask again in {wait_s:.3f} s",
                wait_s,
            )
        return True

    def hold(self, uuid: str, lock: ClockLock, holder: str, now_s: float, ttl_s: float | None = None) -> None:
        """The lock is in force (just written, or there already): its lease begins anew."""
        held = self._leases.get(uuid)
        if held is None or held.lock != lock:
            self._changed_s[uuid] = now_s
        term_s = self._ttl_s if ttl_s is None else min(ttl_s, self._ttl_s)
        self._leases[uuid] = Lease(lock, holder, term_s, now_s + term_s)

    def renew(self, uuids: Iterable[str], holder: str, now_s: float) -> dict[str, Lease]:
        """Those of these GPUs that the holder still holds, their leases begun anew. A lapsed one is not revived."""
        renewed = {}
        for uuid in uuids:
            held = self._leases.get(uuid)
            if held is not None and held.holder == holder and now_s < held.expires_s:
                renewed[uuid] = self._leases[uuid] = replace(held, expires_s=now_s + held.ttl_s)
        return renewed

    def release(self, uuid: str, now_s: float) -> None:
        """The GPU is back at its default clocks."""
        if self._leases.pop(uuid, None) is not None:
            self._changed_s[uuid] = now_s

    def lapsed(self, now_s: float) -> tuple[str, ...]:
        """GPUs to reset now. One whose reset fails stays here until it succeeds."""
        return tuple(uuid for uuid, held in self._leases.items() if now_s >= held.expires_s)
