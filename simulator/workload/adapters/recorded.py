"""A workload from any file of timed rows: read once to check every row, then streamed as often as it is begun."""

from collections.abc import Callable, Iterator
from pathlib import Path

from simulator.workload.adapters.text import row_error
from simulator.workload.arrivals import CHUNK_ROWS, Arrivals, Workload, WorkloadError

# (line number, time in seconds on the file's own clock, input tokens, output tokens)
TimedRow = tuple[int, float, int, int]


def timed_file(name: str, path: Path, rows: Callable[[Path], Iterator[TimedRow]], has_epoch: bool) -> Workload:
    """The workload of a file whose ``rows`` are in order of time; its first row arrives at 0.

    Every row is checked here, so that a bad one stops a replay before its first request. Raises WorkloadError.
    """
    first_s: float | None = None
    last_s = 0.0
    count = 0
    for line, time_s, _, _ in rows(path):
        if first_s is None:
            first_s = last_s = time_s
        if time_s < last_s:
            raise row_error(path, line, f"arrives {last_s - time_s:g} s before the row above it: sort the file by time")
        last_s = time_s
        count += 1
    if first_s is None:
        raise WorkloadError(f"{path}: holds no request")
    began_s = first_s

    def begin() -> Iterator[Arrivals]:
        block: list[TimedRow] = []
        for row in rows(path):
            block.append(row)
            if len(block) == CHUNK_ROWS:
                yield _columns(block, began_s)
                block = []
        yield _columns(block, began_s)

    return Workload(name, last_s - began_s, float(count), begin, began_s if has_epoch else None)


def _columns(block: list[TimedRow], began_s: float) -> Arrivals:
    return Arrivals.of(
        (row[1] - began_s for row in block),
        (row[2] for row in block),
        (row[3] for row in block),
    )
