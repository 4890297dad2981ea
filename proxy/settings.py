"""ProxySettings: what the gateway can be told. Built once by the wiring, never changed."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from pools.classes import ClassSlos

MIB = 2**20


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds that keep one client, or one sick instance, from hurting the rest."""

    body_bytes: int = 32 * MIB
    head_bytes: int = 64 * 1024
    held_bytes: int = MIB  # of an answer held back to be inspected whole; a longer one is passed on as it comes
    upstream_connections: int = 4096  # to one instance
    pipelined_requests: int = 4  # waiting on one connection; then it is not read until one is answered
    label_values: int = 1000  # of one metric label; then ``other``


@dataclass(frozen=True, slots=True)
class Deadlines:
    """How long each step may take."""

    head_s: float = 10.0  # first byte of a request to the end of its headers
    body_s: float = 60.0  # end of the headers to the end of the body
    keep_alive_s: float = 75.0  # an idle client connection
    connect_s: float = 2.0  # to an instance
    first_byte_s: float = 300.0  # whole request received to first event, queue and retry included
    total_s: float = 3600.0  # whole request received to last byte
    stalled_client_s: float = 60.0  # a client that does not read
    upstream_idle_s: float = 4.0  # vLLM closes idle connections after 5 s


@dataclass(frozen=True, slots=True)
class ProxySettings:
    """Everything the gateway is told."""

    slos: ClassSlos = field(default_factory=ClassSlos)
    limits: Limits = field(default_factory=Limits)
    deadlines: Deadlines = field(default_factory=Deadlines)
    api_keys: tuple[str, ...] = ()  # none: everybody may call
    engine_api_key: str | None = None  # sent to the instances
    objectives: Mapping[str, int] = field(default_factory=dict)  # name -> priority, higher is more important
    tier_priorities: Mapping[str, int] = field(default_factory=lambda: {"flex": -1, "default": 0, "priority": 1})
    engine_orders_by_priority: bool = False  # instances run with --scheduling-policy priority
    prefix_affinity: bool = False  # requests are told apart by how their prompts begin: for engines that cache prefixes
    learned_per_tick: int = (
        16  # outcomes shown to predictors every 50 ms, 20 us each; beyond 320 a second they are a sample
    )
    slo_bounds_s: tuple[float, float] = (0.001, 600.0)  # a per-request target outside is ignored and counted
    request_id_prefix: str = "req-"  # unique to this process: ids are this and a count
