"""Meters to books: over a real emulator's agents, and with meters that fail."""

import asyncio
import json
import subprocess
import sys
import time

import pytest
from prometheus_client import CollectorRegistry

from dynamollm.deployment import Deployment
from dynamollm.metering import DriverMeter, HeldGpus, Metering
from dynamollm.settings import ModelSettings, NodeSettings, PoolSettings, Settings
from energy.accounting import Prices, Use, User
from energy.accounting_ledger import SETTLE_S, EnergyLedger
from energy.accounting_metrics import LedgerMetrics
from energy.adapters.agent_meter import AgentMeter
from energy.adapters.catalogue import load_profile
from energy.carbon import StaticIntensity
from energy.gpu import GpuReading
from energy.gpus import GPUS
from pools.drivers.port import InstanceEvent
from pools.drivers.vllm_clocks import GpuClocks
from pools.instances import GpuSlot, Instance, InstanceShape, InstanceState
from simulator.vllm_device.adapters.gpus import BoardNode

PROFILE = "llama-3.1-70b-fp8-h100"
LL = PoolSettings("LL", "llama", "LL", 4, instances=0)


def deployment_of(state=InstanceState.READY, node="node-0"):
    settings = Settings((ModelSettings("llama", PROFILE),), (NodeSettings(node),), (LL,))
    deployment = Deployment(settings, {"llama": load_profile(PROFILE)})
    gpus = tuple(GpuSlot(node, index) for index in range(4))
    shape = InstanceShape("llama", "H100-SXM", 4)
    deployment.put(Instance("ll-1", "LL", shape, "http://127.0.0.1:9", InstanceState.STARTING, 1980, gpus))
    deployment.change(InstanceEvent("ll-1", state))
    return deployment


def new_ledger():
    return EnergyLedger(StaticIntensity(100.0, "test"), Prices(), 0.0)


class ScriptedMeter:
    """One reading after another; an exception is raised."""

    def __init__(self, *readings):
        self.readings = list(readings)
        self.closed = False

    async def read(self):
        reading = self.readings.pop(0)
        if isinstance(reading, Exception):
            raise reading
        return reading

    async def close(self):
        self.closed = True


def readings(energy_j, gpus=8):
    return [GpuReading("node-0", i, f"GPU-{i}", "H100-SXM", 1980, None, energy_j, None) for i in range(gpus)]


@pytest.mark.parametrize(
    ("state", "use", "idle_w"),
    [
        (InstanceState.READY, Use.IDLE, 121.7),
        (InstanceState.DRAINING, Use.TRANSITION, 121.7),
        (InstanceState.STARTING, Use.TRANSITION, 121.7),
        (InstanceState.PARKED, Use.IDLE, None),
    ],
)
def test_every_gpu_belongs_to_its_instance_or_to_nobody(state, use, idle_w):
    held = HeldGpus(deployment_of(state))()
    assert len(held) == 8
    ours = held["node-0", 3]
    assert (ours.id, ours.pool, ours.gpus, ours.use) == ("ll-1", "LL", 4, use)
    assert ours.idle_w == pytest.approx(idle_w, rel=0.05) if idle_w else ours.idle_w < 110.0
    assert (held["node-0", 4].id, held["node-0", 4].pool) == ("node-0", "")


def test_a_meter_that_fails_loses_nothing():
    ledger, now_s = new_ledger(), [0.0]
    meter = ScriptedMeter(readings(0.0), OSError("no route"), readings(10.0)[:4], readings(30.0))
    metering = Metering(meter, ledger, HeldGpus(deployment_of()), lambda: now_s[0])

    async def play():
        for _ in range(4):
            await metering.once()
            now_s[0] += 1.0

    asyncio.run(play())
    assert metering.power_w()["ll-1"] == pytest.approx(80.0)
    assert metering.power_w()["node-0"] == pytest.approx(40.0)
    ledger.settle(now_s[0] + SETTLE_S)
    assert ledger.metered_j == pytest.approx(8 * 30.0)


def test_readings_name_the_instance_that_holds_the_gpu():
    metering = Metering(ScriptedMeter(readings(5.0)), new_ledger(), HeldGpus(deployment_of()), lambda: 1.0)
    assert metering.readings() == ()
    asyncio.run(metering.once())
    assert [r.instance_id for r in metering.readings()] == ["ll-1"] * 4 + [""] * 4
    assert {r.energy_j for r in metering.readings()} == {5.0}


def test_the_boards_of_emulated_devices_are_booked(tmp_path):
    physics, ledger, now_s = GPUS["H100-SXM"], new_ledger(), [0.0]
    node = BoardNode("node-0", 8, physics, tmp_path)
    try:
        metering = Metering(
            DriverMeter(GpuClocks({"node-0": node}).read), ledger, HeldGpus(deployment_of()), time.monotonic
        )

        async def play():
            before_j = sum(gpu.energy_j() for gpu in node.gpus())
            for _ in range(3):
                await metering.once()
                await asyncio.sleep(0.1)
            now_s[0] = time.monotonic()
            return before_j, sum(gpu.energy_j() for gpu in node.gpus())

        before_j, after_j = asyncio.run(play())
        ledger.settle(now_s[0] + SETTLE_S)
        assert 0.0 < ledger.metered_j <= after_j - before_j
        assert metering.power_w()["ll-1"] == pytest.approx(4 * physics.bare_w, rel=0.05)
    finally:
        node.close()


def test_a_cancelled_run_closes_its_meter():
    meter = ScriptedMeter(readings(0.0), readings(1.0))

    async def play():
        running = asyncio.create_task(Metering(meter, new_ledger(), dict, lambda: 0.0).run())
        await asyncio.sleep(0)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    asyncio.run(play())
    assert meter.closed


def test_the_books_of_an_emulator_are_what_its_counters_say():
    command = [sys.executable, "-m", "simulator.emulator", "--node", "node-0=8xH100-SXM", "--watch-stdin"]
    emulator = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    ledger = new_ledger()
    try:
        agents = json.loads(emulator.stdout.readline())["agent_urls"]

        async def play():
            async def addresses():
                return [*agents.values(), "http://127.0.0.1:1"]  # one does not answer

            meter = AgentMeter(addresses)
            metering = Metering(meter, ledger, HeldGpus(deployment_of()), time.monotonic)
            counted_j = []
            for _ in range(3):
                await metering.once()
                counted_j.append(sum(reading.energy_j for reading in await meter.read()))
                await asyncio.sleep(0.2)
            ledger.settle(time.monotonic() + SETTLE_S)
            await meter.close()
            return counted_j[-1] - counted_j[0]

        counted_j = asyncio.run(play())
    finally:
        emulator.stdin.close()
        emulator.wait(timeout=10.0)
        emulator.stdout.close()
    assert ledger.metered_j == pytest.approx(counted_j, rel=0.2)  # read a moment apart
    rows = {(entry.user.pool, entry.user.model): entry.row for entry in ledger.window(1e9, time.monotonic()).rows}
    assert rows["", ""].idle_j == pytest.approx(rows["LL", "llama"].idle_j, rel=0.05), "four GPUs each, all bare"


def test_metrics_count_what_the_ledger_books():
    ledger = new_ledger()
    meter = ScriptedMeter(readings(0.0), readings(100.0))
    now_s = [0.0]
    metering = Metering(meter, ledger, HeldGpus(deployment_of()), lambda: now_s[0])

    async def play():
        await metering.once()
        ledger.began("r", User("llama", "LL", "LL", "alice"), "ll-1", 600, 0.0)
        ledger.first_token("r", 0.1)
        now_s[0] = 1.0
        await metering.once()

    asyncio.run(play())
    ledger.settle(1.0 + 2 * SETTLE_S)
    registry = CollectorRegistry()
    registry.register(LedgerMetrics(ledger))

    def joules(phase, request_class="LL", pool="LL", model="llama"):
        labels = {"gen_ai_request_model": model, "pool": pool, "request_class": request_class, "phase": phase}
        return registry.get_sample_value("dynamollm_energy_joules_total", labels)

    parts_j = (joules("prefill"), joules("decode"), joules("idle", ""), joules("idle", "", "", ""))
    assert sum(part_j or 0.0 for part_j in parts_j) == pytest.approx(800.0)
    assert joules("idle", "", "", "") == pytest.approx(400.0)
    assert registry.get_sample_value("dynamollm_metered_joules_total") == pytest.approx(800.0)
    served_j = joules("prefill") + joules("decode")
    assert registry.get_sample_value("dynamollm_tenant_energy_joules_total", {"tenant": "alice"}) == served_j


def test_a_new_leader_books_what_was_drawn_since_the_old_one_settled():
    """Two ledgers in turn: together they have booked every joule of the counters, once."""

    def at(joules: float) -> list[GpuReading]:
        return [GpuReading("node-0", index, f"GPU-{index}", "H100", 1980, None, joules, None) for index in range(4)]

    clock = [0.0]
    held = HeldGpus(deployment_of())

    def metering(ledger, *joules: float) -> Metering:
        return Metering(ScriptedMeter(*map(at, joules)), ledger, held, lambda: clock[0])

    async def read(each: Metering, *times_s: float) -> None:
        for at_s in times_s:
            clock[0] = at_s
            await each.once()

    old_ledger, new_ledger_ = new_ledger(), new_ledger()
    old = metering(old_ledger, *(100.0 * n for n in range(11)))
    asyncio.run(read(old, *map(float, range(11))))
    assert old_ledger.metered_j == 4 * 100.0 * (10 - SETTLE_S)  # the rest is lost with it
    new = metering(new_ledger_, 2000.0, 2100.0)
    new.resume(old.settled_counters())
    asyncio.run(read(new, 20.0, 21.0 + SETTLE_S))
    assert old_ledger.metered_j + new_ledger_.metered_j == pytest.approx(4 * 2000.0)
