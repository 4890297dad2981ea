"""Escalation: what becomes of requests that were sent to an instance and will get their first token too late.

Mispredictions are met in this order (DynamoLLM, section on mispredictions): those waiting are always in order of
deadline (pools/queue.py); the clock is raised (a controller's business); requests without a first token go to another
instance that can still keep their deadline; what is hopelessly past it is squashed. Decides nothing by itself:
``Router.escalate`` calls this, and the relay carries it out, which is safe because nothing has been answered yet.
Pure.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from pools.fleet import Flight
from pools.request import Assigned, Rejected, Request


@dataclass(frozen=True, slots=True)
class EscalationLimits:
    """How far escalation goes."""

    resteers: int = 1  # times one request may be taken to another instance
    searches: int = 16  # looked for another instance in one call: it runs beside traffic
    squash_late_s: float = float("inf")  # past its deadline by this, a request is given up; never, unless configured


@dataclass(frozen=True, slots=True)
class Escalated:
    """A request without a first token: stop it on ``left`` (nowhere, if it waited) and follow the decision."""

    request: Request
    left: str | None
    decision: Assigned | Rejected


def expected_s(flight: Flight, now_s: float) -> float:
    """When its first token will come: when it was due, or, late by x, in another x (as ``scoring.wait_s``)."""
    return flight.due_s if now_s < flight.due_s else 2.0 * now_s - flight.due_s


def late(flights: Iterable[Flight], now_s: float) -> list[Flight]:
    """Those without a first token that will miss their deadline, the important first, then the urgent."""
    missing = [f for f in flights if not f.started and expected_s(f, now_s) > f.request.deadline_s]
    return sorted(missing, key=lambda f: (-f.request.priority, f.request.deadline_s))
