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


@dataclass(slots=True, eq=False)
class Totals:
    """The same, running: whoever routes counts arrivals in it."""

    arrived: int = 0
    input_tokens: int = 0
    finished: int = 0
    output_tokens: int = 0


class Traffic:
    """Counts by (model, class)."""

    def __init__(self) -> None:
        self._totals: dict[str, list[Totals]] = {}

    def totals(self, model: str, request_class: RequestClass) -> Totals:
        """Where one (model, class) is counted."""
        return self._of(model)[request_class]

    def _of(self, model: str) -> list[Totals]:
        totals = self._totals.get(model)
        if totals is None:
            totals = self._totals[model] = [Totals() for _ in REQUEST_CLASSES]
        return totals

    def finished(self, request: Request, output_tokens: int) -> None:
        """Count a request that has ended well."""
        known = self._totals.get(request.model) or self._of(request.model)
        totals = known[request.request_class]
        totals.finished += 1
        totals.output_tokens += output_tokens

    def snapshot(self) -> dict[tuple[str, RequestClass], ClassTraffic]:
        """The totals now, of every class of every model seen."""
        return {
            (model, c): ClassTraffic(t.arrived, t.input_tokens, t.finished, t.output_tokens)
            for model, totals in self._totals.items()
            for c, t in zip(REQUEST_CLASSES, totals, strict=True)
        }
