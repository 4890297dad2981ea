"""KubernetesDriver: an InstanceDriver whose instances are pods, of one Deployment for each (model, pool, TP).

A Deployment's replicas are as many as it has instances here, written to its ``/scale``; which pod is which instance is
the driver's: it gives each new pod to an instance that waits for one and binds it to the node the plan names, since a
scheduler that spreads pods would leave no node whole for a TP8. Which of the node's GPUs the pod gets is the kubelet's:
slots are counted, not addressed. Clocks are annotations of the pod, enforced by the agent on its node. What the cluster
knows is enough for a later driver to take over.

It lists and watches; whatever it misses it finds at the next listing. Never deletes a Deployment, a node or a Lease.
"""

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field, replace

from energy.gpu import snap
from pools.drivers import kubernetes_objects as objects
from pools.drivers.broadcast import EventBroadcast
from pools.drivers.checks import check_room, model_of
from pools.drivers.kubernetes_api import ConflictError, KubernetesApi, NotFoundError
from pools.drivers.kubernetes_objects import PodTemplate, PodView
from pools.drivers.port import (
    DriverError,
    InstanceEvent,
    InstanceSpec,
    StartRefusedError,
    UnknownGpuError,
    UnknownInstanceError,
)
from pools.drivers.vllm_http import VllmServer
from pools.drivers.vllm_launch import VllmModel
from pools.instances import Instance, InstanceState

log = logging.getLogger("dynamollm.kubernetes")

RELIST_S = 1.0
NODES_PERIOD_S = 5.0


@dataclass(frozen=True, slots=True)
class KubernetesOptions:
    """What the operator decides."""

    start_timeout_s: float = 1800.0
    leave_running: bool = True  # on close
    scales: bool = True  # False: replicas are somebody else's (an HPA's), who is told by ``desired``


@dataclass(slots=True)
class _Running:
    """One instance and what belongs to it."""

    spec: InstanceSpec
    instance: Instance | None = None  # None: its pod has no address yet
    server: VllmServer | None = None
    pod: str | None = None
    restarts: int = 0
    sm_clock_awake_mhz: int = 0
    addressed: asyncio.Event = field(default_factory=asyncio.Event)
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    released: bool = False  # its replica is given back
    reason: str = ""
    becoming_ready: asyncio.Task[None] | None = None
    stopping: asyncio.Task[None] | None = None
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)


class KubernetesDriver:
    """See ``InstanceDriver``. Use it within one event loop; ``close`` it."""

    def __init__(
        self,
        api: KubernetesApi,
        nodes: Mapping[str, int],
        models: Mapping[str, VllmModel],
        template: PodTemplate,
        sm_clocks_mhz: Mapping[str, Sequence[int]],
        options: KubernetesOptions | None = None,
    ) -> None:
        """``nodes``: GPUs by name; ``models``: by served name; ``sm_clocks_mhz``: supported ones by GPU, ascending."""
        self._api = api
        self._nodes = dict(nodes)
        self._models = dict(models)
        self._template = template
        self._clocks_mhz = dict(sm_clocks_mhz)
        self._options = options or KubernetesOptions()
        self._selector = objects.selector(template.deployment)
        self._running: dict[str, _Running] = {}
        self._shapes: dict[str, objects.Object] = {}  # Deployments by name, as this driver would make them
        self._unwritten: set[str] = set()  # Deployments whose replicas may not be what they should
        self._unclaimed: dict[str, PodView] = {}  # by name: pods that are no instance's yet
        self._usable: frozenset[str] = frozenset()
        self._scaling: dict[str, asyncio.Lock] = {}
        self._broadcast = EventBroadcast()
        self._connecting = asyncio.Lock()
        self._tasks: list[asyncio.Task[None]] = []
        self._spawned: set[asyncio.Task[None]] = set()
        self._closed = False
        self._beats = 0

    # --- the cluster -------------------------------------------------------------------------------------------------

    async def _connect(self) -> None:
        """Once: see the nodes, take over what runs, and follow it. Raises ``DriverError``."""
        async with self._connecting:
            if self._closed:
                raise DriverError("the driver is closed")
            if self._tasks:
                return
            await self._look_at_nodes()
            await self._beat()
            for pod in await self._list():
                if pod.instance_id is not None and not pod.leaving:
                    self._adopt(pod)
            deployments, _ = await self._api.list("deployments", self._selector)
            self._unwritten = {deployment["metadata"]["name"] for deployment in deployments}
            loop = asyncio.get_running_loop()
            self._tasks = [loop.create_task(self._watch_pods()), loop.create_task(self._watch_nodes())]

    def _adopt(self, pod: PodView) -> None:
        try:
            spec = objects.spec_of(pod)
        except ValueError as error:
            log.warning("left alone: %s", error)
            return
        running = _Running(spec, pod=pod.name, sm_clock_awake_mhz=pod.awake_clock_mhz, restarts=pod.restarts)
        self._running[spec.id] = running
        self._address(running, pod)
        if running.instance is not None and pod.serving:
            parked = pod.clock_mhz != pod.awake_clock_mhz
            state = InstanceState.PARKED if parked else InstanceState.READY
            running.instance = replace(running.instance, state=state, sm_clock_mhz=pod.clock_mhz)

    async def _list(self) -> list[PodView]:
        pods, self._version = await self._api.list("pods", self._selector)
        return [objects.read_pod(pod) for pod in pods]

    async def _watch_pods(self) -> None:
        while True:
            try:
                pods = await self._list()
                self._unclaimed.clear()
                for pod in pods:
                    self._see(pod)
                there = {pod.name for pod in pods}
                for running in tuple(self._running.values()):
                    if running.pod is not None and running.pod not in there:
                        self._lose_pod(running, "its pod was deleted")
                for name in tuple(self._unwritten):
                    await self._scale(name)
                async for event in self._api.watch("pods", self._version, self._selector):
                    if event["type"] in ("ADDED", "MODIFIED", "DELETED"):
                        self._see(objects.read_pod(event["object"]), deleted=event["type"] == "DELETED")
            except DriverError as error:
                log.warning("pods are listed anew: %s", error)
            await asyncio.sleep(RELIST_S)

    async def _watch_nodes(self) -> None:
        while True:
            await asyncio.sleep(NODES_PERIOD_S)
            try:
                await self._look_at_nodes()
                await self._beat()
            except DriverError as error:
                log.warning("nodes cannot be listed: %s", error)

    async def _beat(self) -> None:
        """Show the agents that their orders are still meant."""
        self._beats += 1
        lease = objects.heartbeat(self._template.deployment, self._beats, round(6 * NODES_PERIOD_S))
        try:
            await self._api.patch("leases", lease["metadata"]["name"], lease)
        except NotFoundError:
            await self._api.create("leases", lease)

    async def _look_at_nodes(self) -> None:
        nodes, _ = await self._api.list("nodes")
        ready = objects.ready_nodes(nodes)
        self._usable = ready - objects.cordoned_nodes(nodes)
        for running in tuple(self._running.values()):
            if (node := running.spec.gpus[0].node) not in ready and running.instance is not None:
                self._fail(running, f"node {node} is lost")

    def lost_nodes(self) -> frozenset[str]:
        """See ``InstanceDriver``; cordoned nodes are among them, so that plans move away from them."""
        return frozenset(self._nodes.keys() - self._usable) if self._tasks else frozenset()

    # --- pods --------------------------------------------------------------------------------------------------------

    def _see(self, pod: PodView, deleted: bool = False) -> None:
        """Take in a pod as it is now."""
        running = next((r for r in self._running.values() if r.pod == pod.name), None)
        if running is None:
            self._unclaimed.pop(pod.name, None)
            if not (deleted or pod.leaving or pod.failed or pod.instance_id):
                self._unclaimed[pod.name] = pod
                self._match()
        elif deleted or (pod.leaving and running.instance is None):
            self._lose_pod(running, "its pod was deleted")
        elif pod.failed:
            self._fail(running, pod.failed)
        elif running.instance is None:
            self._address(running, pod)
        elif pod.restarts > running.restarts:
            running.restarts = pod.restarts
            self._begin(running, "its container was restarted")

    def _match(self) -> None:
        """Give pods that are nobody's to instances that wait for one."""
        for running in self._running.values():
            if running.pod is None and not running.released:
                shape = self._shape(running.spec)
                pod = next((pod for pod in self._unclaimed.values() if pod.shape == shape), None)
                if pod is not None:
                    del self._unclaimed[pod.name]
                    running.pod = pod.name
                    self._spawn(self._claim(running, pod))

    async def _claim(self, running: _Running, pod: PodView) -> None:
        """Make a pod this instance's, and put it on its node; if somebody else is quicker, wait for another."""
        try:
            await self._api.patch("pods", pod.name, objects.claim(running.spec, pod.version))
            with contextlib.suppress(ConflictError):  # bound already: a call before this one came through
                await self._api.bind(pod.name, running.spec.gpus[0].node)
        except DriverError as error:
            log.info("pod %s is not instance %s's: %s", pod.name, running.spec.id, error)
            running.pod = None
            await asyncio.sleep(RELIST_S / 10)
            with contextlib.suppress(DriverError):
                self._see(objects.read_pod(await self._api.get("pods", pod.name)))

    def _address(self, running: _Running, pod: PodView) -> None:
        """The pod has an address: from now on there is an instance."""
        if pod.ip is None:
            return
        spec = running.spec
        url = f"http://{f'[{pod.ip}]' if ':' in pod.ip else pod.ip}:{self._template.port}"
        running.instance = Instance(
            spec.id, spec.pool, spec.shape, url, InstanceState.STARTING, spec.sm_clock_mhz, spec.gpus
        )
        running.server = VllmServer(url, spec.shape.model)
        running.restarts = pod.restarts
        running.addressed.set()
        if not pod.serving:
            self._begin(running)

    def _begin(self, running: _Running, reason: str = "") -> None:
        """It loads its weights, for the first time or again."""
        self._enter(running, InstanceState.STARTING, reason)
        if running.becoming_ready is not None:
            running.becoming_ready.cancel()
        running.becoming_ready = self._spawn(self._become_ready(running))

    async def _become_ready(self, running: _Running) -> None:
        assert running.server is not None
        assert running.pod is not None
        try:
            async with asyncio.timeout(self._options.start_timeout_s):
                await running.server.until_first_token()
            await self._api.patch("pods", running.pod, objects.serving(True, "Ready"), "status")
        except TimeoutError:
            self._fail(running, f"no token within {self._options.start_timeout_s:g} s")
        except DriverError as error:
            self._fail(running, str(error))
        else:
            if running.stopping is None:
                self._enter(running, InstanceState.READY)

    def _lose_pod(self, running: _Running, reason: str) -> None:
        """Its pod is no more: one that had no address yet waits for another, any other is gone."""
        running.gone.set()
        if running.instance is None:
            running.pod = None
            self._match()
        elif running.stopping is None:
            self._fail(running, reason)

    def _fail(self, running: _Running, reason: str) -> None:
        if self._running.pop(running.spec.id, None) is None or running.stopping is not None:
            return
        self._unwritten.add(self._shape(running.spec))
        self._spawn(self._clear(running))
        running.reason = reason
        running.addressed.set()
        if running.instance is not None:
            self._broadcast.publish(InstanceEvent(running.spec.id, InstanceState.FAILED, reason))

    async def _clear(self, running: _Running) -> None:
        """Remove what is left of one that failed; what does not succeed is tried again at the next listing."""
        with contextlib.suppress(DriverError):
            await self._release(running)
            await self._scale(self._shape(running.spec))

    async def _release(self, running: _Running) -> None:
        if running.becoming_ready is not None and running.becoming_ready is not asyncio.current_task():
            running.becoming_ready.cancel()
        if running.server is not None:
            await running.server.close()
        if running.pod is not None:
            await self._api.delete("pods", running.pod, grace_s=1)

    # --- replicas ----------------------------------------------------------------------------------------------------

    def _shape(self, spec: InstanceSpec) -> str:
        return objects.shape_name(self._template, spec)

    def desired(self) -> dict[str, int]:
        """Replicas that each Deployment is to have, by name."""
        counts = Counter(self._shape(running.spec) for running in self._running.values() if not running.released)
        return {name: counts[name] for name in sorted({*self._shapes, *counts})}

    def ready(self) -> dict[str, int]:
        """READY instances of each Deployment, by name."""
        running = [r for r in self._running.values() if r.instance and r.instance.state is InstanceState.READY]
        return dict(Counter(self._shape(r.spec) for r in running))

    def accelerators(self) -> dict[str, str]:
        """The kind of GPU of each Deployment, by name."""
        return {self._shape(running.spec): running.spec.shape.gpu for running in self._running.values()}

    async def _scale(self, name: str) -> None:
        """Write a Deployment's replicas; it is made where it is not there. Raises ``DriverError``."""
        if not self._options.scales:
            return
        self._unwritten.add(name)
        async with self._scaling.setdefault(name, asyncio.Lock()):
            body = {"spec": {"replicas": self.desired().get(name, 0)}}
            try:
                await self._api.patch("deployments", name, body, "scale")
            except NotFoundError:
                if name in self._shapes:
                    with contextlib.suppress(ConflictError):
                        await self._api.create("deployments", self._shapes[name])
                    await self._api.patch("deployments", name, body, "scale")
            self._unwritten.discard(name)

    # --- starting and stopping ---------------------------------------------------------------------------------------

    async def start(self, spec: InstanceSpec) -> Instance:
        """See ``InstanceDriver``; returns once its pod has an address, which may wait for an image or for replicas."""
        await self._connect()
        model = self._check(spec)
        name = self._shape(spec)
        clock_mhz = snap(spec.sm_clock_mhz, self._clocks_mhz.get(spec.shape.gpu, ()))
        running = _Running(replace(spec, sm_clock_mhz=clock_mhz), sm_clock_awake_mhz=clock_mhz)
        self._running[spec.id] = running
        self._shapes[name] = objects.deployment(self._template, model, spec)
        try:
            await self._scale(name)
            self._match()
            async with asyncio.timeout(self._options.start_timeout_s):
                await running.addressed.wait()
        except BaseException as error:
            self._running.pop(spec.id, None)
            await self._clear(running)
            if isinstance(error, TimeoutError):
                limit_s = self._options.start_timeout_s
                raise StartRefusedError(f"instance {spec.id}: no pod of {name} came up within {limit_s:g} s") from None
            raise
        if running.instance is None:
            raise StartRefusedError(f"instance {spec.id}: {running.reason}")
        return running.instance

    def _check(self, spec: InstanceSpec) -> VllmModel:
        check_room(spec, (other.spec for other in self._running.values()), self._nodes)
        if spec.gpus[0].node not in self._usable:
            raise UnknownGpuError(f"instance {spec.id}: node {spec.gpus[0].node} is not ready, or is cordoned")
        return model_of(spec, self._models)

    async def stop(self, instance_id: str, grace_s: float) -> None:
        """See ``InstanceDriver``: out of readiness, idle or out of time, then its pod and its replica go."""
        await self._connect()
        running = self._running.get(instance_id)
        if running is None:
            return
        if running.stopping is None:
            running.stopping = self._spawn(self._stop(running, grace_s))
        await asyncio.shield(running.stopping)

    async def _stop(self, running: _Running, grace_s: float) -> None:
        serves = running.instance is not None and running.instance.state is InstanceState.READY
        self._enter(running, InstanceState.DRAINING)
        try:
            if running.pod is not None and serves and running.server is not None:
                with contextlib.suppress(DriverError):
                    await self._api.patch("pods", running.pod, objects.serving(False, "Draining"), "status")
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(grace_s):
                        await running.server.until_idle()
            # the pod before the replica: a ReplicaSet that replaces it at once then takes away the one not placed yet
            await self._release(running)
            running.released = True
            await self._scale(self._shape(running.spec))
            if running.pod is not None:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._template.grace_s + NODES_PERIOD_S):
                        await running.gone.wait()
        except BaseException:
            running.stopping = None  # whoever asked may ask again
            raise
        self._running.pop(running.spec.id, None)
        running.addressed.set()
        self._broadcast.publish(InstanceEvent(running.spec.id, InstanceState.STOPPED))

    async def list(self) -> tuple[Instance, ...]:
        """See ``InstanceDriver``."""
        await self._connect()
        found = (self._running[instance_id].instance for instance_id in sorted(self._running))
        return tuple(instance for instance in found if instance is not None)

    # --- clocks and sleep --------------------------------------------------------------------------------------------

    async def set_sm_clock(self, instance_id: str, sm_clock_mhz: int) -> int:
        """See ``InstanceDriver``: returns the clock its node's agent is told; it sets it within about a second."""
        running = self._get(instance_id)
        async with running.turn:
            clock_mhz = snap(sm_clock_mhz, self._clocks_mhz.get(running.spec.shape.gpu, ()))
            assert running.instance is not None
            parked = running.instance.state is InstanceState.PARKED
            await self._intend(running, running.instance.sm_clock_mhz if parked else clock_mhz, clock_mhz)
            return clock_mhz

    async def _intend(self, running: _Running, clock_mhz: int, awake_mhz: int) -> None:
        assert running.pod is not None
        assert running.instance is not None
        notes = objects.clocks(clock_mhz, awake_mhz)
        await self._api.patch("pods", running.pod, {"metadata": {"annotations": notes}})
        running.sm_clock_awake_mhz = awake_mhz
        running.instance = replace(running.instance, sm_clock_mhz=clock_mhz)

    async def park(self, instance_id: str) -> None:
        """See ``InstanceDriver``; running requests finish first. ``DriverError`` where the build cannot sleep."""
        running = self._get(instance_id)
        async with running.turn:
            assert running.instance is not None
            assert running.server is not None
            if running.instance.state is InstanceState.PARKED:
                return
            if running.instance.state is not InstanceState.READY:
                raise DriverError(f"instance {instance_id} is {running.instance.state.value}: only READY ones park")
            await running.server.until_idle()
            await running.server.sleep()
            lowest = self._clocks_mhz.get(running.spec.shape.gpu, (running.instance.sm_clock_mhz,))[0]
            await self._intend(running, lowest, running.instance.sm_clock_mhz)
            self._enter(running, InstanceState.PARKED)

    async def wake(self, instance_id: str) -> None:
        """See ``InstanceDriver``."""
        running = self._get(instance_id)
        async with running.turn:
            assert running.instance is not None
            assert running.server is not None
            if running.instance.state is not InstanceState.PARKED:
                return
            awake_mhz = running.sm_clock_awake_mhz
            await self._intend(running, awake_mhz, awake_mhz)  # first, for loading weights is work
            await running.server.wake()
            self._enter(running, InstanceState.READY)

    # --- the rest ----------------------------------------------------------------------------------------------------

    def events(self) -> AsyncIterator[InstanceEvent]:
        """See ``InstanceDriver``."""
        return self._broadcast.listen()

    async def close(self) -> None:
        """See ``InstanceDriver``; with ``leave_running`` the pods run on, for the next driver to take over."""
        if self._closed:
            return
        if self._tasks and not self._options.leave_running:
            await asyncio.gather(*(self.stop(instance_id, 0.0) for instance_id in tuple(self._running)))
        self._closed = True
        tasks = (*self._tasks, *self._spawned)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for running in self._running.values():
            if running.server is not None:
                await running.server.close()
        await self._api.close()
        self._broadcast.close()

    def _get(self, instance_id: str) -> _Running:
        running = self._running.get(instance_id)
        if running is None or running.instance is None:
            raise UnknownInstanceError(f"there is no instance {instance_id}")
        return running

    def _enter(self, running: _Running, state: InstanceState, reason: str = "") -> None:
        if running.instance is not None:
            running.instance = replace(running.instance, state=state)
            self._broadcast.publish(InstanceEvent(running.spec.id, state, reason))

    def _spawn(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._spawned.add(task)
        task.add_done_callback(self._spawned.discard)
        return task
