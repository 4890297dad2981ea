"""GpuClocks: GPUs' SM clocks and readings, through whatever reaches their node (an agent, or the GPUs themselves).

Locks set through an agent are leases; they are renewed here for as long as the event loop runs, so a controller that
hangs loses them and no GPU stays slow behind its back. The Gpu port blocks, hence the threads; one call a node at once.
"""

import asyncio
import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol, TypeVar

from energy.gpu import ClockLock, Gpu, GpuError, GpuReading, snap
from pools.drivers.port import DriverError
from pools.instances import GpuSlot

_Told = TypeVar("_Told")
RENEW_PERIOD_S = 5.0  # leases last 30 s unless an agent is told otherwise


class NodeGpus(Protocol):
    """The GPUs of one node; ``energy.adapters.agent_client.AgentClient`` is one."""

    def gpus(self) -> Sequence[Gpu]:
        """All that may be used. Raises ``GpuError``."""

    def readings(self) -> Sequence[GpuReading]:
        """What all of them read now. Raises ``GpuError``."""

    def renew(self) -> tuple[int, ...]:
        """Keep the locks that were set; returns the GPUs whose lock is lost. Raises ``GpuError``."""

    def close(self) -> None:
        """Let go of whatever is open."""


class GpuClocks:
    """Clocks by node name; use it within one event loop, and ``close`` it."""

    def __init__(self, nodes: Mapping[str, NodeGpus]) -> None:
        self._nodes = dict(nodes)
        self._turns = {node: asyncio.Lock() for node in nodes}
        self._wanted_mhz: dict[GpuSlot, int] = {}
        self._boards: dict[GpuSlot, Gpu] = {}
        self._renewing: asyncio.Task[None] | None = None

    def reaches(self, node: str) -> bool:
        """Whether clocks of this node can be set at all."""
        return node in self._nodes

    async def lock(self, gpus: Sequence[GpuSlot], sm_clock_mhz: int) -> int:
        """Lock these GPUs of one node at the supported clock nearest to this; returns it. Raises ``DriverError``."""
        clock_mhz = await self.snapped(gpus, sm_clock_mhz)
        await self._on_node(gpus, lambda board: board.lock_sm_clocks(ClockLock(clock_mhz, clock_mhz)))
        self._wanted_mhz.update(dict.fromkeys(gpus, clock_mhz))
        if self._renewing is None:
            self._renewing = asyncio.get_running_loop().create_task(self._renew())
        return clock_mhz

    async def snapped(self, gpus: Sequence[GpuSlot], sm_clock_mhz: int) -> int:
        """The clock that ``lock`` would set. Raises ``DriverError``."""
        return snap(sm_clock_mhz, await self._supported(gpus))

    async def lowest(self, gpus: Sequence[GpuSlot]) -> int:
        """The lowest clock these GPUs can be locked to, in MHz. Raises ``DriverError`` if nobody knows it."""
        supported = await self._supported(gpus)
        if not supported:
            raise DriverError(f"the agent of node {gpus[0].node} does not tell its GPUs' clocks")
        return supported[0]

    async def locked(self, gpus: Sequence[GpuSlot]) -> int | None:
        """The clock these GPUs are locked at now, by whomever; None if one is not. Raises ``DriverError``."""
        locks = await self._on_node(gpus, lambda board: board.locked_sm_clocks_mhz())
        return min(lock.high_mhz for lock in locks if lock) if all(locks) else None

    async def reset(self, gpus: Sequence[GpuSlot]) -> None:
        """Take the locks off these GPUs; a node that cannot be reached keeps them until their leases lapse."""
        for gpu in gpus:
            self._wanted_mhz.pop(gpu, None)
        if gpus and self.reaches(gpus[0].node):
            with contextlib.suppress(DriverError):
                await self._on_node(gpus, lambda board: board.reset_sm_clocks())

    @property
    def nodes(self) -> frozenset[str]:
        """The nodes it reaches."""
        return frozenset(self._nodes)

    async def read(self) -> list[GpuReading]:
        """What every GPU reads; those of a node that does not answer are left out. Raises ``OSError`` if none does."""
        pages = await asyncio.gather(*(self._read(node) for node in self._nodes), return_exceptions=True)
        errors = [page for page in pages if isinstance(page, BaseException)]
        if others := [error for error in errors if not isinstance(error, GpuError)]:
            raise others[0]
        if errors and len(errors) == len(pages):
            raise OSError(str(errors[0])) from errors[0]
        return [reading for page in pages if not isinstance(page, BaseException) for reading in page]

    async def _read(self, node: str) -> list[GpuReading]:
        async with self._turns[node]:
            readings = await asyncio.to_thread(self._nodes[node].readings)
        return [replace(reading, node=node) for reading in readings]  # an agent may know its host by another name

    async def close(self, reset: bool = True) -> None:
        """Take every lock off (or leave them until their leases lapse) and let go of the nodes."""
        if self._renewing is not None:
            self._renewing.cancel()
        for node in self._nodes if reset else ():
            await self.reset([gpu for gpu in self._wanted_mhz if gpu.node == node])
        for gpus in self._nodes.values():
            gpus.close()

    async def _supported(self, gpus: Sequence[GpuSlot]) -> Sequence[int]:
        return (await self._on_node(gpus[:1], lambda board: board.supported_sm_clocks_mhz()))[0]

    async def _on_node(self, gpus: Sequence[GpuSlot], act: Callable[[Gpu], _Told]) -> list[_Told]:
        node = gpus[0].node
        if node not in self._nodes:
            raise DriverError(f"nobody sets clocks on node {node}; name its agent in driver.agents.{node}")
        async with self._turns[node]:
            try:
                return await asyncio.to_thread(lambda: [act(self._board(gpu)) for gpu in gpus])
            except GpuError as error:
                raise DriverError(f"node {node}: {error}") from None

    def _board(self, gpu: GpuSlot) -> Gpu:
        if gpu not in self._boards:
            self._boards.update({GpuSlot(gpu.node, board.index): board for board in self._nodes[gpu.node].gpus()})
        try:
            return self._boards[gpu]
        except KeyError:
            raise DriverError(f"there is no GPU {gpu.index} on node {gpu.node!r}") from None

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(RENEW_PERIOD_S)
            for node, gpus in self._nodes.items():
                with contextlib.suppress(GpuError, DriverError):  # tried again before the leases lapse
                    async with self._turns[node]:
                        lost = await asyncio.to_thread(gpus.renew)
                    for gpu in (GpuSlot(node, index) for index in lost):
                        if gpu in self._wanted_mhz:
                            await self.lock([gpu], self._wanted_mhz[gpu])
