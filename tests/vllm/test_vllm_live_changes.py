"""The cluster is changed under load: clocks, scale, park, re-shard, on three real servers with emulated devices.

What a plan orders is carried out by the same operations as in `dynamollm serve`; no request may notice.
"""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
from conftest import ENVIRONMENT
from test_vllm_faults import Seen, finished, stream
from vllm_cluster import START_S

from dynamollm.admin import admin_routes
from dynamollm.commands.serve import _run_cluster
from dynamollm.operations import Outcome
from dynamollm.role_server import RoleServer
from dynamollm.settings import (
    ControllerSettings,
    DriverSettings,
    ModelSettings,
    NodeSettings,
    PoolSettings,
    Settings,
    SloSettings,
    VllmSettings,
)
from dynamollm.wiring import Application, build
from energy.dcgm import read_dcgm
from pools.instances import InstanceState
from proxy.serve import gateway_config, listen
from solver.control import Action, Park, Reshard, ScaleIn, ScaleOut, SetFrequency, Wake

CLIENTS, TOKENS = 9, 40
FIRST = ("ll-1", "ll-2", "ll-3")


def settings(folder: Path) -> Settings:
    environment = Path(ENVIRONMENT).resolve()
    vllm = VllmSettings(command=str(environment / "bin" / "vllm"), log_dir=str(folder))
    profile = "llama-3.1-70b-fp8-h100"
    return Settings(
        models=(ModelSettings("m", profile, path=str(environment / "model-nano"), max_model_len=32_768),),
        nodes=(NodeSettings("node"),),
        pools=(PoolSettings("LL", "m", "LL", 2, instances=len(FIRST)),),
        driver=DriverSettings("vllm-emulated", vllm=vllm),
        controller=ControllerSettings("static"),
        slo=SloSettings(ttft_s=(30.0, 30.0, 30.0), tbt_s=5.0),
    )


@asynccontextmanager
async def serving(application: Application) -> AsyncIterator[str]:
    """The gateway as `dynamollm serve` runs it, once all instances are READY; its URL."""
    listener = listen("127.0.0.1", 0)
    server = RoleServer(gateway_config(application.services, 5.0, admin_routes(lambda: application)))
    cluster = asyncio.create_task(_run_cluster(application))
    answering = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        await application.runner.settled()
        yield "http://{}:{}".format(*listener.getsockname()[:2])
    finally:
        server.should_exit = True
        await answering
        cluster.cancel()
        await asyncio.gather(cluster, return_exceptions=True)
        await application.probe.close()
        listener.close()


@dataclass
class Load:
    """Clients that stream one answer after the other until they are told to stop."""

    url: str
    seen: list[Seen] = field(default_factory=list)
    stopping: bool = False

    async def run(self) -> None:
        limits = httpx.Limits(max_connections=2 * CLIENTS)
        async with httpx.AsyncClient(timeout=300, limits=limits, trust_env=False) as client:
            await asyncio.gather(*(self._client(client, number) for number in range(CLIENTS)))

    async def _client(self, client: httpx.AsyncClient, number: int) -> None:
        while not self.stopping:
            messages = [{"role": "user", "content": f"{number} {len(self.seen)} and so on"}]
            body = {"model": "m", "messages": messages, "max_tokens": TOKENS, "ignore_eos": True}
            self.seen.append(await stream(client, self.url, body))


class Changes:
    """Orders, each carried out before the next."""

    def __init__(self, application: Application) -> None:
        self.application = application
        self.plan = 0

    async def order(self, *actions: type[Action] | tuple) -> None:
        application = self.application
        self.plan += 1
        deadline_s = application.clock() + START_S
        made = [kind(deadline_s=deadline_s, plan=(1, self.plan), **values) for kind, values in actions]
        before = len(application.operations.records)
        application.operations.apply(made)
        await application.operations.settled()
        records = list(application.operations.records)[before:]
        assert [(r.outcome, r.reason) for r in records] == [(Outcome.DONE, "")] * len(made)
        print(", ".join(f"{type(r.action).__name__} {r.ended_s - r.began_s:.1f} s" for r in records))

    def states(self) -> dict[str, tuple[InstanceState, int]]:
        return {i.id: (i.state, i.shape.tp) for i in self.application.deployment.instances.values()}


def start(name: str, tp: int) -> tuple[type[ScaleOut], dict[str, object]]:
    return ScaleOut, {"instance_id": name, "pool": "LL", "tp": tp, "sm_clock_mhz": 1980, "node": "node"}


async def play(application: Application) -> Load:
    changes, ready = Changes(application), InstanceState.READY
    async with serving(application) as url:
        assert changes.states() == dict.fromkeys(FIRST, (ready, 2))
        assert application.runner.seen_start_s > 0.0
        load = Load(url)
        running = asyncio.create_task(load.run())

        async def served_by(*names: str) -> None:
            """Until each of them has served something since now."""
            since = len(load.seen)
            async with asyncio.timeout(START_S):
                while not set(names) <= {seen.instance for seen in load.seen[since:]}:
                    assert not running.done(), "the load has ended"
                    await asyncio.sleep(0.1)

        await served_by("ll-1")
        await changes.order(*((SetFrequency, {"instance_id": name, "sm_clock_mhz": 1200}) for name in FIRST))
        assert {i.sm_clock_mhz for i in await application.runner._driver.list()} == {1200}

        await changes.order(start("new-1", 2))
        await changes.order((ScaleIn, {"instance_id": "ll-1"}))
        await changes.order((Park, {"instance_id": "ll-2", "sm_clock_mhz": 345}))
        assert changes.states() == {
            "ll-2": (InstanceState.PARKED, 2),
            "ll-3": (ready, 2),
            "new-1": (ready, 2),
        }
        await changes.order((Wake, {"instance_id": "ll-2", "sm_clock_mhz": 1980}))
        order, values = start("new-2", 4)
        made = order(deadline_s=application.clock() + START_S, **values)
        await changes.order((Reshard, {"retire": ("ll-2", "ll-3"), "create": (made,)}))
        assert changes.states() == {"new-1": (ready, 2), "new-2": (ready, 4)}
        await changes.order((ScaleIn, {"instance_id": "new-1"}))
        await served_by("new-2")

        page = (await httpx.AsyncClient(timeout=30).get(f"{url}/admin/gpus/metrics")).text
        readings = read_dcgm(page)
        assert len(readings) == 8
        assert [r.instance_id for r in readings].count("new-2") == 4
        load.stopping = True
        await running
        await asyncio.sleep(1.5)  # the meter is read once a second
        drawn_j = sum(reading.energy_j for reading in await application.runner._driver.read_gpus())
        assert application.ledger.metered_j == pytest.approx(drawn_j, rel=0.05)
    return load


def test_no_request_is_lost_while_the_cluster_changes(tmp_path):
    application = build(settings(tmp_path))

    async def bounded() -> Load:
        async with asyncio.timeout(3 * START_S):
            return await play(application)

    load = asyncio.run(bounded())
    lost = [seen for seen in load.seen if not finished(seen, TOKENS)]
    served = {seen.instance for seen in load.seen}
    print(
        f"{len(load.seen)} requests by {sorted(served)}, {len(lost)} lost; {application.ledger.metered_j:.0f} J metered"
    )
    print(f"a start took {application.runner.seen_start_s:.1f} s; load of the host {os.getloadavg()[0]:.1f}")
    assert not lost
    assert {"ll-1", "new-2"} <= served
