"""What one Redis carries: a deployment's real traffic with it, by number of gateways, and what its largest values cost.

    python -m benchmarks.redis_load [--json benchmarks/results/redis_load.json]

Starts redis-server, emulated nodes, a controller and 1, 2 and 4 gateways, replays a load through the first, and reads
Redis' own counters: CPU, commands, bytes, microseconds a command. Then asks a bare connection for values as large as
those of 10,000 GPUs would be. CPU is what Redis says it used: the machine may be busy.
"""

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import httpx
import msgspec
import yaml
from redis import Redis

MODEL = "llama-3.1-70b"
NODES, GPUS, TP = 8, 8, 2
INSTANCES = NODES * GPUS // TP
GATEWAYS = (1, 2, 4)
WINDOW_S = 15.0
READY_S = 120.0


@dataclass(frozen=True, slots=True)
class Used:
    """What Redis did in one second, with so many gateways."""

    gateways: int
    cpu_ms_per_s: float
    commands_per_s: float
    out_kb_per_s: float
    us_per_command: dict[str, float]
    controller_cpu_ms_per_s: float
    gateway_cpu_ms_per_s: float  # of the one that is given the load
    report_bytes: int  # of one gateway, the largest
    decode_ms_per_mb: float  # CPU of reading reports, as every gateway does with the others'
    cluster_bytes: int


@dataclass(frozen=True, slots=True)
class Large:
    """One command on large values."""

    command: str
    keys: int
    kilobytes: int  # of each
    cpu_ms: float


@click.command()
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the results there.")
def main(json_path: Path | None) -> None:
    """Measure one Redis."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        port = _free_port()
        stack.enter_context(_process(["redis-server", "--port", str(port), "--dir", folder, "--save", ""]))
        client = Redis(port=port)
        _until(client.ping)
        used = _deployment(Path(folder), port, client)
        client.flushall()
        large = [_large(client, keys, kb) for keys, kb in ((1, 500), (16, 50), (64, 50))]
    result = {
        "instances": INSTANCES,
        "redis": "redis-server of this machine",
        "load": os.getloadavg()[0],
        "used": [asdict(each) for each in used],
        "large": [asdict(each) for each in large],
    }
    for row in result["used"] + result["large"]:  # type: ignore[operator]
        click.echo(json.dumps(row))
    if json_path is not None:
        json_path.write_text(json.dumps(result, indent=1) + "\n")


def _deployment(folder: Path, port: int, client: "Redis") -> list[Used]:
    used = []
    with contextlib.ExitStack() as stack:
        control = _free_port()
        nodes = [f"n-{number}" for number in range(NODES)]
        emulate = ["emulate", "--control-port", str(control), *(f"--node={name}={GPUS}xH100-SXM" for name in nodes)]
        stack.enter_context(_dynamollm(emulate))
        _until(lambda: httpx.get(f"http://127.0.0.1:{control}/nodes"))
        config = folder / "cluster.yaml"
        config.write_text(yaml.safe_dump(_settings(nodes, control, port)))
        commands, ports = _free_port(), list[int]()
        stack.enter_context(_dynamollm(["controller", "--config", str(config), "--port", str(commands)]))
        for count in GATEWAYS:
            while len(ports) < count:
                ports.append(_free_port())
                gateway = ["gateway", "--config", str(config), "--port", str(ports[-1])]
                stack.enter_context(_dynamollm([*gateway, "--name", f"gateway-{len(ports)}"]))
                _until(lambda: httpx.get(f"http://127.0.0.1:{ports[-1]}/ready").raise_for_status())
            used.append(_window(client, count, f"http://127.0.0.1:{commands}", f"http://127.0.0.1:{ports[0]}"))
    return used


def _settings(nodes: list[str], control: int, port: int) -> dict[str, Any]:
    return {
        "models": [{"name": MODEL, "profile": "llama-3.1-70b-fp8-h100"}],
        "nodes": [{"name": name} for name in nodes],
        "pools": [{"name": "LL", "model": MODEL, "request_class": "LL", "tp": TP, "instances": INSTANCES}],
        "driver": {"startup_s": 0.0, "emulators": dict.fromkeys(nodes, f"http://127.0.0.1:{control}")},
        "controller": {"policy": "static"},
        "store": {"kind": "redis", "url": f"redis://127.0.0.1:{port}/0"},
    }


def _window(client: "Redis", gateways: int, controller: str, url: str) -> Used:
    """Replay a load, and in its middle read what Redis does."""
    replay = ["replay", "--trace", "synthetic-conv", "--rate-scale", "4", "--duration", str(WINDOW_S + 10)]
    with _dynamollm([*replay, "--url", url]):
        time.sleep(8.0)  # the replay is on its way
        client.config_resetstat()
        before, began_s = client.info("cpu"), time.monotonic()
        processes_s = [_cpu_s(each) for each in (controller, url)]
        time.sleep(WINDOW_S)
        took_s = time.monotonic() - began_s
        took_cpu = [_cpu_s(each) - cpu_s for each, cpu_s in zip((controller, url), processes_s, strict=True)]
        after, stats, commands = client.info("cpu"), client.info("stats"), client.info("commandstats")
        cpu_s = sum(after[key] - before[key] for key in ("used_cpu_user", "used_cpu_sys"))
        reports = [body for key in client.keys("*report:gateways:*") if (body := client.get(key)) is not None]
        cluster = max((client.memory_usage(key) or 0 for key in client.keys("*published:*")), default=0)
    return Used(
        gateways,
        round(1000 * cpu_s / took_s, 2),
        round(stats["total_commands_processed"] / took_s, 1),
        round(stats["total_net_output_bytes"] / took_s / 1e3, 1),
        {name.removeprefix("cmdstat_"): told["usec_per_call"] for name, told in commands.items()},
        round(1000 * took_cpu[0] / took_s, 1),
        round(1000 * took_cpu[1] / took_s, 1),
        max(map(len, reports), default=0),
        _decode_ms_per_mb(reports),
        cluster,
    )


def _cpu_s(url: str) -> float:
    """CPU a process has used, as it exposes it."""
    text = httpx.get(f"{url}/metrics", timeout=30).text
    return float(re.search(r"^process_cpu_seconds_total (\S+)$", text, re.MULTILINE)[1])  # type: ignore[index]


def _decode_ms_per_mb(bodies: Sequence[bytes | str]) -> float:
    began_s = time.process_time()
    for _ in range(1000):
        for body in bodies:
            msgspec.json.decode(body)
    return round(1000 * (time.process_time() - began_s) / (sum(map(len, bodies)) / 1e6) / 1000, 2)


def _large(client: "Redis", keys: int, kilobytes: int) -> Large:
    """CPU of reading so many values of that size at once."""
    names = [f"large-{number}" for number in range(keys)]
    for name in names:
        client.set(name, os.urandom(kilobytes * 1000))
    before = client.info("cpu")
    repeats = max(10, min(500, 20_000 // (keys * kilobytes)))
    for _ in range(repeats):
        client.mget(names)
    after = client.info("cpu")
    cpu_s = sum(after[key] - before[key] for key in ("used_cpu_user", "used_cpu_sys"))
    return Large("MGET", keys, kilobytes, round(1000 * cpu_s / repeats, 3))


@contextlib.contextmanager
def _process(argv: list[str]) -> Iterator[None]:
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(argv, stdin=quiet, stdout=quiet, stderr=quiet)
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _dynamollm(arguments: list[str]) -> contextlib.AbstractContextManager[None]:
    return _process([sys.executable, "-m", "dynamollm", *arguments])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _until(holds: Any) -> None:
    until_s = time.monotonic() + READY_S
    while True:
        try:
            holds()
        except Exception:
            if time.monotonic() > until_s:
                raise
            time.sleep(0.5)
        else:
            return


if __name__ == "__main__":
    main()
