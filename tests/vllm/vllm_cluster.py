"""A gateway over real vLLM servers, as a person starts it, and what can be seen and done from outside."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import yaml

MODEL = "tiny"
SHORT, LONG = "Why is the sky blue?", "Why is the sky blue? " * 60  # of the pools' classes
SEQUENCES, QUEUED = 8, 4  # limits of each engine
START_S = 600.0  # a bound on a hang: 20-60 s on a quiet machine
ON_CPU = ("--dtype", "float32", "--enforce-eager", "--distributed-executor-backend", "uni")
TOOLS = ("--enable-auto-tool-choice", "--tool-call-parser", "hermes")
LIMITS = ("--max-num-seqs", str(SEQUENCES))
QUEUE_LIMIT = ("--max-num-queued-reqs", str(SEQUENCES + QUEUED))  # where the build knows it
# one for all questions: to make a client takes longer than the question
CLIENT = httpx.Client(timeout=30, trust_env=False, limits=httpx.Limits(max_keepalive_connections=0))


def refuses_when_full(environment: Path) -> bool:
    """Whether this build of vLLM takes a limit to its queue: 0.32 does, 0.27 queues without end."""
    (arguments,) = environment.glob("lib/python3*/site-packages/vllm/engine/arg_utils.py")
    return "max_num_queued_reqs" in arguments.read_text()


def configuration(environment: Path, folder: Path) -> dict[str, object]:
    """Two pools, one engine each; SLOs so loose that no request is taken elsewhere for being late.

    Short prompts have a pool of their own, so that it is known where a request goes first.
    """
    limits = (*LIMITS, *(QUEUE_LIMIT if refuses_when_full(environment) else ()))
    return {
        "models": [
            {
                "name": MODEL,
                "profile": "llama-3.1-8b-bf16-h100",
                "path": str(environment / "model"),
                "max_model_len": 4096,
                "tokenizer_file": str(environment / "model" / "tokenizer.json"),
                "chat_template_file": str(environment / "model" / "chat_template.jinja"),
            }
        ],
        "nodes": [{"name": "here", "gpus": 2}],
        "pools": [
            {"name": "short", "model": MODEL, "request_class": "SL", "tp": 1},
            {"name": "long", "model": MODEL, "request_class": "LL", "tp": 1},
        ],
        "slo": {"ttft_s": [30.0, 30.0, 30.0], "tbt_s": 5.0},
        "controller": {"policy": "static"},
        "driver": {
            "kind": "vllm",
            "vllm": {
                "command": str(environment / "bin" / "vllm"),
                "arguments": [*ON_CPU, "--kv-cache-memory-bytes", "67108864", *limits, *TOOLS],
                # on CPU an engine sleeps, but is refused the flag that would free its memory
                "can_park": False,
                "environment": {
                    "OMP_NUM_THREADS": "1",
                    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
                    "HF_HUB_OFFLINE": "1",
                    "VLLM_SERVER_DEV_MODE": "1",
                },
                "log_dir": str(folder / "log"),
            },
        },
    }


@dataclass(frozen=True)
class Engine:
    """One vLLM server, asked without the gateway between."""

    id: str
    url: str

    def gauge(self, name: str) -> float:
        page = CLIENT.get(f"{self.url}/metrics").text
        found = re.findall(rf"^vllm:{name}(?:{{[^}}]*}})? (\S+)$", page, re.MULTILINE)
        return sum(map(float, found))

    @property
    def running(self) -> float:
        return self.gauge("num_requests_running")

    @property
    def waiting(self) -> float:
        return self.gauge("num_requests_waiting")

    def answers(self) -> bool:
        with contextlib.suppress(httpx.HTTPError):
            return CLIENT.get(f"{self.url}/health").status_code == httpx.codes.OK
        return False


@dataclass
class Cluster:
    """``dynamollm serve`` in a process of its own."""

    config: Path
    process: subprocess.Popen[str] | None = None
    url: str = ""
    addresses: dict[str, str] = field(default_factory=dict)  # of every engine that was ready, by id
    said: list[str] = field(default_factory=list)
    pids: list[int] = field(default_factory=list)  # of every gateway there was
    reading: threading.Thread | None = None

    @classmethod
    @contextlib.contextmanager
    def serve(cls, environment: Path, folder: Path) -> Iterator["Cluster"]:
        """Start it; it is up once both engines have given a token."""
        config = folder / "cluster.yaml"
        config.write_text(yaml.safe_dump(configuration(environment, folder)))
        cluster = cls(config)
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()
        assert cluster.process.returncode == 0, "".join(cluster.said)

    def start(self) -> float:
        """Returns after how many seconds both engines had given a token."""
        self.url = ""
        self.addresses.clear()
        self.said.clear()
        process = self.process = subprocess.Popen(
            [sys.executable, "-m", "dynamollm", "serve", "--config", str(self.config), "--port", "0", "-v"],
            stderr=subprocess.PIPE,
            text=True,
            env={name: value for name, value in os.environ.items() if not name.startswith("DYNAMOLLM_")},
        )
        self.pids.append(process.pid)
        self.reading = threading.Thread(target=self._read, daemon=True)
        self.reading.start()
        took_s = eventually(lambda: self.url or process.poll() is not None, "the gateway is up", START_S)
        assert len(self.addresses) == 2, "".join(self.said)
        return took_s

    def stop(self, number: int = signal.SIGINT) -> None:
        """End the gateway, as Ctrl-C does or otherwise."""
        self.process.send_signal(number)
        try:
            self.process.wait(timeout=60)
        finally:
            self.process.kill()
        self.reading.join()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said.append(line)
            if match := re.search(r"instance (\S+) is ready at (\S+)", line):
                self.addresses[match[1]] = match[2]
            if match := re.search(r"(http://\S+)/v1 is ready", line):
                self.url = match[1]

    @property
    def engines(self) -> list[Engine]:
        """The last one of each pool: long, short."""
        last = {name.rpartition("-")[0]: Engine(name, url) for name, url in self.addresses.items()}
        return [last[pool] for pool in sorted(last)]

    def engine_processes(self) -> list[int]:
        """Process groups that bear the mark of this gateway, or of one it has followed."""
        marks = [f"DYNAMOLLM_CONTROLLER={pid}:".encode() for pid in self.pids]
        found = set()
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and any(mark in (entry / "environ").read_bytes() for mark in marks):
                    found.add(os.getpgid(int(entry.name)))
        return sorted(found)

    def process_of(self, engine: Engine) -> int:
        """Process id of an engine's server."""
        mark = f"DYNAMOLLM_INSTANCE={engine.id}\0".encode()
        (group,) = (pid for pid in self.engine_processes() if mark in Path(f"/proc/{pid}/environ").read_bytes())
        return group

    def body(self, prompt: str = SHORT, **more: object) -> dict[str, object]:
        """A request that lasts until it is ended, unless told otherwise."""
        messages = [{"role": "user", "content": prompt}]
        return {"model": MODEL, "messages": messages, "max_tokens": 2000, "ignore_eos": True, **more}


def eventually(holds: Callable[[], object], what: str, within_s: float = 60.0) -> float:
    """Wait until it holds; returns after how many seconds it did."""
    began_s = time.monotonic()
    while not holds():
        if time.monotonic() - began_s > within_s:
            raise AssertionError(f"not within {within_s} s: {what}")
        time.sleep(0.005)
    return time.monotonic() - began_s
