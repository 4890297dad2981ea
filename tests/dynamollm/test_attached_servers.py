"""`driver.urls_file`: what the file may say, and a gateway that follows it, over real sockets and emulated servers."""

import dataclasses
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import openai
import pytest
import yaml
from test_emulate_command import emulate, read_until
from test_serve import start

from dynamollm.adapters.configuration import load
from dynamollm.attach_wiring import build_attach_driver, parse_servers
from dynamollm.errors import UserError
from dynamollm.settings import ControllerSettings, Settings, VllmSettings
from dynamollm.validation import ConfigurationError
from energy.adapters.catalogue import load_profile
from pools.drivers.attached import AttachedServer
from pools.instances import GpuSlot, InstanceShape

LOADED_MACHINE_S = 90.0  # a bound on a hang: a controller of its own process begins in seconds
PROFILE = "llama-3.1-70b-fp8-h100"
TREE = {
    "models": [{"name": "tiny", "profile": PROFILE}],
    "nodes": [{"name": "node-0", "gpus": 8}],
    "pools": [
        {"name": "SM", "model": "tiny", "request_class": "SM", "tp": 4},
        {"name": "LL", "model": "tiny", "request_class": "LL", "tp": 2, "sm_clock_mhz": 1200},
    ],
    "controller": {"policy": "static"},
}


def settings(tmp_path: Path, text: str = "") -> Settings:
    servers, config = tmp_path / "servers.yaml", tmp_path / "cluster.yaml"
    servers.write_text(text)
    config.write_text(yaml.safe_dump({**TREE, "driver": {"kind": "attach", "urls_file": str(servers)}}))
    return load(config, {})


def parsed(tmp_path: Path, text: str) -> tuple[AttachedServer, ...]:
    return parse_servers(text, "servers.yaml", settings(tmp_path), {"tiny": load_profile(PROFILE)})


def test_shape_gpus_and_clock_come_from_the_entry_its_pool_and_the_profile(tmp_path):
    text = """
    SM: [{url: "http://a:1/"}]
    LL:
      - {url: "http://b:1", node: node-0, gpus: [4, 5, 6, 7]}
      - {url: "http://c:1", tp: 8}
    """
    top_mhz = load_profile(PROFILE).sm_clocks_mhz[-1]
    slots = tuple(GpuSlot("node-0", index) for index in (4, 5, 6, 7))
    assert parsed(tmp_path, text) == (
        AttachedServer("SM", InstanceShape("tiny", "H100-SXM", 4), "http://a:1", top_mhz),
        AttachedServer("LL", InstanceShape("tiny", "H100-SXM", 4), "http://b:1", 1200, slots),
        AttachedServer("LL", InstanceShape("tiny", "H100-SXM", 8), "http://c:1", 1200),
    )
    assert parsed(tmp_path, "{}") == ()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("LL: [", "servers.yaml: 1 problem(s)\n  line 1, column 6: "),
        ("LL: []\nLL: []", "line 2, column 1: key 'LL' is given twice"),
        ("LL: \x00", "servers.yaml: 1 problem(s)\n  unacceptable character #x0000"),
        ("# none\n", "servers.yaml: 1 problem(s)\n  is empty; write {} where there shall be no server"),
        ("- http://a", "must hold servers by pool name, not a list"),
        ("xyz: []", "xyz: no such pool; there are SM, LL"),
        ("LL: [{ur: 'http://a'}]", "LL[0].ur: unknown key; did you mean url?"),
        ("LL: [{tp: 2}]", "LL[0].url: is required and not given"),
        ("LL: ['http://a']", "LL[0]: input should be"),
        ("LL: [{url: 'https://a'}]", "LL[0].url: must begin with http://; found 'https://a'"),
        ("LL: [{url: 'http://a'}]\nSM: [{url: 'http://a/'}]", "SM[0].url: http://a/ is already LL[0]"),
        ("LL: [{url: 'http://a', tp: 3}]", "LL[0].tp: input should be 1, 2, 4"),
        ("LL: [{url: 'http://a', tp: 1}]", "LL[0].tp: profile llama-3.1-70b-fp8-h100 holds for TP 2, 4, 8, not 1"),
        ("LL: [{url: 'http://a', node: node-0}]", "LL[0].gpus: a node needs the indices of its GPUs"),
        ("LL: [{url: 'http://a', gpus: [0, 1]}]", "LL[0].gpus: a node needs the indices of its GPUs, and they need"),
        ("LL: [{url: 'http://a', node: x, gpus: [0, 1]}]", "LL[0].node: 'x' is not among nodes: node-0"),
        ("LL: [{url: 'http://a', node: node-0, gpus: [7, 8]}]", "LL[0].gpus: node node-0 has 8 GPUs, from 0; found 8"),
        ("LL: [{url: 'http://a', node: node-0, gpus: [1, 1]}]", "LL[0].gpus: one is named twice"),
        ("LL: [{url: 'http://a', node: node-0, gpus: [0, 1, 2]}]", "LL[0].gpus: tensor parallelism is over 1, 2, 4"),
        ("LL: [{url: 'http://a', tp: 4, node: node-0, gpus: [0, 1]}]", "LL[0].tp: 4, but 2 GPUs are named"),
        (
            "LL: [{url: 'http://a', node: node-0, gpus: [0, 1]}, {url: 'http://b', node: node-0, gpus: [1, 2]}]",
            "LL[1].gpus: GPU 1 of node-0 is already LL[0]'s",
        ),
    ],
)
def test_what_is_wrong_is_said_by_line_or_key(tmp_path, text, problem):
    with pytest.raises(ConfigurationError) as caught:
        parsed(tmp_path, text)
    assert problem in str(caught.value)


def test_a_gateway_does_not_start_on_a_file_it_cannot_use(tmp_path):
    given = settings(tmp_path, "LL: [{url: a}]")
    with pytest.raises(UserError, match=r"driver.urls_file: .*servers.yaml: 1 problem.*\n.*LL\[0\].url: must begin"):
        build_attach_driver(given)
    (tmp_path / "servers.yaml").unlink()
    with pytest.raises(UserError, match=r"driver.urls_file: .*servers.yaml: No such file"):
        build_attach_driver(given)


# --- a gateway before emulated servers -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def emulated() -> Iterator[tuple[list[str], str]]:
    """Two servers of two GPUs each on node-0, and their node's agent."""
    with emulate("--instances", "2", "--tp", "2", "--port", "0", "--model", "tiny") as process:
        said = read_until(process, "control")
        yield re.findall(r"(http://[\d.]+:\d+)/v1", said), re.findall(r"(http://\S+)/metrics", said)[0]


def until(condition: Callable[[], bool], within_s: float = 20.0) -> None:
    """Another process's progress has no event to await."""
    began_s = time.monotonic()
    while not condition():
        assert time.monotonic() - began_s < within_s
        time.sleep(0.1)


def clocks_mhz(agent: str) -> list[int]:
    lines = httpx.get(f"{agent}/metrics").text.splitlines()
    return [int(float(line.rsplit(" ", 1)[1])) for line in lines if line.startswith("DCGM_FI_DEV_SM_CLOCK{")]


def test_a_gateway_follows_the_file_and_sets_the_clocks_it_may(tmp_path, emulated):
    (one, other), agent = emulated
    entries = [{"url": url, "node": "node-0", "gpus": gpus} for url, gpus in ((one, [0, 1]), (other, [2, 3]))]
    servers = tmp_path / "servers.yaml"

    def write(*listed: dict) -> None:
        (tmp_path / "next").write_text(yaml.safe_dump({"LL": list(listed)}))
        (tmp_path / "next").replace(servers)

    write(entries[0])
    driver = {"kind": "attach", "urls_file": str(servers), "vllm": {"agents": {"node-0": agent}}}
    free_mhz = clocks_mhz(agent)[0]
    process, url = start(tmp_path, {**TREE, "driver": driver})

    def states() -> dict[str, str]:
        instances = httpx.get(f"{url}/admin/status").json()["instances"]
        return {instance["url"]: instance["state"] for instance in instances}

    def answered_by() -> str:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        words = [{"role": "user", "content": "Hello"}]
        answer = client.chat.completions.with_raw_response.create(model="tiny", messages=words, max_tokens=4)
        return answer.headers["x-dynamollm-instance"]

    try:
        assert states() == {one: "ready"}
        assert clocks_mhz(agent)[:4] == [1200, 1200, free_mhz, free_mhz]
        assert answered_by() == "ll-1"
        write(*entries)
        until(lambda: states() == {one: "ready", other: "ready"})
        assert clocks_mhz(agent)[:4] == [1200] * 4
        servers.write_text("LL: [{url: 7}]")  # wrong: all stays as it was
        time.sleep(3.0)
        assert states() == {one: "ready", other: "ready"}
        write(entries[1])
        until(lambda: states() == {other: "ready"})
        assert clocks_mhz(agent)[:4] == [free_mhz, free_mhz, 1200, 1200]
        assert {answered_by() for _ in range(3)} == {"ll-2"}
        assert httpx.get(f"{one}/v1/models").status_code == 200  # it runs on: it is somebody else's
    finally:
        process.send_signal(signal.SIGINT)
        said = process.stderr.read()
        assert process.wait(timeout=20) == 0
    assert "LL[0].url: input should be a valid string; found 7" in said
    assert clocks_mhz(agent)[:4] == [free_mhz] * 4


def test_under_scale_freq_every_server_must_tell_its_gpus(tmp_path):
    given = dataclasses.replace(settings(tmp_path), controller=ControllerSettings("scale-freq"))
    text = "LL: [{url: 'http://a', node: node-0, gpus: [0, 1]}, {url: 'http://b'}]"
    with pytest.raises(ConfigurationError) as caught:
        parse_servers(text, "servers.yaml", given, {"tiny": load_profile(PROFILE)})
    assert str(caught.value).count("policy scale-freq sets its clock") == 2
    vllm = VllmSettings(agents={"node-0": "unix:/agent"})
    given = dataclasses.replace(given, driver=dataclasses.replace(given.driver, vllm=vllm))
    with pytest.raises(ConfigurationError, match=r"LL\[1\]: policy scale-freq sets its clock: tell its node and gpus"):
        parse_servers(text, "servers.yaml", given, {"tiny": load_profile(PROFILE)})


def test_scale_freq_turns_the_clocks_of_attached_servers_and_orders_nothing_else(tmp_path, emulated):
    (one, other), agent = emulated
    servers = tmp_path / "servers.yaml"
    entries = [{"url": url, "node": "node-0", "gpus": gpus} for url, gpus in ((one, [0, 1]), (other, [2, 3]))]
    servers.write_text(yaml.safe_dump({"LL": entries}))
    driver = {"kind": "attach", "urls_file": str(servers), "vllm": {"agents": {"node-0": agent}}}
    free_mhz = clocks_mhz(agent)[0]
    process, url = start(tmp_path, {**TREE, "driver": driver, "controller": {"policy": "scale-freq"}})
    try:
        # nothing to do: from their pool's clock to the knee of the capacity table, 1,400 MHz, as the board has it
        until(lambda: clocks_mhz(agent)[:4] == [1395] * 4, LOADED_MACHINE_S)
        told = httpx.get(f"{url}/admin/decisions", params={"last": 500}).json()
        assert {operation["action"]["kind"] for operation in told["operations"]} == {"SetFrequency"}
        assert {operation["outcome"] for operation in told["operations"]} <= {"done", "superseded"}
    finally:
        process.send_signal(signal.SIGINT)
        said = process.stderr.read()
        assert process.wait(timeout=20) == 0
    assert "refused" not in said
    assert clocks_mhz(agent)[:4] == [free_mhz] * 4
