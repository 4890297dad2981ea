"""Fragmentation: whole instances for each pool, what is left over to the next larger one. Pure.

The paper's rule (DynamoLLM section IV, cluster controller): a pool gets floor(load / capacity) instances; the remainder
moves to the nearest pool that dominates it in BOTH dimensions; only a pool with nowhere to go rounds up. The joint plan
needs no such rule, since shares are part of it; this is for the hierarchy.
"""

from dataclasses import dataclass

import numpy as np

from pools.classes import RequestClass
from pools.routes import distance
from solver.candidates import CLASSES, Candidates
from solver.control import FloatArray, IntArray


@dataclass(frozen=True, slots=True, eq=False)
class Fragments:
    """Instances and GPUs of every pool, and which demand may use it."""

    instances: IntArray  # (P,) of the largest TP
    gpus: FloatArray  # (P,)
    share: FloatArray  # (K, P) of each demand; rows sum to 1


def fragment(candidates: Candidates, load_rps: FloatArray) -> Fragments:
    """Instances of the largest TP at its highest clock for this load, (K,) requests/s."""
    c = candidates
    share = np.zeros((len(load_rps), len(c.pools)))
    counts = np.zeros(len(c.pools), dtype=np.int64)
    gpus = np.zeros(len(c.pools))
    for m in range(len(c.models)):
        tp = int(c.shape_tp[c.shape_model == m].max())
        group_of = {int(c.group_pool[g]): int(g) for g in np.flatnonzero(c.group_shape == c.shape_of(m, tp))}
        first = CLASSES * m
        _fragment_model(c, load_rps[first : first + CLASSES], group_of, first, share, counts)
        gpus[list(group_of)] = counts[list(group_of)] * tp
    return Fragments(counts, gpus, share)


def _fragment_model(
    c: Candidates, load_rps: FloatArray, group_of: dict[int, int], first: int, share: FloatArray, counts: IntArray
) -> None:
    """Deal out one model's classes, pools by ascending size; fills ``share`` and ``counts``."""
    order = sorted(group_of, key=lambda p: (sum(divmod(int(c.pools[p].request_class), 3)), p))
    ways = [
        sorted(
            (p for p in order if np.isfinite(c.work[first + k, group_of[p]])),
            key=lambda p: distance(c.pools[p].request_class, RequestClass(k)),
        )
        for k in range(CLASSES)
    ]
    waiting = np.ones(CLASSES)  # share of each class not placed yet
    for p in order:
        here = [k for k in range(CLASSES) if waiting[k] > 0.0 and ways[k] and ways[k][0] == p]
        for way in ways:
            if p in way:
                way.remove(p)
        if not here:
            continue
        group = group_of[p]
        need = float(
            np.sum(load_rps[here] * waiting[here] * c.work[first + np.array(here), group]) / c.group_peak[group]
        )
        rounds_up = any(not ways[k] for k in here)
        counts[p] = int(np.ceil(need - 1e-9)) if rounds_up else int(np.floor(need + 1e-9))
        placed = 1.0 if rounds_up else min(counts[p] / need, 1.0) if need > 0.0 else 0.0
        for k in here:
            share[first + k, p] = waiting[k] * placed
            waiting[k] *= 1.0 - placed
