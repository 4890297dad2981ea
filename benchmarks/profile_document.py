"""docs/profiles.md: what the shipped profiles are, how far off they are, and the anchors beside what they give.

Every number in it is read from the shipped files or computed from them; ``make profiles`` writes it anew.
"""

from collections.abc import Sequence
from pathlib import Path

from benchmarks.profile_anchors import anchors
from benchmarks.profile_plots import save_plots
from benchmarks.profile_view import PAPER_TOKENS_PER_S, energy_grid, least, rate_of_tokens
from energy.adapters.capacity_file import load_capacity
from energy.adapters.catalogue import load_fitted, profile_names
from energy.fitted import FittedProfile

TARGETS = {"ttft": 0.15, "tpot": 0.07, "power": 0.10}
PLOTTED = ("llama-2-70b-h100", "llama-3.1-70b-fp8-h100")
DOCUMENT_PLOTS = ("heatmap", "energy")
PROSE = Path(__file__).parent / "profile_text"


def document_text(tried: dict[str, dict[str, float]]) -> str:
    """The whole document; ``tried`` are the errors of fits that are not shipped."""
    profiles = [load_fitted(name) for name in profile_names()]
    parts = [
        _prose("model"),
        _shipped(profiles),
        _errors(profiles),
        _tried(tried),
        _anchors(),
        _least_energy(),
        _prose("capacity"),
        _prose("own_sweep"),
    ]
    return "\n".join(part for part in parts if part)


def _prose(name: str) -> str:
    return (PROSE / f"{name}.md").read_text(encoding="utf-8")


def save_document_plots(folder: Path) -> None:
    """The plots that the document shows."""
    for name in PLOTTED:
        save_plots(load_capacity(name), folder, PAPER_TOKENS_PER_S, DOCUMENT_PLOTS)


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def _shipped(profiles: list[FittedProfile]) -> str:
    rows = []
    for p in profiles:
        origin = p.provenance.origin
        sources = ", ".join(f"{s.name}@{s.commit} ({s.rows} rows)" for s in p.provenance.sources)
        tps = "/".join(str(tp) for tp in p.tensor_parallel)
        rows.append((f"`{p.name}`", p.engine, tps, origin["load"], origin["activity_power"], sources))
    header = ("profile", "engine", "TP", "load axis", "activity power", "sources")
    return "## Shipped profiles\n\n" + _table(header, rows)


def _errors(profiles: list[FittedProfile]) -> str:
    columns = ("ttft_by_shape", "ttft_by_concurrency", "tpot_by_shape", "tpot_by_concurrency", "power")
    rows = []
    for p in profiles:
        errors = p.provenance.errors
        if "ttft_by_move" in errors:
            moved = (errors["ttft_by_move"], None, errors["tpot_by_move"], None, None)
            rows.append((f"`{p.name}` (moved)", *(_marked(c, v) for c, v in zip(columns, moved, strict=True))))
        else:
            rows.append((f"`{p.name}`", *(_marked(column, errors.get(column)) for column in columns)))
    text = (
        "## Cross-validation\n\nMedian absolute errors of rows the fit had not seen: whole (input, output) shapes left "
        "out, whole concurrencies left out, for power whole shapes or classes of batch. Targets: TTFT 15 %, TPOT 7 %, "
        "power 10 %; **bold** misses its target. A moved profile is another one with the memory bandwidth of its GPU; "
        "its errors are those of the same move of 70B FP8 from H100 to H200, where both were measured.\n\n"
    )
    header = ("profile", "TTFT, shape", "TTFT, concurrency", "TPOT, shape", "TPOT, concurrency", "power per GPU")
    return text + _table(header, rows)


def _marked(column: str, value: float | None) -> str:
    if value is None:
        return "-"
    shown = f"{100 * value:.1f} %"
    return f"**{shown}**" if value > TARGETS[column.split("_")[0]] else shown


def _tried(tried: dict[str, dict[str, float]]) -> str:
    if not tried:
        return ""
    columns = ("ttft_by_shape", "ttft_by_concurrency", "tpot_by_shape", "tpot_by_concurrency")
    rows = [
        (name, f"{errors['rows']:.0f}", *(_marked(column, errors.get(column)) for column in columns))
        for name, errors in tried.items()
    ]
    header = ("tried and not shipped", "rows", "TTFT, shape", "TTFT, concurrency", "TPOT, shape", "TPOT, concurrency")
    text = "How these loads were generated is not documented, and the closed loops assumed do not reproduce them.\n\n"
    return text + _table(header, rows)


def _anchors() -> str:
    rows = [(a.what, a.source, a.published, a.ours, a.role) for a in anchors()]
    header = ("figure", "source", "published", "these profiles", "role")
    return "## Anchors\n\n" + _table(header, rows)


def _least_energy() -> str:
    parts = [
        f"## Least energy per request at {PAPER_TOKENS_PER_S:,.0f} tokens/s on one instance\n",
    ]
    rows = []
    tables = [load_capacity(name) for name in profile_names()]
    for k, each in enumerate(tables[0].classes):
        cells = []
        for table in tables:
            point = least(energy_grid(table, k, rate_of_tokens(table, k, PAPER_TOKENS_PER_S)), table)
            cells.append("-" if point is None else f"{point[2]:.0f} J, TP{point[0]}, {point[1]} MHz")
        rows.append((each.label, *cells))
    parts.append(_table(("class", *(f"`{table.profile}`" for table in tables)), rows))
    for name in PLOTTED:
        parts += [f"![{name}: {plot}](profiles/{name}-{plot}.png)\n" for plot in DOCUMENT_PLOTS]
    return "\n".join(parts)
