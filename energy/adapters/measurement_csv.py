"""The documented CSV of a user's own sweep, and the formats of public data sets, read into measurements.

Columns of the documented CSV (docs/profiles.md): gpu, model, tp, sm_clock_mhz, input_tokens, output_tokens, one of
concurrency and rate_rps, ttft_s, tbt_s (means), and optionally ttft_p99_s, tbt_p99_s, power_w (per GPU), precision,
engine, source. A row that cannot be read is named by file and line, and nothing is returned.
"""

import csv
import gzip
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from energy.adapters import public_formats
from energy.closed_loop import LoadShape
from energy.measurements import Measurement, ServedPower, clients_of_rate
from energy.profile import ProfileError

REQUIRED = ("gpu", "model", "tp", "sm_clock_mhz", "input_tokens", "output_tokens", "ttft_s", "tbt_s")
LOAD_COLUMNS = ("concurrency", "rate_rps")
MOST_ERRORS_TOLD = 5
TP_CHOICES = (1, 2, 4, 8, 16)


@dataclass(frozen=True, slots=True)
class MeasurementFile:
    """What one file holds: measurements of loads, or served power readings."""

    measurements: tuple[Measurement, ...]
    served_power: tuple[ServedPower, ...] = ()


def read_measurements(path: Path) -> MeasurementFile:
    """Read a CSV (plain or gzip) in any known format. Raises ``ProfileError`` naming file, line and column."""
    rows, header = _table(path)
    if set(header) >= public_formats.AICONFIGURATOR:
        return MeasurementFile(tuple(_each(path, rows, public_formats.aiconfigurator_row)))
    if set(header) >= public_formats.ML_ENERGY:
        served = _each(path, rows, public_formats.ml_energy_row)
        return MeasurementFile((), tuple(each for each in served if each is not None))
    if set(header) >= public_formats.SPLITWISE:
        points = _each(path, rows, public_formats.splitwise_row)
        return MeasurementFile(public_formats.splitwise_medians(points))
    missing = [column for column in REQUIRED if column not in header]
    if missing or not any(column in header for column in LOAD_COLUMNS):
        raise ProfileError(
            f"{path}: line 1: missing column {', '.join(missing) or 'concurrency or rate_rps'}; "
            f"needed are {', '.join(REQUIRED)} and one of {', '.join(LOAD_COLUMNS)}"
        )
    return MeasurementFile(tuple(_each(path, rows, _documented_row)))


Cells = dict[str, str]
_Row = TypeVar("_Row")


def _table(path: Path) -> tuple[list[tuple[int, Cells]], Sequence[str]]:
    """Rows with their line numbers, and the header."""
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ProfileError(f"{path}: cannot be read: {error}") from None
    reader = csv.DictReader(io.StringIO(text))
    rows = [(reader.line_num, row) for row in reader]
    if not reader.fieldnames or not rows:
        raise ProfileError(f"{path}: no rows below a header line")
    return rows, [name.strip() for name in reader.fieldnames]


def _each(path: Path, rows: list[tuple[int, Cells]], read: Callable[[str, Cells], _Row]) -> list[_Row]:
    """Every row read, or an error that names the first few that cannot be."""
    read_rows, errors = [], []
    for line, cells in rows:
        where = f"{path} line {line}"
        if None in cells or None in cells.values():  # csv gives None for what is too many or too few
            errors.append(f"{where}: not as many cells as the header has columns")
            continue
        try:
            read_rows.append(read(where, {key.strip(): value.strip() for key, value in cells.items()}))
        except ValueError as error:
            errors.append(f"{where}: {error}")
    if errors:
        more = len(errors) - MOST_ERRORS_TOLD
        told = "\n".join(errors[:MOST_ERRORS_TOLD])
        raise ProfileError(told + (f"\nand {more} more rows" if more > 0 else ""))
    return read_rows


def _documented_row(where: str, cells: Cells) -> Measurement:
    tp = int(_number(cells, "tp"))
    if tp not in TP_CHOICES:
        raise ValueError(f"tp is {tp}, not one of {', '.join(str(tp) for tp in TP_CHOICES)}")
    ttft_s, tbt_s = _number(cells, "ttft_s"), _number(cells, "tbt_s")
    input_tokens, output_tokens = _number(cells, "input_tokens"), _number(cells, "output_tokens")
    rate_rps = _optional(cells, "rate_rps")
    concurrency = _optional(cells, "concurrency")
    if (rate_rps is None) == (concurrency is None):
        raise ValueError("exactly one of concurrency and rate_rps must be given")
    clients = round(concurrency) if concurrency else clients_of_rate(rate_rps or 0.0, ttft_s, tbt_s, output_tokens)
    model = _text(cells, "model")
    return Measurement(
        where=where,
        gpu=_text(cells, "gpu"),
        model=model,
        precision=cells.get("precision") or ("fp8" if "fp8" in model.lower() else "bf16"),
        engine=cells.get("engine") or "vllm",
        tp=tp,
        sm_clock_mhz=int(_number(cells, "sm_clock_mhz")),
        load=LoadShape(input_tokens, output_tokens, max(clients, 1)),
        ttft_s=ttft_s,
        tpot_s=tbt_s,
        power_w=_optional(cells, "power_w"),
        ttft_p99_s=_optional(cells, "ttft_p99_s"),
        tbt_p99_s=_optional(cells, "tbt_p99_s"),
        rate_rps=rate_rps,
    )


def _text(cells: Cells, column: str) -> str:
    if not cells[column]:
        raise ValueError(f"{column} is empty")
    return cells[column]


def _number(cells: Cells, column: str) -> float:
    value = _optional(cells, column)
    if value is None:
        raise ValueError(f"{column} is empty")
    return value


def _optional(cells: Cells, column: str) -> float | None:
    """A positive finite number, None where the cell is empty or the column is missing."""
    text = cells.get(column, "")
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"{column} is {text!r}, not a number") from None
    if not 0.0 < value < float("inf"):
        raise ValueError(f"{column} is {text}, it must be above 0 and finite")
    return value
