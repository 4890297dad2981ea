"""The relayed path on its own: the whole product but its sockets, so that what one request costs can be counted.

Interpreted instructions and frames do not depend on what else the machine does: a change of the path is judged by them.
``python -m pytest -s tests/dynamollm/test_path_cost.py`` prints the table of docs/performance.md.
"""

import asyncio
import json
import sys
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

from uvicorn.server import ServerState

from dynamollm.settings import (
    AuthSettings,
    ControllerSettings,
    DriverSettings,
    ModelSettings,
    NodeSettings,
    PoolSettings,
    Settings,
)
from dynamollm.wiring import build
from pools.classes import RequestClass
from pools.instances import Instance, InstanceState
from proxy.serve import gateway_config

ROOT = Path(__file__).resolve().parents[2]
KEY = "a-key"
INSTANCES = 32
TENSOR_PARALLEL = (2, 2, 2, 2, 2, 4, 4, 4, 8)
ANSWER_BODY = json.dumps(
    {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1760000000,
        "model": "mock",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "abc"}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 64, "total_tokens": 80, "completion_tokens": 16},
    }
).encode()
ANSWER = (
    b"HTTP/1.1 200 OK\r\ndate: Thu, 01 Jan 2026 00:00:00 GMT\r\nserver: uvicorn\r\ncontent-length: %d\r\n"
    b"content-type: application/json\r\n\r\n%b" % (len(ANSWER_BODY), ANSWER_BODY)
)
STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ndate: Thu, 01 Jan 2026 00:00:00 GMT\r\nserver: uvicorn\r\n"
    b"content-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
)


def chunk(payload: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(payload), payload)


TOKEN = chunk(
    b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1760000000,"model":"mock","choices":'
    b'[{"index":0,"delta":{"content":"a"},"logprobs":null,"finish_reason":null}]}\n\n'
)
STREAM_END = (
    chunk(
        b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1760000000,"model":"mock","choices":[],'
        b'"usage":{"prompt_tokens":64,"total_tokens":80,"completion_tokens":16}}\n\n'
    )
    + chunk(b"data: [DONE]\n\n")
    + b"0\r\n\r\n"
)


def request_of(prompt_bytes: int, stream: bool = False, max_tokens: int = 128) -> bytes:
    fields = {"model": "mock", "max_tokens": max_tokens, "messages": [{"role": "user", "content": "x" * prompt_bytes}]}
    if stream:
        fields["stream"] = True
    body = json.dumps(fields).encode()
    return (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: gateway\r\nAuthorization: Bearer %b\r\n"
        b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (KEY.encode(), len(body), body)
    )


class RecordingTransport:
    """A transport whose peer is the test."""

    def __init__(self):
        self.written = []
        self.protocol = None
        self.closing = False
        self.write = self.written.append

    def get_extra_info(self, name, default=None):
        return ("127.0.0.1", 1) if name in ("peername", "sockname") else default

    def is_closing(self):
        return self.closing

    def get_write_buffer_size(self):
        return 0

    def abort(self):
        self.closing = True

    close = abort

    def pause_reading(self):
        pass

    resume_reading = pause_reading

    def set_protocol(self, protocol):
        self.protocol = protocol


def settings() -> Settings:
    """Nine pools, 32 attached instances, a key."""
    urls = {c.name: [] for c in RequestClass}
    for number in range(INSTANCES):
        urls[RequestClass(number % 9).name].append(f"http://127.0.0.1:{1 + number}")
    return Settings(
        models=(ModelSettings("mock", "llama-3.1-70b-fp8-h100"),),
        nodes=(NodeSettings("h100", count=INSTANCES),),
        pools=tuple(
            PoolSettings(c.name, "mock", c.name, tp, len(urls[c.name]))
            for c, tp in zip(RequestClass, TENSOR_PARALLEL, strict=True)
        ),
        driver=DriverSettings(kind="attach", urls={pool: tuple(each) for pool, each in urls.items()}),
        controller=ControllerSettings(policy="static"),
        auth=AuthSettings(api_keys=(KEY,)),
    )


class RelayedPath:
    """A client's connection on one side, instances on the other."""

    def __init__(self, clock=time.monotonic):
        self.application = build(settings(), clock)
        deployment = self.application.deployment
        for number, spec in enumerate(deployment.configured()):
            deployment.put(
                Instance(
                    spec.id,
                    spec.pool,
                    spec.shape,
                    f"http://127.0.0.1:{1 + number}",
                    InstanceState.READY,
                    spec.sm_clock_mhz,
                    spec.gpus,
                )
            )
        self.application.router.update(deployment.routing_view(clock()), clock())
        self.asked = []  # connections to instances that were sent a request
        config = gateway_config(self.application.services)
        config.load()
        self.gateway = config.app.state.gateway
        loop = asyncio.get_running_loop()
        loop.create_connection = self._dial
        self.client = self._connect(config, loop)

    def _connect(self, config, loop):
        protocol = self.gateway.protocol(config, ServerState(), {}, loop)
        transport = RecordingTransport()
        protocol.connection_made(transport)
        return protocol

    async def _dial(self, factory, host, port):
        connection = factory()
        transport = RecordingTransport()

        def write(message):
            self.asked.append(connection)

        transport.write = write
        connection.connection_made(transport)
        return transport, connection

    async def exchange(self, request, *segments):
        """One request and its answer, dialling where needed."""
        self.client.data_received(request)
        while not self.asked:  # noqa: ASYNC110 - dialling takes a turn or two
            await asyncio.sleep(0)
        self.answer(segments)
        return b"".join(self.taken())

    def exchange_now(self, request, segments):
        """The same over connections that are open."""
        self.client.data_received(request)
        self.answer(segments)

    def answer(self, segments):
        connection = self.asked.pop()
        for segment in segments:
            connection.data_received(segment)

    def taken(self):
        written = self.client.transport.written
        out = list(written)
        written.clear()
        return out


class Counted:
    """Interpreted instructions and frames by source file."""

    def __init__(self):
        self.instructions = Counter()
        self.frames = Counter()
        self.functions = Counter()

    @contextmanager
    def counting(self):
        def trace(frame, kind, argument):
            if kind == "call":
                frame.f_trace_opcodes = True
                frame.f_trace_lines = False
                self.frames[frame.f_code.co_filename] += 1
            elif kind == "opcode":
                code = frame.f_code
                self.instructions[code.co_filename] += 1
                self.functions[code.co_filename, code.co_qualname] += 1
            return trace

        sys.settrace(trace)
        try:
            yield
        finally:
            sys.settrace(None)

    def by_file(self):
        """(file, instructions, frames), the dearest first."""
        names = {
            name: str(Path(name).relative_to(ROOT)) if name.startswith(str(ROOT)) else name for name in self.frames
        }
        return sorted(
            ((names[name], self.instructions[name], frames) for name, frames in self.frames.items()),
            key=lambda row: -row[1],
        )
