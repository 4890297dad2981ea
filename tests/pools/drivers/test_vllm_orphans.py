"""Engines that outlive their controller: who finds them, which are adopted, and what becomes of the others."""

import asyncio
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_vllm_driver import WITHIN_S, eventually, ready, spec, until
from vllm_examples import MemoryNode, stand_in_driver

from energy.gpu import ClockLock
from pools.drivers.port import StartRefusedError
from pools.drivers.vllm_http import VllmServer
from pools.drivers.vllm_launch import EngineRecord, VllmLaunch, VllmModel, read_record, record_of
from pools.drivers.vllm_orphans import find_orphans
from pools.drivers.vllm_processes import alive, claim, this_controller
from pools.instances import GpuSlot, InstanceShape, InstanceState

LAUNCH, MODEL, LOG = VllmLaunch(arguments=("--a",)), VllmModel("/models/tiny"), Path("/log/i-0.log")
FIRST_GPUS = {"awake": 0, "asleep": 2, "loading": 4, "other": 6}

# An earlier controller: one engine that serves, one asleep, one told otherwise; then it lives until it is killed, or,
# told to leave them running, until its input ends.
CONTROLLER = f"""
import asyncio, sys
from pathlib import Path
sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(Path(__file__).parents[3])!r}]
from test_vllm_driver import ready, spec
from vllm_examples import stand_in_driver

async def run(name, folder, leave_running):
    drivers = [stand_in_driver(log_dir=folder, arguments=words, leave_running=leave_running)
               for words in ((), ("--told-otherwise", "1"))]
    for part, driver in (("awake", drivers[0]), ("asleep", drivers[0]), ("other", drivers[1])):
        await ready(driver, driver.events(), spec(name + part, {FIRST_GPUS}[part], clock=1200))
    await drivers[0].park(name + "asleep")
    print("up", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    for driver in drivers:
        await driver.close()

asyncio.run(run(sys.argv[1], Path(sys.argv[2]), sys.argv[3] == "leave"))
"""


def engines(name: str) -> dict[str, int]:
    """Server processes of one test's instances, by what comes after their common name."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            variables = (entry / "environ").read_bytes().decode(errors="replace") if entry.name.isdigit() else ""
            leads = entry.name.isdigit() and os.getpgid(int(entry.name)) == int(entry.name)
        except OSError:
            continue
        told = dict(part.split("=", 1) for part in variables.split("\0") if "=" in part)
        if leads and told.get("DYNAMOLLM_INSTANCE", "").startswith(name):
            found[told["DYNAMOLLM_INSTANCE"].removeprefix(name)] = int(entry.name)
    return found


@pytest.fixture
def name() -> str:
    """Begins the instances' names, which no other test's have."""
    name = f"left-{os.getpid()}-{os.urandom(3).hex()}-"
    yield name
    for pid in engines(name).values():
        os.killpg(pid, signal.SIGKILL)


@contextmanager
def earlier_controller(name: str, folder: Path, *words: str):
    """A controller in a process of its own, its engines up."""
    program = [sys.executable, "-c", CONTROLLER, name, str(folder), *(words or ("",))]
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as controller:
        try:
            assert controller.stdout.readline() == b"up\n"
            yield controller
        finally:
            controller.kill()


def play(scenario, *drivers):
    async def playing():
        try:
            async with asyncio.timeout(WITHIN_S):
                await scenario(*drivers)
        finally:
            for driver in drivers:
                await driver.close()

    asyncio.run(playing())


def test_a_killed_controllers_engines_are_adopted_where_they_fit_and_ended_where_not(name, tmp_path):
    node = MemoryNode()
    driver = stand_in_driver(nodes={"node-0": node}, log_dir=tmp_path)
    beside = stand_in_driver(log_dir=tmp_path)

    async def scenario(driver, beside):
        events = driver.events()
        with earlier_controller(name, tmp_path) as controller:
            before = engines(name)
            assert set(before) == {"awake", "asleep", "other"}
            assert await beside.list() == ()  # their controller lives
            assert engines(name) == before
            controller.kill()
            controller.wait()
        found = {instance.id.removeprefix(name): instance for instance in await driver.list()}
        assert engines(name) == {"awake": before["awake"], "asleep": before["asleep"]}
        assert set(found) == {"awake", "asleep"}
        assert found["asleep"].state is InstanceState.PARKED
        assert (await until(events, InstanceState.READY)).instance_id == f"{name}awake"
        awake = next(instance for instance in await driver.list() if instance.id == f"{name}awake")
        assert (awake.state, awake.pool, awake.shape) == (InstanceState.READY, "ss", spec().shape)
        assert awake.gpus == (GpuSlot("node-0", 0), GpuSlot("node-0", 1))

        locks = [board.locked_sm_clocks_mhz() for board in node.boards]
        asleep, at_start = ClockLock(345, 345), ClockLock(1200, 1200)  # what this node has lost is set again
        assert locks == [at_start] * 2 + [asleep] * 2 + [None] * 4

        later = stand_in_driver(log_dir=tmp_path)  # nobody else's any more
        assert await later.list() == ()
        await later.close()
        assert set(engines(name)) == {"awake", "asleep"}

        await driver.wake(f"{name}asleep")
        assert node.boards[2].locked_sm_clocks_mhz() == at_start
        await driver.stop(f"{name}asleep", 5.0)
        os.kill(before["awake"], signal.SIGKILL)
        assert "log: " in (await until(events, InstanceState.FAILED)).reason
        assert await driver.list() == ()
        assert engines(name) == {}
        assert [board.locked_sm_clocks_mhz() for board in node.boards] == [None] * 8

    play(scenario, driver, beside)


def test_engines_left_running_on_purpose_are_adopted_and_ended_when_they_are_not_left(name, tmp_path):
    async def scenario(driver):
        events = driver.events()
        with earlier_controller(name, tmp_path, "leave") as controller:
            before = engines(name)
            controller.stdin.close()
            assert controller.wait() == 0
        assert engines(name) == before
        await driver.list()
        await until(events, InstanceState.READY)
        body = {"model": "tiny", "prompt": "it serves", "max_tokens": 3}
        asleep, awake = await driver.list()
        async with httpx.AsyncClient() as client:
            answer = await client.post(f"{awake.url}/v1/completions", json=body)
        assert answer.json()["usage"]["completion_tokens"] == 3
        assert asleep.state is InstanceState.PARKED
        await driver.close()
        assert engines(name) == {}

    play(scenario, stand_in_driver(log_dir=tmp_path))


def dead() -> str:
    """What engines of a controller that is gone bear."""
    return f"{os.getpid()}:0"


@pytest.fixture
def abandoned(monkeypatch, name, tmp_path):
    """Spawns an engine whose controller seems to be gone, and lets go of it; what it was started with."""

    async def spawn(**options):
        with monkeypatch.context() as patch:
            patch.setattr("pools.drivers.vllm.this_controller", dead)
            driver = stand_in_driver(**{"log_dir": tmp_path, "leave_running": True, **options})
            instance = await ready(driver, driver.events(), spec(f"{name}0"))
            await driver.close()
        return instance

    return spawn


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"arguments": ("--other", "1")}, "started with other settings"),
        ({"environment": {"OTHER": "1"}}, "started with other settings"),
        ({"models": {"tiny": VllmModel("/models/elsewhere")}}, "started with other settings"),
        ({"log_dir": Path("/tmp")}, "by another deployment"),
        ({"models": {"another": VllmModel("/models/tiny")}}, "no model 'tiny'"),
        ({"gpus": {"node-0": 1}}, "no GPU 1"),
        ({"adopts": False}, "its successor starts its own"),
    ],
)
def test_what_does_not_fit_is_ended_and_says_why(abandoned, name, tmp_path, caplog, options, why):
    async def scenario():
        await abandoned()
        assert engines(name)
        driver = stand_in_driver(**{"log_dir": tmp_path, **options})
        assert await driver.list() == ()
        assert engines(name) == {}
        await driver.close()

    play(scenario)
    assert why in caplog.text


def test_another_deployments_engine_on_gpus_of_its_own_is_left_to_it(abandoned, name, tmp_path):
    async def scenario(theirs):
        await abandoned()
        driver = stand_in_driver(log_dir=tmp_path / "other", gpus={"node-1": 8})
        assert await driver.list() == ()
        await driver.close()
        assert [instance.id for instance in await theirs.list()] == [f"{name}0"]

    play(scenario, stand_in_driver(log_dir=tmp_path))


def test_one_that_hangs_is_not_ready_and_is_replaced_in_time(abandoned, name, tmp_path, monkeypatch):
    monkeypatch.setattr("pools.drivers.vllm.TOKEN_TIMEOUT_S", 0.3)

    async def scenario(driver):
        instance = await abandoned()
        server = VllmServer(instance.url, "tiny")
        hanging = asyncio.create_task(server._gives_token("hang"))
        events = driver.events()
        (found,) = await driver.list()
        assert found.state is InstanceState.STARTING
        assert "no token within 0 s" in (await until(events, InstanceState.FAILED)).reason
        assert not await hanging
        await server.close()
        assert engines(name) == {}

    play(scenario, stand_in_driver(log_dir=tmp_path, start_timeout_s=0.0))


def test_the_lock_on_its_gpus_is_held_on_at_the_clock_it_has(abandoned, tmp_path):
    node = MemoryNode()

    async def scenario(driver):
        await abandoned(nodes={"node-0": node})
        for board in node.boards[:2]:
            board.lock_sm_clocks(ClockLock(900, 900))  # ordered after its start
        (found,) = await driver.list()
        assert found.sm_clock_mhz == 900
        node.lost = (0, 1)
        assert await driver.set_sm_clock(found.id, 1500) == 1500

    play(scenario, stand_in_driver(nodes={"node-0": node}, log_dir=tmp_path))
    assert [board.locked_sm_clocks_mhz() for board in node.boards] == [None] * 8


def test_its_id_and_gpus_are_taken(abandoned, name, tmp_path):
    async def scenario(driver):
        await abandoned()
        await driver.list()
        with pytest.raises(Exception, match="runs already"):
            await driver.start(spec(f"{name}0", first=4))
        with pytest.raises(Exception, match=f"is held by {name}0"):
            await driver.start(spec("i-1", first=1))
        with pytest.raises(StartRefusedError):
            await driver.start(spec("i-1", first=2, model="no-such"))

    play(scenario, stand_in_driver(log_dir=tmp_path))


def test_of_two_that_look_one_finds_it(abandoned, name):
    async def scenario():
        await abandoned()
        first, second = find_orphans(), find_orphans()
        mine = [orphan for orphan in first if orphan.name == f"{name}0"]
        assert len(mine) == 1
        assert name not in str(second)
        for orphan in first:
            if orphan not in mine:
                orphan.held.close()  # of other tests
        await mine[0].end()
        assert engines(name) == {}

    play(scenario)


def test_an_engine_whose_server_is_gone_is_ended(abandoned, name, tmp_path, caplog):
    """Its own process lives on in the group, and holds the GPU."""

    async def scenario(driver):
        await abandoned()
        os.kill(engines(name)["0"], signal.SIGKILL)
        await eventually(lambda: not engines(name), "the server is gone")
        assert marked(name)
        assert await driver.list() == ()
        assert not marked(name)

    play(scenario, stand_in_driver(log_dir=tmp_path))
    assert "its server is gone" in caplog.text


def marked(name: str) -> bool:
    """Whether any process of the test's instances is there, server or not."""
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and f"DYNAMOLLM_INSTANCE={name}".encode() in (entry / "environ").read_bytes():
                return True
        except OSError:
            continue
    return False


# --- what they say of themselves -------------------------------------------------------------------------------------


def test_a_claim_is_one_processs_and_free_when_it_is_closed():
    held = claim(os.getpid())
    assert held is not None
    assert claim(os.getpid()) is None
    held.close()
    again = claim(os.getpid())
    assert again is not None
    again.close()


def test_a_controller_is_known_by_when_it_started_too():
    assert alive(this_controller())
    assert not alive(f"{os.getpid()}:0")
    assert not alive("no controller")


@given(
    st.text(max_size=8),
    st.sampled_from(["tiny", "m"]),
    st.sampled_from([1, 2, 4, 8]),
    st.integers(1, 65535),
    st.text(),
    st.text(),
)
def test_a_record_is_read_as_it_was_written(pool, model, tp, port, log_path, digest):
    gpus = tuple(GpuSlot("node/0", index) for index in range(tp))
    wanted = replace(spec(tp=tp), pool=pool, shape=InstanceShape(model, "H", tp), gpus=gpus)
    record = EngineRecord(wanted, port, log_path, digest)
    assert read_record(record.text()) == record


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"spec": 1, "port": 2, "digest": "x"}', "\ufffd"])
def test_what_is_no_record_is_none(text):
    assert read_record(text) is None


def test_a_record_that_contradicts_itself_is_none():
    text = record_of(LAUNCH, MODEL, spec(), 8000, LOG).text().replace('"tp":2', '"tp":4')
    assert read_record(text) is None


@pytest.mark.parametrize(
    "other",
    [
        (replace(LAUNCH, arguments=("--b",)), MODEL, spec(), 8000, LOG),
        (replace(LAUNCH, environment={"A": "1"}), MODEL, spec(), 8000, LOG),
        (replace(LAUNCH, can_park=False), MODEL, spec(), 8000, LOG),
        (LAUNCH, VllmModel("/models/other"), spec(), 8000, LOG),
        (LAUNCH, VllmModel("/models/tiny", ("--c",)), spec(), 8000, LOG),
        (LAUNCH, VllmModel("/models/tiny", environment={"B": "1"}), spec(), 8000, LOG),
        (LAUNCH, MODEL, spec(first=2), 8000, LOG),
        (LAUNCH, MODEL, spec(), 8001, LOG),
        (LAUNCH, MODEL, spec(), 8000, Path("/elsewhere/i-0.log")),
    ],
)
def test_whatever_an_engine_is_told_makes_another_record(other):
    assert record_of(*other) != record_of(LAUNCH, MODEL, spec(), 8000, LOG)
    assert record_of(LAUNCH, MODEL, spec(), 8000, LOG) == record_of(LAUNCH, MODEL, spec(), 8000, LOG)
