"""The stub NVML: built with gcc once a session, its state read and written from here."""

import ctypes
import mmap
import os
import shutil
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("nvml_stub.c")
MAX_GPUS = 16
UNINITIALIZED, NOT_SUPPORTED, NO_PERMISSION, DRIVER_NOT_LOADED, GPU_IS_LOST = 1, 3, 4, 9, 15


class StubGpu(ctypes.Structure):
    _fields_ = (
        ("low_mhz", ctypes.c_uint32),
        ("high_mhz", ctypes.c_uint32),
        ("read_error", ctypes.c_uint32),
        ("write_error", ctypes.c_uint32),
        ("mig", ctypes.c_uint32),
        ("power_mw", ctypes.c_uint32),
        ("temperature_c", ctypes.c_uint32),
        ("writes", ctypes.c_uint32),
        ("energy_mj", ctypes.c_uint64),
        ("reasons", ctypes.c_uint64),
    )

    @property
    def lock(self) -> tuple[int, int]:
        """(0, 0) is: default clocks."""
        return self.low_mhz, self.high_mhz


class StubState(ctypes.Structure):
    _fields_ = (("count", ctypes.c_uint32), ("init_error", ctypes.c_uint32), ("gpus", StubGpu * MAX_GPUS))


def build(folder: Path, *, locked_clocks: bool = True) -> Path:
    """Compile the library into ``folder``; returns its path."""
    path = folder / "libnvidia-ml.so.1"
    define = ["-DWITH_LOCKED_CLOCKS"] if locked_clocks else []
    command = ["gcc", "-shared", "-fPIC", "-O1", "-Wall", "-Wl,-soname,libnvidia-ml.so.1", *define, "-o", str(path)]
    subprocess.run([*command, str(SOURCE)], check=True)
    return path


def missing_compiler() -> str | None:
    """Why the stub cannot be built here."""
    return None if shutil.which("gcc") else "needs gcc to build the stub libnvidia-ml.so.1"


class StubMachine:
    """A machine of ``count`` stub GPUs: shared state in a file."""

    def __init__(self, folder: Path, library: Path, count: int = 4) -> None:
        self.path = folder / "nvml-state"
        self.library = library
        self.extra_environment: dict[str, str] = {}
        self.path.write_bytes(bytes(ctypes.sizeof(StubState)))
        with self.path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)
        self.state = StubState.from_buffer(self._map)
        self.state.count = count
        for gpu in self.gpus:
            gpu.power_mw, gpu.temperature_c, gpu.energy_mj = 121_700, 38, 5_000_000

    @property
    def gpus(self) -> list[StubGpu]:
        return [self.state.gpus[index] for index in range(self.state.count)]

    @property
    def locks(self) -> list[tuple[int, int]]:
        return [gpu.lock for gpu in self.gpus]

    @property
    def environment(self) -> dict[str, str]:
        """For a child process that shall find this machine."""
        found = {"LD_LIBRARY_PATH": str(self.library.parent), "NVML_STUB_STATE": str(self.path)}
        return {**os.environ, **found, **self.extra_environment}
