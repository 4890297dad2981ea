"""Do emulated instances keep the profile's pace? 32 of them, 64 streams, on however few cores there are.

``python -m benchmarks.emulator_timing`` starts the instances through the driver (as the gateway does), opens the
streams, and compares each stream's TBT with what the EnergyProfile gives for its batch. Every gap between two tokens is
measured at the client, so the client's own delays count against the emulator. ``--chunk-cost`` compares what a streamed
chunk costs this server and uvicorn in CPU time. Real time, hence no test: run it on an otherwise idle machine.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, cast
from urllib.parse import urlsplit

import numpy as np
import uvloop

from energy.adapters.catalogue import load_profile
from energy.profile import step_time_s
from pools.drivers.emulator import EmulatedMachine, EmulatedModel, EmulatorDriver
from pools.drivers.port import InstanceSpec
from pools.instances import GpuSlot, Instance, InstanceShape, InstanceState
from simulator.emulator.adapters.http import Exchange, HttpServer

GPUS_PER_NODE = 8
INPUT_TOKENS = 128
CHUNK = b'data: {"id":"chatcmpl-0123456789abcdef","choices":[{"index":0,"delta":{"content":" word"}}]}\n\n'


@dataclass(frozen=True, slots=True)
class Plan:
    """What is run."""

    instances: int = 32
    streams: int = 64
    tp: int = 2
    processes: int = 2
    output_tokens: int = 400
    profile: str = "llama-3.1-70b-fp8-h100"


DEFAULT = Plan()


class StreamClient(asyncio.Protocol):
    """Sends one request and notes when tokens come: (time, tokens) for each read."""

    def __init__(self, request: bytes) -> None:
        self.arrivals: list[tuple[float, int]] = []
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._request = request
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Ask."""
        self._transport = cast(asyncio.Transport, transport)
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        """Count the tokens of the text; each is one word with a space before it."""
        tokens = sum(
            piece.partition(b'"')[0].count(b" ") for piece in data.split(b'"content":"')[1:] if piece[:1] != b'"'
        )
        if tokens:
            self.arrivals.append((time.perf_counter(), tokens))  # uvloop's own clock has milliseconds only
        if b"data: [DONE]" in data and self._transport is not None:
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Over."""
        if not self.done.done():
            self.done.set_result(None)


def request_bytes(model: str, output_tokens: int) -> bytes:
    """An exact-length streamed chat request of about ``INPUT_TOKENS``."""
    content = "word" * (INPUT_TOKENS - 10)
    body = {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": output_tokens,
        "ignore_eos": True,
        "stream": True,
    }
    raw = json.dumps(body).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(raw)}"
    )
    return head.encode() + b"\r\n\r\n" + raw


async def start_instances(driver: EmulatorDriver, plan: Plan, model: str, gpu: str) -> list[Instance]:
    """Bring all instances up, packed on nodes of eight GPUs."""
    per_node = GPUS_PER_NODE // plan.tp
    events = driver.events()
    instances = []
    for number in range(plan.instances):
        node, first = f"node-{number // per_node}", number % per_node * plan.tp
        gpus = tuple(GpuSlot(node, first + index) for index in range(plan.tp))
        instances.append(
            await driver.start(InstanceSpec(f"i-{number}", "all", InstanceShape(model, gpu, plan.tp), gpus, 1980))
        )
    waiting = {instance.id for instance in instances}
    async for event in events:
        if event.state is InstanceState.READY:
            waiting.discard(event.instance_id)
        if not waiting:
            break
    return instances


async def open_streams(instances: list[Instance], plan: Plan) -> list[StreamClient]:
    """Run the streams, shared out over the instances, to their end."""
    loop = asyncio.get_running_loop()
    request = request_bytes(instances[0].shape.model, plan.output_tokens)
    clients = []
    for number in range(plan.streams):
        address = urlsplit(instances[number % len(instances)].url)
        _, client = await loop.create_connection(
            lambda: StreamClient(request), str(address.hostname), address.port or 80
        )
        clients.append(client)
    await asyncio.gather(*(client.done for client in clients))
    return clients


def expected_tbt_s(plan: Plan) -> float:
    """TBT of a decoding batch of this size, half-way through its output."""
    profile = load_profile(plan.profile)
    coefficients = profile.step(plan.tp, profile.sm_clocks_mhz[-1])
    batch = plan.streams / plan.instances
    return step_time_s(coefficients, 0, 0, batch, batch * (INPUT_TOKENS + plan.output_tokens / 2))


def judge(clients: list[StreamClient], plan: Plan) -> dict[str, float]:
    """Errors against the profile, of whole streams and of single gaps. Shares, not percent."""
    expected_s = expected_tbt_s(plan)
    stream_errors, gap_errors, tokens, merged = [], [], 0, 0
    for client in clients:
        times, counts = zip(*client.arrivals, strict=True)
        if sum(counts) != plan.output_tokens:
            raise RuntimeError(f"a stream brought {sum(counts)} tokens, not {plan.output_tokens}")
        tokens += sum(counts)
        merged += sum(count - 1 for count in counts)
        # the first few tokens share their steps with the other stream's prefill
        tbt_s = (times[-1] - times[4]) / sum(counts[5:])
        stream_errors.append(tbt_s / expected_s - 1)
        gaps_s = np.diff(times[4:]) / np.array(counts[5:])
        gap_errors.extend(np.abs(gaps_s / expected_s - 1))
    gaps = np.array(gap_errors)
    return {
        "expected_tbt_s": expected_s,
        "mean_error": float(np.mean(stream_errors)),
        "worst_stream_error": float(max(stream_errors, key=abs)),
        "gap_error_p50": float(np.percentile(gaps, 50)),
        "gap_error_p95": float(np.percentile(gaps, 95)),
        "gap_error_p99": float(np.percentile(gaps, 99)),
        "merged_token_share": merged / tokens,
        "tokens": float(tokens),
    }


async def measure(plan: Plan) -> dict[str, float]:
    """Run the plan once."""
    profile = load_profile(plan.profile)
    nodes = -(-plan.instances * plan.tp // GPUS_PER_NODE)
    driver = EmulatorDriver(
        [EmulatedMachine(f"node-{number}", profile.gpu, GPUS_PER_NODE) for number in range(nodes)],
        {profile.model: EmulatedModel(plan.profile)},
        processes=plan.processes,
        startup_s=0.0,
    )
    try:
        instances = await start_instances(driver, plan, profile.model, profile.gpu)
        begun_s = time.perf_counter()
        clients = await open_streams(instances, plan)
        wall_s = time.perf_counter() - begun_s
    finally:
        await driver.close()
    return {**judge(clients, plan), "wall_s": wall_s}


# --- what a chunk costs ----------------------------------------------------------------------------------------------

CONNECTIONS, CHUNKS = 64, 2000


def serve_chunks(kind: str, pipe: Connection) -> None:
    """In a process of its own: stream ``CHUNKS`` chunks to every caller, as an engine does; tell the CPU time."""
    uvloop.run(_with_emulator(pipe) if kind == "emulator" else _with_uvicorn(pipe))


async def _report(port: int, pipe: Connection) -> None:
    pipe.send(port)
    begun_s = time.process_time()
    await asyncio.get_running_loop().run_in_executor(None, pipe.recv)
    pipe.send(time.process_time() - begun_s)


async def _step_for_all(streams: list[Any], give: Callable[[Any, bytes], None]) -> None:
    """Once every caller is there: each step, one chunk for each; at last, the end."""
    for _ in range(CHUNKS):
        await asyncio.sleep(0)
        for stream in streams:
            give(stream, CHUNK)
    for stream in streams:
        give(stream, b"")


async def _with_emulator(pipe: Connection) -> None:
    streams: list[Exchange] = []
    running = []

    def give(exchange: Exchange, content: bytes) -> None:
        if content:
            exchange.send(content)
        else:
            exchange.end(b"data: [DONE]\n\n")

    def handle(exchange: Exchange) -> None:
        exchange.begin_stream()
        streams.append(exchange)
        if len(streams) == CONNECTIONS:
            running.append(asyncio.get_running_loop().create_task(_step_for_all(streams, give)))

    server = HttpServer(handle)
    port = server.bind("127.0.0.1", 0)
    await server.listen()
    await _report(port, pipe)


async def _with_uvicorn(pipe: Connection) -> None:
    import uvicorn

    streams: list[asyncio.Queue[bytes]] = []
    running = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        chunks: asyncio.Queue[bytes] = asyncio.Queue()
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        streams.append(chunks)
        if len(streams) == CONNECTIONS:
            running.append(asyncio.create_task(_step_for_all(streams, asyncio.Queue.put_nowait)))
        while content := await chunks.get():
            await send({"type": "http.response.body", "body": content, "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    config = uvicorn.Config(app, port=0, log_level="critical", lifespan="off", http="httptools")
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    while not server.started:  # noqa: ASYNC110  (uvicorn offers nothing to wait for)
        await asyncio.sleep(0.01)
    await _report(server.servers[0].sockets[0].getsockname()[1], pipe)
    server.should_exit = True
    await serving


async def drain(port: int) -> None:
    """Call ``CONNECTIONS`` times at once."""
    loop = asyncio.get_running_loop()
    clients = []
    for _ in range(CONNECTIONS):
        _, client = await loop.create_connection(
            lambda: StreamClient(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"), "127.0.0.1", port
        )
        clients.append(client)
    await asyncio.gather(*(client.done for client in clients))


def chunk_cost_us(kind: str) -> float:
    """CPU microseconds a streamed chunk costs the server."""
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    process = context.Process(target=serve_chunks, args=(kind, theirs), daemon=True)
    process.start()
    uvloop.run(drain(mine.recv()))
    mine.send("over")
    cpu_s: float = mine.recv()
    process.join(10)
    return cpu_s / (CONNECTIONS * CHUNKS) * 1e6


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.emulator_timing", description=__doc__)
    parser.add_argument("--instances", type=int, default=DEFAULT.instances)
    parser.add_argument("--streams", type=int, default=DEFAULT.streams)
    parser.add_argument("--tp", type=int, default=DEFAULT.tp)
    parser.add_argument("--processes", type=int, default=DEFAULT.processes)
    parser.add_argument("--output-tokens", type=int, default=DEFAULT.output_tokens)
    parser.add_argument("--profile", default=DEFAULT.profile)
    parser.add_argument("--chunk-cost", action="store_true", help="compare the CPU cost of a chunk with uvicorn's")
    parser.add_argument("--json", action="store_true")
    given = vars(parser.parse_args())
    as_json, chunk_cost = given.pop("json"), given.pop("chunk_cost")
    if chunk_cost:
        result = {
            f"{kind}_us_per_chunk": chunk_cost_us(kind) for kind in ("emulator", "uvicorn", "emulator", "uvicorn")
        }
    else:
        result = uvloop.run(measure(Plan(**given)))
        # the emulator's processes have ended, so their CPU time is known
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        result["emulator_cpu_cores"] = (usage.ru_utime + usage.ru_stime) / result["wall_s"]
    result["load_average"] = os.getloadavg()[0]
    if as_json:
        print(json.dumps(result))
    else:
        for name, value in result.items():
            print(f"{name:<24} {value:.6g}")


if __name__ == "__main__":
    main()
