"""Hourly carbon intensity from a CSV file (.gz too): a ``timestamp`` column and one of grams of CO2 per kWh.

Reads what HewlettPackard/dc-rl publishes of the EIA's hours (columns ``timestamp``, ..., ``avg_CI``), and any file of
that form. Consecutive hours, oldest first; one left empty, as some of the EIA's are, is as the hour before it.
"""

import csv
import gzip
import math
from datetime import UTC, datetime
from pathlib import Path

from energy.carbon import HOUR_S, CarbonError, HourlyIntensity

COLUMN = "avg_CI"


def read_hourly(path: Path, column: str = COLUMN) -> HourlyIntensity:
    """The hours of a file. Raises ``CarbonError`` naming the line and what is wrong with it."""
    opener = gzip.open if path.suffix == ".gz" else open
    values: list[float] = []
    begin_s = math.nan
    try:
        with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
            for line, row in enumerate(csv.DictReader(file), start=2):
                unix_s, value = _hour(path, line, row, column, values[-1] if values else None)
                if not values:
                    begin_s = unix_s
                elif unix_s != begin_s + len(values) * HOUR_S:
                    raise CarbonError(f"{path}:{line}: {row['timestamp']} does not follow the hour before it")
                values.append(value)
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise CarbonError(f"{path}: cannot be read: {error}") from None
    return HourlyIntensity(begin_s, tuple(values), path.name)


def _hour(path: Path, line: int, row: dict[str, str], column: str, before: float | None) -> tuple[float, float]:
    try:
        moment = datetime.fromisoformat(row["timestamp"])
        value = before if before is not None and row[column] == "" else float(row[column])
    except KeyError as error:
        raise CarbonError(f"{path}: there is no column {error}; it needs timestamp and {column}") from None
    except (ValueError, TypeError) as error:
        raise CarbonError(f"{path}:{line}: {error}") from None
    if not 0.0 <= value < 10_000.0:
        raise CarbonError(f"{path}:{line}: {value:g} is no carbon intensity in g/kWh")
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp(), value
