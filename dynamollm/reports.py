"""What gateways and the controller tell each other through the store. Values only; ``document`` and ``read`` are JSON.

A gateway reports what it counts (``GatewayReport``), often, with a time to live; the leading controller publishes the
cluster to route to (``PublishedCluster``), with a stamp. Times are Unix seconds: monotonic clocks differ by machine.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec

from dynamollm.store import NEVER, Document, Stamp
from pools.classes import RequestClass
from pools.instances import Instance
from pools.peers import PeerLoad

GATEWAYS = "gateways"  # the group of reports
CONTROLLERS = "controllers"
CLUSTER = "cluster"  # the published document
LEDGER = "ledger"  # the stream of what requests did
LOAD = "load"  # the stream of past demand

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Totals:
    """What one gateway ever counted of one (model, class)."""

    model: str
    request_class: int
    arrived: int
    input_tokens: int
    finished: int
    output_tokens: int
    queued: int  # now


@dataclass(frozen=True, slots=True)
class GatewayReport:
    """One gateway, as it is now. Totals are since its start; a restarted gateway has another name."""

    at_unix_s: float
    follows: Stamp = NEVER  # of the cluster it routes by
    totals: tuple[Totals, ...] = ()
    loads: dict[str, PeerLoad] = field(default_factory=dict)  # its own requests in flight, by instance
    given: dict[str, tuple[int, ...]] = field(default_factory=dict)  # requests it ever gave an instance, by class
    shares: dict[str, float] = field(default_factory=dict)  # worst share of an SLO used lately, by instance
    late: dict[str, int] = field(default_factory=dict)  # requests it ever found late, by instance
    tenants: dict[str, float] = field(default_factory=dict)  # requests of this minute, by tenant
    minute: int = 0  # Unix minute of those
    ledger_batches: int = 0  # it has sent so many to the ledger, or is about to


@dataclass(frozen=True, slots=True)
class ControllerReport:
    """One controller: where it answers, whether it leads, and what it has booked."""

    url: str
    epoch: int = 0  # 0: it stands by
    booked: dict[str, int] = field(default_factory=dict)  # the last batch of each gateway in its ledger


@dataclass(frozen=True, slots=True)
class Share:
    """How much of a (model, class) goes to a pool, as the plan has it."""

    model: str
    request_class: RequestClass
    pool: str
    weight: float


@dataclass(frozen=True, slots=True)
class PublishedCluster:
    """What runs, and how classes are spread over it: all that a gateway needs to route."""

    at_unix_s: float
    controller: str  # who published it
    plan: Stamp  # of the plan it is on the way to
    instances: tuple[Instance, ...]
    shares: tuple[Share, ...]
    profiles: dict[str, str] = field(default_factory=dict)  # by model, as the leader's configuration has them
    coming: tuple[str, ...] = ()  # pools for which a start is ordered that has not begun


def document(value: object) -> Document:
    """The value as plain values."""
    plain: Document = msgspec.to_builtins(value)
    return plain


def read(plain: Any, kind: type[T]) -> T:
    """The value of a document. Raises ``ValueError`` where it is none."""
    return msgspec.convert(plain, kind)


def shares_of(shares: Iterable[Share]) -> dict[tuple[str, RequestClass], tuple[tuple[str, float], ...]]:
    """How classes are spread over pools, as a deployment has it."""
    spread: dict[tuple[str, RequestClass], tuple[tuple[str, float], ...]] = {}
    for share in shares:
        key = (share.model, share.request_class)
        spread[key] = (*spread.get(key, ()), (share.pool, share.weight))
    return spread
