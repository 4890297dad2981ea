"""Router: which instance a request goes to, now, or that it waits, or that it is refused.

The whole decision is ``Router.route``: known model? -> nobody waits for the same? -> own pool -> dominating pools ->
(if its deadline is lost anyway: where it is least late) -> queue -> shed. Inside a pool it is filter -> score -> pick
over live load, whose arithmetic and policy stand in pools/scoring.py; where a class may go stands in pools/routes.py;
what waits in pools/queue.py; what is known of instances in pools/fleet.py.

Synchronous and pure: told the time, it answers with values. It opens no socket, reads no clock, and never retries: the
relay does that, once, by calling ``route`` again with ``exclude``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush

from pools import scoring
from pools.classes import REQUEST_CLASSES
from pools.escalation import Escalated, EscalationLimits, late
from pools.fleet import Fleet, Flight, InstanceCounts, OpenPool
from pools.instances import InstanceState
from pools.outliers import EjectionLimits
from pools.peers import PeerLoad
from pools.prefixes import Prefix
from pools.queue import QueueLimits, RequestQueue, Waiting
from pools.request import Assigned, Decision, Queued, Rejected, RejectReason, Request
from pools.routes import routes_of
from pools.scoring import Weights
from pools.traffic import Totals, Traffic
from pools.view import ClusterView, EngineLoad

NOBODY: frozenset[str] = frozenset()
COMING = frozenset({InstanceState.STARTING, InstanceState.PARKED})  # nothing yet, but worth waiting for


@dataclass(frozen=True, slots=True)
class RouterLimits:
    """Everything about the router that can be configured."""

    weights: Weights = field(default_factory=Weights)
    queue: QueueLimits = field(default_factory=QueueLimits)
    ejection: EjectionLimits = field(default_factory=EjectionLimits)
    escalation: EscalationLimits = field(default_factory=EscalationLimits)
    max_retry_after_s: float = 30.0
    whole_pass_s: float = 0.05  # how often those waiting are offered every instance again


class Path:
    """A route with its pools at hand: ``first`` in proportion to ``weights`` (smooth round robin), then ``then``.

    ``totals`` is where traffic on it is counted.
    """

    __slots__ = ("all", "credits", "first", "names", "then", "totals", "weights")

    def __init__(
        self, first: Sequence[OpenPool], weights: Sequence[float], then: Sequence[OpenPool], totals: Totals
    ) -> None:
        self.totals = totals
        self.first = list(first)
        self.then = list(then)
        self.weights = list(weights)
        self.credits = [0.0] * len(self.first)
        self.all = self.first + self.then
        self.names = frozenset(p.name for p in self.all)

    def in_turn(self) -> list[OpenPool]:
        """The pools in the order to try for one request, where there are several to begin with."""
        k = scoring.take_turn(self.weights, self.credits)
        return [self.first[k], *self.first[:k], *self.first[k + 1 :], *self.then]


class Router:
    """Decides for one gateway process."""

    def __init__(self, limits: RouterLimits | None = None) -> None:
        self.limits = limits or RouterLimits()
        self.fleet = Fleet(self.limits.ejection)
        self.queue = RequestQueue(self.limits.queue)
        self.traffic = Traffic()
        self._paths: dict[str, list[Path]] = {}
        self._view: ClusterView | None = None
        self._coming: frozenset[str] = frozenset()  # pools with an instance that will be READY, or ordered
        self._refused: list[tuple[Request, Rejected]] = []  # since the last release
        self._freed: set[int] = set()  # instances something has left since
        self._whole_pass_s = 0.0
        self._finish_gap_s = 0.0
        self._finished_s = 0.0

    # The decision -----------------------------------------------------------------------------------------------------

    def route(self, request: Request, now_s: float, exclude: frozenset[str] = NOBODY) -> Decision:
        """Decide where a request goes; it is counted there at once. ``exclude`` names instances it must not go to."""
        paths = self._paths.get(request.model)
        if paths is None:
            return Rejected(RejectReason.UNKNOWN_MODEL, contended=False, retry_after_s=0.0)
        if now_s >= self.fleet.outliers.next_probe_s:
            self._probe(now_s)
        path = paths[request.request_class]
        if not exclude:  # a retry has been counted
            path.totals.arrived += 1
            path.totals.input_tokens += request.input_tokens
        if not (self.queue.depth and self._others_first(request)):
            i = self._find_on_time(path, request, now_s, exclude)
            if i == scoring.NONE or request.prefix is not None:
                i = self._find_else(i, path, request, now_s, exclude)
            if i != scoring.NONE:
                return self.fleet.sent(i, request, now_s)
        return self._wait(path, request, now_s, exclude)

    def _find_else(self, i: int, path: Path, request: Request, now_s: float, exclude: frozenset[str]) -> int:
        """One better than ``i`` for its prefix; where none would keep the SLO even if empty, the one least late."""
        if request.prefix is not None:
            i = self._nearest_prefix(i, request.prefix, path, request, now_s, exclude)
        if i == scoring.NONE and self._hopeless(path, request, now_s):
            return self._find_least_late(path, request, now_s, exclude)
        return i

    def _find_on_time(self, path: Path, request: Request, now_s: float, exclude: frozenset[str]) -> int:
        """The best instance with headroom; own pool before dominating ones."""
        fleet, (spread, margin) = self.fleet, self.limits.weights
        if fleet.unsettled:
            fleet.settle()
        costs, load = fleet.costs, fleet.load
        input_tokens, output_tokens, slo = request.input_tokens, request.output_tokens, request.slo
        budget_s = request.arrival_s + slo.ttft_s - now_s
        for pool in path.all if len(path.first) <= 1 else path.in_turn():
            for window in pool.windows if len(pool.windows) <= 1 else pool.in_turn():
                candidates = fleet.without(window, exclude) if exclude else window
                i = scoring.choose(
                    candidates, costs, load, now_s, input_tokens, output_tokens, budget_s, slo.tbt_s, spread, margin
                )
                if i != scoring.NONE:
                    return i
        return scoring.NONE

    def _nearest_prefix(
        self, i: int, prefix: Prefix, path: Path, request: Request, now_s: float, exclude: frozenset[str]
    ) -> int:
        """The instance that holds more of the prompt than ``i`` and scores better for it; else ``i``."""
        fleet, (spread, margin) = self.fleet, self.limits.weights
        held = fleet.prefixes.match(prefix.blocks)
        if not held:
            return i
        input_tokens, output_tokens, slo = request.input_tokens, request.output_tokens, request.slo
        budget_s = request.arrival_s + slo.ttft_s - now_s

        def score(j: int, blocks: int) -> float:
            cached = prefix.cached_tokens(blocks, input_tokens)
            given = (now_s, input_tokens, cached, output_tokens, budget_s, slo.tbt_s, spread, margin)
            return scoring.score(fleet.costs, fleet.load, j, *given)

        best = i
        least = score(i, held.get(fleet.assigned[i].instance_id, 0)) if i != scoring.NONE else scoring.INFINITE
        for instance_id, blocks in held.items():
            j = fleet.index.get(instance_id, scoring.NONE)
            if j in (i, scoring.NONE) or instance_id in exclude or fleet.open_pool[j] not in path.names:
                continue
            if (scored := score(j, blocks)) < least:
                best, least = j, scored
        return best

    def _hopeless(self, path: Path, request: Request, now_s: float) -> bool:
        """Whether even an empty instance would break its SLO: then waiting for one is no use."""
        fleet, slo = self.fleet, request.slo
        budget_s, margin = request.deadline_s - now_s, self.limits.weights.margin
        tokens = request.input_tokens, request.output_tokens
        fastest = [pool.fastest for pool in path.all if pool.fastest != scoring.NONE]
        return not any(
            scoring.attainable(fleet.costs, i, fleet.lone_step_s[i], *tokens, budget_s, slo.tbt_s, margin)
            for i in fastest
        )

    def _find_least_late(self, path: Path, request: Request, now_s: float, exclude: frozenset[str]) -> int:
        """Of a window of every pool, the instance with room that gives a first token soonest."""
        fleet = self.fleet
        fleet.settle()
        some = [i for pool in path.all for window in pool.in_turn()[:1] for i in fleet.without(window, exclude)]
        return scoring.choose_least_late(
            some, fleet.costs, fleet.load, now_s, request.input_tokens, request.output_tokens
        )

    # The queue --------------------------------------------------------------------------------------------------------

    def _others_first(self, request: Request) -> bool:
        """Whether one at least as urgent already waits for the same places."""
        head = self.queue.head((request.model, request.request_class))
        if head is None:
            return False
        other = head.request
        return (-other.priority, other.deadline_s) <= (-request.priority, request.deadline_s)

    def _wait(self, path: Path, request: Request, now_s: float, exclude: frozenset[str]) -> Decision:
        """Let it wait; or refuse it, or one less important, where too many do."""
        served = any(self.fleet.without(window, exclude) for pool in path.all for window in pool.windows)
        if not served and path.names.isdisjoint(self._coming):
            return Rejected(RejectReason.NO_ENDPOINTS, contended=False, retry_after_s=self.retry_after_s)
        queue = self.queue
        if not queue.admits(request.priority) or not queue.has_share(request.tenant):
            shed = queue.shed_below(request.priority) if queue.has_share(request.tenant) else None
            if shed is None:
                return self._refusal(RejectReason.SATURATED)
            self._refuse(shed, RejectReason.EVICTED_QUEUE_PRESSURE)
        queue.push(request, now_s, exclude)
        return Queued(queue.depth)

    def _refuse(self, request: Request, reason: RejectReason) -> None:
        self._refused.append((request, self._refusal(reason)))

    def _refusal(self, reason: RejectReason) -> Rejected:
        return Rejected(reason, contended=True, retry_after_s=self.retry_after_s)

    @property
    def next_release_s(self) -> float:
        """When to call ``release`` at the latest; infinite while nothing waits. Call it also after any event below."""
        if self._refused:
            return 0.0
        return min(self.queue.next_expiry_s, self._whole_pass_s) if self.queue.depth else float("inf")

    def release(self, now_s: float) -> list[tuple[Request, Assigned | Rejected]]:
        """Those that waited and now have an instance, and those that will not be served.

        What was full stays full until something ends there: only instances where something did are offered; all of
        them every ``whole_pass_s``, for clocks, plans and lost deadlines change what fits, too.
        """
        for request in self.queue.expired(now_s):
            self._refuse(request, RejectReason.TTL_EXPIRED)
        out: list[tuple[Request, Assigned | Rejected]] = list(self._refused)
        self._refused.clear()
        if self.queue.depth:
            if now_s >= self.fleet.outliers.next_probe_s:
                self._probe(now_s)
            whole = now_s >= self._whole_pass_s
            if whole:
                self._whole_pass_s = now_s + self.limits.whole_pass_s
            if whole or self._freed:
                self._place_waiting(now_s, whole, out)
            self._freed.clear()
        return out

    def _place_waiting(self, now_s: float, whole: bool, out: list[tuple[Request, Assigned | Rejected]]) -> None:
        """Offer places to the heads of all lanes, the most urgent first; a lane whose head finds none is done."""
        heads = self.queue.heads()
        while heads:
            rank = heappop(heads)
            waiting = rank[-1]
            i = self._place(waiting, now_s, whole)
            if i == scoring.NONE:
                continue
            self.queue.take(waiting)
            out.append((waiting.request, self.fleet.sent(i, waiting.request, now_s)))
            following = self.queue.ranked_head(waiting.lane)
            if following is not None:
                heappush(heads, following)

    def _place(self, waiting: Waiting, now_s: float, whole: bool) -> int:
        request = waiting.request
        path = self._paths[request.model][request.request_class]
        if whole:
            i = self._find_on_time(path, request, now_s, waiting.exclude)
            return self._find_else(i, path, request, now_s, waiting.exclude)
        fleet, (spread, margin) = self.fleet, self.limits.weights
        fleet.settle()
        slo = request.slo
        return scoring.choose(
            [i for i in fleet.without(self._freed, waiting.exclude) if fleet.open_pool[i] in path.names],
            fleet.costs,
            fleet.load,
            now_s,
            request.input_tokens,
            request.output_tokens,
            request.deadline_s - now_s,
            slo.tbt_s,
            spread,
            margin,
        )

    @property
    def retry_after_s(self) -> float:
        """When one refused now might find a place: those waiting, at the pace at which requests end; 1 s to a limit."""
        return min(max((self.queue.depth + 1) * self._finish_gap_s, 1.0), self.limits.max_retry_after_s)

    # Escalation -------------------------------------------------------------------------------------------------------

    def escalate(self, now_s: float) -> list[Escalated]:
        """Take requests that will get their first token too late to an instance that can keep their deadline still.

        Nothing of them has been answered, so the relay can stop them where they are. What is past its deadline by
        ``squash_late_s`` is given up, sent or waiting. Call it now and then: it looks at all requests in flight.
        """
        limits = self.limits.escalation
        self.fleet.assume_started(now_s)
        done = self._squash_waiting(now_s) if limits.squash_late_s < float("inf") else []
        searches = limits.searches
        for flight in late(self.fleet.flights.values(), now_s):
            request = flight.request
            if now_s > request.deadline_s + limits.squash_late_s:
                self._left(request.id, now_s)
                done.append(Escalated(request, flight.instance_id, self._refusal(RejectReason.TTL_EXPIRED)))
            elif now_s < request.deadline_s and flight.resteers < limits.resteers and searches > 0:
                searches -= 1
                assigned = self._resteer(flight, now_s)
                if assigned is not None:
                    done.append(Escalated(request, flight.instance_id, assigned))
        return done

    def _resteer(self, flight: Flight, now_s: float) -> Assigned | None:
        """Take a request to another instance that can keep its deadline, if there is one."""
        request = flight.request
        paths = self._paths.get(request.model)
        if paths is None:
            return None
        path = paths[request.request_class]
        i = self._find_on_time(path, request, now_s, frozenset((flight.instance_id,)))
        if i == scoring.NONE:
            return None
        self._left(request.id, now_s)
        assigned = self.fleet.sent(i, request, now_s)
        self.fleet.flights[request.id].resteers = flight.resteers + 1
        return assigned

    def _squash_waiting(self, now_s: float) -> list[Escalated]:
        limit_s = now_s - self.limits.escalation.squash_late_s
        squashed = self.queue.drop(lambda w: w.request.deadline_s < limit_s)
        return [Escalated(w.request, None, self._refusal(RejectReason.TTL_EXPIRED)) for w in squashed]

    # What is told -----------------------------------------------------------------------------------------------------

    def update(self, view: ClusterView, now_s: float) -> None:
        """Take over a view of the cluster. A view older than the present one is ignored."""
        if self._view is not None and view.version < self._view.version:
            return
        self._view = view
        self._coming = view.coming.union(v.instance.pool for v in view.instances if v.instance.state in COMING)
        self._freed.clear()  # indices of the view before
        self.fleet.update(view)
        self._plan_paths()
        known = self._paths
        for waiting in self.queue.drop(lambda w: w.request.model not in known):
            self._refuse(waiting.request, RejectReason.NO_ENDPOINTS)

    def _plan_paths(self) -> None:
        """Follow which pools can serve: after every change of view, health or sleep."""
        if self._view is None:
            return
        pools = self.fleet.pools
        served = frozenset(name for name, pool in pools.items() if pool.windows)
        self._paths = {
            model: [
                Path(
                    [pools[n] for n in r.first if n in pools],
                    r.weights,
                    [pools[n] for n in r.then],
                    self.traffic.totals(model, request_class),
                )
                for request_class, r in zip(REQUEST_CLASSES, routes, strict=True)
            ]
            for model, routes in routes_of(self._view, served).items()
        }
        self._whole_pass_s = 0.0

    def observe(self, instance_id: str, seen: EngineLoad, now_s: float) -> None:
        """Take in what an engine says of itself: load from elsewhere, asleep or awake."""
        if self.fleet.observe(instance_id, seen):
            self._plan_paths()

    def counts(self) -> dict[str, InstanceCounts]:
        """What is counted for each instance."""
        return self.fleet.counts()

    def hear(self, peers: Mapping[str, PeerLoad], now_s: float, gateways: int = 0) -> None:
        """Take in what all other gateways together have on each instance; it stands until they are heard again.

        ``gateways``: how many of them are expected to send, meanwhile, where this one does.
        """
        self.fleet.hear(peers, now_s, gateways)

    def in_flight(self, instance_id: str) -> int:
        """Requests sent to an instance that have not ended."""
        return self.fleet.in_flight(instance_id)

    def on_first_token(self, request_id: str, now_s: float) -> None:
        """Its first byte came: the instance works."""
        flight = self.fleet.flights.get(request_id)
        if flight is None or flight.started:
            return
        self.fleet.started(flight, now_s)
        if self.fleet.outliers.succeeded(flight.instance_id):
            self._reopen()

    def on_finished(self, request_id: str, output_tokens: int, now_s: float) -> None:
        """It ended well, with this many tokens."""
        fleet = self.fleet
        flight = fleet.flights.get(request_id)
        if flight is not None:
            if not flight.started and fleet.outliers.succeeded(flight.instance_id):
                self._reopen()
            self._left(request_id, now_s)
            self.traffic.finished(flight.request, output_tokens)
        gap_s, most_s = now_s - self._finished_s, self.limits.max_retry_after_s
        self._finish_gap_s += 0.1 * ((gap_s if gap_s < most_s else most_s) - self._finish_gap_s)
        self._finished_s = now_s

    def on_cancelled(self, request_id: str, now_s: float) -> None:
        """The client has gone, whether it waited or ran."""
        if not self.queue.cancel(request_id):
            self._left(request_id, now_s)

    def on_failed(self, request_id: str, instance_id: str, now_s: float) -> None:
        """The instance failed it: refused, broke off, or answered with its own error (not the client's)."""
        self._left(request_id, now_s)
        if self.fleet.failed(instance_id, now_s):
            self._reopen()

    def _left(self, request_id: str, now_s: float) -> Flight | None:
        flight = self.fleet.left(request_id, now_s)
        if flight is not None and self.queue.depth and flight.instance_id in self.fleet.index:
            self._freed.add(self.fleet.index[flight.instance_id])
        return flight

    def _probe(self, now_s: float) -> None:
        if self.fleet.outliers.wake(now_s):
            self._reopen()

    def _reopen(self) -> None:
        self.fleet.reopen()
        self._plan_paths()
