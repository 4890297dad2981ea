"""The readings of many nodes' GPUs at once: every agent's ``/metrics`` under DCGM's names, by httpx, without blocking.

An agent that does not answer is left out and said once; its GPUs' energy is in the next reading that does.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection

import httpx

from energy.agent_wire import METRICS
from energy.dcgm import read_dcgm
from energy.gpu import GpuReading

log = logging.getLogger("dynamollm.meter")

Addresses = Callable[[], Awaitable[Collection[str]]]  # base URLs of the agents, as they are now


class AgentMeter:
    """Reads ``dynamollm agent``, the emulator's agents, or DCGM exporters."""

    def __init__(self, addresses: Addresses, token: str | None = None, timeout_s: float = 2.0) -> None:
        self._addresses = addresses
        headers = {"authorization": f"Bearer {token}"} if token else {}
        self._client = httpx.AsyncClient(timeout=timeout_s, trust_env=False, headers=headers)
        self._silent: set[str] = set()

    async def read(self) -> list[GpuReading]:
        """The readings of every agent that answers."""
        pages = await asyncio.gather(*(self._read(address) for address in await self._addresses()))
        return [reading for page in pages for reading in page]

    async def _read(self, address: str) -> list[GpuReading]:
        try:
            answer = await self._client.get(address + METRICS)
            answer.raise_for_status()
            readings = read_dcgm(answer.text)
        except (httpx.HTTPError, ValueError, KeyError) as error:
            if address not in self._silent:
                self._silent.add(address)
                log.warning("agent %s cannot be read, its energy is booked once it can: %r", address, error)
            return []
        self._silent.discard(address)
        return readings

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()
