"""Traffic: what has come and gone of each (model, class), counted since the start. The planner's view of demand.

Running totals only: who wants a rate takes the difference of two snapshots over the time between. Pure.
"""

from dataclasses import dataclass

from pools.classes import REQUEST_CLASSES, RequestClass
from pools.request import Request


@dataclass(frozen=True, slots=True)
class ClassTraffic:
    """Totals of one (model, class)."""

    arrived: int = 0
    input_tokens: int = 0
    finished: int = 0
    output_tokens: int = 0


class Traffic:
    """Counts by (model, class)."""

    def __init__(self) -> None:
        self._totals: dict[str, list[list[int]]] = {}

    def _of(self, request: Request) -> list[int]:
        totals = self._totals.get(request.model)
        if totals is None:
            totals = self._totals[request.model] = [[0, 0, 0, 0] for _ in REQUEST_CLASSES]
        return totals[request.request_class]

    def arrived(self, request: Request) -> None:
        """Count a request that asks to be routed."""
        totals = self._of(request)
        totals[0] += 1
        totals[1] += request.input_tokens

    def finished(self, request: Request, output_tokens: int) -> None:
        """Count a request that has ended well."""
        totals = self._of(request)
        totals[2] += 1
        totals[3] += output_tokens

    def snapshot(self) -> dict[tuple[str, RequestClass], ClassTraffic]:
        """The totals now, of every class of every model seen."""
        return {(model, c): ClassTraffic(*totals[c]) for model, totals in self._totals.items() for c in REQUEST_CLASSES}
