"""Describes the named workloads by their own numbers, for docs/workloads.md.

``python -m benchmarks.workload_table [NAME ...]`` prints a Markdown table: requests, rate, burstiness, lengths, shares
of the nine classes. Long workloads are drawn at a lower rate for it, and counted up again.
"""

import sys
from dataclasses import dataclass

import numpy as np

from pools.classes import REQUEST_CLASSES
from simulator.workload.adapters.catalogue import NAMED, open_workload
from simulator.workload.arrivals import Workload, WorkloadError
from simulator.workload.statistics import class_shares

SAMPLE_REQUESTS = 2_000_000  # longer workloads are described at a lower rate


@dataclass(frozen=True, slots=True)
class Description:
    """The numbers of one workload; those of lengths and gaps are of the sample."""

    name: str
    requests: float
    hours: float
    mean_rps: float
    peak_minute_rps: float
    gap_cv: float
    input_mean: float
    input_p99: float
    output_mean: float
    output_p99: float
    shares_percent: tuple[float, ...]
    sample_rate_scale: float


def describe(name: str, workload: Workload, sample_rate_scale: float = 1.0) -> Description:
    """Describe a workload by all of its requests. It was made at ``sample_rate_scale`` times its rate."""
    arrivals = workload.collect()
    if len(arrivals) < 2:
        raise WorkloadError(f"{name}: holds too few requests to describe")
    gaps_s = np.diff(arrivals.arrival_s)
    per_minute = np.bincount((arrivals.arrival_s // 60).astype(np.intp))
    return Description(
        name=name,
        requests=len(arrivals) / sample_rate_scale,
        hours=workload.duration_s / 3600,
        mean_rps=len(arrivals) / workload.duration_s / sample_rate_scale,
        peak_minute_rps=float(per_minute.max()) / 60 / sample_rate_scale,
        gap_cv=float(gaps_s.std() / gaps_s.mean()),
        input_mean=float(arrivals.input_tokens.mean()),
        input_p99=float(np.percentile(arrivals.input_tokens, 99)),
        output_mean=float(arrivals.output_tokens.mean()),
        output_p99=float(np.percentile(arrivals.output_tokens, 99)),
        shares_percent=tuple(float(share) * 100 for share in class_shares(arrivals)),
        sample_rate_scale=sample_rate_scale,
    )


def table(descriptions: list[Description]) -> str:
    """A Markdown table of them."""
    classes = [request_class.name for request_class in REQUEST_CLASSES]
    head = [
        "workload",
        "requests",
        "hours",
        "mean /s",
        "peak minute /s",
        "gap CV",
        "input mean",
        "P99",
        "output mean",
        "P99",
    ]
    lines = ["| " + " | ".join([*head, *(f"{name} %" for name in classes)]) + " |", "|---" * (len(head) + 9) + "|"]
    for one in descriptions:
        # burstiness is only told of a workload at its own rate: thinning smooths it
        cv = f"{one.gap_cv:.1f}" if one.sample_rate_scale == 1 else "-"
        cells = [
            one.name,
            f"{one.requests:,.0f}" if one.sample_rate_scale == 1 else f"{one.requests / 1e6:.2f} M",
            f"{one.hours:.2f}",
            f"{one.mean_rps:.2f}",
            f"{one.peak_minute_rps:.1f}",
            cv,
            f"{one.input_mean:.0f}",
            f"{one.input_p99:.0f}",
            f"{one.output_mean:.0f}",
            f"{one.output_p99:.0f}",
            *(f"{share:.1f}" for share in one.shares_percent),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(names: list[str]) -> None:
    """Print the table of these workloads, or of all whose files are at hand."""
    descriptions = []
    for name in names or list(NAMED):
        try:
            scale = min(1.0, SAMPLE_REQUESTS / open_workload(name).expected_requests)
            descriptions.append(describe(name, open_workload(name, 0, scale), scale))
        except WorkloadError as error:
            print(f"{name}: {error}", file=sys.stderr)
    print(table(descriptions))


if __name__ == "__main__":
    main(sys.argv[1:])
