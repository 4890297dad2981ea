"""Observer: what a controller is shown, gathered from the router, the deployment and the requests that ended. Pure.

It counts since the last look: requests by class (all, and those each instance was given), the worst use of an SLO on
each instance, requests that came late there. What nobody measured is nan, as ``solver.control`` says.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np

from dynamollm.deployment import Deployment
from pools.classes import REQUEST_CLASSES, RequestClass
from pools.fleet import InstanceCounts
from pools.traffic import ClassTraffic
from solver.control import STATE_CODE, ClusterState, Demand, InstanceViews, Observation

CLASSES = len(REQUEST_CLASSES)
NONE = ClassTraffic()
NOWHERE = -1  # the node of an attached server that nobody told


class CountedTraffic(Protocol):
    """What came and went (``pools.traffic``)."""

    def snapshot(self) -> Mapping[tuple[str, RequestClass], ClassTraffic]:
        """Totals since the start, by model and class."""


class CountedQueue(Protocol):
    """What waits (``pools.queue``)."""

    @property
    def depth(self) -> int:
        """Requests, in all."""

    def depths(self) -> Mapping[tuple[str, int], int]:
        """Requests by model and class."""


class Counted(Protocol):
    """What is counted of requests: by the router of this process, or by all gateways together."""

    @property
    def traffic(self) -> CountedTraffic:
        """What came and went."""

    @property
    def queue(self) -> CountedQueue:
        """What waits."""

    def counts(self) -> Mapping[str, InstanceCounts]:
        """What is on each instance."""


class Observer:
    """One look after another."""

    def __init__(
        self,
        deployment: Deployment,
        router: Counted,
        now_s: float,
        power_w: Callable[[], Mapping[str, float]] = dict,
        start_s: Callable[[], float] = lambda: math.nan,
    ) -> None:
        """``power_w``: the last known power of instances, by id; those missing are taken as not measured.

        ``start_s``: how long starts of engines have taken of late; nan where none was seen.
        """
        self._deployment = deployment
        self._router = router
        self._power_w = power_w
        self._start_s = start_s
        self._seen_s = now_s
        self._traffic = router.traffic.snapshot()
        self._given: dict[str, tuple[int, ...]] = {}
        self._worst: dict[str, float] = {}  # largest share of an SLO used since the last look, by instance
        self._late: Counter[str] = Counter()  # requests found late since the last look, by instance
        self._ready_at_s: dict[str, float] = {}

    def on_share(self, instance_id: str, share: float, late: int) -> None:
        """Take in what share of its SLO was used on an instance, and how many more requests are late there."""
        self._worst[instance_id] = max(share, self._worst.get(instance_id, 0.0))
        if late:
            self._late[instance_id] += late

    def observe(self, now_s: float) -> Observation:
        """Everything since the last look."""
        window_s = max(now_s - self._seen_s, 1e-9)
        observation = Observation(now_s, self._cluster(now_s, window_s), self._demand(window_s), self._start_s())
        self._seen_s = now_s
        self._worst.clear()
        self._late.clear()
        return observation

    def _demand(self, window_s: float) -> Demand:
        models = list(self._deployment.models())
        now, before = self._router.traffic.snapshot(), self._traffic
        self._traffic = now
        columns = np.zeros((3, len(models) * CLASSES))
        for m, model in enumerate(models):
            for request_class in REQUEST_CLASSES:
                key = (model, request_class)
                a, b = now.get(key, NONE), before.get(key, NONE)
                arrived = a.arrived - b.arrived
                # what is arriving now has not ended: its outputs are taken to be as long as those that have
                mean_output = a.output_tokens / a.finished if a.finished else 0.0
                row = m * CLASSES + request_class
                columns[:, row] = arrived, a.input_tokens - b.input_tokens, arrived * mean_output
        queued = np.zeros(len(models) * CLASSES)
        for (model, class_value), depth in self._router.queue.depths().items():
            if model in models:
                queued[models.index(model) * CLASSES + class_value] = depth
        return Demand(window_s, columns[0], columns[1], columns[2], queued)

    def _cluster(self, now_s: float, window_s: float) -> ClusterState:
        deployment = self._deployment
        pools = tuple(pool.name for pool in deployment.settings.pools)
        nodes = deployment.placement.nodes
        names = tuple(nodes)
        lost = deployment.lost_nodes()
        instances = deployment.in_order()
        live = self._router.counts()
        rows = [live.get(i.id, InstanceCounts()) for i in instances]
        given = np.array([_since(row.given, self._given.get(i.id)) for row, i in zip(rows, instances, strict=True)])
        self._given = {instance_id: row.given for instance_id, row in live.items()}
        power_w = self._power_w()
        views = InstanceViews(
            ids=tuple(i.id for i in instances),
            pool=_ints(pools.index(i.pool) for i in instances),
            node=_ints(names.index(i.gpus[0].node) if i.gpus else NOWHERE for i in instances),
            tp=_ints(i.shape.tp for i in instances),
            state=_ints(STATE_CODE[i.state] for i in instances),
            sm_clock_mhz=_ints(deployment.ordered_sm_clock_mhz(i.id) for i in instances),
            ready_at_s=np.array([deployment.ready_at_s(i.id) for i in instances], dtype=np.float64),
            class_rate_rps=given.reshape(-1, CLASSES) / window_s,
            running=np.array([row.running for row in rows], dtype=np.float64),
            waiting=np.zeros(len(instances)),
            waiting_tokens=np.array([row.pending_tokens for row in rows], dtype=np.float64),
            context_tokens=np.array([row.context_tokens for row in rows], dtype=np.float64),
            slo_slack=np.array([1.0 - self._worst.get(i.id, np.nan) for i in instances], dtype=np.float64),
            late_rps=np.array([self._late[i.id] for i in instances], dtype=np.float64) / window_s,
            power_w=np.array([power_w.get(i.id, np.nan) for i in instances], dtype=np.float64),
        )
        return ClusterState(
            at_s=now_s,
            pools=pools,
            node_names=names,
            node_gpus=_ints(nodes.values()),
            node_usable=np.array([name not in lost for name in names], dtype=np.bool_),
            instances=views,
        )


def _since(now: Sequence[int], before: Sequence[int] | None) -> list[int]:
    return [a - b for a, b in zip(now, before, strict=True)] if before else list(now)


def _ints(values: object) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.array(list(values), dtype=np.int64)  # type: ignore[call-overload]
