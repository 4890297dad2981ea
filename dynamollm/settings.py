"""Settings: everything an operator can set, one frozen dataclass tree, one YAML file.

Every value has a unit in its key and a default with its reason. Whatever is not a key here cannot be configured;
an unknown key, a wrong type or a wrong unit is refused at start (``dynamollm/validation.py``), and so is a tree that
contradicts itself (``check`` below). Reads nothing: files and environment are ``dynamollm/adapters/configuration.py``.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from pools.classes import ClassCuts, RequestClass

Name = Annotated[str, Field(min_length=1, max_length=253, pattern=r"^[A-Za-z0-9][A-Za-z0-9._/:-]*$")]
Port = Annotated[int, Field(ge=0, le=65535)]
Seconds = Annotated[float, Field(gt=0, le=86_400)]
LatencySeconds = Annotated[float, Field(gt=0, le=60)]
Clock = Annotated[int, Field(ge=100, le=5000)]
TensorParallel = Literal[1, 2, 4, 8]
ClassName = Literal["SS", "SM", "SL", "MS", "MM", "ML", "LS", "LM", "LL"]


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """Where the gateway listens and how it stops."""

    host: str = "127.0.0.1"
    port: Port = 8080
    shutdown_grace_s: Seconds = 30.0  # streams still open then get an error event


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """One served model: its name to clients, what it costs, how its prompts are counted."""

    name: Name
    profile: str  # a shipped profile's name or a path
    tokenizer_file: str | None = None  # a Hugging Face tokenizer.json; without it, tokens are estimated
    chat_template_file: str | None = None
    max_model_len: Annotated[int, Field(ge=1)] = 131_072
    path: str | None = None  # vllm: weights, a directory or a Hub name; None: the name
    vllm_arguments: tuple[str, ...] = ()  # vllm: added to the command line of its engines


@dataclass(frozen=True, slots=True)
class NodeSettings:
    """A kind of node: ``count`` machines of ``gpus`` GPUs each, linked by NVLink inside."""

    name: Name
    gpu: Name = "H100-SXM"
    gpus: Annotated[int, Field(ge=1, le=16)] = 8
    count: Annotated[int, Field(ge=1, le=100_000)] = 1

    def names(self) -> Iterator[str]:
        """Of each machine: the name itself, or, with a count, ``h100-0``, ``h100-1``."""
        if self.count == 1:
            yield self.name
        else:
            yield from (f"{self.name}-{index}" for index in range(self.count))


@dataclass(frozen=True, slots=True)
class PoolSettings:
    """A pool: like instances kept for one class, and for those it dominates that have no pool of their own."""

    name: Name
    model: Name
    request_class: ClassName
    tp: TensorParallel
    instances: Annotated[int, Field(ge=0, le=100_000)] = 1
    sm_clock_mhz: Clock | None = None  # None: the profile's maximum


@dataclass(frozen=True, slots=True)
class SloSettings:
    """Latency promised at P99 (the paper's table) and where the classes part."""

    ttft_s: tuple[LatencySeconds, LatencySeconds, LatencySeconds] = (0.25, 0.4, 2.0)  # short, medium, long input
    tbt_s: LatencySeconds = 0.1
    cuts: ClassCuts = field(default_factory=ClassCuts)


@dataclass(frozen=True, slots=True)
class VllmSettings:
    """How ``vllm serve`` processes are started on this machine, and who sets their GPUs' clocks."""

    command: str = "vllm"  # executable: a name on the path, or a path
    arguments: tuple[str, ...] = ()  # added to every engine's command line
    environment: dict[str, str] = field(default_factory=dict)  # added to every engine's environment
    agents: dict[str, str] = field(default_factory=dict)  # node -> unix:/path or http://host:port of `dynamollm agent`
    log_dir: str = "~/.local/state/dynamollm/log"  # a file for each instance
    start_timeout_s: Seconds = 1800.0  # from starting the process to its first token
    leave_running: bool = False  # when this process is stopped; the next one adopts them, as after a crash
    can_park: bool = True  # opens vLLM's development endpoints on its port, which put an engine to sleep


@dataclass(frozen=True, slots=True)
class RaySettings:
    """A Ray cluster to start engines on; how they are started is ``driver.vllm``'s, on every node alike."""

    address: str = "auto"  # or host:port of the head; this machine runs a Ray node of that cluster
    namespace: Annotated[str, Field(min_length=1)] = "dynamollm"  # one for each deployment that shares the cluster
    engine: Literal["vllm", "emulated"] = "vllm"  # emulated: servers and boards as the models' profiles say
    clocks: Literal["actors", "none"] = "actors"  # an agent on each node, unless driver.vllm.agents names some
    leave_running: bool = True  # instances outlive this process, and the next one takes them over
    autoscale: bool = False  # nodes that are not there count as to be had: Ray's autoscaler is asked for them
    cpus_per_gpu: Annotated[float, Field(ge=0, le=64)] = 0.0  # reserved beside each GPU


@dataclass(frozen=True, slots=True)
class KubernetesSettings:
    """A Kubernetes cluster to run engines on as pods; their command line is made of ``driver.vllm``, as elsewhere.

    ``nodes`` are the cluster's nodes, by their names there.
    """

    deployment: Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,18}[a-z0-9])?$")] = "dynamollm"  # in names, labels
    namespace: Annotated[str, Field(min_length=1)] = "default"
    context: str | None = None  # of the kubeconfig; inside a pod, its service account is used
    image: str = "vllm/vllm-openai:latest"
    engine: Literal["vllm", "emulated"] = "vllm"  # emulated: our own image, pods without GPUs
    gpu_resource: str = "nvidia.com/gpu"  # what the device plugin calls a GPU
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    grace_s: Annotated[int, Field(ge=1, le=3600)] = 60  # a pod's, from SIGTERM to SIGKILL
    service_account: str | None = None  # of the engines' pods
    mode: Literal["scale", "metrics"] = "scale"  # metrics: desired replicas are only told, and an HPA or KEDA scales
    leave_running: bool = True  # pods outlive this process, and the next one takes them over


@dataclass(frozen=True, slots=True)
class DriverSettings:
    """What starts instances.

    ``emulator`` needs neither GPU nor vLLM; ``vllm`` starts real servers on this machine's GPUs; ``vllm-emulated``
    starts real servers whose steps last as long as on the GPUs that ``nodes`` names; ``ray`` and ``kubernetes``
    start them on the nodes of a cluster; ``attach`` routes to servers somebody else started.
    """

    kind: Literal["emulator", "vllm", "vllm-emulated", "ray", "kubernetes", "attach"] = "emulator"
    startup_s: Annotated[float, Field(ge=0, le=3600)] = 2.0  # emulator: time an instance takes to load its weights
    processes: Annotated[int, Field(ge=1, le=64)] = 1  # emulator: processes that share the instances
    emulators: dict[str, str] = field(default_factory=dict)  # emulator: node -> control URL of one that runs already
    urls: dict[str, tuple[str, ...]] = field(default_factory=dict)  # attach: pool name -> base URLs
    urls_file: str | None = None  # attach: a YAML file of servers instead, followed while it changes
    vllm: VllmSettings = field(default_factory=VllmSettings)
    ray: RaySettings = field(default_factory=RaySettings)
    kubernetes: KubernetesSettings = field(default_factory=KubernetesSettings)
    seed: int = 0


@dataclass(frozen=True, slots=True)
class RoutingSettings:
    """How requests are spread over the instances of their pools, beyond load, energy and SLO."""

    prefix_affinity: bool | None = None  # go where the prompt's beginning is cached; None: where engines cache (vLLM)


@dataclass(frozen=True, slots=True)
class ControllerSettings:
    """Who decides how many instances there are, their TP and clocks.

    ``static`` keeps what ``pools`` says; the others are policies of ``solver.policies``, and begin with ``pools``.
    ``scale-freq`` keeps the instances, and turns their clocks.
    """

    policy: Literal["static", "dynamollm", "dynamollm-paper", "scale-inst", "scale-freq"] = "dynamollm"
    parked_w_per_gpu: Annotated[float, Field(ge=0, le=2000)] | None = None  # None: engines are stopped, never parked
    warm_up_s: Annotated[float, Field(ge=0, le=86_400)] = 60.0  # of traffic to see before the first plan
    dwell_s: Seconds = 600.0  # how long a change is expected to last: over this time it must pay for itself
    pace: Annotated[float, Field(ge=1, le=100)] = 1.0  # times as fast as life the load moves: a trace replayed sped up
    transition_deadline_s: Seconds = 900.0  # a start or a drain that takes longer is abandoned
    lease_s: Annotated[float, Field(ge=0.2, le=300)] = 2.0  # a silent leader is followed by another after this
    leadership: Literal["store", "kubernetes"] = "store"  # kubernetes: a Lease in driver.kubernetes.namespace

    @property
    def keeps_instances(self) -> bool:
        """Whether which instances there are is the configuration's word, or somebody else's, and no plan's."""
        return self.policy in ("static", "scale-freq")


@dataclass(frozen=True, slots=True)
class EnergySettings:
    """What energy costs, in CO2 and money. At most one source of carbon intensity."""

    carbon_region: str | None = None  # a cloud region's yearly mean; nothing set: us-west2, the paper's California
    carbon_file: str | None = None  # hourly: CSV with columns timestamp and avg_CI, gCO2/kWh
    carbon_zone: str | None = None  # Electricity Maps, live, as DE or US-CAL-CISO; until it answers: us-west2
    carbon_token: str | None = None  # for carbon_zone; better as DYNAMOLLM_ENERGY__CARBON_TOKEN
    carbon_g_per_kwh: Annotated[float, Field(ge=0, le=2000)] | None = None
    gpu_hour_usd: dict[str, float] = field(default_factory=dict)  # over the shipped prices, by GPU name
    electricity_usd_per_kwh: Annotated[float, Field(ge=0, le=10)] = 0.0  # 0: part of the rented GPU-hour
    counterfactual: bool = True  # simulate beside it what single-pool and packing would have used


@dataclass(frozen=True, slots=True)
class StoreSettings:
    """Where what was learned and booked outlives a restart, and what the processes of a deployment share.

    ``memory``: nowhere, one process. ``file``: the processes of one machine. ``redis``: any number of machines.
    """

    kind: Literal["memory", "file", "redis"] = "memory"
    folder: str = "~/.local/state/dynamollm"  # file: the database's
    url: str = "redis://127.0.0.1:6379/0"  # redis, rediss or unix, with its password
    prefix: Name = "dynamollm"  # redis: of every key; one deployment, one prefix


@dataclass(frozen=True, slots=True)
class ObjectiveSettings:
    """A priority class clients may name; below 0 it may be shed under pressure."""

    name: Name
    priority: Annotated[int, Field(ge=-1000, le=1000)]


@dataclass(frozen=True, slots=True)
class AuthSettings:
    """Who may call. No keys: everybody (the default binds to loopback only)."""

    api_keys: tuple[str, ...] = ()
    api_keys_file: str | None = None  # one key a line, '#' comments


@dataclass(frozen=True, slots=True)
class LimitSettings:
    """Bounds that keep one client or one burst from hurting the rest."""

    body_bytes: Annotated[int, Field(ge=1024, le=2**31)] = 32 * 2**20
    queue_requests: Annotated[int, Field(ge=0, le=1_000_000)] = 1024
    queue_ttl_s: Seconds = 30.0  # a request waits at most this long for an instance
    squash_late_s: Seconds | None = None  # past its TTFT by this without a token, a request is given up; None: never
    request_deadline_s: Seconds = 3600.0  # accepted to last byte
    first_byte_deadline_s: Seconds = 300.0  # accepted to first byte, retry included
    header_timeout_s: Seconds = 10.0
    tenant_requests_per_minute: Annotated[float, Field(gt=0)] | None = None  # over all gateways; None: no limit


@dataclass(frozen=True, slots=True)
class Settings:
    """The whole configuration."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    models: tuple[ModelSettings, ...]
    nodes: tuple[NodeSettings, ...]
    pools: tuple[PoolSettings, ...]
    server: ServerSettings = field(default_factory=ServerSettings)
    slo: SloSettings = field(default_factory=SloSettings)
    driver: DriverSettings = field(default_factory=DriverSettings)
    routing: RoutingSettings = field(default_factory=RoutingSettings)
    controller: ControllerSettings = field(default_factory=ControllerSettings)
    energy: EnergySettings = field(default_factory=EnergySettings)
    store: StoreSettings = field(default_factory=StoreSettings)
    objectives: tuple[ObjectiveSettings, ...] = ()
    auth: AuthSettings = field(default_factory=AuthSettings)
    limits: LimitSettings = field(default_factory=LimitSettings)


def of_one_kind(settings: Settings) -> bool:
    """Whether it is one model on like nodes: what the simulator has a world for."""
    kinds = {(node.gpu, node.gpus) for node in settings.nodes}
    return len(settings.models) == 1 and len(kinds) == 1


def check(settings: Settings) -> list[str]:
    """Say where a tree of valid values contradicts itself; each problem with the path of its key."""
    return [
        *_check_names(settings),
        *_check_pools(settings),
        *_check_slo(settings.slo),
        *_check_driver(settings),
        *_check_energy(settings.energy),
        *_check_store(settings.store),
    ]


def _check_names(settings: Settings) -> list[str]:
    names = {
        "models": [model.name for model in settings.models],
        "nodes": [node.name for node in settings.nodes],
        "pools": [pool.name for pool in settings.pools],
        "objectives": [objective.name for objective in settings.objectives],
    }
    problems = []
    for group, group_names in names.items():
        for index, name in enumerate(group_names):
            if (first := group_names.index(name)) < index:
                problems.append(f"{group}[{index}].name: {name!r} is already {group}[{first}]")
    problems += [f"{group}: at least one is needed" for group in ("models", "nodes", "pools") if not names[group]]
    return problems


def _check_pools(settings: Settings) -> list[str]:
    problems = []
    models = {model.name for model in settings.models}
    for index, pool in enumerate(settings.pools):
        if pool.model not in models:
            problems.append(f"pools[{index}].model: {pool.model!r} is not among models: {', '.join(sorted(models))}")
    if settings.driver.kind != "attach":
        problems += _check_gpus(settings)
    for model in settings.models:
        served = [RequestClass[pool.request_class] for pool in settings.pools if pool.model == model.name]
        if served and RequestClass.LL not in served:
            problems.append(
                f"pools: no pool of model {model.name!r} is kept for LL, so its longest requests have no home"
            )
    return problems


def _check_gpus(settings: Settings) -> list[str]:
    """First fit by falling TP: instances of TP k stand inside one node."""
    free = [node.gpus for node in settings.nodes for _ in range(node.count)]
    wanted = sorted((pool.tp for pool in settings.pools for _ in range(pool.instances)), reverse=True)
    for tp in wanted:
        place = next((index for index, gpus in enumerate(free) if gpus >= tp), None)
        if place is None:
            total = sum(node.gpus * node.count for node in settings.nodes)
            return [
                f"pools: the instances need {sum(wanted)} GPUs (TP {wanted[0]}..{wanted[-1]}, each inside one node), "
                f"nodes have {total}"
            ]
        free[place] -= tp
    return []


def _check_slo(slo: SloSettings) -> list[str]:
    problems = []
    for key, cuts in (("input_tokens", slo.cuts.input_tokens), ("output_tokens", slo.cuts.output_tokens)):
        if not 0 < cuts[0] < cuts[1]:
            problems.append(f"slo.cuts.{key}: the two cuts must rise and be positive; found {list(cuts)}")
    if list(slo.ttft_s) != sorted(slo.ttft_s):
        problems.append(f"slo.ttft_s: a longer input cannot have the tighter TTFT; found {list(slo.ttft_s)}")
    return problems


def _check_driver(settings: Settings) -> list[str]:
    match settings.driver.kind:
        case "attach":
            return _check_attached(settings)
        case "vllm" | "vllm-emulated":
            problems = _check_vllm(settings)
        case "ray":
            problems = _check_agents(settings)
        case "kubernetes":
            problems = _check_kubernetes(settings)
        case _:
            problems = _check_emulators(settings)
    if settings.driver.urls:
        problems.append("driver.urls: only the attach driver takes URLs")
    if settings.driver.urls_file is not None:
        problems.append("driver.urls_file: only the attach driver takes URLs")
    return problems


def _check_emulators(settings: Settings) -> list[str]:
    """Either the driver runs all emulators itself, or none."""
    emulators = settings.driver.emulators
    nodes = [name for node in settings.nodes for name in node.names()] if emulators else []
    problems = [f"driver.emulators.{name}: no such node" for name in emulators if name not in nodes]
    problems += [f"driver.emulators: node {name} has none" for name in nodes if name not in emulators]
    return problems + [
        f"driver.emulators.{name}: must begin with http://; found {url!r}"
        for name, url in emulators.items()
        if not url.startswith("http://")
    ]


def _check_vllm(settings: Settings) -> list[str]:
    agents, emulated = settings.driver.vllm.agents, settings.driver.kind == "vllm-emulated"
    problems = []
    if emulated and agents:
        problems.append("driver.vllm.agents: an emulated device has no agent; its clocks are the driver's own")
    if not emulated and sum(node.count for node in settings.nodes) > 1:
        problems.append("nodes: the vllm driver starts processes on this machine: name one node, with count 1")
    problems += _check_agents(settings)
    if not emulated and not agents:
        if settings.controller.policy == "scale-freq":
            problems.append("controller.policy: nobody sets clocks; name the node's agent in driver.vllm.agents")
        problems += [
            f"pools[{index}].sm_clock_mhz: nobody sets clocks; name the node's agent in driver.vllm.agents"
            for index, pool in enumerate(settings.pools)
            if pool.sm_clock_mhz is not None
        ]
    return problems


def _check_agents(settings: Settings) -> list[str]:
    agents = settings.driver.vllm.agents
    names = {name for node in settings.nodes for name in node.names()}
    return [f"driver.vllm.agents.{name}: no such node" for name in agents if name not in names] + [
        f"driver.vllm.agents.{name}: must begin with unix: or http://; found {address!r}"
        for name, address in agents.items()
        if not address.startswith(("unix:", "http://"))
    ]


def _check_kubernetes(settings: Settings) -> list[str]:
    problems = []
    if settings.driver.vllm.agents:
        problems.append("driver.vllm.agents: on Kubernetes the agents find their orders on the pods; leave it empty")
    return problems


def _check_attached(settings: Settings) -> list[str]:
    pools = {pool.name for pool in settings.pools}
    problems = [f"driver.urls.{name}: no such pool" for name in settings.driver.urls if name not in pools]
    for name, urls in settings.driver.urls.items():
        problems += [
            f"driver.urls.{name}[{index}]: must begin with http://; found {url!r}"
            for index, url in enumerate(urls)
            if not url.startswith("http://")
        ]
    if not settings.controller.keeps_instances:
        problems.append(
            "controller.policy: attached servers are not this gateway's to start or stop; use scale-freq, or static"
        )
    return problems + _check_servers(settings)


def _check_servers(settings: Settings) -> list[str]:
    """One source of servers; clocks only where it says whose GPUs are whose."""
    driver = settings.driver
    if driver.urls_file is not None:
        problems = ["driver.urls: driver.urls_file is given too; keep one"] if driver.urls else []
        return problems + _check_agents(settings)
    problems = [] if any(driver.urls.values()) else ["driver.urls: the attach driver needs at least one URL"]
    if settings.controller.policy == "scale-freq":
        problems.append(
            "controller.policy: scale-freq turns clocks, and driver.urls does not say whose GPUs are whose; "
            "use driver.urls_file, or static"
        )
    if driver.vllm.agents:
        problems.append("driver.vllm.agents: driver.urls does not say whose GPUs are whose; use driver.urls_file")
    return problems


def _check_energy(energy: EnergySettings) -> list[str]:
    sources = ("carbon_region", "carbon_file", "carbon_zone", "carbon_g_per_kwh")
    given = [key for key in sources if getattr(energy, key) is not None]
    problems = [f"energy.{given[1]}: {given[0]} is given too; keep one"] if len(given) > 1 else []
    if (energy.carbon_zone is None) != (energy.carbon_token is None):
        problems.append("energy.carbon_token: a zone needs the token of Electricity Maps, and a token a zone")
    return problems


def _check_store(store: StoreSettings) -> list[str]:
    if store.kind == "redis" and not store.url.startswith(("redis://", "rediss://", "unix://")):
        return [f"store.url: must begin with redis://, rediss:// or unix://; found {store.url!r}"]
    return []
