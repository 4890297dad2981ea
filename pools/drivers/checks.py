"""Whether an instance can be started, by its id, GPUs and model: what every driver that starts engines checks. Pure."""

from collections.abc import Iterable, Mapping
from typing import TypeVar

from pools.drivers.port import DriverError, GpuBusyError, InstanceSpec, StartRefusedError, UnknownGpuError

_Model = TypeVar("_Model")


def check_room(spec: InstanceSpec, others: Iterable[InstanceSpec], nodes: Mapping[str, int]) -> None:
    """Check that nobody among ``others`` has its id or GPUs, and that ``nodes`` (GPUs by name) have those.

    Raises ``DriverError`` if the id is taken, ``UnknownGpuError``, ``GpuBusyError``.
    """
    held = {}
    for other in others:
        if other.id == spec.id:
            raise DriverError(f"instance {spec.id} runs already")
        held.update(dict.fromkeys(other.gpus, other.id))
    for gpu in spec.gpus:
        if gpu.index not in range(nodes.get(gpu.node, 0)):
            raise UnknownGpuError(f"instance {spec.id}: there is no GPU {gpu.index} on node {gpu.node!r}")
        if gpu in held:
            raise GpuBusyError(f"instance {spec.id}: GPU {gpu.index} of {gpu.node} is held by {held[gpu]}")


def model_of(spec: InstanceSpec, models: Mapping[str, _Model]) -> _Model:
    """Its model, of those the driver can start. Raises ``StartRefusedError`` naming them."""
    model = models.get(spec.shape.model)
    if model is None:
        raise StartRefusedError(f"instance {spec.id}: no model {spec.shape.model!r}; known: {', '.join(models)}")
    return model
