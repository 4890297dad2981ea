"""The engine in real time, on an event loop whose clock is virtual: timing is exact, and nothing waits."""

import asyncio
import selectors

import pytest

from energy.adapters.catalogue import load_profile
from energy.profile import step_power_w, step_time_s
from simulator.emulator.adapters.pump import MAX_LAG_S, EnginePump
from simulator.emulator.adapters.replies import Reply, Sequence
from simulator.emulator.bodies import BodyRules, parse_chat
from simulator.emulator.gpus import PowerMeter
from simulator.emulator.text import FourByteTokenizer, OutputLengths
from simulator.engine import Engine, EngineLimits

PROFILE = load_profile("llama-3.1-70b-fp8-h100")
COEFFICIENTS = PROFILE.step(2, 1980)


class VirtualSelector(selectors.SelectSelector):
    """Waits in no time: moves the loop's clock on instead."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0

    def select(self, timeout=None):
        if timeout is not None:
            self.now_s += timeout
        return super().select(0)


def run_virtually(scenario) -> None:
    selector = VirtualSelector()
    loop = asyncio.SelectorEventLoop(selector)
    loop.time = lambda: selector.now_s
    loop.late = lambda by_s: setattr(selector, "now_s", selector.now_s + by_s)
    try:
        loop.run_until_complete(scenario(loop))
    finally:
        loop.close()


class Watched:
    """A pump and all it said."""

    def __init__(self) -> None:
        self.tokens: list[tuple[float, tuple[int, ...]]] = []
        self.flushes: list[float] = []
        self.finished: list[int] = []
        self.loop = asyncio.get_running_loop()
        self.meter = PowerMeter(self.loop.time(), COEFFICIENTS.idle_w)
        self.engine = Engine(EngineLimits(kv_blocks=10_000), COEFFICIENTS)
        self.pump = EnginePump(
            self.engine,
            self.meter,
            lambda step, at_s: None,
            self.on_tokens,
            lambda: self.flushes.append(self.loop.time()),
        )

    def on_tokens(self, emitted, finished, at_s):
        self.tokens.append((at_s, tuple(emitted)))
        self.finished += finished

    def submit(self, request_id: int, input_tokens: int, output_tokens: int) -> None:
        self.engine.submit(request_id, input_tokens, output_tokens, self.loop.time())
        self.pump.kick()

    async def until_done(self) -> None:
        while self.engine.running or self.engine.waiting:  # noqa: ASYNC110  (costs nothing in virtual time)
            await asyncio.sleep(0.01)


def test_steps_take_what_the_profile_says():
    async def scenario(loop):
        watched = Watched()
        watched.submit(1, 100, 3)
        await watched.until_done()
        prefill_s = step_time_s(COEFFICIENTS, 100, 0.5 * 100 * 100, 0, 0)
        decode_s = [step_time_s(COEFFICIENTS, 0, 0, 1, 101), step_time_s(COEFFICIENTS, 0, 0, 1, 102)]
        ends_s = [at_s for at_s, _ in watched.tokens]
        assert ends_s == pytest.approx([prefill_s, prefill_s + decode_s[0], prefill_s + sum(decode_s)], rel=1e-6)
        assert watched.finished == [1]

    run_virtually(scenario)


def test_energy_is_that_of_the_steps_and_the_idle_rest():
    async def scenario(loop):
        watched = Watched()
        await asyncio.sleep(1.0)
        watched.submit(1, 100, 1)
        await watched.until_done()
        await asyncio.sleep(1.0)
        load = (100, 0.5 * 100 * 100, 0, 0)
        busy_s, busy_w = step_time_s(COEFFICIENTS, *load), step_power_w(COEFFICIENTS, *load)
        expected_j = busy_w * busy_s + COEFFICIENTS.idle_w * (loop.time() - busy_s)
        assert watched.meter.energy_j(loop.time()) == pytest.approx(expected_j, rel=1e-6)

    run_virtually(scenario)


def test_a_late_loop_does_not_slow_the_engine_down():
    async def scenario(loop):
        punctual, late = Watched(), Watched()
        punctual.submit(1, 100, 50)
        late.submit(1, 100, 50)
        for number in range(30):
            await asyncio.sleep(0.02)
            loop.late(0.003 * (number % 5))
        await punctual.until_done()
        await late.until_done()
        assert late.tokens == punctual.tokens
        assert late.pump.lost_s == 0

    run_virtually(scenario)


def test_overdue_steps_are_made_up_for_and_leave_together():
    async def scenario(loop):
        watched = Watched()
        watched.submit(1, 10, 100)
        await asyncio.sleep(0.001)
        loop.late(0.2)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert len(watched.tokens) > 5
        assert len(watched.flushes) == 1
        gaps_s = [b[0] - a[0] for a, b in zip(watched.tokens, watched.tokens[1:], strict=False)]
        assert max(gaps_s) < 0.02

    run_virtually(scenario)


def test_a_loop_that_stood_still_loses_the_time():
    async def scenario(loop):
        watched = Watched()
        watched.submit(1, 10, 1000)
        await asyncio.sleep(0.001)
        loop.late(10.0)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert watched.pump.lost_s > 10.0 - MAX_LAG_S
        assert len(watched.tokens) < 5
        assert watched.tokens[-1][0] <= loop.time()

    run_virtually(scenario)


def test_a_new_clock_holds_from_the_next_step_on():
    async def scenario(loop):
        watched = Watched()
        slow = PROFILE.step(2, 345)
        watched.submit(1, 2000, 3)
        watched.engine.set_coefficients(slow)
        await watched.until_done()
        ends_s = [at_s for at_s, _ in watched.tokens]
        assert ends_s[0] == pytest.approx(step_time_s(COEFFICIENTS, 2000, 0.5 * 2000**2, 0, 0), rel=1e-6)
        assert ends_s[1] - ends_s[0] == pytest.approx(step_time_s(slow, 0, 0, 1, 2001), rel=1e-6)

    run_virtually(scenario)


def test_held_it_ends_its_step_and_waits():
    async def scenario(loop):
        watched = Watched()
        watched.submit(1, 10, 5)
        watched.pump.hold(True)
        await asyncio.sleep(5.0)
        assert len(watched.tokens) == 1
        watched.pump.hold(False)
        await watched.until_done()
        assert len(watched.tokens) == 5
        assert watched.tokens[1][0] > 5.0

    run_virtually(scenario)


def test_stopped_it_never_steps_again():
    async def scenario(loop):
        watched = Watched()
        watched.submit(1, 10, 5)
        await asyncio.sleep(0.005)
        watched.pump.stop()
        await asyncio.sleep(5.0)
        watched.pump.kick()
        assert watched.tokens == []
        busy_j = watched.meter.energy_j(loop.time()) - COEFFICIENTS.idle_w * loop.time()
        assert 0 < busy_j < COEFFICIENTS.max_w * 0.006

    run_virtually(scenario)


class SlowClient:
    """An exchange whose client reads when it likes."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.writable = True
        self.ended = False
        self.answered = False
        self.on_gone = self.on_writable = None

    def begin_stream(self) -> None:
        self.answered = True

    def send(self, content: bytes) -> None:
        self.sent.append(content)

    def end(self, content: bytes) -> None:
        self.send(content)
        self.ended = True


def test_a_slow_reader_gets_everything_in_fewer_chunks():
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 9, "ignore_eos": True, "stream": True}
    generation = parse_chat(body, BodyRules("tiny", 4096, FourByteTokenizer(), OutputLengths()))
    client, over = SlowClient(), []
    reply = Reply(client, generation, "chatcmpl-1", "tiny", 0, over.append)
    reply.begin()
    sequence = Sequence(1, reply, 0, generation.choices[0], 0.0)
    reply.sequences.append(sequence)
    for number in range(9):
        sequence.generated += 1
        client.writable = number < 2
        if number == 8:
            sequence.reason = "length"
        reply.flush()
    assert len(client.sent) == 2
    assert over == []
    client.writable = True
    client.on_writable()
    assert client.ended
    assert over == [reply]
    words = b"".join(client.sent).count(b'"content":" ')
    assert words == 3  # two single tokens, and the last seven in one chunk
