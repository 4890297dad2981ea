"""ClockIntents: on one node, has the agent lock the clocks that pods there are annotated with.

Runs beside ``dynamollm agent`` in its DaemonSet. Each round it looks at its node's pods and begins the agent's leases
anew; what no pod wants any more is reset. It does so only while the driver shows that it lives, by renewing a Lease:
where that, the API server or this process falls silent, the agent's leases lapse and the GPUs go back to their default
clocks. Which GPUs a pod has only its processes know: the device plugin tells them by NVIDIA_VISIBLE_DEVICES.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from energy.gpu import ClockDwellError, ClockLock, Gpu, GpuError
from pools.drivers import kubernetes_objects as objects
from pools.drivers.kubernetes_api import KubernetesApi, NotFoundError
from pools.drivers.kubernetes_objects import PodView
from pools.drivers.port import DriverError
from pools.drivers.vllm_launch import MARK

log = logging.getLogger("dynamollm.intents")

PERIOD_S = 1.0
SILENT_AFTER_S = 30.0
VISIBLE = "NVIDIA_VISIBLE_DEVICES"
PROC = Path("/proc")


def pod_devices(proc: Path = PROC) -> dict[str, frozenset[str]]:
    """GPU UUIDs by pod name, of every engine process on this machine that may be read."""
    found: dict[str, frozenset[str]] = {}
    for entry in proc.iterdir():
        if not entry.name.isdigit():
            continue
        try:
            text = (entry / "environ").read_bytes().decode(errors="replace")
        except OSError:
            continue  # not ours to read, or gone
        variables = dict(part.split("=", 1) for part in text.split("\0") if "=" in part)
        if MARK in variables and VISIBLE in variables:
            found[variables[MARK]] = frozenset(variables[VISIBLE].split(","))
    return found


def wanted_mhz(pods: Sequence[PodView], devices: Mapping[str, frozenset[str]], gpus: Sequence[Gpu]) -> dict[int, int]:
    """The clock that each GPU is to be locked at, by index; GPUs of no pod of ours are left out. Pure."""
    clocks = {uuid: pod.clock_mhz for pod in pods if pod.clock_mhz for uuid in devices.get(pod.name, ())}
    return {gpu.index: clocks[gpu.uuid] for gpu in gpus if gpu.uuid in clocks}


class ClockIntents:
    """``run`` it as a task."""

    def __init__(
        self,
        api: KubernetesApi,
        node: str,
        deployment: str,
        gpus: Callable[[], Sequence[Gpu]],
        clock: Callable[[], float],
        devices: Callable[[], Mapping[str, frozenset[str]]] = pod_devices,
    ) -> None:
        """``gpus``: the node's, through its agent (blocking); ``deployment``: whose pods are meant."""
        self._api = api
        self._deployment = deployment
        self._node = node
        self._gpus = gpus
        self._clock = clock
        self._devices = devices
        self._beat: tuple[str, float] | None = None  # version of the driver's Lease, and when it was first seen
        self._locked: set[int] = set()

    async def run(self) -> None:
        """Round after round until cancelled."""
        while True:
            try:
                await self.round()
            except (DriverError, GpuError) as error:
                log.warning("clocks of %s are left to their leases: %s", self._node, error)
            await asyncio.sleep(PERIOD_S)

    async def round(self) -> dict[int, int]:
        """One look; returns what is locked at which clock. Raises ``DriverError``, ``GpuError``."""
        if not await self._driver_lives():
            return {}
        pods, _ = await self._api.list("pods", objects.selector(self._deployment), f"spec.nodeName={self._node}")
        views = [objects.read_pod(pod) for pod in pods]
        return await asyncio.to_thread(self._enforce, [pod for pod in views if pod.node == self._node])

    def _enforce(self, pods: Sequence[PodView]) -> dict[int, int]:
        gpus = self._gpus()
        wanted = wanted_mhz(pods, self._devices(), gpus)
        for gpu in gpus:
            if gpu.index in wanted:
                try:
                    gpu.lock_sm_clocks(ClockLock(wanted[gpu.index], wanted[gpu.index]))
                except ClockDwellError:
                    continue  # the next round lowers it
            elif gpu.index in self._locked:
                gpu.reset_sm_clocks()
        self._locked = set(wanted)
        return wanted

    async def _driver_lives(self) -> bool:
        """Whether its Lease was renewed lately, by this machine's own clock."""
        try:
            lease = await self._api.get("leases", objects.heartbeat_name(self._deployment))
        except NotFoundError:
            return False
        version, now_s = lease["metadata"]["resourceVersion"], self._clock()
        if self._beat is None or self._beat[0] != version:
            self._beat = (version, now_s)
        return now_s - self._beat[1] < SILENT_AFTER_S
