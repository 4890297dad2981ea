"""What the gateway's tests run against: a scripted engine, a plain router, a gateway on a real socket."""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import httptools
import uvloop
from uvicorn.server import ServerState

from pools.request import Assigned, Queued, Rejected, RejectReason
from pools.tokens import TokenCount
from proxy.metrics import GatewayMetrics
from proxy.serve import gateway_config
from proxy.services import Address, GatewayServices, ServedModel
from proxy.settings import ProxySettings

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}


@dataclass
class Seen:
    """A request as an engine received it."""

    head: str
    body: bytes

    @property
    def json(self):
        return json.loads(self.body)

    @property
    def headers(self):
        pairs = [line.partition(": ") for line in self.head.split("\r\n")[1:] if line]
        return {name.lower(): value for name, _, value in pairs}


class Peer:
    """The engine's end of one connection."""

    def __init__(self, reader, writer):
        self.reader = reader
        self.writer = writer

    async def send(self, *segments: bytes):
        """Each in a TCP segment of its own, as far as a kernel can be made to."""
        for segment in segments:
            self.writer.write(segment)
            await self.writer.drain()
            if len(segments) > 1:
                await asyncio.sleep(0)

    def reset(self):
        self.writer.transport.abort()

    def close(self):
        self.writer.close()

    async def closed(self):
        """Wait until the gateway closes the connection."""
        try:
            while await self.reader.read(65536):
                pass
        except ConnectionError:
            pass


Script = Callable[[Peer, Seen], Awaitable[None]]


def answer(status: int, body: bytes, *headers: str, kind: str = "application/json") -> bytes:
    lines = [f"HTTP/1.1 {status} X", f"content-type: {kind}", f"content-length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\nserver: uvicorn\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"transfer-encoding: chunked\r\n\r\n"
)


def chunk(payload: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(payload), payload)


def event(fields) -> bytes:
    return b"data: " + json.dumps(fields, separators=(",", ":")).encode() + b"\n\n"


def token(text: str, finish=None) -> bytes:
    delta = {"role": "assistant", "content": text} if finish is None else {"content": text}
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
    return event({"id": "c-1", "object": "chat.completion.chunk", "created": 1, "model": "tiny", "choices": [choice]})


USAGE = {"prompt_tokens": 11, "total_tokens": 14, "completion_tokens": 3}
USAGE_EVENT = event(
    {"id": "c-1", "object": "chat.completion.chunk", "created": 1, "model": "tiny", "choices": [], "usage": USAGE}
)
DONE = b"data: [DONE]\n\n"
TOKENS = (token(""), token("a"), token("b"), token("c", "stop"))
WHOLE = json.dumps(
    {
        "id": "c-1",
        "object": "chat.completion",
        "created": 1,
        "model": "tiny",
        "choices": [
            {"index": 0, "message": {"role": "assistant", "content": "abc"}, "logprobs": None, "finish_reason": "stop"}
        ],
        "usage": USAGE,
    }
).encode()
TEXT = json.dumps(
    {
        "id": "t-1",
        "object": "text_completion",
        "created": 1,
        "model": "tiny",
        "choices": [{"index": 0, "text": "abc", "logprobs": None, "finish_reason": "stop"}],
        "usage": USAGE,
    }
).encode()


async def like_vllm(peer: Peer, seen: Seen):
    """Answers as vLLM does."""
    fields = seen.json
    if not fields.get("stream"):
        await peer.send(answer(200, WHOLE if "messages" in fields else TEXT))
        return
    await peer.send(STREAM_HEAD)
    for item in TOKENS:
        await peer.send(chunk(item))
    if (fields.get("stream_options") or {}).get("include_usage"):
        await peer.send(chunk(USAGE_EVENT))
    await peer.send(chunk(DONE) + b"0\r\n\r\n")


class Engine:
    """A server of scripts: the first for the first request, and so on; the last for all others."""

    def __init__(self, *scripts: Script):
        self.scripts = list(scripts) or [like_vllm]
        self.seen: list[Seen] = []
        self.connections = 0
        self.closed = asyncio.Event()

    async def __aenter__(self):
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        self._tasks = set()
        return self

    async def __aexit__(self, *exc):
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader, writer):
        task = asyncio.current_task()
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self.connections += 1
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                seen = Seen(head, b"")
                seen.body = await reader.readexactly(int(seen.headers["content-length"]))
                self.seen.append(seen)
                script = self.scripts.pop(0) if len(self.scripts) > 1 else self.scripts[0]
                await script(Peer(reader, writer), seen)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.closed.set()
            writer.close()


class PlainRouter:
    """Round robin; whom it told what is kept in ``told``."""

    def __init__(self, *instances: str):
        self.instances = list(instances)
        self.told: list[tuple] = []
        self.routed = []
        self.capacity = 10**9
        self.retry_after_s = 0.3
        self.flying: dict[str, str] = {}
        self.queue: list = []
        self.expired: list = []
        self.late: list = []
        self._turn = -1

    def route(self, request, now_s, exclude=frozenset()):
        self.routed.append(request)
        open_instances = [i for i in self.instances if i not in exclude]
        if not open_instances:
            return Rejected(RejectReason.NO_ENDPOINTS, contended=False, retry_after_s=self.retry_after_s)
        if len(self.flying) >= self.capacity:
            self.queue.append(request)
            return Queued(len(self.queue))
        return self._assign(request, open_instances)

    def _assign(self, request, instances):
        while True:
            self._turn = (self._turn + 1) % len(self.instances)
            instance = self.instances[self._turn]
            if instance in instances:
                break
        self.flying[request.id] = instance
        return Assigned(instance, "LL")

    def on_first_token(self, request_id, now_s):
        self.told.append(("first", request_id))

    def on_finished(self, request_id, output_tokens, now_s):
        self._left("finished", request_id)

    def on_failed(self, request_id, instance_id, now_s):
        self._left("failed", request_id)

    def on_cancelled(self, request_id, now_s):
        self.queue = [r for r in self.queue if r.id != request_id]
        self._left("cancelled", request_id)

    def _left(self, what, request_id):
        self.flying.pop(request_id, None)
        self.told.append((what, request_id))

    def release(self, now_s):
        out = [(r, Rejected(RejectReason.TTL_EXPIRED, contended=True, retry_after_s=1.5)) for r in self.expired]
        self.expired = []
        while self.queue and len(self.flying) < self.capacity:
            request = self.queue.pop(0)
            out.append((request, self._assign(request, self.instances)))
        return out

    def escalate(self, now_s):
        escalated, self.late = self.late, []
        return escalated

    def ends(self) -> list[str]:
        """How every request ended, in order."""
        return [what for what, _ in self.told if what != "first"]


@dataclass
class PlainDirectory:
    addresses: dict[str, Address] = field(default_factory=dict)
    served: dict[str, ServedModel] = field(default_factory=lambda: {"tiny": ServedModel("tiny", 1, 4096)})
    up: bool = True

    def models(self):
        return self.served

    def servable(self, model):
        return self.up and bool(self.addresses)

    def address(self, instance_id):
        return self.addresses.get(instance_id)


class ByteCounter:
    def count(self, model, size, read=None):
        return TokenCount(max(1, size.text_bytes // 4), exact=False, undecided=False)


class CapLengths:
    def output_tokens(self, fields, model, input_tokens, tenant):
        return float(fields.hint_tokens or fields.cap_tokens or 100)


@dataclass
class Clock:
    """Real time, plus what a test adds."""

    ahead_s: float = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.ahead_s


class Running:
    """A gateway that listens."""

    def __init__(self, app, router, directory, clock, outcomes, port):
        self.app = app
        self.gateway = gateway = app.state.gateway
        self.router = router
        self.directory = directory
        self.clock = clock
        self.outcomes = outcomes
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.metrics = gateway.services.metrics

    async def connect(self):
        return await asyncio.open_connection("127.0.0.1", self.port)

    async def post(self, fields, path="/v1/chat/completions", headers=(), raw=None):
        """One request on a connection of its own; the response's status, headers and body."""
        reader, writer = await self.connect()
        writer.write(request_bytes(fields, path, ("connection: close", *headers), raw))
        out = parse(await reader.read())
        writer.close()
        return out

    def pass_time(self, seconds):
        self.clock.ahead_s += seconds
        self.gateway.tick(self.clock())


def request_bytes(fields, path="/v1/chat/completions", headers=(), raw=None) -> bytes:
    body = json.dumps(fields).encode() if raw is None else raw
    lines = [f"POST {path} HTTP/1.1", "host: gateway", f"content-length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


@dataclass
class Answered:
    status: int
    headers: dict[str, str]
    body: bytes
    complete: bool

    @property
    def json(self):
        return json.loads(self.body)

    @property
    def error(self):
        return self.json["error"]


class Reading:
    """A response being read, strictly."""

    def __init__(self):
        self.status = 0
        self.headers = {}
        self.body = bytearray()
        self.complete = False
        self._parser = httptools.HttpResponseParser(self)

    def feed(self, data):
        self._parser.feed_data(data)

    def on_header(self, name, value):
        self.headers[name.decode().lower()] = value.decode()

    def on_headers_complete(self):
        self.status = self._parser.get_status_code()

    def on_body(self, payload):
        self.body += payload

    def on_message_complete(self):
        self.complete = True

    def answered(self) -> Answered:
        return Answered(self.status, self.headers, bytes(self.body), self.complete)


def parse(data: bytes) -> Answered:
    """A response, whole or cut off."""
    reading = Reading()
    reading.feed(data)
    return reading.answered()


async def read_answer(reader) -> Answered:
    """The next response on a connection that stays open."""
    reading = Reading()
    while not reading.complete and (data := await reader.read(65536)):
        reading.feed(data)
    return reading.answered()


@asynccontextmanager
async def running(*engines, settings=None, services=None, **overrides):
    """A gateway over these engines, as instances i0, i1, ..."""
    names = [f"i{n}" for n in range(len(engines))]
    router = PlainRouter(*names)
    directory = PlainDirectory(
        {n: Address.of_url(f"http://127.0.0.1:{e.port}") for n, e in zip(names, engines, strict=True)}
    )
    clock = Clock()
    outcomes = []
    services = GatewayServices(
        **{
            "router": router,
            "directory": directory,
            "tokens": ByteCounter(),
            "lengths": CapLengths(),
            "metrics": GatewayMetrics(),
            "clock": clock,
            "settings": settings or ProxySettings(),
            "observers": (outcomes.append,),
            **overrides,
        }
    )
    config = gateway_config(services)
    config.load()
    gateway = config.app.state.gateway
    loop = asyncio.get_running_loop()
    state = ServerState()
    server = await loop.create_server(lambda: gateway.protocol(config, state, {}, loop), "127.0.0.1", 0)
    gateway.start()
    try:
        yield Running(config.app, router, directory, clock, outcomes, server.sockets[0].getsockname()[1])
    finally:
        server.close()
        await gateway.stop()


def play(scenario, timeout_s=10.0):
    """Run a scenario on a loop of its own; none may hang."""

    async def bounded():
        async with asyncio.timeout(timeout_s):
            return await scenario()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(bounded())


async def until(condition):
    """Give the loop turns until something has happened."""
    while not condition():  # noqa: ASYNC110 - what is awaited has no event of its own
        await asyncio.sleep(0.002)
