"""`dynamollm profile measure`: the sweep, its loops in virtual time, and the whole of it against a scripted server."""

import asyncio
import csv

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from scripted_server import ScriptedServer, good

from benchmarks.profile_measure import (
    COLUMNS,
    ROUNDS,
    ClosedLoop,
    Kind,
    Load,
    LoadFailedError,
    poisson,
    row_of,
    sweep,
)
from benchmarks.replay import Outcome
from dynamollm.cli import group
from energy.adapters.measurement_csv import read_measurements
from simulator.virtual_loop import run

KIND = Kind("H100-SXM", "tiny", 2, "bf16")


class LoopClock:
    def now_s(self):
        return asyncio.get_running_loop().time()

    async def sleep_until(self, due_s):
        await asyncio.sleep(max(due_s - self.now_s(), 0))


class Engine:
    """First token after ``ttft_s``, the others ``tbt_s`` apart; counts what is open."""

    def __init__(self, ttft_s=0.2, tbt_s=0.01):
        self.ttft_s, self.tbt_s = ttft_s, tbt_s
        self.open = self.most_open = self.served = 0

    async def complete(self, request):
        sent_s = LoopClock().now_s()
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        await asyncio.sleep(self.ttft_s + self.tbt_s * (request.output_tokens - 1))
        self.open -= 1
        self.served += 1
        tokens = tuple(sent_s + self.ttft_s + self.tbt_s * n for n in range(request.output_tokens))
        return Outcome(sent_s, LoopClock().now_s(), None, tokens[0], tokens, 103, request.output_tokens)


@given(st.integers(1, 20), st.integers(2, 30))
def test_a_closed_loop_keeps_its_clients_busy_and_sends_what_the_fit_takes_it_to_have_sent(clients, output_tokens):
    engine, outcomes = Engine(), []
    loop = ClosedLoop(Load(1980, 100, output_tokens, clients), engine, LoopClock(), outcomes.append)
    run(loop.run())
    assert engine.served == len(outcomes) == ROUNDS * clients
    assert engine.most_open == clients


def test_a_row_holds_the_means_and_lengths_that_were_seen():
    engine, outcomes = Engine(ttft_s=0.2, tbt_s=0.01), []
    load = Load(1980, 100, 8, 4)
    run(ClosedLoop(load, engine, LoopClock(), outcomes.append).run())
    row = row_of(KIND, load, outcomes, 312.5)
    assert tuple(row) == COLUMNS
    assert (row["input_tokens"], row["output_tokens"], row["concurrency"], row["rate_rps"]) == ("103", "8", "4", "")
    assert float(row["ttft_s"]) == pytest.approx(0.2)
    assert float(row["tbt_s"]) == pytest.approx(0.01)
    assert (row["tp"], row["sm_clock_mhz"], row["power_w"]) == ("2", "1980", "312.5")


def test_a_load_whose_requests_fail_gives_no_row_but_the_reason():
    load = Load(1980, 100, 8, 1)
    failed = Outcome(0.0, 1.0, "HTTP 503 queue full")
    with pytest.raises(LoadFailedError, match=r"100 \+ 8 tokens, 1 clients, 1980 MHz: 2 of 2 .* HTTP 503 queue full"):
        row_of(KIND, load, [failed, failed], None)
    with pytest.raises(LoadFailedError, match="nothing was sent"):
        row_of(KIND, load, [], None)
    one_token = Outcome(0.0, 1.0, None, 0.5, (0.5,), 100, 1)
    with pytest.raises(LoadFailedError, match="two tokens"):
        row_of(KIND, load, [one_token], None)


def test_one_failure_in_a_hundred_is_left_out():
    good_one = Outcome(0.0, 1.0, None, 0.5, (0.5, 0.6), 100, 2)
    row = row_of(KIND, Load(1980, 100, 2, 10), [good_one] * 100 + [Outcome(0.0, 9.0, "reset")], None)
    assert float(row["ttft_s"]) == 0.5


def test_a_sweep_has_each_load_once_lightest_first_clock_after_clock():
    loads = sweep([800, 1200], [(128, 64)], [8, 1, 8], [0.5])
    assert [str(load) for load in loads] == [
        "128 + 64 tokens, 1 clients, 800 MHz",
        "128 + 64 tokens, 8 clients, 800 MHz",
        "128 + 64 tokens, 0.5 requests/s, 800 MHz",
        "128 + 64 tokens, 1 clients, 1200 MHz",
        "128 + 64 tokens, 8 clients, 1200 MHz",
        "128 + 64 tokens, 0.5 requests/s, 1200 MHz",
    ]
    assert len({load.key() for load in loads}) == len(loads)


def test_an_open_loop_has_its_rate_and_is_the_same_every_time():
    load = Load(1980, 128, 64, None, 5.0)
    first, again, other = poisson(load, 400.0, 1), poisson(load, 400.0, 1), poisson(load, 400.0, 2)
    assert first.arrival_s.tolist() == again.arrival_s.tolist() != other.arrival_s.tolist()
    assert len(first) / first.arrival_s[-1] == pytest.approx(5.0, rel=0.1)
    assert set(first.input_tokens.tolist()) == {128}


async def paced(call):
    """As good, with the tokens apart, as a sweep expects of an engine."""
    call.head()
    for _ in range(call.body["max_tokens"]):
        call.token()
        await asyncio.sleep(0.001)
    call.usage()
    call.end()


def measured(arguments, script=paced):
    """The command against a scripted server, in a thread of its own."""

    async def main():
        async with ScriptedServer(script).running() as server:
            words = ["profile", "measure", "--url", server.url, "--gpu", "H100-SXM", *arguments]
            return await asyncio.to_thread(CliRunner().invoke, group, words), server

    return asyncio.run(main())


SMALL = ("--lengths", "40+4", "--concurrency", "1,2", "--rate", "200", "--open-duration", "1", "--tp", "1")


def test_the_command_writes_a_csv_that_profiles_are_fitted_to(tmp_path):
    out = tmp_path / "sweep.csv"
    result, _ = measured(["-o", str(out), *SMALL])
    assert result.exit_code == 0, result.output
    assert "3 loads measured, 0 were there" in result.output
    rows = read_measurements(out).measurements
    assert [(m.load.input_tokens, m.load.output_tokens, m.rate_rps) for m in rows][:2] == [(40, 4, None), (40, 4, None)]
    assert rows[2].rate_rps == 200
    assert all(0 < m.ttft_s < 5 and m.gpu == "H100-SXM" and m.sm_clock_mhz == 1980 for m in rows)


def test_a_stopped_sweep_goes_on_where_it_was(tmp_path):
    out = tmp_path / "sweep.csv"
    measured(["-o", str(out), *SMALL])
    lines = out.read_text().splitlines()
    out.write_text("\n".join(lines[:2]) + "\n")
    result, server = measured(["-o", str(out), *SMALL])
    assert "2 loads measured, 1 were there" in result.output
    assert sum(call.body["max_tokens"] == 4 for call in server.calls) == ROUNDS * 2 + 200
    assert out.read_text().splitlines()[1] == lines[1]
    with out.open() as file:
        assert [row["concurrency"] for row in csv.DictReader(file)] == ["1", "2", ""]


def test_a_file_of_something_else_is_not_overwritten(tmp_path):
    out = tmp_path / "notes.csv"
    out.write_text("a,b\n1,2\n")
    result, _ = measured(["-o", str(out), *SMALL])
    assert result.exit_code != 0
    assert "not written by" in str(result.exception or result.output)
    assert out.read_text() == "a,b\n1,2\n"


async def refuses(call):
    if call.number < 4:
        await good(call)
    else:
        call.answer(503, {"error": {"message": "queue full", "code": 503}})


def test_a_server_that_refuses_is_told_with_the_load(tmp_path):
    result, _ = measured(["-o", str(tmp_path / "x.csv"), *SMALL], refuses)
    assert result.exit_code != 0
    assert "queue full" in str(result.exception or result.output)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--sm-clocks", "800,1200"], "needs --agent"),
        (["--gpu", "X1"], "name the clock that 'X1' runs at"),
        (["--lengths", "128"], "is not INPUT+OUTPUT"),
        (["--lengths", "128+1"], "with 2 or more out"),
        (["--concurrency", "a"], "is not numbers"),
        (["--concurrency", "0"], "above 0"),
        (["--agent", "unix:/x", "--tp", "2"], "1 given, --tp says 2"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_sent(tmp_path, arguments, said):
    words = ["profile", "measure", "--url", "http://127.0.0.1:1", "--gpu", "H100-SXM", "-o", str(tmp_path / "x.csv")]
    result = CliRunner().invoke(group, [*words, *arguments])
    assert result.exit_code != 0
    assert said in (result.output + str(result.exception))
