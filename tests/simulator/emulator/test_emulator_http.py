"""The HTTP server by itself: connections that idle, handlers that break."""

import asyncio

import pytest

from simulator.emulator.adapters.http import HttpServer


async def ask(port: int, request: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    answer = await reader.read()  # until it is closed
    writer.close()
    return answer


def serve(handler, scenario, **options) -> None:
    async def run() -> None:
        server = HttpServer(handler, **options)
        port = server.bind("127.0.0.1", 0)
        await server.listen()
        try:
            async with asyncio.timeout(10):
                await scenario(server, port)
        finally:
            server.close()

    asyncio.run(run())


def test_an_idle_connection_is_closed_after_a_while():
    async def scenario(server, port):
        answer = await ask(port, b"GET / HTTP/1.1\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
        assert answer.endswith(b"\r\n\r\nhello")
        assert b"connection: close" not in answer

    serve(lambda exchange: exchange.respond(200, b"hello"), scenario, keep_alive_s=0.05)


def test_a_waiting_connection_is_not_idle():
    held = []

    async def scenario(server, port):
        asked = asyncio.create_task(ask(port, b"GET / HTTP/1.1\r\n\r\n"))
        await asyncio.sleep(0.1)
        assert not asked.done()
        held[0].respond(200, b"late")
        assert (await asked).endswith(b"late")

    serve(held.append, scenario, keep_alive_s=0.02)


def test_a_handler_that_raises_is_a_500_and_the_server_lives_on():
    told = []

    def handler(exchange):
        if exchange.path == "/bad":
            raise RuntimeError("a bug")
        exchange.respond(200)

    async def scenario(server, port):
        server.loop.set_exception_handler(lambda loop, context: told.append(context))
        assert (await ask(port, b"GET /bad HTTP/1.1\r\n\r\n")).startswith(b"HTTP/1.1 500")
        assert (await ask(port, b"GET / HTTP/1.1\r\nconnection: close\r\n\r\n")).startswith(b"HTTP/1.1 200")

    serve(handler, scenario)
    assert "a request failed" in told[0]["message"]


@pytest.mark.parametrize("method", [b"HEAD", b"GET"])
def test_a_head_has_no_body(method):
    async def scenario(server, port):
        answer = await ask(port, method + b" / HTTP/1.1\r\nconnection: close\r\n\r\n")
        assert b"content-length: 5\r\n" in answer
        assert answer.endswith(b"hello") is (method == b"GET")

    serve(lambda exchange: exchange.respond(200, b"hello"), scenario)


def test_answering_a_client_that_has_gone_does_nothing():
    held = []

    def handler(exchange):
        gone = asyncio.Event()
        exchange.on_gone = gone.set
        held.append((exchange, gone))
        exchange.begin_stream()
        exchange.send(b"x")

    async def scenario(server, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET / HTTP/1.1\r\n\r\n")
        await reader.readuntil(b"x")
        writer.close()
        ((exchange, gone),) = held
        await gone.wait()
        exchange.begin_stream()
        exchange.send(b"y")
        exchange.end()
        exchange.respond(200)
        exchange.abort()
        assert not exchange.open

    serve(handler, scenario)
