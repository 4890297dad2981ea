"""Servers of a file: found and withdrawn as it changes, clocked where it tells their GPUs. In virtual time."""

import asyncio
import json
import logging
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import httpx
import pytest
from vllm_examples import MemoryNode

from energy.gpu import ClockLock, GpuAgentError
from pools.drivers.attach import FILE_PERIOD_S, REFUSED_PERIOD_S, AttachDriver
from pools.drivers.attached import AttachedFile, AttachedServer
from pools.drivers.port import DriverError, InstanceEvent, InstanceSpec, StartRefusedError
from pools.drivers.vllm_clocks import GpuClocks
from pools.instances import GpuSlot, InstanceShape, InstanceState
from simulator.virtual_loop import run

STARTING, READY, DRAINING, STOPPED = (
    InstanceState.STARTING,
    InstanceState.READY,
    InstanceState.DRAINING,
    InstanceState.STOPPED,
)


def server(host: str, *gpus: int, clock: int = 1200) -> AttachedServer:
    slots = tuple(GpuSlot("n", index) for index in gpus)
    return AttachedServer("LL", InstanceShape("m", "H100-SXM", len(gpus) or 1), f"http://{host}:1", clock, slots)


def parse(text: str) -> tuple[AttachedServer, ...]:
    """A line a server: its host, then its GPUs."""
    if "bad" in text:
        raise ValueError("servers.txt: line 1: bad")
    return tuple(server(host, *map(int, gpus)) for host, *gpus in map(str.split, text.splitlines()))


class World:
    """A driver on a file, in front of servers whose requests end with ``status``, by host."""

    def __init__(self, folder: Path, text: str) -> None:
        self.path = folder / "servers.txt"
        self._written = 0
        self.write(text)
        self.status: dict[str, int] = {}
        self.asked: list[str] = []
        self.node = MemoryNode()
        self.driver = AttachDriver(
            {}, httpx.MockTransport(self.answer), GpuClocks({"n": self.node}), AttachedFile(self.path, parse)
        )
        self.heard: list[InstanceEvent] = []
        self.listening = asyncio.create_task(self.listen(self.driver.events()))

    def write(self, text: str) -> None:
        """As an editor does, at another time each time."""
        self._written += 1
        self.path.write_text(text)
        os.utime(self.path, ns=(self._written, self._written))

    def answer(self, request: httpx.Request) -> httpx.Response:
        assert json.loads(request.content)["model"] == "m"
        self.asked.append(request.url.host)
        return httpx.Response(self.status.get(request.url.host, 200), json={"usage": {"completion_tokens": 2}})

    async def listen(self, events) -> None:
        async for event in events:
            self.heard.append(event)

    async def until(self, condition: Callable[[], bool]) -> None:
        """The file is read in a thread, which takes real time."""
        for _ in range(1_000_000):
            if condition():
                return
            await asyncio.sleep(0.5)
        raise AssertionError("it never came to that")

    def told(self, instance_id: str) -> list[InstanceState]:
        return [event.state for event in self.heard if event.instance_id == instance_id]

    def locks(self) -> dict[int, ClockLock]:
        locks = {board.index: board.locked_sm_clocks_mhz() for board in self.node.boards}
        return {index: lock for index, lock in locks.items() if lock is not None}


def in_world(tmp_path: Path, text: str, scenario: Callable[[World], Awaitable[None]]) -> None:
    async def main() -> None:
        world = World(tmp_path, text)
        await scenario(world)
        await world.driver.close()
        await world.listening
        assert world.locks() == {}

    run(main())


def test_those_of_the_file_are_listed_at_once_and_ready_after_a_token(tmp_path):
    async def scenario(world: World) -> None:
        first = await world.driver.list()
        assert [(i.id, i.url, i.state, i.gpus) for i in first] == [
            ("ll-1", "http://a:1", STARTING, (GpuSlot("n", 0), GpuSlot("n", 1))),
            ("ll-2", "http://b:1", STARTING, ()),
        ]
        await world.until(lambda: world.told("ll-2") == [STARTING, READY])
        assert [i.state for i in await world.driver.list()] == [READY, READY]
        assert world.heard[0].found == first[0]

    in_world(tmp_path, "a 0 1\nb", scenario)


def test_one_added_is_found_and_one_removed_is_withdrawn_and_stays_until_it_is_stopped(tmp_path):
    async def scenario(world: World) -> None:
        await world.driver.list()
        await world.until(lambda: READY in world.told("ll-1"))
        world.write("b\nc")
        await world.until(lambda: READY in world.told("ll-3"))
        assert world.told("ll-1") == [STARTING, READY, DRAINING]
        (gone,) = [event for event in world.heard if event.withdrawn]
        assert (gone.instance_id, gone.reason) == ("ll-1", f"{world.path} has it no more")
        assert [i.state for i in await world.driver.list()] == [DRAINING, READY, READY]
        world.write("b")  # the one that drains is not withdrawn twice
        await world.until(lambda: DRAINING in world.told("ll-3"))
        await world.driver.stop("ll-1", 0.0)
        assert [event.instance_id for event in world.heard if event.withdrawn] == ["ll-1", "ll-3"]
        assert [i.url for i in await world.driver.list()] == ["http://b:1", "http://c:1"]
        world.write("a\nb")  # it comes back as another
        await world.until(lambda: READY in world.told("ll-4"))

    in_world(tmp_path, "a\nb", scenario)


def test_a_file_that_is_wrong_or_gone_changes_nothing_and_the_log_says_where(tmp_path, caplog):
    async def scenario(world: World) -> None:
        await world.driver.list()
        world.write("bad")
        await world.until(lambda: "line 1: bad" in caplog.text)
        assert "its servers stay as they were" in caplog.text
        await asyncio.sleep(20 * FILE_PERIOD_S)
        assert caplog.text.count("line 1: bad") == 1  # once for each change
        world.path.write_bytes(b"\xff")
        await world.until(lambda: f"{world.path}: 'utf-8' codec" in caplog.text)
        world.path.unlink()
        await world.until(lambda: "is gone" in caplog.text)
        assert [i.url for i in await world.driver.list()] == ["http://a:1"]
        world.write("a\nb")
        await world.until(lambda: STARTING in world.told("ll-2"))
        assert DRAINING not in world.told("ll-1")

    caplog.set_level(logging.ERROR)
    in_world(tmp_path, "a", scenario)


def test_one_that_refuses_requests_is_asked_again_later_and_never_replaced(tmp_path):
    async def scenario(world: World) -> None:
        world.status["a"] = 404
        await world.driver.list()
        await asyncio.sleep(REFUSED_PERIOD_S / 2)
        assert world.asked == ["a"]
        world.status["a"] = 200
        await asyncio.sleep(REFUSED_PERIOD_S)
        assert world.told("ll-1") == [STARTING, READY]

    in_world(tmp_path, "a", scenario)


def test_clocks_are_set_where_the_gpus_are_told_and_taken_off_when_it_goes(tmp_path):
    async def scenario(world: World) -> None:
        first, second = await world.driver.list()
        assert first.sm_clock_mhz == 1200
        assert world.locks() == dict.fromkeys((0, 1), ClockLock(1200, 1200))
        assert await world.driver.set_sm_clock("ll-1", 1403) == 1410
        assert world.locks() == dict.fromkeys((0, 1), ClockLock(1410, 1410))
        await world.until(lambda: READY in world.told("ll-1"))
        assert (await world.driver.list())[0].sm_clock_mhz == 1410  # readiness does not forget it
        with pytest.raises(DriverError, match=r"driver.urls_file.*driver.vllm.agents"):
            await world.driver.set_sm_clock(second.id, 1400)
        assert world.driver.metered_nodes == {"n"}
        assert len(await world.driver.read_gpus()) == 8
        world.write("b\nc 1 2")  # another takes over one of its GPUs while it drains
        await world.until(lambda: STARTING in world.told("ll-3"))
        await world.driver.stop("ll-1", 0.0)
        assert world.locks() == dict.fromkeys((1, 2), ClockLock(1200, 1200))

    in_world(tmp_path, "a 0 1\nb", scenario)


def test_it_serves_while_its_clock_cannot_be_set_and_is_clocked_once_it_can(tmp_path, caplog, monkeypatch):
    async def scenario(world: World) -> None:
        def away():
            raise GpuAgentError("the agent is away")

        with monkeypatch.context() as patched:
            patched.setattr(world.node, "gpus", away)
            await world.driver.list()
            await world.until(lambda: READY in world.told("ll-1"))
            await asyncio.sleep(10 * FILE_PERIOD_S)
            assert caplog.text.count("its clock is not set") == 1
            assert world.locks() == {}
        await world.until(lambda: world.locks() == {0: ClockLock(1200, 1200)})

    in_world(tmp_path, "a 0", scenario)


def test_there_is_nothing_to_start(tmp_path):
    async def scenario(world: World) -> None:
        spec = InstanceSpec("x", "LL", InstanceShape("m", "H100-SXM", 1), (GpuSlot("n", 0),), 1980)
        with pytest.raises(StartRefusedError, match=r"servers\.txt; add one there"):
            await world.driver.start(spec)
        assert await world.driver.list() == ()

    in_world(tmp_path, "", scenario)


def test_a_file_that_is_being_written_is_read_once_it_stays_the_same(tmp_path):
    path = tmp_path / "servers.txt"
    path.write_text("a\nb")
    file = AttachedFile(path, parse)
    assert [one.url for one in file.changed()] == ["http://a:1", "http://b:1"]  # at start there is nothing to lose
    assert file.changed() is None
    path.write_text("")
    assert file.changed() is None
    path.write_text("a\nb\nc")
    assert file.changed() is None
    assert [one.url for one in file.changed()] == ["http://a:1", "http://b:1", "http://c:1"]
    assert file.changed() is None
