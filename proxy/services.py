"""GatewayServices: what the gateway needs of the rest, as contracts.

The wiring fills it in; tests fill it with fakes. Nothing here does anything.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol
from urllib.parse import urlsplit

import msgspec

from pools.escalation import Escalated
from pools.request import Assigned, Decision, Rejected, Request
from pools.tokens import Messages, PromptSize, TokenCount
from proxy.fields import RequestFields
from proxy.metrics import GatewayMetrics
from proxy.outcome import Outcome
from proxy.settings import ProxySettings


class Router(Protocol):
    """Where a request goes, and what becomes of it (``pools/router.py``).

    Every request assigned or queued ends in exactly one of: finished, cancelled, failed and not routed again.
    """

    def route(self, request: Request, now_s: float, exclude: frozenset[str] = ...) -> Decision:
        """Assign, queue or reject; never to an instance in ``exclude``."""

    def on_first_token(self, request_id: str, now_s: float) -> None:
        """Its first token came."""

    def on_finished(self, request_id: str, output_tokens: int, now_s: float) -> None:
        """Its answer is complete."""

    def on_failed(self, request_id: str, instance_id: str, now_s: float) -> None:
        """The instance failed it."""

    def on_cancelled(self, request_id: str, now_s: float) -> None:
        """Its client is gone, queued or not."""

    def escalate(self, now_s: float) -> list[Escalated]:
        """Those sent that will get their first token too late, and where they go instead."""

    def release(self, now_s: float) -> list[tuple[Request, Assigned | Rejected]]:
        """Those queued that can go, or have waited too long."""


class TokenCounter(Protocol):
    """How many tokens a prompt is (``pools/tokens.py``)."""

    def count(self, model: str, size: PromptSize, read: Callable[[], str | Messages] | None = None) -> TokenCount:
        """Estimated from its size; counted exactly from its text, got with ``read``, only where that is needed."""


class LengthPredictor(Protocol):
    """How many tokens an answer will be."""

    def output_tokens(self, fields: RequestFields, model: str, input_tokens: int, tenant: str) -> float:
        """Predicted tokens of the answer."""


class Address(msgspec.Struct, frozen=True, gc=False):
    """Where an instance listens."""

    host: str
    port: int
    authority: bytes = b""

    @staticmethod
    def of_url(url: str) -> "Address":
        """The address in ``http://host:port``. Raises ``ValueError`` for anything else."""
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname or parts.path not in ("", "/"):
            raise ValueError(f"an instance's URL must be http://HOST:PORT, got {url!r}")
        return Address(parts.hostname, parts.port or 80, parts.netloc.encode("ascii"))


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model as GET /v1/models tells it."""

    id: str
    created: int = 0
    max_model_len: int | None = None


class Directory(Protocol):
    """What is served, and where."""

    def models(self) -> Mapping[str, ServedModel]:
        """The models configured, by name."""

    def servable(self, model: str) -> bool:
        """Whether at least one instance of it takes requests."""

    def address(self, instance_id: str) -> Address | None:
        """Where an instance listens; None when there is no such instance any more."""


@dataclass(frozen=True, slots=True)
class GatewayServices:
    """Everything a gateway is made of."""

    router: Router
    directory: Directory
    tokens: TokenCounter
    lengths: LengthPredictor
    metrics: GatewayMetrics
    clock: Callable[[], float]  # monotonic seconds
    settings: ProxySettings = field(default_factory=ProxySettings)
    observers: tuple[Callable[[Outcome], None], ...] = ()  # accounting: called once for every request, as it ends
    learners: tuple[Callable[[Outcome], None], ...] = ()  # told of at most ``ProxySettings.learned_per_tick`` a tick
    energy_j: Callable[[Outcome], float | None] | None = None  # of a finished request
