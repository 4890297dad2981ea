"""`dynamollm serve` as a person runs it: a process, real sockets, real emulated instances, Ctrl-C."""

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
import yaml

from dynamollm.adapters.sqlite_store import SqliteStore
from dynamollm.reports import LOAD

CLUSTER = {
    "models": [{"name": "llama", "profile": "llama-3.1-70b-fp8-h100"}],
    "nodes": [{"name": "node", "gpus": 8}],
    "pools": [
        {"name": "SM", "model": "llama", "request_class": "SM", "tp": 2},
        {"name": "LL", "model": "llama", "request_class": "LL", "tp": 4},
    ],
    "driver": {"kind": "emulator", "startup_s": 0.1},
}


def children_of(pid: int) -> list[int]:
    found = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    pairs = [tuple(map(int, line.split())) for line in found.splitlines()]
    return [child for child, parent in pairs if parent == pid]


def start(tmp_path: Path, tree: dict[str, object]) -> tuple[subprocess.Popen[str], str]:
    """Serve on a free port; the process and its URL once the cluster is up."""
    config = tmp_path / "cluster.yaml"
    config.write_text(yaml.safe_dump(tree))
    process = subprocess.Popen(
        [sys.executable, "-m", "dynamollm", "serve", "--config", str(config), "--port", "0"],
        stderr=subprocess.PIPE,
        text=True,
        env={k: v for k, v in os.environ.items() if not k.startswith("DYNAMOLLM_")},
    )
    assert process.stderr is not None
    seen = []
    for line in process.stderr:
        seen.append(line)
        if match := re.search(r"(http://\S+)/v1 is ready", line):
            return process, match[1]
    raise AssertionError("serve ended before it was ready:\n" + "".join(seen))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    process, url = start(tmp_path_factory.mktemp("serve"), CLUSTER)
    yield url
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == 0


def test_the_official_client_streams_through_it(served):
    client = openai.OpenAI(base_url=f"{served}/v1", api_key="none")
    assert [model.id for model in client.models.list()] == ["llama"]
    stream = client.chat.completions.create(
        model="llama",
        messages=[{"role": "user", "content": "Why is the sky blue?"}],
        max_tokens=12,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    chunks = list(stream)
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 12
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices).strip()


def test_a_stream_says_what_it_took_where_it_is_asked_to(served):
    client = openai.OpenAI(base_url=f"{served}/v1", api_key="none")

    def last_chunk(**options: bool):
        chunks = client.completions.create(
            model="llama",
            prompt="Why?",
            max_tokens=150,
            stream=True,
            extra_body={"ignore_eos": True, "stream_options": options},
        )
        return list(chunks)[-1]

    usage = last_chunk(include_energy=True).usage
    assert usage is not None
    assert usage.completion_tokens == 150
    assert usage.energy_mj > 0
    assert not hasattr(last_chunk(include_usage=True).usage, "energy_mj")
    assert last_chunk().usage is None


def test_requests_go_to_the_pool_of_their_class(served):
    def pool_of(text: str, max_tokens: int) -> tuple[str, str]:
        answer = httpx.post(
            f"{served}/v1/completions",
            json={"model": "llama", "prompt": text, "max_tokens": max_tokens, "ignore_eos": True},
            timeout=30,
        )
        assert answer.status_code == 200
        return answer.headers["x-dynamollm-class"], answer.headers["x-dynamollm-pool"]

    assert pool_of("hello", 5) == ("SS", "SM")
    assert pool_of("word " * 1500, 5)[1] == "LL"


def test_health_metrics_and_documentation_answer(served):
    assert httpx.get(f"{served}/health").status_code == 200
    assert "dynamollm_" in httpx.get(f"{served}/metrics").text
    assert "/v1/chat/completions" in httpx.get(f"{served}/openapi.json").json()["paths"]


def test_ctrl_c_leaves_no_process_behind(tmp_path):
    process, url = start(tmp_path, CLUSTER)
    children = children_of(process.pid)
    assert children
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == 0
    alive = [pid for pid in children if Path(f"/proc/{pid}").exists()] if Path("/proc").exists() else []
    assert alive == []
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health")


def test_the_load_that_came_outlives_a_restart_and_a_kill(tmp_path):
    """A gateway that had requests ends; the next one plans for that load at once, though nobody asks it anything."""
    folder = tmp_path / "kept"
    tree: dict[str, object] = {
        **CLUSTER,
        "store": {"kind": "file", "folder": str(folder)},
        "controller": {"warm_up_s": 4.0},
    }
    tree["energy"] = {"counterfactual": False}  # its process has the last of the processor, and the end waits for it
    process, url = start(tmp_path, tree)
    body = {"model": "llama", "prompt": "hello", "max_tokens": 3, "ignore_eos": True}
    for _ in range(30):
        assert httpx.post(f"{url}/v1/completions", json=body, timeout=30).status_code == 200
    until_s = time.monotonic() + 60
    while not planned(url):  # it has seen them
        assert time.monotonic() < until_s
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 0
    before = kept(folder)
    assert 0 < before <= 30  # but for what came after the last look
    process, url = start(tmp_path, tree)
    until_s = time.monotonic() + 60
    while not (forecast := planned(url)):
        assert time.monotonic() < until_s
        time.sleep(0.1)
    assert forecast[0] > 0.0
    process.kill()
    process.wait(timeout=30)
    assert kept(folder) == before  # whole, and nothing of it twice


def planned(url: str) -> list[float]:
    """The mean rate that each plan of a gateway was made for."""
    ticks = httpx.get(f"{url}/admin/decisions", timeout=10).json()["ticks"]
    numbers = [each["numbers"] for tick in ticks for each in tick["why"]]
    return [each["forecast_rps"] for each in numbers if "forecast_rps" in each]


def kept(folder: Path) -> float:
    """Requests in the past load of a store."""

    async def read() -> float:
        store = SqliteStore(folder)
        entries = await store.entries(LOAD)
        await store.close()
        return sum(sum(entry["requests"]) for _, entry in entries)

    return asyncio.run(read())


def test_a_port_in_use_and_a_missing_profile_are_told_in_one_line(tmp_path, served):
    port = served.rpartition(":")[2]
    taken = subprocess.run(
        [sys.executable, "-m", "dynamollm", "serve", "--port", port],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert taken.returncode == 2
    assert taken.stderr.strip().endswith("choose another with --port")
    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump({**CLUSTER, "models": [{"name": "llama", "profile": "gpt-9"}]}))
    missing = subprocess.run(
        [sys.executable, "-m", "dynamollm", "serve", "--config", str(config)],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert missing.returncode == 2
    assert missing.stderr.startswith("dynamollm: models[0].profile: no profile 'gpt-9'")


def test_workers_share_the_port_the_cluster_and_one_page_of_metrics(tmp_path):
    config = tmp_path / "cluster.yaml"
    config.write_text(yaml.safe_dump(CLUSTER))
    process = subprocess.Popen(
        [sys.executable, "-m", "dynamollm", "serve", "--config", str(config), "--port", "0", "--workers", "2"],
        stderr=subprocess.PIPE,
        text=True,
        env={k: v for k, v in os.environ.items() if not k.startswith("DYNAMOLLM_")},
    )
    seen = []
    for line in process.stderr:
        seen.append(line)
        if match := re.search(r"(http://\S+)/v1 is ready, served by 2 gateways", line):
            url = match[1]
            break
    else:
        raise AssertionError("serve ended before it was ready:\n" + "".join(seen))
    body = {"model": "llama", "prompt": "hello", "max_tokens": 3, "ignore_eos": True}
    ids = set()
    for _ in range(24):  # a connection each: the kernel spreads them
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=30)
        assert answer.status_code == 200
        ids.add(answer.headers["x-request-id"].rpartition("-")[0])
    assert len(ids) == 2
    until_s = time.monotonic() + 15
    counted = 0.0
    while counted < 24 and time.monotonic() < until_s:
        page = httpx.get(f"{url}/metrics").text
        samples = re.findall(r'^dynamollm_requests_total\{replica="gateway-[^"]+",.*\} ([0-9.]+)$', page, re.MULTILINE)
        counted = sum(map(float, samples))
        time.sleep(0.2)
    assert counted == 24
    assert len(samples) >= 2
    assert page.count("# TYPE dynamollm_requests_total counter") == 1
    assert re.search(r'^dynamollm_controller_leads\{replica="controller-[^"]+"\} 1.0$', page, re.MULTILINE)
    status = httpx.get(f"{url}/admin/status", timeout=10).json()
    assert {instance["state"] for instance in status["instances"]} == {"ready"}
    children = children_of(process.pid)
    assert len(children) == 3
    os.kill(children[0], signal.SIGKILL)  # one is started again, the others go on
    until_s = time.monotonic() + 30
    while len(set(children_of(process.pid)) - {children[0]}) < 3:
        assert time.monotonic() < until_s
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 0
    process.stderr.close()


def test_gateways_alone_want_a_store_that_a_controller_elsewhere_shares(tmp_path):
    alone = subprocess.run(
        [sys.executable, "-m", "dynamollm", "serve", "--no-controller", "--port", "0"],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert alone.returncode == 2
    assert "store.kind" in alone.stderr
