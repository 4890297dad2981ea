"""What a gateway costs: CPU per request and per stream, and the time it adds, ours beside others in the same run.

    python -m benchmarks.gateway_overhead [--rounds 5] [--gateways dynamollm,nginx,...] [--scenarios plain-300,...]
                                          [--json FILE] [--plot FILE]

Two mock engines and the load generator (``benchmarks/native``) share one core, the gateway has another. Gateways take
turns within every round, so that what else the machine does hits all alike; quote medians, and ratios within one run.
CPU is user plus system time of the gateway's process tree; ours runs as served: authentication, nine pools, 32
instances, classification, prediction, metering, probes and metrics.
"""

import json
import os
import platform
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from benchmarks.adapters.gateway_processes import COMMANDS, Running, built, engines, gateways, measure

ENGINE_PORTS = (19301, 19302)
FIRST_PORT = 19310
OURS = "dynamollm"
LAG = "dynamollm_event_loop_lag_seconds"
SHARE_OF_REQUESTS = {"litellm": 0.05}  # of those that take so long that a twentieth tells as much
WHOLE_ANSWERS_ONLY = frozenset(("litellm",))  # 200 streams at once take it minutes


@dataclass(frozen=True, slots=True)
class Scenario:
    """What the load generator is told."""

    name: str
    connections: int
    requests: int
    prompt_bytes: int
    events: int = 0  # 0: whole answers
    gap_us: int = 0
    ramp_ms: int = 0

    def arguments(self, share: float) -> tuple[int, ...]:
        """In the order of ``benchmarks/native/load.c``, with this share of the requests."""
        requests = max(self.connections, round(self.requests * share))
        return (self.connections, requests, self.prompt_bytes, self.events, self.gap_us, self.ramp_ms)


SCENARIOS = (
    Scenario("plain-300", 64, 8000, 300),
    Scenario("plain-4k", 64, 8000, 4000),
    Scenario("plain-32k", 64, 4000, 32_000),
    Scenario("streams-200", 200, 600, 300, 128, 20_000, 2560),
    Scenario("streams-800", 800, 1600, 300, 128, 20_000, 2560),
)


@dataclass(frozen=True, slots=True)
class Run:
    """One gateway, one scenario, one round. Milliseconds; None where it does not apply."""

    gateway: str
    scenario: str
    round: int
    failed: int
    cpu_ms: float  # a request or stream
    ttft_p99_ms: float | None  # to the first event, which the engine sends at once
    event_age_p99_ms: float | None  # added to an event
    rss_mb: float
    lag_p99_ms: float | None = None  # how late its event loop was; only ours tells


@dataclass(frozen=True, slots=True)
class Summary:
    """Medians of the rounds."""

    gateway: str
    scenario: str
    rounds: int
    failed: int
    cpu_ms: float
    cpu_ratio: float  # of ours to this gateway's; below 1 ours costs less
    ttft_p99_ms: float | None
    event_age_p99_ms: float | None
    rss_mb: float
    lag_p99_ms: float | None


def lag_buckets(metrics: str) -> dict[float, float]:
    """Timers of the event loop by how late they were at most, in s; cumulative, as Prometheus has them."""
    lines = (line for line in metrics.splitlines() if line.startswith(LAG + "_bucket"))
    return {float(line.split('"')[1]): float(line.rsplit(" ", 1)[1]) for line in lines}


def lag_p99_ms(before: dict[float, float], after: dict[float, float]) -> float | None:
    """The bound that 99 % of the timers between two looks stay under; None where nothing is told."""
    counts = {bound: count - before.get(bound, 0.0) for bound, count in after.items()}
    timers = max(counts.values(), default=0.0)
    return min((bound * 1000.0 for bound, count in counts.items() if count >= 0.99 * timers), default=None)


def run_once(load: Path, gateway: Running, scenario: Scenario, number: int) -> Run:
    """Measure one gateway once."""
    share = SHARE_OF_REQUESTS.get(gateway.name, 1.0)
    lag_before = lag_buckets(gateway.metrics()) if gateway.name == OURS else {}
    before_s = gateway.cpu_s()
    told: dict[str, Any] = json.loads(measure(load, gateway.port, scenario.arguments(share)))
    cpu_ms = (gateway.cpu_s() - before_s) * 1000.0 / told["requests"]
    lag_after = lag_buckets(gateway.metrics()) if gateway.name == OURS else {}

    def p99_ms(name: str) -> float | None:
        return told[name]["p99"] / 1000.0 if name in told else None

    failed = told["requests"] - told["good"]
    return Run(
        gateway.name,
        scenario.name,
        number,
        failed,
        cpu_ms,
        p99_ms("ttft_us"),
        p99_ms("event_age_us"),
        gateway.rss_mb(),
        lag_p99_ms(lag_before, lag_after),
    )


def summarise(runs: list[Run]) -> list[Summary]:
    """Medians by scenario and gateway, in the order they were run."""
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.scenario, run.gateway), []).append(run)
    summaries = []
    for (scenario, gateway), own in groups.items():
        cpu_ms = statistics.median(run.cpu_ms for run in own)
        ours = groups.get((scenario, OURS), own)
        summaries.append(
            Summary(
                gateway,
                scenario,
                len(own),
                sum(run.failed for run in own),
                cpu_ms,
                statistics.median(run.cpu_ms for run in ours) / cpu_ms,
                _median([run.ttft_p99_ms for run in own]),
                _median([run.event_age_p99_ms for run in own]),
                max(run.rss_mb for run in own),
                _median([run.lag_p99_ms for run in own]),
            )
        )
    return summaries


def table(summaries: list[Summary]) -> Table:
    """What is printed."""
    out = Table(
        "scenario",
        "gateway",
        "CPU ms",
        "ours / it",
        "TTFT P99 ms",
        "event P99 ms",
        "RSS MB",
        "loop P99 ms",
        "failed",
        box=None,
    )
    for each in summaries:
        out.add_row(
            each.scenario,
            each.gateway,
            f"{each.cpu_ms:.4f}",
            f"{each.cpu_ratio:.2f}",
            _shown(each.ttft_p99_ms),
            _shown(each.event_age_p99_ms),
            f"{each.rss_mb:.0f}",
            _shown(each.lag_p99_ms),
            str(each.failed),
        )
    return out


def markdown(summaries: list[Summary], rounds: int) -> str:
    """The same for reading on: what it was measured on, then a row for each scenario and gateway."""
    told = ", ".join(f"{name} {value}" for name, value in machine().items())
    names = (
        "scenario",
        "gateway",
        "CPU ms",
        "ours / it",
        "TTFT P99 ms",
        "event P99 ms",
        "RSS MB",
        "loop P99 ms",
        "failed",
    )
    lines = [
        f"Medians of {rounds} rounds; {told}; load average {os.getloadavg()[0]:.1f} at the end.",
        "",
        "| " + " | ".join(names) + " |",
        "|---|---|" + "---:|" * (len(names) - 2),
    ]
    for e in summaries:
        cells = (e.scenario, e.gateway, f"{e.cpu_ms:.4f}", f"{e.cpu_ratio:.2f}", _shown(e.ttft_p99_ms))
        more = (_shown(e.event_age_p99_ms), f"{e.rss_mb:.0f}", _shown(e.lag_p99_ms), str(e.failed))
        lines.append("| " + " | ".join((*cells, *more)) + " |")
    return "\n".join(lines) + "\n"


def write(file: Path, text: str) -> None:
    """Whole or not at all."""
    temporary = file.with_suffix(".tmp")
    temporary.write_text(text)
    os.replace(temporary, file)


def plot(summaries: list[Summary], file: Path) -> None:
    """CPU a request, one panel a scenario; logarithmic where one gateway costs far more than another."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    scenarios = list(dict.fromkeys(each.scenario for each in summaries))
    figure, panels = pyplot.subplots(1, len(scenarios), figsize=(3.2 * len(scenarios), 3.4), squeeze=False)
    for panel, scenario in zip(panels[0], scenarios, strict=True):
        own = sorted((each for each in summaries if each.scenario == scenario), key=lambda each: each.cpu_ms)
        colours = ["tab:orange" if each.gateway == OURS else "tab:grey" for each in own]
        bars = panel.barh([each.gateway for each in own], [each.cpu_ms for each in own], color=colours)
        panel.bar_label(bars, [f"{each.cpu_ms:.3g}" for each in own], padding=2, fontsize=8)
        cheapest_ms, dearest_ms = own[0].cpu_ms, own[-1].cpu_ms
        if dearest_ms > 30 * cheapest_ms:
            panel.set_xscale("log")
            panel.set_xlim(cheapest_ms / 3, dearest_ms * 10)
        else:
            panel.set_xlim(0, dearest_ms * 1.3)
        panel.locator_params(axis="x", **({"numticks": 4} if panel.get_xscale() == "log" else {"nbins": 4}))
        panel.set_title(scenario, fontsize=10)
        panel.set_xlabel("CPU ms " + ("a stream" if scenario.startswith("streams") else "a request"), fontsize=9)
        panel.tick_params(labelsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def machine() -> dict[str, str | int | None]:
    """What the figures were measured on."""
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "cores": os.cpu_count(),
        "cpu": models[0].partition(": ")[2] if models else platform.machine(),
        "kernel": platform.release(),
        "python": sys.version,  # ours; how it was built weighs in its figures
    }


def _median(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _shown(value_ms: float | None) -> str:
    return "" if value_ms is None else f"{value_ms:.2f}"


@click.command()
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
@click.option("--gateways", "names", default=",".join(COMMANDS), show_default=True)
@click.option("--scenarios", default=",".join(s.name for s in SCENARIOS), show_default=True)
@click.option(
    "--json",
    "json_file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write all runs here, and a table beside.",
)
@click.option("--plot", "plot_file", type=click.Path(dir_okay=False, path_type=Path), help="Draw the CPU costs here.")
def main(rounds: int, names: str, scenarios: str, json_file: Path | None, plot_file: Path | None) -> None:
    """Measure gateways in front of two mock engines."""
    console = Console()
    chosen = [scenario for scenario in SCENARIOS if scenario.name in scenarios.split(",")]
    runs = []
    with (
        tempfile.TemporaryDirectory() as folder,
        built(Path(folder)) as (engine, load),
        engines(engine, ENGINE_PORTS),
        gateways(names.split(","), FIRST_PORT, ENGINE_PORTS) as running,
    ):
        for number in range(rounds):
            for scenario in chosen:
                for gateway in running:
                    if scenario.events and gateway.name in WHOLE_ANSWERS_ONLY:
                        continue
                    run = run_once(load, gateway, scenario, number)
                    runs.append(run)
                    console.print(f"round {number + 1} {run.scenario} {run.gateway}: {run.cpu_ms:.4f} ms", style="dim")
    summaries = summarise(runs)
    console.print(table(summaries))
    console.print(f"{os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f} at the end")
    if json_file is not None:
        document = {
            "machine": machine(),
            "load_average": os.getloadavg(),
            "summaries": [asdict(each) for each in summaries],
            "runs": [asdict(run) for run in runs],
        }
        write(json_file, json.dumps(document, indent=1) + "\n")
        write(json_file.with_suffix(".md"), markdown(summaries, rounds))
    if plot_file is not None:
        plot(summaries, plot_file)


if __name__ == "__main__":
    main()
