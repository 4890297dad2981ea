"""SloWatch: what share of its SLO each request used on its instance, and whether it is late, once that is known. Pure.

A late first token shows before its request ends, the mean gap between tokens when it does. A request is late once.
"""

from collections.abc import Callable

from pools.router import Router
from proxy.outcome import Outcome


class SloWatch:
    """``on_outcome`` belongs among the gateway's observers; ``on_first_token`` is told before the router is."""

    def __init__(self, router: Router, on_share: Callable[[str, float, int], None]) -> None:
        """``on_share``: told the instance, the share, and 1 if that makes the request late, else 0."""
        self._router = router
        self._on_share = on_share

    def on_first_token(self, request_id: str, now_s: float) -> None:
        """Take in a first token."""
        flight = self._router.fleet.flights.get(request_id)
        if flight is not None and not flight.started:
            request = flight.request
            share = (now_s - request.arrival_s) / request.slo.ttft_s
            self._on_share(flight.instance_id, share, int(share > 1.0))

    def on_outcome(self, outcome: Outcome) -> None:
        """Take in how a request ended."""
        if outcome.instance_id is None or not outcome.fields.stream:
            return
        if (share := tbt_share(outcome)) is not None:
            request, first_token_s = outcome.request, outcome.first_token_s or 0.0
            in_ttft = first_token_s - request.arrival_s <= request.slo.ttft_s
            self._on_share(outcome.instance_id, share, int(share > 1.0 and in_ttft))


def tbt_share(outcome: Outcome) -> float | None:
    """The share of its TBT SLO that a stream's mean gap used; None where it is not known."""
    if outcome.first_token_s is None or outcome.cancelled or not outcome.fields.stream:
        return None
    gaps = (outcome.completion_tokens or 1) - 1
    return (outcome.ended_s - outcome.first_token_s) / gaps / outcome.request.slo.tbt_s if gaps > 0 else None
