"""A ReplayReport as text for people."""

from rich.console import Console
from rich.table import Table

from benchmarks.replay_report import ClassReport, Percentiles, ReplayReport


def _ms(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds * 1000:.3g}" if seconds < 1 else f"{seconds * 1000:.0f}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share * 100:.1f}"


def class_table(report: ReplayReport) -> Table:
    """One row a class, and one for all."""
    with_energy = report.total.energy_j is not None
    title = f"{report.trace} on {report.model} at {report.url}"
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))  # narrow: 80 columns must do
    table.add_column("class", no_wrap=True)
    columns = ["reqs", "TTFT ms\nP50", "\nP99", "TBT ms\nP50", "\nP99", "in SLO\n%", "out\ntok/s", "errs"]
    for column in columns + ["J/req"] * with_energy:
        table.add_column(column, justify="right", no_wrap=True)

    def add(name: str, results: ClassReport) -> None:
        cells = [
            name,
            str(results.requests),
            _ms(results.ttft_s.p50),
            _ms(results.ttft_s.p99),
            _ms(results.tbt_s.p50),
            _ms(results.tbt_s.p99),
            _percent(results.within_slo),
            f"{results.output_tokens_per_s:.1f}",
            str(results.failed),
        ]
        if with_energy:
            each = results.finished and results.energy_j is not None
            cells.append(f"{(results.energy_j or 0.0) / results.finished:.1f}" if each else "-")
        table.add_row(*cells)

    for name, results in report.classes.items():
        add(name, results)
    table.add_row()
    add("all", report.total)
    return table


def summary_lines(report: ReplayReport) -> list[str]:
    """What the table does not say: where every request went, how late the replay was, energy."""
    total = report.total
    lines = [
        f"{report.planned} planned = {total.finished} finished + {total.failed} failed + "
        f"{total.interrupted} interrupted + {report.not_sent} not sent, in {report.wall_s:.1f} s"
    ]
    lines += [f"  {count} x {reason}" for reason, count in report.failures.items()]
    lines.append(f"sent late by {_times(report.lateness_s)} ms (P50, P99, max): the replay's own delay")
    error = report.input_token_error
    if error.p50 is not None and error.p99 is not None and error.max is not None:
        lines.append(f"input tokens off by {error.p50:.0f}, {error.p99:.0f}, {error.max:.0f} (P50, P99, max)")
    if report.other_output_length:
        lines.append(f"{report.other_output_length} finished with another output length than asked for")
    if total.energy_j is not None:
        lines.append(f"energy as reported per request: {_energy(total.energy_j, total)}")
    if report.gpu_energy_j is not None:
        lines.append(f"energy by the GPUs' counters: {_energy(report.gpu_energy_j, total)}")
    return lines


def _times(times: Percentiles) -> str:
    return ", ".join(_ms(value) for value in (times.p50, times.p99, times.max))


def _energy(energy_j: float, total: ClassReport) -> str:
    text = f"{energy_j:.0f} J ({energy_j / 3600:.2f} Wh)"
    if total.finished:
        text += f", {energy_j / total.finished:.1f} J/request"
    if total.output_tokens:
        text += f", {energy_j / total.output_tokens:.3f} J/output token"
    return text


def print_report(report: ReplayReport, console: Console) -> None:
    """Print the table and the lines under it."""
    console.print(class_table(report))
    for line in summary_lines(report):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
