"""Mooncake traces (kvcache-ai/Mooncake): one JSON object a line with timestamp (ms), input_length, output_length.

Other keys (``hash_ids``: which prefix blocks repeat) are read past.
"""

from collections.abc import Iterator
from pathlib import Path

import msgspec

from simulator.workload.adapters.recorded import TimedRow, timed_file
from simulator.workload.adapters.text import numbered_lines, row_error, whole_tokens
from simulator.workload.arrivals import Workload


class _Row(msgspec.Struct):
    timestamp: float
    input_length: float
    output_length: float


_DECODER = msgspec.json.Decoder(_Row)


def mooncake_trace(path: Path, name: str | None = None) -> Workload:
    """The workload of a Mooncake jsonl, plain or gzipped. Raises WorkloadError naming file and line."""
    return timed_file(name or path.name.split(".")[0], path, _rows, has_epoch=False)


def _rows(path: Path) -> Iterator[TimedRow]:
    for line, text in numbered_lines(path):
        try:
            row = _DECODER.decode(text)
        except msgspec.DecodeError as error:
            raise row_error(path, line, f"is not a Mooncake request: {error}") from None
        yield (
            line,
            row.timestamp / 1000,
            whole_tokens(path, line, "input_length", row.input_length),
            whole_tokens(path, line, "output_length", row.output_length),
        )
