"""What a driver's GPUs read: every node that answers, under the names the driver knows them by."""

import asyncio

import pytest
from vllm_examples import MemoryNode, stand_in_driver

from energy.gpu import ClockLock, GpuAgentError
from pools.drivers.vllm_clocks import GpuClocks


class SilentNode(MemoryNode):
    """A node whose agent does not answer, until it is ``back``."""

    back = False

    def readings(self):
        if not self.back:
            raise GpuAgentError("no answer")
        return super().readings()


def test_every_gpu_is_read_under_its_nodes_name():
    nodes = {"node-0": MemoryNode(2), "node-1": MemoryNode(1)}
    nodes["node-1"].boards[0].lock_sm_clocks(ClockLock(900, 900))
    readings = asyncio.run(GpuClocks(nodes).read())
    assert [(r.node, r.index, r.sm_clock_mhz) for r in readings] == [
        ("node-0", 0, 1980),
        ("node-0", 1, 1980),
        ("node-1", 0, 900),
    ]
    assert all(r.energy_j is not None and r.power_w > 0 for r in readings)


def test_a_node_that_does_not_answer_is_left_out_until_it_does():
    silent = SilentNode(1)
    clocks = GpuClocks({"node-0": MemoryNode(1), "node-1": silent})
    assert [r.node for r in asyncio.run(clocks.read())] == ["node-0"]
    silent.back = True
    assert [r.node for r in asyncio.run(clocks.read())] == ["node-0", "node-1"]


def test_silence_of_all_is_an_error_and_no_nodes_are_nothing():
    with pytest.raises(OSError, match="no answer"):
        asyncio.run(GpuClocks({"node-0": SilentNode(1)}).read())
    assert asyncio.run(GpuClocks({}).read()) == []


def test_what_is_no_fault_of_a_gpu_is_not_hidden():
    class Broken(MemoryNode):
        def readings(self):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        asyncio.run(GpuClocks({"node-0": Broken(1), "node-1": MemoryNode(1)}).read())


def test_a_driver_tells_which_nodes_it_can_read():
    async def play():
        driver = stand_in_driver({"node-1": MemoryNode(3)})
        try:
            return driver.metered_nodes, len(await driver.read_gpus())
        finally:
            await driver.close()

    assert asyncio.run(play()) == (frozenset({"node-1"}), 3)
