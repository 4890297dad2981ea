"""``dynamollm replay``: send a trace to an endpoint at its own pace and say how the endpoint did."""

import json

import click
import msgspec
import uvloop
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks.adapters.http_streams import Target
from benchmarks.adapters.replay_run import ReplayOrder, run_replay
from benchmarks.adapters.target_facts import TargetError
from benchmarks.replay_report import ReplayReport
from benchmarks.replay_table import print_report
from dynamollm.errors import UserError
from simulator.workload.adapters.catalogue import NAMED, open_workload
from simulator.workload.arrivals import Arrivals, Workload, WorkloadError
from simulator.workload.transform import limited, window

POSITIVE = click.FloatRange(min=0, min_open=True)


@click.command()
@click.option("--trace", required=True, help=f"Trace file (Azure CSV, Mooncake jsonl; .gz too) or {', '.join(NAMED)}.")
@click.option("--url", default="http://127.0.0.1:8080", show_default=True, help="Base URL of the endpoint.")
@click.option("--speedup", type=POSITIVE, default=1.0, help="Play the trace this many times faster.")
@click.option(
    "--start", "start_s", type=click.FloatRange(min=0), default=0.0, help="Begin at this second of the trace."
)
@click.option("--duration", "duration_s", type=POSITIVE, help="Replay this many seconds of the trace.")
@click.option("--limit", type=click.IntRange(min=1), help="Send at most this many requests.")
@click.option("--rate-scale", type=POSITIVE, default=1.0, help="Thin out or superpose to this multiple of the rate.")
@click.option("--seed", type=int, default=0, help="Seed of all that is drawn.")
@click.option("--model", help="Model to ask for; by default the first that the endpoint lists.")
@click.option("--api", type=click.Choice(("chat", "completions")), default="chat", show_default=True)
@click.option("--api-key", envvar="OPENAI_API_KEY", show_envvar=True, help="Bearer key.")
@click.option("--timeout", "timeout_s", type=POSITIVE, default=600.0, help="Seconds until a request is given up.")
@click.option(
    "--gpu-telemetry",
    metavar="URL",
    help="Metrics with the GPUs' energy counters (DCGM's names).  [default: the endpoint's, if it tells]",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
def command(
    trace: str,
    url: str,
    speedup: float,
    start_s: float,
    duration_s: float | None,
    limit: int | None,
    rate_scale: float,
    seed: int,
    model: str | None,
    api: str,
    api_key: str | None,
    timeout_s: float,
    gpu_telemetry: str | None,
    as_json: bool,
) -> None:
    """Replay a request trace against an OpenAI-compatible endpoint.

    Open loop: each request is sent when it is due, answered or not, with the trace's input length and exactly its
    output length. Ctrl-C ends it and prints what was done.
    """
    try:
        target = Target.of(url, api_key)
        workload = window(open_workload(trace, seed, rate_scale), start_s, duration_s)
        if limit is not None:
            workload = limited(workload, limit)
        order = ReplayOrder(
            workload.name,
            _requests(workload),
            target,
            model,
            chat=api == "chat",
            speedup=speedup,
            timeout_s=timeout_s,
            gpu_telemetry=gpu_telemetry,
        )
        report = _with_progress(order)
    except (WorkloadError, TargetError, ValueError) as error:
        raise UserError(str(error)) from error
    if as_json:
        click.echo(json.dumps(msgspec.to_builtins(report), indent=2))
    else:
        print_report(report, Console())
    if report.total.finished == 0:
        raise SystemExit(1)


def _requests(workload: Workload) -> Arrivals:
    arrivals = workload.collect()
    if len(arrivals) == 0:
        raise WorkloadError(f"{workload.name} holds no request")
    return arrivals


def _with_progress(order: ReplayOrder) -> ReplayReport:
    errors = Console(stderr=True)
    columns = (TextColumn("replaying"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=errors, disable=not errors.is_terminal, transient=True) as progress:
        bar = progress.add_task("replaying", total=len(order.arrivals))
        return uvloop.run(run_replay(order, lambda done: progress.update(bar, completed=done)))
