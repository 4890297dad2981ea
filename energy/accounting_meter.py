"""MeterReader: energy counters of GPUs, read now and then, as intervals of the instances that hold them. Pure.

A counter that runs backwards was reset (the driver was loaded again): it counts from 0. A GPU without a counter (MIG)
is integrated from its power. A GPU not seen before has no interval yet.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from energy.accounting import Interval, MeteredInstance
from energy.gpu import GpuReading

Slot = tuple[str, int]  # node and index


@dataclass(slots=True)
class _Last:
    """The reading before."""

    at_s: float
    energy_j: float | None
    power_w: float | None


Counters = dict[Slot, tuple[float, float]]  # when it was read, and the joules it showed


class MeterReader:
    """The last reading of every GPU."""

    def __init__(self) -> None:
        self._last: dict[Slot, _Last] = {}

    def counters(self) -> Counters:
        """Every energy counter as last read, for another reader to go on from."""
        return {slot: (last.at_s, last.energy_j) for slot, last in self._last.items() if last.energy_j is not None}

    def resume(self, counters: Counters) -> None:
        """Go on from where another reader was; what was drawn since is in the first reading."""
        self._last = {slot: _Last(at_s, energy_j, None) for slot, (at_s, energy_j) in counters.items()}

    def read(
        self, readings: Iterable[GpuReading], held: Mapping[Slot, MeteredInstance], now_s: float
    ) -> list[Interval]:
        """What each instance's GPUs drew since they were read before; those in no entry of ``held`` are left out.

        GPUs of one instance that were read at different times make intervals of their own.
        """
        drawn_j: dict[tuple[str, float], float] = {}
        count: dict[tuple[str, float], int] = {}
        instances: dict[str, MeteredInstance] = {}
        for reading in readings:
            slot = (reading.node, reading.index)
            before, self._last[slot] = self._last.get(slot), _Last(now_s, reading.energy_j, reading.power_w)
            instance = held.get(slot)
            if before is None or instance is None or now_s <= before.at_s:
                continue
            energy_j = _drawn_j(before, reading, now_s)
            if energy_j is not None:
                key = (instance.id, before.at_s)
                instances[instance.id] = instance
                drawn_j[key] = drawn_j.get(key, 0.0) + energy_j
                count[key] = count.get(key, 0) + 1
        return [
            Interval(_of_gpus(instances[key[0]], count[key]), key[1], now_s, energy_j)
            for key, energy_j in drawn_j.items()
        ]


def _of_gpus(instance: MeteredInstance, gpus: int) -> MeteredInstance:
    """The instance as far as it was metered."""
    return instance if gpus == instance.gpus else replace(instance, gpus=gpus)


def _drawn_j(before: _Last, reading: GpuReading, now_s: float) -> float | None:
    if reading.energy_j is not None and before.energy_j is not None:
        drawn_j = reading.energy_j - before.energy_j
        return drawn_j if drawn_j >= 0.0 else reading.energy_j
    if reading.power_w is None:
        return None
    power_w = reading.power_w if before.power_w is None else 0.5 * (reading.power_w + before.power_w)
    return power_w * (now_s - before.at_s)
