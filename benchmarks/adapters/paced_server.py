"""A completions endpoint that does nothing but keep time: one token every so many milliseconds, nothing computed.

``python -m benchmarks.adapters.paced_server [TOKEN_GAP_S]`` prints its URL and serves until its standard input closes.
For measuring clients; knows nothing of HTTP beyond what the replay sends.
"""

import asyncio
import json
import sys
from contextlib import suppress

_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
_TOKEN = b'data: {"choices":[{"index":0,"delta":{"content":" word"},"finish_reason":null}]}\n\n'


def _chunk(payload: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(payload), payload)


async def _answer(body: bytes, writer: asyncio.StreamWriter, token_gap_s: float) -> None:
    wanted = json.loads(body)
    tokens = int(wanted["max_tokens"])
    counted = len(wanted["messages"][0]["content"].split())
    writer.write(_HEAD)
    for _ in range(tokens):
        writer.write(_chunk(_TOKEN))
        await asyncio.sleep(token_gap_s)
    usage = {"choices": [], "usage": {"prompt_tokens": counted, "completion_tokens": tokens}}
    writer.write(_chunk(b"data: %b\n\n" % json.dumps(usage).encode()) + _chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")


async def serve(token_gap_s: float) -> None:
    """Serve until standard input closes."""

    async def on_connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                length = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0] or 0)
                body = await reader.readexactly(length)
                if not body:  # no completion, as /metrics
                    writer.write(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n")
                    continue
                await _answer(body, writer, token_gap_s)
        writer.close()

    server = await asyncio.start_server(on_connection, "127.0.0.1", 0)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    server.close()


if __name__ == "__main__":
    asyncio.run(serve(float(sys.argv[1]) if len(sys.argv) > 1 else 0.02))
