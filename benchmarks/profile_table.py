"""Makes what the shipped profiles carry: capacity tables, and the document that shows how true they are.

``python -m benchmarks.profile_table capacity [NAME...]`` builds the capacity table of each shipped profile (minutes
of CPU each; a table that is up to date is left alone).
"""

from pathlib import Path

import click

from energy.adapters.capacity_file import load_capacity, save_capacity, shipped_capacity_path
from energy.adapters.catalogue import load_profile, profile_names
from energy.profile import ProfileError
from pools.classes import ClassSlos
from simulator.capacity import ClassTraffic, build_capacity, fingerprint, poisson_traffic
from simulator.workload.adapters.published import published

LENGTHS_OF = "synthetic-conv"  # the Azure Conversation trace's lengths, as shipped


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
def capacity(names: tuple[str, ...]) -> None:
    """Build the capacity tables of the named (or all) shipped profiles that are not up to date."""
    traffic = shipped_traffic()
    for name in names or profile_names():
        if is_current(name, traffic):
            click.echo(f"{name} is up to date")
        else:
            build(name, shipped_capacity_path(name))


if __name__ == "__main__":
    main()
