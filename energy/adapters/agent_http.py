"""The node agent over HTTP: an ASGI application, its clock, and its metrics.

Serves one ``NodeAgent`` on the paths of ``energy/agent_wire.py``. GPU calls take micro- to milliseconds and run in the
event loop, one after the other. With a token, everything but ``/health`` and ``/metrics`` asks for ``Authorization:
Bearer``.
"""

import asyncio
import hmac
import json
import logging
import math
from collections.abc import Awaitable, Callable, Iterable
from http import HTTPStatus
from typing import Any

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from energy import agent_wire as wire
from energy.agent import NodeAgent
from energy.dcgm import dcgm_text
from energy.gpu import GpuError, GpuUnsupportedError

log = logging.getLogger("dynamollm.agent")

CALL_BUCKETS_S = (0.00001, 0.0001, 0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0)
JSON = b"application/json"
TEXT = b"text/plain; version=0.0.4; charset=utf-8"

Message = dict[str, Any]
Answer = tuple[int, bytes, bytes]  # status, content type, body
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class CallTimes:
    """How long each call to the GPU library took."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._seconds = Histogram(
            "dynamollm_gpu_call_seconds",
            "Time a call to the GPU library took",
            ["call"],
            buckets=CALL_BUCKETS_S,
            registry=self.registry,
        )

    def observe(self, call: str, seconds: float) -> None:
        """Count one call."""
        self._seconds.labels(call).observe(seconds)


class AgentMetrics(Collector):
    """What the agent counts of itself."""

    def __init__(self, agent: NodeAgent) -> None:
        self._agent = agent

    def describe(self) -> Iterable[Metric]:
        """Nothing fixed."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """Locks in force, locks found undone, GPU calls that failed."""
        agent = self._agent
        held = [1.0 for index in agent.indices if agent.lease(index) is not None]
        yield GaugeMetricFamily("dynamollm_agent_locked_gpus", "GPUs whose clocks are locked", value=sum(held))
        yield CounterMetricFamily("dynamollm_agent_drifts", "Locks undone by others, set again", value=agent.drifts)
        failures = CounterMetricFamily("dynamollm_agent_gpu_failures", "GPU calls that failed", labels=["kind"])
        for kind, count in agent.failures.items():
            failures.add_metric([kind], count)
        yield failures


class AgentApp:
    """The ASGI application.

    ``on_tick`` is called after each tick (for a watchdog); ``on_failure`` when ticking has failed, and leases would
    never run out again: the process must end.
    """

    def __init__(
        self,
        agent: NodeAgent,
        clock: Callable[[], float],
        times: CallTimes,
        token: str | None = None,
        tick_s: float = 1.0,
        on_tick: Callable[[], None] = lambda: None,
        on_failure: Callable[[], None] = lambda: None,
    ) -> None:
        self._agent = agent
        self._clock = clock
        self._token = token
        self._tick_s = tick_s
        self._on_tick = on_tick
        self._on_failure = on_failure
        self._registry = times.registry
        self._registry.register(AgentMetrics(agent))
        self._routes: dict[tuple[str, str], Callable[[wire.Query], Answer]] = {
            ("GET", wire.METRICS): self._metrics,
            ("GET", wire.GET_ENERGY): self._energy,
            ("GET", wire.GET_POWER): self._power,
            ("GET", wire.GET_LOCKED): self._locked,
            ("GET", wire.GET_SUPPORTED): self._supported,
            ("POST", wire.SET_CLOCKS): self._set_clocks,
            ("POST", wire.RESET_CLOCKS): self._reset_clocks,
            ("POST", wire.RESET_CLOCKS_SHORT): self._reset_clocks,
            ("POST", wire.RENEW): self._renew,
        }

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Serve one connection's request, or the process's life."""
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        elif scope["type"] == "http":
            await self._respond(send, *self._answer(scope))

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        ticking = asyncio.create_task(self._tick())
        await send({"type": "lifespan.startup.complete"})
        await receive()
        ticking.cancel()
        await asyncio.gather(ticking, return_exceptions=True)
        self._agent.release_all(self._clock())
        await send({"type": "lifespan.shutdown.complete"})

    async def _tick(self) -> None:
        try:
            while True:
                self._agent.tick(self._clock())
                self._on_tick()
                await asyncio.sleep(self._tick_s)
        except Exception:
            log.exception("the agent cannot watch its leases any more; it ends")
            self._on_failure()
            raise

    def _answer(self, scope: Message) -> Answer:
        method, path = scope["method"], scope["path"]
        if path == wire.HEALTH:
            return _empty()
        if path != wire.METRICS and not self._may(dict(scope["headers"])):
            return _json({"error": "Authorization: Bearer with the agent's token is needed"}, HTTPStatus.UNAUTHORIZED)
        route = self._routes.get((method, path))
        if route is None:
            return _json({"error": f"{method} {path} is not known here"}, HTTPStatus.NOT_FOUND)
        try:
            return route(wire.Query(scope["query_string"].decode("latin-1")))
        except wire.BadQueryError as error:
            return _json({"error": str(error)}, HTTPStatus.BAD_REQUEST)
        except GpuError as error:
            status, body = wire.error_answer(error)
            return status, JSON, body
        except OSError as error:
            message = f"the journal cannot be written, so nothing is locked: {error}"
            return _json({"error": message}, HTTPStatus.INSUFFICIENT_STORAGE)

    def _may(self, headers: dict[bytes, bytes]) -> bool:
        if self._token is None:
            return True
        given = headers.get(b"authorization", b"")
        return hmac.compare_digest(given, b"Bearer " + self._token.encode())

    # --- routes ------------------------------------------------------------------------------------------------------

    def _metrics(self, query: wire.Query) -> Answer:
        return HTTPStatus.OK, TEXT, dcgm_text(self._agent.readings()) + generate_latest(self._registry)

    def _energy(self, query: wire.Query) -> Answer:
        return _json({str(i): {"energy_mj": round(self._agent.gpu(i).energy_j() * 1e3)} for i in self._some(query)})

    def _power(self, query: wire.Query) -> Answer:
        power_mw = {str(index): round(self._agent.gpu(index).power_w() * 1000.0) for index in self._some(query)}
        return _json({"timestamp_ms": round(self._clock() * 1000.0), "power_mw": power_mw})

    def _locked(self, query: wire.Query) -> Answer:
        now_s = self._clock()
        told = {}
        for index in self._some(query):
            if (lease := self._agent.lease(index)) is not None:
                told[str(index)] = {
                    "min_clock_mhz": lease.lock.low_mhz,
                    "max_clock_mhz": lease.lock.high_mhz,
                    "holder": lease.holder,
                    "expires_in_s": lease.expires_s - now_s,
                }
        return _json(told)

    def _supported(self, query: wire.Query) -> Answer:
        told: dict[str, list[int]] = {}
        for index in self._some(query):
            try:
                told[str(index)] = list(self._agent.gpu(index).supported_sm_clocks_mhz())
            except GpuUnsupportedError:
                told[str(index)] = []
        return _json(told)

    def _set_clocks(self, query: wire.Query) -> Answer:
        asked = query.set_clocks()
        self._agent.lock(asked.gpus, asked.lock, asked.holder, self._clock(), asked.lease_s)
        return _empty()

    def _reset_clocks(self, query: wire.Query) -> Answer:
        self._agent.reset(query.gpus(), self._clock())
        return _empty()

    def _renew(self, query: wire.Query) -> Answer:
        renewed = self._agent.renew(query.gpus(), query.holder(), self._clock())
        return _json({str(index): {"expires_in_s": lease.ttl_s} for index, lease in renewed.items()})

    def _some(self, query: wire.Query) -> tuple[int, ...]:
        return query.gpus(every=self._agent.indices)

    @staticmethod
    async def _respond(send: Send, status: int, content_type: bytes, body: bytes) -> None:
        headers = [(b"content-type", content_type), (b"content-length", str(len(body)).encode())]
        if status == HTTPStatus.TOO_MANY_REQUESTS:
            wait_s = json.loads(body)["retry_after_s"]
            headers.append((b"retry-after", str(math.ceil(wait_s)).encode()))
        await send({"type": "http.response.start", "status": int(status), "headers": headers})
        await send({"type": "http.response.body", "body": body})


def _json(value: object, status: HTTPStatus = HTTPStatus.OK) -> Answer:
    return status, JSON, json.dumps(value).encode()


def _empty() -> Answer:
    return HTTPStatus.OK, JSON, b""
