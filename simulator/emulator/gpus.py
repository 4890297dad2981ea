"""Emulated GPUs: nodes of boards with SM clocks, power and an energy counter, given ``now_s``.

An engine's GPUs work in lock-step, so they share one ``PowerMeter`` while it holds them, and run at the slowest clock
among them. A GPU is held by one engine at a time. Never reads a clock and never touches a device.
"""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from energy.gpus import GpuPhysics
from energy.profile import GpuState

POWER_WINDOW_S = 0.5  # DCGM's power is a mean over about a second, not an instant
IDLE_AFTER_S = 1.0


class GpuError(Exception):
    """A GPU cannot be used as asked; the message names it."""


class GpuHeldError(GpuError):
    """Another engine holds the GPU, as vLLM's free-memory check would find."""


class NoSuchGpuError(GpuError):
    """There is no GPU of that index, or its node is powered off."""


class PowerMeter:
    """Integrates the power of one GPU: idle, with busy steps in between. Watts, joules, seconds."""

    __slots__ = ("_anchor_s", "_busy_until_s", "_busy_w", "_energy_j", "_idle_w", "_window", "_window_next")

    def __init__(self, now_s: float, idle_w: float) -> None:
        self._anchor_s = now_s  # energy is settled up to here
        self._energy_j = 0.0
        self._busy_w = 0.0
        self._busy_until_s = now_s
        self._idle_w = idle_w
        self._window = (now_s, 0.0)
        self._window_next = (now_s, 0.0)

    def step(self, start_s: float, duration_s: float, power_w: float) -> None:
        """A step draws ``power_w`` from ``start_s`` on for ``duration_s``; idle power follows."""
        if start_s - self._busy_until_s > IDLE_AFTER_S:
            self._window = self._window_next = (start_s, self.energy_j(start_s))
        self._settle(start_s)
        if start_s - self._window_next[0] >= POWER_WINDOW_S:
            self._window, self._window_next = self._window_next, (start_s, self._energy_j)
        self._busy_w = power_w
        self._busy_until_s = start_s + duration_s

    def set_idle(self, now_s: float, idle_w: float) -> None:
        """Idle power from now on; a step under way goes on."""
        self._settle(now_s)
        self._idle_w = idle_w

    def cut(self, now_s: float) -> None:
        """The step under way ends now (the engine died)."""
        self._settle(now_s)
        self._busy_until_s = min(self._busy_until_s, now_s)

    def _settle(self, now_s: float) -> None:
        self._energy_j = self.energy_j(now_s)
        self._anchor_s = max(self._anchor_s, now_s)

    def energy_j(self, now_s: float) -> float:
        """Energy drawn since the meter began."""
        busy_s = max(0.0, min(now_s, self._busy_until_s) - self._anchor_s)
        idle_s = max(0.0, now_s - max(self._anchor_s, self._busy_until_s))
        return self._energy_j + self._busy_w * busy_s + self._idle_w * idle_s

    def power_w(self, now_s: float) -> float:
        """Mean power over about the last second."""
        if now_s - self._busy_until_s > IDLE_AFTER_S:
            return self._idle_w
        start_s, energy_j = self._window
        if now_s - start_s < 1e-3:
            return self._busy_w if now_s < self._busy_until_s else self._idle_w
        return (self.energy_j(now_s) - energy_j) / (now_s - start_s)


class GpuHolder(Protocol):
    """The engine on a GPU, as far as the GPU knows it."""

    @property
    def id(self) -> str:
        """Name of the instance."""

    def on_clock_change(self) -> None:
        """One of its GPUs runs at another clock now."""


class EmulatedGpu:
    """One board: who holds it, its clock, its energy."""

    def __init__(self, node: str, index: int, physics: GpuPhysics, now_s: float) -> None:
        self.node = node
        self.index = index
        self.physics = physics
        self.uuid = f"GPU-{uuid.uuid5(uuid.NAMESPACE_OID, f'{node}/{index}')}"
        self.holder: GpuHolder | None = None
        self.locked_mhz: int | None = None
        self._powered = True
        self._settled_j = 0.0  # by earlier meters
        self._meter = PowerMeter(now_s, physics.bare_w)
        self._meter_from_j = 0.0
        self._counter_mj = 0

    @property
    def sm_clock_mhz(self) -> int:
        """Clock it runs at when it works: the lock, or else its maximum."""
        return self.physics.max_clock_mhz if self.locked_mhz is None else self.locked_mhz

    @property
    def powered(self) -> bool:
        """Whether its node is on."""
        return self._powered

    def snap(self, sm_clock_mhz: float) -> int:
        """The supported clock nearest to this one."""
        return self.physics.supported(sm_clock_mhz)

    def lock(self, sm_clock_mhz: float | None) -> int:
        """Lock the SM clock (None: reset the lock); returns the clock in force."""
        self.locked_mhz = None if sm_clock_mhz is None else self.snap(sm_clock_mhz)
        if self.holder is not None:
            self.holder.on_clock_change()
        return self.sm_clock_mhz

    def attach(self, holder: GpuHolder, meter: PowerMeter, now_s: float) -> None:
        """An engine takes the GPU; its draw is what ``meter`` says from now on. The caller checked it is free."""
        self._follow(meter, now_s)
        self.holder = holder

    def detach(self, now_s: float) -> None:
        """The engine is gone: bare, its lock stays (a lock outlives the process that set it)."""
        self.holder = None
        self._follow(PowerMeter(now_s, self.physics.bare_w), now_s)

    def set_power(self, on: bool, now_s: float) -> None:
        """Power the board on or off (with its node)."""
        self._powered = on
        state = GpuState.BARE if on else GpuState.OFF
        self._follow(PowerMeter(now_s, self.physics.state_w(state, self.sm_clock_mhz)), now_s)

    def _follow(self, meter: PowerMeter, now_s: float) -> None:
        self._settled_j += self._meter.energy_j(now_s) - self._meter_from_j
        self._meter = meter
        self._meter_from_j = meter.energy_j(now_s)

    def energy_mj(self, now_s: float) -> int:
        """Millijoules since the emulator started; never decreases."""
        energy_j = self._settled_j + self._meter.energy_j(now_s) - self._meter_from_j
        self._counter_mj = max(self._counter_mj, int(energy_j * 1000.0))
        return self._counter_mj

    def power_w(self, now_s: float) -> float:
        """Mean power over about the last second."""
        return self._meter.power_w(now_s)


@dataclass(slots=True)
class EmulatedNode:
    """One machine: a name and its GPUs."""

    name: str
    gpus: list[EmulatedGpu] = field(default_factory=list)

    def take(self, indices: Sequence[int], holder: GpuHolder, meter: PowerMeter, now_s: float) -> list[EmulatedGpu]:
        """Give these GPUs to an engine, all or none. Raises ``NoSuchGpuError``, ``GpuHeldError``."""
        for index in indices:
            if not 0 <= index < len(self.gpus):
                raise NoSuchGpuError(f"node {self.name} has GPUs 0..{len(self.gpus) - 1}, not {index}")
            gpu = self.gpus[index]
            if not gpu.powered:
                raise NoSuchGpuError(f"node {self.name} is powered off; switch it on first")
            if gpu.holder is not None:
                raise GpuHeldError(
                    f"GPU {index} of node {self.name} has no free memory: instance {gpu.holder.id} holds it"
                )
        taken = [self.gpus[index] for index in indices]
        for gpu in taken:
            gpu.attach(holder, meter, now_s)
        return taken

    def set_power(self, on: bool, now_s: float) -> None:
        """Switch the machine; a node with an engine on it cannot be switched off. Raises ``GpuHeldError``."""
        held = [gpu for gpu in self.gpus if gpu.holder is not None]
        if held and not on:
            raise GpuHeldError(f"node {self.name} runs instances; stop them before switching it off")
        for gpu in self.gpus:
            if gpu.powered is not on:
                gpu.set_power(on, now_s)


def make_node(name: str, count: int, physics: GpuPhysics, now_s: float) -> EmulatedNode:
    """A node of ``count`` like boards, powered and bare."""
    return EmulatedNode(name, [EmulatedGpu(name, index, physics, now_s) for index in range(count)])
