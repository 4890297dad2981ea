"""Virtual time: waits take none, order is kept, threads and sockets still work."""

import asyncio
import socket
import threading
import time

import pytest

from simulator import virtual_loop
from simulator.virtual_loop import run


def test_an_hour_of_waiting_takes_no_time_and_is_exact():
    async def main() -> float:
        await asyncio.sleep(3600)
        return asyncio.get_running_loop().time()

    assert run(main(), start_s=5.0) == 3605.0


def test_timers_fire_in_order_of_their_time():
    fired = []

    async def waiter(delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        fired.append(delay_s)

    async def main() -> None:
        await asyncio.gather(*(waiter(delay_s) for delay_s in (30.0, 10.0, 20.0, 0.0)))

    run(main())
    assert fired == [0.0, 10.0, 20.0, 30.0]


def test_a_thread_is_waited_for_without_a_jump():
    async def main() -> tuple[int, float]:
        ready = threading.Event()
        future = asyncio.get_running_loop().run_in_executor(None, ready.wait)
        ready.set()
        await future
        return 1, asyncio.get_running_loop().time()

    assert run(main()) == (1, 0.0)


def test_the_clock_stands_still_while_a_thread_works_though_a_timer_is_near():
    async def main() -> list[tuple[str, float]]:
        heard: list[tuple[str, float]] = []
        loop = asyncio.get_running_loop()

        async def tick() -> None:
            await asyncio.sleep(0.001)
            heard.append(("timer", loop.time()))

        timer = asyncio.create_task(tick())
        await asyncio.to_thread(time.sleep, 0.05)
        heard.append(("thread", loop.time()))
        await timer
        return heard

    assert run(main()) == [("thread", 0.0), ("timer", 0.001)]


def test_a_thread_that_waits_for_the_clock_is_not_waited_for_in_vain(monkeypatch):
    monkeypatch.setattr(virtual_loop, "THREAD_PATIENCE_S", 0.05)

    async def main() -> float:
        released = threading.Event()
        loop = asyncio.get_running_loop()
        loop.call_later(7.0, released.set)
        await asyncio.to_thread(released.wait)
        return loop.time()

    assert run(main()) == 7.0


def test_sockets_work():
    async def main() -> bytes:
        left, right = socket.socketpair()
        reader, _ = await asyncio.open_connection(sock=left)
        right.sendall(b"hello")
        right.close()
        return await reader.read()

    assert run(main()) == b"hello"


def test_a_server_of_the_loop_is_reached_before_the_clock_moves():
    """Over TCP the kernel may deliver late, and a timer a millisecond away would fire first."""
    heard: list[tuple[str, float]] = []

    async def main() -> None:
        clock = asyncio.get_running_loop().time

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            heard.append(((await reader.readline()).decode(), clock()))
            writer.write(b"world\n")
            await writer.drain()
            writer.close()

        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        ticking = asyncio.create_task(asyncio.sleep(0.001))
        for _ in range(200):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"hello\n")
            assert await reader.read() == b"world\n"
            writer.close()
        assert not ticking.done()
        server.close()
        await server.wait_closed()
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", port)

    run(main())
    assert heard == [("hello\n", 0.0)] * 200
