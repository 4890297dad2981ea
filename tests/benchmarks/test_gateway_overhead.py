"""What is computed from gateway measurements, and the mock engine and load generator against each other."""

import json
import shutil
import socket
import sys
from dataclasses import replace

import pytest

from benchmarks.adapters.gateway_processes import Running, built, engines, measure
from benchmarks.gateway_overhead import (
    LAG,
    SCENARIOS,
    Run,
    Scenario,
    lag_buckets,
    lag_p99_ms,
    machine,
    markdown,
    plot,
    run_once,
    summarise,
    table,
)

RUN = Run("dynamollm", "plain-300", 0, 0, 0.04, None, None, 100.0)


def test_medians_and_ratios_within_a_scenario():
    runs = [
        *(replace(RUN, round=n, cpu_ms=cpu_ms, rss_mb=100.0 + n) for n, cpu_ms in enumerate((0.05, 0.04, 0.9))),
        *(replace(RUN, gateway="nginx", round=n, cpu_ms=0.02, failed=n) for n in range(3)),
        replace(RUN, scenario="streams-200", cpu_ms=3.0, ttft_p99_ms=1.5, event_age_p99_ms=1.0),
    ]
    ours, nginx, streams = summarise(runs)
    assert (ours.cpu_ms, ours.cpu_ratio, ours.rss_mb, ours.ttft_p99_ms) == (0.05, 1.0, 102.0, None)
    assert (nginx.cpu_ratio, nginx.failed) == (2.5, 3)
    assert (streams.ttft_p99_ms, streams.event_age_p99_ms, streams.rounds) == (1.5, 1.0, 1)
    assert table([ours, nginx, streams]).row_count == 3
    lines = markdown([ours, nginx, streams], 3).splitlines()
    assert lines[0].startswith("Medians of 3 rounds; cores ")
    assert lines[4] == "| plain-300 | dynamollm | 0.0500 | 1.00 |  |  | 102 |  | 0 |"
    assert {line.count("|") for line in lines[2:]} == {10}


def test_a_plot_is_drawn(tmp_path):
    plot(summarise([RUN, replace(RUN, gateway="nginx", scenario="streams-200")]), tmp_path / "cpu.png")
    assert (tmp_path / "cpu.png").read_bytes().startswith(b"\x89PNG")


def test_slow_gateways_are_asked_less_but_by_as_many():
    assert Scenario("s", 64, 8000, 300).arguments(0.05)[:2] == (64, 400)
    assert Scenario("s", 64, 800, 300).arguments(0.05)[:2] == (64, 64)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def events_of(port, body):
    with socket.create_connection(("127.0.0.1", port), timeout=5) as client:
        head = b"POST /v1/chat/completions HTTP/1.1\r\ncontent-length: %d\r\n\r\n" % len(body)
        client.sendall(head + body)
        answer = b""
        while not answer.endswith(b"0\r\n\r\n"):
            answer += client.recv(65536)
    return answer.count(b";s=")


def test_the_loops_lag_is_that_of_the_timers_between():
    def told(*counts):
        return "".join(
            f'{LAG}_bucket{{le="{b}"}} {c}\n' for b, c in zip(("0.001", "0.002", "+Inf"), counts, strict=True)
        )

    before, after = lag_buckets(told(5, 50, 50)), lag_buckets("# HELP x\n" + told(105, 249, 250))
    assert lag_p99_ms(before, after) == 2.0
    assert lag_p99_ms({}, lag_buckets(told(0, 0, 3))) == float("inf")
    assert lag_p99_ms({}, {}) is None


def test_the_machine_is_named():
    told = machine()
    assert told["cores"] >= 1
    assert told["cpu"]
    assert told["python"] == sys.version


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("cc"), reason="needs Linux and a C compiler")
def test_the_engine_serves_what_the_load_asks(tmp_path):
    port = free_port()
    with built(tmp_path) as (engine, load), engines(engine, [port]):
        for scenario in (Scenario("whole", 4, 200, 5000), Scenario("streams", 8, 16, 300, 5, 1000, 5)):
            told = json.loads(measure(load, port, scenario.arguments(1.0)))
            assert told["good"] == told["requests"] == scenario.requests
            assert ("ttft_us" in told) == (scenario.events > 0)
        assert told["event_age_us"]["n"] == 16 * 5
        assert events_of(port, b'{"stream":true,"max_tokens":3}') == 3
        assert events_of(port, b'{"max_completion_tokens":4,"stream":true}') == 4
        run = run_once(load, Running("direct", 1, port), replace(SCENARIOS[0], requests=64), 0)
        assert run.failed == 0
