"""Another policy, other settings, another profile while it serves: over real sockets, under load, nothing is lost."""

import asyncio
import contextlib
import dataclasses
import json
import signal
import time

import httpx
import pytest
import yaml
from click.testing import CliRunner
from test_serve import CLUSTER, start

from dynamollm.adapters.configuration import load
from dynamollm.cli import group
from dynamollm.control_loop import ControlLoop, StaticController
from dynamollm.deployment import Deployment
from dynamollm.errors import UserError
from dynamollm.reload import Reload, restart_needed
from dynamollm.settings import ControllerSettings
from dynamollm.wiring import load_profiles
from simulator.virtual_loop import run
from solver.control import Effects, Level, Observation, ScaleIn, Tick

BUSY = {**CLUSTER, "controller": {"policy": "dynamollm", "warm_up_s": 1.0}}
OTHER_PROFILE = "llama-2-70b-h100"


class Load:
    """Streams of some seconds, one after another on several connections, until told to end."""

    def __init__(self, url: str, streams: int = 12) -> None:
        self.url, self.streams = url, streams
        self.answers: list[tuple[int, int]] = []  # status, tokens
        self.ending = False

    async def run(self) -> None:
        async with httpx.AsyncClient(timeout=60) as client:
            await asyncio.gather(*(self._stream(client) for _ in range(self.streams)))

    async def _stream(self, client: httpx.AsyncClient) -> None:
        body = {"model": "llama", "prompt": "word " * 60, "max_tokens": 40, "ignore_eos": True, "stream": True}
        body["stream_options"] = {"include_usage": True}
        while not self.ending:
            tokens = 0
            async with client.stream("POST", f"{self.url}/v1/completions", json=body) as answer:
                async for line in answer.aiter_lines():
                    if '"usage":{' in line.replace(" ", ""):
                        tokens = json.loads(line[6:])["usage"]["completion_tokens"]
                self.answers.append((answer.status_code, tokens))


def follow(url: str) -> str:
    result = CliRunner().invoke(group, ["reload", "--url", url], catch_exceptions=True)
    return result.output if result.exception is None else str(result.exception)


async def told(url: str, key: str, value: object) -> None:
    """Until status says so."""
    async with httpx.AsyncClient(timeout=30) as client:
        for _ in range(200):
            if (await client.get(f"{url}/admin/status")).json()[key] == value:
                return
            await asyncio.sleep(0.1)
    raise AssertionError(f"status never said {key} = {value}")


def test_policy_configuration_and_profile_change_under_load_and_no_request_is_lost(tmp_path):
    process, url = start(tmp_path, BUSY)
    config = tmp_path / "cluster.yaml"

    async def scenario() -> Load:
        load = Load(url)
        running = asyncio.create_task(load.run())
        await asyncio.sleep(2.0)
        config.write_text(yaml.safe_dump({**BUSY, "controller": {"policy": "scale-inst", "warm_up_s": 1.0}}))
        assert await asyncio.to_thread(follow, url) == "changed: controller\n"
        await told(url, "policy", "scale-inst")
        await asyncio.sleep(2.0)
        swapped = {**BUSY, "models": [{"name": "llama", "profile": OTHER_PROFILE}], "controller": {"policy": "static"}}
        config.write_text(yaml.safe_dump(swapped))
        process.send_signal(signal.SIGHUP)
        await told(url, "policy", "static")
        assert await asyncio.to_thread(follow, url) == "changed: nothing\n"
        await asyncio.sleep(1.0)
        config.write_text(yaml.safe_dump({**swapped, "limits": {"queue_requests": 7}, "driver": {"kind": "attach"}}))
        refused = await asyncio.to_thread(follow, url)
        config.write_text(yaml.safe_dump({**swapped, "limits": {"queue_requests": 7}}))
        assert "limits: cannot change while it runs" in await asyncio.to_thread(follow, url)
        assert "changed" not in refused
        config.write_text(yaml.safe_dump(BUSY))
        assert await asyncio.to_thread(follow, url) == "changed: models[0].profile, controller\n"
        await asyncio.sleep(2.0)
        load.ending = True
        await running
        return load

    try:
        load = asyncio.run(scenario())
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 0
    assert len(load.answers) >= 2 * load.streams
    assert {status for status, _ in load.answers} == {200}
    assert {tokens for _, tokens in load.answers} == {40}, "every answer is whole"


# --- the parts ------------------------------------------------------------------------------------------------------


class Ticking:
    """Ticks every ten seconds; its answer may take some."""

    def __init__(self, name: str, takes_s: float = 0.0) -> None:
        self.name, self.takes_s = name, takes_s
        self.closed = False

    async def first_tick(self, now_s: float) -> Tick:
        return Tick(now_s, Level.JOINT)

    async def on_tick(self, tick: Tick, seen: Observation) -> Effects:
        await asyncio.sleep(self.takes_s)
        return Effects((ScaleIn(deadline_s=1.0, instance_id=self.name),), Tick(tick.at_s + 10.0, Level.JOINT))

    async def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize(("takes_s", "applied"), [(0.0, ["a", "a", "b", "b"]), (5.0, ["a", "b"])])
def test_another_controller_decides_at_once_and_the_last_answer_of_the_other_is_dropped(takes_s, applied):
    first, second = Ticking("a", takes_s), Ticking("b")
    done: list[str] = []

    async def main() -> None:
        clock = asyncio.get_running_loop().time
        loop = ControlLoop(
            first, lambda now_s: None, lambda actions: done.extend(a.instance_id for a in actions), clock
        )
        task = asyncio.create_task(loop.run())
        await asyncio.sleep(17.0 if takes_s == 0.0 else 16.0)
        loop.switch(second)
        await asyncio.sleep(11.0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await loop.close()

    run(main())
    assert done == applied
    assert first.closed
    assert second.closed


def test_what_needs_a_restart_is_named():
    settings = load(None, {})
    assert restart_needed(settings, settings) == []
    other = dataclasses.replace(settings, controller=ControllerSettings("static"))
    assert restart_needed(settings, other) == []
    assert restart_needed(settings, dataclasses.replace(other, pools=settings.pools[:-1])) == ["pools"]
    assert restart_needed(settings, dataclasses.replace(other, models=settings.models * 2)) == ["models"]
    path = dataclasses.replace(settings.models[0], path="/weights", profile="another")
    assert restart_needed(settings, dataclasses.replace(settings, models=(path,))) == ["models"]


class Plans:
    newest = (4, 17)


def test_a_configuration_that_cannot_be_followed_changes_nothing():
    settings = load(None, {})
    deployment = Deployment(settings, load_profiles(settings))
    made: list[int] = []
    loop = ControlLoop(StaticController(), lambda now_s: None, lambda actions: None, time.monotonic)
    after = [dataclasses.replace(settings, models=(dataclasses.replace(settings.models[0], profile="gpt-9"),))]

    def controller_of(settings, epoch):
        made.append(epoch)
        return StaticController()

    published: list[int] = []
    reload = Reload(
        lambda: after[0], load_profiles, controller_of, deployment, lambda: published.append(1), Plans(), loop
    )
    with contextlib.suppress(UserError):
        reload()
    assert deployment.settings is settings
    assert made == published == []
    after[0] = dataclasses.replace(settings, models=(dataclasses.replace(settings.models[0], profile=OTHER_PROFILE),))
    assert reload() == ["models[0].profile"]
    assert made == [5], "the next controller's plans supersede those before"
    assert published == [1]
    assert deployment.profiles["llama-3.1-70b"].name == OTHER_PROFILE
    assert reload() == []
    assert made == [5]
