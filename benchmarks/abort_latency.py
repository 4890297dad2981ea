"""How soon an engine is free of a request whose client has gone, through the gateway.

``python -m benchmarks.abort_latency [TRIES]`` starts `dynamollm serve` with the built-in emulated cluster and fixed
pools, sends requests on plain sockets, closes them, and asks the engine's own gauge of running requests until it is
zero: streaming and not, closed and reset. What it prints (JSON, milliseconds) includes the last look at the gauge. The
gateway is asked for 100 ms.
"""

import json
import os
import socket
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import httpx

WITHIN_S = 0.1
_READY_S = 90.0
_BODY = {
    "model": "llama-3.1-70b",
    "messages": [{"role": "user", "content": "Tell me everything."}],
    "max_tokens": 4000,
    "ignore_eos": True,
}


@contextmanager
def served(port: int) -> Iterator[str]:
    """A gateway with fixed pools, and its URL. Raises ``RuntimeError`` where it does not come up."""
    environ = {**os.environ, "DYNAMOLLM_CONTROLLER__POLICY": "static"}
    command = [sys.executable, "-m", "dynamollm", "serve", "--port", str(port)]
    url = f"http://127.0.0.1:{port}"
    with subprocess.Popen(command, env=environ, stdout=subprocess.DEVNULL) as process:
        try:
            _await_ready(url, process)
            yield url
        finally:
            process.terminate()


def _await_ready(url: str, process: "subprocess.Popen[bytes]") -> None:
    deadline_s = time.monotonic() + _READY_S
    while time.monotonic() < deadline_s and process.poll() is None:
        try:
            if httpx.get(f"{url}/ready", timeout=2).is_success:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.2)
    raise RuntimeError(f"the gateway at {url} is not ready: start `dynamollm serve` by hand to see why")


def free_port() -> int:
    """A port nobody listens on at present."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def aborts_s(gateway: httpx.Client, *, stream: bool, reset: bool, tries: int) -> list[float]:
    """Seconds from leaving until the engine runs nothing, for each try."""
    return [_abort_s(gateway, stream=stream, reset=reset) for _ in range(tries)]


def _abort_s(gateway: httpx.Client, *, stream: bool, reset: bool) -> float:
    content = json.dumps({**_BODY, "stream": stream}).encode()
    address = (gateway.base_url.host, gateway.base_url.port or 80)
    with socket.create_connection(address, timeout=30) as connection:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: gateway\r\ncontent-length: {len(content)}\r\n"
        connection.sendall(head.encode() + b"content-type: application/json\r\n\r\n" + content)
        engine = httpx.Client(base_url=_engine_of_the_request(gateway))
        _await_running(engine, 1)
        if stream:
            connection.recv(65536)
        if reset:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        left_s = time.perf_counter()
    _await_running(engine, 0)
    took_s = time.perf_counter() - left_s
    engine.close()
    return took_s


def _engine_of_the_request(gateway: httpx.Client) -> str:
    """URL of the instance that has the only request in flight."""
    deadline_s = time.monotonic() + 10
    while time.monotonic() < deadline_s:
        for instance in gateway.get("/admin/status").json()["instances"]:
            if instance["in_flight"]:
                return str(instance["url"])
    raise RuntimeError("no instance has the request: is the cluster ready?")


def _await_running(engine: httpx.Client, requests: int) -> None:
    deadline_s = time.monotonic() + 10
    while time.monotonic() < deadline_s:
        lines = engine.get("/metrics").text.splitlines()
        if (
            sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("vllm:num_requests_running"))
            == requests
        ):
            return
    raise RuntimeError(f"{engine.base_url} does not come to {requests} running requests")


def summary(seconds: Sequence[float]) -> dict[str, object]:
    """Median and worst in milliseconds, and how many came within the bound."""
    return {
        "tries": len(seconds),
        "median_ms": round(1e3 * statistics.median(seconds), 2),
        "worst_ms": round(1e3 * max(seconds), 2),
        "within_100_ms": sum(took_s <= WITHIN_S for took_s in seconds),
    }


def main(arguments: Sequence[str]) -> None:
    """Measure all four ways of leaving and print them."""
    tries = int(arguments[0]) if arguments else 45
    with served(free_port()) as url, httpx.Client(base_url=url, timeout=10) as gateway:
        result: dict[str, object] = {
            f"{'streaming' if stream else 'not streaming'}, {'reset' if reset else 'closed'}": summary(
                aborts_s(gateway, stream=stream, reset=reset, tries=tries)
            )
            for stream in (True, False)
            for reset in (False, True)
        }
    print(json.dumps({**result, "cores": os.cpu_count(), "load_average": os.getloadavg()[0]}, indent=2))


if __name__ == "__main__":
    main(sys.argv[1:])
