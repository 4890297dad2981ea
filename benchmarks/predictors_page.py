"""docs/predictors.md from the stored measurements: every number of its tables comes from files, none is typed in.

What is said about them stands in benchmarks/predictors_notes.md, with a mark where each table goes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.load_contest import BOUND
from benchmarks.simulation_report import read_json, write_whole
from pools.classes import RequestClass

NOTES = Path(__file__).resolve().parent / "predictors_notes.md"
ALL_KNOWN = "lengths and loads known"
BOTH_PREDICTED = "both predicted"
PRODUCT = "product"
SETS = ("texts", "conversation", "conversation, fresh", "code, fresh")


@dataclass(frozen=True, slots=True)
class Column:
    """One number of a row. ``better``: 1 where more is better, -1 where less is, 0 where nobody is compared by it."""

    key: str
    title: str
    scale: float
    digits: int
    better: int = 0


LENGTHS = (
    Column("accuracy", "sizes right %", 100.0, 1, 1),
    Column("balanced", "balanced %", 100.0, 1, 1),
    Column("error_tokens", "mean abs. error, tokens", 1.0, 1, -1),
    Column("factor", "factor", 1.0, 2, -1),
    Column("covered", "in the 80 % interval, %", 100.0, 1),
    Column("loss_j", "loss J", 1.0, 1, -1),
    Column("cpu_p50_us", "CPU P50 us", 1.0, 0),
    Column("cpu_p99_us", "CPU P99 us", 1.0, 0),
    Column("p99_us", "wall P99 us", 1.0, 0),
)
LOADS = (
    Column("error", "error of the mean %", 100.0, 2, -1),
    Column("under", "under %", 100.0, 2),
    Column("over", "over %", 100.0, 1, -1),
    Column("pinball", "pinball at 0.955, % of the mean", 100.0, 3, -1),
)
PARTS = (
    *LOADS,
    Column("best", "best rival", 1.0, 0),
    Column("best_over", "its over %", 100.0, 1),
    Column("best_pinball", "its pinball", 100.0, 3),
    Column("bound_over", "true mean's over %", 100.0, 1),
)
TOGETHER = (Column("loss_j", "loss J", 1.0, 1, -1), Column("error_tokens", "mean abs. error, tokens", 1.0, 1, -1))


def write_page(results: Path, page: Path) -> None:
    """Put the tables into the notes. Raises ``FileNotFoundError`` for a part that was never measured."""
    lengths, loads, runs = (_stored(results, part) for part in ("lengths", "loads", "simulated"))
    text = NOTES.read_text(encoding="utf-8")
    for kind in SETS:
        text = text.replace(f"@@{kind}@@", _contest(lengths[kind], LENGTHS))
    text = text.replace("@@together@@", _together([lengths[kind] for kind in SETS]))
    for trace, mark in (("azure-2024-code-week", "code"), ("servegen-week", "servegen")):
        text = text.replace(f"@@{mark}@@", _contest(loads[trace]["rows"], LOADS))
        text = text.replace(f"@@{mark} parts@@", _parts(loads[trace]))
        text = text.replace(f"@@{mark} half an hour@@", _contest(loads[trace]["half an hour"], LOADS))
    text = text.replace("@@simulated@@", _runs(runs["conv-1h"]))
    commits = ", ".join(f"{part} {doc['commit']}" for part, doc in (("lengths", lengths), ("loads", loads)))
    write_whole(page, text.replace("@@commits@@", f"{commits}, simulated {runs['commit']}"))


def _stored(results: Path, part: str) -> dict[str, Any]:
    path = results / f"{part}.json"
    if not path.exists():
        raise FileNotFoundError(f"{path}: not measured yet; run python -m benchmarks.predictors --part {part}")
    return read_json(path)


def _contest(rows: Sequence[Mapping[str, Any]], columns: Sequence[Column]) -> str:
    """All contestants, and who is better than the product at what."""
    return f"{_table(rows, columns)}\n\nBetter than the product: {_beaten(rows, columns)}."


def _table(rows: Sequence[Mapping[str, Any]], columns: Sequence[Column]) -> str:
    lines = [f"| | {' | '.join(c.title for c in columns)} |", "|---" * (len(columns) + 1) + "|"]
    for row in rows:
        name = f"**{row['name']}**" if row["name"] == PRODUCT else row["name"]
        lines.append(f"| {name} | {' | '.join(_cell(row[c.key], c) for c in columns)} |")
    return "\n".join(lines)


def _cell(value: float | str, column: Column) -> str:
    if isinstance(value, str):
        return value
    return "" if value != value else f"{column.scale * value:.{column.digits}f}"


def _beaten(rows: Sequence[Mapping[str, Any]], columns: Sequence[Column]) -> str:
    """By the whole numbers, not as rounded: a tie in the table may be named here."""
    ours = next(row for row in rows if row["name"] == PRODUCT)
    said = []
    for column in columns:
        names = [
            row["name"]
            for row in rows
            if not row["name"].startswith((PRODUCT, BOUND))
            and column.better * (row[column.key] - ours[column.key]) > 0.0
        ]
        if names:
            said.append(f"in {column.title}: {', '.join(names)}")
    return "; ".join(said) or "none, in no column that compares"


def _together(sets: Sequence[Sequence[Mapping[str, Any]]]) -> str:
    """Means over the sets, each of the same weight, of who was measured on all of them."""
    by_name = [{row["name"]: row for row in rows} for rows in sets]
    everywhere = [name for name in by_name[0] if all(name in rows for rows in by_name)]
    return _table(
        [
            {"name": name, **{c.key: _mean([rows[name][c.key] for rows in by_name]) for c in TOGETHER}}
            for name in everywhere
        ],
        TOGETHER,
    )


def _parts(table: Mapping[str, Any]) -> str:
    """The product by pool and by class beside the best rival of each, and its pinball losses."""
    pools = [
        {**row, "name": f"pool {('of inputs to 1,024', 'of longer inputs')[int(row['name'])]}"}
        for row in table["pools"]
    ]
    classes = [{**row, "name": f"class {RequestClass(int(row['name'])).name}"} for row in table["classes"]]
    losses = ", ".join(f"{100.0 * loss:.2f} at {level}" for level, loss in table["pinball"].items())
    return f"{_table([*pools, *classes], PARTS)}\n\nPinball losses of the product, % of the mean rate: {losses}."


def _runs(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line a policy and kind of knowledge: mean and range over seeds; change is to the same seed with all known."""
    lines = [
        "| policy | known | runs | kWh | range | vs all known % | range | in SLO % | least | TTFT P50 s | P99, worst |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    known = {(row["policy"], row["seed"]): float(row["kwh"]) for row in rows if row["known"] == ALL_KNOWN}
    for policy, kind in dict.fromkeys((row["policy"], row["known"]) for row in rows):
        same = [row for row in rows if (row["policy"], row["known"]) == (policy, kind)]
        kwh = [float(row["kwh"]) for row in same]
        change = [100.0 * (row["kwh"] / known[policy, row["seed"]] - 1.0) for row in same]
        in_slo = [100.0 * row["in_slo"] for row in same]
        ttft_s = _mean([row["ttft_p50_s"] for row in same])
        lines.append(
            f"| {policy} | {kind} | {len(same)} | {_mean(kwh):.2f} | {min(kwh):.2f} to {max(kwh):.2f} |"
            f" {_mean(change):+.1f} | {min(change):+.1f} to {max(change):+.1f} |"
            f" {_mean(in_slo):.2f} | {min(in_slo):.2f} | {ttft_s:.3f} |"
            f" {max(row['ttft_p99_s'] for row in same):.1f} |"
        )
    return "\n".join(lines)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
