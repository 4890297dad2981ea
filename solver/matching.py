"""Matching: which instances a plan keeps, which change pool, which go, and what is missing. Pure.

An instance is its process; its pool is a label. So instances of one model and TP are first kept or let go together,
letting go those whose nodes then fall empty, and only then dealt out to pools, each to its own pool where possible.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from pools.instances import InstanceState
from solver.control import STATE_CODE, ClusterState, IntArray

READY = STATE_CODE[InstanceState.READY]
STARTING = STATE_CODE[InstanceState.STARTING]
PARKED = STATE_CODE[InstanceState.PARKED]


@dataclass(slots=True)
class Matching:
    """What becomes of the instances; numbers are positions in ``InstanceViews``, pools positions in the plan's."""

    stay: list[int] = field(default_factory=list)
    reassign: list[tuple[int, int]] = field(default_factory=list)  # (instance, pool)
    stop: list[int] = field(default_factory=list)
    park: list[int] = field(default_factory=list)
    wake: list[tuple[int, int]] = field(default_factory=list)  # (instance, pool)
    missing: list[tuple[int, int]] = field(default_factory=list)  # (pool, TP) to start


def match(
    cluster: ClusterState,
    pool_model: Sequence[int],
    ready: Mapping[tuple[int, int], int],
    parked: Mapping[tuple[int, int], int],
) -> Matching:
    """Match instances to a plan's targets, both by (pool, TP). What drains or has failed is left alone."""
    views = cluster.instances
    result = Matching()
    used = np.bincount(views.node, views.tp, len(cluster.node_gpus)).astype(np.int64)
    model_of = np.asarray(pool_model, dtype=np.int64)[views.pool]
    shapes = {(int(m), int(t)) for m, t in zip(model_of, views.tp, strict=True)}
    shapes |= {(pool_model[p], tp) for p, tp in (*ready, *parked)}
    usable = cluster.node_usable[views.node]
    for model, tp in sorted(shapes):
        mine = (model_of == model) & (views.tp == tp)
        awake = np.flatnonzero(mine & np.isin(views.state, (READY, STARTING)))
        asleep = np.flatnonzero(mine & (views.state == PARKED))
        result.stop += awake[~usable[awake]].tolist() + asleep[~usable[asleep]].tolist()
        wanted = Counter({p: n for (p, t), n in ready.items() if t == tp and pool_model[p] == model and n > 0})
        to_park = sum(n for (p, t), n in parked.items() if t == tp and pool_model[p] == model)
        _match_shape(cluster, result, awake[usable[awake]], asleep[usable[asleep]], wanted, to_park, tp, used)
    return result


def _match_shape(
    cluster: ClusterState,
    result: Matching,
    awake: IntArray,
    asleep: IntArray,
    wanted: Counter[int],
    to_park: int,
    tp: int,
    used: IntArray,
) -> None:
    target = wanted.total()
    kept, surplus = _let_go(cluster, awake, max(len(awake) - target, 0), used)
    room_to_park = max(to_park - len(asleep), 0)
    result.park += surplus[:room_to_park]
    result.stop += surplus[room_to_park:]
    lacking = _deal_out(cluster, result, kept, wanted)
    sleepers = asleep.tolist()
    while lacking and sleepers:
        result.wake.append((sleepers.pop(0), lacking.pop(0)))
    result.missing += [(pool, tp) for pool in lacking]
    result.stop += sleepers[to_park:]


def _let_go(cluster: ClusterState, awake: IntArray, count: int, used: IntArray) -> tuple[list[int], list[int]]:
    """Part those to keep from ``count`` to let go: not yet READY first, then on the emptiest node, then the idlest."""
    views = cluster.instances
    left, gone = awake.tolist(), []
    for _ in range(count):
        worst = min(
            left, key=lambda i: (views.state[i] == READY, used[views.node[i]], views.running[i] + views.waiting[i], i)
        )
        left.remove(worst)
        gone.append(worst)
        used[views.node[worst]] -= views.tp[worst]
    return left, gone


def _deal_out(cluster: ClusterState, result: Matching, kept: Sequence[int], wanted: Counter[int]) -> list[int]:
    """Give every kept instance a pool, its own if that wants it; returns the pools still lacking one, each so often."""
    views = cluster.instances
    in_pool: defaultdict[int, list[int]] = defaultdict(list)
    for i in kept:
        in_pool[int(views.pool[i])].append(i)
    lacking: list[int] = []
    spare: list[int] = []
    for pool in sorted(set(in_pool) | set(wanted)):
        members = sorted(in_pool[pool], key=lambda i: (views.state[i] != READY, i))
        result.stay += members[: wanted[pool]]
        spare += members[wanted[pool] :]
        lacking += [pool] * max(wanted[pool] - len(members), 0)
    spare.sort(key=lambda i: (views.state[i] != READY, views.running[i] + views.waiting[i], i))
    for i in spare:
        result.reassign.append((i, lacking.pop(0)))
    return lacking
