"""ApiError: what an instance answers when it does not serve, in vLLM's shapes (observed on vLLM 0.32)."""

import json
from typing import Any


class ApiError(Exception):
    """An answer other than 200. ``kind`` is the ``type`` of the body."""

    def __init__(self, status: int, kind: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.message = message
        self.param = param

    def _body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.status}}

    def body(self) -> bytes:
        """JSON of the answer."""
        return json.dumps(self._body(), separators=(",", ":"), ensure_ascii=False).encode()

    def event(self) -> bytes:
        """The same inside a stream that has begun with 200."""
        return b"data: %b\n\n" % json.dumps(self._body()).encode()


def bad_request(message: str, param: str | None = None, value: object = None) -> ApiError:
    """A value that the model or the engine cannot take; ``value`` is repeated after the message if it is given."""
    if param is not None and value is not None:
        message += f" (parameter={param}, value={value})"
    elif param is not None:
        message += f" (parameter={param})"
    return ApiError(400, "BadRequestError", message, param)


def engine_dead() -> ApiError:
    """The engine behind the server is gone."""
    message = "EngineCore encountered an issue. See stack trace (above) for the root cause."
    return ApiError(500, "InternalServerError", message)


def shutting_down() -> ApiError:
    """The server drains after SIGTERM."""
    return ApiError(500, "InternalServerError", "cannot schedule new futures after shutdown")


def queue_full() -> ApiError:
    """As many requests are in flight as ``--max-num-queued-reqs`` allows."""
    busy = "The engine is currently busy and cannot accept new requests."
    return ApiError(503, "Service Unavailable", f"{busy} Please try again later or on a different instance.")
