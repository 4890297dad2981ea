"""The replay over real sockets, against a server whose every answer is scripted."""

import asyncio
import json
import os
import signal
import socket
import threading

import numpy as np
import pytest
from click.testing import CliRunner
from scripted_server import Call, ScriptedServer, good

from benchmarks.adapters.clock import MonotonicClock
from benchmarks.adapters.http_connection import Connection
from benchmarks.adapters.http_streams import HttpStreams, Target
from benchmarks.adapters.replay_run import ReplayOrder, run_replay
from benchmarks.adapters.target_facts import TargetError, energy_counter_j, first_model, probe_prompts
from benchmarks.replay import Outcome, ReplayRequest
from benchmarks.replay_body import RequestBodies
from benchmarks.replay_prompt import VOCABULARY, Calibration, PromptText
from dynamollm.commands.replay import command
from simulator.workload.arrivals import Arrivals

TEXT = PromptText()
PROBES = len(VOCABULARY) + 2  # requests before the replay's first


def arrivals(count: int, gap_s: float = 0.0, input_tokens: int = 40, output_tokens: int = 4) -> Arrivals:
    return Arrivals(
        np.arange(count) * gap_s, np.full(count, input_tokens, np.int32), np.full(count, output_tokens, np.int32)
    )


def one(script, output_tokens=3, chat=True, timeout_s=5.0, repeat=1) -> tuple[list[Outcome], ScriptedServer]:
    """Outcomes of requests sent one after the other to a server of this script."""

    async def main():
        async with ScriptedServer(script).running() as server:
            bodies = RequestBodies("tiny", chat, text=TEXT)
            streams = HttpStreams(Target.of(server.url), bodies.path, bodies.render, MonotonicClock(), timeout_s)
            outcomes = [
                await streams.complete(ReplayRequest(number, 0.0, 20, output_tokens)) for number in range(repeat)
            ]
            streams.close()
            return outcomes, server

    return asyncio.run(main())


@pytest.mark.parametrize("chat", [True, False])
def test_a_good_stream_is_measured(chat):
    (outcome,), server = one(good, chat=chat)
    assert outcome.failure is None
    assert len(outcome.token_s) == outcome.completion_tokens == 3
    assert outcome.prompt_tokens == (30 if chat else 20)
    assert outcome.sent_s <= outcome.first_s <= outcome.token_s[0] <= outcome.token_s[-1] <= outcome.end_s
    assert server.calls[0].path == ("/v1/chat/completions" if chat else "/v1/completions")


def test_connections_are_used_again():
    outcomes, server = one(good, repeat=5)
    assert [outcome.failure for outcome in outcomes] == [None] * 5
    assert server.connections == 1


async def close_after_answer(call: Call) -> None:
    """Say nothing about closing, and close: what an idle limit looks like from the other side."""
    await good(call)
    if call.number == 0:
        call._writer.close()


async def dies_idle(call: Call) -> None:
    if call.number == 1:
        call.hang_up()
    else:
        await good(call)


def test_a_connection_lost_before_its_first_use_does_not_hang():
    async def main():
        connection = Connection(MonotonicClock())
        connection.connection_made(asyncio.Transport())
        connection.connection_lost(None)
        await asyncio.wait_for(connection.exchange(b"POST"), 1)
        return connection.failure()

    assert asyncio.run(main()) == "connection closed without an answer"


@pytest.mark.parametrize("script", [close_after_answer, dies_idle])
def test_a_connection_that_died_idle_is_replaced_once(script):
    outcomes, server = one(script, repeat=2)
    assert [outcome.failure for outcome in outcomes] == [None, None]
    assert server.connections == 2


async def hangs_up_always(call: Call) -> None:
    call.hang_up()


async def half_a_stream(call: Call) -> None:
    call.head()
    call.token()
    await call._writer.drain()
    call._writer.close()


async def no_done(call: Call) -> None:
    call.head()
    call.token()
    call.raw(b"0\r\n\r\n")


async def error_event(call: Call) -> None:
    call.head()
    call.event({"error": {"message": "queue full", "code": 503}})
    call.end()


async def saturated(call: Call) -> None:
    call.answer(429, {"error": {"message": "busy"}}, "x-llm-d-request-dropped-reason: rejected-saturated\r\n")


async def not_http(call: Call) -> None:
    call.raw(b"SMTP ready\r\n\r\n")


async def silent(call: Call) -> None:
    call.head()


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (hangs_up_always, "connection closed without an answer"),
        (half_a_stream, "connection closed in the middle of the answer"),
        (no_done, "the stream ended without [DONE]"),
        (error_event, "error in the stream: 503 queue full"),
        (saturated, "HTTP 429 rejected-saturated"),
        (not_http, "not HTTP"),
        (silent, "no end after 0.2 s"),
    ],
)
def test_each_way_to_fail_has_its_reason(script, reason):
    (outcome,), _ = one(script, timeout_s=0.2)
    assert outcome.failure is not None
    assert outcome.failure.startswith(reason)


def test_an_error_status_keeps_the_connection():
    outcomes, server = one(saturated, repeat=3)
    assert all(outcome.failure == "HTTP 429 rejected-saturated" for outcome in outcomes)
    assert server.connections == 1


def test_a_target_that_closes_as_soon_as_it_accepts_is_a_counted_failure():
    async def main():
        server = await asyncio.start_server(lambda reader, writer: writer.transport.abort(), "127.0.0.1", 0)
        async with server:
            url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            bodies = RequestBodies("tiny", text=TEXT)
            streams = HttpStreams(Target.of(url), bodies.path, bodies.render, MonotonicClock(), 30.0)
            return [await streams.complete(ReplayRequest(number, 0.0, 5, 1)) for number in range(20)]

    reasons = {outcome.failure for outcome in asyncio.run(main())}
    assert reasons <= {"connection closed without an answer", "cannot connect: Connection reset by peer"}


async def energy_header(call: Call) -> None:
    call.head("x-dynamollm-energy-mj: 2500\r\n")
    call.token()
    call.usage()
    call.end()


async def energy_trailer(call: Call) -> None:
    call.head("trailer: x-dynamollm-energy-mj\r\n")
    call.token()
    call.usage()
    call.end("x-dynamollm-energy-mj: 2500\r\n")


async def energy_usage(call: Call) -> None:
    call.head()
    call.token()
    call.usage(energy_mj=2500)
    call.end()


async def energy_nonsense(call: Call) -> None:
    call.head("x-dynamollm-energy-mj: lots\r\n")
    call.token()
    call.usage()
    call.end()


@pytest.mark.parametrize(
    ("script", "energy_j"), [(energy_header, 2.5), (energy_trailer, 2.5), (energy_usage, 2.5), (energy_nonsense, None)]
)
def test_energy_is_read_where_the_target_puts_it(script, energy_j):
    (outcome,), _ = one(script)
    assert outcome.failure is None
    assert outcome.energy_j == energy_j


def test_a_target_that_is_not_there_is_a_counted_failure():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        bodies = RequestBodies("tiny", text=TEXT)

        async def main():
            streams = HttpStreams(Target.of(url), bodies.path, bodies.render, MonotonicClock(), 1.0)
            return await streams.complete(ReplayRequest(0, 0.0, 5, 1))

        outcome = asyncio.run(main())
    assert outcome.failure is not None
    assert outcome.failure.startswith("cannot connect")


def test_urls_are_understood():
    assert Target.of("http://h:9/v1/").path == ""
    assert Target.of("localhost:8080").port == 8080
    assert b"host: [::1]:8080\r\n" in Target.of("http://user@[::1]:8080/v1").message("/x", b"")
    assert Target.of("http://[::1]:8080").host == "::1"
    secure = Target.of("https://h/gateway", "k")
    assert (secure.tls, secure.port, secure.path) == (True, 443, "/gateway")
    message = secure.message("/v1/completions", b"{}").decode()
    assert message.startswith("POST /gateway/v1/completions HTTP/1.1\r\n")
    assert "authorization: Bearer k\r\n" in message


@pytest.mark.parametrize(
    ("url", "says"), [("ftp://h", "is not a URL"), ("http://", "is not a URL"), ("http://h:port", "[Pp]ort")]
)
def test_what_is_no_url_says_so(url, says):
    with pytest.raises(ValueError, match=says):
        Target.of(url)


def with_server(use, **set_up):
    async def main():
        server = ScriptedServer(set_up.pop("script", good))
        for name, value in set_up.items():
            setattr(server, name, value)
        async with server.running():
            return await use(server)

    return asyncio.run(main())


@pytest.mark.parametrize("chat", [True, False])
def test_the_target_is_asked_for_its_model_and_its_way_of_counting(chat):
    async def use(server):
        target = Target.of(server.url, "key")
        model = await first_model(target)
        return model, await probe_prompts(target, model, chat, MonotonicClock()), server

    model, bodies, server = with_server(use)
    assert model == "tiny"
    assert bodies.calibration == Calibration(10 if chat else 0, 1)
    assert server.calls[0].headers["authorization"] == "bearer key"


def test_prompts_are_exact_though_the_target_counts_words_unalike():
    async def awkward(call: Call) -> None:
        call.head()
        call.token()
        tokens = 3 + sum(1 + ("o" in word) for word in call.prompt.split())
        call.event({"choices": [], "usage": {"prompt_tokens": tokens, "completion_tokens": call.body["max_tokens"]}})
        call.end()

    async def use(server):
        return await run_replay(ReplayOrder("t", arrivals(30, input_tokens=777), Target.of(server.url)))

    report = with_server(use, script=awkward)
    assert report.total.finished == 30
    assert report.input_token_error.max == 0


async def no_usage(call: Call) -> None:
    call.head()
    call.token()
    call.end()


@pytest.mark.parametrize(
    ("set_up", "says"),
    [
        ({"models": {"data": []}}, "lists no model"),
        ({"models": []}, "lists no model"),
        ({"script": no_usage}, "reports no usage"),
        ({"script": saturated}, "failed: HTTP 429"),
    ],
)
def test_a_target_that_cannot_be_replayed_against_says_why(set_up, says):
    with pytest.raises(TargetError, match=says):
        with_server(lambda server: run_replay(ReplayOrder("t", arrivals(1), Target.of(server.url))), **set_up)


class Metered(ScriptedServer):
    """Each scrape of its metrics is the next of these texts."""

    def __init__(self, *texts: str):
        super().__init__()
        self._texts = iter(texts)

    @property
    def telemetry(self):
        return next(self._texts)

    @telemetry.setter
    def telemetry(self, value):
        pass


def gpus(first_mj: int) -> str:
    name = "DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION"
    return f'# TYPE {name} counter\n{name}{{gpu="0",hostname="n{{0}}"}} {first_mj}\n{name}{{gpu="1"}} 1e6\n'


def gateway(metered_j: int) -> str:
    name = "dynamollm_metered_joules"
    return f"# TYPE {name}_total counter\n{name}_total {metered_j}\n"


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize(
    ("texts", "energy_j"),
    [((gpus(1000), gpus(4000)), 3), ((gateway(7), gateway(19)), 12), (("up 1\n", "up 1\n"), None)],
)
def test_the_gpus_energy_is_what_their_counters_grew_by(named, texts, energy_j):
    async def main():
        async with Metered(*texts).running() as server:
            telemetry = f"{server.url}/metrics" if named else None
            return await run_replay(ReplayOrder("t", arrivals(2), Target.of(server.url), gpu_telemetry=telemetry))

    if named and energy_j is None:
        with pytest.raises(TargetError, match="exports none of"):
            asyncio.run(main())
    else:
        assert asyncio.run(main()).gpu_energy_j == energy_j


@pytest.mark.parametrize(
    ("telemetry", "says"), [("up 1\n", "exports none of DCGM_FI_DEV_TOTAL_ENERGY"), ("<html>\n", "not in Prometheus")]
)
def test_telemetry_without_the_counter_says_so(telemetry, says):
    with pytest.raises(TargetError, match=says):
        with_server(lambda server: energy_counter_j(f"{server.url}/metrics"), telemetry=telemetry)


def test_a_replay_accounts_for_every_request():
    async def mixed(call: Call) -> None:
        number = call.number - PROBES
        await (good if number < 0 else (good, good, saturated, error_event)[number % 4])(call)

    done = []
    report = with_server(
        lambda server: run_replay(ReplayOrder("t", arrivals(40), Target.of(server.url)), done.append), script=mixed
    )
    assert report.accounted
    assert (report.total.finished, report.total.failed) == (20, 20)
    assert report.input_token_error.max == 0
    assert report.other_output_length == 0
    assert done == list(range(1, 41))


def test_a_signal_ends_a_replay_with_what_was_done():
    async def stuck(call: Call) -> None:
        await good(call)
        if call.number == PROBES + 3:
            os.kill(os.getpid(), signal.SIGINT)

    report = with_server(
        lambda server: run_replay(ReplayOrder("t", arrivals(1000, gap_s=0.02), Target.of(server.url))), script=stuck
    )
    assert report.accounted
    assert report.total.finished >= 1
    assert report.not_sent > 900
    assert report.wall_s < 15


TRACE = "TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(
    f"2023-11-16 18:15:{second:02d}.5,{40 + 300 * (second % 2)},{5 + second}\n" for second in range(30)
)


class Served:
    """A scripted server in a thread, for commands that run their own loop."""

    def __init__(self, script=good):
        self.server = ScriptedServer(script)
        self._ready, self._loop = threading.Event(), asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._main(),))

    async def _main(self):
        async with self.server.running():
            self._ready.set()
            await self._stop.wait()
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()

    def __enter__(self):
        self._thread.start()
        self._ready.wait()
        return self.server

    def __exit__(self, *_):
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
        self._loop.close()


def invoke(*args):
    return CliRunner().invoke(command, [str(arg) for arg in args])


def test_the_command_replays_a_file_and_prints_tables(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text(TRACE)
    with Served() as server:
        result = invoke("--trace", path, "--url", server.url, "--speedup", 200)
        assert result.exit_code == 0, result.output
        assert "30 planned = 30 finished + 0 failed" in result.output
        assert "MS" in result.output
        asked = sorted(call.body["max_tokens"] for call in server.calls[PROBES:])
    assert asked == list(range(5, 35))


def test_the_command_prints_json_of_a_window(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text(TRACE)
    with Served() as server:
        cut = ("--start", 5, "--duration", 10, "--limit", 7)
        result = invoke("--trace", path, "--url", server.url, "--speedup", 100, *cut, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["planned"] == report["total"]["finished"] == 7
    assert report["model"] == "tiny"


def test_the_command_fails_when_nothing_finished(tmp_path):
    async def after_probes(call: Call) -> None:
        await (good if call.number < PROBES else saturated)(call)

    path = tmp_path / "trace.csv"
    path.write_text(TRACE)
    with Served(after_probes) as server:
        result = invoke("--trace", path, "--url", server.url, "--speedup", 1000)
    assert result.exit_code == 1
    assert "30 x HTTP 429 rejected-saturated" in result.output


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--trace", "none.csv"), "neither a file nor a known workload"),
        (("--trace", "poisson-low", "--url", "ftp://x"), "is not a URL"),
        (("--trace", "poisson-low", "--duration", "0.0001"), "holds no request"),
        (("--trace", "poisson-low", "--limit", "1", "--url", "http://127.0.0.1:1"), "cannot be reached"),
    ],
)
def test_user_errors_are_one_message(args, says):
    result = invoke(*args)
    assert type(result.exception).__name__ == "UserError"
    assert says in str(result.exception)


def test_a_bad_row_stops_the_command_with_file_and_line(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text(TRACE + "today,1,1\n")
    result = invoke("--trace", path)
    assert f"{path}:32: TIMESTAMP is not a date" in str(result.exception)
