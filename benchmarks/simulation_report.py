"""Simulated runs as a table for people and as files for later: numbers, series, seed, commit and settings."""

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from simulator.results import RunResult


def print_runs(runs: Sequence[RunResult], console: Console) -> None:
    """One row a policy; differences are to the first."""
    first = runs[0]
    table = Table(
        title=f"{first.workload}: {first.requests:,} requests, {first.gpus} GPUs, {first.profile}",
        title_justify="left",
        box=None,
        padding=(0, 2, 0, 0),
    )
    table.add_column("policy", no_wrap=True)
    for column in ("kWh", "vs first\n%", "J/req", "GPU-h", "USD", "kg CO2", "in SLO\n%", "TTFT P99\ns", "TBT P99\nms"):
        table.add_column(column, justify="right", no_wrap=True)
    for run in runs:
        row = run.as_json()
        table.add_row(
            run.policy,
            f"{run.energy_j / 3.6e6:.2f}",
            f"{100 * (run.energy_j / first.energy_j - 1):+.1f}",
            f"{row['energy_per_request_j']:.0f}",
            f"{row['gpu_hours']:.1f}",
            f"{run.cost_usd:.0f}",
            f"{run.co2_g / 1000:.2f}",
            f"{100 * run.slo_attainment:.2f}",
            f"{row['ttft_p99_s']['all']:.2f}",
            f"{1000 * row['tbt_p99_s']['all']:.0f}",
        )
    console.print(table)
    kinds = Table(title="where the joules go, kWh", title_justify="left", box=None, padding=(0, 2, 0, 0))
    kinds.add_column("policy", no_wrap=True)
    for kind in first.energy_by_kind_j:
        kinds.add_column(kind, justify="right")
    for run in runs:
        kinds.add_row(run.policy, *(f"{joules / 3.6e6:.2f}" for joules in run.energy_by_kind_j.values()))
    console.print(kinds)


def store_run(run: RunResult, folder: Path, settings: Mapping[str, Any]) -> Path:
    """Write ``<workload>--<profile>--<policy>--seed<N>.json``; whole or not at all."""
    series = run.series
    document = {
        **run.as_json(),
        "settings": dict(settings),
        "commit": commit(),
        "series": {
            "at_s": _rounded(series.at_s),
            "power_w": _rounded(series.power_w),
            "rate_rps": [round(float(value), 2) for value in series.rate_rps],
            "gpus_on": _rounded(series.gpus_on),
            "gpus_by_tp": {str(tp): _rounded(values) for tp, values in series.gpus_by_tp.items()},
            "clock_mhz": _rounded(series.clock_mhz),
        },
    }
    path = run_path(folder, run.workload, run.profile, run.policy, run.seed)
    write_json(path, document)
    return path


def run_path(folder: Path, workload: str, profile: str, policy: str, seed: int) -> Path:
    """Where a run is stored."""
    return folder / f"{file_name(workload)}--{profile}--{policy}--seed{seed}.json"


def file_name(workload: str) -> str:
    """The name of a workload as a part of a file name."""
    return "".join(c if c.isalnum() or c in "-." else "_" for c in workload)


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write one object; whole or not at all."""
    write_whole(path, json.dumps(document, separators=(",", ":")) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read one object."""
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return document


def write_whole(path: Path, text: str) -> None:
    """Replace a file in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        Path(temporary).chmod(0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


_CHANGED_SOURCES = (
    *("status", "--porcelain", "--untracked-files=no", "--", "."),
    *(":!benchmarks/results", ":!docs/results.md", ":!docs/predictors.md"),
)


def commit() -> str:
    """The checked-out commit, with ``+`` if sources differ from it (not results); empty outside a checkout."""
    root = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    head = git("rev-parse", "--short=12", "HEAD")
    return head + ("+" if head and git(*_CHANGED_SOURCES) else "")


def _rounded(values: Any) -> list[int]:
    return [round(float(value)) for value in values]
