"""RequestQueue: requests that wait in the gateway, bounded; the important first, the more urgent first among equals.

One lane per (model, class): when the head of a lane finds no place, those behind it would not either. Every operation
is O(log n). Full: the least important gives way to a more important one, sheddable work (priority < 0) may fill only
a share. Nothing here knows instances: see pools/router.py.
"""

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from heapq import heapify, heappop, heappush

from pools.request import Request

Lane = tuple[str, int]  # model, class


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """How many may wait, and how long."""

    max_depth: int = 1024
    ttl_s: float = 30.0  # a request that found no place by then is given up
    sheddable_share: float = 0.5  # of the depth, that requests of priority < 0 may take
    tenant_share: float = float("inf")  # of the depth, that one tenant may take; by default no bound


@dataclass(slots=True, eq=False)
class Waiting:
    """A place in the queue."""

    request: Request
    lane: Lane
    expires_s: float
    exclude: frozenset[str]  # instances it must not go to
    gone: bool = False  # taken out; heaps drop it when they meet it


Ranked = tuple[float, float, int, Waiting]  # (-priority, deadline_s, count, it): the most urgent is the least


class RequestQueue:
    """Requests in order of priority, then deadline."""

    def __init__(self, limits: QueueLimits) -> None:
        self.limits = limits
        self.depth = 0
        self._sheddable = 0
        self._tenants: Counter[str] = Counter()
        self._count = 0
        self._waiting: dict[str, Waiting] = {}
        self._lanes: dict[Lane, list[Ranked]] = {}
        self._least: list[Ranked] = []
        self._by_age: deque[Waiting] = deque()

    def has_share(self, tenant: str) -> bool:
        """Whether one more of this tenant may wait."""
        return self._tenants[tenant] < self.limits.tenant_share * self.limits.max_depth

    def admits(self, priority: int) -> bool:
        """Whether one more of this priority fits without another giving way."""
        limits = self.limits
        if priority < 0 and self._sheddable >= limits.sheddable_share * limits.max_depth:
            return False
        return self.depth < limits.max_depth

    def push(self, request: Request, now_s: float, exclude: frozenset[str]) -> None:
        """Let it wait. Ask ``admits`` first."""
        lane = (request.model, int(request.request_class))
        waiting = Waiting(request, lane, now_s + self.limits.ttl_s, exclude)
        self._count += 1
        rank, deadline_s = float(request.priority), request.deadline_s
        heappush(self._lanes.setdefault(lane, []), (-rank, deadline_s, self._count, waiting))
        heappush(self._least, (rank, -deadline_s, -self._count, waiting))
        self._by_age.append(waiting)
        self._waiting[request.id] = waiting
        self.depth += 1
        self._sheddable += request.priority < 0
        self._tenants[request.tenant] += 1

    def shed_below(self, priority: int) -> Request | None:
        """Take out the least important (the least urgent of those) if it is less important than ``priority``."""
        while self._least and self._least[0][3].gone:
            heappop(self._least)
        if not self._least or self._least[0][0] >= priority:
            return None
        waiting = heappop(self._least)[3]
        self.take(waiting)
        return waiting.request

    def ranked_head(self, lane: Lane) -> Ranked | None:
        """The first of a lane, with its rank."""
        heap = self._lanes.get(lane)
        while heap and heap[0][3].gone:
            heappop(heap)
        return heap[0] if heap else None

    def head(self, lane: Lane) -> Waiting | None:
        """The first of a lane."""
        ranked = self.ranked_head(lane)
        return ranked[3] if ranked is not None else None

    def heads(self) -> list[Ranked]:
        """The first of every lane, as a heap; empty lanes are dropped."""
        self._lanes = {lane: heap for lane, heap in self._lanes.items() if self.ranked_head(lane) is not None}
        return sorted(heap[0] for heap in self._lanes.values())

    def depths(self) -> dict[Lane, int]:
        """How many wait in each lane; a walk over all, for planning and not for routing."""
        return {lane: sum(not ranked[-1].gone for ranked in heap) for lane, heap in self._lanes.items()}

    def take(self, waiting: Waiting) -> None:
        """Take this one out."""
        waiting.gone = True
        del self._waiting[waiting.request.id]
        self.depth -= 1
        self._sheddable -= waiting.request.priority < 0
        tenant = waiting.request.tenant
        self._tenants[tenant] -= 1
        if not self._tenants[tenant]:
            del self._tenants[tenant]
        if len(self._least) > 2 * self.depth + 64:  # mostly taken ones: drop them, at O(1) a removal
            self._least = [ranked for ranked in self._least if not ranked[3].gone]
            heapify(self._least)

    def cancel(self, request_id: str) -> bool:
        """Take a request out by id; False if it does not wait."""
        waiting = self._waiting.get(request_id)
        if waiting is None:
            return False
        self.take(waiting)
        return True

    def drop(self, unwanted: Callable[[Waiting], bool]) -> list[Waiting]:
        """Take out all that are unwanted."""
        out = [waiting for waiting in self._waiting.values() if unwanted(waiting)]
        for waiting in out:
            self.take(waiting)
        return out

    def expired(self, now_s: float) -> list[Request]:
        """Take out those that have waited their time."""
        out: list[Request] = []
        ages = self._by_age
        while ages and (ages[0].gone or ages[0].expires_s <= now_s):
            waiting = ages.popleft()
            if not waiting.gone:
                self.take(waiting)
                out.append(waiting.request)
        return out

    @property
    def next_expiry_s(self) -> float:
        """When the oldest gives up; infinite if none waits."""
        while self._by_age and self._by_age[0].gone:
            self._by_age.popleft()
        return self._by_age[0].expires_s if self._by_age else float("inf")
