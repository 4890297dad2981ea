"""Makes the shipped profiles, their capacity tables, and the document that shows how true they are.

``python -m benchmarks.profile_table fit`` fits every profile anew from the public measurements (``../shared/data`` or
``$DYNAMOLLM_DATA``), ``capacity`` builds the capacity tables that are not up to date, ``document`` writes
docs/profiles.md with its plots. ``make profiles`` does all three.
"""

import json
from dataclasses import replace
from pathlib import Path

import click
import numpy as np

from energy.adapters.capacity_file import load_capacity, save_capacity, shipped_capacity_path
from energy.adapters.catalogue import SHIPPED, load_fitted, load_profile, profile_names, save_fitted, write_whole
from energy.adapters.measurement_csv import read_measurements
from energy.fit import FitReport, fit_profile
from energy.fit_power import with_values
from energy.fit_times import errors_of
from energy.fitted import FittedProfile
from energy.gpus import gpu_physics
from energy.profile import ProfileError
from energy.recipes import MOVES, RECIPES, TRIED, Move, Recipe
from energy.transfer import moved_times, moved_to
from pools.classes import ClassSlos
from simulator.capacity import ClassTraffic, build_capacity, fingerprint, poisson_traffic
from simulator.workload.adapters.location import data_file
from simulator.workload.adapters.published import published

LENGTHS_OF = "synthetic-conv"  # the Azure Conversation trace's lengths, as shipped

TRIED_RESULTS = Path(__file__).parent / "results" / "profiles_tried.json"
TAKEN_POWERS = ("active_w", "compute_w", "memory_w")  # from another profile of the same die


def shipped_traffic() -> tuple[ClassTraffic, ...]:
    """What the shipped tables are built for: lengths of the Azure Conversation trace, the paper's SLOs."""
    return poisson_traffic(published(LENGTHS_OF).lengths(), ClassSlos())


def is_current(name: str, traffic: tuple[ClassTraffic, ...]) -> bool:
    """Whether a profile's shipped table was built from the profile and traffic as they are now."""
    try:
        return load_capacity(name).fingerprint == fingerprint(load_profile(name), traffic)
    except ProfileError:
        return False


def build(name: str, path: Path) -> None:
    """Build and write the table of one profile."""
    table = build_capacity(load_profile(name), shipped_traffic(), progress=lambda line: click.echo(f"{name} {line}"))
    save_capacity(table, path)


@click.group()
def main() -> None:
    """Make what the shipped profiles carry."""


@main.command()
@click.argument("names", nargs=-1)
def fit(names: tuple[str, ...]) -> None:
    """Fit the named (or all) shipped profiles anew from the public measurements."""
    for recipe in RECIPES:
        if not names or recipe.name in names:
            report = fit_recipe(recipe)
            save_fitted(report.profile, SHIPPED / f"{recipe.name}.yaml")
            errors = ", ".join(f"{key} {value:.1%}" for key, value in report.profile.provenance.errors.items())
            click.echo(f"{recipe.name}: {len(report.fitted_rows)} rows, {len(report.left_out)} left out; {errors}")
    if not names:
        tried = {each.name: fit_tried(each) for each in TRIED}
        write_whole(TRIED_RESULTS, (json.dumps(tried, indent=1) + "\n").encode())
    for each in MOVES:
        if not names or each.name in names:
            save_fitted(move(each), SHIPPED / f"{each.name}.yaml")
            click.echo(f"{each.name}: {each.source} moved to {each.gpu}")


def move(each: Move) -> FittedProfile:
    """A profile moved to another GPU, with the error of the same move where both GPUs were measured."""
    report = fit_recipe(each.checked_on)
    known, gpu = load_fitted(each.checked_from), gpu_physics(each.gpu)
    times = moved_times(known.times, gpu.bandwidth_bytes_per_s / known.physics.bandwidth_bytes_per_s)
    rows = [m for m in report.fitted_rows if m.tp in times]
    ttft, tpot = errors_of(times, rows, gpu)
    errors = {"ttft_by_move": float(np.median(np.abs(ttft))), "tpot_by_move": float(np.median(np.abs(tpot)))}
    return moved_to(load_fitted(each.source), gpu, each.name, {key: round(value, 4) for key, value in errors.items()})


def fit_tried(recipe: Recipe) -> dict[str, float]:
    """Cross-validated errors of a fit that is not shipped."""
    files = [read_measurements(data_file(f"profiles/{file}")) for file in recipe.files]
    report = fit_profile(recipe.request([m for file in files for m in file.measurements], ()))
    return {"rows": len(report.fitted_rows), **report.profile.provenance.errors}


def fit_recipe(recipe: Recipe) -> FitReport:
    """Fit one shipped profile. Raises ``ProfileError`` if the public measurements are not there."""
    files = [read_measurements(data_file(f"profiles/{file}")) for file in recipe.files]
    request = recipe.request(
        [m for file in files for m in file.measurements], [s for file in files for s in file.served_power]
    )
    report = fit_profile(request)
    if not recipe.takes_power_of:
        return report
    donor = load_fitted(recipe.takes_power_of).physics
    gpu = with_values(report.profile.physics, {name: getattr(donor, name) for name in TAKEN_POWERS})
    return replace(report, profile=replace(report.profile, physics=gpu))


@main.command()
@click.argument("names", nargs=-1)
def capacity(names: tuple[str, ...]) -> None:
    """Build the capacity tables of the named (or all) shipped profiles that are not up to date."""
    traffic = shipped_traffic()
    for name in names or profile_names():
        if is_current(name, traffic):
            click.echo(f"{name} is up to date")
        else:
            build(name, shipped_capacity_path(name))


@main.command()
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), default=Path("docs/profiles.md"))
def document(output: Path) -> None:
    """Write the document that shows how true the shipped profiles are, and its plots."""
    # import here: the document imports the plots, which the other commands do without
    from benchmarks.profile_document import document_text, save_document_plots

    tried = json.loads(TRIED_RESULTS.read_text()) if TRIED_RESULTS.is_file() else {}
    write_whole(output, document_text(tried).encode("utf-8"))
    save_document_plots(output.parent / "profiles")
    click.echo(f"wrote {output}")


if __name__ == "__main__":
    main()
