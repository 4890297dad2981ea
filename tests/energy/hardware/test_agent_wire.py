"""The agent over real sockets: tokens, errors by name, zeusd's shapes; and its client on the emulator's agent."""

import json
import subprocess
import sys

import httpx
import pytest
from agents import agent_command, started
from nvml_stub import GPU_IS_LOST, NO_PERMISSION, NOT_SUPPORTED
from prometheus_client.parser import text_string_to_metric_families

from energy.adapters.agent_client import AgentClient
from energy.gpu import (
    ClockDwellError,
    ClockLock,
    ClockRangeError,
    GpuAgentError,
    GpuLostError,
    GpuPermissionError,
    GpuUnsupportedError,
    NoSuchGpuError,
)

SLOW = ClockLock(900, 900)


@pytest.fixture
def tcp(machine, tmp_path):
    (tmp_path / "token").write_text("s3cret\n")
    arguments = ("--port", "0", "--token-file", str(tmp_path / "token"), "--node", "node-7", "--dwell", "30")
    with started(agent_command(machine, tmp_path, *arguments), machine) as (_, address):
        yield machine, address


def test_over_tcp_it_asks_for_its_token(tcp):
    _, address = tcp
    for token in (None, "wrong", "s3crets"):
        with AgentClient(address, "test", token) as client, pytest.raises(GpuAgentError, match="token is wrong"):
            client.lock((0,), SLOW)
    assert httpx.post(f"{address}/gpu/reset_gpu_locked_clocks", params={"gpu_ids": "0"}).status_code == 401
    with AgentClient(address, "test", "s3cret") as client:
        assert [reading.node for reading in client.readings()] == ["node-7"] * 4


def test_health_and_metrics_are_open_to_whoever_scrapes(tcp):
    _, address = tcp
    assert httpx.get(f"{address}/health").status_code == 200
    assert "DCGM_FI_DEV_POWER_USAGE" in httpx.get(f"{address}/metrics").text


def test_errors_come_back_by_name(tcp):
    machine, address = tcp
    with AgentClient(address, "test", "s3cret") as client:
        with pytest.raises(NoSuchGpuError, match=r"no such GPU: 9; this agent's scope is 0, 1, 2, 3"):
            client.lock((9,), SLOW)
        with pytest.raises(ClockRangeError, match=r"900\.\.300 MHz is not a range"):
            client.lock((0,), ClockLock(900, 300))
        client.lock((0,), ClockLock(1500, 1500))
        with pytest.raises(ClockDwellError, match="may be lowered every 30 s") as dwell:
            client.lock((0,), SLOW)
        assert 0.0 < dwell.value.retry_after_s <= 30.0
        for number, error in (
            (NO_PERMISSION, GpuPermissionError),
            (GPU_IS_LOST, GpuLostError),
            (NOT_SUPPORTED, GpuUnsupportedError),
        ):
            machine.gpus[1].write_error = number
            with pytest.raises(error, match="GPU 1"):
                client.lock((1,), SLOW)
        machine.gpus[2].read_error = GPU_IS_LOST
        assert [reading.index for reading in client.readings()] == [0, 1, 3]
    with AgentClient("http://127.0.0.1:1", "test") as nobody, pytest.raises(GpuAgentError, match="ConnectError"):
        nobody.readings()


def test_it_speaks_as_zeusd_does_and_measures_itself(tcp):
    machine, address = tcp
    with httpx.Client(base_url=address, headers={"authorization": "Bearer s3cret"}) as http:
        query = {"gpu_ids": "0,2", "min_clock_mhz": "600", "max_clock_mhz": "1207", "block": "true"}
        answer = http.post("/gpu/set_gpu_locked_clocks", params=query)
        assert (answer.status_code, answer.content) == (200, b"")
        assert machine.locks == [(600, 1200), (0, 0), (600, 1200), (0, 0)]
        assert http.get("/gpu/get_cumulative_energy", params={"gpu_ids": "2"}).json() == {"2": {"energy_mj": 5_000_000}}
        power = http.get("/gpu/get_power").json()
        assert power["power_mw"] == {str(index): 121_700 for index in range(4)}
        told = http.get("/gpu/get_locked_clocks").json()["0"]
        assert (told["min_clock_mhz"], told["max_clock_mhz"], told["holder"]) == (600, 1200, "anybody")
        assert 0.0 < told["expires_in_s"] <= 30.0
        for path in ("/gpu/reset_locked_clocks", "/gpu/reset_gpu_locked_clocks"):
            assert http.post(path, params={"gpu_ids": "0,2"}).status_code == 200
        assert machine.locks == [(0, 0)] * 4
        for bad in ({"gpu_ids": "x"}, {"gpu_ids": "0", "min_clock_mhz": "fast", "max_clock_mhz": "1"}, {}):
            assert http.post("/gpu/set_gpu_locked_clocks", params=bad).status_code == 400
        bad_lease = {**query, "lease_s": "nan"}
        assert "lease_s must be seconds" in http.post("/gpu/set_gpu_locked_clocks", params=bad_lease).json()["error"]
        assert http.get("/gpu/elsewhere").status_code == 404
        families = {f.name: f for f in text_string_to_metric_families(http.get("/metrics").text)}
        calls = {
            s.labels["call"]: s.value for s in families["dynamollm_gpu_call_seconds"].samples if "_count" in s.name
        }
        assert (calls["lock_clocks"], calls["reset_clocks"]) == (2, 4)
        assert families["dynamollm_agent_locked_gpus"].samples[0].value == 0


def test_the_client_works_on_the_emulators_agent_which_has_no_leases():
    command = [sys.executable, "-m", "simulator.emulator", "--node", "node-0=4xH100-SXM", "--watch-stdin"]
    emulator = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        address = json.loads(emulator.stdout.readline())["agent_urls"]["node-0"]
        with AgentClient(address, "test") as client:
            gpu = client.gpus()[1]
            gpu.lock_sm_clocks(ClockLock(1200, 1200))
            assert gpu.sm_clock_mhz() == 1200
            assert gpu.locked_sm_clocks_mhz() == ClockLock(1200, 1200)
            assert gpu.supported_sm_clocks_mhz() == ()
            assert client.renew() == ()
            gpu.reset_sm_clocks()
            assert (gpu.sm_clock_mhz(), gpu.locked_sm_clocks_mhz()) == (1980, None)
            assert gpu.power_w() > 50.0
            with pytest.raises(NoSuchGpuError):
                client.lock((7,), SLOW)
    finally:
        emulator.stdin.close()
        emulator.wait(timeout=10.0)
        emulator.stdout.close()


def test_beyond_loopback_it_wants_a_token(machine, tmp_path):
    command = agent_command(machine, tmp_path, "--host", "0.0.0.0")
    refused = subprocess.run(command, env=machine.environment, capture_output=True, text=True)
    assert refused.returncode == 2
    assert "--host 0.0.0.0 is reachable from elsewhere" in refused.stderr
