"""``dynamollm profile``: measure a served model, fit profiles, show, compare and check them."""

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.table import Table

from dynamollm.commands.profile_measure import measure
from dynamollm.errors import UserError
from energy.profile import EnergyProfile, ProfileError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from energy.capacity import CapacityTable
    from energy.fit import FitReport
    from energy.measurements import Measurement

SELECTORS = ("gpu", "model", "precision", "engine")


@contextmanager
def _told() -> "Iterator[None]":
    """A ``ProfileError`` is the user's to fix: one message, exit status 2."""
    try:
        yield
    except ProfileError as error:
        raise UserError(str(error)) from None


@click.group()
def command() -> None:
    """Measure, fit, show, compare and check energy-performance profiles."""


command.add_command(measure)


@command.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path, dir_okay=False, exists=True))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path, dir_okay=False), help="File to write.")
@click.option("--name", help="Name of the profile [default: the output file's].")
@click.option("--gpu", help="Only rows of this GPU.")
@click.option("--model", help="Only rows of this model.")
@click.option("--precision", help="Only rows of this precision.")
@click.option("--engine", help="Only rows of this engine.")
@click.option("--board-w", type=click.FloatRange(min=1), help="Board power limit of a GPU the project does not know.")
@click.option("--idle-w", type=click.FloatRange(min=1), help="Measured power of a GPU that is loaded and idle.")
@click.option(
    "--without-power", is_flag=True, help="Accept measurements without power; the GPU's own figures stand in."
)
def fit(
    files: tuple[Path, ...],
    output: Path,
    name: str | None,
    gpu: str | None,
    model: str | None,
    precision: str | None,
    engine: str | None,
    board_w: float | None,
    idle_w: float | None,
    without_power: bool,
) -> None:
    """Fit a profile to CSV files: one's own sweep (docs/profiles.md has the columns) or a public data set."""
    from energy.adapters.catalogue import save_fitted
    from energy.adapters.measurement_csv import read_measurements
    from energy.fit import FitRequest, fit_profile
    from energy.fitted import Source
    from energy.models import MODELS

    chosen = {"gpu": gpu, "model": model, "precision": precision, "engine": engine}
    with _told():
        read = [(path, read_measurements(path)) for path in files]
        rows = _select([m for _, file in read for m in file.measurements], chosen)
        gpus = {m.gpu for m in rows}
        served = [s for _, file in read for s in file.served_power if s.gpu in gpus and s.model in MODELS]
        report = fit_profile(
            FitRequest(
                name=name or output.stem,
                measurements=rows,
                served_power=served,
                sources=tuple(
                    Source(path.name, "", "", len(file.measurements) + len(file.served_power)) for path, file in read
                ),
                board_w=board_w,
                idle_w=idle_w,
                needs_power=not without_power,
            )
        )
        save_fitted(report.profile, output)
    _print_fit(report)
    click.echo(f"wrote {output}")


def _select(rows: "Sequence[Measurement]", chosen: dict[str, str | None]) -> "list[Measurement]":
    wanted = {what: value for what, value in chosen.items() if value}
    kept = [m for m in rows if all(getattr(m, what) == value for what, value in wanted.items())]
    if rows and not kept:
        seen = "; ".join(f"{what}: {', '.join(sorted({getattr(m, what) for m in rows}))}" for what in SELECTORS)
        raise ProfileError(f"no row has {wanted}; the files hold {seen}")
    return kept


def _print_fit(report: "FitReport") -> None:
    import numpy as np

    console = Console()
    profile = report.profile
    table = Table(title=f"{profile.name}: {profile.model} in {profile.precision} on {profile.gpu}, {profile.engine}")
    for column in ("median error", "in sample", "shape left out", "concurrency left out"):
        table.add_column(column, justify="left" if column == "median error" else "right")
    errors = profile.provenance.errors
    for what, seen in (("ttft", report.times.ttft_errors), ("tpot", report.times.tpot_errors)):
        in_sample = float(np.nanmedian(np.abs(seen)))
        left_out = [errors.get(f"{what}_by_{axis}") for axis in ("shape", "concurrency")]
        table.add_row(what.upper(), *(_percent(value) for value in (in_sample, *left_out)))
    if report.power:
        in_sample = float(np.median(np.abs(report.power.errors)))
        table.add_row("power per GPU", _percent(in_sample), _percent(errors.get("power")), "")
    console.print(table)
    console.print(f"{len(report.fitted_rows)} rows fitted, {len(report.left_out)} left out")
    for reason in report.left_out[:5]:
        console.print(f"  left out: {reason}", markup=False)
    for axis, origin in profile.provenance.origin.items():
        console.print(f"{axis}: {origin}", markup=False)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


@command.command()
@click.argument("profile")
@click.option("--plots", type=click.Path(path_type=Path, file_okay=False), help="Folder for PNG plots.")
@click.option("--tokens-per-s", default=2000.0, show_default=True, help="Load of the energy tables, on one instance.")
def show(profile: str, plots: Path | None, tokens_per_s: float) -> None:
    """Print a profile and its energy per request by TP and clock for each class; draw the plots with --plots."""
    with _told():
        loaded = _load(profile)
        table = _table_of(loaded)
    console = Console()
    _print_profile(console, loaded)
    _print_energy(console, table, tokens_per_s)
    if plots:
        from benchmarks.profile_plots import save_plots

        for path in save_plots(table, plots, tokens_per_s):
            click.echo(f"wrote {path}")


def _load(name_or_path: str) -> EnergyProfile:
    from energy.adapters.catalogue import load_profile

    return load_profile(name_or_path)


def _table_of(profile: EnergyProfile) -> "CapacityTable":
    from benchmarks.profile_table import shipped_traffic
    from simulator.adapters.capacity_cache import capacity_table

    return capacity_table(profile, shipped_traffic(), progress=lambda line: click.echo(f"building: {line}", err=True))


def _print_profile(console: Console, profile: EnergyProfile) -> None:
    from energy.fitted import FittedProfile
    from energy.measured import MeasuredProfile
    from energy.profile import GpuState

    clock = profile.sm_clocks_mhz[-1]
    console.print(f"[bold]{profile.name}[/]: {profile.model} on {profile.gpu}")
    tps = ", ".join(f"TP{tp} ({profile.kv_capacity_tokens(tp):,} KV tokens)" for tp in profile.tensor_parallel)
    console.print(f"{tps}; SM clocks {', '.join(map(str, profile.sm_clocks_mhz))} MHz")
    idle = ", ".join(f"{state.value} {profile.idle_power_w(state, clock):.0f} W" for state in GpuState)
    console.print(f"one GPU that runs nothing: {idle}")
    fitted = profile.fit if isinstance(profile, MeasuredProfile) else profile
    if isinstance(fitted, FittedProfile):
        for axis, origin in fitted.provenance.origin.items():
            console.print(f"  {axis}: {origin}", markup=False)
        for name, error in fitted.provenance.errors.items():
            console.print(f"  median error left out, {name}: {100 * error:.1f} %", markup=False)


def _print_energy(console: Console, table: "CapacityTable", tokens_per_s: float) -> None:
    """The heat map as text: a row for each class and TP; [-] where the SLO is missed, the least in bold."""
    from benchmarks.profile_view import energy_grid, least, rate_of_tokens

    shown = Table(title=f"J per request at {tokens_per_s:.0f} tokens/s on one instance (- = SLO missed)")
    for column in ("class", "TP", "SLO-max req/s", *(f"{clock} MHz" for clock in table.sm_clocks_mhz)):
        shown.add_column(column, justify="right")
    for k, each in enumerate(table.classes):
        energy = energy_grid(table, k, rate_of_tokens(table, k, tokens_per_s))
        best = least(energy, table)
        for t, tp in enumerate(table.tps):
            cells = []
            for i, clock in enumerate(table.sm_clocks_mhz):
                text = f"{energy[t, i]:.0f}" if energy[t, i] < float("inf") else "-"
                cells.append(f"[bold green]{text}[/]" if best and best[:2] == (tp, clock) else text)
            shown.add_row(each.label if t == 0 else "", str(tp), f"{table.max_rate[t, -1, k]:.2f}", *cells)
        shown.add_section()
    console.print(shown)


@command.command()
@click.argument("first")
@click.argument("second")
@click.option("--tokens-per-s", default=2000.0, show_default=True, help="Load of the energy columns, on one instance.")
def compare(first: str, second: str, tokens_per_s: float) -> None:
    """Compare two profiles: SLO-max rate and least energy per request of each class."""
    from benchmarks.profile_view import energy_grid, least, rate_of_tokens

    with _told():
        profiles = [_load(name) for name in (first, second)]
        tables = [_table_of(profile) for profile in profiles]
    shown = Table(
        title=f"{profiles[0].name} against {profiles[1].name}, at {tokens_per_s:.0f} tokens/s on one instance"
    )
    for column in ("class", "SLO-max req/s per GPU", "", "ratio", "least J/request", "", "ratio"):
        shown.add_column(column, justify="right")
    for k, each in enumerate(tables[0].classes):
        rates = [float((t.max_rate[:, -1, k] / t.tps).max()) for t in tables]
        points = [least(energy_grid(t, k, rate_of_tokens(t, k, tokens_per_s)), t) for t in tables]
        energies = ["-" if p is None else f"{p[2]:.0f} (TP{p[0]}, {p[1]} MHz)" for p in points]
        ratio = f"{points[1][2] / points[0][2]:.2f}" if points[0] and points[1] else "-"
        rate_ratio = f"{rates[1] / rates[0]:.2f}" if rates[0] else "-"
        shown.add_row(each.label, *(f"{rate:.2f}" for rate in rates), rate_ratio, *energies, ratio)
    Console().print(shown)


@command.command()
@click.argument("file")
def check(file: str) -> None:
    """Check a profile (file, shipped name or CSV): that it reads, and that it behaves like a GPU."""
    from energy.plausibility import findings

    with _told():
        profile = _load(file)
        found = findings(profile)
    if found:
        raise UserError(f"{file}: " + "\n".join(found))
    click.echo(
        f"ok: {profile.name}, {profile.model} on {profile.gpu}, TP {', '.join(map(str, profile.tensor_parallel))}, "
        f"{len(profile.sm_clocks_mhz)} clocks"
    )
