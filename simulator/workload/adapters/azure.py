"""Azure's LLM inference traces (Azure/AzurePublicDataset, CC-BY-4.0): TIMESTAMP, ContextTokens, GeneratedTokens.

Both published years have these columns. Timestamps without a zone are taken as UTC.
"""

import csv
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from simulator.workload.adapters.recorded import TimedRow, timed_file
from simulator.workload.adapters.text import numbered_lines, row_error, whole_tokens
from simulator.workload.arrivals import Workload

COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


def azure_trace(path: Path, name: str | None = None) -> Workload:
    """The workload of an Azure CSV, plain or gzipped. Raises WorkloadError naming file and line."""
    return timed_file(name or path.name.split(".")[0], path, _rows, has_epoch=True)


def _rows(path: Path) -> Iterator[TimedRow]:
    lines = numbered_lines(path)
    number, header = next(lines, (1, ""))
    names = [column.strip() for column in header.split(",")]
    if not set(COLUMNS) <= set(names):
        raise row_error(path, number, f"the header must name {', '.join(COLUMNS)}; it is {header!r}")
    time_at, input_at, output_at = (names.index(column) for column in COLUMNS)
    for line, text in lines:
        cells = next(csv.reader((text,)))
        if len(cells) != len(names):
            raise row_error(path, line, f"has {len(cells)} columns, the header has {len(names)}: {text!r}")
        yield (
            line,
            _unix_s(path, line, cells[time_at]),
            whole_tokens(path, line, COLUMNS[1], cells[input_at]),
            whole_tokens(path, line, COLUMNS[2], cells[output_at]),
        )


def _unix_s(path: Path, line: int, text: str) -> float:
    try:
        moment = datetime.fromisoformat(text.strip())
    except ValueError:
        raise row_error(path, line, f"TIMESTAMP is not a date and time: {text!r}") from None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
