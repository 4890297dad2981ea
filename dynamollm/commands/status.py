"""``dynamollm status``: the pools of a running gateway and what runs in each."""

import json
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from dynamollm.adapters.admin_client import fetch


@click.command()
@click.option("--url", default="http://127.0.0.1:8080", show_default=True, help="Base URL of the gateway.")
@click.option("--api-key", envvar="OPENAI_API_KEY", show_envvar=True, help="Bearer key of the gateway.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def command(url: str, api_key: str | None, as_json: bool) -> None:
    """Show pools, instances, TP, clocks, load, SLO slack and power of a running gateway."""
    status = json.loads(fetch(url, "status", api_key))
    if as_json:
        click.echo(json.dumps(status, indent=2))
        return
    console = Console()
    console.print(instances_table(status))
    busy = status["gpus"] - status["gpus_free"]
    console.print(
        f"\npolicy {status['policy']}: {busy} of {status['gpus']} GPUs hold an instance, "
        f"{status['queued']} requests wait, {status['operations_under_way']} changes under way",
        highlight=False,
    )
    for line in savings(status["counterfactual"]):
        console.print(line, highlight=False)


def savings(compared: list[dict[str, Any]]) -> list[str]:
    """What was saved so far, a line a policy; nothing while nothing is known."""
    return [
        f"saved in {c['seconds'] / 60:.0f} min against {c['policy']}: {c['saved_j'] / 3600:.4g} of "
        f"{c['energy_j'] / 3600:.4g} Wh ({c['saved_j'] / c['energy_j']:.0%}), give or take {c['band_j'] / 3600:.2g}"
        for c in compared
    ]


def instances_table(status: dict[str, Any]) -> Table:
    """One row an instance, pool by pool."""
    table = Table(box=None, pad_edge=False)
    for name in ("Pool", "Instance", "State"):
        table.add_column(name)
    for name in ("TP", "MHz", "In flight", "req/s", "SLO slack", "Power"):
        table.add_column(name, justify="right")
    for pool in status["pools"]:
        rows = [i for i in status["instances"] if i["pool"] == pool["name"]]
        for first, i in enumerate(rows):
            table.add_row(
                "" if first else pool["name"],
                i["id"],
                i["state"],
                str(i["tp"]),
                str(i["sm_clock_mhz"]),
                str(i["in_flight"]),
                _shown(i["rate_rps"], "{:.1f}"),
                _shown(i["slo_slack"], "{:.0%}"),
                _shown(i["power_w"], "{:.0f} W"),
            )
        if not rows:
            table.add_row(pool["name"], "-", "none")
    return table


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
