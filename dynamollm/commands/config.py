"""``dynamollm config``: show the effective configuration, check a file, print the schema."""

import dataclasses
import json
import os
from pathlib import Path

import click
import yaml
from pydantic import TypeAdapter

from dynamollm.adapters.configuration import load
from dynamollm.settings import Settings

config_option = click.option(
    "--config",
    "config_file",
    type=click.Path(path_type=Path, dir_okay=False),
    envvar="DYNAMOLLM_CONFIG",
    help="YAML file of the cluster [default: the built-in emulated cluster].",
)


@click.group()
def command() -> None:
    """Show, check or describe the configuration."""


@command.command()
@config_option
def show(config_file: Path | None) -> None:
    """Print every key with its effective value, as YAML that --config takes."""
    settings = load(config_file, os.environ)
    # keys are never printed: the output is for sharing
    shown = dataclasses.replace(settings, auth=dataclasses.replace(settings.auth, api_keys=()))
    click.echo(yaml.safe_dump(TypeAdapter(Settings).dump_python(shown, mode="json"), sort_keys=False), nl=False)
    if settings.auth.api_keys:
        click.echo(f"# auth.api_keys: {len(settings.auth.api_keys)} key(s), not shown")


@command.command()
@config_option
def check(config_file: Path | None) -> None:
    """Check a configuration and say where it is wrong."""
    settings = load(config_file, os.environ)
    gpus = sum(node.gpus * node.count for node in settings.nodes)
    instances = sum(pool.instances for pool in settings.pools)
    click.echo(f"ok: {len(settings.models)} model(s), {len(settings.pools)} pools, {instances} instances, {gpus} GPUs")


@command.command()
def schema() -> None:
    """Print the JSON Schema of the configuration file."""
    click.echo(json.dumps(TypeAdapter(Settings).json_schema(), indent=2))
