"""The paper's experiments in virtual time: calibrate the load, run every policy, store results, write docs/results.md.

    python -m benchmarks.experiment                      # everything (hours on one core)
    python -m benchmarks.experiment --experiment conv-1h --profile llama-2-70b-h100 --policy single-pool,dynamollm

Each run is one file under benchmarks/results/<experiment>/ with its seed, commit and settings; a run that is there is
not repeated unless ``--again``; a load that was found stays until its file is deleted. The table is made from the
files alone.
"""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from benchmarks.calibration import Calibration, calibrate
from benchmarks.experiment_capacity import experiment_capacity
from benchmarks.results_page import write_page
from benchmarks.simulation_plots import plot_runs
from benchmarks.simulation_report import file_name, read_json, run_path, store_run, write_json
from energy.adapters.catalogue import load_profile
from simulator.batching import EngineLimits
from simulator.experiment import Scenario, bounds, prepare
from simulator.grid import GRIDS
from simulator.prediction import TrueLengths
from simulator.results import RunResult
from simulator.simulation import simulate
from simulator.workload.adapters.catalogue import open_workload
from simulator.workload.arrivals import Workload

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
PAGE = HERE.parent / "docs" / "results.md"
PROFILES = ("llama-2-70b-h100", "llama-3.1-70b-fp8-h100")
# Of the Coding-like prompts Llama-2-70B reads 3.6 % too slowly for their TTFT even on an idle TP8 at the highest clock
CODE_PROFILES = ("llama-3.1-70b-fp8-h100",)
ALL = (
    "single-pool",
    "multi-pool",
    "scale-inst",
    "scale-shard",
    "scale-freq",
    "packing",
    "dynamollm-paper",
    "dynamollm",
)
LEARNED = ("single-pool", "dynamollm")
MAIN = ("single-pool", "packing", "dynamollm-paper", "dynamollm")
SEED = 1
# Chunks of 1,024 prompt tokens for every policy: at vLLM's larger defaults a chunk alone breaks the TBT SLO of others
ENGINE = EngineLimits(kv_blocks=0, max_num_batched_tokens=1024)
GRID = "CISO"
GPU_USD_PER_HOUR = 2.25


@dataclass(frozen=True, slots=True)
class Experiment:
    """One workload, the number of servers single-pool has, and the trace its load is calibrated on."""

    name: str
    trace: str
    nodes: int
    calibrated_on: str
    policies: tuple[str, ...]
    sample_s: float
    profiles: tuple[str, ...] = PROFILES
    learns_lengths: bool = False  # the product's own predictor from cold; else the output's size is known


EXPERIMENTS = {
    each.name: each
    for each in (
        Experiment("conv-1h", "azure-conv", 12, "azure-conv", ALL, 10.0),
        Experiment("conv-1h-learned", "azure-conv", 12, "azure-conv", LEARNED, 10.0, learns_lengths=True),
        Experiment("poisson-low", "poisson-low", 12, "poisson-high", MAIN, 10.0),
        Experiment("poisson-medium", "poisson-medium", 12, "poisson-high", MAIN, 10.0),
        Experiment("poisson-high", "poisson-high", 12, "poisson-high", MAIN, 10.0),
        Experiment("code-day", "azure-2024-code-day", 12, "azure-2024-code-day", MAIN, 120.0, CODE_PROFILES),
        Experiment("code-week", "azure-2024-code-week", 40, "azure-2024-code-week", MAIN, 600.0, CODE_PROFILES),
        Experiment("conv-week", "servegen-week", 40, "servegen-week", MAIN, 600.0),
    )
}


@click.command()
@click.option("--experiment", "experiments", default=",".join(EXPERIMENTS), show_default=True)
@click.option("--profile", "profiles", default=",".join(PROFILES), show_default=True)
@click.option("--policy", "policies", help="Only these; by default all of the experiment.")
@click.option("--again", is_flag=True, help="Repeat runs that are there, at the same loads.")
def main(experiments: str, profiles: str, policies: str | None, again: bool) -> None:
    """Run experiments and write the page."""
    for name in experiments.split(","):
        for profile in (p for p in profiles.split(",") if p in EXPERIMENTS[name].profiles):
            run_experiment(EXPERIMENTS[name], profile, tuple(policies.split(",")) if policies else None, again)
    write_page(RESULTS, PAGE, tuple(EXPERIMENTS), PROFILES)
    click.echo(f"wrote {PAGE}")


def run_experiment(experiment: Experiment, profile: str, policies: tuple[str, ...] | None, again: bool) -> None:
    """All policies of one experiment on one profile."""
    folder = RESULTS / experiment.name
    scenario = _scenario(experiment, profile)
    calibration = _calibration(experiment.calibrated_on, scenario)
    workload = open_workload(experiment.trace, SEED, calibration.rate_scale)
    settings: dict[str, Any] = {
        "trace": experiment.trace,
        "rate_scale": calibration.rate_scale,
        "calibration": asdict(calibration),
        "grid": GRID,
        "gpu_usd_per_hour": GPU_USD_PER_HOUR,
        "engine": ENGINE._asdict(),
        "router": scenario.weights._asdict(),
        "delays": asdict(scenario.delays),
        "assumptions": list(workload.assumptions),
    }
    runs = []
    for policy in policies or experiment.policies:
        path = run_path(folder, workload.name, profile, policy, SEED)
        if path.exists() and not again:
            continue
        result = _run(scenario, policy, workload)
        store_run(result, folder, settings)
        runs.append(result)
        click.echo(
            f"{experiment.name} {profile} {policy}: {result.energy_j / 3.6e6:.2f} kWh, "
            f"{100 * result.slo_attainment:.2f} % in SLO, {result.wall_s:.0f} s"
        )
    bound_path = folder / f"{file_name(workload.name)}--{profile}--clairvoyant.json"
    if again or not bound_path.exists():
        found = bounds(scenario, workload)
        write_json(bound_path, {"policy": "clairvoyant", "energy_j": found.least_j, "plan_energy_j": found.plan_j})
    if len(runs) > 1:
        plot_runs(runs, folder)


def _scenario(experiment: Experiment, profile_name: str) -> Scenario:
    profile = load_profile(profile_name)
    capacity = experiment_capacity(profile, ENGINE, RESULTS / "capacity", click.echo)
    return Scenario(
        profile,
        capacity,
        experiment.nodes,
        prediction=None if experiment.learns_lengths else TrueLengths(),
        limits=ENGINE,
        sample_s=experiment.sample_s,
    )


def _calibration(trace: str, scenario: Scenario) -> Calibration:
    """The load, found once: delete the file to find it anew."""
    path = RESULTS / "calibration" / f"{trace}--{scenario.profile.name}--{scenario.nodes}.json"
    if path.exists():
        return Calibration(**read_json(path))
    calibration = calibrate(scenario, lambda scale: open_workload(trace, SEED, scale))
    write_json(path, asdict(calibration))
    click.echo(f"{trace} on {scenario.profile.name}: {calibration}")
    return calibration


def _run(scenario: Scenario, policy: str, workload: Workload) -> RunResult:
    setup, controller = prepare(scenario, policy, workload)
    starts_s = workload.starts_unix_s or 0.0
    return simulate(
        setup,
        workload,
        controller,
        policy,
        SEED,
        wall_clock=time.perf_counter,
        grid_g_per_kwh=lambda at_s: GRIDS[GRID].intensity(starts_s + at_s),
        gpu_usd_per_hour=GPU_USD_PER_HOUR,
    )


if __name__ == "__main__":
    main()
