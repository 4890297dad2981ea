"""Leadership: at most one controller acts at a time, whoever holds the lease; each term has an epoch of its own.

The epoch fences: it rises whenever the lease passes to another, stands in every plan, and whoever has seen a higher one
refuses a lower. A leader counts its lease from before it asked for it, on its own clock: it stops acting no later than
another may begin. A store that is away lets nobody begin; the leader of before keeps the cluster as it is, and goes on
in the same epoch when the store is back and nobody has led since, even if the store has lost everything it knew.
"""

import logging
from collections.abc import Callable
from typing import Protocol

log = logging.getLogger("dynamollm.leadership")

RENEWALS = 4  # a lease, so that one lost renewal or two cost nothing


class Leadership(Protocol):
    """Who leads: a lease with a fencing epoch. Redis, a database file, a Kubernetes Lease."""

    async def hold(self, holder: str, ttl_s: float, epoch: int, seen_epoch: int) -> int | None:
        """Take the lease or renew it; the epoch, or None while another holds it. Raises ``OSError`` where it is away.

        ``epoch``: of the term the holder is in, 0 if in none: it gets that one again unless a higher one is known to
        the store or to it (``seen_epoch``). Else a term begins, in an epoch above all of them.
        """

    async def release(self, holder: str) -> None:
        """Let another take it at once; nothing if it is not the holder's. Raises ``OSError``."""


class Candidate:
    """One controller's part in it: ``renew`` every ``period_s``, ``leads`` before every act."""

    def __init__(self, leadership: Leadership, holder: str, ttl_s: float, clock: Callable[[], float]) -> None:
        self.holder = holder
        self.epoch = 0  # of our term; 0: we have none
        self.reachable = True
        self._leadership = leadership
        self._ttl_s = ttl_s
        self._clock = clock
        self._seen_epoch = 0
        self._until_s = float("-inf")

    @property
    def period_s(self) -> float:
        """How often to renew."""
        return self._ttl_s / RENEWALS

    @property
    def leads(self) -> bool:
        """Whether the lease is ours at this moment, for certain."""
        return self._clock() < self._until_s

    def saw(self, epoch: int) -> None:
        """Take in an epoch that somebody plans or follows in; one above ours ends our term."""
        self._seen_epoch = max(self._seen_epoch, epoch)
        if self.epoch and epoch > self.epoch:
            self._end(f"epoch {epoch} has begun")

    async def renew(self) -> int:
        """Ask once; the epoch we lead in, or 0. A lease store that is away ends no term: it only makes it wait."""
        asked_s = self._clock()
        try:
            epoch = await self._leadership.hold(self.holder, self._ttl_s, self.epoch, self._seen_epoch)
        except OSError as error:
            if self.reachable:
                log.warning("the lease cannot be renewed, the plan is held until it can: %s", error)
            self.reachable = False
            return self.epoch
        self.reachable = True
        if epoch is None:
            self._end("another leads")
        else:
            self._until_s = asked_s + self._ttl_s
            self._seen_epoch = self.epoch = epoch
        return self.epoch

    async def release(self) -> None:
        """Give the lease up, if the store can be told."""
        self._end("it is given up")
        try:
            await self._leadership.release(self.holder)
        except OSError as error:
            log.warning("the lease cannot be given back, it lapses: %s", error)

    def _end(self, why: str) -> None:
        if self.epoch:
            log.warning("%s leads no more, epoch %d: %s", self.holder, self.epoch, why)
        self.epoch = 0
        self._until_s = float("-inf")
