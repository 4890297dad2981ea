"""The node agent as a Ray actor, and its GPUs as the driver sees them.

One detached actor a node, with the leases of ``energy.agent``: a driver that falls silent loses its locks, whoever
restarts the actor resets what it left locked. It reserves nothing: GPUs are the instances'. Clocks are set by whoever
runs Ray's processes, who must be allowed to (root or CAP_SYS_ADMIN); else use ``dynamollm agent`` and name it in
``driver.vllm.agents``.
"""

import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from energy.adapters.agent_journal import FileJournal
from energy.adapters.nvml import Nvml
from energy.agent import NodeAgent
from energy.gpu import ClockEvent, ClockLock, Gpu, GpuAgentError, GpuError, GpuReading
from energy.leases import LeaseTable

CALL_TIMEOUT_S = 30.0
FIRST_CALL_TIMEOUT_S = 120.0  # waits for the actor's process, on a node that may start many at once
TICKS_A_TTL = 4


@dataclass(frozen=True, slots=True)
class AgentSetup:
    """How one node's agent is made, on that node. Picklable."""

    node: str
    gpus: Callable[[], Sequence[Gpu]]
    journal: Path
    ttl_s: float = 30.0


def nvml_gpus() -> Sequence[Gpu]:
    """All the GPUs of the machine this runs on. Raises ``GpuError``."""
    nvml = Nvml()
    nvml.__enter__()  # open for as long as the actor lives
    return nvml.gpus(None)


@dataclass(frozen=True, slots=True)
class Board:
    """One GPU as its agent describes it."""

    index: int
    uuid: str
    name: str
    supported_sm_clocks_mhz: tuple[int, ...]


class AgentActor:
    """Runs in a Ray worker on the node; a thread of its own lets leases run out. Calls take milliseconds."""

    def __init__(self, setup: AgentSetup) -> None:
        self._gpus = tuple(setup.gpus())
        leases = LeaseTable(setup.ttl_s, dwell_s=0.0)  # one driver asks, and it writes on change only
        self._agent = NodeAgent(setup.node, self._gpus, FileJournal(setup.journal), leases)
        self._agent.restore_orphans(time.monotonic())
        self._turn = threading.Lock()
        self._tick_s = min(1.0, setup.ttl_s / TICKS_A_TTL)
        threading.Thread(target=self._tick, daemon=True, name="leases").start()

    def _tick(self) -> None:
        try:
            while True:
                time.sleep(self._tick_s)
                with self._turn:
                    self._agent.tick(time.monotonic())
        finally:
            os._exit(1)  # leases would never run out again: Ray starts it anew, and it resets what it finds locked

    def boards(self) -> tuple[Board, ...]:
        """Every GPU. Raises ``GpuError``."""
        return tuple(Board(gpu.index, gpu.uuid, gpu.name, gpu.supported_sm_clocks_mhz()) for gpu in self._gpus)

    def lock(self, index: int, lock: ClockLock, holder: str) -> None:
        """Lock one GPU's clocks on a lease. Raises ``GpuError``."""
        with self._turn:
            self._agent.lock((index,), lock, holder, time.monotonic())

    def reset(self, index: int) -> None:
        """Take the lock off. Raises ``GpuError``."""
        with self._turn:
            self._agent.reset((index,), time.monotonic())

    def renew(self, indices: Sequence[int], holder: str) -> tuple[int, ...]:
        """Begin leases anew; returns the GPUs the holder still holds."""
        with self._turn:
            return tuple(self._agent.renew(indices, holder, time.monotonic()))

    def locked(self, index: int) -> ClockLock | None:
        """The lock in force."""
        with self._turn:
            held = self._agent.lease(index)
        return held.lock if held else None

    def readings(self) -> list[GpuReading]:
        """What every GPU reads."""
        with self._turn:
            return self._agent.readings()


class ActorNode:
    """``pools.drivers.vllm_clocks.NodeGpus`` over a node's agent actor; blocking, for threads."""

    def __init__(self, node: str, agent: Callable[[], Any], holder: str) -> None:
        """``agent`` finds the actor's handle, or raises ``GpuAgentError`` where its node is gone."""
        self.node = node
        self.holder = holder
        self._agent = agent
        self._locked: set[int] = set()

    def gpus(self) -> Sequence[Gpu]:
        """All of them. Raises ``GpuError``."""
        boards: tuple[Board, ...] = self.ask("boards", timeout_s=FIRST_CALL_TIMEOUT_S)
        return [ActorGpu(self, board) for board in boards]

    def readings(self) -> Sequence[GpuReading]:
        """What all of them read now. Raises ``GpuError``."""
        readings: list[GpuReading] = self.ask("readings")
        return readings

    def renew(self) -> tuple[int, ...]:
        """Keep the locks set here; returns those lost. Raises ``GpuError``."""
        if not self._locked:
            return ()
        held: tuple[int, ...] = self.ask("renew", sorted(self._locked), self.holder)
        lost = self._locked - set(held)
        self._locked -= lost
        return tuple(sorted(lost))

    def close(self) -> None:
        """Nothing is open; locks stay until their leases run out."""

    def lock(self, index: int, lock: ClockLock) -> None:
        """Lock one GPU. Raises ``GpuError``."""
        self.ask("lock", index, lock, self.holder)
        self._locked.add(index)

    def reset(self, index: int) -> None:
        """Take its lock off. Raises ``GpuError``."""
        self._locked.discard(index)
        self.ask("reset", index)

    def ask(self, method: str, *arguments: object, timeout_s: float = CALL_TIMEOUT_S) -> Any:
        """Call the actor. Raises the ``GpuError`` it raised, ``GpuAgentError`` where it does not answer."""
        try:
            return ray.get(getattr(self._agent(), method).remote(*arguments), timeout=timeout_s)
        except RayTaskError as error:
            raise (error.cause if isinstance(error.cause, GpuError) else GpuAgentError(str(error))) from None
        except RayError as error:
            raise GpuAgentError(f"the agent actor of node {self.node} does not answer: {error}") from None


class ActorGpu:
    """One GPU of a node. See ``energy.gpu.Gpu``."""

    def __init__(self, node: ActorNode, board: Board) -> None:
        self.index = board.index
        self.uuid = board.uuid
        self.name = board.name
        self._node = node
        self._board = board

    def supported_sm_clocks_mhz(self) -> tuple[int, ...]:
        """As its agent told."""
        return self._board.supported_sm_clocks_mhz

    def lock_sm_clocks(self, lock: ClockLock) -> None:
        """Lock it, on a lease."""
        self._node.lock(self.index, lock)

    def reset_sm_clocks(self) -> None:
        """Take the lock off."""
        self._node.reset(self.index)

    def locked_sm_clocks_mhz(self) -> ClockLock | None:
        """The lock its agent holds."""
        lock: ClockLock | None = self._node.ask("locked", self.index)
        return lock

    def sm_clock_mhz(self) -> int:
        """SM clock now."""
        return int(self._reading("sm_clock_mhz"))

    def power_w(self) -> float:
        """Power draw."""
        return float(self._reading("power_w"))

    def energy_j(self) -> float:
        """Energy counter."""
        return float(self._reading("energy_j"))

    def temperature_c(self) -> float:
        """Temperature of the die."""
        return float(self._reading("temperature_c"))

    def clock_events(self) -> ClockEvent:
        """Why it is slow."""
        return ClockEvent(self._reading("clock_events") or ClockEvent.NONE)

    def _reading(self, what: str) -> Any:
        for reading in self._node.readings():
            if reading.index == self.index and getattr(reading, what) is not None:
                return getattr(reading, what)
        raise GpuAgentError(f"node {self._node.node}: GPU {self.index} has no {what}, or is lost")
