"""ServeGen's published clients (alibaba/ServeGen, Apache-2.0), from the .tar.zst that holds one category.

For client k: ``chunk-k-trace.csv`` (start of window s, requests/s, CV, process, shape, scale; a process only where
there are requests) and ``chunk-k-dataset.json`` (start s -> input_tokens and output_tokens histograms, each a string
``{tokens: probability, ...}``). A client may lack the second, or some of its times.
"""

import json
import re
import tarfile
from pathlib import Path
from typing import IO

import numpy as np
import zstandard

from simulator.workload.adapters.text import row_error
from simulator.workload.arrivals import Workload, WorkloadError
from simulator.workload.lengths import IndependentLengths, TokenHistogram
from simulator.workload.servegen import GAPS, Client, ClientWindow, population

WINDOW_S = 600.0
_MEMBER = re.compile(r"chunk-(\d+)-(trace\.csv|dataset\.json)$")


def servegen_week(path: Path, seed: int, rate_scale: float = 1.0) -> Workload:
    """The traffic of all clients over the days of the archive. Raises WorkloadError naming member and line."""
    windows: dict[int, dict[int, ClientWindow]] = {}
    lengths: dict[int, dict[float, IndependentLengths]] = {}
    last = 0
    try:
        with (
            path.open("rb") as file,
            zstandard.ZstdDecompressor().stream_reader(file) as stream,
            tarfile.open(fileobj=stream, mode="r|") as archive,
        ):
            for member in archive:
                named = _MEMBER.search(member.name)
                content = archive.extractfile(member)
                if named is None or content is None:
                    continue
                client = int(named[1])
                if named[2] == "trace.csv":
                    windows[client], end = _trace(path / member.name, content)
                    last = max(last, end)
                else:
                    lengths[client] = _dataset(path / member.name, content)
    except (zstandard.ZstdError, tarfile.TarError, EOFError) as error:
        raise WorkloadError(f"{path}: is not a .tar.zst archive, or is damaged: {error}") from error
    except OSError as error:
        raise WorkloadError(f"{path}: cannot be read: {error.strerror or error}") from error
    if not windows:
        raise WorkloadError(f"{path}: holds no chunk-*-trace.csv")
    clients = tuple(Client(client, windows[client], lengths.get(client, {})) for client in sorted(windows))
    return population(path.name.split(".")[0], clients, WINDOW_S, last, seed, rate_scale)


def _trace(path: Path, content: IO[bytes]) -> tuple[dict[int, ClientWindow], int]:
    """The windows in which a client is active, and the number of the window after its last."""
    found: dict[int, ClientWindow] = {}
    end = 0
    for line, raw in enumerate(content, start=1):
        cells = raw.decode("ascii", "replace").strip().split(",")
        if len(cells) != 6:
            raise row_error(path, line, f"has {len(cells)} columns, not 6")
        try:
            start_s, rate_rps = float(cells[0]), float(cells[1])
            number = int(start_s // WINDOW_S)
            end = max(end, number + 1)
            if rate_rps == 0:
                continue
            shape = float(cells[4])
        except ValueError as error:
            raise row_error(path, line, f"is not a number: {error}") from None
        if cells[3] not in GAPS or not shape > 0 or not rate_rps > 0:
            raise row_error(path, line, f"needs a rate, one of {', '.join(GAPS)} and a shape above 0: {cells}")
        found[number] = ClientWindow(rate_rps * WINDOW_S, cells[3], shape)
    return found, end


def _dataset(path: Path, content: IO[bytes]) -> dict[float, IndependentLengths]:
    """The length histograms of a client by the time from which they hold."""
    found: dict[float, IndependentLengths] = {}
    try:
        for start, columns in json.load(content).items():
            histograms = [_histogram(columns[side]) for side in ("input_tokens", "output_tokens")]
            found[float(start)] = IndependentLengths(*histograms)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WorkloadError(f"{path}: is not a client's length histograms: {error!r}") from error
    return found


def _histogram(text: str) -> TokenHistogram:
    """``{tokens: probability, ...}`` as a histogram; a hundred times quicker than evaluating the literal."""
    flat = np.array(text.strip("{} ").replace(":", ",").split(","), dtype=float)
    return TokenHistogram.of(flat[0::2], flat[1::2])
