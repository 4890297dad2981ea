"""``dynamollm report``: energy, CO2 and money of the last hour, by class, pool, tenant or model."""

import csv
import io
import json
from dataclasses import asdict, fields
from datetime import UTC, datetime

import click
import msgspec
from rich.console import Console
from rich.table import Table

from dynamollm.adapters.admin_client import fetch
from dynamollm.commands.status import savings
from dynamollm.errors import UserError
from energy.accounting import EnergyWindow
from energy.accounting_report import BY, By, EnergyReport, ReportLine, notes_of, report_of

UNITS_S = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


class Duration(click.ParamType[float]):
    """``90s``, ``15m``, ``1h``, ``2d``."""

    name = "duration"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Seconds."""
        text = str(value)
        try:
            seconds = float(text[:-1]) * UNITS_S[text[-1:]]
        except (ValueError, KeyError):
            seconds = -1.0
        if not 0.0 < seconds < float("inf"):
            self.fail(f"{text!r} is not a stretch of time as 90s, 15m, 1h or 2d", param, ctx)
        return seconds


@click.command()
@click.option("--since", "since_s", type=Duration(), default="1h", show_default=True, help="How far back: 15m, 1h, 2d.")
@click.option("--by", type=click.Choice(BY), default="class", show_default=True, help="What the lines are.")
@click.option("--url", default="http://127.0.0.1:8080", show_default=True, help="Base URL of the gateway.")
@click.option("--api-key", envvar="OPENAI_API_KEY", show_envvar=True, help="Bearer key of the gateway.")
@click.option("--format", "form", type=click.Choice(("table", "csv", "json")), default="table", show_default=True)
def command(since_s: float, by: By, url: str, api_key: str | None, form: str) -> None:
    """Show what requests took: energy by phase, CO2 and money, with idle time and transitions beside them."""
    report = report_of(window_of(url, since_s, api_key), by)
    saved = json.loads(fetch(url, "status", api_key))["counterfactual"] if form != "csv" else []
    if form == "json":
        click.echo(json.dumps({**document(report), "counterfactual": saved}, indent=2))
    elif form == "csv":
        click.echo(csv_text(report), nl=False)
    else:
        console = Console()
        console.print(table(report))
        for note in notes_of(report):
            console.print(note, style="dim", highlight=False)
        for line in savings(saved):
            console.print(line, highlight=False)


def window_of(url: str, since_s: float, api_key: str | None) -> EnergyWindow:
    """Ask a gateway for its books. Raises ``UserError``."""
    try:
        return msgspec.json.decode(fetch(url, "energy", api_key, since_s=since_s), type=EnergyWindow)
    except msgspec.MsgspecError as error:
        raise UserError(f"--url {url}: /admin/energy is not understood: {error}; is it of this version?") from None


def document(report: EnergyReport) -> dict[str, object]:
    """The report as plain values, for JSON."""
    window = report.window
    return {
        "by": report.by,
        "begin": _moment(window.begin_unix_s),
        "end": _moment(window.end_unix_s),
        "carbon_source": window.carbon_source,
        "unpriced_gpus": list(window.unpriced_gpus),
        "lines": [asdict(line) for line in report.lines],
        "total": asdict(report.total),
    }


def csv_text(report: EnergyReport) -> str:
    """The lines as CSV, without the total."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    names = [field.name for field in fields(ReportLine)]
    writer.writerow([report.by, *names[1:]])
    writer.writerows([getattr(line, name) for name in names] for line in report.lines)
    return out.getvalue()


def table(report: EnergyReport) -> Table:
    """The lines for people; narrow, since 80 columns must do."""
    window = report.window
    title = f"Energy by {report.by}, {_moment(window.begin_unix_s)[:-4]} to {_moment(window.end_unix_s)}"
    shown = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
    shown.add_column(report.by, no_wrap=True)
    for column in ("reqs", "Wh", "J/tok\nprefill", "\ndecode", "J/req", "idle\n%", "chg\n%", "g CO2", "USD"):
        shown.add_column(column, justify="right", no_wrap=True)
    for line in report.lines:
        shown.add_row(*_cells(line))
    shown.add_row()
    shown.add_row(*_cells(report.total))
    return shown


def _cells(line: ReportLine) -> list[str]:
    whole_j = line.energy_j or 1.0
    return [
        line.name,
        str(line.requests),
        _short(line.energy_wh),
        _short(line.prefill_j_per_token),
        _short(line.decode_j_per_token),
        _short(line.j_per_request),
        f"{100.0 * line.idle_j / whole_j:.0f}",
        f"{100.0 * line.transition_j / whole_j:.0f}",
        _short(line.co2_g),
        _short(line.usd),
    ]


def _short(value: float | None) -> str:
    if value is None:
        return "-"
    if value < 0.01:
        return f"{value:.2g}"
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _moment(unix_s: float) -> str:
    return datetime.fromtimestamp(unix_s, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
