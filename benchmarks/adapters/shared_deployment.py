"""A deployment in processes, as operators run it: Redis, emulated nodes, controllers, gateways; load that counts."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import yaml
from redis import Redis

from benchmarks.adapters.redis_server import RedisServer

MODEL = "llama"
NODES = ("node-0", "node-1", "node-2")
TERM_EPOCHS = 1000  # plans of the term of epoch 2 have epochs from 2000 on
UP_WITHIN_S = 120.0  # bounds a hang, measures nothing


def configuration(redis_url: str, control_url: str) -> dict[str, Any]:
    """Eight emulated instances, planned by the default policy; a third node has room for what replaces them."""
    pool = {"model": MODEL, "tp": 2, "instances": 4}
    return {
        "models": [{"name": MODEL, "profile": "llama-3.1-70b-fp8-h100"}],
        "nodes": [{"name": "node", "gpus": 8, "count": len(NODES)}],
        "pools": [
            {"name": "SM", "request_class": "SM", **pool},
            {"name": "LL", "request_class": "LL", **pool},
        ],
        "driver": {
            "kind": "emulator",
            "startup_s": 0.2,
            "emulators": dict.fromkeys(NODES, control_url),
        },
        "controller": {"policy": "dynamollm", "warm_up_s": 5},
        "store": {"kind": "redis", "url": redis_url},
    }


class Process:
    """One command of ours, and what it says."""

    def __init__(self, *arguments: str, says: str) -> None:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("DYNAMOLLM_")}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "dynamollm", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        self.said: list[str] = []
        self._heard = threading.Event()
        self._pattern = re.compile(says)
        self.found = ""
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.said.append(line)
            if not self.found and (match := self._pattern.search(line)):
                self.found = match[1]
                self._heard.set()
        self._heard.set()

    def up(self) -> str:
        """Wait for what it says when it is up."""
        if not self._heard.wait(UP_WITHIN_S) or not self.found:
            raise RuntimeError("it did not come up:\n" + "".join(self.said))
        return self.found

    def kill(self) -> None:
        """End it as kill -9 does."""
        self._process.kill()
        self._process.wait(10)

    def end(self) -> int | None:
        """SIGTERM; its status, or None if it had to be killed."""
        self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(20)
        except subprocess.TimeoutExpired:
            self.kill()
            return None


class Load:
    """Streams, one after another in each of some threads, to all gateways in turn; every answer is looked at."""

    def __init__(self, urls: list[str], threads: int = 6) -> None:
        self.answered = 0
        self.failures: list[str] = []
        self._urls = urls
        self._ending = threading.Event()
        self._turn = threading.Lock()
        self._threads = [threading.Thread(target=self._send, args=(n,)) for n in range(threads)]
        for thread in self._threads:
            thread.start()

    def _send(self, number: int) -> None:
        with httpx.Client(timeout=60) as client:
            while not self._ending.is_set():
                number += 1
                body = {
                    "model": MODEL,
                    "prompt": "word " * (3 if number % 3 else 400),
                    "max_tokens": 20 + 10 * (number % 4),
                    "ignore_eos": True,
                    "stream": True,
                }
                problem = stream(client, self._urls[number % len(self._urls)], body)
                with self._turn:
                    self.answered += 1
                    if problem:
                        self.failures.append(problem)
                time.sleep(0.1)

    def end(self) -> int:
        """Finish what is under way; how many were answered."""
        self._ending.set()
        for thread in self._threads:
            thread.join(60)
        return self.answered


def stream(client: httpx.Client, url: str, body: dict[str, Any]) -> str:
    """Send one request; what was wrong with its answer, or nothing."""
    try:
        with client.stream("POST", f"{url}/v1/completions", json=body) as answer:
            text = "".join(answer.iter_text())
            status = answer.status_code
    except httpx.HTTPError as error:
        return repr(error)
    if status != 200 or not text.endswith("data: [DONE]\n\n") or '"error"' in text:
        return f"{status}: {text[-300:]}"
    return "" if '"finish_reason":"length"' in text else f"cut short: {text[-300:]}"


class Deployment:
    """Everything, started; ``close`` it."""

    def __init__(self, folder: Path) -> None:
        self.redis = RedisServer(folder)
        machines = [word for name in NODES for word in ("--node", f"{name}=8xH100-SXM")]
        self.nodes = Process("emulate", *machines, says=r"control\s+(http://\S+)")
        self._file = folder / "cluster.yaml"
        self._file.write_text(yaml.safe_dump(configuration(self.redis.url, self.nodes.up())))
        self.controllers = {name: self._role("controller", name) for name in ("c1", "c2")}
        self.gateways = {name: self._role("gateway", name) for name in ("g1", "g2")}
        self.urls = [gateway.up() for gateway in self.gateways.values()]

    def _role(self, role: str, name: str) -> Process:
        where = ["--config", str(self._file), "--port", "0", "--name", name, "--verbose"]
        return Process(role, *where, says=rf"{name} (?:listens|answers) at (http://\S+)")

    def plan(self) -> tuple[int, int]:
        """Epoch and version of the plan that the cluster published is on the way to."""
        epoch, version = self.published()[1].get("plan", (0, 0))
        return epoch, version

    def published(self) -> tuple[int, dict[str, Any]]:
        """Epoch and document of the cluster that gateways follow."""
        with contextlib.closing(Redis.from_url(self.redis.url)) as redis:
            epoch, body = redis.hmget("{dynamollm}:published:cluster", "epoch", "body")
        return int(epoch or 0), json.loads(body or b"{}")

    def leader(self) -> str:
        """The name of the controller that leads."""
        with contextlib.closing(Redis.from_url(self.redis.url)) as redis:
            holder: Any = redis.get("{dynamollm}:lease") or b""
        return str(holder.decode())

    def status(self) -> dict[str, Any]:
        """What the leader says of the cluster, asked through a gateway."""
        answer: dict[str, Any] = httpx.get(f"{self.urls[0]}/admin/status", timeout=10).raise_for_status().json()
        return answer

    def booked(self) -> int:
        """Requests in the leader's ledger, asked through a gateway."""
        answer = httpx.get(f"{self.urls[1]}/admin/energy", params={"since_s": 7200}, timeout=10).raise_for_status()
        return sum(row["row"]["requests"] for row in answer.json()["rows"])

    def close(self) -> dict[str, int | None]:
        """End everything, gateways first; the exit status of each."""
        everything = {**self.gateways, **self.controllers, "nodes": self.nodes}
        statuses = {name: process.end() for name, process in everything.items()}
        self.redis.stop()
        return statuses


@contextlib.contextmanager
def deployed(folder: Path) -> Iterator[Deployment]:
    """A deployment with eight instances up and planned for; what its processes said is shown if something fails."""
    deployment = Deployment(folder)
    try:
        wait_for(lambda: len(deployment.published()[1].get("instances", ())) == 8, "eight instances")
        wait_for(lambda: all(httpx.get(f"{url}/ready").is_success for url in deployment.urls), "the gateways")
        yield deployment
    except BaseException:
        for process in (*deployment.controllers.values(), *deployment.gateways.values()):
            print("".join(process.said), file=sys.stderr)
        raise
    finally:
        deployment.close()


def wait_for(holds: Callable[[], bool], what: str, within_s: float = UP_WITHIN_S) -> float:
    """Wait until something holds; how long that took."""
    began_s = time.monotonic()
    while True:
        with contextlib.suppress(httpx.HTTPError, OSError):
            if holds():
                return time.monotonic() - began_s
        if time.monotonic() > began_s + within_s:
            raise TimeoutError(f"waited {within_s:g} s for {what}")
        time.sleep(0.05)
