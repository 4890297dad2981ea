"""Azure 2024 code week, digitised from its published figures: requests per minute and token distributions.

Source: Azure/AzurePublicDataset (CC-BY-4.0), figures of its 2024 notebook. The curve has a point every 7.2 minutes;
its area is within 1.1 % of the true number of requests before scaling and ``req_per_min_scaled`` brings it there.
"""

from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from simulator.workload.adapters.text import numbered_lines, row_error
from simulator.workload.arrivals import FloatColumn, Workload, WorkloadError
from simulator.workload.generated import RateCurve, generated
from simulator.workload.lengths import IndependentLengths, TokenCurve

RATE_FILE = "azure2024_code_requests_per_minute_digitised.csv"
INPUT_FILE = "azure2024_code_input_tokens_cdf_digitised.csv"
OUTPUT_FILE = "azure2024_code_output_tokens_cdf_digitised.csv"


def azure2024_code_week(traces: Path, seed: int, rate_scale: float = 1.0) -> Workload:
    """Seven days of coding requests: a non-homogeneous Poisson process along the digitised curve.

    ``traces`` is the folder of the three files. Input and output are drawn apart (only marginals are public).
    Raises WorkloadError naming file and line.
    """
    curve, starts_unix_s = _rate_curve(traces / RATE_FILE)
    lengths = IndependentLengths(_token_curve(traces / INPUT_FILE), _token_curve(traces / OUTPUT_FILE))
    return generated("azure-2024-code-week", curve.times(rate_scale), lengths, seed, starts_unix_s=starts_unix_s)


def _rate_curve(path: Path) -> tuple[RateCurve, float]:
    """The curve, and when it begins.

    Each point stands for the time up to the middle between it and its neighbours; the figure's margins, one step
    before the first point and after the last (on the minute), belong to those two.
    """
    times_s, rates_rps = [], []
    for line, time, rate in _pairs(path, "time_utc", "req_per_min_scaled"):
        try:
            times_s.append(datetime.fromisoformat(time).replace(tzinfo=UTC).timestamp())
        except ValueError:
            raise row_error(path, line, f"time_utc is not a date and time: {time!r}") from None
        rates_rps.append(_number(path, line, rate) / 60)
    if len(times_s) < 2:
        raise WorkloadError(f"{path}: needs at least two points")
    points_s = np.array(times_s)
    first_s = round((2 * points_s[0] - points_s[1]) / 60) * 60.0
    last_s = round((2 * points_s[-1] - points_s[-2]) / 60) * 60.0
    edges_s = np.concatenate(([first_s], (points_s[1:] + points_s[:-1]) / 2, [last_s]))
    return RateCurve(np.array(rates_rps), np.diff(edges_s)), first_s


def _token_curve(path: Path) -> TokenCurve:
    """The distribution, cleaned of what reading a figure by pixels leaves: below 1 token, above 100 %.

    Where the figure ends before 100 % (2.7 % of the inputs are beyond its 7,680 tokens), the rest is given its last
    token count: a lower bound of those inputs.
    """
    tokens, percent = [], []
    for line, token, share in _pairs(path, "tokens", "cdf_percent"):
        tokens.append(max(_number(path, line, token), 1.0))
        percent.append(min(_number(path, line, share), 100.0))
    if not tokens:
        raise WorkloadError(f"{path}: holds no points")
    cumulative: FloatColumn = np.maximum.accumulate(np.array(percent)) / 100
    return TokenCurve(np.append(tokens, tokens[-1]), np.append(cumulative, 1.0))


def _pairs(path: Path, first: str, second: str) -> list[tuple[int, str, str]]:
    lines = numbered_lines(path)
    number, header = next(lines, (1, ""))
    names = header.split(",")
    if first not in names or second not in names:
        raise row_error(path, number, f"the header must name {first} and {second}; it is {header!r}")
    found = []
    for line, text in lines:
        cells = text.split(",")
        if len(cells) != len(names):
            raise row_error(path, line, f"has {len(cells)} columns, the header has {len(names)}: {text!r}")
        found.append((line, cells[names.index(first)], cells[names.index(second)]))
    return found


def _number(path: Path, line: int, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise row_error(path, line, f"is not a number: {text!r}") from None
