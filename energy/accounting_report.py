"""What a window of the books says, by class, pool, tenant or model: lines of sums and of joules per token. Pure."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from energy.accounting import EnergyRow, EnergyWindow, User

By = Literal["class", "pool", "tenant", "model"]
BY: tuple[By, ...] = ("class", "pool", "tenant", "model")
OVERHEAD = "(no request)"  # idle and transitions, where they belong to no class or tenant
UNHELD = "(unheld GPUs)"
_J_PER_WH = 3600.0


@dataclass(frozen=True, slots=True)
class ReportLine:
    """One line: whose, and all that is known of it. Per-token values are None where there are no tokens."""

    name: str
    requests: int
    input_tokens: int
    output_tokens: int
    energy_j: float
    energy_wh: float
    prefill_j: float
    decode_j: float
    idle_j: float
    transition_j: float
    prefill_j_per_token: float | None  # of input
    decode_j_per_token: float | None  # of output
    j_per_request: float | None
    co2_g: float
    gpu_hours: float
    gpu_usd: float
    electricity_usd: float

    @property
    def usd(self) -> float:
        """What it cost in all."""
        return self.gpu_usd + self.electricity_usd


@dataclass(frozen=True, slots=True)
class EnergyReport:
    """The lines of a window, the most energy first, and their sum."""

    by: By
    window: EnergyWindow
    lines: tuple[ReportLine, ...]
    total: ReportLine


def report_of(window: EnergyWindow, by: By) -> EnergyReport:
    """Sum a window's rows by one dimension; nothing is left out, so that the lines add up to the total."""
    sums: dict[str, EnergyRow] = {}
    for entry in window.rows:
        sums.setdefault(_name(entry.user, by), EnergyRow()).add(entry.row)
    total = EnergyRow()
    for row in sums.values():
        total.add(row)
    lines = sorted((_line(name, row) for name, row in sums.items()), key=lambda line: (-line.energy_j, line.name))
    return EnergyReport(by, window, tuple(lines), _line("all", total))


def _name(user: User, by: By) -> str:
    if by == "class":
        return user.request_class or OVERHEAD
    if by == "tenant":
        return user.tenant or OVERHEAD
    return (user.pool if by == "pool" else user.model) or UNHELD


def _line(name: str, row: EnergyRow) -> ReportLine:
    return ReportLine(
        name=name,
        requests=row.requests,
        input_tokens=row.input_tokens,
        output_tokens=row.output_tokens,
        energy_j=row.energy_j,
        energy_wh=row.energy_j / _J_PER_WH,
        prefill_j=row.prefill_j,
        decode_j=row.decode_j,
        idle_j=row.idle_j,
        transition_j=row.transition_j,
        prefill_j_per_token=_per(row.prefill_j, row.input_tokens),
        decode_j_per_token=_per(row.decode_j, row.output_tokens),
        j_per_request=_per(row.prefill_j + row.decode_j, row.requests),
        co2_g=row.co2_g,
        gpu_hours=row.gpu_s / 3600.0,
        gpu_usd=row.gpu_usd,
        electricity_usd=row.electricity_usd,
    )


def _per(value: float, count: int) -> float | None:
    return value / count if count else None


def notes_of(report: EnergyReport) -> Iterable[str]:
    """What a reader has to know beside the numbers."""
    yield f"CO2 by {report.window.carbon_source}."
    yield "The last few seconds are not settled yet. Joules per token leave idle time and transitions out."
    if report.window.unpriced_gpus:
        yield f"No price is set for {', '.join(report.window.unpriced_gpus)}: their hours cost nothing here."
