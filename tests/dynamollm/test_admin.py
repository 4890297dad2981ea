"""The operator's view: status and decisions as JSON, as a table, as text."""

import asyncio
import dataclasses

import httpx
import numpy as np
import pytest
from click.testing import CliRunner
from fastapi import FastAPI
from fastapi.testclient import TestClient
from rich.console import Console

from dynamollm.adapters import admin_client
from dynamollm.adapters.configuration import load
from dynamollm.admin import admin_routes
from dynamollm.cli import group
from dynamollm.commands.explain import lines_of, sentence_of
from dynamollm.commands.status import instances_table
from dynamollm.control_loop import TickRecord
from dynamollm.errors import UserError
from dynamollm.operations import OperationRecord, Outcome
from dynamollm.settings import ControllerSettings
from dynamollm.wiring import build
from energy.dcgm import read_dcgm
from energy.gpu import GpuReading
from pools.instances import Instance, InstanceState
from solver.control import (
    Diagnostic,
    Escalate,
    Escalation,
    Park,
    Reassign,
    Reshard,
    Route,
    ScaleIn,
    ScaleOut,
    SetFrequency,
    Wake,
)

START = ScaleOut(deadline_s=9.0, plan=(1, 2), instance_id="LL-1-0", pool="LL", tp=4, sm_clock_mhz=1200, node="h100-0")
ACTIONS = (
    START,
    ScaleIn(deadline_s=9.0, instance_id="ss-1"),
    Reshard(deadline_s=9.0, retire=("ll-1",), create=(START,)),
    Reassign(deadline_s=9.0, instance_id="ss-1", pool="SM"),
    SetFrequency(deadline_s=9.0, instance_id="ss-1", sm_clock_mhz=800, why="pool at 0.10 of capacity"),
    Park(deadline_s=9.0, instance_id="ss-1", sm_clock_mhz=345),
    Wake(deadline_s=9.0, instance_id="ss-1", sm_clock_mhz=1980),
    Route(deadline_s=9.0, pools=("SS", "LL"), pool_share=np.array([[0.25, 0.75], [0.0, 1.0]])),
    Escalate(deadline_s=9.0, instance_id="ss-1", measure=Escalation.RESTEER),
)


@pytest.fixture
def application():
    settings = load(None, {})
    application = build(dataclasses.replace(settings, controller=ControllerSettings("static")), clock=lambda: 100.0)
    deployment = application.deployment
    for spec in deployment.configured()[:2]:
        deployment.put(
            Instance(spec.id, spec.pool, spec.shape, "http://h:1", InstanceState.READY, spec.sm_clock_mhz, spec.gpus)
        )
    application.control.decisions.append(
        TickRecord(90.0, 0.05, ACTIONS, (Diagnostic("plan", "it pays", {"gap": 0.001, "solve_s": float("nan")}),))
    )
    application.operations.records.append(OperationRecord(START, Outcome.ABANDONED, 91.0, 95.0, "no GPU free"))
    return application


@pytest.fixture
def client(application):
    app = FastAPI()
    app.include_router(admin_routes(lambda: application), prefix="/admin")
    return TestClient(app)


def test_status_tells_every_instance_and_what_is_free(client):
    status = client.get("/admin/status").json()
    assert [i["id"] for i in status["instances"]] == ["ss-1", "sm-1"]
    first = status["instances"][0]
    assert (first["state"], first["tp"], first["in_flight"]) == ("ready", 2, 0)
    assert first["slo_slack"] is None
    assert status["gpus"] == 32
    assert status["policy"] == "static"
    assert len(status["pools"]) == 9


def test_gpus_are_told_under_dcgm_names(application, client):
    class Meter:
        async def read(self):
            return [GpuReading("h100-0", 0, "GPU-0", "H100-SXM", 1200, 300.0, 42.0, 50.0)]

        async def close(self):
            pass

    assert client.get("/admin/gpus/metrics").text.strip() == ""
    application.metering._meter = Meter()
    asyncio.run(application.metering.once())
    told = client.get("/admin/gpus/metrics")
    assert told.headers["content-type"].startswith("text/plain")
    (reading,) = read_dcgm(told.text)
    assert (reading.energy_j, reading.power_w, reading.instance_id) == (42.0, 300.0, "")


def test_decisions_tell_why_what_and_what_became_of_it(client):
    told = client.get("/admin/decisions?last=5").json()
    tick = told["ticks"][0]
    assert (tick["ago_s"], tick["took_s"]) == (10.0, 0.05)
    assert tick["why"] == [{"topic": "plan", "why": "it pays", "numbers": {"gap": 0.001, "solve_s": None}}]
    assert [action["kind"] for action in tick["actions"]] == [type(action).__name__ for action in ACTIONS]
    assert told["operations"][0]["outcome"] == "abandoned"
    assert told["operations"][0]["reason"] == "no GPU free"


def test_every_action_reads_as_a_sentence(client):
    tick = client.get("/admin/decisions").json()["ticks"][0]
    assert [sentence_of(action) for action in tick["actions"]] == [
        "start LL-1-0 in pool LL: TP4 at 1200 MHz on h100-0",
        "drain and stop ss-1",
        "re-shard ll-1 into LL-1-0 (TP4)",
        "move ss-1 to pool SM",
        "clock ss-1 at 800 MHz: pool at 0.10 of capacity",
        "park ss-1",
        "wake ss-1 at 1980 MHz",
        "route SS 0.25, LL 1.75",
        "escalate ss-1: resteer",
    ]


def test_the_text_of_explain_has_reasons_and_failures(client):
    text = "\n".join(lines_of(client.get("/admin/decisions").json()))
    assert "plan: it pays [dim]gap 0.001[/dim]" in text
    assert "Not carried out" in text
    assert "abandoned, no GPU free" in text
    assert lines_of({"ticks": [], "operations": []}) == ["nothing has been decided yet"]


def test_the_table_of_status_names_every_pool(client):
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        console.print(instances_table(client.get("/admin/status").json()))
    text = console.export_text()
    assert "ss-1" in text
    assert text.count("none") == 7


@pytest.mark.parametrize("command", ["status", "explain"])
def test_the_commands_print_what_a_gateway_answers(client, monkeypatch, command):
    def get(url: str, params: dict[str, int], headers: dict[str, str], **_: object) -> httpx.Response:
        assert headers == {"authorization": "Bearer k"}
        return client.get(url.removeprefix("http://gateway"), params=params)

    monkeypatch.setattr(admin_client.httpx, "get", get)
    for extra in ([], ["--json"]):
        result = CliRunner().invoke(group, [command, "--url", "http://gateway/v1", "--api-key", "k", *extra])
        assert result.exit_code == 0, result.output
        assert "ss-1" in result.output


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (httpx.Response(401), "wants an API key"),
        (httpx.Response(404), "is it a dynamollm gateway"),
        (httpx.ConnectError("refused"), "is a gateway running there"),
    ],
)
def test_a_gateway_that_does_not_answer_is_told_in_a_sentence(monkeypatch, answer, told):
    def get(*_: object, **__: object) -> httpx.Response:
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(admin_client.httpx, "get", get)
    with pytest.raises(UserError, match=told):
        admin_client.fetch("http://h", "status", None)
