"""What a node agent and its clients say to each other: paths, query parameters, JSON bodies, error kinds. Pure.

Paths and shapes are zeusd's (query parameters, JSON by GPU index, an empty 200 for a write), so that either can stand
in for the other and for the emulator's node agent. Ours beside them: ``/lease/renew``, ``/gpu/get_locked_clocks``,
``/gpu/get_supported_clocks``, and the optional parameters ``holder`` and ``lease_s`` of a set; a client takes a 404
for "this agent has no leases".
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from urllib.parse import parse_qs

from energy.gpu import (
    ClockDwellError,
    ClockLock,
    ClockRangeError,
    GpuAgentError,
    GpuDriverError,
    GpuError,
    GpuLostError,
    GpuMigError,
    GpuPermissionError,
    GpuUnsupportedError,
    NoSuchGpuError,
)

SET_CLOCKS = "/gpu/set_gpu_locked_clocks"
RESET_CLOCKS = "/gpu/reset_gpu_locked_clocks"
RESET_CLOCKS_SHORT = "/gpu/reset_locked_clocks"
GET_ENERGY = "/gpu/get_cumulative_energy"
GET_POWER = "/gpu/get_power"
GET_LOCKED = "/gpu/get_locked_clocks"
GET_SUPPORTED = "/gpu/get_supported_clocks"
RENEW = "/lease/renew"
METRICS = "/metrics"
HEALTH = "/health"

ANYBODY = "anybody"  # the holder of a lock whose client names none, as zeusd's clients

# kind on the wire -> error and status; the first that fits an error is used
_KINDS: tuple[tuple[str, type[GpuError], HTTPStatus], ...] = (
    ("no-such-gpu", NoSuchGpuError, HTTPStatus.BAD_REQUEST),
    ("clock-range", ClockRangeError, HTTPStatus.BAD_REQUEST),
    ("clock-dwell", ClockDwellError, HTTPStatus.TOO_MANY_REQUESTS),
    ("no-permission", GpuPermissionError, HTTPStatus.FORBIDDEN),
    ("mig", GpuMigError, HTTPStatus.NOT_IMPLEMENTED),
    ("unsupported", GpuUnsupportedError, HTTPStatus.NOT_IMPLEMENTED),
    ("gpu-lost", GpuLostError, HTTPStatus.SERVICE_UNAVAILABLE),
    ("no-driver", GpuDriverError, HTTPStatus.SERVICE_UNAVAILABLE),
    ("gpu", GpuError, HTTPStatus.INTERNAL_SERVER_ERROR),
)


class BadQueryError(ValueError):
    """A query parameter is missing or wrong; the message names it."""


@dataclass(frozen=True, slots=True)
class SetClocks:
    """A parsed request to lock clocks."""

    gpus: tuple[int, ...]
    lock: ClockLock
    holder: str
    lease_s: float | None


class Query:
    """The query parameters of one request."""

    def __init__(self, query: str) -> None:
        self._given = {name: values[0] for name, values in parse_qs(query).items()}

    def gpus(self, every: tuple[int, ...] | None = None) -> tuple[int, ...]:
        """``gpu_ids``; ``every`` if there is none and that is allowed. Raises ``BadQueryError``."""
        text = self._given.get("gpu_ids", "")
        if not text and every is not None:
            return every
        parts = [part.strip() for part in text.split(",") if part.strip()]
        if not parts or not all(part.isascii() and part.isdigit() for part in parts):
            raise BadQueryError(f"gpu_ids must be GPU indices as 0,1,2; found {text!r}")
        return tuple(dict.fromkeys(int(part) for part in parts))

    def holder(self) -> str:
        """``holder``, or anybody."""
        return self._given.get("holder", ANYBODY)[:100]

    def set_clocks(self) -> SetClocks:
        """The parameters of a set. Raises ``BadQueryError``."""
        lock = ClockLock(self._clock("min_clock_mhz"), self._clock("max_clock_mhz"))
        return SetClocks(self.gpus(), lock, self.holder(), self._lease_s())

    def _clock(self, name: str) -> int:
        text = self._given.get(name, "")
        if not (text.isascii() and text.isdigit()) or len(text) > 6:
            raise BadQueryError(f"{name} must be a whole number of MHz, not {text!r}")
        return int(text)

    def _lease_s(self) -> float | None:
        if (text := self._given.get("lease_s")) is None:
            return None
        try:
            lease_s = float(text)
        except ValueError:
            lease_s = math.nan
        if not (0.0 < lease_s < math.inf):
            raise BadQueryError(f"lease_s must be seconds above 0, not {text!r}")
        return lease_s


def error_answer(error: GpuError) -> tuple[HTTPStatus, bytes]:
    """Status and body that tell a client of this error."""
    kind, _, status = next(entry for entry in _KINDS if isinstance(error, entry[1]))
    body: dict[str, object] = {"error": str(error), "kind": kind}
    if isinstance(error, ClockDwellError):
        body["retry_after_s"] = error.retry_after_s
    return status, json.dumps(body).encode()


def error_of_answer(address: str, status: int, body: bytes) -> GpuError:
    """The error an agent told of; of zeusd, which names no kind, the status says what it can."""
    try:
        told = json.loads(body)
    except ValueError:
        told = None
    if not isinstance(told, Mapping):
        told = {"error": body.decode(errors="replace")[:200]}
    message = f"agent {address}: {told.get('error') or HTTPStatus(status).phrase}"
    if told.get("kind") == "clock-dwell":
        retry_after_s = told.get("retry_after_s")
        return ClockDwellError(message, float(retry_after_s) if isinstance(retry_after_s, int | float) else 1.0)
    kinds = {kind: error for kind, error, _ in _KINDS}
    if (kind := kinds.get(str(told.get("kind")))) is not None:
        return kind(message)
    if status == HTTPStatus.FORBIDDEN:
        return GpuPermissionError(message)
    if status == HTTPStatus.BAD_REQUEST:
        return NoSuchGpuError(message)
    return GpuAgentError(f"{message} (status {status})")
