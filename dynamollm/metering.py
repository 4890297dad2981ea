"""Metering: reads every GPU's meter once a second and has the ledger book what they drew.

The asyncio side of accounting, beside the runner and never on a request's path. ``held_gpus`` says which instance each
GPU belongs to, in the ledger's terms.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from dynamollm.deployment import Deployment
from energy.accounting import MeteredInstance, Use
from energy.accounting_ledger import SETTLE_S, EnergyLedger
from energy.accounting_meter import Counters, MeterReader, Slot
from energy.gpu import GpuReading
from energy.profile import EnergyProfile, GpuState, StepCoefficients
from pools.instances import Instance, InstanceState

log = logging.getLogger("dynamollm.metering")

PERIOD_S = 1.0  # parts sum to the meter within 0.3 % over any minute; within 2 % at 5 s
CHANGING = frozenset({InstanceState.STARTING, InstanceState.DRAINING})


class GpuMeter(Protocol):
    """Reads GPUs, near or far."""

    async def read(self) -> Sequence[GpuReading]:
        """What every GPU reads now, as far as it can be had."""

    async def close(self) -> None:
        """Let go of connections."""


class DriverMeter:
    """A driver's own view of its GPUs, whose connections are the driver's to close."""

    def __init__(self, read: Callable[[], Awaitable[Sequence[GpuReading]]]) -> None:
        self._read = read

    async def read(self) -> Sequence[GpuReading]:
        """See ``GpuMeter``. Raises ``OSError`` where nothing can be read."""
        return await self._read()

    async def close(self) -> None:
        """Nothing of its own."""


class Metering:
    """``run`` it as a task.

    ``power_w`` is what each instance drew lately, ``readings`` what every GPU read last, for whoever watches.
    """

    def __init__(
        self,
        meter: GpuMeter,
        ledger: EnergyLedger,
        held: Callable[[], Mapping[Slot, MeteredInstance]],
        clock: Callable[[], float],
        heard_s: Callable[[float], float] = lambda now_s: now_s,
    ) -> None:
        """``heard_s``: up to when what requests did is known to the ledger; energy is booked no later than that."""
        self._heard_s = heard_s
        self._meter = meter
        self._ledger = ledger
        self._held = held
        self._clock = clock
        self._reader = MeterReader()
        self._read: deque[tuple[float, Counters]] = deque()  # since the last that is settled
        self._power_w: dict[str, float] = {}
        self._readings: tuple[GpuReading, ...] = ()
        self.drawn_j = 0.0  # by all GPUs, since the first reading

    def readings(self) -> tuple[GpuReading, ...]:
        """The last reading of every GPU, with the instance that holds it."""
        held = self._held()
        return tuple(
            replace(r, instance_id=owner.id if (owner := held.get((r.node, r.index))) and owner.pool else "")
            for r in self._readings
        )

    def power_w(self) -> Mapping[str, float]:
        """Mean power of each instance, all its GPUs, between the last two readings."""
        return self._power_w

    async def run(self) -> None:
        """Read and book until cancelled; then the meter is closed."""
        try:
            while True:
                await self.once()
                await asyncio.sleep(PERIOD_S)
        finally:
            await self._meter.close()

    async def once(self) -> None:
        """Read once. A failure of the meter is said, and made up for by the next reading."""
        try:
            readings = await self._meter.read()
        except OSError as error:
            log.warning("the GPUs cannot be read: %s", error)
            return
        self._readings = tuple(readings)
        now_s = self._clock()
        power_w: dict[str, float] = {}
        for interval in self._reader.read(readings, self._held(), now_s):
            self._ledger.metered(interval)
            self.drawn_j += interval.energy_j
            drawn_w = interval.energy_j / (interval.end_s - interval.begin_s)
            power_w[interval.instance.id] = power_w.get(interval.instance.id, 0.0) + drawn_w
        self._power_w = power_w
        heard_s = self._heard_s(now_s)
        for _ in self._ledger.settling(heard_s):
            await asyncio.sleep(0)  # requests first
        self._read.append((now_s, self._reader.counters()))
        while len(self._read) > 1 and self._read[1][0] <= heard_s - SETTLE_S:
            self._read.popleft()

    def settled_counters(self) -> Counters:
        """Every counter as of the last reading that is wholly in the ledger: another may go on from there."""
        return self._read[0][1] if self._read else {}

    def resume(self, counters: Counters) -> None:
        """Go on from another's settled counters, so that no joule between is lost."""
        self._reader.resume(counters)


class HeldGpus:
    """Which instance every GPU of a deployment belongs to now; those of no instance are idle on their own."""

    def __init__(self, deployment: Deployment) -> None:
        self._deployment = deployment
        self._steps: dict[tuple[str, str, int, int], StepCoefficients] = {}
        self._unheld = {
            (name, index): MeteredInstance(name, "", "", node.gpu, node.gpus, Use.IDLE, 0.0)
            for node in deployment.settings.nodes
            for name in node.names()
            for index in range(node.gpus)
        }

    def __call__(self) -> dict[Slot, MeteredInstance]:
        """By node and index."""
        held = dict(self._unheld)
        for instance in self._deployment.instances.values():
            metered = self._metered(instance)
            held |= {(gpu.node, gpu.index): metered for gpu in instance.gpus}
        return held

    def _metered(self, instance: Instance) -> MeteredInstance:
        profile = self._deployment.profiles[instance.shape.model]
        state = GpuState.PARKED if instance.state is InstanceState.PARKED else GpuState.LOADED
        return MeteredInstance(
            id=instance.id,
            pool=instance.pool,
            model=instance.shape.model,
            gpu=instance.shape.gpu,
            gpus=instance.shape.tp,
            use=Use.TRANSITION if instance.state in CHANGING else Use.IDLE,
            idle_w=profile.idle_power_w(state, instance.sm_clock_mhz),
            coefficients=self._step(profile, instance),
        )

    def _step(self, profile: EnergyProfile, instance: Instance) -> StepCoefficients:
        key = profile.name, instance.shape.model, instance.shape.tp, instance.sm_clock_mhz
        if key not in self._steps:
            self._steps[key] = profile.step(instance.shape.tp, instance.sm_clock_mhz)
        return self._steps[key]
