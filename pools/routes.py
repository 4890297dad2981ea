"""Where each class of request may go: the plan's shares, else its own pool, else the nearest that dominates it.

Fragmentation (DynamoLLM section IV): a pool that cannot fill an instance has none, and its class is served by a pool
kept for requests at least as long in BOTH dimensions: SL may go to ML or LL, never to MS. Pure functions of a
ClusterView.
"""

from dataclasses import dataclass

from pools.classes import REQUEST_CLASSES, RequestClass
from pools.view import ClusterView, PoolView


@dataclass(frozen=True, slots=True)
class Route:
    """Pools for one (model, class): ``first`` shared out by ``weights``; ``then`` in this order when those are full."""

    first: tuple[str, ...]
    weights: tuple[float, ...]
    then: tuple[str, ...]


def distance(pool_class: RequestClass, request_class: RequestClass) -> tuple[int, int]:
    """How far a dominating pool is: steps in both sizes, then steps in input size.

    Of two equally far the one with the same inputs is nearer: short prompts queued behind long ones lose their TTFT,
    while long outputs beside them cost little.
    """
    longer_input = pool_class.input_size - request_class.input_size
    longer_output = pool_class.output_size - request_class.output_size
    return longer_input + longer_output, longer_input


def route_of(view: ClusterView, model: str, request_class: RequestClass, served: frozenset[str]) -> Route:
    """The route of one class; ``served`` names the pools that have an instance to serve with.

    Empty where no pool of the model dominates the class.
    """
    dominating = sorted(
        (p for p in view.pools if p.model == model and p.request_class.dominates(request_class)),
        key=lambda p: distance(p.request_class, request_class),
    )
    shares = [s for s in view.shares.get((model, request_class), ()) if s[1] > 0.0 and s[0] in served]
    if not shares:
        shares = [(p.name, 1.0) for p in _nearest(dominating, request_class, served)]
    first = tuple(name for name, _ in shares)
    then = tuple(p.name for p in dominating if p.name not in first)
    return Route(first, tuple(weight for _, weight in shares), then)


def _nearest(dominating: list[PoolView], request_class: RequestClass, served: frozenset[str]) -> list[PoolView]:
    """Those pools, all equally near, that come first among the ones with instances."""
    able = [p for p in dominating if p.name in served]
    return [p for p in able if p.request_class is able[0].request_class]


def routes_of(view: ClusterView, served: frozenset[str]) -> dict[str, tuple[Route, ...]]:
    """The routes of every model, by class value."""
    models = dict.fromkeys(p.model for p in view.pools)
    return {m: tuple(route_of(view, m, c, served) for c in REQUEST_CLASSES) for m in models}
