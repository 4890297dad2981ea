"""What the Kubernetes driver writes into the cluster, and how it reads it back. Pure: values in, plain objects out.

One Deployment for each (model, pool, TP); its pods are alike until one is given to an instance, by a label with the
instance's id and annotations for what a later controller must know (slots, clock). A pod is Ready only while its
``dynamollm.dev/serving`` condition says so (a readiness gate): that is how an instance leaves whatever Service selects
it while it is drained.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pools.drivers.port import InstanceSpec
from pools.drivers.vllm_launch import MARK, NODE, VllmLaunch, VllmModel, command_line
from pools.instances import GpuSlot, InstanceShape

Object = dict[str, Any]

PREFIX = "dynamollm.dev/"
MANAGED_BY = "app.kubernetes.io/managed-by"
DEPLOYMENT, INSTANCE, SHAPE = PREFIX + "deployment", PREFIX + "instance", PREFIX + "shape"
SLOTS, CLOCK, AWAKE_CLOCK = PREFIX + "slots", PREFIX + "sm-clock-mhz", PREFIX + "awake-sm-clock-mhz"
MODEL, POOL, GPU = PREFIX + "model", PREFIX + "pool", PREFIX + "gpu"
SERVING = PREFIX + "serving"  # the readiness gate
SCHEDULER = "dynamollm"  # a scheduler of that name does not exist: the driver binds its pods itself
CONTAINER = "vllm"


@dataclass(frozen=True, slots=True)
class PodTemplate:
    """What all pods have in common."""

    deployment: str  # this dynamollm's name among others in the namespace
    image: str
    launch: VllmLaunch
    port: int = 8000
    gpu_resource: str | None = "nvidia.com/gpu"  # None: pods ask for no GPU (emulated engines)
    grace_s: int = 60  # from SIGTERM to SIGKILL
    service_account: str | None = None


@dataclass(frozen=True, slots=True)
class PodView:
    """A pod as the driver sees it."""

    name: str
    version: str
    shape: str  # name of its Deployment
    instance_id: str | None
    node: str | None  # None: not placed yet
    ip: str | None
    running: bool  # its container has passed its own readiness probe
    leaving: bool
    failed: str  # why it will never run, or nothing
    restarts: int
    serving: bool  # the readiness gate
    clock_mhz: int
    awake_clock_mhz: int
    slots: tuple[GpuSlot, ...] = ()
    model: str = ""
    pool: str = ""
    gpu: str = ""


def object_name(*words: str) -> str:
    """A name as objects may have it (RFC 1123, 50 characters); where letters are lost, a hash keeps names apart."""
    plain = "-".join(words)
    slug = re.sub(r"[^a-z0-9]+", "-", plain.lower()).strip("-")
    if slug == plain and len(slug) <= 50:
        return slug
    return f"{slug[:41].rstrip('-')}-{hashlib.sha256(plain.encode()).hexdigest()[:8]}"


def shape_name(template: PodTemplate, spec: InstanceSpec) -> str:
    """The Deployment of an instance."""
    return object_name(template.deployment, spec.shape.model, spec.pool, f"tp{spec.shape.tp}")


def selector(deployment: str) -> str:
    """Finds every object of one dynamollm."""
    return f"{MANAGED_BY}=dynamollm,{DEPLOYMENT}={deployment}"


def deployment(template: PodTemplate, model: VllmModel, spec: InstanceSpec) -> Object:
    """The Deployment that an instance like this is one of, with no replica yet."""
    name = shape_name(template, spec)
    labels = {MANAGED_BY: "dynamollm", DEPLOYMENT: template.deployment, SHAPE: name}
    annotations = {MODEL: spec.shape.model, POOL: spec.pool, GPU: spec.shape.gpu}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name, "labels": labels, "annotations": annotations},
        "spec": {
            "replicas": 0,
            "selector": {"matchLabels": labels},
            # a new template must not roll engines that serve: they are replaced as plans change them
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1}},
            "template": {
                "metadata": {"labels": labels, "annotations": annotations},
                "spec": _pod_spec(template, model, spec),
            },
        },
    }


def _pod_spec(template: PodTemplate, model: VllmModel, spec: InstanceSpec) -> Object:
    launch = template.launch
    environment = {"VLLM_NO_USAGE_STATS": "1", **launch.environment, **model.environment}
    environment |= {"VLLM_SERVER_DEV_MODE": "1"} if launch.can_park else {}
    named: list[Object] = [{"name": name, "value": value} for name, value in environment.items()]
    named += [
        {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}
        for name, path in ((MARK, "metadata.name"), (NODE, "spec.nodeName"))
    ]
    container: Object = {
        "name": CONTAINER,
        "image": template.image,
        "command": command_line(launch, model, spec, template.port),
        "env": named,
        "ports": [{"name": "http", "containerPort": template.port}],
        "readinessProbe": {"httpGet": {"path": "/health", "port": "http"}, "periodSeconds": 5},
    }
    if template.gpu_resource:
        container["resources"] = {"limits": {template.gpu_resource: str(spec.shape.tp)}}
    pod: Object = {
        "schedulerName": SCHEDULER,
        "terminationGracePeriodSeconds": template.grace_s,
        "readinessGates": [{"conditionType": SERVING}],
        "containers": [container],
        "tolerations": [{"key": PREFIX + "gpu", "operator": "Exists"}],
    }
    return pod | ({"serviceAccountName": template.service_account} if template.service_account else {})


def claim(spec: InstanceSpec, version: str) -> Object:
    """The patch that makes a pod of this version an instance's."""
    slots = ",".join(str(gpu.index) for gpu in spec.gpus)
    return {
        "metadata": {
            "resourceVersion": version,
            "labels": {INSTANCE: spec.id},
            "annotations": {SLOTS: f"{spec.gpus[0].node}:{slots}", **clocks(spec.sm_clock_mhz, spec.sm_clock_mhz)},
        }
    }


def clocks(clock_mhz: int, awake_mhz: int) -> dict[str, str]:
    """Annotations: the clock its GPUs are to be locked at now, and the one it will wake to."""
    return {CLOCK: str(clock_mhz), AWAKE_CLOCK: str(awake_mhz)}


def serving(on: bool, why: str) -> Object:
    """The patch of a pod's status that opens or closes its readiness gate."""
    return {"status": {"conditions": [{"type": SERVING, "status": "True" if on else "False", "reason": why}]}}


def read_pod(pod: Object) -> PodView:
    """Read a pod of ours."""
    meta, spec, status = pod["metadata"], pod.get("spec", {}), pod.get("status", {})
    labels, notes = meta.get("labels", {}), meta.get("annotations", {}) or {}
    conditions = {condition["type"]: condition["status"] for condition in status.get("conditions", [])}
    containers = status.get("containerStatuses", [])
    failed = ""
    if status.get("phase") == "Failed":
        failed = f"{status.get('reason', 'failed')}: {status.get('message', 'its pod failed')}"
    node, _, slots = notes.get(SLOTS, "").partition(":")
    return PodView(
        name=meta["name"],
        version=meta.get("resourceVersion", ""),
        shape=labels.get(SHAPE, ""),
        instance_id=labels.get(INSTANCE),
        node=spec.get("nodeName"),
        ip=status.get("podIP"),
        running=conditions.get("ContainersReady") == "True",
        leaving="deletionTimestamp" in meta,
        failed=failed,
        restarts=sum(container.get("restartCount", 0) for container in containers),
        serving=conditions.get(SERVING) == "True",
        clock_mhz=int(notes.get(CLOCK, 0)),
        awake_clock_mhz=int(notes.get(AWAKE_CLOCK, 0)),
        slots=tuple(GpuSlot(node, int(index)) for index in slots.split(",")) if slots else (),
        model=notes.get(MODEL, ""),
        pool=notes.get(POOL, ""),
        gpu=notes.get(GPU, ""),
    )


def spec_of(pod: PodView) -> InstanceSpec:
    """What an instance's pod was started as. Raises ``ValueError`` where its notes are not whole."""
    if pod.instance_id is None or not pod.slots:
        raise ValueError(f"pod {pod.name} is no instance's")
    shape = InstanceShape(pod.model, pod.gpu, len(pod.slots))
    return InstanceSpec(pod.instance_id, pod.pool, shape, pod.slots, pod.awake_clock_mhz)


def heartbeat_name(deployment: str) -> str:
    """The Lease by which a driver shows that it lives."""
    return f"{deployment}-clocks"


def heartbeat(deployment: str, beat: int, lasts_s: int) -> Object:
    """That Lease; every ``beat`` is another, so that each writing gives it another version."""
    labels = {MANAGED_BY: "dynamollm", DEPLOYMENT: deployment}
    return {
        "apiVersion": "coordination.k8s.io/v1",
        "kind": "Lease",
        "metadata": {"name": heartbeat_name(deployment), "labels": labels, "annotations": {PREFIX + "beat": str(beat)}},
        "spec": {"leaseDurationSeconds": lasts_s},
    }


def ready_nodes(nodes: Sequence[Object]) -> frozenset[str]:
    """Nodes whose kubelet reports that they are well, by name."""
    found = set()
    for node in nodes:
        conditions = {c["type"]: c["status"] for c in node.get("status", {}).get("conditions", [])}
        if conditions.get("Ready") == "True":
            found.add(node["metadata"]["name"])
    return frozenset(found)


def cordoned_nodes(nodes: Sequence[Object]) -> frozenset[str]:
    """Nodes that are to be given nothing new, by name."""
    return frozenset(node["metadata"]["name"] for node in nodes if node.get("spec", {}).get("unschedulable"))
