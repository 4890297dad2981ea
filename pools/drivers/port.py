"""InstanceDriver: the contract between the control plane and whatever runs the engines.

A driver starts a process that speaks vLLM's HTTP API, says what becomes of it, and sets its clock. It decides nothing:
where an instance goes, how many there are and how fast they run is the plan's business. Every call is idempotent where
repeating it can mean the same: stopping what is gone, parking what is parked, setting the clock it already has.

Errors::

    DriverError
    +-- GpuBusyError          another engine holds a GPU (as vLLM's free-memory check refuses it)
    +-- UnknownGpuError       no such node or GPU index
    +-- UnknownInstanceError  no instance of that id
    +-- StartRefusedError     the specification cannot be started here; the message says what to change

Contract tests: tests/pools/drivers run one suite on every driver, the in-memory one first.
"""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from energy.gpu import GpuReading
from pools.instances import GpuSlot, Instance, InstanceShape, InstanceState


@dataclass(frozen=True, slots=True)
class InstanceSpec:
    """What to start. ``gpus`` are ``shape.tp`` slots of one node; the id is the caller's and unique for ever."""

    id: str
    pool: str
    shape: InstanceShape
    gpus: tuple[GpuSlot, ...]
    sm_clock_mhz: int

    def __post_init__(self) -> None:
        if len(self.gpus) != self.shape.tp:
            raise ValueError(f"instance {self.id}: tp {self.shape.tp} needs {self.shape.tp} GPUs, not {len(self.gpus)}")
        if len({gpu.node for gpu in self.gpus}) != 1 or len(set(self.gpus)) != len(self.gpus):
            raise ValueError(f"instance {self.id}: its GPUs must be different ones of a single node: {self.gpus}")


@dataclass(frozen=True, slots=True)
class InstanceEvent:
    """An instance came into a state; ``reason`` says why where that is not plain (crash, refused start).

    ``found``: the instance, where nobody asked for it: somebody else started it, and the driver came upon it.
    ``withdrawn``: it is DRAINING because somebody else takes it away: ``stop`` it when its requests have ended.
    """

    instance_id: str
    state: InstanceState
    reason: str = ""
    found: Instance | None = None
    withdrawn: bool = False


class DriverError(Exception):
    """A driver could not do what it was asked; the message names the instance and the fix."""


class GpuBusyError(DriverError):
    """Another engine holds one of the GPUs; stop it first or choose others."""


class UnknownGpuError(DriverError):
    """There is no such node or GPU index."""


class UnknownInstanceError(DriverError):
    """There is no instance of that id; it was never started, or has been stopped."""


class StartRefusedError(DriverError):
    """That (model, GPU, TP, clock) cannot be started here."""


class InstanceDriver(Protocol):
    """Starts, stops and clocks instances."""

    async def start(self, spec: InstanceSpec) -> Instance:
        """Begin to start an instance and return it, STARTING, with its URL; a READY event follows.

        Raises ``GpuBusyError``, ``UnknownGpuError``, ``StartRefusedError``; ``DriverError`` if the id is taken.
        """

    async def stop(self, instance_id: str, grace_s: float) -> None:
        """Take no new request, let running ones finish for at most ``grace_s``, end it; returns when its GPUs are free.

        Stopping what is gone (or was never there) does nothing.
        """

    async def list(self) -> tuple[Instance, ...]:
        """Every instance that holds GPUs, by id, in its present state and clock.

        Of a driver whose engines outlive it, those that run since an earlier one are among them from the first call on.
        """

    def lost_nodes(self) -> frozenset[str]:
        """Nodes whose GPUs cannot be had now: gone, cordoned, not there yet. As last seen; never waits."""

    async def set_sm_clock(self, instance_id: str, sm_clock_mhz: int) -> int:
        """Lock the SM clock of its GPUs; returns the clock in force (snapped to a supported one), in MHz.

        Holds from the engine's next step on. Raises ``UnknownInstanceError``.
        """

    async def park(self, instance_id: str) -> None:
        """Put the engine to sleep and its GPUs at their lowest clock. Raises ``UnknownInstanceError``."""

    async def wake(self, instance_id: str) -> None:
        """Undo ``park``: back to READY and to the clock it had. Raises ``UnknownInstanceError``."""

    def events(self) -> AsyncIterator[InstanceEvent]:
        """Every change of state from now on, in order; ends when the driver is closed. Any number may listen."""

    async def close(self) -> None:
        """Stop every instance at once and end every process that was started.

        A driver whose engines outlive it by intent lets go of them instead, and says so where it is configured.
        """


@runtime_checkable
class MeteredDriver(Protocol):
    """A driver that reaches the meters of its GPUs."""

    @property
    def metered_nodes(self) -> frozenset[str]:
        """The nodes whose GPUs can be read."""

    async def read_gpus(self) -> Sequence[GpuReading]:
        """What every GPU reads now, by node and slot. Raises ``OSError`` if none can be read."""
