"""HTTP/1.1 as the gateway writes it: heads and chunks as bytes. Writing only; reading is httptools' work."""

from collections.abc import Iterable
from functools import lru_cache

from proxy.errors import ApiError, phrase

_STATUS_LINES = {status: b"HTTP/1.1 %d %b\r\n" % (status, phrase(status).encode()) for status in range(200, 600)}
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
LAST_CHUNK = b"0\r\n\r\n"
CHUNKED = b"transfer-encoding: chunked\r\n"
CLOSE = b"connection: close\r\n"
CLOSE_AND_BLANK = CLOSE + b"\r\n"


def status_line(status: int) -> bytes:
    """The first line of an answer."""
    return _STATUS_LINES.get(status) or b"HTTP/1.1 %d \r\n" % status


def header_lines(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Header lines, without the blank line that ends a head."""
    return b"".join([b"%b: %b\r\n" % header for header in headers])


def chunk(payload: bytes) -> bytes:
    """One chunk of a chunked body. ``payload`` must not be empty: that would be the last."""
    return b"%x\r\n%b\r\n" % (len(payload), payload)


@lru_cache(4096)
def placed_lines(pool: str, instance_id: str) -> bytes:
    """Header lines that say where a request was served."""
    return b"x-dynamollm-pool: %b\r\nx-dynamollm-instance: %b\r\n" % (pool.encode(), instance_id.encode())


def content_length(length: int) -> bytes:
    """The header line."""
    return b"content-length: %d\r\n" % length


def error_answer(error: ApiError, extra_lines: bytes, keep_alive: bool) -> bytes:
    """A whole answer that tells an error."""
    body = error.body()
    return b"".join(
        (
            status_line(error.status),
            b"content-type: application/json\r\n",
            content_length(len(body)),
            header_lines(error.headers()),
            extra_lines,
            b"" if keep_alive else CLOSE,
            b"\r\n",
            body,
        )
    )
