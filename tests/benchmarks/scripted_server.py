"""A tiny OpenAI-compatible server whose every answer is a script, for tests over real sockets."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable

Script = Callable[["Call"], Awaitable[None]]


class Call:
    """One request, and the means to answer it."""

    def __init__(self, path: str, headers: dict[str, str], body: dict, writer: asyncio.StreamWriter, number: int):
        self.path, self.headers, self.body, self.number = path, headers, body, number
        self._writer = writer

    @property
    def prompt(self) -> str:
        return self.body["prompt"] if "prompt" in self.body else self.body["messages"][0]["content"]

    @property
    def prompt_tokens(self) -> int:
        return len(self.prompt.split()) + (0 if "prompt" in self.body else 10)

    def raw(self, data: bytes) -> None:
        self._writer.write(data)

    def chunk(self, data: bytes) -> None:
        self.raw(b"%x\r\n%b\r\n" % (len(data), data))

    def head(self, extra: str = "") -> None:
        self.raw(
            f"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n{extra}transfer-encoding: chunked\r\n\r\n".encode()
        )

    def event(self, value: object) -> None:
        self.chunk(b"data: " + json.dumps(value).encode() + b"\n\n")

    def token(self, text: str = " word") -> None:
        chat = "messages" in self.body
        self.event({"choices": [{"delta": {"content": text}} if chat else {"text": text}]})

    def usage(self, **more: object) -> None:
        usage = {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.body["max_tokens"], **more}
        self.event({"choices": [], "usage": usage})

    def end(self, trailers: str = "") -> None:
        self.chunk(b"data: [DONE]\n\n")
        self.raw(f"0\r\n{trailers}\r\n".encode())

    def answer(self, status: int, body: object, extra: str = "") -> None:
        data = json.dumps(body).encode()
        self.raw(f"HTTP/1.1 {status} X\r\ncontent-length: {len(data)}\r\n{extra}\r\n".encode() + data)

    def hang_up(self) -> None:
        self._writer.transport.abort()


async def good(call: Call) -> None:
    """A whole stream of as many tokens as were asked for, with usage."""
    call.head()
    if "messages" in call.body:
        call.event({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
    for _ in range(call.body["max_tokens"]):
        call.token()
    call.usage()
    call.end()


class ScriptedServer:
    """Serves ``script`` to every POST, and a model list; counts connections and calls."""

    def __init__(self, script: Script = good) -> None:
        self.script = script
        self.calls: list[Call] = []
        self.connections = 0
        self.telemetry = ""
        self.models: object = {"data": [{"id": "tiny"}]}
        self.url = ""

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        with contextlib.suppress(asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                verb, path, _ = head.split(" ", 2)
                headers = dict(line.lower().split(": ", 1) for line in head.split("\r\n")[1:] if line)
                content = await reader.readexactly(int(headers.get("content-length", 0)))
                call = Call(path, headers, json.loads(content) if content else {}, writer, len(self.calls))
                if verb == "GET" and path.endswith("/metrics"):
                    data = self.telemetry.encode()
                    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(data), data))
                elif verb == "GET":
                    call.answer(200, self.models)
                else:
                    self.calls.append(call)
                    await self.script(call)
                await writer.drain()
        writer.close()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator["ScriptedServer"]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        try:
            yield self
        finally:
            server.close()
