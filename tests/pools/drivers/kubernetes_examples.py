"""An API server in memory (kmock) with what it takes to run a Deployment: versions, scale, bindings, a kubelet.

kmock keeps objects and serves lists and watches. Added here, as a real server has them: resource versions and the
conflicts they are for, names and finalizers, conditions merged by type, bindings; a ReplicaSet controller; and a
kubelet that runs each bound pod's command as a process on a loopback address of the pod's own. ``refuse`` makes the
server fail.
"""

import asyncio
import contextlib
import itertools
import json
import os
import re
import signal
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp.web
import pytest
from vllm_examples import STAND_IN

from energy.gpus import GPUS
from pools.drivers.vllm_launch import VllmLaunch, VllmModel

kmock = pytest.importorskip("kmock", reason="kmock is not installed")
pytest.importorskip("kubernetes", reason="the Kubernetes client is not installed: dynamollm[kubernetes]")

from kmock._internal.k8s import KubernetesError  # noqa: E402 - after it is known to be there

from pools.drivers.kubernetes import KubernetesDriver, KubernetesOptions  # noqa: E402
from pools.drivers.kubernetes_api import KubernetesApi  # noqa: E402
from pools.drivers.kubernetes_objects import SERVING, PodTemplate  # noqa: E402

PORT = 21388  # on addresses of 127.0.0.0/8, one a pod
NAMESPACE = "serving"
KUBELET = "kubelet"
FINALIZER = "test/kubelet"
CLOCKS_MHZ = tuple(range(345, 1981, 15))
_addresses = itertools.count(2)  # over all clusters of a run


@dataclass(slots=True)
class Refusal:
    """So many requests of this method and path get this answer."""

    method: str
    path: str
    status: int
    times: int = 1
    headers: Mapping[str, str] = field(default_factory=dict)
    after: bool = False  # the change is made, only its answer is lost


class ApiServer(kmock.KubernetesEmulator):
    """See the module."""

    def __init__(self) -> None:
        super().__init__()
        self.versions = itertools.count(1)
        self.refusals: list[Refusal] = []
        self.seen: list[tuple[str, str, Any]] = []  # method, path with query, body
        self.asked: set[tuple[str, str]] = set()  # verb and resource, as roles have them, but for the kubelet's
        for name in ("v1/pods", "v1/nodes", "apps/v1/deployments", "coordination.k8s.io/v1/leases"):
            self.resources[name] = {}

    def refuse(self, method: str, path: str, status: int, times: int = 1, after: bool = False, **headers: str) -> None:
        self.refusals.append(Refusal(method, path, status, times, headers, after))

    async def _handle(self, request: Any) -> aiohttp.web.StreamResponse:
        method, path = request.method.value.upper(), str(request.url.path)
        if request.headers.get("User-Agent") != KUBELET:
            self.asked.add(_right(method, path, str(request.url.query_string)))
        self.seen.append((method, str(request.url.path_qs), request.data))
        refusal = next(
            (r for r in self.refusals if r.times and r.method == method and re.search(r.path, request.url.path_qs)),
            None,
        )
        if refusal is not None:
            refusal.times -= 1
            if refusal.after:
                await self._serve(request, method, path)
            status = {"kind": "Status", "message": "refused on purpose", "code": refusal.status}
            return aiohttp.web.json_response(status, status=refusal.status, headers=refusal.headers)
        return await self._serve(request, method, path)

    async def _serve(self, request: Any, method: str, path: str) -> aiohttp.web.StreamResponse:
        if path.endswith("/binding"):
            return await self._bind(request)
        if method in ("POST", "PATCH", "PUT") and request.data is not None:
            self._stamp(request, method)
        if method == "PUT":
            return aiohttp.web.json_response(await self._change(request, request.data))
        answer: aiohttp.web.StreamResponse = await super()._handle(request)
        return answer

    def _stamp(self, request: Any, method: str) -> None:
        meta = request.data.setdefault("metadata", {})
        if method != "POST":
            stored = self._stored(request)
            version = meta.get("resourceVersion")
            if version is not None and version != stored["metadata"]["resourceVersion"]:
                raise KubernetesError(status=409, reason="Conflict", message="the object has been modified")
            if (conditions := request.data.get("status", {}).get("conditions")) is not None:
                types = {condition["type"] for condition in conditions}
                kept = [c for c in stored.get("status", {}).get("conditions", []) if c["type"] not in types]
                request.data["status"]["conditions"] = [*kept, *conditions]
        else:
            meta.setdefault("namespace", request.namespace)
            meta["uid"] = f"uid-{next(self.versions)}"
        meta["resourceVersion"] = str(next(self.versions))

    def _stored(self, request: Any) -> dict[str, Any]:
        key = (request.resource, request.namespace, request.name)
        if key not in self.objects or self.objects[key].deleted:
            raise KubernetesError(status=404, reason="NotFound", message=f"{request.name} is not there")
        stored: dict[str, Any] = self.objects[key].last.raw
        return stored

    async def _bind(self, request: Any) -> aiohttp.web.StreamResponse:
        pod = self._stored(request)
        if pod.get("spec", {}).get("nodeName"):
            raise KubernetesError(status=409, reason="Conflict", message="pod is assigned to a node already")
        change = {"spec": {"nodeName": request.data["target"]["name"]}}
        change["metadata"] = {"resourceVersion": str(next(self.versions))}
        await self._change(request, change)
        return aiohttp.web.json_response({"kind": "Status", "status": "Success"}, status=201)

    async def _change(self, request: Any, change: dict[str, Any]) -> dict[str, Any]:
        async with self._lock:
            stored = self.objects[(request.resource, request.namespace, request.name)]
            stored.patch(change)
            raw: dict[str, Any] = stored.last.raw
            await self._buses[request.resource].put({"type": "MODIFIED", "object": raw})
        return raw

    async def drop_watches(self) -> None:
        """The connections of every watch break, as when an API server is restarted."""
        for task in [task for task in asyncio.all_tasks() if "_serve_watch" in repr(task.get_coro())]:
            task.cancel()


class Cluster:
    """The server, and what a real cluster's controllers would do."""

    def __init__(self, url: str, server: ApiServer) -> None:
        self.url = url
        self.server = server
        self.api = KubernetesApi(NAMESPACE, url=url)
        self.processes: dict[str, asyncio.subprocess.Process] = {}
        self._serial = itertools.count()
        self._addresses: dict[str, str] = {}

    async def add_node(self, name: str, gpus: int = 8) -> None:
        status = {"conditions": [{"type": "Ready", "status": "True"}], "allocatable": {"nvidia.com/gpu": str(gpus)}}
        await self.api.create("nodes", {"metadata": {"name": name}, "spec": {}, "status": status})

    async def break_node(self, name: str) -> None:
        """Its kubelet falls silent, and its processes die."""
        for pod in await self.pods():
            if pod["spec"].get("nodeName") == name and pod["metadata"]["name"] in self.processes:
                await end(self.processes.pop(pod["metadata"]["name"]))
        await self.api.patch(
            "nodes", name, {"status": {"conditions": [{"type": "Ready", "status": "Unknown"}]}}, "status"
        )

    async def pods(self) -> list[dict[str, Any]]:
        return (await self.api.list("pods"))[0]

    async def replicas(self) -> dict[str, int]:
        deployments, _ = await self.api.list("deployments")
        return {d["metadata"]["name"]: d["spec"]["replicas"] for d in deployments}

    async def run(self) -> None:
        while True:
            with contextlib.suppress(Exception):  # a refusal that was meant for the driver hits it too
                await self.replicate()
                await self.run_pods()
            await asyncio.sleep(0.03)

    async def replicate(self) -> None:
        """The ReplicaSet controller: pods not placed go first, then those not ready, then the newest."""
        deployments, _ = await self.api.list("deployments")
        pods = await self.pods()
        for deployment in deployments:
            labels = deployment["spec"]["selector"]["matchLabels"].items()
            mine = [p for p in pods if labels <= p["metadata"].get("labels", {}).items()]
            mine = [p for p in mine if "deletionTimestamp" not in p["metadata"] and p["status"]["phase"] != "Failed"]
            missing = deployment["spec"]["replicas"] - len(mine)
            for _ in range(missing):
                await self.create_pod(deployment)
            for pod in sorted(mine, key=_worth)[: max(-missing, 0)]:
                await self.api.delete("pods", pod["metadata"]["name"])

    async def create_pod(self, deployment: dict[str, Any]) -> None:
        template = json.loads(json.dumps(deployment["spec"]["template"]))
        meta = template["metadata"]
        meta |= {"name": f"{deployment['metadata']['name']}-{next(self._serial)}", "finalizers": [FINALIZER]}
        await self.api.create("pods", {**template, "status": {"phase": "Pending", "conditions": []}})

    async def run_pods(self) -> None:
        """The kubelets."""
        for pod in await self.pods():
            name, leaving = pod["metadata"]["name"], "deletionTimestamp" in pod["metadata"]
            process = self.processes.get(name)
            if leaving:
                if process is not None:
                    await end(process)
                self.processes.pop(name, None)
                await self.api.patch("pods", name, {"metadata": {"finalizers": []}})
            elif pod["spec"].get("nodeName") and name not in self._addresses:
                await self.start_container(pod)
            elif process is not None and process.returncode is not None and name in self._addresses:
                count = pod["status"]["containerStatuses"][0]["restartCount"] + 1
                await self.start_container(pod, count)

    async def start_container(self, pod: dict[str, Any], restarts: int = 0) -> None:
        name, container = pod["metadata"]["name"], pod["spec"]["containers"][0]
        address = self._addresses.setdefault(name, f"127.1.{next(_addresses) // 250}.{next(_addresses) % 250 + 1}")
        variables = {entry["name"]: entry.get("value", name) for entry in container["env"]}
        words = [address if word == "0.0.0.0" else word for word in container["command"]]
        self.processes[name] = await asyncio.create_subprocess_exec(
            *words, env={**os.environ, **variables}, stdout=asyncio.subprocess.DEVNULL, start_new_session=True
        )
        running = {"type": "ContainersReady", "status": "True"}
        status = {"phase": "Running", "podIP": address, "conditions": [running]}
        status["containerStatuses"] = [{"name": container["name"], "restartCount": restarts}]
        await self.api.patch("pods", name, {"status": status}, "status")

    async def close(self) -> None:
        for process in self.processes.values():
            await end(process)
        await self.api.close()


def _right(method: str, path: str, query: str) -> tuple[str, str]:
    """What a role must allow for this request."""
    words = re.sub(r"^/(api/v1|apis/[^/]+/v1)/(namespaces/[^/]+/)?", "", path).split("/")
    if method == "GET":
        verb = "get" if len(words) > 1 else "watch" if "watch=true" in query else "list"
    else:
        verb = {"POST": "create", "PATCH": "patch", "PUT": "update", "DELETE": "delete"}[method]
    return verb, "/".join([words[0], *words[2:]])


async def end(process: asyncio.subprocess.Process) -> None:
    """Kill a container, all of it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    await process.wait()


def _worth(pod: dict[str, Any]) -> tuple[bool, bool, int]:
    conditions = {c["type"]: c["status"] for c in pod["status"].get("conditions", [])}
    placed = bool(pod["spec"].get("nodeName"))
    return placed, conditions.get(SERVING) == "True", -int(pod["metadata"]["resourceVersion"])


@asynccontextmanager
async def kubernetes_cluster(nodes: tuple[str, ...] = ("node-0", "node-1")) -> AsyncIterator[Cluster]:
    server = ApiServer()
    async with server, kmock.Server(server) as listening:
        cluster = Cluster(str(listening.url).rstrip("/"), server)
        (await cluster.api._connect()).user_agent = KUBELET
        for name in nodes:
            await cluster.add_node(name)
        controllers = asyncio.create_task(cluster.run())
        try:
            yield cluster
        finally:
            controllers.cancel()
            await asyncio.gather(controllers, return_exceptions=True)
            await cluster.close()


def kubernetes_driver(
    cluster: Cluster,
    nodes: tuple[str, ...] = ("node-0", "node-1"),
    models: Mapping[str, VllmModel] | None = None,
    **options: Any,
) -> KubernetesDriver:
    """A driver of the cluster; engines are stand-ins."""
    launch = VllmLaunch(command=STAND_IN, host="0.0.0.0")
    return KubernetesDriver(
        KubernetesApi(NAMESPACE, url=cluster.url),
        dict.fromkeys(nodes, 8),
        models or {"tiny": VllmModel("/models/tiny")},
        PodTemplate("test", "vllm/vllm-openai:v0.32.0", launch, port=PORT, grace_s=5),
        dict.fromkeys(GPUS, CLOCKS_MHZ),
        KubernetesOptions(**{"start_timeout_s": 20.0, "leave_running": False, **options}),
    )
