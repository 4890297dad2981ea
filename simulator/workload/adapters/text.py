"""Numbered lines of a plain or gzipped text file, and the errors that name them."""

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

from simulator.workload.arrivals import WorkloadError

_GZIP_MAGIC = b"\x1f\x8b"


def row_error(path: Path, line: int, what: str) -> WorkloadError:
    """The error of one row: file, line and what is wrong."""
    return WorkloadError(f"{path}:{line}: {what}")


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number from 1, text without its end) of every line that is not blank.

    Raises WorkloadError for a file that is missing, cut short, or not UTF-8.
    """
    number = 0
    try:
        with _opened(path) as file:
            for number, raw in enumerate(file, start=1):
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
                if text.strip():
                    yield number, text
    except UnicodeDecodeError as error:
        raise row_error(path, number, f"is not UTF-8 text ({error.reason})") from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise row_error(path, number + 1, f"the gzip stream is damaged or cut short ({error})") from error
    except OSError as error:
        raise WorkloadError(f"{path}: cannot be read: {error.strerror or error}") from error


def _opened(path: Path) -> BinaryIO:
    with path.open("rb") as file:
        zipped = file.read(2) == _GZIP_MAGIC
    # GzipFile has all of a binary file's iteration and closing, under a type of its own
    return cast(BinaryIO, gzip.open(path, "rb")) if zipped else path.open("rb")


def whole_tokens(path: Path, line: int, column: str, value: object) -> int:
    """A token count of a row: a whole number, at least 1."""
    try:
        number = float(value)  # type: ignore[arg-type]
        tokens = int(number)
    except (TypeError, ValueError, OverflowError):
        raise row_error(path, line, f"{column} is not a number: {value!r}") from None
    if tokens != number or not 1 <= tokens < 2**31:
        raise row_error(path, line, f"{column} must be a whole number of tokens >= 1, not {value!r}")
    return tokens
