"""Request and Decision: what the router is asked, and what it answers. Values only.

A ``Request`` is made for every request there is: a frozen dataclass of ten fields takes ten times as long to make.
"""

from dataclasses import dataclass
from enum import Enum

import msgspec

from pools.classes import RequestClass, Slo
from pools.prefixes import Prefix


class Request(msgspec.Struct, frozen=True, gc=False):
    """One request, as far as routing needs to know it."""

    id: str
    model: str
    arrival_s: float
    input_tokens: int
    output_tokens: float  # predicted
    request_class: RequestClass
    slo: Slo
    priority: int = 0  # higher is more important; below 0 may be shed
    tenant: str = "default-flow"
    streamed: bool = True  # else its first token is not seen: the whole answer comes at once
    prefix: Prefix | None = None  # how its prompt begins, where that counts

    @property
    def deadline_s(self) -> float:
        """When its first token is due."""
        return self.arrival_s + self.slo.ttft_s


class RejectReason(Enum):
    """Why a request is not served; the value is what `x-llm-d-request-dropped-reason` says."""

    SATURATED = "rejected-saturated"
    NO_ENDPOINTS = "rejected-no-endpoints"
    UNKNOWN_MODEL = "rejected-unknown-model"
    TTL_EXPIRED = "rejected-ttl-expired"
    SHUTTING_DOWN = "rejected-shutting-down"
    EVICTED_QUEUE_PRESSURE = "evicted-queue-pressure"


@dataclass(frozen=True, slots=True)
class Assigned:
    """Send it there now."""

    instance_id: str
    pool: str


@dataclass(frozen=True, slots=True)
class Queued:
    """Capacity is there but taken: it waits in the gateway, ordered by priority and deadline."""

    depth: int


@dataclass(frozen=True, slots=True)
class Rejected:
    """It will not be served; ``contended`` tells 429 (capacity exists) from 503 (nothing can serve)."""

    reason: RejectReason
    contended: bool
    retry_after_s: float


Decision = Assigned | Queued | Rejected
