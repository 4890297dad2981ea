"""Another configuration for several gateways and controllers: over real sockets, two controllers and a gateway in one
event loop, a store in a file. Whoever leads follows it; gateways follow the leader."""

import asyncio
import dataclasses
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
import yaml
from prometheus_client import CollectorRegistry
from test_reload import OTHER_PROFILE, follow
from test_serve import CLUSTER

from dynamollm.adapters.admin_relay import admin_relay
from dynamollm.adapters.configuration import load
from dynamollm.commander import Commander
from dynamollm.controller_app import controller_app
from dynamollm.errors import UserError
from dynamollm.reload import as_it_is_now
from dynamollm.settings import ControllerSettings, Settings
from dynamollm.shared_wiring import SharedGateway, build_commander, build_gateway
from dynamollm.term import ControllerTerm
from pools.instances import InstanceState
from proxy.serve import gateway_config, listen

PATIENCE_S = 60.0


class Server(uvicorn.Server):
    """Leaves the signals alone."""

    @asynccontextmanager
    async def at_port(self) -> AsyncIterator[str]:
        with listen("127.0.0.1", 0) as listener:
            serving = asyncio.create_task(self._serve([listener]))
            try:
                yield "http://{}:{}".format(*listener.getsockname()[:2])
            finally:
                self.should_exit = True
                await serving


@asynccontextmanager
async def running(task: Coroutine[Any, Any, None]) -> AsyncIterator[asyncio.Task[None]]:
    running_task = asyncio.create_task(task)
    try:
        yield running_task
    finally:
        running_task.cancel()
        (result,) = await asyncio.gather(running_task, return_exceptions=True)
        assert isinstance(result, asyncio.CancelledError), result


async def until(holds: Callable[[], bool], what: str) -> None:
    try:
        async with asyncio.timeout(PATIENCE_S):
            while not holds():  # noqa: ASYNC110 - nobody sets an event: it is another process' doing
                await asyncio.sleep(0.05)
    except TimeoutError:
        raise AssertionError(f"waited in vain for {what}") from None


class Site:
    """The parts, the first controller leading."""

    def __init__(self, folder: Path) -> None:
        self.config = folder / "cluster.yaml"
        self.tree = {**CLUSTER, "store": {"kind": "file", "folder": str(folder)}, "controller": {"policy": "static"}}
        self.write()
        self.commanders: list[Commander[ControllerTerm]] = []
        self.urls: list[str] = []
        self.leads: asyncio.Task[None]
        self.gateway: SharedGateway
        self.url = ""

    def write(self, **changes: object) -> None:
        self.tree |= changes
        self.config.write_text(yaml.safe_dump(self.tree))

    def read(self) -> Settings:
        return load(self.config, {})

    async def play(self, scenario: Callable[["Site"], Coroutine[Any, Any, None]]) -> None:
        async with AsyncExitStack() as stack:
            for name in ("one", "other"):
                commander = build_commander(self.read(), name, read=self.read)
                stack.push_async_callback(commander.store.close)
                app = controller_app(commander, (), CollectorRegistry())
                server = Server(uvicorn.Config(app, ws="none", log_level="warning"))
                commander.url = await stack.enter_async_context(server.at_port())
                self.commanders.append(commander)
                task = await stack.enter_async_context(running(commander.run()))
                if name == "one":
                    self.leads = task
                    await until(lambda: self.commanders[0].term is not None, "the first leads")
            self.gateway = gateway = build_gateway(self.read(), "g")
            stack.push_async_callback(gateway.store.close)
            stack.push_async_callback(gateway.probe.close)
            await stack.enter_async_context(running(gateway.replica.run()))
            routes = admin_relay(lambda: gateway.replica.controller_url)
            self.url = await stack.enter_async_context(Server(gateway_config(gateway.services, 1, routes)).at_port())
            await self.serves()
            await scenario(self)

    def all_ready(self) -> bool:
        instances = self.gateway.deployment.instances.values()
        return len(instances) == 2 and all(i.state is InstanceState.READY for i in instances)

    async def serves(self) -> None:
        """The gateway knows the leader and two instances, and a request is answered."""
        await until(lambda: self.all_ready() and self.gateway.replica.controller_url != "", "a cluster to route to")
        async with httpx.AsyncClient(timeout=30) as client:
            body = {"model": "llama", "prompt": "why", "max_tokens": 4, "ignore_eos": True}
            answer = await client.post(f"{self.url}/v1/completions", json=body)
        assert answer.status_code == 200
        assert "x-dynamollm-class" in answer.headers
        assert "x-dynamollm-energy-mj" not in answer.headers, "who meters is elsewhere"

    async def reload(self) -> str:
        return await asyncio.to_thread(follow, self.url)

    async def policy(self) -> str:
        async with httpx.AsyncClient(timeout=30) as client:
            told: str = (await client.get(f"{self.url}/admin/status")).json()["policy"]
            return told


def test_the_leader_follows_it_gateways_price_by_it_and_the_next_leader_begins_with_it(tmp_path):
    async def scenario(site: Site) -> None:
        one, other = site.commanders
        assert one.term is not None
        site.write(
            models=[{"name": "llama", "profile": OTHER_PROFILE}],
            controller={"policy": "scale-inst", "warm_up_s": 600.0},
        )
        assert await site.reload() == "changed: models[0].profile, controller\n"
        assert await site.policy() == "scale-inst"
        await until(lambda: site.gateway.deployment.profiles["llama"].name == OTHER_PROFILE, "the gateway's prices")
        ticks = one.term.control.ticks
        await until(lambda: one.term is not None and one.term.control.ticks > ticks, "the new controller to decide")
        assert await site.reload() == "changed: nothing\n"
        await site.serves()

        # what needs a restart is refused through the gateway, and by a standby everything
        site.write(limits={"queue_requests": 7})
        assert "limits: cannot change while it runs" in await site.reload()
        async with httpx.AsyncClient(timeout=30) as client:
            refused = await client.post(f"{other.url}/admin/reload")
        assert (refused.status_code, refused.json()["error"]["type"]) == (503, "not_leading")
        assert one.term.deployment.settings.limits == site.gateway.settings.limits

        # the standby has seen none of it, and begins with the configuration as it then is
        site.write(limits={}, controller={"policy": "static", "warm_up_s": 7.0})
        site.leads.cancel()
        await until(lambda: other.term is not None, "the other to lead")
        await until(lambda: site.gateway.replica.controller_url == other.url, "the gateway to hear of it")
        assert other.term is not None
        assert other.term.deployment.settings == site.read()
        assert other.term.deployment.profiles["llama"].name == OTHER_PROFILE
        assert await site.policy() == "static"
        await site.serves()

    asyncio.run(Site(tmp_path).play(scenario))


# --- the parts ------------------------------------------------------------------------------------------------------


def refuse(settings: Settings) -> None:
    if settings.controller.dwell_s == 1.0:
        raise UserError("one second is not enough")


def read_none() -> Settings:
    raise UserError("cluster.yaml: no such file")


def test_a_term_begins_with_the_configuration_as_it_is_unless_it_cannot_be_followed(caplog):
    before = load(None, {})
    other = dataclasses.replace(before, controller=ControllerSettings("static"))
    assert as_it_is_now(before, lambda: other, refuse) is other
    assert not caplog.records
    unusable = dataclasses.replace(before, controller=ControllerSettings(dwell_s=1.0))
    for read, why in (
        (lambda: dataclasses.replace(other, pools=before.pools[:-1]), "pools: cannot change"),
        (lambda: unusable, "one second is not enough"),
        (read_none, "no such file"),
    ):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert as_it_is_now(before, read, refuse) is before
        assert why in caplog.text


@pytest.mark.parametrize("read", [None, lambda: load(None, {})])
def test_without_a_file_to_read_a_controller_keeps_what_it_was_given(read):
    settings = load(None, {"DYNAMOLLM_CONTROLLER__POLICY": "static"})
    commander = build_commander(settings, "c", read=read)

    async def main() -> ControllerTerm:
        return await commander._begin(1)

    term = asyncio.run(main())
    assert term.deployment.settings == (settings if read is None else load(None, {}))
    assert term.reload() == []
