"""``dynamollm explain``: the last decisions of a running gateway's controller, and why."""

import json
from typing import Any

import click
from rich.console import Console

from dynamollm.adapters.admin_client import fetch


@click.command()
@click.option("--url", default="http://127.0.0.1:8080", show_default=True, help="Base URL of the gateway.")
@click.option("--api-key", envvar="OPENAI_API_KEY", show_envvar=True, help="Bearer key of the gateway.")
@click.option("--last", type=click.IntRange(1, 200), default=10, show_default=True, help="How many decisions.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
def command(url: str, api_key: str | None, last: int, as_json: bool) -> None:
    """Show what was decided: why, predicted against observed, gap and solve time, and what became of it."""
    told = json.loads(fetch(url, "decisions", api_key, last=last))
    if as_json:
        click.echo(json.dumps(told, indent=2))
        return
    console = Console(highlight=False)
    for line in lines_of(told):
        console.print(line)


def lines_of(told: dict[str, Any]) -> list[str]:
    """The decisions as text, the newest last."""
    lines: list[str] = []
    for tick in told["ticks"]:
        lines.append(f"[bold]{tick['ago_s']:.0f} s ago[/bold]  (decided in {1000 * tick['took_s']:.0f} ms)")
        for note in tick["why"]:
            numbers = ", ".join(f"{name} {value}" for name, value in note["numbers"].items() if value is not None)
            lines.append(f"  {note['topic']}: {note['why']}".rstrip() + (f" [dim]{numbers}[/dim]" if numbers else ""))
        lines += [f"  -> {sentence_of(action)}" for action in tick["actions"]]
    unhappy = [o for o in told["operations"] if o["outcome"] != "done"]
    if unhappy:
        lines.append("[bold]Not carried out[/bold]")
        lines += [
            f"  {o['ago_s']:.0f} s ago: {sentence_of(o['action'])}: {o['outcome']}, {o['reason']}" for o in unhappy
        ]
    return lines or ["nothing has been decided yet"]


def sentence_of(action: dict[str, Any]) -> str:
    """One action in a line."""
    match action["kind"]:
        case "ScaleOut":
            return (
                f"start {action['instance_id']} in pool {action['pool']}: TP{action['tp']} at "
                f"{action['sm_clock_mhz']} MHz on {action['node']}"
            )
        case "ScaleIn":
            return f"drain and stop {action['instance_id']}"
        case "Reshard":
            made = ", ".join(f"{order['instance_id']} (TP{order['tp']})" for order in action["create"])
            return f"re-shard {', '.join(action['retire'])} into {made}"
        case "Reassign":
            return f"move {action['instance_id']} to pool {action['pool']}"
        case "SetFrequency":
            return f"clock {action['instance_id']} at {action['sm_clock_mhz']} MHz: {action['why']}"
        case "Park":
            return f"park {action['instance_id']}"
        case "Wake":
            return f"wake {action['instance_id']} at {action['sm_clock_mhz']} MHz"
        case "Route":
            return "route " + ", ".join(f"{pool} {share:g}" for pool, share in action["shares"].items())
        case _:
            return f"escalate {action.get('instance_id', '')}: {action.get('measure', '')}"
