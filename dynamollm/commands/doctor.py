"""``dynamollm doctor``: look at this machine, the configuration and a running gateway, and say what to do."""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import click
import httpx
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dynamollm.adapters.configuration import load
from dynamollm.adapters.gateway_check import gateway_findings
from dynamollm.adapters.machine import machine_findings, port_finding
from dynamollm.commands.config import config_option
from dynamollm.diagnosis import Finding, Verdict, any_failed
from dynamollm.errors import UserError
from dynamollm.wiring import load_profiles

COLOURS = {Verdict.OK: "green", Verdict.NOTE: "cyan", Verdict.WARN: "yellow", Verdict.FAIL: "bold red"}


@click.command()
@config_option
@click.option("--url", help="A running gateway to check too; it is sent a few short requests.")
@click.option("--api-key", envvar="OPENAI_API_KEY", show_envvar=True, help="Bearer key for that gateway.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list instead of a table.")
def command(config_file: Path | None, url: str | None, api_key: str | None, as_json: bool) -> None:
    """Check this machine, the configuration and a running gateway.

    Exit status 1 if anything asked for will not work.
    """
    findings = [*machine_findings(os.environ), *configuration_findings(config_file, check_port=url is None)]
    if url is not None:
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        with httpx.Client(base_url=url.rstrip("/").removesuffix("/v1"), headers=headers, timeout=60) as client:
            findings += gateway_findings(url, client)
    if as_json:
        click.echo(json.dumps([{**asdict(one), "verdict": one.verdict.value} for one in findings], indent=2))
    else:
        Console().print(_table(findings))
    if any_failed(findings):
        raise SystemExit(1)


def configuration_findings(config_file: Path | None, check_port: bool) -> Iterator[Finding]:
    """Whether the configuration can be served: its keys, its profiles, its port."""
    source = str(config_file) if config_file else "built-in cluster"
    try:
        settings = load(config_file, os.environ)
        profiles = load_profiles(settings)
    except UserError as error:
        yield Finding("configuration", Verdict.FAIL, str(error), "dynamollm config schema tells every key")
        return
    instances = sum(pool.instances for pool in settings.pools)
    names = ", ".join(profile.name for profile in profiles.values())
    found = f"{source}: {len(settings.pools)} pools, {instances} instances; profiles {names}"
    yield Finding("configuration", Verdict.OK, found)
    if check_port and settings.server.port:
        yield port_finding(settings.server.host, settings.server.port)


def _table(findings: list[Finding]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    for finding in findings:
        found = f"{finding.found}\n→ {finding.fix}" if finding.fix else finding.found
        verdict = Text(finding.verdict.value, style=COLOURS[finding.verdict])
        table.add_row(Text(finding.subject), verdict, Text(found))
    return table
