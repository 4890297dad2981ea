"""Fleet: the instances as columns of cost and load, and which of each pool may be given requests now.

The router's memory of the cluster. It counts what this gateway has sent (first), what other gateways say they have
there (second), what engines say of load from elsewhere (third), and knows which instances are ready, awake and not
resting after failures. It decides nothing: see pools/router.py.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import msgspec

from energy.profile import StepCoefficients
from pools import scoring
from pools.classes import REQUEST_CLASSES
from pools.instances import Instance, InstanceState
from pools.outliers import EjectionLimits, Outliers
from pools.peers import NOTHING, PeerLoad
from pools.prefixes import PrefixIndex
from pools.request import Assigned, Request
from pools.scoring import Costs, Load
from pools.view import ClusterView, EngineLoad, InstanceView

WINDOW = 32  # candidates looked at together; larger pools are looked at window by window, in turn


Kind = tuple[StepCoefficients, int, int]  # step, TP, chunk: all that a request costs on an empty instance


class Flight(msgspec.Struct, eq=False, gc=False):
    """A request sent to an instance and not finished; the lengths are those it was counted with."""

    request: Request
    instance_id: str
    promised_tbt_s: float
    due_s: float  # when its first token was expected
    resteers: int = 0  # times it was taken to another instance
    started: bool = False  # its first token has come


@dataclass(frozen=True, slots=True)
class InstanceCounts:
    """What is counted for one instance, for controllers."""

    running: float = 0.0  # requests sent and not ended, of all gateways
    pending_tokens: float = 0.0
    context_tokens: float = 0.0
    given: tuple[int, ...] = (0,) * len(REQUEST_CLASSES)  # ever, by class


@dataclass(slots=True, eq=False)
class OpenPool:
    """The instances of a pool that may be given requests, in the order of their index, cut into windows."""

    name: str
    windows: list[list[int]]
    fastest: int = scoring.NONE  # the one that reads a prompt soonest when empty
    turn: int = 0

    def in_turn(self) -> list[list[int]]:
        """The windows, starting with another one each time."""
        windows = self.windows
        if len(windows) <= 1:
            return windows
        self.turn = turn = (self.turn + 1) % len(windows)
        return windows[turn:] + windows[:turn]


@dataclass(slots=True, eq=False)
class _Foreign:
    """Requests on an instance that this gateway did not send: counted now, seen at the last scrape."""

    counted: float = 0.0
    context_tokens: float = 0.0
    last: float = 0.0


class _Known:
    """What stays the same, or must stay, of an instance while views come and go."""

    __slots__ = ("assigned", "costs", "foreign", "given", "lone_step_s", "peers", "promises", "view")

    def __init__(self) -> None:
        self.view: InstanceView | None = None
        self.costs: tuple[float, ...] = ()
        self.lone_step_s = 0.0
        self.assigned = Assigned("", "")
        self.given = [0] * len(REQUEST_CLASSES)
        self.promises: dict[float, int] = {}
        self.foreign = _Foreign()
        self.peers = NOTHING

    def show(self, v: InstanceView, kinds: dict[Kind, int]) -> bool:
        """Take over a view of it; False if nothing has changed."""
        if v is self.view or v == self.view:
            return False
        limits, tp = v.limits, v.instance.shape.tp
        kind = kinds.setdefault((v.step, tp, limits.max_batched_tokens), len(kinds))
        self.view = v
        self.costs = scoring.cost_row(
            v.step, tp, kind, limits.max_batched_tokens, limits.max_seqs, limits.kv_capacity_tokens
        )
        self.lone_step_s = scoring.decode_step_s(v.step, 0.0, 0.0)
        self.assigned = Assigned(v.instance.id, v.instance.pool)
        return True


class Fleet:
    """Cost, load and health of every instance of the view, by index."""

    def __init__(self, ejection: EjectionLimits) -> None:
        self.outliers = Outliers(ejection)
        self.prefixes = PrefixIndex()
        self.views: tuple[InstanceView, ...] = ()
        self.index: dict[str, int] = {}
        self.flights: dict[str, Flight] = {}
        self.pools: dict[str, OpenPool] = {}
        self.costs = Costs(*([] for _ in Costs._fields))
        self.load = Load(*([] for _ in Load._fields))
        self.open_pool: list[str] = []  # the pool it may serve in now, or nothing
        # of each instance, by index
        self.assigned: list[Assigned] = []  # one answer, made once
        self.lone_step_s: list[float] = []
        self.given: list[list[int]] = []  # requests it was ever given, by class
        self._steps: list[StepCoefficients] = []
        self._seats: list[float] = []  # the column of costs, to write on
        self._promises: list[dict[float, int]] = []  # how many are owed each TBT
        self._known: dict[str, _Known] = {}
        self._kinds: dict[Kind, int] = {}
        self.unsettled: set[int] = set()  # instances whose load has changed since it was settled
        self._asleep: set[str] = set()
        self._expected = 0  # gateways that are expected to send where this one does

    def update(self, view: ClusterView) -> None:
        """Take over a new view; what is in flight on instances that stay is kept. What did not change costs little."""
        index = {v.instance.id: i for i, v in enumerate(view.instances)}
        if len(index) != len(view.instances):
            raise ValueError(f"cluster view {view.version}: two instances have one id; give each its own")
        known = {instance_id: self._known.get(instance_id) or _Known() for instance_id in index}
        all_known = list(known.values())
        changed = [i for i, (k, v) in enumerate(zip(all_known, view.instances, strict=True)) if k.show(v, self._kinds)]
        before = dict(zip(self.index, zip(*self.load, strict=True), strict=True))
        unsettled = [self.views[i].instance.id for i in self.unsettled]
        rows = [before.get(instance_id, scoring.LOAD_EMPTY) for instance_id in index]
        self.load = Load(*_columns(rows, len(Load._fields)))
        costs = _columns([k.costs for k in all_known], len(Costs._fields))
        self._seats = costs[Costs._fields.index("max_seqs")]
        self.costs = Costs(*costs)
        self.assigned = [k.assigned for k in all_known]
        self.lone_step_s = [k.lone_step_s for k in all_known]
        self.given = [k.given for k in all_known]
        self._steps = [v.step for v in view.instances]
        self._promises = [k.promises for k in all_known]
        self._known, self.views, self.index = known, view.instances, index
        self.unsettled = {index[name] for name in unsettled if name in index}
        self.unsettled.update(changed)
        self.outliers.keep(frozenset(index))
        if self.prefixes:
            self.prefixes.keep({v.instance.id for v in view.instances if v.instance.state is InstanceState.READY})
        self._asleep &= index.keys()
        for flight in self.flights.values():
            if flight.instance_id not in index:
                flight.instance_id = ""  # gone with its instance; should that come back, it comes back empty
        self.pools = {p.name: OpenPool(p.name, []) for p in view.pools}
        self.reopen()

    def reopen(self) -> None:
        """Make the candidates of every pool anew: ready, awake, not resting after failures."""
        members: dict[str, list[int]] = {name: [] for name in self.pools}
        self.open_pool = [""] * len(self.views)
        for i, v in enumerate(self.views):
            instance = v.instance
            if instance.pool in members and self._is_open(instance):
                members[instance.pool].append(i)
                self.open_pool[i] = instance.pool
            seats = 1.0 if self.outliers.probing(instance.id) else float(v.limits.max_seqs)
            if seats != self._seats[i]:
                self._seats[i] = seats
                self.unsettled.add(i)
        for name, indices in members.items():
            count = -(-len(indices) // WINDOW)
            pool = self.pools[name]
            pool.windows = [indices[k::count] for k in range(count)]
            pool.fastest = min(indices, key=self.costs.token_s.__getitem__, default=scoring.NONE)

    def _is_open(self, instance: Instance) -> bool:
        if instance.state is not InstanceState.READY or instance.id in self._asleep:
            return False
        return not self.outliers.ejected(instance.id)

    def without(self, candidates: Iterable[int], exclude: frozenset[str]) -> list[int]:
        """The candidates less those named."""
        return [i for i in candidates if self.assigned[i].instance_id not in exclude]

    def failed(self, instance_id: str, now_s: float) -> bool:
        """Count a failure of an instance; True if it is ejected for it."""
        i = self.index.get(instance_id)
        if i is None:
            return False
        pool = self.views[i].instance.pool
        ready = [
            v.instance.id for v in self.views if v.instance.pool == pool and v.instance.state is InstanceState.READY
        ]
        resting = sum(self.outliers.ejected(r) for r in ready)
        return self.outliers.failed(instance_id, now_s, len(ready), resting)

    def observe(self, instance_id: str, seen: EngineLoad) -> bool:
        """Take in a scrape: load that came from elsewhere, and whether it is awake. True if the candidates changed.

        A scrape is older than our own counts: what it says above them counts only if two in a row say so.
        """
        i = self.index.get(instance_id)
        if i is None:
            return False
        foreign = self._known[instance_id].foreign
        own = self.load.in_flight[i] - foreign.counted
        excess = max(seen.running + seen.waiting - own, 0.0)
        self._count_foreign(i, foreign, min(excess, foreign.last))
        foreign.last = excess
        was_awake = instance_id not in self._asleep
        if seen.awake == was_awake:
            return False
        (self._asleep.discard if seen.awake else self._asleep.add)(instance_id)
        self.reopen()
        return True

    def _count_foreign(self, i: int, foreign: "_Foreign", requests: float) -> None:
        """Let ``requests`` from elsewhere stand in the columns, with the mean context of our own."""
        load = self.load
        own = load.in_flight[i] - foreign.counted
        mean_tokens = (load.context_tokens[i] - foreign.context_tokens) / own if own > 0.0 else 0.0
        context_tokens = requests * mean_tokens
        load.in_flight[i] += requests - foreign.counted
        load.context_tokens[i] += context_tokens - foreign.context_tokens
        foreign.counted, foreign.context_tokens = requests, context_tokens
        self.unsettled.add(i)

    def in_flight(self, instance_id: str) -> int:
        """Requests this gateway has on an instance; 0 for one it does not know."""
        i = self.index.get(instance_id)
        if i is None:
            return 0
        known = self._known[instance_id]
        return round(self.load.in_flight[i] - known.foreign.counted - known.peers.in_flight)

    def counts(self) -> dict[str, InstanceCounts]:
        """What is counted, by instance."""
        load = self.load
        return {
            instance_id: InstanceCounts(
                load.in_flight[i], load.pending_tokens[i], load.context_tokens[i], tuple(self.given[i])
            )
            for instance_id, i in self.index.items()
        }

    # --- other gateways ----------------------------------------------------------------------------------------------

    def own(self) -> dict[str, PeerLoad]:
        """What this gateway has on each instance, for the others to hear; those it has nothing on are left out."""
        load, own = self.load, {}
        for instance_id, i in self.index.items():
            known = self._known[instance_id]
            peers, foreign = known.peers, known.foreign
            in_flight = load.in_flight[i] - foreign.counted - peers.in_flight
            if in_flight > 0.0:
                own[instance_id] = PeerLoad(
                    in_flight,
                    max(load.pending_tokens[i] - peers.pending_tokens, 0.0),
                    load.context_tokens[i] - foreign.context_tokens - peers.context_tokens,
                    load.reserved_tokens[i] - peers.reserved_tokens,
                    load.prompt_share[i] - peers.prompt_share,
                    min(known.promises, default=scoring.UNPROMISED_S),
                )
        return own

    def hear(self, peers: Mapping[str, PeerLoad], now_s: float, gateways: int = 0) -> None:
        """Let what all other gateways together have on each instance stand beside our own, instead of the last word.

        So many ``gateways`` see what we see, and get requests like ours: until they are heard again, each of them is
        expected to send where we send.
        """
        self._expected = gateways
        self.settle()
        for instance_id, i in self.index.items():
            known, new = self._known[instance_id], peers.get(instance_id, NOTHING)
            old, known.peers = known.peers, new
            if new != old:
                scoring.change(self.load, i, now_s, [n - o for n, o in zip(new[:-1], old[:-1], strict=True)])
                self.load.tbt_limit_s[i] = min(*known.promises, new.tbt_limit_s, scoring.UNPROMISED_S)
                self.unsettled.add(i)

    def sent(self, i: int, request: Request, now_s: float) -> Assigned:
        """Count a request sent to instance ``i``."""
        if i in self.unsettled:
            self.settle()
        load, tbt_s = self.load, request.slo.tbt_s
        if load.between_s[i] >= tbt_s:  # cannot be kept: it must not keep others away either
            tbt_s = scoring.UNPROMISED_S
        scoring.add(self.costs, load, i, now_s, request.input_tokens, request.output_tokens, tbt_s)
        self.unsettled.add(i)
        promises = self._promises[i]
        promises[tbt_s] = promises.get(tbt_s, 0) + 1
        self.given[i][request.request_class] += 1
        answer = self.assigned[i]
        if request.prefix is not None:
            capacity_tokens = self.views[i].limits.kv_capacity_tokens
            self.prefixes.add(answer.instance_id, request.prefix.blocks, capacity_tokens)
        self.flights[request.id] = Flight(request, answer.instance_id, tbt_s, load.prefill_done_s[i])
        if self._expected:
            self._expect(i, request, now_s, tbt_s)
        return answer

    def _expect(self, i: int, request: Request, now_s: float, tbt_s: float) -> None:
        """Count what the other gateways are expected to send beside this request."""
        known, each = self._known[self.assigned[i].instance_id], self._expected
        input_tokens, output_tokens = request.input_tokens, request.output_tokens
        by = [
            float(each),
            each * input_tokens,
            each * (input_tokens + 0.5 * output_tokens),
            each * (input_tokens + output_tokens),
            each * input_tokens / max(output_tokens, 1.0),
        ]
        limit_s = min(known.peers.tbt_limit_s, tbt_s)
        known.peers = PeerLoad(*(a + b for a, b in zip(known.peers, (*by, 0.0), strict=True)))._replace(
            tbt_limit_s=limit_s
        )
        scoring.change(self.load, i, now_s, by)
        self.unsettled.add(i)

    def started(self, flight: Flight, now_s: float) -> None:
        """Count its first token, once."""
        flight.started = True
        i = self.index.get(flight.instance_id)
        if i is not None:
            input_tokens = flight.request.input_tokens
            if i in self.unsettled and self.load.pending_tokens[i] > input_tokens:  # how long the rest takes
                self.settle()
            scoring.start(self.load, i, now_s, input_tokens)

    def assume_started(self, now_s: float) -> None:
        """Take requests that are not streamed to have begun when they were expected to: nobody sees it."""
        for flight in self.flights.values():
            if not flight.started and not flight.request.streamed and now_s >= flight.due_s:
                self.started(flight, now_s)

    def left(self, request_id: str, now_s: float) -> Flight | None:
        """Forget a request; None if it was not in flight."""
        flight = self.flights.pop(request_id, None)
        if flight is None:
            return None
        i = self.index.get(flight.instance_id)
        if i is None:
            return flight
        load, request = self.load, flight.request
        if not flight.started and load.in_flight[i] > 1.0:  # the last one leaves nothing that is pending
            self.started(flight, now_s)
        scoring.remove(load, i, request.input_tokens, request.output_tokens)
        self.unsettled.add(i)
        promises, tbt_s = self._promises[i], flight.promised_tbt_s
        promises[tbt_s] -= 1
        if not promises[tbt_s]:
            del promises[tbt_s]
            limit_s = self._known[flight.instance_id].peers.tbt_limit_s
            load.tbt_limit_s[i] = min(*promises, limit_s, scoring.UNPROMISED_S)
        return flight

    def settle(self) -> None:
        """Derive what follows from the loads that have changed. Before any instance is scored, and only then."""
        load, steps, costs = self.load, self._steps, self.costs
        for i in self.unsettled:
            scoring.settle(costs, load, i, scoring.decode_step_s(steps[i], load.in_flight[i], load.context_tokens[i]))
        self.unsettled.clear()


def _columns(rows: list[tuple[float, ...]], count: int) -> list[list[float]]:
    return [list(column) for column in zip(*rows, strict=True)] if rows else [[] for _ in range(count)]
