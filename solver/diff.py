"""diff(plan, cluster): the ordered actions that lead from the cluster as it is to the cluster as planned. Pure.

It may be asked again at any time, and answers with what is still to be done: a controller repeats it until nothing is
left, which is also how a crashed instance comes back. Order: relabel and wake first (capacity at once), then starts,
then stops, then routes. Nothing is stopped that is being replaced until its replacement is READY, unless its GPUs are
what the replacement needs; such swaps within a node are re-shards, and only a part of a model's instances is in one at
a time.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypedDict

import numpy as np

from pools.instances import InstanceState
from pools.view import PoolView
from solver.control import (
    STATE_CODE,
    Action,
    ClusterState,
    Park,
    Plan,
    Reassign,
    Reshard,
    Route,
    ScaleIn,
    ScaleOut,
    SetFrequency,
    Wake,
)
from solver.matching import READY, STARTING, Matching, match
from solver.placing import Clearing, Occupancy, cheapest_clearing
from solver.reshard import EIGHTHS, plan_transfers, rank_eighths

DRAINING = STATE_CODE[InstanceState.DRAINING]
FAILED = STATE_CODE[InstanceState.FAILED]


@dataclass(frozen=True, slots=True)
class DiffSettings:
    """Deadlines, and how much may change at a time."""

    start_deadline_s: float = 900.0
    drain_deadline_s: float = 900.0
    quick_deadline_s: float = 30.0  # clocks, labels, routes, wake
    staggered_share: float = 0.25  # of a model's READY instances that may be in a re-shard or move at a time
    parked_clock_mhz: int = 345
    weight_bytes: float = 140e9  # for the predicted time of re-shard transfers
    set_clocks: bool = False  # whether plans set clocks; where an instance controller does, they do not


def diff(
    plan: Plan,
    cluster: ClusterState,
    now_s: float,
    pools: Sequence[PoolView],
    settings: DiffSettings | None = None,
    ordered: Mapping[str, ScaleOut] | None = None,
    first_serial: int = 0,
) -> tuple[Action, ...]:
    """What is still to be done for the plan, in order.

    ``ordered`` are starts ordered before that the cluster does not show yet. New instances are named
    ``pool-epoch-serial`` from ``first_serial`` on: each start of the tuple takes one.
    """
    return _Differ(plan, cluster, now_s, pools, settings or DiffSettings(), dict(ordered or {}), first_serial).actions()


class _Terms(TypedDict):
    """What all actions share."""

    deadline_s: float
    plan: tuple[int, int]
    why: str


@dataclass(slots=True)
class _Differ:
    """One computation of ``diff``; lives no longer."""

    plan: Plan
    cluster: ClusterState
    now_s: float
    pools: Sequence[PoolView]
    settings: DiffSettings
    ordered: dict[str, ScaleOut]
    serial: int
    clocks: defaultdict[tuple[int, int], list[int]] = field(default_factory=lambda: defaultdict(list))
    starts: list[ScaleOut] = field(default_factory=list)
    needs_room: Counter[int] = field(default_factory=Counter)  # node -> GPUs that starts wait for there
    moved: int = 0  # instances that go only to make room

    def actions(self) -> tuple[Action, ...]:
        """All of it."""
        ready, parked = self._targets()
        matching = match(self.cluster, self._pool_model(), ready, parked)
        self._count_ordered(matching)
        occupancy = self._occupancy(matching)
        for pool, tp in sorted(matching.missing, key=lambda m: (-m[1], m[0])):
            self._start(pool, tp, occupancy, matching)
        swaps, starts, stops = self._swaps(matching)
        coming = [*starts, *(order for swap in swaps for order in swap.create)]
        return (
            *self._relabel(matching),
            *swaps,
            *starts,
            *self._stops(matching, stops, coming),
            *self._clock_changes(matching),
            self._route(),
        )

    def _pool_model(self) -> list[int]:
        models = list(dict.fromkeys(pool.model for pool in self.pools))
        return [models.index(pool.model) for pool in self.pools]

    def _targets(self) -> tuple[Counter[tuple[int, int]], Counter[tuple[int, int]]]:
        ready: Counter[tuple[int, int]] = Counter()
        parked: Counter[tuple[int, int]] = Counter()
        names = {pool.name: p for p, pool in enumerate(self.pools)}
        for group in self.plan.groups:
            key = (names[group.pool], group.tp)
            (parked if group.parked else ready)[key] += group.count
            if not group.parked:
                self.clocks[key] += [group.sm_clock_mhz] * group.count
        return ready, parked

    def _count_ordered(self, matching: Matching) -> None:
        """Starts under way that the cluster does not show yet are not missing."""
        names = {pool.name: p for p, pool in enumerate(self.pools)}
        shown = set(self.cluster.instances.ids)
        self.ordered = {name: order for name, order in self.ordered.items() if name not in shown}
        for order in self.ordered.values():
            key = (names[order.pool], order.tp)
            if key in matching.missing:
                matching.missing.remove(key)

    def _occupancy(self, matching: Matching) -> Occupancy:
        views = self.cluster.instances
        leaving = np.isin(views.state, (DRAINING, FAILED))
        leaving[matching.stop] = True
        occupancy = Occupancy.of(self.cluster, leaving)
        nodes = {name: n for n, name in enumerate(self.cluster.node_names)}
        for order in self.ordered.values():
            occupancy.place(nodes[order.node], order.tp)
        return occupancy

    # --- starts ------------------------------------------------------------------------------------------------------

    def _start(self, pool: int, tp: int, occupancy: Occupancy, matching: Matching) -> None:
        """Order one missing instance where there is room, where there soon is, or where room can be made."""
        node = occupancy.best_node(tp, wait=False)
        if node is None:
            node = occupancy.best_node(tp, wait=True)
        evicted: list[int] = []
        if node is None:
            clearing = self._clearing(tp, occupancy, matching)
            if clearing is None:
                return  # not enough GPUs in one node: said by the plan's next diff, which finds it missing still
            node, evicted = clearing.node, clearing.instances
            for i in evicted:
                occupancy.leave(node, int(self.cluster.instances.tp[i]))
                matching.stay.remove(i)
                matching.stop.append(i)
                self.moved += 1
        self.needs_room[node] += occupancy.place(node, tp)
        self.starts.append(self._order(pool, tp, node))
        for i in evicted:
            self._start(int(self.cluster.instances.pool[i]), int(self.cluster.instances.tp[i]), occupancy, matching)

    def _clearing(self, tp: int, occupancy: Occupancy, matching: Matching) -> Clearing | None:
        """A node to clear of smaller instances that stay, as long as few enough are moved at a time."""
        if self.moved >= self._staggered():
            return None
        views = self.cluster.instances
        movable: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)
        for i in matching.stay:
            if views.tp[i] < tp:
                movable[int(views.node[i])].append((i, int(views.tp[i])))
        return cheapest_clearing(occupancy, tp, movable)

    def _staggered(self) -> int:
        """Instances that may be moved or re-sharded at a time."""
        serving = int(np.count_nonzero(self.cluster.instances.state == READY))
        return max(1, int(self.settings.staggered_share * serving))

    def _order(self, pool: int, tp: int, node: int) -> ScaleOut:
        name, clocks = self.pools[pool].name, self.clocks[pool, tp]
        self.serial += 1
        return ScaleOut(
            instance_id=f"{name}-{self.plan.epoch}-{self.serial - 1}",
            pool=name,
            tp=tp,
            sm_clock_mhz=clocks[-1] if clocks else 0,
            node=self.cluster.node_names[node],
            deadline_s=self.now_s + self.settings.start_deadline_s,
            plan=self.plan.stamp,
            why=f"plan {self.plan.version} wants one more TP{tp} in {name}",
        )

    # --- what goes ---------------------------------------------------------------------------------------------------

    def _swaps(self, matching: Matching) -> tuple[list[Reshard], list[ScaleOut], list[int]]:
        """Re-shards, the starts that are none, and the stops that are none.

        Where a start waits for GPUs of instances of its node that go, both are one re-shard, of as few as make room:
        the others serve until what replaces them is READY. Those beyond the staggered share are left for the next diff.
        """
        views = self.cluster.instances
        going: defaultdict[str, list[int]] = defaultdict(list)
        for i in matching.stop:
            going[self.cluster.node_names[views.node[i]]].append(i)
        waiting: defaultdict[str, list[ScaleOut]] = defaultdict(list)
        for order in self.starts:
            if self.needs_room[self.cluster.node_names.index(order.node)] > 0:
                waiting[order.node].append(order)
        swaps: list[Reshard] = []
        swapped: set[int] = set()
        left = self._staggered() - int(np.count_nonzero(views.state == DRAINING))
        for node, orders in waiting.items():
            if not going[node]:
                continue  # the GPUs come free by themselves: the driver waits for them
            if left <= 0:
                swapped.update(going[node])
                continue
            index = self.cluster.node_names.index(node)
            retire = self._fewest(going[node], self.needs_room[index])
            del self.needs_room[index]
            swapped.update(retire)
            left -= len(retire)
            swaps.append(self._reshard(node, retire, orders))
        by_themselves = [order for order in self.starts if not (order.node in waiting and going[order.node])]
        return swaps, by_themselves, [i for i in matching.stop if i not in swapped]

    def _fewest(self, going: Sequence[int], gpus: int) -> list[int]:
        """Of instances that go, as few as hold this many GPUs; those that do not serve first."""
        views = self.cluster.instances
        chosen: list[int] = []
        for i in sorted(going, key=lambda i: (views.state[i] == READY, -int(views.tp[i]), i)):
            if gpus <= 0:
                break
            chosen.append(i)
            gpus -= int(views.tp[i])
        return chosen

    def _reshard(self, node: str, retire: Sequence[int], create: Sequence[ScaleOut]) -> Reshard:
        views = self.cluster.instances
        held: dict[int, range] = {}
        for i in retire:
            tp = int(views.tp[i])
            held |= {len(held) + rank: rank_eighths(tp, rank) for rank in range(tp)}
        tps = [order.tp for order in create]
        gpus = list(range(max(len(held), sum(tps))))
        whole = {eighth for eighths in held.values() for eighth in eighths} == set(range(EIGHTHS))
        plan = plan_transfers(held, gpus, tps) if whole else None
        return Reshard(
            retire=tuple(views.ids[i] for i in retire),
            create=tuple(create),
            transfers=plan.transfers if plan else (),
            transfer_s=plan.time_s(self.settings.weight_bytes) if plan else 0.0,
            deadline_s=self.now_s + self.settings.start_deadline_s,
            plan=self.plan.stamp,
            why=f"{node}: TP {sorted(int(views.tp[i]) for i in retire)} become {sorted(tps)}",
        )

    def _stops(self, matching: Matching, stops: Sequence[int], starts: Sequence[ScaleOut]) -> list[Action]:
        """Stops, but for as many GPUs as are still on their way: those are held until the replacement is READY."""
        views = self.cluster.instances
        staying = np.zeros(len(views), dtype=np.bool_)
        staying[[*matching.stay, *(i for i, _ in matching.reassign)]] = True
        coming = int(views.tp[staying & (views.state == STARTING)].sum())
        coming += sum(order.tp for order in (*starts, *self.ordered.values()))
        actions: list[Action] = []
        for i in sorted(stops, key=lambda i: (views.state[i] == READY, int(views.tp[i]), i)):
            if coming > 0 and views.state[i] == READY and not self.needs_room[int(views.node[i])]:
                coming -= int(views.tp[i])
                continue
            actions.append(ScaleIn(instance_id=views.ids[i], **self._drain(f"plan {self.plan.version} does without")))
        for i in matching.park:
            clock = self.settings.parked_clock_mhz
            actions.append(Park(instance_id=views.ids[i], sm_clock_mhz=clock, **self._drain("kept asleep for a peak")))
        return actions

    # --- what is quick -----------------------------------------------------------------------------------------------

    def _relabel(self, matching: Matching) -> list[Action]:
        views = self.cluster.instances
        actions: list[Action] = []
        last = self._last_of_their_pools(matching)
        for i, pool in (*matching.reassign, *matching.wake):
            if views.pool[i] != pool and i not in last:
                why = f"plan {self.plan.version} wants it in {self.pools[pool].name}"
                actions.append(Reassign(instance_id=views.ids[i], pool=self.pools[pool].name, **self._quick(why)))
        for i, pool in matching.wake:
            clocks = self.clocks[pool, int(views.tp[i])]
            clock = clocks[-1] if clocks else int(views.sm_clock_mhz[i])
            actions.append(Wake(instance_id=views.ids[i], sm_clock_mhz=clock, **self._quick("needed again")))
        return actions

    def _last_of_their_pools(self, matching: Matching) -> set[int]:
        """Those to move that must serve on where they are: else a pool of the plan had nobody until a start is over."""
        views = self.cluster.instances
        ready: Counter[int] = Counter(int(p) for p in views.pool[views.state == READY])
        moves = [(i, int(views.pool[i]), pool) for i, pool in matching.reassign if views.state[i] == READY]
        for _, before, after in moves:
            ready[before] -= 1
            ready[after] += 1
        planned = {pool for pool, _ in self.clocks}
        last = set()
        for i, before, after in moves:
            if before in planned and ready[before] <= 0 and before != after:
                last.add(i)
                ready[before] += 1
                ready[after] -= 1
        return last

    def _clock_changes(self, matching: Matching) -> list[Action]:
        """Where plans set clocks: each READY instance to one of its group's, changing as few as possible."""
        if not self.settings.set_clocks:
            return []
        views = self.cluster.instances
        members: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
        for i, pool in [(i, int(views.pool[i])) for i in matching.stay] + matching.reassign:
            members[pool, int(views.tp[i])].append(i)
        actions: list[Action] = []
        for key, instances in members.items():
            wanted = Counter(self.clocks[key])
            wrong = []
            for i in instances:
                clock = int(views.sm_clock_mhz[i])
                if wanted[clock] > 0:
                    wanted[clock] -= 1
                else:
                    wrong.append(i)
            for i, clock in zip(wrong, sorted(wanted.elements(), reverse=True), strict=False):
                actions.append(
                    SetFrequency(instance_id=views.ids[i], sm_clock_mhz=clock, **self._quick("clock of the plan"))
                )
        return actions

    def _route(self) -> Route:
        return Route(
            pools=self.plan.pools, pool_share=self.plan.pool_share, **self._quick(f"shares of plan {self.plan.version}")
        )

    def _quick(self, why: str) -> _Terms:
        return {"deadline_s": self.now_s + self.settings.quick_deadline_s, "plan": self.plan.stamp, "why": why}

    def _drain(self, why: str) -> _Terms:
        return {"deadline_s": self.now_s + self.settings.drain_deadline_s, "plan": self.plan.stamp, "why": why}
