"""EmulatedDevice: the boards of one engine, its steps' duration and power. What the vLLM worker calls; knows no vLLM.

Configured by the environment, which is what a driver can give the process vLLM makes: ``VARIABLES`` below,
``DYNAMOLLM_NODE`` and ``CUDA_VISIBLE_DEVICES``.
"""

import os
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from energy.adapters.catalogue import load_profile
from energy.gpus import GPUS
from energy.profile import EnergyProfile, GpuState, StepCoefficients, step_power_w, step_time_s
from simulator.vllm_device.adapters.board import BoardFile, Meter, board_path
from simulator.vllm_device.batches import Batch
from simulator.vllm_device.pacing import Pace

PROFILE = "EMULATED_DEVICE_PROFILE"  # a shipped EnergyProfile's name, or a path
BOARDS = "EMULATED_DEVICE_BOARDS"  # folder of the nodes' boards
VARIABLES = (PROFILE, BOARDS)
CLOCK_POLL_S = 0.1  # an idle board's power follows its clock this late


class EmulatedDevice:
    """Use it from the engine's thread; a thread of its own follows the clock while the engine is idle."""

    def __init__(self, profile: EnergyProfile, boards: list[BoardFile]) -> None:
        self.profile = profile
        self.tp = len(boards)
        self._boards = boards
        self._pace = Pace()
        self._turn = threading.Lock()
        self._state = GpuState.LOADED
        self._steps: dict[int, StepCoefficients] = {}
        self._max_mhz = GPUS[profile.gpu].max_clock_mhz
        self._clock_mhz = 0
        self._follow_clock()
        threading.Thread(target=self._poll_clock, daemon=True, name="emulated-clock").start()

    @classmethod
    def of_environment(cls, environ: Mapping[str, str] = os.environ) -> "EmulatedDevice":
        """The device a driver has set up. Raises ``KeyError`` for what is not set, ``ProfileError``, ``OSError``."""
        folder, node = Path(environ[BOARDS]), environ["DYNAMOLLM_NODE"]
        indices = [int(index) for index in environ["CUDA_VISIBLE_DEVICES"].split(",")]
        boards = [BoardFile(board_path(folder, node, index)) for index in indices]
        return cls(load_profile(environ[PROFILE]), boards)

    @property
    def kv_capacity_tokens(self) -> int:
        """KV cache beside the weights on the GPUs it stands for."""
        return self.profile.kv_capacity_tokens(self.tp)

    def begin_step(self, batch: Batch) -> float:
        """A step with this batch begins; returns when it is due, on the monotonic clock."""
        now_s = time.monotonic()
        with self._turn:
            self._follow_clock(now_s)
            step = self._coefficients()
            began_s = self._pace.begin(now_s)
            due_s = self._pace.end(began_s, step_time_s(step, *batch))
            power_w = step_power_w(step, *batch)
            for board in self._boards:
                meter = _settled(board.read_meter(), began_s)
                board.write_meter(replace(meter, busy_from_s=began_s, busy_until_s=due_s, busy_w=power_w))
        return due_s

    def end_step(self, due_s: float) -> None:
        """Wait until the step is due."""
        if (left_s := due_s - time.monotonic()) > 0:
            time.sleep(left_s)

    def enter(self, state: GpuState) -> None:
        """The engine sleeps (PARKED) or is awake (LOADED)."""
        with self._turn:
            self._state = state
            self._write_idle(time.monotonic())

    def _poll_clock(self) -> None:
        while True:
            time.sleep(CLOCK_POLL_S)
            with self._turn:
                self._follow_clock(time.monotonic())

    def _follow_clock(self, now_s: float | None = None) -> None:
        """The GPUs of an engine work in lock-step, at the slowest one's clock."""
        locks = [board.lock_mhz for board in self._boards]
        clock_mhz = min(lock[1] if lock else self._max_mhz for lock in locks)
        if clock_mhz != self._clock_mhz:
            self._clock_mhz = clock_mhz
            self._write_idle(time.monotonic() if now_s is None else now_s)

    def _coefficients(self) -> StepCoefficients:
        if self._clock_mhz not in self._steps:
            self._steps[self._clock_mhz] = self.profile.step(self.tp, self._clock_mhz)
        return self._steps[self._clock_mhz]

    def _write_idle(self, now_s: float) -> None:
        idle_w = self.profile.idle_power_w(self._state, self._clock_mhz)
        for board in self._boards:
            meter = _settled(board.read_meter(), now_s)
            board.write_meter(replace(meter, idle_w=idle_w, engine_pid=os.getpid()))


def _settled(meter: Meter, now_s: float) -> Meter:
    at_s = max(now_s, meter.at_s)
    return replace(meter, at_s=at_s, energy_j=meter.energy_at_j(at_s))
