"""Predictions against real servers: what is sent, what is compared, and the gateways that benchmarks start."""

import asyncio
import json

import httpx
import numpy as np
import pytest
import yaml
from scripted_server import ScriptedServer, good
from test_predicted_instance import STEP

from benchmarks.adapters import vllm_gateway
from benchmarks.adapters.vllm_gateway import (
    GatewayDownError,
    VllmGateway,
    attached,
    counter_of,
    emulated_devices,
    served,
    vllm_folder,
)
from benchmarks.prediction import predict
from benchmarks.replay import Outcome
from benchmarks.vllm_fidelity import BUSY, closed_loop, latencies_of, new_engine, replayed, workloads
from dynamollm.adapters.configuration import load
from simulator.workload.arrivals import Arrivals, WorkloadError

POOL = {"name": "LL", "request_class": "LL", "tp": 2, "instances": 2}
STATUS = {"instances": [{"pool": "LL", "url": "http://127.0.0.1:1"}, {"pool": "LL", "url": "http://127.0.0.1:2"}]}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "vllm").touch()
    monkeypatch.setenv("DYNAMOLLM_VLLM", str(tmp_path))
    return tmp_path


def loaded(configuration, tmp_path):
    path = tmp_path / "gateway.yaml"
    path.write_text(yaml.safe_dump(configuration))
    return load(path, {})


def test_without_vllm_it_is_said_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("DYNAMOLLM_VLLM", str(tmp_path / "none"))
    with pytest.raises(GatewayDownError, match=r"run deploy/vllm-cpu/setup.sh"):
        vllm_folder()


def test_its_configurations_are_valid(folder, monkeypatch):
    own = emulated_devices([POOL], 4, routing={"prefix_affinity": False})
    settings = loaded(own, folder)
    assert settings.driver.kind == "vllm-emulated"
    assert settings.driver.vllm.command == str(folder / "bin" / "vllm")
    assert settings.routing.prefix_affinity is False
    monkeypatch.setattr(VllmGateway, "status", lambda _: STATUS)
    beside = loaded(attached(own, VllmGateway(), routing={"prefix_affinity": True}), folder)
    assert beside.driver.kind == "attach"
    assert beside.driver.urls == {"LL": ("http://127.0.0.1:1", "http://127.0.0.1:2")}
    assert beside.routing.prefix_affinity is True
    assert beside.pools == settings.pools


def test_a_counter_is_summed_over_its_labels(monkeypatch):
    page = 'vllm:hits_total{engine="0"} 3.0\nvllm:hits_total{engine="1"} 4.5\nvllm:hits_total_created 9.0\n'
    monkeypatch.setattr(vllm_gateway.httpx, "get", lambda url, timeout: httpx.Response(200, text=page))
    assert counter_of("http://h:1", "hits_total") == 7.5


def test_a_gateway_is_started_and_ended(folder):
    configuration = {**emulated_devices([POOL], 4), "driver": {"kind": "emulator", "startup_s": 0.0}}
    with served(configuration) as gateway:
        assert sorted(gateway.engines) == ["ll-1", "ll-2"]
        assert {instance["state"] for instance in gateway.status()["instances"]} == {"ready"}
        assert gateway.counter("num_requests_running") == 0.0
        seen = asyncio.run(closed_loop(list(gateway.engines.values()), 2, 1, (50, 4)))
        assert len(seen.ttft_s) == 2
    assert gateway.process.returncode == 0


def test_a_gateway_that_cannot_start_says_why(folder):
    configuration = {**emulated_devices([POOL], 4), "pools": []}
    with pytest.raises(GatewayDownError, match="pools"), served(configuration):
        pass


def test_each_client_of_a_closed_loop_warms_up_and_then_counts():
    async def scenario():
        async with ScriptedServer(good).running() as server, ScriptedServer(good).running() as other:
            seen = await closed_loop([server.url, other.url], 3, 4, (40, 5))
            return seen, [call.body for call in server.calls], [call.body for call in other.calls]

    seen, bodies, others = asyncio.run(scenario())
    assert len(seen.ttft_s) == 12
    assert seen.output_tokens == 60
    assert sum(body["max_tokens"] == 5 for body in bodies) == 10  # two of the three clients
    assert sum(body["max_tokens"] == 5 for body in others) == 5


def test_a_replay_keeps_lengths_and_every_latency():
    async def scenario():
        async with ScriptedServer(good).running() as server:
            return await replayed(server.url, Arrivals.of([0.0, 0.01, 0.02], [30, 60, 90], [3, 4, 1]))

    seen = asyncio.run(scenario())
    assert seen.output_tokens == 8
    assert not np.isnan(seen.ttft_s).any()
    assert np.isnan(seen.tbt_s).sum() == 1
    assert set(json.loads(json.dumps(seen.figures()))) == {
        "ttft_p50_s",
        "ttft_p99_s",
        "tbt_mean_s",
        "output_tokens_per_s",
    }


def test_one_failure_spoils_a_comparison():
    with pytest.raises(RuntimeError, match="1 of 2 requests failed: refused"):
        latencies_of([Outcome(0.0, 1.0), Outcome(0.0, 1.0, "refused")])


def test_replayed_loads_keep_the_engine_half_busy():
    try:
        chosen = workloads(20.0, STEP, 500_000)
    except WorkloadError as error:
        pytest.skip(str(error))
    assert set(chosen) == {"poisson", "azure-conv"}
    for arrivals in chosen.values():
        assert arrivals.arrival_s.max() < 20.0
        assert (arrivals.input_tokens + arrivals.output_tokens).max() <= 4096
        busy = predict(new_engine(STEP, 500_000), arrivals).busy_share
        assert BUSY / 2 < busy <= BUSY * 1.1
