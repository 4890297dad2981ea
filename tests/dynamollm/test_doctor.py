import json
import socket
from types import SimpleNamespace

import httpx
import pytest
from click.testing import CliRunner

from dynamollm.adapters.gateway_check import INPUT_TOKENS, LENGTHS, TEXTS, gateway_findings
from dynamollm.adapters.machine import data_finding, nvml_finding, port_finding, redis_finding
from dynamollm.commands.doctor import command
from dynamollm.diagnosis import (
    Finding,
    TokenCount,
    Verdict,
    any_failed,
    cores_finding,
    estimate_finding,
    open_files_finding,
    python_finding,
)


@pytest.mark.parametrize(
    ("finding", "verdict", "says"),
    [
        (python_finding((3, 10, 4), True), Verdict.FAIL, "3.10.4"),
        (python_finding((3, 11, 0), False), Verdict.WARN, "not in a virtual environment"),
        (python_finding((4, 0, 0), True), Verdict.OK, "4.0.0"),
        (cores_finding(1), Verdict.WARN, "1"),
        (cores_finding(2), Verdict.OK, "2"),
        (open_files_finding(1024, 1024), Verdict.WARN, "about 512 streams"),
        (open_files_finding(1024, 1_048_576), Verdict.OK, "up to 1048576"),
        (open_files_finding(-1, -1), Verdict.OK, "no limit"),
        (redis_finding(None), Verdict.NOTE, "no redis-server"),
        (redis_finding("/usr/bin/redis-server"), Verdict.OK, "/usr/bin"),
    ],
)
def test_what_is_found_is_judged(finding, verdict, says):
    assert finding.verdict is verdict
    assert says in finding.found
    assert bool(finding.fix) == (verdict is not Verdict.OK)


def test_the_worst_estimate_is_named():
    good = [TokenCount("English", 101, 100), TokenCount("JSON", 95, 100)]
    finding = estimate_finding(good)
    assert finding.verdict is Verdict.OK
    assert "5.0% at worst (JSON: 95 for 100" in finding.found
    bad = estimate_finding([*good, TokenCount("Chinese", 10, 100)])
    assert bad.verdict is Verdict.WARN
    assert "90.0% at worst (Chinese" in bad.found
    assert "tokenizer_file" in bad.fix


def test_only_a_failure_fails():
    notes = [Finding("a", verdict, "") for verdict in (Verdict.OK, Verdict.NOTE, Verdict.WARN)]
    assert not any_failed(notes)
    assert any_failed([*notes, Finding("b", Verdict.FAIL, "")])


class NvmlError(Exception):
    pass


def nvml(names=(), init=None, device=None):
    """As much of pynvml as is used, with GPUs of these names or these errors."""

    def raise_or(error, value):
        if error is not None:
            raise NvmlError(error)
        return value

    calls = []
    module = SimpleNamespace(
        NVMLError=NvmlError,
        nvmlInit=lambda: raise_or(init, None),
        nvmlShutdown=lambda: calls.append("shutdown"),
        nvmlDeviceGetCount=lambda: len(names),
        nvmlDeviceGetHandleByIndex=lambda index: raise_or(device, index),
        nvmlDeviceGetName=lambda handle: names[handle],
    )
    return module, calls


def test_gpus_are_counted_by_name_and_nvml_is_left_again(monkeypatch):
    module, calls = nvml((b"NVIDIA H100", "NVIDIA H100", "NVIDIA L40S"))
    monkeypatch.setattr("os.geteuid", lambda: 0)
    finding = nvml_finding(module)
    assert finding.verdict is Verdict.OK
    assert finding.found == "2 x NVIDIA H100, 1 x NVIDIA L40S"
    assert calls == ["shutdown"]
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert "agent" in nvml_finding(module).fix


@pytest.mark.parametrize(
    ("set_up", "verdict", "says"),
    [
        ({"init": "Driver Not Loaded"}, Verdict.NOTE, "Driver Not Loaded"),
        ({"names": ("x",), "device": "GPU is lost"}, Verdict.WARN, "GPU is lost"),
        ({}, Verdict.NOTE, "no GPU is"),
    ],
)
def test_a_machine_without_usable_gpus_says_why(set_up, verdict, says):
    finding = nvml_finding(nvml(**set_up)[0])
    assert finding.verdict is verdict
    assert says in finding.found


def test_missing_data_is_named(tmp_path):
    (tmp_path / "traces").mkdir()
    (tmp_path / "traces" / "vidur_arxiv_lengths.csv.gz").write_bytes(b"")
    finding = data_finding({"DYNAMOLLM_DATA": str(tmp_path)})
    assert finding.verdict is Verdict.NOTE
    assert finding.found.startswith("1 of 5")
    assert "AzureLLMInferenceTrace_conv.csv.gz" in finding.fix


def test_a_taken_port_is_a_failure():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        finding = port_finding("127.0.0.1", port)
    assert finding.verdict is Verdict.FAIL
    assert "server.port" in finding.fix


def gateway(health=200, models=("llama",), counted=lambda characters: characters // 4, estimated=True, status=200):
    """A client of a gateway that estimates a quarter of the characters."""

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/health":
            return httpx.Response(health)
        if request.url.path == "/v1/models":
            if models is None:
                return httpx.Response(401, json={"error": "Unauthorized"})
            return httpx.Response(200, json={"data": [{"id": name} for name in models]})
        characters = len(json.loads(request.content)["messages"][0]["content"])
        headers = {INPUT_TOKENS: str(characters // 4)} if estimated else {}
        return httpx.Response(status, json={"usage": {"prompt_tokens": counted(characters)}}, headers=headers)

    return httpx.Client(base_url="http://gateway", transport=httpx.MockTransport(answer))


def found(client):
    with client:
        return {finding.subject: finding for finding in gateway_findings("http://gateway", client)}


def test_a_good_gateway_is_measured():
    findings = found(gateway())
    assert [finding.verdict for finding in findings.values()] == [Verdict.OK] * 3
    assert f"over {len(TEXTS) * len(LENGTHS)} texts" in findings["token estimate"].found
    assert "0.0% at worst" in findings["token estimate"].found


@pytest.mark.parametrize(
    ("client", "subject", "verdict", "says"),
    [
        (gateway(health=503), "gateway", Verdict.FAIL, "answered 503"),
        (gateway(models=None), "models", Verdict.FAIL, "wants a key"),
        (gateway(models=()), "models", Verdict.FAIL, "none is served"),
        (gateway(counted=lambda characters: characters // 2), "token estimate", Verdict.WARN, "50"),
        (gateway(estimated=False), "token estimate", Verdict.NOTE, INPUT_TOKENS),
        (gateway(status=429), "token estimate", Verdict.FAIL, "429"),
    ],
)
def test_what_is_wrong_with_a_gateway_is_said(client, subject, verdict, says):
    finding = found(client)[subject]
    assert finding.verdict is verdict
    assert says in finding.found


def test_nothing_is_sent_to_a_gateway_that_is_not_healthy():
    assert "token estimate" not in found(gateway(health=503))


def test_the_command_tells_everything_and_fails_only_on_failures(tmp_path):
    config = tmp_path / "cluster.yaml"
    config.write_text("models: [{name: m, profile: llama-3.1-70b-fp8-h100}]\nnodes: [{name: n}]\n"
                      "pools: [{name: LL, model: m, request_class: LL, tp: 8}]\nserver: {port: 0}\n")  # fmt: skip
    result = CliRunner().invoke(command, ["--config", str(config), "--json"])
    assert result.exit_code == 0, result.output
    verdicts = {finding["subject"]: finding["verdict"] for finding in json.loads(result.stdout)}
    assert verdicts["configuration"] == "ok"
    assert {"python", "cores", "gpus", "redis", "public data"} <= set(verdicts)


def test_the_command_fails_on_a_wrong_configuration_and_a_missing_gateway(tmp_path):
    config = tmp_path / "cluster.yaml"
    config.write_text("modles: []\n")
    result = CliRunner().invoke(command, ["--config", str(config), "--url", "http://127.0.0.1:1/v1"])
    assert result.exit_code == 1
    assert "modles" in result.output
    assert "cannot be reached" in result.output
