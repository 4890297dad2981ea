"""Length files in Vidur's form (microsoft/vidur, MIT): num_prefill_tokens, num_decode_tokens; no arrival times."""

from pathlib import Path

import numpy as np

from simulator.workload.adapters.text import numbered_lines, row_error, whole_tokens
from simulator.workload.arrivals import WorkloadError
from simulator.workload.lengths import RecordedLengths

COLUMNS = ("num_prefill_tokens", "num_decode_tokens")


def vidur_lengths(path: Path) -> RecordedLengths:
    """The pairs of a length file, plain or gzipped. Raises WorkloadError naming file and line."""
    lines = numbered_lines(path)
    number, header = next(lines, (1, ""))
    names = [column.strip() for column in header.split(",")]
    if not set(COLUMNS) <= set(names):
        raise row_error(path, number, f"the header must name {', '.join(COLUMNS)}; it is {header!r}")
    input_at, output_at = (names.index(column) for column in COLUMNS)
    input_tokens, output_tokens = [], []
    for line, text in lines:
        cells = text.split(",")
        if len(cells) != len(names):
            raise row_error(path, line, f"has {len(cells)} columns, the header has {len(names)}: {text!r}")
        input_tokens.append(whole_tokens(path, line, COLUMNS[0], cells[input_at]))
        output_tokens.append(whole_tokens(path, line, COLUMNS[1], cells[output_at]))
    if not input_tokens:
        raise WorkloadError(f"{path}: holds no lengths")
    return RecordedLengths(np.array(input_tokens, np.int32), np.array(output_tokens, np.int32))
