"""``dynamollm simulate``: run policies over a trace in virtual time and compare energy, cost, CO2 and SLOs."""

import json
import os
import time
from dataclasses import replace
from pathlib import Path

import click
from rich.console import Console

from benchmarks.simulation_plots import plot_runs
from benchmarks.simulation_report import print_runs, store_run
from dynamollm.adapters.configuration import load
from dynamollm.adapters.own_stdout import libraries_to_stderr
from dynamollm.counterfactual import OWN
from dynamollm.errors import UserError
from dynamollm.shadow_wiring import ShadowWorld
from energy.adapters.capacity_file import load_capacity
from energy.adapters.catalogue import load_profile, profile_names
from energy.profile import ProfileError
from simulator.experiment import Scenario, prepare
from simulator.grid import GRIDS
from simulator.prediction import TrueLengths
from simulator.results import RunResult
from simulator.simulation import simulate
from simulator.workload.adapters.catalogue import NAMED, open_workload
from simulator.workload.arrivals import Workload, WorkloadError
from simulator.workload.transform import sped_up, window
from solver.policies import POLICY_NAMES

POSITIVE = click.FloatRange(min=0, min_open=True)
GPUS_PER_NODE = 8
H100_USD_PER_HOUR = 2.25  # on-demand price seen in December 2025; --gpu-price for another


@click.command()
@click.option("--trace", required=True, help=f"Trace file or one of {', '.join(NAMED)}.")
@click.option(
    "--policy", "policies", default="single-pool,dynamollm", show_default=True, help=f"Of {', '.join(POLICY_NAMES)}."
)
@click.option("--gpus", type=click.IntRange(min=1), default=96, show_default=True, help="GPUs, in nodes of eight.")
@click.option(
    "--profile", default="llama-3.1-70b-fp8-h100", show_default=True, help="Name or file of an energy profile."
)
@click.option("--config", help="Simulate what `dynamollm serve --config` would do; `built-in`: its own cluster.")
@click.option("--speedup", type=POSITIVE, default=1.0, help="Requests come this many times as fast, as in `replay`.")
@click.option("--rate-scale", type=POSITIVE, default=1.0, help="Thin out or superpose to this multiple of the rate.")
@click.option("--start", "start_s", type=click.FloatRange(min=0), default=0.0, help="Begin at this second.")
@click.option("--duration", "duration_s", type=POSITIVE, help="Simulate this many seconds of the trace.")
@click.option("--seed", type=int, default=0, help="Seed of all that is drawn.")
@click.option(
    "--lengths",
    type=click.Choice(["predicted", "true"]),
    default="predicted",
    show_default=True,
    help="Output lengths as the product predicts them from the inputs', or known.",
)
@click.option(
    "--accuracy", type=click.FloatRange(0, 1), help="Lengths are known, but the size named is right only this often."
)
@click.option(
    "--loads",
    type=click.Choice(["predicted", "known"]),
    default="predicted",
    show_default=True,
    help="Loads to come as the product forecasts them, or known.",
)
@click.option("--grid", type=click.Choice(sorted(GRIDS)), default="CISO", show_default=True, help="For CO2.")
@click.option("--gpu-price", type=POSITIVE, default=H100_USD_PER_HOUR, show_default=True, help="USD per GPU-hour.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("simulations"),
    show_default=True,
    help="Folder of the results and plots.",
)
@click.option("--plot", is_flag=True, help="Also draw power, GPUs and clocks over time.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
def command(
    trace: str,
    policies: str,
    gpus: int,
    profile: str,
    config: str | None,
    speedup: float,
    rate_scale: float,
    start_s: float,
    duration_s: float | None,
    seed: int,
    lengths: str,
    accuracy: float | None,
    loads: str,
    grid: str,
    gpu_price: float,
    out: Path,
    plot: bool,
    as_json: bool,
) -> None:
    """Run policies over a trace in virtual time: same cluster, same router, same controllers, other knobs.

    Every run is stored under --out with its seed and settings. The first policy is what the others are compared with.
    """
    if gpus % GPUS_PER_NODE:
        raise UserError(f"--gpus {gpus}: nodes hold {GPUS_PER_NODE} GPUs; give a multiple")
    try:
        scenario = Scenario(load_profile(profile), load_capacity(profile), gpus // GPUS_PER_NODE)
        workload = _workload(trace, seed, rate_scale, start_s, duration_s)
    except (ProfileError, WorkloadError) as error:
        raise UserError(f"{error} (shipped profiles: {', '.join(profile_names())})") from None
    scenario = replace(
        scenario,
        sample_s=max(10.0, workload.duration_s / 2000),
        prediction=_lengths(lengths, accuracy),
        known_loads=loads == "known",
    )
    settings = {"rate_scale": rate_scale, "lengths": lengths, "accuracy": accuracy, "loads": loads, "grid": grid}
    workload = sped_up(workload, speedup)
    if config is not None:
        with libraries_to_stderr():
            result = _as_configured(None if config == "built-in" else Path(config), workload, seed)
        if as_json:
            click.echo(json.dumps({"runs": [result.as_json()]}))
        else:
            print_runs([result], Console(width=max(Console().width, 120)))
        return
    runs = []
    for name in policies.split(","):
        with libraries_to_stderr():
            result = _run(scenario, name.strip(), workload, seed, grid, gpu_price)
        store_run(result, out, settings)
        runs.append(result)
    if as_json:
        click.echo(json.dumps({"runs": [run.as_json() for run in runs]}))
    else:
        print_runs(runs, Console(width=max(Console().width, 120)))
    if plot:
        click.echo(f"plot: {plot_runs(runs, out)}", err=as_json)


def _lengths(lengths: str, accuracy: float | None) -> TrueLengths | None:
    """None: as the product predicts them."""
    if accuracy is not None:
        return TrueLengths(accuracy)
    return TrueLengths() if lengths == "true" else None


def _as_configured(config: Path | None, workload: Workload, seed: int) -> RunResult:
    settings = load(config, os.environ)
    setup, controller = ShadowWorld(settings, OWN)()
    return simulate(setup, workload, controller, settings.controller.policy, seed)


def _workload(trace: str, seed: int, rate_scale: float, start_s: float, duration_s: float | None) -> Workload:
    return window(open_workload(trace, seed, rate_scale), start_s, duration_s)


def _run(scenario: Scenario, policy: str, workload: Workload, seed: int, grid: str, gpu_price: float) -> RunResult:
    try:
        setup, controller = prepare(scenario, policy, workload)
    except ValueError as error:
        raise UserError(str(error)) from None
    starts_s = workload.starts_unix_s or 0.0
    return simulate(
        setup,
        workload,
        controller,
        policy,
        seed,
        wall_clock=time.perf_counter,  # noqa: TID251 - how long it took, told to the user
        grid_g_per_kwh=lambda at_s: GRIDS[grid].intensity(starts_s + at_s),
        gpu_usd_per_hour=gpu_price,
    )
