"""`dynamollm emulate`: one command, several servers, nothing left behind."""

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest

from dynamollm.commands.emulate import place


@contextmanager
def emulate(*arguments: str) -> Iterator[subprocess.Popen]:
    command = [sys.executable, "-c", "from dynamollm.cli import main; main()", "emulate", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def read_until(process: subprocess.Popen, text: str) -> str:
    said = ""
    while text not in said:
        line = process.stdout.readline()
        assert line, f"it ended: {said}{process.stderr.read()}"
        said += line
    return said


@pytest.mark.parametrize(("count", "tp", "nodes"), [(4, 2, 1), (5, 2, 2), (2, 8, 2), (3, 4, 2), (9, 1, 2)])
def test_instances_share_nodes_and_no_gpu(count, tp, nodes):
    placed = place(count, tp)
    slots = [(node, gpu) for node, gpus in placed for gpu in gpus]
    assert len(set(slots)) == count * tp
    assert len({node for node, _ in placed}) == nodes
    assert max(gpu for _, gpu in slots) < 8


def test_it_serves_until_it_is_interrupted():
    with emulate("--instances", "2", "--tp", "4", "--port", "0", "--model", "tiny") as process:
        said = read_until(process, "control")
        urls = re.findall(r"http://[\d.]+:\d+/v1", said)
        assert len(urls) == 2
        for url in urls:
            assert httpx.get(f"{url}/models").json()["data"][0]["id"] == "tiny"
        (agent,) = re.findall(r"(http://\S+)/metrics", said)
        assert "DCGM_FI_DEV_POWER_USAGE" in httpx.get(f"{agent}/metrics").text
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0
        assert process.stderr.read() == ""


def test_on_sigterm_running_streams_finish_within_the_timeout():
    with emulate("--port", "0", "--model", "tiny", "--shutdown-timeout", "20") as process:
        (url,) = re.findall(r"http://[\d.]+:\d+/v1", read_until(process, "control"))
        body = {"model": "tiny", "prompt": "x", "max_tokens": 60, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{url}/completions", json=body, timeout=20) as answer:
            pieces = answer.iter_text()
            said = next(pieces)
            process.send_signal(signal.SIGTERM)
            said += "".join(pieces)
        assert '"finish_reason":"length"' in said
        assert said.endswith("data: [DONE]\n\n")
        assert process.wait(10) == 0


def test_empty_nodes_wait_for_a_controller():
    with emulate("--node", "a=8xH100-SXM", "--node", "b=4xH100-SXM") as process:
        said = read_until(process, "control")
        assert "0 emulated instances" in said
        control = re.search(r"control\s+(http://\S+)", said)[1]
        nodes = httpx.get(f"{control}/nodes").json()
        assert [(node["name"], node["gpus"]) for node in nodes] == [("a", 8), ("b", 4)]
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--node", "a"], "--node: 'a' is not NAME=COUNTxGPU"),
        (["--node", "a=8xWhatever"], "--node: "),
        (["--profile", "no-such"], "--profile: no profile 'no-such'"),
        (["--profile", "llama-3.1-70b-fp8-h100", "--tp", "1"], "--tp: profile llama-3.1-70b-fp8-h100 holds for TP"),
        (["--host", "203.0.113.1"], "cannot listen on 203.0.113.1"),
    ],
)
def test_what_cannot_be_is_said_in_a_sentence(arguments, says):
    with emulate(*arguments) as process:
        _, said = process.communicate(timeout=20)
    assert process.returncode == 2
    assert says in said
    assert "Traceback" not in said


def test_a_taken_port_is_named():
    with emulate("--port", "0", "--model", "tiny") as first:
        (url,) = re.findall(r"http://127.0.0.1:(\d+)/v1", read_until(first, "control"))
        with emulate("--port", url) as second:
            _, said = second.communicate(timeout=20)
        assert second.returncode == 2
        assert f"cannot listen on 127.0.0.1:{url}" in said
        first.terminate()
        assert first.wait(10) == 0
