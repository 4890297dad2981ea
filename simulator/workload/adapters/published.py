"""The statistics of public traces that ship with the project, for those without the traces.

``published.json`` is written by ``python -m simulator.workload.adapters.publish``; sources and licences stand in each
entry.
"""

from pathlib import Path

import msgspec

from simulator.workload.statistics import TraceStatistics

PUBLISHED = Path(__file__).resolve().parents[1] / "published.json"


def published(name: str) -> TraceStatistics:
    """The shipped statistics of that name: synthetic-conv, synthetic-code or synthetic-week."""
    return msgspec.json.decode(PUBLISHED.read_bytes(), type=dict[str, TraceStatistics])[name]
