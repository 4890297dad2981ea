"""Virtual time: waits take none, order is kept, threads and sockets still work."""

import asyncio
import socket
import threading

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


def test_sockets_work():
    async def main() -> bytes:
        left, right = socket.socketpair()
        reader, _ = await asyncio.open_connection(sock=left)
        right.sendall(b"hello")
        right.close()
        return await reader.read()

    assert run(main()) == b"hello"
