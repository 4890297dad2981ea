"""Workloads by name, or by the path of a trace file: what ``--trace`` takes.

| name | what | needs a file |
|---|---|---|
| azure-conv, azure-code | Azure 2023, one hour, as recorded | yes |
| azure-2024-code-week, -day | a week (or its Tuesday) along the digitised rate curve | yes |
| servegen-week, -day | ServeGen m-large, 162 clients, 7 days (or the second) | yes |
| vidur-arxiv | Poisson, 1 request/s for an hour, lengths of arXiv summaries | yes |
| poisson-low, -medium, -high | Poisson for an hour, conversation lengths (see ``POISSON_RATES_RPS``) | no |
| surge | a busy time between two quiet ones, nine minutes, conversation lengths (see ``SURGE``) | no |
| synthetic-conv, -code | Azure 2023's statistics, one hour | no |
| synthetic-week, -day | Azure 2024 code's statistics, a week (or its Tuesday) | no |
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from simulator.workload.adapters.azure import COLUMNS as AZURE_COLUMNS
from simulator.workload.adapters.azure import azure_trace
from simulator.workload.adapters.azure2024 import RATE_FILE, azure2024_code_week
from simulator.workload.adapters.location import data_file
from simulator.workload.adapters.mooncake import mooncake_trace
from simulator.workload.adapters.published import published
from simulator.workload.adapters.servegen import servegen_week
from simulator.workload.adapters.text import numbered_lines, row_error
from simulator.workload.adapters.vidur import COLUMNS as VIDUR_COLUMNS
from simulator.workload.adapters.vidur import vidur_lengths
from simulator.workload.arrivals import Workload, WorkloadError
from simulator.workload.generated import RateCurve, generated, poisson
from simulator.workload.transform import scaled, window

HOUR_S = 3600.0
DAY_S = 86_400.0
# Named after the paper's experiment, whose rates are not reported: a third, two thirds and the whole of the busiest
# five minutes of the Azure 2023 conversation hour.
POISSON_RATES_RPS = {"low": 7.46 / 3, "medium": 7.46 * 2 / 3, "high": 7.46}
SURGE = ((180.0, 1.0), (150.0, 8.0), (210.0, 1.0))
"""(seconds, requests/s): a demonstration in which few instances have to be more and fewer again. Ours, of no source."""
_TUESDAY_2024 = 4 * DAY_S  # the curve begins on Friday, 10 May 2024
_SERVEGEN = "traces/servegen_m-large_days0-6.tar.zst"

# (seed, rate scale) -> workload
Maker = Callable[[int, float], Workload]


def _azure2023(kind: str, seed: int, rate_scale: float) -> Workload:
    path = data_file(f"traces/AzureLLMInferenceTrace_{kind}.csv.gz")
    return scaled(azure_trace(path, f"azure-{kind}"), rate_scale, seed)


def _azure2024(seed: int, rate_scale: float) -> Workload:
    return azure2024_code_week(data_file(f"traces/{RATE_FILE}").parent, seed, rate_scale)


def _servegen(seed: int, rate_scale: float) -> Workload:
    return servegen_week(data_file(_SERVEGEN), seed, rate_scale)


def _vidur(seed: int, rate_scale: float) -> Workload:
    lengths = vidur_lengths(data_file("traces/vidur_arxiv_lengths.csv.gz"))
    return poisson(rate_scale, HOUR_S, lengths, seed, "vidur-arxiv")


def _poisson(load: str, seed: int, rate_scale: float) -> Workload:
    rate_rps = POISSON_RATES_RPS[load] * rate_scale
    return poisson(rate_rps, HOUR_S, published("synthetic-conv").lengths(), seed, f"poisson-{load}")


def _surge(seed: int, rate_scale: float) -> Workload:
    slot_s, rates_rps = np.array(SURGE).T
    curve = RateCurve(rates_rps * rate_scale, slot_s)
    return generated("surge", curve, published("synthetic-conv").lengths(), seed)


def _synthetic(kind: str, seed: int, rate_scale: float) -> Workload:
    return published(f"synthetic-{kind}").workload(seed, rate_scale)


def _day(whole: Maker, start_s: float, seed: int, rate_scale: float) -> Workload:
    return window(whole(seed, rate_scale), start_s, DAY_S)


NAMED: dict[str, Maker] = {
    "azure-conv": partial(_azure2023, "conv"),
    "azure-code": partial(_azure2023, "code"),
    "azure-2024-code-week": _azure2024,
    "azure-2024-code-day": partial(_day, _azure2024, _TUESDAY_2024),
    "servegen-week": _servegen,
    "servegen-day": partial(_day, _servegen, DAY_S),
    "vidur-arxiv": _vidur,
    "poisson-low": partial(_poisson, "low"),
    "poisson-medium": partial(_poisson, "medium"),
    "poisson-high": partial(_poisson, "high"),
    "surge": _surge,
    "synthetic-conv": partial(_synthetic, "conv"),
    "synthetic-code": partial(_synthetic, "code"),
    "synthetic-week": partial(_synthetic, "week"),
    "synthetic-day": partial(_day, partial(_synthetic, "week"), _TUESDAY_2024),
}


def open_workload(trace: str, seed: int = 0, rate_scale: float = 1.0) -> Workload:
    """The workload of that name, else of that trace file, at ``rate_scale`` times its rate.

    Raises WorkloadError naming the file, the line, and what would help.
    """
    if trace in NAMED:
        return NAMED[trace](seed, rate_scale)
    path = Path(trace)
    if not path.is_file():
        raise WorkloadError(f"{trace} is neither a file nor a known workload; known are {', '.join(NAMED)}")
    return scaled(trace_file(path), rate_scale, seed)


def trace_file(path: Path) -> Workload:
    """The workload of a trace file whose first line tells its format. Raises WorkloadError."""
    number, first = next(numbered_lines(path), (1, ""))
    names = {name.strip() for name in first.split(",")}
    if set(AZURE_COLUMNS) <= names:
        return azure_trace(path)
    if first.lstrip().startswith("{"):
        return mooncake_trace(path)
    if set(VIDUR_COLUMNS) <= names:
        raise row_error(path, number, "holds lengths without arrival times, which cannot be replayed")
    raise row_error(
        path,
        number,
        f"is neither a header naming {', '.join(AZURE_COLUMNS)} nor a JSON object with timestamp, input_length and "
        f"output_length; it is {first[:80]!r}",
    )
