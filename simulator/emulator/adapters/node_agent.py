"""The GPU agent of one emulated node: readings under DCGM's names, clocks under zeusd's paths.

Answers as zeusd's HTTP API does (query parameters, JSON by GPU index, an empty 200 for a write), so that a client of
one works with the other; ``reset_locked_clocks`` is the short name some clients use for ``reset_gpu_locked_clocks``.
"""

import asyncio
from http import HTTPStatus
from urllib.parse import parse_qs

import msgspec

from simulator.emulator.adapters.http import TEXT, Exchange
from simulator.emulator.gpus import EmulatedGpu, EmulatedNode
from simulator.emulator.telemetry import dcgm_text


class _BadQuery(Exception):
    """A query parameter is missing or wrong."""


class NodeAgent:
    """Answers for one node."""

    def __init__(self, node: EmulatedNode) -> None:
        self._node = node
        self._loop = asyncio.get_running_loop()
        self._routes = {
            ("GET", "/metrics"): self._metrics,
            ("GET", "/health"): lambda exchange: exchange.respond(200),
            ("GET", "/gpu/get_cumulative_energy"): self._energy,
            ("GET", "/gpu/get_power"): self._power,
            ("POST", "/gpu/set_gpu_locked_clocks"): self._set_clocks,
            ("POST", "/gpu/reset_gpu_locked_clocks"): self._reset_clocks,
            ("POST", "/gpu/reset_locked_clocks"): self._reset_clocks,
        }

    def handle(self, exchange: Exchange) -> None:
        """Answer one request."""
        route = self._routes.get((exchange.method, exchange.path))
        if route is None:
            exchange.respond(HTTPStatus.NOT_FOUND)
            return
        try:
            route(exchange)
        except _BadQuery as error:
            exchange.respond(HTTPStatus.BAD_REQUEST, msgspec.json.encode({"error": str(error)}))

    def _metrics(self, exchange: Exchange) -> None:
        exchange.respond(200, dcgm_text(self._node.gpus, self._loop.time()), TEXT)

    def _energy(self, exchange: Exchange) -> None:
        now_s = self._loop.time()
        energy = {str(gpu.index): {"energy_mj": gpu.energy_mj(now_s)} for gpu in self._gpus(exchange, required=False)}
        exchange.respond(200, msgspec.json.encode(energy))

    def _power(self, exchange: Exchange) -> None:
        now_s = self._loop.time()
        power_mw = {str(g.index): round(1000 * g.power_w(now_s)) for g in self._gpus(exchange, required=False)}
        exchange.respond(200, msgspec.json.encode({"timestamp_ms": round(now_s * 1000), "power_mw": power_mw}))

    def _set_clocks(self, exchange: Exchange) -> None:
        gpus = self._gpus(exchange)
        low_mhz, high_mhz = (self._number(exchange, name) for name in ("min_clock_mhz", "max_clock_mhz"))
        if low_mhz > high_mhz:
            raise _BadQuery(f"min_clock_mhz {low_mhz} is above max_clock_mhz {high_mhz}")
        for gpu in gpus:
            gpu.lock(high_mhz)  # a busy GPU runs at the top of its range
        exchange.respond(200)

    def _reset_clocks(self, exchange: Exchange) -> None:
        for gpu in self._gpus(exchange):
            gpu.lock(None)
        exchange.respond(200)

    def _gpus(self, exchange: Exchange, required: bool = True) -> list[EmulatedGpu]:
        given = parse_qs(exchange.query).get("gpu_ids", [""])[0]
        indices = [int(part) for part in given.split(",") if part.strip().isdigit()]
        if not indices:
            if required or given:
                raise _BadQuery("gpu_ids must contain at least one GPU index")
            return self._node.gpus
        if unknown := [index for index in indices if index >= len(self._node.gpus)]:
            raise _BadQuery(f"no such GPU: {unknown[0]}; this node has 0..{len(self._node.gpus) - 1}")
        return [self._node.gpus[index] for index in indices]

    @staticmethod
    def _number(exchange: Exchange, name: str) -> int:
        given = parse_qs(exchange.query).get(name, [""])[0]
        if not given.isdigit():
            raise _BadQuery(f"{name} must be a whole number of MHz, not {given!r}")
        return int(given)
