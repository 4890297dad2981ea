"""What tells the energy ledger of the gateway's requests: a router that reports what it decides, and an observer.

Joins ``pools`` and ``proxy`` to ``energy``, which knows nothing of either. On a request's path: plain calls, no I/O.
"""

from collections.abc import Callable
from typing import Protocol

from energy.accounting import User
from pools.classes import RequestClass
from pools.escalation import Escalated
from pools.request import Assigned, Decision, Rejected, Request
from proxy.outcome import Outcome
from proxy.services import Router

_USERS = 4096  # kept made: one is looked up for every request


class Ledger(Protocol):
    """What books requests: the ``EnergyLedger``, or what feeds one elsewhere."""

    def began(self, request_id: str, user: User, instance_id: str, input_tokens: int, now_s: float) -> None:
        """A request was sent to an instance."""

    def first_token(self, request_id: str, now_s: float) -> None:
        """Its first token came."""

    def ended(
        self, request_id: str, now_s: float, input_tokens: int | None = ..., output_tokens: int | None = ...
    ) -> object:
        """It is over, answered or not."""

    def energy_j(self, request_id: str, now_s: float, output_tokens: int | None = ...) -> float | None:
        """Energy of one in flight, up to now; None where nobody knows."""


def nobody(request: Request) -> None:
    """Nobody wants to know of arrivals."""


class AccountedRouter:
    """The router it is given, telling the ledger who went where and when the first token came.

    ``first_token`` is told of every first token, too, while the request still counts as not begun; ``arrived`` of every
    request, once.
    """

    def __init__(
        self,
        router: Router,
        ledger: Ledger,
        first_token: Callable[[str, float], None] = lambda request_id, now_s: None,
        arrived: Callable[[Request], None] = nobody,
    ) -> None:
        self._router = router
        self._ledger = ledger
        self._first_token = first_token
        self._arrived = arrived
        self._users: dict[tuple[str, str, RequestClass, str], User] = {}  # made before
        self.on_finished = router.on_finished  # the end is told by the outcome, which has the engine's tokens
        self.on_failed = router.on_failed
        self.on_cancelled = router.on_cancelled

    def route(self, request: Request, now_s: float, exclude: frozenset[str] = frozenset()) -> Decision:
        """As the router decides."""
        if not exclude:  # a retry has been told
            self._arrived(request)
        decision = self._router.route(request, now_s, exclude)
        if decision.__class__ is Assigned:
            self._began(request, decision, now_s)
        return decision

    def release(self, now_s: float) -> list[tuple[Request, Assigned | Rejected]]:
        """As the router lets them go."""
        released = self._router.release(now_s)
        for request, decision in released:
            if isinstance(decision, Assigned):
                self._began(request, decision, now_s)
        return released

    def escalate(self, now_s: float) -> list[Escalated]:
        """As the router takes late requests elsewhere."""
        escalated = self._router.escalate(now_s)
        for moved in escalated:
            if isinstance(moved.decision, Assigned):
                self._began(moved.request, moved.decision, now_s)
        return escalated

    def on_first_token(self, request_id: str, now_s: float) -> None:
        """Its first token came."""
        self._ledger.first_token(request_id, now_s)
        self._first_token(request_id, now_s)
        self._router.on_first_token(request_id, now_s)

    def _began(self, request: Request, assigned: Assigned, now_s: float) -> None:
        key = request.model, assigned.pool, request.request_class, request.tenant
        user = self._users.get(key)
        if user is None:
            if len(self._users) >= _USERS:
                self._users.clear()
            user = self._users[key] = User(key[0], key[1], request.request_class.name, key[3])
        self._ledger.began(request.id, user, assigned.instance_id, request.input_tokens, now_s)


class GatewayAccounts:
    """What the gateway calls: ``book`` is one of its observers, ``energy_j`` answers for its response header."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def book(self, outcome: Outcome) -> None:
        """A request is over, served or not."""
        self._ledger.ended(outcome.request.id, outcome.ended_s, outcome.prompt_tokens, outcome.completion_tokens)

    def energy_j(self, outcome: Outcome) -> float | None:
        """Energy of a request that has just been answered and is not booked yet; None if it was not metered."""
        return self._ledger.energy_j(outcome.request.id, outcome.ended_s, outcome.completion_tokens)
