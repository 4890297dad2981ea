"""A VllmDriver over stand-ins of the ``vllm`` command and GPUs in memory."""

import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from energy.adapters.memory_gpu import MemoryGpu
from energy.gpu import GpuReading, read
from energy.gpus import GPUS
from pools.drivers.vllm import VllmDriver
from pools.drivers.vllm_clocks import GpuClocks
from pools.drivers.vllm_launch import VllmLaunch, VllmModel

STAND_IN = (sys.executable, "-S", str(Path(__file__).with_name("vllm_stand_in.py")))


class MemoryNode:
    """GPUs of one node in memory, as an agent would show them; ``lost`` are leases that lapsed."""

    def __init__(self, count: int = 8) -> None:
        self.boards = [MemoryGpu(index, GPUS["H100-SXM"], time.monotonic) for index in range(count)]
        self.lost: tuple[int, ...] = ()

    def gpus(self) -> list[MemoryGpu]:
        return self.boards

    def readings(self) -> list[GpuReading]:
        return [read(board, "as the agent calls it") for board in self.boards]

    def renew(self) -> tuple[int, ...]:
        lost, self.lost = self.lost, ()
        return lost

    def close(self) -> None:
        pass


def stand_in_driver(
    nodes: Mapping[str, MemoryNode] | None = None,
    models: Mapping[str, VllmModel] | None = None,
    environment: Mapping[str, str] | None = None,
    can_park: bool = True,
    command: tuple[str, ...] = STAND_IN,
    arguments: tuple[str, ...] = (),
    log_dir: Path | None = None,
    gpus: Mapping[str, int] | None = None,
    **options: object,
) -> VllmDriver:
    nodes = {"node-0": MemoryNode(), "node-1": MemoryNode()} if nodes is None else nodes
    return VllmDriver(
        gpus or {"node-0": 8, "node-1": 8},
        models or {"tiny": VllmModel("/models/tiny")},
        VllmLaunch(command=command, arguments=arguments, environment=environment or {}, can_park=can_park),
        GpuClocks(nodes),
        log_dir or Path(tempfile.mkdtemp()),
        **{"start_timeout_s": 10.0, **options},
    )
