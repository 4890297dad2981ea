"""PublishedFleet: the router's place in a process that routes nothing; what it is shown is published for the gateways.

A drain is over when no gateway can have anything on the instance: each has reported that it follows a cluster in which
that is closed, and none has requests there. While gateways cannot be heard, every instance counts as busy.
"""

import asyncio
import logging
from collections.abc import Callable

from dynamollm.collected import Collected
from dynamollm.deployment import Deployment
from dynamollm.reports import CLUSTER, PublishedCluster, Share, document
from dynamollm.store import NEVER, Stamp, Store
from pools.instances import InstanceState
from pools.view import ClusterView, EngineLoad

log = logging.getLogger("dynamollm.publishing")

REFRESH_S = 5.0  # a store that has forgotten is told again
RETRY_S = 0.3


class PublishedFleet:
    """See ``dynamollm.runner.RoutedFleet``; ``run`` it as a task."""

    def __init__(
        self,
        name: str,
        epoch: int,
        store: Store,
        deployment: Deployment,
        collected: Collected,
        unix_s: Callable[[], float],
        on_superseded: Callable[[int], None],
    ) -> None:
        """``on_superseded`` is told the epoch of a newer leader, should there be one."""
        self.plan: Stamp = NEVER  # in force, as the operations have it
        self._name = name
        self._epoch = epoch
        self._version = 0
        self._store = store
        self._deployment = deployment
        self._collected = collected
        self._unix_s = unix_s
        self._on_superseded = on_superseded
        self._closed: dict[str, int] = {}  # version in which an instance was closed to new requests
        self._changed = asyncio.Event()

    def update(self, view: ClusterView, now_s: float) -> None:
        """Publish the cluster as it is now, soon."""
        self._version += 1
        for shown in view.instances:
            if shown.instance.state is InstanceState.READY:
                self._closed.pop(shown.instance.id, None)
            else:
                self._closed.setdefault(shown.instance.id, self._version)
        self._changed.set()

    def observe(self, instance_id: str, load: EngineLoad, now_s: float) -> None:
        """Nothing: gateways ask the engines themselves."""

    def in_flight(self, instance_id: str) -> int:
        """Requests on an instance, or gateways that may still send some; never 0 while that is not known."""
        collected = self._collected
        if not collected.heard:
            return max(1, collected.in_flight(instance_id))
        closed = self._closed.get(instance_id)
        behind = collected.behind((self._epoch, closed)) if closed is not None else 0
        return collected.in_flight(instance_id) + behind

    async def run(self) -> None:
        """Publish what changes, until cancelled."""
        while True:
            self._changed.clear()
            try:
                await self._publish()
            except OSError as error:
                log.debug("the cluster cannot be published: %s", error)
                await asyncio.sleep(RETRY_S)
                continue
            try:
                async with asyncio.timeout(REFRESH_S):
                    await self._changed.wait()
            except TimeoutError:
                self._version += 1

    async def _publish(self) -> None:
        cluster = PublishedCluster(
            at_unix_s=self._unix_s(),
            controller=self._name,
            plan=self.plan,
            instances=tuple(self._deployment.instances.values()),
            shares=tuple(
                Share(model, request_class, pool, weight)
                for (model, request_class), spread in self._deployment.shares.items()
                for pool, weight in spread
            ),
            profiles={model.name: model.profile for model in self._deployment.settings.models},
            coming=tuple(sorted(self._deployment.coming)),
        )
        if not await self._store.publish(CLUSTER, document(cluster), (self._epoch, self._version)):
            found = await self._store.published(CLUSTER)
            if found is not None:
                self._on_superseded(found[0][0])
