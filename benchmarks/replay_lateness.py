"""How late the replay sends, by its own account, beside a loop that only sleeps.

``python -m benchmarks.replay_lateness [RATE_RPS [SECONDS]]`` replays a Poisson workload against a server that only
keeps time, while another process sleeps to the same schedule: what that one is late by is the machine's doing. Prints
JSON.
"""

import json
import os
import subprocess
import sys

import numpy as np
import uvloop

from benchmarks.adapters.clock import MonotonicClock
from benchmarks.adapters.http_streams import Target
from benchmarks.adapters.replay_run import ReplayOrder, run_replay
from benchmarks.replay_report import Percentiles
from simulator.workload.arrivals import Arrivals
from simulator.workload.generated import poisson
from simulator.workload.lengths import IndependentLengths, TokenHistogram

SLEEPER = "--sleep"


def even_lengths(shortest: int, longest: int) -> TokenHistogram:
    """Every length in between, equally often."""
    tokens = np.arange(shortest, longest + 1, dtype=float)
    return TokenHistogram.of(tokens, np.ones(len(tokens)))


def schedule(rate_rps: float, seconds: float) -> Arrivals:
    """The requests: inputs of 50 to 4,000 tokens, outputs of 10 to 150."""
    lengths = IndependentLengths(even_lengths(50, 4000), even_lengths(10, 150))
    return poisson(rate_rps, seconds, lengths, seed=1).collect()


async def sleep_to(arrivals: Arrivals) -> Percentiles:
    """How late a loop wakes that does nothing but sleep to this schedule."""
    clock = MonotonicClock()
    began_s = clock.now_s()
    late_s = []
    for arrival_s in arrivals.arrival_s.tolist():
        await clock.sleep_until(began_s + arrival_s)
        late_s.append(clock.now_s() - began_s - arrival_s)
    return Percentiles.of(late_s)


def measure(rate_rps: float, seconds: float) -> dict[str, object]:
    """Run both side by side; times in seconds."""
    program = [sys.executable, "-m"]
    sleeper_command = [*program, "benchmarks.replay_lateness", str(rate_rps), str(seconds), SLEEPER]
    server_command = [*program, "benchmarks.adapters.paced_server"]
    with subprocess.Popen(server_command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            url = server.stdout.readline().strip()
            with subprocess.Popen(sleeper_command, stdout=subprocess.PIPE, text=True) as sleeper:
                order = ReplayOrder("lateness", schedule(rate_rps, seconds), Target.of(url), model="none")
                report = uvloop.run(run_replay(order))
                slept = json.loads(sleeper.communicate()[0])
        finally:
            server.communicate()  # closes its standard input, which ends it
    late = report.lateness_s
    return {
        "rate_rps": rate_rps,
        "requests": report.total.requests,
        "finished": report.total.finished,
        "replay_late_s": {"p50": late.p50, "p99": late.p99, "max": late.max},
        "bare_sleep_late_s": slept,
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
    }


def main(arguments: list[str]) -> None:
    """Measure, or be the process that only sleeps."""
    numbers = [float(argument) for argument in arguments if argument != SLEEPER]
    rate_rps, seconds = (*numbers, *(50.0, 40.0)[len(numbers) :])
    if SLEEPER in arguments:
        late = uvloop.run(sleep_to(schedule(rate_rps, seconds)))
        print(json.dumps({"p50": late.p50, "p99": late.p99, "max": late.max}))
    else:
        print(json.dumps(measure(rate_rps, seconds), indent=2))


if __name__ == "__main__":
    main(sys.argv[1:])
