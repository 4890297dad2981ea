"""ApiError: every way a request fails at the gateway, and how a client reads it.

Always ``{"error": {message, type, param, code}}``, the shape of OpenAI's API and of vLLM's. The tree of causes:

    ApiError
      the client's fault    400 bad_request, 401 unauthorized, 404 model_not_found, 408 slow_client, 413 body_too_large,
                            431 head_too_large
      nobody can serve      503 rejected (no endpoints, shutting down), 503 unreachable
      too many want it      429 rejected (saturated, waited too long, evicted)
      an instance's fault   502 broken, 504 late, or what the instance answered (``of_engine``)

Never logs, never writes to a socket.
"""

from contextlib import suppress
from http import HTTPStatus
from typing import Any

import msgspec

from pools.request import Rejected, RejectReason

RETRY_AFTER_LIMIT_S = 30.0
_encode = msgspec.json.Encoder().encode


class ApiError(Exception):
    """A failure as the client sees it; ``retry_after_s`` only where trying again makes sense."""

    def __init__(
        self,
        status: int,
        message: str,
        kind: str,
        *,
        param: str | None = None,
        code: str | int | None = None,
        reason: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.param = param
        self.code: str | int = status if code is None else code
        self.reason = reason
        self.retry_after_s = retry_after_s

    def body(self) -> bytes:
        """The JSON body."""
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return _encode({"error": error})

    def event(self) -> bytes:
        """The same inside a stream that has begun: an error event, then the end, as vLLM does."""
        return b"data: " + self.body() + b"\n\ndata: [DONE]\n\n"

    def headers(self) -> tuple[tuple[bytes, bytes], ...]:
        """What tells a client (the openai package obeys all three) when to come back, and why it was dropped."""
        lines = []
        if self.retry_after_s is not None:
            wait_s = min(max(self.retry_after_s, 0.0), RETRY_AFTER_LIMIT_S)
            lines.append((b"retry-after", b"%d" % max(1, round(wait_s))))
            lines.append((b"retry-after-ms", b"%d" % round(wait_s * 1000)))
            lines.append((b"x-should-retry", b"true"))
        if self.reason is not None:
            lines.append((b"x-llm-d-request-dropped-reason", self.reason.encode()))
        return tuple(lines)


def bad_request(message: str, param: str | None = None) -> ApiError:
    """400: the request itself is wrong; the same request will be wrong again."""
    return ApiError(400, message, "Bad Request", param=param)


def unauthorized() -> ApiError:
    """401: no key, or not one of ours."""
    message = "Incorrect API key provided: pass a configured key as 'Authorization: Bearer KEY'"
    return ApiError(401, message, "invalid_request_error", code="invalid_api_key")


def model_not_found(model: str) -> ApiError:
    """404: no such model is served here."""
    return ApiError(404, f"The model `{model}` does not exist; see GET /v1/models", "NotFoundError", param="model")


def slow_client(what: str, limit_s: float) -> ApiError:
    """408: the request did not arrive in time."""
    return ApiError(408, f"The request's {what} did not arrive within {limit_s:g} s", "Request Timeout")


def body_too_large(limit_bytes: int) -> ApiError:
    """413: the body is over the configured limit."""
    return ApiError(413, f"The request body is over the limit of {limit_bytes} bytes", "Request Entity Too Large")


def head_too_large(limit_bytes: int) -> ApiError:
    """431: the request line and headers are over the configured limit."""
    message = f"The request's headers are over the limit of {limit_bytes} bytes"
    return ApiError(431, message, "Request Header Fields Too Large")


def rejected(decision: Rejected) -> ApiError:
    """429 or 503: what the router said."""
    if decision.contended:
        status, kind, message = 429, "rate_limit_error", "All instances are busy; try again later"
    else:
        status, kind, message = 503, "service_unavailable", "No instance can serve this request now"
    if decision.reason is RejectReason.SHUTTING_DOWN:
        message = "The gateway is shutting down"
    return ApiError(status, message, kind, reason=decision.reason.value, retry_after_s=decision.retry_after_s)


def shutting_down() -> ApiError:
    """503: this gateway stops; another may serve."""
    return rejected(Rejected(RejectReason.SHUTTING_DOWN, contended=False, retry_after_s=1.0))


def unreachable() -> ApiError:
    """503: no connection to any instance that was tried."""
    reason = RejectReason.NO_ENDPOINTS.value
    message = "No instance could be reached"
    return ApiError(503, message, "service_unavailable", reason=reason, retry_after_s=1.0)


def broken(message: str = "The instance serving this request failed") -> ApiError:
    """502: an instance took the request and died, or did not speak HTTP."""
    return ApiError(502, message, "bad_gateway", retry_after_s=1.0)


def late(limit_s: float) -> ApiError:
    """504: a deadline passed."""
    return ApiError(504, f"No answer within the deadline of {limit_s:g} s", "gateway_timeout")


def of_engine(status: int, body: bytes) -> ApiError:
    """What an instance answered, brought into the one shape; vLLM has others for 401, 404 and 405."""
    fields: Any = None
    with suppress(msgspec.DecodeError, UnicodeDecodeError):
        fields = msgspec.json.decode(body)
    error = fields.get("error", fields.get("detail")) if isinstance(fields, dict) else None
    retry_after_s = 1.0 if status in (429, 503) else None
    kind = phrase(status)
    if not isinstance(error, dict):
        message = error if isinstance(error, str) else f"The instance answered {status} {kind}"
        return ApiError(status, message, kind, retry_after_s=retry_after_s)
    code = error.get("code")
    param = error.get("param")
    return ApiError(
        status,
        str(error.get("message", f"The instance answered {status}")),
        str(error.get("type", kind)),
        param=None if param is None else str(param),
        code=code if isinstance(code, int | str) else status,
        retry_after_s=retry_after_s,
    )


def phrase(status: int) -> str:
    """The reason phrase of a status code, empty when it has none."""
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return ""
