"""Instance: one vLLM server holding one copy of a model on ``tp`` GPUs at one SM clock. Values only."""

from dataclasses import dataclass
from enum import Enum


@dataclass(frozen=True, slots=True, order=True)
class InstanceShape:
    """What an instance is made of; changing it means another process."""

    model: str
    gpu: str
    tp: int


class InstanceState(Enum):
    """Where an instance is in its life. Only READY instances are given requests."""

    STARTING = "starting"  # process up, weights loading
    READY = "ready"
    DRAINING = "draining"  # finishes what it has, is given nothing
    PARKED = "parked"  # asleep, SM clock low; wakes in seconds
    FAILED = "failed"  # crashed or ejected
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class GpuSlot:
    """One GPU of one node."""

    node: str
    index: int


@dataclass(frozen=True, slots=True)
class Instance:
    """An instance as the control plane sees it."""

    id: str
    pool: str
    shape: InstanceShape
    url: str
    state: InstanceState
    sm_clock_mhz: int
    gpus: tuple[GpuSlot, ...] = ()
