"""GPUs through NVML, by the official ``nvidia-ml-py`` (module pynvml). Milliwatts and millijoules end here.

Every call is timed and told to an observer. NVML's conditions become the named errors of ``energy/gpu.py``. Reading
needs no privilege; locking clocks needs root or CAP_SYS_ADMIN. Not thread-safe: one process, one thread.
"""

import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

import pynvml

from energy.gpu import (
    ClockEvent,
    ClockLock,
    ClockRangeError,
    GpuDriverError,
    GpuError,
    GpuLostError,
    GpuMigError,
    GpuPermissionError,
    GpuUnsupportedError,
    NoSuchGpuError,
)

CallObserver = Callable[[str, float], None]  # what was called, how many seconds it took

_ERRORS: dict[int, tuple[type[GpuError], str]] = {
    pynvml.NVML_ERROR_UNINITIALIZED: (GpuDriverError, "NVML was not initialised"),
    pynvml.NVML_ERROR_LIBRARY_NOT_FOUND: (
        GpuDriverError,
        "libnvidia-ml.so.1 is not installed: install the NVIDIA driver (in a container, use the NVIDIA runtime)",
    ),
    pynvml.NVML_ERROR_DRIVER_NOT_LOADED: (GpuDriverError, "the NVIDIA kernel driver is not loaded (modprobe nvidia)"),
    pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH: (
        GpuDriverError,
        "libnvidia-ml.so.1 is not of the loaded driver's version: restart the machine or reload the driver",
    ),
    pynvml.NVML_ERROR_NO_PERMISSION: (
        GpuPermissionError,
        "not permitted: setting clocks needs root or CAP_SYS_ADMIN (run `dynamollm agent` as root)",
    ),
    pynvml.NVML_ERROR_GPU_IS_LOST: (GpuLostError, "fell off the bus; the node needs a reset or a restart"),
    pynvml.NVML_ERROR_RESET_REQUIRED: (GpuLostError, "must be reset before it can be used again"),
    pynvml.NVML_ERROR_NOT_SUPPORTED: (GpuUnsupportedError, "the board does not support this"),
    pynvml.NVML_ERROR_FUNCTION_NOT_FOUND: (GpuUnsupportedError, "the driver is too old: it has no such function"),
    pynvml.NVML_ERROR_NOT_FOUND: (NoSuchGpuError, "there is no such GPU"),
    pynvml.NVML_ERROR_INVALID_ARGUMENT: (ClockRangeError, "the driver refuses this value"),
}


def _ignore(call: str, seconds: float) -> None:
    """Observe nothing."""


class Nvml:
    """The library, initialised while the context lasts. Raises ``GpuDriverError`` on entering."""

    def __init__(self, observe: CallObserver = _ignore) -> None:
        self._observe = observe

    def __enter__(self) -> Self:
        self.call("NVML", "init", pynvml.nvmlInit)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.call("NVML", "shutdown", pynvml.nvmlShutdown)

    def gpus(self, indices: Sequence[int] | None = None) -> tuple["NvmlGpu", ...]:
        """The GPUs of these indices, or all. Raises ``NoSuchGpuError``, ``GpuLostError``."""
        count = self.call("NVML", "count", pynvml.nvmlDeviceGetCount)
        wanted = tuple(range(count)) if indices is None else tuple(indices)
        if unknown := [index for index in wanted if not 0 <= index < count]:
            raise NoSuchGpuError(f"there is no GPU {unknown[0]}: this node has {count}")
        return tuple(NvmlGpu(self, index) for index in wanted)

    def call(self, what: str, name: str, function: Callable[..., Any], *arguments: object) -> Any:
        """Call the library, timed, its errors named. Raises ``GpuError``."""
        began_s = time.perf_counter()
        try:
            return function(*arguments)
        except pynvml.NVMLError as error:
            kind, text = _ERRORS.get(error.value, (GpuError, str(error)))
            raise kind(f"{what}: {name}: {text}") from None
        finally:
            self._observe(name, time.perf_counter() - began_s)


class NvmlGpu:
    """One board, by its NVML handle."""

    def __init__(self, nvml: Nvml, index: int) -> None:
        self.index = index
        self._nvml = nvml
        self._what = f"GPU {index}"
        self._handle = self._call("handle", pynvml.nvmlDeviceGetHandleByIndex, index)
        self.uuid: str = self._ask("uuid", pynvml.nvmlDeviceGetUUID)
        self.name: str = self._ask("name", pynvml.nvmlDeviceGetName)
        self._supported_mhz: tuple[int, ...] | None = None
        self._lock: ClockLock | None = None

    def supported_sm_clocks_mhz(self) -> tuple[int, ...]:
        """Clocks the board supports at its highest memory clock, ascending; read once."""
        if self._supported_mhz is None:
            memory_mhz = max(self._ask("supported_memory_clocks", pynvml.nvmlDeviceGetSupportedMemoryClocks))
            clocks = self._ask("supported_clocks", pynvml.nvmlDeviceGetSupportedGraphicsClocks, memory_mhz)
            self._supported_mhz = tuple(sorted(clocks))
        return self._supported_mhz

    def lock_sm_clocks(self, lock: ClockLock) -> None:
        """Keep the SM clock within this range; it outlives this process."""
        self._ask("lock_clocks", pynvml.nvmlDeviceSetGpuLockedClocks, lock.low_mhz, lock.high_mhz)
        self._lock = lock

    def reset_sm_clocks(self) -> None:
        """Take any lock off, whoever set it."""
        self._ask("reset_clocks", pynvml.nvmlDeviceResetGpuLockedClocks)
        self._lock = None

    def locked_sm_clocks_mhz(self) -> ClockLock | None:
        """The lock set through this object; NVML does not tell others'."""
        return self._lock

    def sm_clock_mhz(self) -> int:
        """SM clock now."""
        clock: int = self._ask("sm_clock", pynvml.nvmlDeviceGetClockInfo, pynvml.NVML_CLOCK_SM)
        return clock

    def power_w(self) -> float:
        """Board power, averaged by the driver over about a second."""
        power_mw: int = self._ask("power", pynvml.nvmlDeviceGetPowerUsage)
        return power_mw / 1000.0

    def energy_j(self) -> float:
        """Energy since the driver was loaded."""
        energy_mj: int = self._ask("energy", pynvml.nvmlDeviceGetTotalEnergyConsumption)
        return energy_mj / 1000.0

    def temperature_c(self) -> float:
        """Temperature of the die."""
        return float(self._ask("temperature", pynvml.nvmlDeviceGetTemperature, pynvml.NVML_TEMPERATURE_GPU))

    def clock_events(self) -> ClockEvent:
        """Why it runs slower than it was told."""
        return ClockEvent.of_mask(self._ask("clock_events", pynvml.nvmlDeviceGetCurrentClocksEventReasons))

    def _call(self, name: str, function: Callable[..., Any], *arguments: object) -> Any:
        return self._nvml.call(self._what, name, function, *arguments)

    def _ask(self, name: str, function: Callable[..., Any], *arguments: object) -> Any:
        try:
            return self._call(name, function, self._handle, *arguments)
        except GpuUnsupportedError as error:
            if self._split():
                raise GpuMigError(f"{error}; the board is in MIG mode, whose parts have no meter and clock") from None
            raise

    def _split(self) -> bool:
        """Whether MIG is on; asked only to explain a refusal."""
        try:
            current, _pending = self._call("mig_mode", pynvml.nvmlDeviceGetMigMode, self._handle)
        except GpuError:
            return False
        return bool(current == pynvml.NVML_DEVICE_MIG_ENABLE)
