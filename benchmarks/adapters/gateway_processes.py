"""Gateways as processes: how each is started in front of two mock engines, what CPU it used, how it ends.

Linux: CPU time is read from /proc. A gateway whose program is not there is left out, and said so.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path

KEY = "bench-key"
NATIVE = Path(__file__).resolve().parent.parent / "native"
ENVIRONMENT = ".venv-bench"  # where `make bench-gateway` puts the other Python packages
GATEWAY_CORE, CLIENT_CORE = 0, 1  # of those there are; engines and load generator share one
_READY_S = 90.0
_CLASSES = ("SS", "SM", "SL", "MS", "MM", "ML", "LS", "LM", "LL")
_TENSOR_PARALLEL = (2, 2, 2, 2, 2, 4, 4, 4, 8)
_INSTANCES = 32


@dataclass(frozen=True, slots=True)
class Running:
    """A gateway that answers."""

    name: str
    pid: int
    port: int

    def cpu_s(self) -> float:
        """User and system time of its process tree so far."""
        total_ns = 0
        for pid in _tree(self.pid):
            with suppress(OSError):
                for thread in (Path("/proc") / str(pid) / "task").iterdir():
                    total_ns += int((thread / "schedstat").read_text().split()[0])
        return total_ns / 1e9

    def metrics(self) -> str:
        """What it tells on /metrics; nothing where it has none."""
        client = HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            client.request("GET", "/metrics", headers={"Authorization": f"Bearer {KEY}"})
            answer = client.getresponse()
            return answer.read().decode() if answer.status == 200 else ""
        except OSError:
            return ""
        finally:
            client.close()

    def rss_mb(self) -> float:
        """Resident memory of its process tree, MiB."""
        total_kib = 0
        for pid in _tree(self.pid):
            with suppress(OSError):
                for line in Path(f"/proc/{pid}/status").read_text().splitlines():
                    if line.startswith("VmRSS:"):
                        total_kib += int(line.split()[1])
        return total_kib / 1024


@contextmanager
def built(folder: Path) -> Iterator[tuple[Path, Path]]:
    """The mock engine and the load generator, compiled into ``folder``. Raises ``RuntimeError`` without a compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise RuntimeError("no C compiler: install gcc (Debian: apt install gcc libc6-dev)")
    programs = []
    for name in ("engine", "load"):
        program = folder / name
        subprocess.run([compiler, "-O2", "-o", str(program), str(NATIVE / f"{name}.c")], check=True)
        programs.append(program)
    yield programs[0], programs[1]


@contextmanager
def engines(program: Path, ports: Sequence[int], own_session: bool = True) -> Iterator[None]:
    """Mock engines on these ports; ``own_session`` as of ``gateways``."""
    with ExitStack() as stack:
        for port in ports:
            stack.enter_context(_process(_pinned(CLIENT_CORE, [str(program), str(port)]), "engine", own_session))
            _wait_for_port(port)
        yield


@contextmanager
def gateways(
    names: Sequence[str], first_port: int, engine_ports: Sequence[int], own_session: bool = True
) -> Iterator[list[Running]]:
    """The gateways of these names that can be started, each on a port of its own.

    ``own_session``: a kernel that shares cores out by session sees a gateway as one beside the caller, else as a part.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        running = []
        for number, name in enumerate(names):
            port = first_port + number
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    raise RuntimeError(f"port {port} is taken: end what listens there, it would be measured for {name}")
            command = COMMANDS[name](folder, port, engine_ports)
            if command is None:
                print(f"{name}: not installed, left out", file=sys.stderr)
                continue
            process = stack.enter_context(_process(_pinned(GATEWAY_CORE, command), name, own_session))
            if _answers(port, process):
                running.append(Running(name, process.pid, port))
            else:
                print(f"{name}: did not answer, left out", file=sys.stderr)
        yield running


def measure(program: Path, port: int, arguments: Sequence[int], own_session: bool = True) -> str:
    """One run of the load generator; its line of JSON. Raises ``RuntimeError`` where it fails."""
    command = _pinned(CLIENT_CORE, [str(program), str(port), *map(str, arguments), f"Authorization: Bearer {KEY}"])
    done = subprocess.run(command, capture_output=True, text=True, check=False, start_new_session=own_session)
    if done.returncode:
        raise RuntimeError(f"load generator against port {port}: {done.stderr.strip()}")
    return done.stdout


def _ours(folder: Path, port: int, engine_ports: Sequence[int]) -> list[str]:
    """The product as it is served: auth, nine pools, 32 instances, prediction, metering, metrics."""
    config = folder / "cluster.yaml"
    urls: dict[str, list[str]] = {name: [] for name in _CLASSES}
    for number in range(_INSTANCES):
        engine = engine_ports[number % len(engine_ports)]
        urls[_CLASSES[number % len(_CLASSES)]].append(f"http://127.0.0.1:{engine}")
    pools = [
        f"  - {{name: {name}, model: mock, request_class: {name}, tp: {tp}}}"
        for name, tp in zip(_CLASSES, _TENSOR_PARALLEL, strict=True)
    ]
    attached = [f"    {name}: [{', '.join(instances)}]" for name, instances in urls.items()]
    lines = [
        *("models:", "  - {name: mock, profile: llama-3.1-70b-fp8-h100}"),
        *("nodes:", f"  - {{name: h100, gpu: H100-SXM, gpus: 8, count: {_INSTANCES}}}"),
        *("pools:", *pools),
        *("driver:", "  kind: attach", "  urls:", *attached),
        *("controller:", "  policy: static"),
        *("routing:", "  prefix_affinity: false"),  # the others do without; what it costs: benchmarks.router_cost
        *("auth:", f"  api_keys: [{KEY}]"),
    ]
    config.write_text("\n".join(lines) + "\n")
    return [sys.executable, "-m", "dynamollm", "serve", "--config", str(config), "--port", str(port)]


def _nginx(folder: Path, port: int, engine_ports: Sequence[int]) -> list[str] | None:
    program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if program is None:
        return None
    servers = " ".join(f"server 127.0.0.1:{engine};" for engine in engine_ports)
    (folder / "nginx.conf").write_text(f"""
worker_processes 1; daemon off; error_log {folder}/nginx.log; pid {folder}/nginx.pid;
events {{ worker_connections 16384; }}
http {{
  access_log off; client_body_buffer_size 256k; client_max_body_size 32m; keepalive_requests 1000000000;
  client_body_temp_path {folder}/c; proxy_temp_path {folder}/p; fastcgi_temp_path {folder}/f;
  uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
  upstream engines {{ {servers} keepalive 1024; keepalive_requests 1000000000; }}
  server {{
    listen 127.0.0.1:{port} backlog=4096;
    location / {{
      proxy_pass http://engines; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_buffering off;
      proxy_read_timeout 600s;
    }}
  }}
}}
""")
    return [program, "-c", str(folder / "nginx.conf"), "-p", str(folder)]


def _haproxy(folder: Path, port: int, engine_ports: Sequence[int]) -> list[str] | None:
    program = shutil.which("haproxy") or shutil.which("haproxy", path="/usr/sbin")
    if program is None:
        return None
    servers = "\n".join(f"  server e{engine} 127.0.0.1:{engine}" for engine in engine_ports)
    (folder / "haproxy.cfg").write_text(f"""
global
  nbthread 1
  maxconn 4000
defaults
  mode http
  timeout connect 5s
  timeout client 600s
  timeout server 600s
  http-reuse always
frontend all
  bind 127.0.0.1:{port}
  default_backend engines
backend engines
  balance roundrobin
{servers}
""")
    return [program, "-db", "-q", "-f", str(folder / "haproxy.cfg")]


def _vllm_router(folder: Path, port: int, engine_ports: Sequence[int]) -> list[str] | None:
    return _rust_router("vllm-router", (), port, engine_ports)


def _sglang_router(folder: Path, port: int, engine_ports: Sequence[int]) -> list[str] | None:
    own = ("launch", "--log-level", "warn", "--prometheus-port", str(port + 1000))  # its default is vllm-router's, too
    return _rust_router("sglang-router", own, port, engine_ports)


def _rust_router(name: str, own: Sequence[str], port: int, engine_ports: Sequence[int]) -> list[str] | None:
    program = _program(name)
    if program is None:
        return None
    urls = [f"http://127.0.0.1:{engine}" for engine in engine_ports]
    shared = ["--host", "127.0.0.1", "--port", str(port), "--policy", "round_robin", "--worker-urls", *urls]
    return [program, *own, *shared]


def _litellm(folder: Path, port: int, engine_ports: Sequence[int]) -> list[str] | None:
    program = _program("litellm")
    if program is None:
        return None
    entries = [
        f"  - {{model_name: mock, litellm_params: {{model: openai/mock, api_key: none, "
        f"api_base: 'http://127.0.0.1:{engine}/v1'}}}}"
        for engine in engine_ports
    ]
    (folder / "litellm.yaml").write_text("\n".join(["model_list:", *entries]) + "\n")
    return [program, "--config", str(folder / "litellm.yaml"), "--port", str(port), "--host", "127.0.0.1"]


COMMANDS = {
    "dynamollm": _ours,
    "nginx": _nginx,
    "haproxy": _haproxy,
    "vllm-router": _vllm_router,
    "sglang-router": _sglang_router,
    "litellm": _litellm,
}
"""By name, what starts a gateway on a port in front of engines; None where its program is not installed."""


def _program(name: str) -> str | None:
    own = Path(ENVIRONMENT) / "bin" / name
    return str(own.resolve()) if own.exists() else shutil.which(name)


def core_number(core: int) -> int:
    """The machine's number of the first or second core that this process may use."""
    return sorted(os.sched_getaffinity(0))[core]


def _pinned(core: int, command: list[str]) -> list[str]:
    """On a core of its own, where there are two and taskset."""
    taskset = shutil.which("taskset")
    if taskset is None or len(os.sched_getaffinity(0)) < 2:
        return command
    return [taskset, "-c", str(core_number(core)), *command]


@contextmanager
def _process(command: list[str], name: str, own_session: bool = True) -> Iterator[subprocess.Popen[bytes]]:
    group = None if own_session else 0  # a process group of its own in any case: it is ended with all it began
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=own_session, process_group=group)
        try:
            yield process
            if process.poll() is not None:
                log.seek(0)
                print(f"{name} ended: {log.read()[-500:].decode(errors='replace')}", file=sys.stderr)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(5)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait_for_port(port: int) -> None:
    give_up_s = time.monotonic() + _READY_S
    while time.monotonic() < give_up_s:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.02)
    raise RuntimeError(f"the mock engine does not listen on port {port}: is another process there?")


def _answers(port: int, process: subprocess.Popen[bytes]) -> bool:
    """Whether a completion is served before the time is up."""
    body = b'{"model":"mock","messages":[{"role":"user","content":"hi"}],"max_tokens":4,"stream":false}'
    headers = {"content-type": "application/json", "authorization": f"Bearer {KEY}"}
    give_up_s = time.monotonic() + _READY_S
    while time.monotonic() < give_up_s and process.poll() is None:
        with suppress(OSError):
            connection = HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("POST", "/v1/chat/completions", body, headers)
            if connection.getresponse().status == 200:
                return True
        time.sleep(0.3)
    return False


def _tree(pid: int) -> list[int]:
    """A process and all its descendants."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry.name))
    tree = [pid]
    for one in tree:
        tree += children.get(one, [])
    return tree
